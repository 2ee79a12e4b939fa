"""Protocols in which a worker hears of some others alone: gossip on a ring or any graph, and the parameter server.

The table in `saef.protocols.averaging` has them beside the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import index
from typing import ClassVar, SupportsIndex, final

import numpy as np

from .averaging import Averaging, check_integer
from .operators import SUM_TOLERANCE, Links, Matrix, Operator

LARGEST_SECOND = 1.0 - 1e-7  # eigenvalue: beyond, 10 million events are not enough, and 1 is not told from rounding


@final
@dataclass(frozen=True)
class Ring(Averaging):
    """Synchronous gossip on a ring: x_k <- (x_{k-1} + x_k + x_{k+1}) / 3; two workers average (MixML: SyncDR).

    Two or three workers agree after one round: mixing time n period. For n >= 4 the second eigenvalue is
    lambda = (1 + 2 cos(2 pi / n)) / 3; mixing time n period ceil(ln 2 / -ln lambda), about 0.053 n^3 period if n is
    large.
    """

    period: int = 1

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        neighbours = {k: sorted({(k - 1) % n, k, (k + 1) % n}) for k in range(n)}
        return [Links({k: dict.fromkeys(near, 1.0 / len(near)) for k, near in neighbours.items()})]


@final
@dataclass(frozen=True)
class AsyncRing(Averaging):
    """Random pairs on a ring: in each event a random worker averages with a random neighbour (MixML: AsyncDR).

    No barrier: a worker waits only for the partners it meets. Who meets is drawn from (seed, t), the same on every
    rank, whatever the version of numpy.
    """

    random: ClassVar[bool] = True

    seed: int = 0
    period: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_seed(self.seed)

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        if n == 1:
            return []
        firsts = _draw(self.seed, step, n)  # a random worker and side are a random edge (i, i + 1)
        pairs = [sorted((i, (i + 1) % n)) for i in firsts]
        return [Links({k: dict.fromkeys(pair, 0.5) for k in pair}) for pair in pairs]


@final
@dataclass(frozen=True)
class Gossip(Averaging):
    """x_k <- sum_j W_kj x_j over any connected graph (MixML section 3.1, II; D-PSGD).

    Args:
        weights: W, K rows of K numbers; W_kj != 0: worker k hears of worker j. Rows must sum to 1. To preserve the
            mean, columns must as well; symmetric ones do.
        period: steps between two rounds.

    Raises:
        TypeError: if weights are complex.
        ValueError: if rows do not sum to 1, the graph is not connected, or the workers never come nearer.
    """

    weights: Sequence[Sequence[float]]
    period: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            found = np.asarray(self.weights)
            if found.dtype.kind in "SU":  # numpy reads numbers in them
                raise ValueError("got strings")
            W = np.asarray(found.real, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's RuntimeError of a tensor that needs a gradient
            raise ValueError(f"weights must be K rows of K numbers: {error}") from error
        if np.iscomplexobj(found):
            raise TypeError(f"weights must be real numbers, got {found.dtype}: states are real")
        if W.ndim != 2 or W.shape[0] != W.shape[1] or len(W) < 2 or not np.isfinite(W).all():
            raise ValueError(f"weights must be K rows of K finite numbers for K >= 2 workers, got shape {W.shape}")
        if (far := np.abs(W.sum(1) - 1.0)).max() > SUM_TOLERANCE:
            raise ValueError(
                f"row {far.argmax()} of weights sums to {W.sum(1)[far.argmax()]}, not 1: workers that agree would not "
                "stay as they are"
            )
        object.__setattr__(self, "weights", tuple(tuple(map(float, row)) for row in W))  # to compare, and to hash
        linked, reached = (W != 0) | (W != 0).T, np.arange(len(W)) == 0
        for _ in W:
            reached |= linked[reached].any(0)
        if not reached.all():
            raise ValueError(
                f"the graph is not connected: workers {np.flatnonzero(~reached).tolist()} never hear of worker 0, nor "
                "it of them; link the parts"
            )
        # Of W those but the 1 of (1, ..., 1), which becomes 0. A second 1 that shares its eigenvector would come out of
        # W as 1 +- 1e-8, from either side; here it stands alone
        second = np.abs(np.linalg.eigvals(W - 1.0 / len(W))).max()
        if second > LARGEST_SECOND:
            raise ValueError(
                "the workers never come nearer to each other, or all but never: the second eigenvalue of weights is "
                f"{second:.6g} in absolute value. Give every worker a positive weight on itself"
            )

    @classmethod
    def metropolis(cls, edges: Iterable[tuple[int, int]], period: int = 1) -> Gossip:
        """On the graph with these edges (i, j), W_ij = 1 / (1 + the larger of both degrees): symmetric, so it is good
        for errors. Workers are numbered from 0, and each must be on an edge.
        """
        try:
            found = {tuple(sorted(map(_number, edge))) for edge in edges}
        except TypeError as error:
            raise TypeError(f"edges must be pairs of integers, such as [(0, 1), (1, 2)]: {error}") from error
        if not found or any(len(edge) != 2 or not 0 <= edge[0] < edge[1] for edge in found):
            raise ValueError(f"edges must be pairs of different workers, numbered from 0, got {sorted(found)}")
        linked = {k for edge in found for k in edge}
        n = 1 + max(linked)
        if absent := [*islice((k for k in range(n) if k not in linked), 5)]:
            raise ValueError(
                f"the graph is not connected: workers {absent} are on no edge ({n - len(linked)} of {n} are not); "
                "number those that are from 0 on without a gap"
            )
        W = np.zeros((n, n))
        for i, j in found:
            W[i, j] = W[j, i] = 1.0
        degree = W.sum(1)
        W /= 1.0 + np.maximum(degree[:, None], degree)
        return cls(W + np.diag(1.0 - W.sum(1)), period)  # type: ignore[arg-type]

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [self._links]

    @cached_property
    def _links(self) -> Links:
        return Links({k: {j: w for j, w in enumerate(row) if w} for k, row in enumerate(self.weights)})

    def consensus(self, n: int) -> Matrix:
        values, vectors = np.linalg.eig(np.asarray(self.weights).T)
        left = np.real(vectors[:, np.argmax(np.real(values))])
        return np.asarray(left / left.sum(), dtype=np.float64)

    def check_workers(self, n: int) -> None:
        super().check_workers(n)
        if n != len(self.weights):
            raise ValueError(f"weights are for {len(self.weights)} workers, and there are {n}")


@final
@dataclass(frozen=True)
class AsyncParameterServer(Averaging):
    """In each event a random worker takes over the server's state (MixML: AsyncPS). The mean is not preserved.

    This is its communication alone, to measure its mixing time, on average n (1 + 1/2 + ... + 1/n); rank 0 is the
    server. `saef.ParameterServer` trains with it.
    """

    random: ClassVar[bool] = True
    parameter_servers: ClassVar[int] = 1
    period = 1

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_seed(self.seed)

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [Links({1 + k: {0: 1.0}}) for k in _draw(self.seed, step, n)]

    def consensus(self, n: int) -> Matrix:
        server: Matrix = np.eye(1 + n)[0]
        return server


def _number(k: SupportsIndex) -> int:
    """Of a worker."""
    if isinstance(k, bool):
        raise TypeError(f"got {k}")
    return index(k)


def _draw(seed: int, step: int, n: int) -> list[int]:
    """n random numbers below n. The raw stream of a bit generator is the same in all versions of numpy."""
    key = np.array([seed, step], dtype=np.uint64)
    return [raw % n for raw in np.random.Philox(key=key).random_raw(n).tolist()]


def _check_seed(seed: object) -> None:
    check_integer("seed", seed, 0, "")
    if seed >= 2**64:  # type: ignore[operator]
        raise ValueError(f"seed must be below 2^64, got {seed}")
