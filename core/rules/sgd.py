"""Momentum SGD: SAEF Algorithm 1, line 10; dist-EF Algorithms 3 and 4 (Nesterov); signum."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from .rule import AnyHyper, Rule


class Hyper(NamedTuple):
    """One parameter group's settings; the order of the fields is that of the kernels' columns.

    Attributes:
        lr: eta.
        momentum: mu.
        gain: what g is multiplied by in the momentum: 1, or 1 - mu for signum.
        nesterov: whether u = g + mu m' instead of m'.
        weight_decay: lambda of the coupled decay; 0 when the decay is outer.
        factor: multiplies g: the clipping coefficient over the loss scale, negative to maximize.
    """

    lr: float
    momentum: float
    gain: float
    nesterov: bool
    weight_decay: float
    factor: float


COLUMNS = len(Hyper._fields)
LR, MU, GAIN, NESTEROV, DECAY, FACTOR = range(COLUMNS)
PLAIN = Hyper(lr=1.0, momentum=0.0, gain=1.0, nesterov=False, weight_decay=0.0, factor=1.0)  # u = g


@final
@dataclass(frozen=True)
class SGD(Rule):
    """m' = mu m + g, u = m' or g + mu m'; where mu is 0, u = g and m stays what it is.

    Args:
        outer: weight decay is applied at x and has a momentum of its own (dist-EF appendix A); the gradient gets none.
        signum: the momentum is an average, m' = mu m + (1 - mu) g, and an outer decay has none.
    """

    kind: ClassVar[int] = 0
    hyper: ClassVar[type[Any]] = Hyper
    names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    outer: bool = False
    signum: bool = False

    @classmethod
    def reads(cls, optimizer: torch.optim.Optimizer) -> bool:
        step = inspect.unwrap(type(optimizer).step)  # torch wraps it for each class, for its profiler
        return isinstance(optimizer, torch.optim.SGD) and step is inspect.unwrap(torch.optim.SGD.step)

    def read(self, optimizer: torch.optim.Optimizer, step: int = 0, workers: int = 1) -> list[AnyHyper]:
        """The groups' settings, the same for every t and K.

        Raises:
            ValueError: on dampening, which would change the algorithm, or a negative or non-finite setting.
        """
        found: list[AnyHyper] = []
        for i, group in enumerate(optimizer.param_groups):
            lr, mu, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
            if group["dampening"] != 0:
                raise ValueError(
                    f"param group {i} has dampening={group['dampening']}; Algorithm 1's momentum has none: "
                    "set dampening=0 (and scale lr by 1 - dampening if you relied on it)"
                )
            if not (0.0 <= lr < float("inf") and 0.0 <= mu < 1.0 and 0.0 <= decay < float("inf")):
                raise ValueError(
                    f"param group {i} has lr={lr}, momentum={mu}, weight_decay={decay}; expected finite lr >= 0, "
                    "0 <= momentum < 1, finite weight_decay >= 0"
                )
            gain = 1.0 - mu if self.signum and mu else 1.0
            factor = -1.0 if group["maximize"] else 1.0
            found.append(Hyper(lr, mu, gain, bool(group["nesterov"]), 0.0 if self.outer else decay, factor))
        return found

    def vectors(self, hyper: Sequence[Any]) -> int:
        return int(any(h.momentum for h in hyper))

    @staticmethod
    def update(h: Hyper, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
        g = g * h.factor
        if h.weight_decay != 0.0:
            g = g + x_half * h.weight_decay
        if len(m) == 0 or h.momentum == 0.0:  # what a group kept before is left, as torch leaves its buffer
            return m, g
        m_new = m[0] * h.momentum + g * h.gain  # Alg. 1, line 10
        return m_new[None], (g + m_new * h.momentum if h.nesterov else m_new)  # dist-EF Alg. 4, lines 5-6

    def reads_x_half(self, hyper: Sequence[Any]) -> bool:
        return any(h.weight_decay for h in hyper)

    @property
    def decays_at_x(self) -> bool:
        return self.outer

    def keeps_decay(self, groups: Sequence[Mapping[str, Any]], hyper: Sequence[Any]) -> bool:
        pairs = zip(hyper, groups, strict=True)
        return self.outer and not self.signum and any(h.momentum and g["weight_decay"] for h, g in pairs)

    def decay(self, weight_decay: float, h: Hyper, x: Tensor, m: Tensor) -> None:
        """m~ = mu m~ + lambda x;  x <- x - eta (m~, or lambda x + mu m~ with Nesterov); without mu x - eta lambda x."""
        u = x * weight_decay
        if m.numel() and h.momentum:
            m.mul_(h.momentum).add_(u)
            u = u + m * h.momentum if h.nesterov else m
        x.sub_(u * h.lr)
