"""Hostile bytes for every decoder.

    python tests/support/fuzz.py --messages 100000             mutated messages, the same ones every time
    python tests/support/fuzz.py --atheris --messages 100000   coverage-guided (libFuzzer), where atheris is installed

A message of whatever bytes and length is refused with an error that says "malformed", or decodes to finite numbers
no larger than its largest scale or value. Every few messages the bytes also go to a server and to the kernels that
apply them, where numbers are not checked but indices are: nothing may be written beyond the vectors. With
NUMBA_BOUNDSCHECK=1 in the environment every access of the CPU kernels is checked, reading included.
"""

import argparse
import inspect
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saef import Codec, Identity, MajorityVote, MinSize, ScaledSign, TopK
from saef.rules.sgd import SGD
from saef.wire import codec, kernels
from saef.wire.kernels import Kernels, cpu, reference
from saef.wire.kernels.table import STATE, Update, Worker

GUARD = 64  # entries before and behind a vector, which must stay as they are
CODECS = {
    "sign": (ScaledSign(9), [20, 3]),
    "vote": (MajorityVote(9), [20, 3]),
    "top-k": (TopK(0.3, 10), [25, 3]),
    "top-k in bfloat16": (TopK(0.3, 10, values=torch.bfloat16), [25, 3]),
    "dense in bfloat16": (Identity(values=torch.bfloat16), [5, 2]),
    "top-k, two-byte indices": (TopK(0.02, "layer"), [300, 3]),
    "dense": (Identity(), [5, 2]),
    "mixed": (MinSize(4, TopK(0.2, 12)), [3, 30]),
}


