"""What this cluster's network and devices do, measured for `python -m saef advise`. All of it is collective."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from saef.hooks import saef_hook

from .comm.cost import AT_ONCE, BUCKET_BYTES, Curve, Network
from .comm.torch_transport import TorchTransport
from .comm.transport import Ordered, Purpose
from .protocols.averaging import Rotating
from .state import SAEFState
from .wire.compressors import ScaledSign, TopK

SIGN = {"compressor": ScaledSign()}
SETTINGS: dict[str, dict[str, Any]] = {
    "saef sign": SIGN,
    "saef sign, Rotating(20)": {**SIGN, "averaging": Rotating(20)},
    "saef top-1 %": {"compressor": TopK(0.01)},
    "saef sign, H = 4": {**SIGN, "local_steps": 4},
    "saef sign, H = 16": {**SIGN, "local_steps": 16},
}
PLAIN, HALF = "plain DDP", "fp16 hook"
NAMES = (PLAIN, HALF, *SETTINGS)

GRADIENTS = (1 << 10, 1 << 16, 1 << 20, 1 << 22, BUCKET_BYTES)  # bytes that are all-reduced
MESSAGES = (1 << 10, 1 << 14, 1 << 17, 1 << 20)  # and of a bucket's message: no method here has a longer one
REPETITIONS, MOST_REPETITIONS = 3, 30
ENOUGH_S = 1.0  # of kernels, all methods in turn
LONG_S = 0.5  # measured once if it may take so long
LONGEST_S = 15.0  # not measured
LONGEST_PAUSE_S = 0.25
ALONE = "training on one rank"
TENSOR = 1 << 20  # coordinates of each tensor, where the model is not known
MOST = 1 << 22  # coordinates that kernels are measured with, unless the model is known and smaller


@final
@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        network: the ranks' collectives.
        kernels: by method, seconds a coordinate and step beyond training on one rank, DDP's copies included.
        compute_s: of a step that exchanges nothing; None if no model was given.
        overlap: whether there are cores for the network beside those that compute.
        device: a name.
    """

    network: Network
    kernels: dict[str, float]
    compute_s: float | None
    overlap: bool
    device: str


