"""The loss scale of float16 training: what a torch.amp.GradScaler has to do with a step.

The gradients arrive multiplied by the scale S. A GradScaler would divide p.grad by it in `scaler.step()`,
when saef has sent the gradient already; so saef does it itself, on the way from g to the momentum
(`Hyper.factor`), and tells the scaler that it is done. The scaler would also decide on its own whether a
gradient overflowed; here all ranks decide together, so their scales move alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch.amp.grad_scaler import GradScaler, OptState

CLAIMED = "saef unscales"  # in what a scaler has of an optimizer, until its next update()


@final
class _Claimed(GradScaler):
    """Names the remedy where PyTorch's own error would say that unscale_() was called twice."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if CLAIMED in self._per_optimizer_states[id(optimizer)]:
            raise RuntimeError(
                "scaler.unscale_(): SAEFState has compressed and sent these gradients, and unscales them itself. Leave "
                "the call out; to clip, give SAEFState max_grad_norm, which is of the unscaled gradient"
            )
        super().unscale_(optimizer)


@final
class LossScale:
    """One optimizer's part in a scaler.

    Args:
        scaler: None, or one that is disabled: gradients come unscaled.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {scaler!r}")
        self._scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self._found_inf: torch.Tensor | None = None

    @property
    def used(self) -> bool:
        """Whether gradients come multiplied by a scale."""
        return self._scaler is not None

    def check_dtypes(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raise TypeError if parameters or gradients are float16 and nothing scales the loss."""
        if not self.used and torch.float16 in dtypes:
            raise TypeError(
                "float16 parameters or gradients need loss scaling: create SAEFState(..., "
                "grad_scaler=torch.amp.GradScaler(...)) and use the scaler as ever, or use bfloat16 or float32"
            )

    def value(self) -> float:
        """S now; 1 without a scaler."""
        return float(self._scaler.get_scale()) if self.used else 1.0

    def inverse(self) -> float:
        """1 / S, what a gradient is to be multiplied by. Raises RuntimeError if no loss was ever scaled."""
        if self.used and self._scaler._scale is None:
            raise RuntimeError(
                "SAEFState has a grad_scaler, but the loss was not scaled: call scaler.scale(loss).backward()"
            )
        return 1.0 / self.value()

    def claim(self, optimizer: torch.optim.Optimizer) -> None:
        """After a backward: the scaler finds the gradients unscaled, and leaves them alone."""
        if not self.used:
            return
        mine = self._scaler._per_optimizer_states[id(optimizer)]
        if mine["stage"] is OptState.READY:
            self._found_inf = torch.zeros((), device=self._scaler._scale.device)
            mine["stage"], mine[CLAIMED] = OptState.UNSCALED, True
            if type(self._scaler) is GradScaler:
                self._scaler.__class__ = _Claimed
            mine["found_inf_per_device"] = {self._found_inf.device: self._found_inf}

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """In optimizer.step(). Raises RuntimeError unless it was called as it must be, by the scaler or not."""
        by_scaler = getattr(optimizer, "found_inf", None) is not None
        if by_scaler and not self.used:
            raise RuntimeError(
                "a GradScaler steps this optimizer, but SAEFState does not know it and has sent scaled gradients: "
                "create SAEFState(..., grad_scaler=scaler)"
            )
        if self.used and not by_scaler:
            raise RuntimeError("SAEFState has a grad_scaler: call scaler.step(optimizer), not optimizer.step()")

    def hide(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer's own arithmetic, which may refuse what the scaler has set."""
        if self.used:
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]

    def decide(self, skipped: bool) -> None:
        """Tell the scaler what all ranks decided; its update() then lowers the scale, or not."""
        if self._found_inf is not None:
            self._found_inf.fill_(float(skipped))
            self._found_inf = None
