"""Communication protocols (MixML section 3.1): who hears of whom, and when. They average errors, or models.

A protocol is a frozen description: what it does in step t depends on t and its fields alone, so that every rank
knows it, and a run can be resumed. In one step each of n workers has one event (MixML counts time in events);
step t is events t n to t n + n - 1. Synchronous protocols communicate in the last of these.

    protocol               in a step that is due                              scalars a rank sends then
    AllReduce(p)           x_k <- mean_j x_j, every p steps                   2 (n - 1) / n d
    LocalStep(m)           the same after m local steps                       2 (n - 1) / n d
    Rotating(p)            the same, another 1/p of the coordinates each step 2 (n - 1) / n d / p
    Slack(gamma)           x_k <- x_k + gamma (mean_j x_j - x_k)              2 (n - 1) / n d
    Ring()                 x_k <- mean of x_{k-1}, x_k, x_{k+1}               2 d
    AsyncRing(seed)        n times: a random pair of neighbours averages      2 d on average
    Gossip(W)              x_k <- sum_j W_kj x_j over k's neighbours          d for each neighbour
    AsyncParameterServer() n times: a random worker takes the server's state  the server: n d

Errors (Alg. 1, lines 6-8) may be averaged by those that preserve the mean, which are all but the last and a Gossip
that is not doubly stochastic: then the invariant x~ = x - (e + mean_k e_k) does not move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Real
from typing import ClassVar, final

import numpy as np
from torch import Tensor

from ..comm.transport import Transport
from .operators import Matrix, Mean, Operator


def check_integer(name: str, value: object, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer{unit}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{unit}, got {value}")


def check_protocol(protocol: object) -> None:
    if not isinstance(protocol, Averaging):
        raise TypeError(f"protocol must be e.g. saef.LocalStep(4) or saef.Ring(), got {protocol!r}")


class Averaging(ABC):
    """What all protocols answer. Subclasses are frozen dataclasses with `period`, and `seed` if they are random."""

    period: int
    random: ClassVar[bool] = False
    parameter_servers: ClassVar[int] = 0  # ranks, from 0 on, that are not workers but hold a state

    def __post_init__(self) -> None:
        try:
            check_integer("period", self.period, 1, " (steps)")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; averaging=None never averages") from None

    @property
    def parts(self) -> int:
        """Into how many equal slices of coordinates the protocol cuts a state, to treat them at different times."""
        return 1

    @abstractmethod
    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        """What n workers do in step t, if it is due: the last of its n events, in their order."""

    def due(self, step: int, numel: int) -> slice:
        """The coordinates that step t averages, of `numel`: here all of them iff (t + 1) % period == 0."""
        return slice(0, numel if (step + 1) % self.period == 0 else 0)  # Alg. 1, line 6

    def average(self, step: int, v: Tensor, transport: Transport) -> None:
        """Carry out step t among the ranks of `transport`, in place (for errors Alg. 1, line 7).

        Args:
            step: t, counted from 0.
            v: this rank's state on the coordinates that are due, flat, float32 or float64.
            transport: every rank calls alike.
        """
        for M in self.step_operators(step, transport.size - self.parameter_servers):
            M.apply(v, transport)

    def events(self, n: int, part: int = 0) -> Iterator[Operator | None]:
        """What happens to slice `part` of the coordinates, event by event, without end. None: nothing.

        Raises:
            TypeError, ValueError: if the protocol is not for n workers, there is only one and no server, or no such
                slice.
        """
        self.check_workers(n)
        check_integer("part", part, 0, "")
        if part >= self.parts:
            raise ValueError(f"part must be below {self.parts}, the slices that {self} cuts a state into, got {part}")
        if n + self.parameter_servers < 2:
            raise ValueError(f"{self} among {n} worker has nobody to average with: it takes at least 2")
        return self._events(n, part)

    def _events(self, n: int, part: int) -> Iterator[Operator | None]:
        for t in count():
            due = part in range(self.parts)[self.due(t, self.parts)]
            found = self.step_operators(t, n) if due else []
            yield from [None] * (n - len(found))
            yield from found

    def operators(self, n: int, part: int = 0) -> Iterator[Matrix]:
        """M_0, M_1, ... for n workers, without end: `events` as matrices, float64.

        (n, n); with servers (1 + n, 1 + n), the server's state in row 0.
        """
        size = n + self.parameter_servers
        return (np.eye(size) if M is None else M.matrix(size) for M in self.events(n, part))

    def consensus(self, n: int) -> Matrix:
        """The weights (n,) with which the workers' states enter the consensus: every row of M_inf (Assumption 1)."""
        return np.full(n, 1.0 / n)

    def preserves_mean(self, n: int) -> bool:
        """Whether each operator of step period - 1, which is due, leaves the mean of the workers' states as it is."""
        return all(M.preserves_mean(n) for M in self.step_operators(self.period - 1, n))

    def check_workers(self, n: int) -> None:
        """Raise TypeError or ValueError if the protocol is not for n workers."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"the number of workers must be an integer, got {n!r}")
        if n < 1:
            raise ValueError(f"{self} needs a worker, besides its {self.parameter_servers} server: start more ranks")


@final
@dataclass(frozen=True)
class AllReduce(Averaging):
    """x_k <- mean_j x_j for all coordinates in step t iff (t + 1) % period == 0 (MixML: reduced frequency).

    Mixing time n period.
    """

    period: int

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [Mean()]


@final
@dataclass(frozen=True)
class LocalStep(Averaging):
    """m local steps, then an all-reduce: AllReduce(m) under the name that it has for models. Mixing time n m."""

    period: int

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [Mean()]


@final
@dataclass(frozen=True)
class Rotating(Averaging):
    """Each step averages another 1/period of the coordinates: slice t % period of the flat state.

    The same bytes as AllReduce(period) over a period, without its traffic spike, and the same mixing time n period.
    Slice j of d coordinates is [d j // period, d (j + 1) // period).
    """

    period: int

    @property
    def parts(self) -> int:
        return self.period

    def due(self, step: int, numel: int) -> slice:
        j = step % self.period
        return slice(numel * j // self.period, numel * (j + 1) // self.period)

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [Mean()]


@final
@dataclass(frozen=True)
class Slack(Averaging):
    """x_k <- x_k + gamma (mean_j x_j - x_k), 0 < gamma <= 1 (MixML section 6, slack matrix).

    Mixing time n period ceil(ln 2 / -ln(1 - gamma)); for gamma = 1 n period. A state does not move any more where gamma
    times its distance to the mean is below its own rounding: in float32 about 6e-8 |x| / gamma apart.
    """

    gamma: float
    period: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, Real):
            raise TypeError(f"gamma must be a number in (0, 1], got {self.gamma!r}")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(
                f"gamma must be in (0, 1], got {self.gamma}: at 0 nobody moves, above 1 workers go past the mean"
            )

    def step_operators(self, step: int, n: int) -> Sequence[Operator]:
        return [Mean(float(self.gamma))]
