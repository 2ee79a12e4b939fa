"""The difference form (SAEF, Algorithm 1, lines 10 to 12): what is compressed is how far a worker's weights have moved.

    X = x_half;  H steps of the user's own optimizer on X;  u = x_half - X;  D = e + u

It knows nothing of the optimizer, which keeps its state, and its decay, to itself. So any will do, and any number of
local steps, as the paper says beside Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from .rule import AnyHyper, Rule
from .sgd import PLAIN, SGD, Hyper


@final
@dataclass(frozen=True)
class Difference(Rule):
    """u is what comes in the gradient's place, eta = 1: as plain SGD has it.

    Args:
        optimizer: whose steps are taken, by the name of its class.
        local_steps: H, between two exchanges.
    """

    kind: ClassVar[int] = SGD.kind
    hyper: ClassVar[type[Any]] = Hyper
    names: ClassVar[tuple[str, ...]] = ()
    of_gradients: ClassVar[bool] = False

    optimizer: str
    local_steps: int

    @classmethod
    def reads(cls, optimizer: torch.optim.Optimizer) -> bool:
        return True

    def read(self, optimizer: torch.optim.Optimizer, step: int = 0, workers: int = 1) -> list[AnyHyper]:
        return [PLAIN for _ in optimizer.param_groups]

    def vectors(self, hyper: Sequence[Any]) -> int:
        return 0

    @staticmethod
    def update(h: Any, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
        return SGD.update(h, g, m, x_half)

    def reads_x_half(self, hyper: Sequence[Any]) -> bool:
        return False

    @property
    def decays_at_x(self) -> bool:
        return False

    def keeps_decay(self, groups: Sequence[Mapping[str, Any]], hyper: Sequence[Any]) -> bool:
        return False

    def decay(self, weight_decay: float, h: Any, x: Tensor, m: Tensor) -> None:
        raise NotImplementedError("the optimizer itself decays X")
