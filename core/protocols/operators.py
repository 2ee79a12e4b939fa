"""One communication event as a linear operator M on the workers' states, X <- M X (MixML section 3).

Row k of X is worker k's state. An operator knows its matrix, for analysis, and how the workers carry it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..comm.transport import Transport

Matrix = npt.NDArray[np.float64]

SUM_TOLERANCE = 1e-12  # to which the rows and columns of an operator must sum to 1: their weights are rounded


class Operator(ABC):
    """What one event does."""

    @abstractmethod
    def matrix(self, n: int) -> Matrix:
        """M, (n, n), float64."""

    @abstractmethod
    def apply(self, v: Tensor, transport: Transport) -> None:
        """Carry it out, in place: v <- row `rank` of M X. Every rank calls it.

        Args:
            v: this worker's state, flat, float32 or float64.
            transport: bytes are counted as "averaging".
        """

    @abstractmethod
    def preserves_mean(self, n: int) -> bool:
        """Whether 1^T M = 1^T, so that the mean of the workers' states stays."""


@final
@dataclass(frozen=True)
class Mean(Operator):
    """x_k <- x_k + gamma (mean_j x_j - x_k), by an all-reduce: 2 (n - 1) / n d scalars per worker."""

    gamma: float = 1.0

    def matrix(self, n: int) -> Matrix:
        M: Matrix = (1.0 - self.gamma) * np.eye(n) + np.full((n, n), self.gamma / n)
        return M

    def apply(self, v: Tensor, transport: Transport) -> None:
        if self.gamma == 1.0:
            transport.mean(v, "averaging")
        else:
            mean = v.clone()
            transport.mean(mean, "averaging")
            v.add_(mean.sub_(v), alpha=self.gamma)

    def preserves_mean(self, n: int) -> bool:
        return True


@final
@dataclass(frozen=True)
class Links(Operator):
    """x_k <- sum_j w_kj x_j between neighbours alone: a worker sends its state to those whose row names it.

    Args:
        rows: {k: {j: w_kj}}; a worker without a row keeps its state. Equal rows give equal bits, since every
            worker sums in ascending order of j.
    """

    rows: Mapping[int, Mapping[int, float]]

    def matrix(self, n: int) -> Matrix:
        M = np.eye(n)
        for k, row in self.rows.items():
            M[k] = 0.0
            M[k, list(row)] = list(row.values())
        return M

    def apply(self, v: Tensor, transport: Transport) -> None:
        own = transport.rank
        row = self.rows.get(own, {own: 1.0})
        to = sorted(k for k, other in self.rows.items() if k != own and own in other)
        sources = sorted(j for j in row if j != own)
        received = transport.send_receive(v, to, sources, "averaging")
        if sources:
            states = dict(zip(sources, received, strict=True)) | {own: v}
            first, *others = sorted(row)
            out = states[first] * row[first]
            for j in others:
                out.add_(states[j], alpha=row[j])
            v.copy_(out)

    def preserves_mean(self, n: int) -> bool:
        column: defaultdict[int, float] = defaultdict(float)
        for k, row in self.rows.items():
            column[k] -= 1.0  # against the identity's row
            for j, weight in row.items():
                column[j] += weight
        return all(abs(change) <= SUM_TOLERANCE for change in column.values())
