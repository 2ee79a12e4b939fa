"""Accelerate: `attach(accelerator, model, optimizer, ...)`, after `accelerator.prepare`.

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    state = attach(accelerator, model, optimizer, compressor=saef.ScaledSign(), max_grad_norm=1.0)

The loop stays Accelerate's. What is its part, and what is ours:

    model(x), accelerator.backward(loss)   DDP's, with `saef_hook`
    accelerator.clip_grad_norm_            answered: SAEFState clips, and this is the norm
    optimizer.step()                       SAEFState, by its hooks on the optimizer inside
    accelerator.save_state, load_state     as ever, with a checkpoint of all ranks (`saef.storage`) in FOLDER/saef
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

import saef
from saef.hooks import saef_hook
from saef.step.arguments import Agreed, check_known
from saef.step.unwrap import innermost, unwrap_model

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"saef.integrations.accelerate needs Accelerate: pip install 'saef[accelerate]' ({error})"
    ) from error

logger = logging.getLogger("saef")


def attach(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Unpack[Agreed]
) -> saef.SAEFState:
    """A SAEFState for what `accelerator.prepare` has made of a model and its optimizer. Collective, once a model.

    Args:
        accelerator: of several processes. Its save_state, load_state and clip_grad_norm_ know of the state from now on.
        model: as prepare() returned it; it wraps a DistributedDataParallel.
        optimizer: as prepare() returned it.
        settings: keyword arguments of SAEFState, but for grad_scaler, process_group and transport: Accelerate's.

    Raises:
        TypeError, ValueError: as SAEFState; and if the model is no DistributedDataParallel (a single process, FSDP,
            DeepSpeed), has a communication hook already, or was not prepared.
    """
    check_known("attach", settings, Agreed.__annotations__, TypeError)
    return bind(accelerator, saef.Later(**settings), model, optimizer)


def bind(
    accelerator: Accelerator,
    later: saef.Later,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **others: Unpack[Agreed],
) -> saef.SAEFState:
    """`attach`, with settings that were given before: `later`, with `others` on top."""
    ddp = _check(accelerator, model, optimizer)
    state = later.bind(ddp, optimizer, grad_scaler=accelerator.scaler, **others)
    ddp.register_comm_hook(state, saef_hook)
    _tell_schedulers(optimizer, state)
    ours = _Ours(accelerator, ddp, state)
    accelerator.clip_grad_norm_ = functools.partial(_clip_norm, accelerator.clip_grad_norm_, ours)
    accelerator.clip_grad_value_ = functools.partial(_clip_value, accelerator.clip_grad_value_, ours)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: ours.save(folder))
    _load_with(accelerator, ours)
    _free_with(accelerator, ours)
    _register_others(accelerator)
    return state


@final
class _Ours:
    """What an Accelerator knows of a state, which lives as long as its DistributedDataParallel does.

    Attributes:
        name: of the folder in a checkpoint: "saef", and "saef_1" ... for further models, as Accelerate names theirs.
    """

    def __init__(self, accelerator: Accelerator, ddp: DistributedDataParallel, state: saef.SAEFState) -> None:
        self._accelerator, self._ddp = weakref.ref(accelerator), weakref.ref(ddp)
        self._state = weakref.ref(state)
        others = [one for one in getattr(accelerator, "_saef", []) if one.prepared() is not None and not one.was(ddp)]
        self.name = f"saef_{len(others)}" if others else "saef"
        accelerator._saef = [*others, self]

    def attached(self) -> saef.SAEFState | None:
        """The state, if it still trains."""
        state = self._state()
        return state if state is not None and state.engine.attached else None

    def prepared(self) -> saef.SAEFState | None:
        """The state, if Accelerate still has its model: free_memory() lets go of it."""
        accelerator, ddp = self._accelerator(), self._ddp()
        if accelerator is None or ddp is None:
            return None
        known = [*map(id, (ddp, ddp.module))]  # Accelerate lists the module, and after compiling what is around it
        return self.attached() if any(id(unwrap_model(model)) in known for model in accelerator._models) else None

    def was(self, ddp: DistributedDataParallel) -> bool:
        """Whether it is the state that this model had before it was prepared anew."""
        own = self._ddp()
        return own is not None and own.module is ddp.module

    def save(self, folder: str) -> None:
        if (state := self.prepared()) is not None:
            saef.save_checkpoint(Path(folder) / self.name, state, keep=1)


def _check(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> DistributedDataParallel:
    """The DDP inside the model. Raises ValueError on what `attach` cannot honour."""
    ddp = unwrap_model(model)
    if not isinstance(ddp, DistributedDataParallel):
        raise ValueError(
            f"attach() needs the DistributedDataParallel that accelerator.prepare(model) returns, got "
            f"{type(model).__name__} with distributed_type={accelerator.distributed_type.value}: start several "
            "processes (torchrun, accelerate launch) without FSDP, DeepSpeed and Megatron, and call attach() after "
            "prepare(); a single process has nothing to exchange. (DeepSpeed, also in Hugging Face's Trainer, takes "
            "SAEF from its JSON instead: saef.integrations.deepspeed)"
        )
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise ValueError(
            f"attach() needs the optimizer that accelerator.prepare(optimizer) returns, got {type(optimizer).__name__}"
        )
    found = accelerator.ddp_handler and accelerator.ddp_handler.comm_hook
    if found and getattr(found, "value", found) != "no":
        raise ValueError(
            f"DistributedDataParallelKwargs has comm_hook={found!r}: attach() registers saef_hook itself, and "
            "Accelerate ignores a hook it does not know. Leave comm_hook out"
        )
    if ddp._comm_hooks:
        raise ValueError(
            "this DistributedDataParallel has a communication hook already (of an earlier attach(), perhaps), and can "
            "have only one: wrap the model anew, by accelerator.prepare(accelerator.unwrap_model(model))"
        )
    return ddp


# ---- what Accelerate calls ------------------------------------------------------------------


def _tell_schedulers(optimizer: Any, state: saef.SAEFState) -> None:
    """Where all ranks skip a step, AcceleratedOptimizer counts it as skipped, and the schedulers wait."""
    inner, before = innermost(optimizer), [0]

    def started(*_: Any) -> None:
        before[0] = state.skipped

    def ended(*_: Any) -> None:
        if state.engine.attached:
            optimizer._is_overflow = skipped = state.skipped > before[0]
            optimizer._accelerate_step_called = not skipped  # by which it decides after a GradScaler's step

    inner.register_step_pre_hook(started)
    inner.register_step_post_hook(ended)


def _clip_norm(
    original: Callable[..., Any],
    ours: _Ours,
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float | Tensor,
    norm_type: float = 2,
) -> Any:
    """Accelerator.clip_grad_norm_: the norm of this rank's own gradient, which SAEFState clips at `max_norm`."""
    every, state = _listed(parameters), ours.attached()
    if state is None:
        return original(every, max_norm, norm_type=norm_type)
    found = state.settings.max_grad_norm
    differs = norm_type != 2 or float(max_norm) not in (found, float("inf"))
    if (differs and not _sends(state)) or not _is_of(state, every, "clip_grad_norm_"):
        return original(every, max_norm, norm_type=norm_type)
    if differs:
        raise ValueError(
            f"accelerator.clip_grad_norm_(..., {float(max_norm)}, norm_type={norm_type}) comes when gradients have "
            f"been sent; attach() was given max_grad_norm={found}. Pass attach(..., max_grad_norm={float(max_norm)}), "
            "which clips each rank's own gradient (L2) before it is sent; the call may then stay, and returns its norm"
        )
    return torch.tensor(state.engine.gradient_norm(), dtype=state.weights.dtype, device=state.weights.device)


