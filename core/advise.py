"""Say whether compression pays on this cluster, and which method: measured here, then computed.

torchrun ... -m saef advise --parameters 124e6 --step-ms 300 [--dtype bfloat16] [--optimizer adamw]
torchrun ... -m saef advise --model MODULE:FACTORY --batch MODULE:FACTORY [--optimizer adamw]

Started on the nodes, and by as many ranks, as training will be. It measures the network's collectives, with pauses as
long as a step computes, and what each method computes on these devices; that takes about a minute. Of training it takes
the number of parameters and the milliseconds of a step of one rank that exchanges nothing, or a function without
arguments that returns the model, and one that returns a batch: a tuple of arguments or a dict of keywords for its
forward. The loss is what the forward returns if that is a single number, else the mean square of its first tensor.

For each method it prints the predicted step, what a rank sends in a step, and the memory that it needs beside
parameters, gradients and the optimizer's own state; then a verdict. Local steps train differently, and the others but
plain DDP are lossy: whether training is as good is not measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import probe
from .comm.cost import PAYS, Method, break_even_bits_per_s, buckets_of, step_bytes, step_seconds
from .comm.exchange import choose
from .probe import HALF, NAMES, PLAIN, SETTINGS, Measured
from .protocols.averaging import Rotating
from .wire.codec import message_bytes

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], int]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9}, 1),
    "adamw": (torch.optim.AdamW, {"lr": 1e-6}, 2),
}  # with vectors of the model's size that they keep; at a rate that leaves the model as it is


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@final
@dataclass(frozen=True)
class Line:
    """A method's prediction: seconds and bytes of a step, memory beyond plain training's, and the links' rate in bit/s
    below which it is faster than plain DDP (0: never, infinite: at any rate)."""

    method: str
    step_s: float
    speed_up: float
    bytes: float
    memory_bytes: float
    break_even_bits_per_s: float
    strategy: str
    steps_between_exchanges: int


@final
@dataclass(frozen=True)
class Advice:
    """What comes out. link_bits_per_s: what a rank sends in a second of a long all-reduce, as measured."""

    workers: int
    device: str
    parameters: int
    dtype: str
    compute_s: float
    link_bits_per_s: float
    latency_s: float
    overlap: bool
    lines: list[Line]
    verdict: str


# -- what is computed --------------------------------------------------------------------------------------------------


def methods(
    workers: int,
    parameters: int,
    kernels: Mapping[str, float],
    *,
    numels: Sequence[int] | None = None,
    optimizer_vectors: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Method]:
    """The methods whose kernels were measured, for a model.

    Args:
        kernels: seconds a coordinate and step.
        numels: sizes of some of its tensors, or of tensors like them.
        optimizer_vectors: what the optimizer keeps, in vectors of the model's size.
        dtype: of its parameters. A state beside 16-bit ones is of float32.
    """
    numels = numels or probe.sample(parameters)
    d, n, own = parameters, buckets_of(parameters, dtype.itemsize), max(4, dtype.itemsize)
    state = torch.float64 if own == 8 else torch.float32
    found = []
    for name, rate in kernels.items():
        if name not in SETTINGS:
            dense = float(2 if name == HALF else dtype.itemsize) * d
            found.append(Method(name, dense, buckets=n, kernels_s=rate * d))
            continue
        settings = SETTINGS[name]
        a = math.ceil(message_bytes(settings["compressor"], numels, state) * (d / sum(numels)))
        H, averaging = settings.get("local_steps", 1), settings.get("averaging")
        strategy = choose(workers, a, a)
        replicated = strategy == "replicated"
        vectors = 2 + (1 if replicated else 1 / workers)  # x or x_half, e, the server's
        vectors += 1 + optimizer_vectors if H > 1 else 0  # x_half - X, and a copy of the optimizer's
        dense = float(own) * d / averaging.period if isinstance(averaging, Rotating) else 0.0
        memory = float(own) * d * vectors + (workers + 1 if replicated else 3) * a
        found.append(
            Method(name, dense, a, a, strategy, H, buckets=n, kernels_s=rate * d, memory_bytes=memory),
        )
    return found


def advise(
    measured: Measured,
    parameters: int,
    compute_s: float,
    *,
    optimizer: str = "sgd",
    numels: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Advice:
    """Predictions and verdict from what was measured; nothing is sent."""
    network, overlap = measured.network, measured.overlap
    K, vectors = network.workers, OPTIMIZERS[optimizer][2]
    found = methods(K, parameters, measured.kernels, numels=numels, optimizer_vectors=vectors, dtype=dtype)
    seconds = [step_seconds(m, network, compute_s, overlap=overlap) for m in found]
    plain = next(m for m in found if m.name == PLAIN)
    plain_s = seconds[found.index(plain)]
    lines = [
        Line(
            m.name,
            s,
            plain_s / s,
            step_bytes(m, K),
            m.memory_bytes,
            math.nan if m is plain else break_even_bits_per_s(m, plain, network, compute_s, overlap=overlap),
            m.strategy if m.message_bytes else "",
            m.every,
        )
        for m, s in zip(found, seconds, strict=True)
    ]
    said = verdict(lines, network.bits_per_s)
    return Advice(
        workers=K,
        device=measured.device,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        compute_s=compute_s,
        link_bits_per_s=network.bits_per_s,
        latency_s=network.latency_s,
        overlap=overlap,
        lines=lines,
        verdict=said,
    )


def verdict(lines: Sequence[Line], bits_per_s: float) -> str:
    """What to do, in a sentence or two."""
    each = [line for line in lines if line.steps_between_exchanges == 1 and line.method != PLAIN]
    rare = [line for line in lines if line.steps_between_exchanges > 1]
    plain = next(line for line in lines if line.method == PLAIN)
    best, here = min(each, key=lambda line: line.step_s), rate(bits_per_s)
    last = max(line.break_even_bits_per_s for line in each)
    if best.speed_up > PAYS:
        text = f"use {best.method}: {best.speed_up:.1f} times as fast as plain DDP on this network ({here})"
        text += "" if math.isinf(best.break_even_bits_per_s) else f"; it pays below {rate(best.break_even_bits_per_s)}"
    elif last > bits_per_s:  # below the break-even, but not by as much as pays
        text = f"do not compress: the fastest method, {best.method}, gains only {best.speed_up - 1:.0%}"
    elif last > 0:
        text = f"do not compress: your network ({here}) is faster than the break-even of {rate(last)}"
    else:
        text = f"do not compress: kernels and latency cost more than any method saves, at any rate; yours is {here}"
    if rare and (fastest := min(rare, key=lambda line: line.step_s)).step_s * PAYS < min(best.step_s, plain.step_s):
        text += f". With several steps between two exchanges, {fastest.method}: {fastest.speed_up:.1f} times"
    return text


def rate(bits_per_s: float) -> str:
    unit, name = (1e9, "Gb/s") if bits_per_s >= 0.9995e9 else (1e6, "Mb/s")
    return f"{bits_per_s / unit:.3g} {name}"


def table(advice: Advice) -> str:
    of = "" if advice.dtype == "float32" else f" of {advice.dtype}"
    hidden = "hidden behind the backward where it fits" if advice.overlap else "not hidden: no cores to spare"
    lines = [
        f"{advice.workers} ranks, {advice.device}; {advice.parameters:,} parameters{of}, "
        f"{advice.compute_s * 1e3:.1f} ms a step without exchange",
        f"network: {rate(advice.link_bits_per_s)} a rank, {advice.latency_s * 1e3:.3g} ms for the shortest all-reduce; "
        f"exchanges are {hidden}",
        "",
        f"{'':26}{'step, ms':>10}{'to plain':>10}{'MB sent':>10}{'memory, MB':>12}{'pays below':>14}{'exchange':>12}",
    ]
    for line in advice.lines:
        words = {0.0: "never", math.inf: "always"} | ({line.break_even_bits_per_s: ""} if line.method == PLAIN else {})
        pays = words.get(line.break_even_bits_per_s) or (line.method != PLAIN) * rate(line.break_even_bits_per_s)
        lines.append(
            f"{line.method:26}{line.step_s * 1e3:10.1f}{line.speed_up:9.2f}x{line.bytes / 1e6:10.3f}"
            f"{line.memory_bytes / 1e6:12.1f}{pays:>14}{line.strategy:>12}"
        )
    return "\n".join([*lines, "", advice.verdict])


def as_json(advice: Advice) -> str:
    """With null for what is not a finite number."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(asdict(advice)))