class Target:
    """One codec, and what its messages are given to."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, backend: Kernels = cpu, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        compressor, numels = CODECS[name]
        self.codec, self.dtype, self.backend = Codec(compressor, numels, dtype, backend), dtype, backend
        gen = torch.Generator().manual_seed(5)
        self.good = self.codec.encode([torch.randn(n, dtype=dtype, generator=gen).to(device) for n in numels])
        self.n, d = self.codec.message_bytes, sum(numels)
        self.table = self.codec.layout.table.clone()
        self.table[:, STATE] += GUARD
        self.table = self.table.to(device)
        self.d, self.g = d, torch.randn(d, dtype=dtype, generator=gen).to(device)
        hyper = torch.tensor([[0.1, 0.9, 1, 0, 0, 1]], dtype=dtype, device=device)
        self.rule, self.once = Update(SGD.kind, hyper, 0.0, True), torch.ones(1, dtype=dtype, device=device)
        self.reply = torch.zeros(GUARD + self.n + GUARD, dtype=torch.uint8, device=device)

    def check(self, data: bytes, with_kernels: bool = True) -> bool:
        """Give `data` to what decodes it; whether it was a message. Raises AssertionError if it did harm."""
        message = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(self.device)
        try:
            decoded = torch.cat(self.codec.decode(message))
        except ValueError as error:
            assert "malformed message: " in str(error)
            decoded = None
        else:
            layout = self.codec.layout
            numbers = codec.scalars(layout.scalars, message, self.dtype)
            if layout.halves:
                numbers = codec.scalars(layout.halves, message[numbers.nbytes :], torch.bfloat16)
            assert len(message) == self.n
            assert float(decoded.abs().max()) <= float(numbers.abs().max()) < math.inf  # so there is no NaN either
        if with_kernels and len(message) == self.n:  # a collective receives no other length
            self._kernels(message)
        return decoded is not None

    def _kernels(self, message: Tensor) -> None:
        said = [self._refused(self.backend.subtract, self.table, self.once, message, *self._vectors(1))]
        said.append(self._refused(self.backend.inspect, self.table, message))
        assert said[0] == said[1]
        both = torch.stack([self.good, message])
        part = self.reply[GUARD : GUARD + self.n]
        said.append(self._refused(self.backend.serve, self.table, self.table, both, *self._vectors(1), part))
        assert said[0] == said[2] and not self.reply[:GUARD].any() and not self.reply[GUARD + self.n :].any()
        self._refused(self.backend.settle, self.table, self.table, both, *self._vectors(1), message)
        e, m, x = self._vectors(3)
        worker = Worker(self.g, m[None], e, x)
        self._refused(self.backend.commit, self.table, self.rule, worker, message, guarded=(m, e, x))

    def _vectors(self, count: int) -> list[Tensor]:
        size = GUARD + self.d + GUARD
        return [torch.full((size,), 7.0, dtype=self.dtype, device=self.device) for _ in range(count)]

    def _refused(self, kernel: Callable[..., None], *args: object, guarded: tuple[Tensor, ...] = ()) -> bool:
        vectors = guarded or [v for v in args if isinstance(v, Tensor) and len(v) == 2 * GUARD + self.d]
        try:
            kernel(*args)
            kernels.check(self.device)  # a GPU says so only when asked
            refused = False
        except ValueError as error:
            assert "malformed message: " in str(error)
            refused = True
        for v in vectors:
            assert bool((v[:GUARD] == 7).all()) and bool((v[GUARD + self.d :] == 7).all())
        return refused


def mutations(good: bytes, count: int, seed: int, head: int) -> Iterator[bytes]:
    """`count` messages: truncated, extended, random, or a good one with bytes, bits or slices of it changed.

    head: bytes of scalars at its beginning; half of the changes spare them, since one damaged number hides all else.
    """
    gen = random.Random(seed)
    for i in range(count):
        data = bytearray(good)
        start = head if gen.random() < 0.5 and head < len(data) else 0
        kind = i % 8
        if kind == 0:
            del data[gen.randrange(len(data) + 1) :]
        elif kind == 1:
            data += gen.randbytes(gen.randrange(1, 40))
        elif kind == 2:
            data[start:] = gen.randbytes(len(data) - start)
        elif kind == 3:
            data = bytearray(gen.randbytes(gen.randrange(2 * len(data))))
        elif kind == 4:
            at, n = gen.randrange(start, len(data)), gen.randrange(1, 9)
            data[at : at + n] = bytes([gen.choice([0, 255, 1, 127, 128])]) * len(data[at : at + n])
        else:
            for _ in range(1 if kind == 5 else 4):
                at = gen.randrange(start, len(data))
                data[at] = data[at] ^ 1 << gen.randrange(8) if kind == 6 else gen.randrange(256)
        yield bytes(data)


def fuzz(
    name: str,
    count: int,
    dtype: torch.dtype = torch.float32,
    backend: Kernels = cpu,
    device: str = "cpu",
    every: int = 7,
) -> tuple[int, int]:
    """(messages, how many of them decoded). One in `every` goes to the kernels, too."""
    target = Target(name, dtype, backend, device)
    head = target.codec.layout.scalars * dtype.itemsize
    messages = mutations(bytes(target.good.tolist()), count, 1, head)
    # 7 and 8, the number of kinds of mutations, have no common divisor: the kernels meet all kinds.
    return count, sum(target.check(data, i % every == 0) for i, data in enumerate(messages))


def coverage_guided(count: int) -> None:
    """Does not return: libFuzzer ends the process, with status 0 if nothing was found.

    With NUMBA_DISABLE_JIT=1 it is guided through the CPU kernels, too, which then are plain Python.
    """
    import atheris

    from saef.wire.kernels.cpu import codes, loops, rules, select

    for module in (codec, cpu, codes, loops, rules, select, reference):
        for function in [*vars(module).values(), *vars(Codec).values()]:
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    targets = [Target(name, dtype) for name in CODECS for dtype in (torch.float32, torch.float64)]

    def one(data: bytes) -> None:
        if data:
            targets[data[0] % len(targets)].check(data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for i, target in enumerate(targets):
            Path(corpus, str(i)).write_bytes(bytes([i]) + bytes(target.good.tolist()))
        atheris.Setup([sys.argv[0], f"-atheris_runs={count}", "-max_len=512", "-seed=1", corpus], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000, help="for each codec (--atheris: in all)")
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--codecs", nargs="*", choices=CODECS, default=list(CODECS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.atheris:
        coverage_guided(args.messages)
    for name in args.codecs:
        count, decoded = fuzz(name, args.messages)
        print(f"{name:25}{count:9,} messages, {decoded:7,} decoded, {count - decoded:7,} refused", flush=True)


if __name__ == "__main__":
    main()
