"""An outer optimizer: what is done with R, by all ranks alike (DiLoCo: Douillard et al., arXiv 2311.08105)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import final


@final
@dataclass(frozen=True)
class Nesterov:
    """b <- mu b + R;  x <- x - eta (R + mu b): in place of x <- x - R, to which lr=1, momentum=0 is equal.

    b is one vector of the model's size on each rank, the same bits on all. x~ then moves by what the outer optimizer
    makes of R, no longer by mean_k u_k.

    Args:
        lr: eta, of the outer step; positive.
        momentum: mu, in [0, 1).

    Raises:
        ValueError: on others.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not is_number(self.lr) or not 0.0 < self.lr < float("inf"):
            raise ValueError(f"Nesterov: lr must be a positive number, got {self.lr!r}")
        if not is_number(self.momentum) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"Nesterov: momentum must be in [0, 1), got {self.momentum!r}")
        for name in ("lr", "momentum"):  # equal ones read alike in a checkpoint
            object.__setattr__(self, name, float(getattr(self, name)))


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