# -- the command -------------------------------------------------------------------------------------------------------


def load(text: str) -> Callable[[], Any]:
    """The function that MODULE:FACTORY names."""
    name, _, function = text.partition(":")
    if not name or not function:
        raise argparse.ArgumentTypeError(f"expected MODULE:FACTORY, such as train:make_model, got {text!r}")
    try:
        found = getattr(import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be imported: {error}") from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a function")
    return found  # type: ignore[no-any-return]


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m saef advise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parameters", type=positive, metavar="N", help="how many the model has, e.g. 124e6")
    add("--step-ms", type=positive, metavar="MS", help="of a step of one rank that exchanges nothing")
    add("--dtype", choices=DTYPES, help="of these parameters; float32 if not given")
    add("--model", type=load, metavar="MODULE:FACTORY", help="a function that returns the model, in place of both")
    add("--batch", type=load, metavar="MODULE:FACTORY", help="of --model: one that returns a batch of one rank")
    add("--optimizer", choices=OPTIMIZERS, default="sgd")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda uses nccl, cpu uses gloo")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(words)
    numbers = args.parameters is not None, args.step_ms is not None
    if args.model is not None and args.dtype is not None:
        parser.error("--dtype is of --parameters: a model has its own")
    if args.model is None and numbers != (True, True):
        parser.error("give --parameters and --step-ms, or --model and --batch")
    if args.model is not None and any(numbers):
        parser.error("--model is in place of --parameters and --step-ms: give one or the other")
    if (args.model is None) != (args.batch is None):
        parser.error("--model and --batch come together: what is measured is a step")
    if args.parameters is not None and args.parameters < 1:
        parser.error(f"--parameters must be at least 1, got {args.parameters:g}")
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= {*os.environ}:
        parser.error("start this with torchrun: torchrun --nproc_per_node 4 -m saef advise ...")
    if int(os.environ["WORLD_SIZE"]) < 2:
        parser.error("one rank has nobody to exchange with: start as many as will train")
    return args