def _clip_value(
    original: Callable[..., Any], ours: _Ours, parameters: Iterable[Tensor] | Tensor, clip_value: float
) -> Any:
    every, state = _listed(parameters), ours.attached()
    if state is None or not _sends(state) or not _is_of(state, every, "clip_grad_value_"):
        return original(every, clip_value)
    raise ValueError(
        "accelerator.clip_grad_value_ comes when gradients have been sent, and saef clips by the norm only: pass "
        "attach(..., max_grad_norm=...) instead"
    )


def _listed(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _sends(state: saef.SAEFState) -> bool:
    """Whether gradients are sent; with local steps they are this rank's to change."""
    return state.engine.context.rule.of_gradients


def _is_of(state: saef.SAEFState, parameters: list[Tensor], method: str) -> bool:
    """Whether they are the state's. ValueError if only some are, or only some of its own."""
    own, given = {id(p) for p in state.weights.parameters}, {id(p) for p in parameters if p.requires_grad}
    if own.isdisjoint(given):
        return False
    if own != given:
        raise ValueError(
            f"accelerator.{method} got {len(own & given)} of the {len(own)} parameters that a SAEFState trains, and "
            f"{len(given - own)} others: it clips the gradient of its whole model. Call it with model.parameters()"
        )
    return True


def _load_with(accelerator: Accelerator, ours: _Ours) -> None:
    """Have accelerator.load_state load ours, after its own: the optimizer's state that Accelerate has is rank 0's."""
    folders: list[str] = []
    accelerator.register_load_state_pre_hook(lambda models, folder: folders.append(folder))
    original = accelerator.load_state

    @functools.wraps(original)
    def load_state(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        folder = Path(folders.pop())
        if (state := ours.prepared()) is not None:
            load(folder / ours.name, state)

    accelerator.load_state = load_state


def _free_with(accelerator: Accelerator, ours: _Ours) -> None:
    """Have accelerator.free_memory, as after a step that did not fit into memory, leave the model at x."""
    original = accelerator.free_memory

    @functools.wraps(original)
    def free_memory(*objects: Any) -> Any:
        if (state := ours.attached()) is not None:
            state.engine.leave()
        return original(*objects)

    accelerator.free_memory = free_memory


def _register_others(accelerator: Accelerator) -> None:
    """Have accelerator.register_for_checkpointing refuse a state: rank 0 would save its own for all."""
    original = accelerator.register_for_checkpointing

    @functools.wraps(original)
    def register_for_checkpointing(*objects: Any) -> None:
        if any(isinstance(one, saef.SAEFState) for one in objects):
            raise ValueError(
                "accelerator.register_for_checkpointing(state) would keep rank 0's errors alone: leave it out. After "
                "attach(), save_state and load_state keep a SAEFState with the errors of every rank; of one that was "
                "made without attach(), use saef.save_checkpoint and load_checkpoint"
            )
        original(*objects)

    accelerator.register_for_checkpointing = register_for_checkpointing


def load(folder: Path, state: saef.SAEFState) -> None:
    """After what the framework loads itself: weights, rank 0's optimizer state, random states.

    Without a checkpoint of ours, that may be of a run without saef, whose momentum the state takes over. If it was of
    one with errors, the next forward raises.
    """
    if state.engine.attached and saef.load_checkpoint(folder, state) is None:
        logger.info("%s holds no checkpoint of saef: weights and momentum alone are loaded", folder)
        state.engine.recheck()
