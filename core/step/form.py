"""How the steps of the user's optimizer become those of Algorithm 1: two forms.

`GradientForm` replaces the optimizer's arithmetic: what is sent is made of the gradients, while the backward runs.
`saef.step.rounds.Rounds` lets the optimizer step on x_half: what is sent is how far that has moved, after its step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.futures import Future

from ..comm.node import Node
from ..comm.transport import Transport
from .algorithm import Algorithm
from .local_rule import LocalRule
from .loss_scale import LossScale
from .memory import Memory
from .optimizer_state import Saved
from .prepared import Marks, Prepared
from .sending import Sending
from .weights import Weights, held

Closure = Callable[[], Any] | None


class Host(Protocol):
    """What a form needs of its engine.

    settle: commit what was sent, or skip it, on all ranks alike. left_out: parameters that are trained no longer.
    exchange_gradients: of every p.grad, after a backward. has_hook: whether a framework is to do that.
    skip_bad: skip what was exchanged if a number in it is not finite; whether it was so.
    node: the ranks that are this worker.
    """

    @property
    def weights(self) -> Weights: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def rule(self) -> LocalRule: ...
    @property
    def loss_scale(self) -> LossScale: ...
    @property
    def sending(self) -> Sending: ...
    @property
    def algorithm(self) -> Algorithm: ...
    @property
    def node(self) -> Node: ...
    @property
    def left_out(self) -> Sequence[Tensor]: ...
    @property
    def has_hook(self) -> bool: ...
    def leave(self) -> None: ...
    def skip_bad(self) -> bool: ...
    def exchange_gradients(self) -> None: ...
    def settle(self, optimizer: torch.optim.Optimizer) -> None: ...


class Form(ABC):
    """What an engine does for the hooks and adapters of frameworks in a backward, and around an optimizer's step.

    Attributes:
        stepping: whether the optimizer's own step changes what a step is made of: from before it until all is settled.
        entered: whether it runs its closure just now, whose forwards and backwards are at the parameters as they are.
    """

    stepping = False
    entered = False

    def __init__(self, host: Host) -> None:
        self._host = host
        self._hidden: list[tuple[Tensor, Tensor | None]] = []

    @abstractmethod
    def settings(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What of an optimizer must be the same on all ranks."""

    @abstractmethod
    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """The first forward of a step: x_half is made."""

    @abstractmethod
    def go_on(self) -> bool:
        """Whether a step under way goes on where it is, rather than from x. Before a training forward."""

    def forward_again(self) -> None:  # noqa: B027 - most exchange nothing in a backward
        """Before a training forward, where a backward may have been exchanged that no step has taken."""

    @abstractmethod
    def exchange(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool
    ) -> Future[Tensor]:
        """See `saef.step.engine.Engine`, as for the next five."""

    @abstractmethod
    def gradient_ready(self, parameter: int) -> None: ...
    @abstractmethod
    def exchange_gradients(self) -> None: ...
    @abstractmethod
    def exchange_late(self) -> None: ...
    @abstractmethod
    def expect_change(self, parameter: int) -> None: ...
    @abstractmethod
    def backward_ended(self, optimizer: torch.optim.Optimizer) -> None: ...

    @abstractmethod
    def before_step(self, optimizer: torch.optim.Optimizer, closure: Closure) -> Closure:
        """Before the optimizer's own arithmetic; the closure that it shall get."""

    @abstractmethod
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After it."""

    @abstractmethod
    def check(self, prepared: Prepared) -> None:
        """Raise RuntimeError unless the exchange is complete."""

    @abstractmethod
    def check_sent(self, prepared: Prepared) -> None:
        """Raise RuntimeError unless what was sent is still what the user wants to apply."""

    @property
    def owed(self) -> bool:
        """Whether the errors have taken over what was sent before it is committed."""
        return False

    def unsend(self, e: Tensor) -> None:  # noqa: B027 - nothing is, in most forms
        """e, a copy of the errors, as if what is on its way to be applied later had not been sent."""

    def saved(self, optimizer: torch.optim.Optimizer) -> Saved | None:
        """What an optimizer that makes its own steps keeps, and where in a round it is; None of another."""
        return None

    def consolidated(self, optimizer: torch.optim.Optimizer, transport: Transport) -> Saved | None:
        """The same as means over the ranks. Collective."""
        return None

    def load(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:  # noqa: B027 - only what `saved` gave
        """What `saved` or `consolidated` gave."""

    @abstractmethod
    def committed(self) -> None:
        """The step has taken effect."""

    @abstractmethod
    def drop(self, optimizer: torch.optim.Optimizer, restored: bool) -> None:
        """The step has not happened. restored: the optimizer's own state shall be as before it."""

    @property
    def local_step(self) -> int:
        """Local steps of the round so far, or of a round that was loaded and is to go on."""
        return 0

    def _hide(self) -> None:
        """Gradients, so that the optimizer's own arithmetic finds nothing to do."""
        self._hidden = [(p, p.grad) for p in (*self._host.weights.parameters, *self._host.left_out)]
        for p, _ in self._hidden:
            p.grad = None

    def _show(self) -> None:
        for p, g in self._hidden:
            p.grad = g
        self._hidden = []

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._host.weights.parameters if p.grad is not None]

    def _has_gradients(self) -> bool:
        return any(bool(held(g).any()) for g in self._gradients())


