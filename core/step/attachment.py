"""When a state is called: the hooks it puts on a model and an optimizer, and its watch over other optimizers."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial, wraps
from typing import Any, Protocol, final
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.algorithms.join import Joinable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from .outputs import kept_in, tensors_in

OPAQUE = (
    "saef exchanges the parameters' values here. With fullgraph=True compile the network that is wrapped, not the "
    "wrapper or the step, and evaluate it before a training forward or after its backward, not in between"
)

# The newest attachment of each model.
_newest: WeakKeyDictionary[nn.Module, ref[Attachment]] = WeakKeyDictionary()


class Steps(Protocol):
    """What is called.

    begin: before a forward with gradients enabled.
    enter: before the backward of such a forward; its argument is what `begin` returned, unless that was None.
    over: after that backward. leave: before any other forward, before state_dict() and load_state_dict().
    reduced: within a backward, when FSDP has made a parameter's gradient its node's, or its rank's.
    zeroing: before zero_grad().
    before_step, after_step: around `optimizer.step()`.
    before_other_step: before the step of any other optimizer.
    ahead: whether the parameters are x_half. number: of that one, or of the last.
    """

    @property
    def ahead(self) -> bool: ...
    @property
    def number(self) -> int: ...
    def begin(self) -> int | None: ...
    def enter(self, number: int) -> None: ...
    def over(self) -> None: ...
    def leave(self) -> None: ...
    def reduced(self, parameter: Tensor) -> None: ...
    def zeroing(self) -> None: ...
    def before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None: ...
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None: ...
    def before_other_step(self, optimizer: torch.optim.Optimizer) -> None: ...


@final
class Attachment:
    """Hooks on one model and one optimizer. torch.compile does not look into them: they change what it has traced.

    Args:
        optimizer: that does the step. given: what a framework has put around it, or the same.
        reduced: parameters whose gradients FSDP2 reduces, or its `replicate` hands over: its own hooks come after ours.

    Raises:
        ValueError: if the optimizer has a state already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        given: torch.optim.Optimizer,
        reduced: Sequence[Tensor],
        steps: Steps,
    ) -> None:
        if getattr(optimizer, "_saef_attached", False):
            raise ValueError("this optimizer has a SAEFState already; call detach() on that one first")
        self._optimizer, self._steps = optimizer, steps
        optimizer._saef_attached = True  # type: ignore[attr-defined]
        # GradScaler unscales p.grad without a trace, unless the optimizer claims to do it; then it shows.
        self._scales = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused ones do
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        opaque = partial(torch.compiler.disable, reason=OPAQUE)
        self._leave, self._over = map(opaque, (steps.leave, steps.over))
        self._enter, self._enter_kept = map(opaque, (self._before_backward, self._before_kept))
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(opaque(steps.before_step)),
            optimizer.register_step_post_hook(opaque(steps.after_step)),
            model.register_forward_pre_hook(_Hook(opaque(self.before_forward)), prepend=bool(reduced)),
            model.register_forward_hook(_Hook(opaque(self._after_forward))),
        ]
        self._reduced = [(p, p.register_post_accumulate_grad_hook(opaque(steps.reduced))) for p in reduced]
        self._handles += [handle for _, handle in self._reduced]
        modules, self._trained = [model], _trained_by(model)
        if (inner := self._trained) is not model:
            modules.append(inner)  # what DDP wraps; users evaluate and save it directly
            self._handles.append(inner.register_forward_pre_hook(_Hook(self._before_inner_forward)))
        _newest[self._trained] = ref(self)
        for module in modules:
            self._handles.append(module.register_state_dict_pre_hook(_Hook(self._before_access)))
            self._handles.append(module.register_load_state_dict_pre_hook(_Hook(self._before_access)))
        self._zeroing = [optimizer] if given is optimizer else [optimizer, given]
        for one in self._zeroing:
            one.zero_grad = opaque(_left_before(steps, one.zero_grad))  # type: ignore[method-assign]
        _watch(self)
        self._number: int | None = 0
        self._kept: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()

    @property
    def newest(self) -> bool:
        """Whether the model's parameters are still this one's: no other state has been made for the model since."""
        return _newest_of(self._trained) is self

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def come_last(self) -> None:
        """Whatever other hooks are to see before the step (gradients, above all), they see before this one hides it.

        And what they make of FSDP2's gradients is done before these are sent.
        """
        hooks: Any = self._optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._handles[0].id)
        for p, handle in self._reduced:
            hooks = p._post_accumulate_grad_hooks
            hooks.move_to_end(handle.id)

    def come_first_after(self) -> None:
        """Whatever other hooks are to see or change after the step, they find when this one has shown it."""
        hooks: Any = self._optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[1].id, last=False)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _watching.discard(self)
        optimizer: Any = self._optimizer
        del optimizer._saef_attached, optimizer._step_supports_amp_scaling
        for one in self._zeroing:
            del one.zero_grad
        if self._scales:
            optimizer._step_supports_amp_scaling = True

    def before_any_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step of any optimizer of this process."""
        if not getattr(optimizer, "_saef_attached", False):
            self._steps.before_other_step(optimizer)

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Before a forward of the wrapped model."""
        if isinstance(module, Joinable) and module._join_config.enable:
            raise RuntimeError(
                "DDP's join() for uneven inputs cannot work with SAEF: a rank without data has no gradient at its own "
                "x_half. Give all ranks the same number of batches (DistributedSampler does)"
            )
        if torch.is_grad_enabled():
            self._number = self._steps.begin()
        else:
            self._steps.leave()

    def _before_inner_forward(self, module: nn.Module, args: Any) -> None:
        """Traced with the module, which may be compiled with fullgraph=True: nothing opaque unless it must be."""
        if self._steps.ahead and not torch.is_grad_enabled():
            self._leave()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.watch(output)

    def watch(self, output: Any) -> None:
        """Have the backward of a forward's output tell when it begins: the gradient of an output is its first."""
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                self._watch_one(tensor, self._enter)

    def watch_kept(self) -> None:
        """The same of what the forward left in the model's attributes: an auxiliary loss, say.

        Only where the parameters become x before that backward; else the output's is not needed either.
        """
        for tensor in kept_in(self._trained):
            if (earlier := self._kept.get(tensor)) is not None:
                earlier.remove()
            if (handle := self._watch_one(tensor, self._enter_kept)) is not None:
                self._kept[tensor] = handle

    def _watch_one(self, tensor: Tensor, tell: Callable[[int, Tensor], None]) -> RemovableHandle | None:
        if not tensor.requires_grad or self._number is None:
            return None
        handle: RemovableHandle = tensor.register_hook(partial(tell, self._number))
        _come_first(tensor, handle)
        return handle

    def _before_kept(self, number: int, gradient: Tensor) -> None:
        """What is there for several steps may have nothing to do with this model, or be refused by autograd itself."""
        if number == self._steps.number:
            self._before_backward(number, gradient)

    def _before_backward(self, number: int, gradient: Tensor) -> None:
        if self.attached:
            self._steps.enter(number)
            if not torch.is_grad_enabled():  # else create_graph: another backward through these weights will follow
                autograd = Variable._execution_engine  # queued twice, to come after DDP's own callback
                autograd.queue_callback(lambda: autograd.queue_callback(self._over))

    def _before_access(self, *_: Any) -> None:
        self._leave()