def main(words: Sequence[str]) -> int:
    args = parse(words)
    local = int(os.environ.get("LOCAL_RANK", 0))
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and dist.is_nccl_available()
    if args.device == "cuda" and not enough:
        sys.stderr.write("--device cuda needs nccl and a GPU for each rank of this machine\n")
        return 2
    cuda = enough and args.device != "cpu"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    advice = run(args, device)
    if dist.get_rank() == 0:
        sys.stdout.write((as_json(advice) if args.json else table(advice)) + "\n")
        sys.stdout.flush()
    dist.barrier()  # a process that ends while gloo's threads let go of the last step's tensors may abort
    dist.destroy_process_group()
    return 0


def run(args: argparse.Namespace, device: torch.device) -> Advice:
    """Measure, on all ranks, and advise."""
    make, words, _ = OPTIMIZERS[args.optimizer]

    def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
        return make(net.parameters(), **words)

    if args.model is None:
        parameters, step_s, dtype = int(args.parameters), args.step_ms / 1e3, DTYPES[args.dtype or "float32"]
        measured = probe.measure(device, optimizer_of, probe.sample(parameters), pause_s=step_s, dtype=dtype)
        return advise(measured, parameters, step_s, optimizer=args.optimizer, dtype=dtype)
    net = args.model()
    if not isinstance(net, nn.Module):
        raise TypeError(f"--model must return a torch.nn.Module, got {type(net).__name__}")
    trained = [p for p in net.to(device).parameters() if p.requires_grad]
    numels, dtype = [p.numel() for p in trained], dtype_of(trained)
    step = step_of(net, optimizer_of(net), moved(args.batch(), device))
    few = numels if sum(numels) <= probe.MOST else probe.sample(sum(numels))
    measured = probe.measure(device, optimizer_of, few, step=step, dtype=dtype)
    if measured.compute_s is None:
        raise RuntimeError("the step was not measured")
    return advise(measured, sum(numels), measured.compute_s, optimizer=args.optimizer, numels=numels, dtype=dtype)


def dtype_of(trained: Sequence[Tensor]) -> torch.dtype:
    """The one of a model's parameters. ValueError if it trains none, or of several, or float16 ones."""
    if len(found := {p.dtype for p in trained}) != 1:
        raise ValueError(f"--model must return a model that trains parameters of one dtype, got {[*map(str, found)]}")
    if torch.float16 in found:
        raise ValueError("a float16 model trains with a GradScaler, which is not run here: give it in bfloat16")
    return found.pop()


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on the device."""
    if isinstance(batch, Mapping):
        return {name: moved(v, device) for name, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(v, device) for v in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], object]:
    """A step of training on one rank."""

    def step() -> None:
        optimizer.zero_grad()
        if isinstance(batch, Mapping):
            out = net(**batch)
        else:
            out = net(*(batch if isinstance(batch, tuple) else (batch,)))
        loss_of(out).backward()
        optimizer.step()

    return step


def loss_of(out: Any) -> Tensor:
    """A number to minimise, of whatever a forward returns."""
    if hasattr(out, "loss") and isinstance(out.loss, Tensor):
        return out.loss
    if isinstance(out, Mapping):
        out = next(iter(out.values()))
    while isinstance(out, (tuple, list)):
        out = out[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"the model's forward must return a tensor, or something that begins with one, got {out!r}")
    return out if out.numel() == 1 else out.float().square().mean()


__all__ = ["NAMES", "Advice", "Line", "advise", "main", "methods", "verdict"]
