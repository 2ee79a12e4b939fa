"""Error averaging: protocols that replace e_k by something nearer to mean_k e_k (Alg. 1, lines 6-8).

Every protocol preserves the mean of the errors, so the invariant x~ = x - (e + mean_k e_k) does not
move. A protocol is a frozen description. At the start of each step every rank asks which coordinates are
`due` and, if any are, calls `average` with them; a step that is skipped puts the errors back and asks again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .exchange import Transport


def _check_period(period: object) -> None:
    if isinstance(period, bool) or not isinstance(period, int):
        raise TypeError(f"period must be an integer number of steps, got {period!r}; averaging=None never averages")
    if period < 1:
        raise ValueError(f"period must be at least 1 step, got {period}; averaging=None never averages")


@dataclass(frozen=True)
class Averaging(ABC):
    """What all protocols answer."""

    @abstractmethod
    def due(self, step: int, numel: int) -> slice:
        """The coordinates that are averaged at the start of step t, of `numel`; a function of these alone."""

    def average(self, step: int, e: Tensor, transport: Transport) -> None:
        """Average the local errors that are due, in place: here e_k <- mean_k e_k (Alg. 1, line 7).

        Args:
            step: t, counted from 0.
            e: this rank's local errors on the coordinates that are due, flat, float32 or float64.
            transport: collectives; every rank calls them alike.
        """
        transport.mean(e, "averaging")


@dataclass(frozen=True)
class AllReduce(Averaging):
    """e_k <- mean_k e_k for all coordinates at the start of step t iff (t + 1) % period == 0.

    A dense all-reduce: 2 (K - 1) / K * d scalars per rank every `period` steps.
    """

    period: int

    def __post_init__(self) -> None:
        _check_period(self.period)

    def due(self, step: int, numel: int) -> slice:
        return slice(0, numel if (step + 1) % self.period == 0 else 0)  # Alg. 1, line 6


@dataclass(frozen=True)
class Rotating(Averaging):
    """Each step averages another 1/period of the coordinates: slice t % period of the flat errors.

    The same bytes as AllReduce(period) over a period, without its traffic spike, and no error is
    older than `period` steps. Slice j of d coordinates is [d j // period, d (j + 1) // period).
    """

    period: int

    def __post_init__(self) -> None:
        _check_period(self.period)

    def due(self, step: int, numel: int) -> slice:
        j = step % self.period
        return slice(numel * j // self.period, numel * (j + 1) // self.period)
