"""When a state is called: the hooks it puts on a model and an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.algorithms.join import Joinable
from torch.utils.hooks import RemovableHandle

# The newest attachment of each model, as a token.
_newest: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

StepHook = Callable[[torch.optim.Optimizer, Any, Any], None]


@final
class Attachment:
    """Hooks on one model and one optimizer.

    Args:
        begin: before a forward in training mode with gradients enabled.
        restore: before any other forward, and before state_dict() and load_state_dict().
        before_step, after_step: around `optimizer.step()`.

    Raises:
        ValueError: if the optimizer has a state already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        begin: Callable[[], None],
        restore: Callable[[], None],
        before_step: StepHook,
        after_step: StepHook,
    ) -> None:
        if getattr(optimizer, "_saef_attached", False):
            raise ValueError("this optimizer has a SAEFState already; call detach() on that one first")
        self._optimizer = optimizer
        optimizer._saef_attached = True  # type: ignore[attr-defined]
        # GradScaler unscales p.grad without a trace, unless the optimizer claims to do it; then it shows.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        self._begin, self._restore = begin, restore
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(after_step),
            model.register_forward_pre_hook(_Hook(self._before_forward)),
        ]
        modules, self._trained = [model], model
        if isinstance(inner := getattr(model, "module", None), nn.Module):
            self._trained = inner  # DeepSpeed's engine leaves its own `training` as it is
            modules.append(inner)  # what DDP wraps; users evaluate and save it directly
            self._handles.append(inner.register_forward_pre_hook(_Hook(self._before_inner_forward)))
        _newest[self._trained] = self._token = object()
        for module in modules:
            self._handles.append(module.register_state_dict_pre_hook(_Hook(self._before_access)))
            self._handles.append(module.register_load_state_dict_pre_hook(_Hook(self._before_access)))

    @property
    def newest(self) -> bool:
        """Whether the model's parameters are still this one's: no other state has been made for the model since."""
        return _newest.get(self._trained) is self._token

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self._optimizer._saef_attached, self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, Joinable) and module._join_config.enable:
            raise RuntimeError(
                "DDP's join() for uneven inputs cannot work with SAEF: a rank without data has no gradient at its own "
                "x_half. Give all ranks the same number of batches (DistributedSampler does)"
            )
        if self._trained.training and torch.is_grad_enabled():
            self._begin()
        else:
            self._restore()

    def _before_inner_forward(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            self._restore()

    def _before_access(self, *_: Any) -> None:
        self._restore()


@final
class _Hook:
    """Calls a method of an attachment. A copy of the module (deepcopy, pickle) gets one that does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
