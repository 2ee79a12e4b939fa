"""Mixing time: after how many events a protocol has halved the workers' distance to their consensus (MixML section 3).

With M_t the operators of a protocol (`saef.protocols.averaging`) and M_inf what they tend to, the mixing time is the
smallest t_mix such that for every state X and every start t (Assumption 2)

    || M_{t + t_mix - 1} ... M_t X - M_inf X ||  <=  1/2 || X - M_inf X ||.

One event is one worker's turn: a round of n synchronous workers counts n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import agreement
from ..comm.torch_transport import TorchTransport, checked, meet
from .averaging import Averaging, check_integer, check_protocol
from .operators import Matrix, Operator

HALF = 0.5 * (1.0 + 1e-9)  # so that a product of rounded operators that is just a half counts as one
LIMIT = 10_000_000  # events after which a protocol counts as one that does not mix


@final
class MixingTime(float):
    """A number of events: the mean over `events`, one entry for each seed (a single one if nothing is random)."""

    events: tuple[int, ...]

    def __new__(cls, events: Iterable[int]) -> MixingTime:
        found = tuple(events)
        if not found:
            raise ValueError("events must be one number for each seed, got none")
        for number in found:
            check_integer("each of events", number, 1, "")
        time = super().__new__(cls, sum(found) / len(found))
        time.events = found
        return time

    def __reduce__(self) -> tuple[type[MixingTime], tuple[tuple[int, ...]]]:  # to copy and pickle
        return MixingTime, (self.events,)

    def quantile(self, q: float) -> float:
        """The number of events that is enough for a share q of the seeds."""
        return float(np.quantile(self.events, q, method="inverted_cdf"))


def mixing_time(protocol: Averaging, n: int, *, seeds: int = 100) -> MixingTime:
    """t_mix of a protocol among n workers, from its operators.

    The norm is the operator norm on what is not consensus, so it is exact: the worst X. For protocols that repeat
    themselves also the worst start t. Random ones are run with the seeds 0 to seeds - 1, each from its start, and the
    mean over them is returned, with the spread.

    Args:
        n: workers, at least 2 (a server is not one).
        seeds: of random protocols.

    Raises:
        TypeError: if protocol is not one, or n or seeds no integer.
        ValueError: if the protocol is not for n workers, n is 1, or seeds is below 1.
        RuntimeError: if it has not mixed after 10 million events.
    """
    check_protocol(protocol)
    protocol.events(n)  # raises if it is not for n workers
    runs = _runs(protocol, seeds)
    weights = protocol.consensus(n)
    return MixingTime(
        max(
            _halved(islice(run.events(n, part), start, None), weights, protocol)
            for part in range(run.parts)
            for start in _starts(run, n, part)
        )
        for run in runs
    )


def _runs(protocol: Averaging, seeds: int) -> list[Averaging]:
    """The protocol with the seeds 0, 1, ...; once if it has none."""
    check_integer("seeds", seeds, 1, "")
    return [replace(protocol, seed=s) for s in range(seeds)] if protocol.random else [protocol]  # type: ignore[type-var]


def _starts(protocol: Averaging, n: int, part: int) -> list[int]:
    """The events right after one that does something, within a period: a later start only waits less."""
    if protocol.random:
        return [0]
    cycle = n * protocol.period
    return [(t + 1) % cycle for t, M in enumerate(islice(protocol.events(n, part), cycle)) if M is not None]


def _off_consensus(weights: Matrix) -> Matrix:
    """An orthonormal basis, in columns, of the states X - M_inf X: those with weights . X = 0."""
    _, _, rows = np.linalg.svd(weights[None])
    return np.asarray(rows[1:].T)


def _halved(events: Iterator[Operator | None], weights: Matrix, protocol: Averaging) -> int:
    """How many events it takes until the distance to consensus has halved, whatever the state."""
    D, worst = _off_consensus(weights), None  # M_{t-1} ... M_0 on what is not consensus; where it was largest
    for t, M in enumerate(islice(events, LIMIT), 1):
        if M is None:
            continue
        D = M.matrix(len(D)) @ D
        if worst is not None and np.linalg.norm(D @ worst) > HALF:  # a lower bound that saves most decompositions
            continue
        _, size, directions = np.linalg.svd(D)
        if size[0] <= HALF:
            return t
        worst = directions[0]
    raise RuntimeError(f"{protocol} has not halved the distance to consensus after {LIMIT} events")


# -- on a live group --------------------------------------------------------------------------------------------------


def estimate_mixing_time(
    protocol: Averaging,
    process_group: dist.ProcessGroup | None = None,
    *,
    seeds: int = 10,
    device: torch.device | str = "cpu",
) -> MixingTime:
    """t_mix of a protocol, measured on a live group: random states, real communication. Collective.

    Every rank holds random numbers, enough that no direction is missed, and carries the protocol out from step 0,
    event by event; after each the states are gathered and their distance from consensus is compared with the first.

    Args:
        process_group: its ranks are the workers, with AsyncParameterServer all but rank 0. None: all ranks.
        seeds: of random protocols: runs, of which the mean is returned, with the spread.
        device: of the states: "cuda" for a group that is NCCL's alone.

    Returns:
        The same on every rank.

    Raises:
        TypeError, ValueError: as `mixing_time`; and, on every rank, if protocol or seeds differ between ranks.
    """
    transport = TorchTransport(process_group, torch.device(device), "saef.estimate_mixing_time()")
    agreement.compare({"protocol": protocol, "seeds": seeds}, transport, transport.device)
    check_protocol(protocol)
    n = transport.size - protocol.parameter_servers
    protocol.events(n)  # raises if it is not for n workers
    runs = _runs(protocol, seeds)
    return MixingTime(transport.call(lambda: [_probe(run, n, seed, transport) for seed, run in enumerate(runs)]))


def _probe(protocol: Averaging, n: int, seed: int, transport: TorchTransport) -> int:
    generator = torch.Generator().manual_seed(transport.size * seed + transport.rank)
    parts, probes = protocol.parts, 2 * transport.size
    v = torch.randn(parts * probes, dtype=torch.float64, generator=generator, device="cpu").to(transport.device)

    def states() -> list[Matrix]:
        """What all ranks hold, one (ranks, probes) for each part."""
        message = v.view(torch.uint8)
        every = transport.all_gather(message, [message.numel()] * transport.size, "telemetry")
        return np.split(every.view(torch.float64).view(transport.size, -1).cpu().numpy(), parts, axis=1)

    X = states()
    consensus = [protocol.consensus(n) @ x for x in X]
    first = [np.linalg.pinv(x - c) for x, c in zip(X, consensus, strict=True)]
    events = 0
    while events < LIMIT:
        t = events // n
        due, found = protocol.due(t, v.numel()), []
        if v[due].numel():
            found = list(protocol.step_operators(t, n))
        events += n - len(found)
        for M in found:
            M.apply(v[due], transport)
            events += 1
            now = zip(states(), consensus, first, strict=True)
            if max(np.linalg.norm((x - c) @ inverse, 2) for x, c, inverse in now) <= HALF:
                return events
    raise RuntimeError(f"{protocol} has not halved the distance to consensus after {LIMIT} events")


def stationary_distance(tensors: Iterable[Tensor], process_group: dist.ProcessGroup | None = None) -> float:
    """1/n sum_i ||x_i - x_inf||^2 with x_inf = 1/n sum_j x_j, of what n ranks hold (MixML section 6). Collective.

    Args:
        tensors: this rank's x_i, real, such as model.parameters(); the same shapes on every rank. Summed in float64:
            two all-reduces.
        process_group: the ranks; None: all.

    Raises:
        TypeError: if a tensor is complex.
        ValueError: if there is none; and, on every rank, if their numbers of entries differ between ranks.
    """
    process_group, found = checked(process_group), list(tensors)
    if not found:
        raise ValueError("tensors is empty: give what this rank holds, such as model.parameters()")
    if wrong := [t.dtype for t in found if t.is_complex()]:
        raise TypeError(f"tensors must be real, got {wrong[0]}: give torch.view_as_real(t) in its place")
    x = torch.cat([t.detach().reshape(-1).double() for t in found])
    n, mean = dist.get_world_size(process_group), x.clone()
    meet(process_group, x.device, "saef.stationary_distance()")
    own = torch.tensor([x.numel()], device=x.device)
    every = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(every, own, group=process_group)
    sizes = torch.cat(every).tolist()
    if len(set(sizes)) > 1:
        held = ", ".join(f"rank {r} has {size}" for r, size in enumerate(sizes))
        raise ValueError(f"tensors must have the same number of entries on every rank, got: {held}")
    dist.all_reduce(mean, group=process_group)
    distance = (x - mean / n).square().sum()
    dist.all_reduce(distance, group=process_group)
    return distance.item() / n
