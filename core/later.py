"""A SAEFState that waits for its model and its optimizer, for frameworks that want the object before both."""

from __future__ import annotations

import gc
import inspect
import logging
from typing import Any, final
from weakref import WeakSet

import torch
from torch import nn
from torch._compile import _disable_dynamo  # as torch.compiler.disable, but imports the compiler at the first call
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from .state import Copied, SAEFState
from .step.arguments import Agreed, StateSettings, check_known
from .step.settings import Settings
from .step.unwrap import innermost

logger = logging.getLogger("saef")
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(SAEFState).parameters.items()
    if name in Agreed.__annotations__
}


@final
class Later:
    """The settings of a SAEFState to be, checked at once. Bound to a model and an optimizer when these are there.

        later = saef.Later(compressor=saef.TopK(0.01))     # before model, optimizer and process group, and picklable
        ...
        model.register_comm_hook(later, saef_hook)         # as DDPStrategy(ddp_comm_state=later, ...) does on a GPU
        state = later.bind(model, optimizer)               # or by itself, at the model's first training forward

    By itself it takes the optimizer that has the model's trainable parameters. That one must be there, and alone.

    Args:
        settings: keyword arguments of SAEFState.

    Attributes:
        settings: as given.
        state: the SAEFState; None until it is bound.

    Raises:
        TypeError, ValueError: on a keyword that is none, and on a value that cannot be honoured.
    """

    def __init__(self, **settings: Unpack[StateSettings]) -> None:
        given: dict[str, Any] = {**settings}
        check_known("Later", given, StateSettings.__annotations__, TypeError)
        Settings(**{**DEFAULTS, **{name: given[name] for name in DEFAULTS if name in given}})
        self.settings = settings
        self.state: SAEFState | None = None
        self._told = False
        _wait(self)

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer, **others: Unpack[StateSettings]) -> SAEFState:
        """Make the SAEFState. Collective, as SAEFState; once, or again after that one's detach().

        Args:
            model: as of SAEFState.
            optimizer: likewise.
            others: keyword arguments that are known only now (grad_scaler, ...). They go before the earlier ones.

        Raises:
            RuntimeError: if it is bound.
            TypeError, ValueError: as SAEFState.
        """
        if self.state is not None and self.state.engine.attached:
            raise RuntimeError(
                "this Later is bound to a model and an optimizer: make another for others, or detach() its state first"
            )
        settings: StateSettings = {**self.settings, **others}
        self.state = SAEFState(model, optimizer, **settings)
        _waiting.discard(self)
        return self.state

    def bound(self) -> SAEFState:
        """The state. Raises RuntimeError if there is none."""
        if self.state is None:
            raise RuntimeError(
                "saef.Later is not bound in the backward: the model's forward was not called as model(...), which "
                "binds it. Call later.bind(model, optimizer) before the first forward"
            )
        return self.state

    def __reduce__(self) -> Any:
        """Before it is bound, its settings. Afterwards as a SAEFState: a copy of the model trains without saef."""
        return (_again, (self.settings,)) if self.state is None else (Copied, ())

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"saef.Later({words})" if self.state is None else f"<Later: {self.state!r}>"

    def before_forward(self, model: DistributedDataParallel) -> None:
        """A training forward of any DDP in this process begins, and this is not bound."""
        if any(state is self for _, state in model._comm_hooks):
            # The hooks that this makes do not count in the forward that is beginning.
            self.bind(model, optimizer_of(model)).engine.forward_begins()
        elif not (model._comm_hooks or self._told):
            self._told = True
            logger.warning(
                "a DistributedDataParallel trains without a communication hook, and settings of saef still wait for a "
                "model (saef.Later, or an adapter's callback). If they are for this one: register_comm_hook(later, "
                "saef_hook) before its first forward, or give the trainer the callback. (Lightning registers "
                "DDPStrategy(ddp_comm_hook=...) on GPUs alone: use saef.integrations.lightning)"
            )


def _again(settings: StateSettings) -> Later:
    return Later(**settings)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The one optimizer of this process that has the model's trainable parameters.

    Raises:
        RuntimeError: if there is none, or more than one.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    gc.collect()  # those that nobody can step any more
    every = [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]
    found = {id(inner): inner for inner in map(innermost, every) if trained & _held(inner)}
    if len(found) != 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in found.values())
        raise RuntimeError(
            f"saef.Later: {len(found) or 'no'} optimizers{f' ({names})' if names else ''} in this process have the "
            "model's parameters, at its first training forward, and a SAEFState is for one: make it before that "
            "forward, or name it by later.bind(model, optimizer)"
        )
    return next(iter(found.values()))


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


# Those that wait, and one hook on all modules of the process while there are any.
_waiting: WeakSet[Later] = WeakSet()
_watcher: list[RemovableHandle] = []


def _wait(later: Later) -> None:
    _waiting.add(later)
    if not _watcher:
        _watcher.append(register_module_forward_pre_hook(_disable_dynamo(_before_forward)))


def _before_forward(module: nn.Module, args: Any) -> None:
    if isinstance(module, DistributedDataParallel) and torch.is_grad_enabled():
        for later in list(_waiting):
            later.before_forward(module)
    if not _waiting and _watcher:
        _watcher.pop().remove()
