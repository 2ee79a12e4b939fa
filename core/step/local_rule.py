"""The user's optimizer in a step: the rule it has, and what it says now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..rules import AnyHyper, rule_for
from ..rules.rule import LR, table
from ..wire.kernels.table import Update
from .loss_scale import LossScale
from .memory import Memory
from .settings import Settings
from .weights import Weights


@final
class LocalRule:
    """The rule of one optimizer, which stays the source of all its settings: they are read in every step.

    Args:
        optimizer: the user's.
        settings: where decay applies, whether there is error feedback, the clipping.
        loss_scale: what gradients come multiplied by.

    Attributes:
        rule: what it is. workers: K, once it is known.

    Raises:
        TypeError: if no rule is that of the optimizer.
        ValueError: if what the user chose is another rule's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings, loss_scale: LossScale) -> None:
        self.rule = rule_for(
            optimizer,
            outer=settings.outer_decay,
            signum=not settings.feedback,
            noise_correction=settings.noise_correction,
            local_steps=settings.local_steps,
        )
        if settings.v_averaging is not None and self.rule.second is None:
            raise ValueError(
                f"v_averaging averages second moments, which {type(optimizer).__name__} with local_steps="
                f"{settings.local_steps} does not have within saef: it is for AdamW and Adam with local_steps=1"
            )
        if settings.overlap and self.rule.of_gradients:
            raise ValueError(
                "overlap=True is for local_steps > 1, or optimizers that step by themselves: "
                f"{type(optimizer).__name__} is computed within saef, and its exchange overlaps with the backward"
            )
        self.workers = 1
        self._optimizer = optimizer
        self._loss_scale = loss_scale if self.rule.of_gradients else LossScale(None)
        self._max_grad_norm = settings.max_grad_norm if self.rule.of_gradients else None
        self._feedback = settings.feedback

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on read this optimizer, which has the same groups."""
        self._optimizer = optimizer

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def read(self, step: int) -> list[AnyHyper]:
        """The optimizer's settings for step t, one record a group. Raises ValueError on what cannot be honoured."""
        return self.rule.read(self._optimizer, step, self.workers)

    def read_scaled(self, step: int) -> list[AnyHyper]:
        """The same, gradients divided by the loss scale."""
        inverse = self._loss_scale.inverse()
        return [h._replace(factor=h.factor * inverse) for h in self.read(step)]

    def grow(self, memory: Memory, hyper: Sequence[AnyHyper]) -> None:
        """Make room for what the rule keeps with these settings, which may be more than before."""
        memory.grow(self.rule.vectors(hyper), self.rule.keeps_decay(self._groups, hyper))

    def reads_x_half(self, hyper: Sequence[AnyHyper]) -> bool:
        """Whether u depends on x_half itself with these settings."""
        return self.rule.reads_x_half(hyper)

    def update(self, hyper: Sequence[AnyHyper], norm: float, weights: Weights) -> Update:
        """What the kernels need in this step.

        Args:
            hyper: what `read_scaled` gave.
            norm: L2 norm of this worker's whole gradient, still scaled; looked at only to clip.
        """
        clip = 1.0
        if self._max_grad_norm is not None:
            norm *= self._loss_scale.inverse()
            # A norm that is not finite must show, not turn the gradient into zeros.
            clip = min(1.0, self._max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
        clipped = [h._replace(factor=h.factor * clip) for h in hyper]
        rows = table(clipped, weights.dtype, weights.device)
        return Update(self.rule.kind, rows, weights.x_half()[1], self._feedback)

    def rates(self, update: Update) -> Tensor:
        """[groups]: what R is multiplied with. D = e + eta u contains eta; without feedback D is u."""
        lr = update.hyper[:, LR]
        return torch.ones_like(lr) if self._feedback else lr.clone()

    def decay(self, hyper: Sequence[AnyHyper], weights: Weights, memory: Memory) -> None:
        """Decay at x, uncompressed, before x moves by R (dist-EF appendix A)."""
        if not self.rule.decays_at_x:
            return
        for x, at, i in zip(weights.parts(), weights.offsets, weights.groups, strict=True):
            m = memory.m_decay[at : at + x.numel()] if memory.m_decay.numel() else memory.m_decay
            self.rule.decay(self._groups[i]["weight_decay"], hyper[i], x, m)
