"""Mixing time: after how many events a protocol has halved the workers' distance to their consensus (MixML section 3).

With M_t the operators of a protocol (`saef.averaging`) and M_inf what they tend to, the mixing time is the smallest
t_mix such that for every state X and every start t (Assumption 2)

    || M_{t + t_mix - 1} ... M_t X - M_inf X ||  <=  1/2 || X - M_inf X ||.

One event is one worker's turn: a round of n synchronous workers counts n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .averaging import Averaging
from .operators import Matrix, Operator
from .transport import TorchTransport

HALF = 0.5 * (1.0 + 1e-9)  # so that a product of rounded operators that is just a half counts as one
LIMIT = 10_000_000  # events after which a protocol counts as one that does not mix


class MixingTime(float):
    """A number of events: the mean over `events`, one entry for each seed (a single one if nothing is random)."""

    events: tuple[int, ...]

    def __new__(cls, events: Iterable[int]) -> MixingTime:
        found = tuple(events)
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
        ValueError: if the protocol is not for n workers, or n is 1.
        RuntimeError: if it has not mixed after 10 million events.
    """
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
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
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
        ValueError: if the protocol is not for so many workers, or the group has a single rank.
    """
    transport = TorchTransport(process_group, torch.device(device))
    n = transport.size - protocol.servers
    protocol.events(n)  # raises if it is not for n workers
    runs = _runs(protocol, seeds)
    return MixingTime(transport.call(lambda: [_probe(run, n, seed, transport) for seed, run in enumerate(runs)]))


def _probe(protocol: Averaging, n: int, seed: int, transport: TorchTransport) -> int:
    generator = torch.Generator().manual_seed(transport.size * seed + transport.rank)
    parts, probes = protocol.parts, 2 * transport.size
    v = torch.randn(parts * probes, dtype=torch.float64, generator=generator).to(transport.device)

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
        tensors: this rank's x_i, floating, such as model.parameters(); the same shapes on every rank. Summed in
            float64: two all-reduces.
        process_group: the ranks; None: all.
    """
    x = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    n, mean = dist.get_world_size(process_group), x.clone()
    dist.all_reduce(mean, group=process_group)
    distance = (x - mean / n).square().sum()
    dist.all_reduce(distance, group=process_group)
    return distance.item() / n


# -- bounds -----------------------------------------------------------------------------------------------------------


def lemma_1(events: int, t_mix: float, norm: float = 1.0, xi: float = 1.0) -> float:
    """MixML Lemma 1, a bound on || M_{t-1} ... M_s X - M_inf X ||: 2^-floor((t - s) / t_mix) (1 + xi) xi ||X||.

    It assumes that consensus is preserved (Assumption 1), t_mix from every start (Assumption 2), and that no product
    of operators has a norm above xi (Assumption 3): 1 for doubly stochastic operators, which are all of this package
    but those of the parameter server, with sqrt(n + 1), and of a Gossip that is something else.

    Args:
        events: t - s.
        norm: ||X||.
    """
    _check_positive(t_mix=t_mix, xi=xi)
    if events < 0 or norm < 0:
        raise ValueError(f"events and norm must not be negative, got {events} and {norm}")
    return 2.0 ** -math.floor(events / t_mix) * (1.0 + xi) * xi * norm


def _spread(t_mix: float, smoothness: float, noise: float, gap: float, xi: float) -> float:
    """(1 + xi)^2 xi^2, which both bounds on SGD have, after a look at their constants."""
    _check_positive(t_mix=t_mix, smoothness=smoothness, gap=gap, xi=xi)
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    return (1.0 + xi) ** 2 * xi**2


def theorem_1(
    lrs: Sequence[float], t_mix: float, *, smoothness: float, noise: float, gap: float, xi: float = 1.0
) -> float:
    """MixML Theorem 1 for SGD: a bound on the mean of E||grad f(x_t)||^2 over T events with step sizes alpha_t.

    The mean has the weights alpha_t c_t with c_t = 1 - 16 (1 + xi)^2 xi^2 t_mix^2 L^2 alpha_t^2, eq. (9); so it is a
    bound on the smallest E||grad f(x_t)||^2 as well. With S_j = sum_t alpha_t^j it is

        (2 gap + sigma^2 L S_2 + 4 (1 + xi)^2 xi^2 t_mix sigma^2 L^2 S_3) / sum_t alpha_t c_t.

    It assumes Assumptions 1 to 3 (see `lemma_1`), that the local gradients are unbiased with a variance of at most
    sigma^2 (Assumption 5), that f is smooth with constant L, not necessarily convex, and step sizes that do not grow.

    Args:
        lrs: alpha_0, ..., alpha_{T-1}, one an event: a round of n workers takes n of them.
        t_mix: in events.
        smoothness: L.
        noise: sigma.
        gap: f(x_0) - f(x_T), or any bound on it, such as f(x_0) - min f.

    Raises:
        ValueError: if an alpha_t is so large that c_t is not positive, when the theorem says nothing, or they grow.
    """
    spread = _spread(t_mix, smoothness, noise, gap, xi)
    alpha = np.asarray(lrs, dtype=np.float64)
    if alpha.ndim != 1 or not len(alpha) or not (alpha > 0).all() or (np.diff(alpha) > 0).any():
        raise ValueError("lrs must be positive and must not grow (Lemma 2)")
    c = 1.0 - 16.0 * spread * (t_mix * smoothness * alpha) ** 2
    if c.min() <= 0:
        largest = 1.0 / (4.0 * math.sqrt(spread) * t_mix * smoothness)
        bound = f"1 / (4 (1 + xi) xi t_mix L) = {largest:.3g}"
        raise ValueError(f"Theorem 1 needs step sizes below {bound}, got {alpha.max():.3g}")
    noisy = noise**2 * smoothness * (alpha**2).sum()
    apart = 4.0 * spread * t_mix * noise**2 * smoothness**2 * (alpha**3).sum()
    return float((2.0 * gap + noisy + apart) / (alpha * c).sum())


def corollary_1(
    events: int, t_mix: float, *, smoothness: float, noise: float, gap: float, xi: float = 1.0
) -> tuple[float, float]:
    """MixML Corollary 1: the step size, and a bound on the mean of E||grad f(x_t)||^2 over T events with it, eq. (10).

        alpha = sqrt(2 gap) / (sigma sqrt(L T) + t_mix)
        4 sigma sqrt(2 gap L) / sqrt(T)  +  2 sqrt(2 gap) t_mix / T  +  16 (1 + xi)^2 xi^2 t_mix gap L / T

    so communication does not enter the leading term. Assumptions and arguments as `theorem_1`.

    Raises:
        ValueError: if T < 64 gap xi^2 (1 + xi)^2 t_mix^2 L / sigma^2, naming the least T.
    """
    spread = _spread(t_mix, smoothness, noise, gap, xi)
    _check_positive(noise=noise)
    least = 64.0 * gap * spread * t_mix**2 * smoothness / noise**2
    if events < least:
        raise ValueError(f"Corollary 1 needs T of at least {math.ceil(least)} events here, got {events}")
    root = math.sqrt(2.0 * gap)
    alpha = root / (noise * math.sqrt(smoothness * events) + t_mix)
    leading = 4.0 * noise * math.sqrt(smoothness / events) * root
    return alpha, leading + (2.0 * root + 16.0 * spread * gap * smoothness) * t_mix / events


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