def leave_the_last(model: nn.Module) -> None:
    """The parameters are x, before another state is made: a step of the last one may have been given up in between."""
    if (last := _newest_of(_trained_by(model))) is not None and last.attached:
        last._steps.leave()


def _trained_by(model: nn.Module) -> nn.Module:
    """What DDP wraps, or the model itself."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def _newest_of(trained: nn.Module) -> Attachment | None:
    found = _newest.get(trained)
    return None if found is None else found()


# The attachments that are there, and one hook for all of them, from the first on: torch keeps it for ever.
_watching: WeakSet[Attachment] = WeakSet()
_watcher: list[RemovableHandle] = []


def _watch(attachment: Attachment) -> None:
    _watching.add(attachment)
    if not _watcher:
        _watcher.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_any_step, reason=OPAQUE)))


def _before_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for attachment in list(_watching):
        attachment.before_any_step(optimizer)


def _left_before(steps: Steps, original: Callable[..., None]) -> Callable[..., None]:
    """`original` after `steps.zeroing()`."""

    @wraps(original)  # frameworks look whether it takes set_to_none
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        steps.zeroing()
        original(*args, **kwargs)

    return zero_grad


def _come_first(tensor: Tensor, handle: RemovableHandle) -> None:
    """Whatever else is to happen before this backward (FSDP gathers parameters) finds them at x_half."""
    hooks: Any = tensor._backward_hooks
    for number in [number for number in hooks if number != handle.id]:
        hooks[number] = hooks.pop(number)


@final
class _Hook:
    """Calls a method of an attachment. A copy of the module (deepcopy, pickle) gets one that does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script would compile the hooks of a SAEFState on this module: script it before the state is "
            "made, or after state.detach(), or use torch.export or torch.jit.trace"
        )

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