DROPPED = (
    "a step that is dropped after its backward, by zero_grad() without step(): p.grad, and so its norm, is each rank's "
    "own here, and what is decided by it must be all-reduced first"
)


@final
class GradientForm(Form):
    """D = e + eta u, u by the rule from the gradient."""

    def settings(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        host = self._host
        return {"optimizer": host.rule.read(host.memory.steps), "loss scale": host.loss_scale.value()}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def go_on(self) -> bool:
        return False

    def forward_again(self) -> None:
        """Other ranks may have taken that step: then x would be another there, from now on and without a word.

        A gradient of zeros alone is none that was dropped, so it must have been written to.
        """
        prepared, weights = self._host.sending.prepared, self._host.weights
        if prepared.met or not prepared.exchanged(weights) or self._has_gradients():
            return
        if prepared.gradients.differ(Marks.of(weights.parameters)):
            prepared.met = True
            if not self._host.skip_bad():
                self._host.node.everyone.meet(DROPPED)

    def exchange(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool
    ) -> Future[Tensor]:
        return self._host.sending.exchange(parameters, views, flat, last)

    def gradient_ready(self, parameter: int) -> None:
        self._host.sending.ready(parameter)

    def exchange_gradients(self) -> None:
        self._host.sending.finish()

    def exchange_late(self) -> None:
        self._host.sending.send_late()

    def expect_change(self, parameter: int) -> None:
        self._host.sending.prepared.expect_change(parameter)

    def backward_ended(self, optimizer: torch.optim.Optimizer) -> None:
        self._host.sending.prepared.backward_ended(self._host.weights.parameters)
        self._host.loss_scale.claim(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer, closure: Closure) -> Closure:
        """Commit or skip, and hide the gradients. A closure is run first; its loss is what step() returns."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._host.leave()
        self._host.loss_scale.check(optimizer)
        if self._host.sending.begun and not self._host.sending.prepared.buckets and not self._host.has_hook:
            self._host.weights.check_reduced()
            self._host.exchange_gradients()
        if self._host.sending.prepared.buckets:
            self._host.settle(optimizer)
        elif self._has_gradients():
            raise RuntimeError(
                "optimizer.step() found gradients that were never exchanged: run the last micro-batch outside "
                "no_sync() and, with DDP, register the hook (model.register_comm_hook(state, saef_hook)). "
                "DDP with static_graph=True skips its hooks after no_sync(): leave one of the two out. If this is a "
                "second step() after one backward, the first one has applied them: call zero_grad() in between"
            )
        self._host.loss_scale.hide(optimizer)
        self._hide()
        return None if closure is None else lambda: loss

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._show()

    def check(self, prepared: Prepared) -> None:
        prepared.check(self._host.weights, self._host.rule.read_scaled(self._host.memory.steps))

    def check_sent(self, prepared: Prepared) -> None:
        self._host.algorithm.check_sent(prepared, prepared.rewritten(self._host.weights))

    def committed(self) -> None:
        pass

    def drop(self, optimizer: torch.optim.Optimizer, restored: bool) -> None:
        pass