@final
class Echo(Ordered):
    """K ranks that all send what this one sends: all of a step but the network."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        super().__init__(rank, size, device, thread=device.type == "cpu")
        self._message = torch.empty(0, dtype=torch.uint8, device=device)

    def _begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]:
        if purpose == "phase2":  # each server answers with its section of what it was sent: coded alike both ways
            return self._message.clone
        return partial(message.repeat, self.size)

    def _begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]:
        self._message = message
        return partial(message.split(list(sizes))[self.rank].repeat, self.size)

    def _sum(self, v: Tensor, purpose: Purpose) -> None:
        v.mul_(self.size)

    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]:
        return [v.clone() for _ in sources]


@final
class Tensors(nn.Module):
    """Parameters of chosen sizes, whose gradients cost next to nothing."""

    def __init__(self, numels: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.full((n,), 0.01, device=device, dtype=dtype) for n in numels)

    def forward(self, gradient: Tensor) -> Tensor:
        return torch.stack([torch.dot(p, gradient[: p.numel()]) for p in self.parts]).sum()


def measure(
    device: torch.device,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    numels: Sequence[int],
    *,
    step: Callable[[], object] | None = None,
    pause_s: float = 0.0,
    names: Sequence[str] = NAMES,
    dtype: torch.dtype = torch.float32,
) -> Measured:
    """Measure network and kernels, and `step` if it is given, on all ranks of the default process group.

    Args:
        numels: sizes of the tensors to measure kernels with.
        step: of training on one rank.
        pause_s: between two collectives, as long as a step computes: TCP forgets how fast it was.
        dtype: of those tensors.
    """
    compute_s = None if step is None else _mean(_time(step, device), device)
    network = measure_network(device, min(compute_s if compute_s is not None else pause_s, LONGEST_PAUSE_S))
    took = _time_methods(names, device, optimizer_of, numels, dtype)
    d = sum(numels)
    return Measured(
        network,
        {name: _mean(took[name] - took[ALONE], device) / d for name in names},
        compute_s,
        _spare_cores(device),
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    )


def sample(parameters: int) -> list[int]:
    """Sizes of tensors for a model of which only the size is known."""
    d = min(parameters, MOST)
    return [min(TENSOR, d - start) for start in range(0, d, TENSOR)]


# -- the network -------------------------------------------------------------------------------------------------------


def measure_network(device: torch.device, pause_s: float = 0.0) -> Network:
    """Each collective at several sizes, among all ranks."""
    K, transport = dist.get_world_size(), TorchTransport(None, device, "measure_network()")

    def all_reduce(n: int, times: int = 1) -> Callable[[], object]:
        several = [torch.zeros(max(1, n // 4), device=device) for _ in range(times)]

        def work() -> None:
            for begun in [dist.all_reduce(v, async_op=True) for v in several]:
                begun.wait()

        return work

    def all_gather(n: int) -> Callable[[], object]:
        v = torch.zeros(n, dtype=torch.uint8, device=device)
        return lambda: transport.all_gather(v, [n] * K, "telemetry")

    def all_to_all(n: int) -> Callable[[], object]:
        each = max(1, n // K)
        v = torch.zeros(each * K, dtype=torch.uint8, device=device)
        return lambda: transport.all_to_all(v, [each] * K, each, "telemetry")

    curve = partial(_curve, device=device, pause_s=pause_s)
    return Network(
        K,
        curve(all_reduce, GRADIENTS),
        curve(all_gather, MESSAGES),
        curve(all_to_all, MESSAGES),
        pipelines=device.type == "cpu",
        together=curve(partial(all_reduce, times=AT_ONCE), GRADIENTS),
    )


def _curve(
    make: Callable[[int], Callable[[], object]], sizes: Sequence[int], device: torch.device, pause_s: float
) -> Curve:
    """Of what `make` gives for so many bytes; those that would take longer than LONGEST_S are left out."""
    took: list[float] = []
    for n in sizes:
        expected = took[-1] * n / sizes[len(took) - 1] if took else 0.0
        if len(took) > 1 and expected > LONGEST_S:
            break
        measure = _once if expected > LONG_S else _time
        seconds = _mean(measure(make(n), device, pause_s), device)
        took.append(max(seconds, took[-1]) if took else seconds)  # noise must not make a longer message faster
    return Curve((0.0, *map(float, sizes[: len(took)])), (took[0], *took))  # the shortest takes what nothing takes


def _time(work: Callable[[], object], device: torch.device, pause_s: float = 0.0) -> float:
    """Median seconds, of all ranks together each time."""
    once = partial(_once, device=device, pause_s=pause_s)
    once(work)
    return median(once(work) for _ in range(REPETITIONS))


def _once(work: Callable[[], object], device: torch.device, pause_s: float = 0.0) -> float:
    _wait(device)
    time.sleep(pause_s)
    dist.barrier()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mean(value: float, device: torch.device) -> float:
    """Over the ranks."""
    v = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(v)
    return float(v) / dist.get_world_size()


def _spare_cores(device: torch.device) -> bool:
    """Whether each rank of a machine has a core for the network beside those that it computes with; on all machines."""
    if device.type == "cuda":
        return True
    boot = Path("/proc/sys/kernel/random/boot_id")  # of a kernel, whatever namespaces and containers there are on it
    mine = hash_of(boot.read_text()) if boot.exists() else dist.get_rank()
    every = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    every[dist.get_rank()] = mine
    dist.all_reduce(every)
    needed = int((every == mine).sum()) * (torch.get_num_threads() + 1)
    return bool(_mean(float((os.cpu_count() or 1) >= needed), device) == 1.0)


def hash_of(text: str) -> int:
    """The same in every process, below 2^62."""
    number = 0
    for byte in text.encode():
        number = (number * 257 + byte) % (1 << 61)
    return number + 1


# -- kernels -----------------------------------------------------------------------------------------------------------


def _time_methods(
    names: Sequence[str],
    device: torch.device,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    numels: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Seconds of a step of each method, and of training on one rank, in turn: what disturbs one disturbs all."""
    alone, _ = dist.new_subgroups(group_size=1)
    rounds = {name: _round(name, Tensors(numels, device, dtype), optimizer_of, alone) for name in (ALONE, *names)}

    def once() -> dict[str, float]:
        return {name: _once(work, device) / steps for name, (work, steps) in rounds.items()}

    once()  # to warm up
    start = time.perf_counter()
    once()
    again = int(ENOUGH_S / _mean(time.perf_counter() - start, device))  # short ones are all the noisier
    took = [once() for _ in range(min(max(again, REPETITIONS), MOST_REPETITIONS))]
    return {name: median(found[name] for found in took) for name in rounds}


def _round(
    name: str,
    net: Tensors,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    alone: dist.ProcessGroup,
) -> tuple[Callable[[], None], int]:
    """From exchange to exchange, and how many steps that is. The ranks echo, so that nothing waits for a network."""
    optimizer, steps, longest = optimizer_of(net), 1, max(net.parts, key=torch.numel)
    model: nn.Module = net
    if name != ALONE:
        model = DistributedDataParallel(net, process_group=alone)
        if name in SETTINGS:
            echo = Echo(dist.get_rank(), dist.get_world_size(), longest.device)
            state = SAEFState(model, optimizer, transport=echo, **SETTINGS[name])
            model.register_comm_hook(state, saef_hook)
            steps = state.settings.local_steps
        elif name == HALF:
            model.register_comm_hook(alone, fp16_compress_hook)
    gradient = torch.ones_like(longest)

    def work() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(gradient).backward()
            optimizer.step()

    return work, steps
