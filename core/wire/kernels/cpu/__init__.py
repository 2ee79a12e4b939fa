"""The kernels for CPU, fused with numba: each reads its inputs once, in chunks that stay in cache.

A worker or server *produces* a chunk of D into scratch (`rules`, `codes.average`); a code *consumes* it (`codes`, with
`select` for top-k). `loops` has the kernels, `compiling` how they come to be compiled. They run without the
interpreter lock, and the rows of a table are shared out to `torch.get_num_threads()` threads (torchrun sets one per
rank). No reduction depends on the number of threads or the vector width of the machine: sums are made in float64 in a
fixed order.

Arguments, as `saef.wire.kernels.table` has them, and what the loops get (T is the state's dtype):

    table, reply_table   [B, COLUMNS] int64
    update               Update(kind int64, hyper [groups, columns] T, step_ahead T, feedback bool)
    worker               Worker(g [n] T, m [S, d] T, e [d] T, x [d] T)
    message, reply       [bytes] uint8            Message(floats T, halves uint16, bytes uint8), one memory
    messages             [K, bytes] uint8         the same, [K, ...] each
    replies              as message
    e                    [served] T
    rates                [groups] T
    v, half              [n], [d] T
    ahead                T
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numba import boolean, from_dtype, int64, types, uint8, uint16, uint32, uint64
from torch import Tensor

from ..reference import step_ahead
from ..table import KIND, NUMEL, Update, Worker, check_kinds, malformed, unknown_rule
from . import compiling, loops, rules
from .records import CHUNK, Array, Message

__all__ = [
    "CHUNK",
    "advance",
    "commit",
    "compress",
    "fingerprints",
    "inspect",
    "prepare",
    "serve",
    "settle",
    "step_ahead",
    "subtract",
]

WORD_BYTES = 4  # of a fingerprint
PARALLEL_NUMEL = 1 << 19  # coordinates; below this, starting threads costs more than it gains


def compress(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    _run(worker.g.dtype, loops.compress, [table], _update(update), _worker(worker), _message(message, worker.g))


def commit(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    _run(worker.g.dtype, loops.commit, [table], _update(update), _worker(worker), _message(message, worker.g))


def advance(
    table: Tensor,
    reply_table: Tensor,
    update: Update,
    worker: Worker,
    message: Tensor,
    rates: Tensor,
    replies: Tensor,
    half: Tensor,
    ahead: float,
    prints: Tensor | None = None,
) -> None:
    """prints: [B] int64, to which the fingerprint of each block of x is added, counted from where x begins."""
    g, own, other = worker.g, _message(message, worker.g), _message(replies, worker.g)
    rest = rates.numpy(), other, _array(half), _array(half).dtype.type(ahead)
    found = np.empty(0, np.uint64) if prints is None else prints.numpy().view(np.uint64)
    _run(g.dtype, loops.advance, [table, reply_table], _update(update), _worker(worker), own, *rest, of_rows=[found])


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    every = _message(messages.contiguous(), e)
    _run(e.dtype, loops.serve, [table, reply_table], every, _array(e), _message(reply, e))


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    every = _message(messages.contiguous(), e)
    _run(e.dtype, loops.settle, [table, reply_table], every, _array(e), _message(reply, e))


def subtract(table: Tensor, rates: Tensor, message: Tensor, v: Tensor) -> None:
    _run(v.dtype, loops.subtract, [table], rates.numpy(), _message(message, v), _array(v))


def inspect(table: Tensor, message: Tensor) -> None:
    _run(torch.float32, loops.inspect, [table], message.numpy())


def fingerprints(addresses: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """[n] int64: of the memory at n addresses (`saef.wire.kernels.cpu.prints`), counted from the lowest of them.

    Args:
        addresses: of CPU tensors without gaps.
        sizes: in bytes; whole words are read, so up to 3 bytes more on either side.
    """
    words, starts, counts = _lying(tuple(addresses), tuple(sizes))
    out = np.zeros(len(counts), np.uint64)
    if len(words):
        loops.fingerprints(words, starts, counts, out)
    return torch.from_numpy(out.view(np.int64))


@lru_cache(40)  # x and parts of x_half stay where they are, and gradients mostly
def _lying(addresses: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(words from the first to the last of them, where each begins in these, how many it has)."""
    at, size = np.array([addresses, sizes], np.int64)
    first = at // WORD_BYTES
    counts = np.where(size > 0, -(-(at + size) // WORD_BYTES) - first, 0)
    there = counts > 0
    if not there.any():
        return np.empty(0, np.uint32), counts, counts
    lowest = int(first[there].min())
    span = int((first + counts)[there].max()) - lowest
    words = np.ctypeslib.as_array((ctypes.c_uint32 * span).from_address(lowest * WORD_BYTES))
    return words, np.where(there, first - lowest, 0), counts


@cache
def prepare(dtype: torch.dtype) -> bool:
    """Have all kernels ready for states of this dtype; whether something had to be compiled.

    Loads them from numba's cache, or compiles them, which one process of a machine does while the others wait.
    """
    T = from_dtype(np.dtype(str(dtype).removeprefix("torch.")))
    vector, matrix, table = T[::1], T[:, ::1], int64[:, ::1]
    update = types.NamedTuple((int64, matrix, T, boolean), Update)
    worker = types.NamedTuple((vector, matrix, vector, vector), Worker)
    message = types.NamedTuple((vector, uint16[::1], uint8[::1]), Message)
    every = types.NamedTuple((matrix, uint16[:, ::1], uint8[:, ::1]), Message)
    wanted = [
        (loops.compress, (table, update, worker, message)),
        (loops.commit, (table, update, worker, message)),
        (loops.advance, (table, table, uint64[::1], update, worker, message, vector, message, vector, T)),
        (loops.serve, (table, table, every, vector, message)),
        (loops.settle, (table, table, every, vector, message)),
        (loops.subtract, (table, vector, message, vector)),
        (loops.inspect, (table, uint8[::1])),
        (loops.fingerprints, (uint32[::1], int64[::1], int64[::1], uint64[::1])),
    ]
    return compiling.prepare(wanted, str(dtype).removeprefix("torch."))


def _array(v: Tensor) -> Array:
    return v.detach().numpy()


def _message(message: Tensor, like: Tensor) -> Message:
    packed = message.numpy()
    return Message(message.view(like.dtype).numpy(), packed.view(np.uint16), packed)


def _update(update: Update) -> Any:
    """`Update` of arrays."""
    if update.kind not in rules.KINDS:
        raise unknown_rule(update.kind)
    hyper = update.hyper.numpy()
    return Update(update.kind, hyper, hyper.dtype.type(update.step_ahead), update.feedback)  # type: ignore[arg-type]


def _worker(worker: Worker) -> Any:
    """`Worker` of arrays."""
    return Worker(*(_array(v) for v in worker))  # type: ignore[arg-type]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saef-kernel")


def _run(dtype: torch.dtype, kernel: Any, tables: list[Tensor], *args: Any, of_rows: Sequence[Array] = ()) -> None:
    """Call `kernel` on the tables' rows, in equal shares of coordinates, one per thread.

    of_rows: arrays with an entry for each row, which come after the tables; or with none.
    """
    prepare(dtype)
    rows = [table.numpy() for table in tables]
    for table in rows:
        check_kinds(table[:, KIND].tolist())
    threads = min(torch.get_num_threads(), len(rows[0]))
    ends = np.cumsum(rows[0][:, NUMEL])
    rows += of_rows
    if threads < 2 or ends[-1] < PARALLEL_NUMEL:
        bad = int(kernel(*rows, *args))
    else:
        cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads).tolist(), len(ends)]
        shares = [[every[a:b] for every in rows] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        found = _pool(threads).map(lambda share: int(kernel(*share, *args)), shares)
        bad = next((a + b for a, b in zip(cuts[:-1], found, strict=True) if b >= 0), -1)
    if bad >= 0:
        raise malformed(bad)
