"""Rounds: several steps of the user's own optimizer between two exchanges, in the difference form.

    forward          the first of a round: X <- x_half = x - s e; parameters <- X       Engine.begin
    backward         nothing is sent; p.grad are this rank's own (and averaged before a step, if a node is the worker)
    its end          parameters <- x
    optimizer step   parameters <- X; the optimizer's own step; parameters <- x         before_step, after_step
                     after the H-th: u = x_half - X is exchanged, e and x move; or the round is dropped, on all ranks

A round is a transaction as a step is: until its end x, the errors and the counters are as before it, and the
optimizer's own state can be put back, of which a copy is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.futures import Future

from ..comm.transport import Transport
from .algorithm import minus_sent
from .buckets import gather_gradients, group
from .form import Closure, Form, Host
from .kept import STEP
from .optimizer_state import Saved, capture, changed, copied, entries_of, mean_of_ranks, restore, settings_of
from .prepared import Prepared
from .settings import Settings
from .weights import held


@final
class Rounds(Form):
    """The difference form: D = e + u, u = x_half - X.

    Args:
        settings: `local_steps`, `max_grad_norm` (before each local step), `on_bad_round`.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        super().__init__(host)
        self._settings = settings
        self.done = self._nested = 0
        self._own: set[str] = set()  # what an optimizer keeps in its groups: a schedule-free one the sum of its weights
        self._settings_before: list[dict[str, Any]] = []
        self._before: Saved | None = None  # the optimizer's state at the round's beginning
        self._flight: Flight | None = None
        self._landing = False  # whether it is being settled
        self._loaded: Saved | None = None  # what `load` got, until the next round begins
        self._spoilt: Tensor | None = None  # a number: NaN if a gradient of this round was not finite, else 0

    # -- forward ------------------------------------------------------------------------------

    def settings(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        own = {*self._own, STEP}
        every = enumerate(settings_of(optimizer))  # each by itself: one that it sets on some ranks only is its own
        return {f"optimizer, group {i}, {k}": v for i, s in every for k, v in s.items() if k not in own}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """X is x_half: a round begins, or goes on where a checkpoint had it."""
        weights, loaded = self._host.weights, self._loaded
        if loaded is not None:  # again: since then, optimizer.load_state_dict() may have got another rank's
            restore(optimizer, weights, loaded["optimizer"], self._own)
        self._spoilt = None
        self._before = capture(optimizer, weights) if self._settings.on_bad_round == "restore" else None
        self._loaded = None
        in_part = self._flight is not None
        if self._flight is not None:
            self._start_shifted(self._flight)
        if loaded is not None and loaded["done"]:
            self.done, self._before = loaded["done"], loaded.get("before")
            if loaded.get("spoilt"):
                self._spoilt = weights.flat.new_full((), math.nan)
            with torch.no_grad():
                for i, name in enumerate(weights.names):
                    weights.local_of(i).copy_(loaded["X"][name])
            in_part = True
        if in_part:
            weights.local_written()

    def go_on(self) -> bool:
        """Raises RuntimeError if x was changed since the last local step; a GPU is not waited for, but in the last."""
        if self.done:
            self._check_x(wait=False)
        return self.done > 0

    def _check_x(self, wait: bool) -> None:
        """Raise RuntimeError if x is not what x_half was made from, or was not. wait: for a GPU to tell."""
        if not self._host.weights.untouched(wait):
            raise RuntimeError(
                f"parameters were changed within a round of local steps, after {self.done} of "
                f"{self._settings.local_steps}: the change would be lost, since the round goes on from weights of its "
                "own. Change them (load, clamp, average) between two rounds: after the step() that makes "
                "state.local_step 0, before the next forward (so SAM is for SGD, Adam and AdamW with local_steps=1). "
                "To drop the round, load a checkpoint or call state.reset_errors()"
            )

    # -- backward: nothing is sent ------------------------------------------------------------

    def exchange(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool
    ) -> Future[Tensor]:
        done: Future[Tensor] = Future()
        done.set_result(flat)
        return done

    def gradient_ready(self, parameter: int) -> None:
        pass

    def exchange_gradients(self) -> None:
        pass

    def exchange_late(self) -> None:
        pass

    def expect_change(self, parameter: int) -> None:
        pass

    def backward_ended(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    # -- the optimizer's step -----------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, closure: Closure) -> Closure:
        """The parameters are X, and the gradients what the optimizer may take.

        Raises:
            RuntimeError: if they were computed elsewhere.
        """
        if self.stepping:  # torch runs the hooks anew where a step calls that of the class it derives from
            self._nested += 1
            return closure
        begun = self._host.sending.begun
        if not begun and closure is None and self._has_gradients():
            raise RuntimeError(NOT_AHEAD)
        if closure is not None and self._host.node.size > 1:
            raise RuntimeError(
                "with mesh all ranks of a node take the same steps, and a closure would tell each rank's optimizer "
                "another loss: call backward(), then step() without it. For LBFGS leave mesh out"
            )
        if begun and self.done + 1 == self._settings.local_steps:
            self._check_x(wait=True)
        if begun and closure is None:  # else gradients of further micro-batches may come in it
            self._prepare(optimizer)
        self.stepping, self._settings_before = True, settings_of(optimizer)
        if begun:
            self._host.weights.enter()
        elif closure is None:
            self._hide()
        return None if closure is None else self._at_local(closure)

    def _prepare(self, optimizer: Any) -> None:
        """Do a GradScaler's work, which leaves it to optimizers that claim to; average within the node; and clip."""
        found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found is not None:
            optimizer.grad_scale = optimizer.found_inf = None
            if any(self._host.node.gather(float(found))):  # this worker alone takes one local step less
                self._hide()
                return
            if scale is not None:
                torch._foreach_div_(self._gradients(), float(scale))
        self._look_at_gradients()
        self._average()
        self._clip()

    @torch.no_grad()
    def _look_at_gradients(self) -> None:
        """An optimizer may take a NaN or an infinity in, and step on with finite weights: Lion does, by its signs."""
        values = [g._values() if g.is_sparse else g for g in map(held, self._gradients())]
        if found := [g for g in values if g.numel()]:
            largest = torch.stack([n.to(self._host.weights.dtype) for n in torch._foreach_norm(found, math.inf)])
            spoilt = (0.0 * largest).sum()
            self._spoilt = spoilt if self._spoilt is None else self._spoilt + spoilt

    @torch.no_grad()
    def _average(self) -> None:
        """p.grad <- the mean over the node's ranks, whose X so stay alike."""
        if self._host.node.size == 1:
            return
        for bucket in group(self._host.weights.parameters):
            parameters = [self._host.weights.parameters[i] for i in bucket]
            flat, views = gather_gradients(parameters)
            self._host.node.average(flat)
            for p, view in zip(parameters, views, strict=True):
                if p.grad is None:
                    p.grad = view.clone()
                else:
                    p.grad.copy_(view)

    def _clip(self) -> None:
        if self._settings.max_grad_norm is not None:
            if any(g.is_sparse for g in self._gradients()):
                raise TypeError(
                    "max_grad_norm cannot clip sparse gradients: use dense ones (Embedding(sparse=False)), or leave it "
                    "out"
                )
            nn.utils.clip_grad_norm_(self._host.weights.parameters, self._settings.max_grad_norm)

    def _at_local(self, closure: Callable[[], Any]) -> Closure:
        """The closure, for an optimizer that calls it as often as it likes, having moved X meanwhile."""

        def call() -> Any:
            self.entered = True
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self.entered = False
            if not self._host.sending.begun:
                raise RuntimeError(NOT_AHEAD)
            self._host.weights.enter()
            self._look_at_gradients()
            self._clip()
            return loss

        return call

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The parameters are x; after the last local step of a round it is exchanged."""
        if self._nested:
            self._nested -= 1
            return
        self._show()
        if self._host.sending.begun:
            self._stepped(optimizer)
        self.stepping = False

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self._own |= changed(self._settings_before, optimizer) - {STEP}  # a closure's forward sets the mark
        elsewhere = self._host.weights.moved()
        self._host.leave()
        if elsewhere:
            raise RuntimeError(
                f"the optimizer put parameters {elsewhere[:5]} elsewhere in memory (p.data = ...) instead of changing "
                "them in place: saef cannot tell how far they moved. Use an optimizer that steps in place"
            )
        self.done += 1
        if self.done < self._settings.local_steps:
            return
        u = torch.empty_like(self._host.weights.flat)
        if self._settings.overlap:
            self._take_off(optimizer, u)
        else:
            self._send(u, lambda i, part: self._difference(i, u, part, None))
            self._host.settle(optimizer)

    @torch.no_grad()
    def _difference(self, i: int, u: Tensor, part: Tensor, shift: Tensor | None) -> None:
        self._host.weights.difference(i, self._host.memory.e, u, part, shift)

    @torch.no_grad()
    def _send(self, u: Tensor, make: Callable[[int, Tensor], None] | None) -> None:
        """u in buckets: while one is on its way, the next is compressed.

        Args:
            make: writes one parameter's part of u; None: it is there.
        """
        weights = self._host.weights
        views = weights.cut(u)
        buckets = group(views)
        for number, bucket in enumerate(buckets):
            mine = sorted(bucket)  # of one dtype, so neighbours in u
            if make is not None:
                for i in mine:
                    make(i, views[i])
            flat = u[weights.offsets[mine[0]] : weights.offsets[mine[-1]] + weights.numels[mine[-1]]]
            if self._spoilt is not None and number == 0:  # then so is what all ranks get
                flat[:1] = torch.where(self._spoilt.isnan(), self._spoilt, flat[:1])
            last = number + 1 == len(buckets)
            self._host.sending.send(mine, [views[i] for i in mine], flat, last)

    # -- overlap: a round's exchange runs while the next round computes -------------------------

    @torch.no_grad()
    def _start_shifted(self, flight: Flight) -> None:
        """X <- x - s e_k - S_k: this worker's part of what is on its way stands for all of it (s = 1: X goes on)."""
        weights, out = self._host.weights, torch.empty_like(self._host.weights.flat)
        for i, (part, shift) in enumerate(zip(weights.cut(out), flight.shift, strict=True)):
            weights.shift_local(i, self._host.memory.e, out, part, shift)

    @torch.no_grad()
    def _take_off(self, optimizer: torch.optim.Optimizer, u: Tensor) -> None:
        """A round has ended: the one before takes effect, and this one's difference is sent."""
        weights, sending, memory = self._host.weights, self._host.sending, self._host.memory
        shifts = [None] * len(weights.parameters) if self._flight is None else self._flight.shift
        for i, (part, shift) in enumerate(zip(weights.cut(u), shifts, strict=True)):
            self._difference(i, u, part, shift)
        before, skipped = self._before, memory.skipped
        if self._flight is not None:
            self._landing = True
            self._host.settle(optimizer)
            self._landing = False
        if memory.skipped == skipped:
            sending.land()
            self._send(u, None)
            e = memory.e.clone()
            self._host.algorithm.owe(sending.prepared)
            self._flight = Flight(weights.cut(minus_sent(sending.prepared.messages, weights)), e, before)
        self.done, self._before = 0, None
        sending.fly()
        weights.restart()

    @property
    def owed(self) -> bool:
        return self._flight is not None

    @torch.no_grad()
    def unsend(self, e: Tensor) -> None:
        if self._flight is not None:
            for part, shift in zip(self._host.weights.cut(e), self._flight.shift, strict=True):
                part.sub_(shift)

    def check(self, prepared: Prepared) -> None:
        pass

    def check_sent(self, prepared: Prepared) -> None:
        pass

    def committed(self) -> None:
        self.done, self._before, self._flight = 0, None, None

    def drop(self, optimizer: torch.optim.Optimizer, restored: bool) -> None:
        """With a round that is on its way goes the one after it, which began where that had ended."""
        before = self._before
        if self._flight is not None and self._landing:
            self._host.memory.e.copy_(self._flight.e)
            before = self._flight.before
        else:
            self.unsend(self._host.memory.e)
        if restored and before is not None:
            restore(optimizer, self._host.weights, before, self._own)
        self._show()
        self._before = self._loaded = self._flight = None
        self._landing = False
        self.done, self.stepping, self.entered, self._nested = 0, False, False, 0
        self._host.weights.restart()

    # -- checkpoints --------------------------------------------------------------------------

    def saved(self, optimizer: torch.optim.Optimizer) -> Saved:
        """{"done", "optimizer": its state now, "own", "entries"}; in a round "X", "before" as at its beginning, and
        "spoilt" if a gradient of it was not finite.

        "entries" says what "optimizer" has, for what comes back without it; as one string, which nothing takes apart.
        """
        weights = self._host.weights
        if self._loaded is not None:  # it has not gone on yet
            again: Saved = copied(self._loaded)
            return again
        if self._flight is not None:  # it is taken back: the errors are as if it had not been sent
            return self._form(0, self._at_beginning(optimizer))
        found = self._form(self.done, capture(optimizer, weights))
        if self.done:
            found["X"] = {name: weights.local_of(i).clone() for i, name in enumerate(weights.names)}
            if self._before is not None:
                found["before"] = copied(self._before)
            if self._spoilt is not None and bool(self._spoilt.isnan()):
                found["spoilt"] = True
        return found

    def consolidated(self, optimizer: torch.optim.Optimizer, transport: Transport) -> Saved:
        """The same as means over the ranks, at the round's beginning, where there is a copy, or now. Collective."""
        return self._form(0, mean_of_ranks(self._at_beginning(optimizer), transport, self._host.weights.device))

    def _form(self, done: int, state: Saved) -> Saved:
        return {"done": done, "optimizer": state, "own": sorted(self._own), "entries": json.dumps(entries_of(state))}

    @property
    def local_step(self) -> int:
        return self.done if self._loaded is None else int(self._loaded["done"])

    def _at_beginning(self, optimizer: torch.optim.Optimizer) -> Saved:
        if self._loaded is not None:
            loaded: Saved = copied(self._loaded.get("before", self._loaded["optimizer"]))
            return loaded
        if self.done and self._before is not None:
            before: Saved = copied(self._before)
            return before
        return capture(optimizer, self._host.weights)

    def load(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        """What `saved` gave; the next forward goes on from there."""
        self._own |= {*saved["own"]}
        restore(optimizer, self._host.weights, saved["optimizer"], self._own)
        self._loaded = copied(saved)


class Flight(NamedTuple):
    """A round that has ended, and whose exchange runs while the next computes.

    Attributes:
        shift: - C(D_k), what this worker has sent, cut like the parameters.
        e: [d] the errors as they were before they took over what was not sent.
        before: the optimizer's state at the round's beginning, if a copy was made.
    """

    shift: Sequence[Tensor]
    e: Tensor
    before: Saved | None


NOT_AHEAD = (
    "optimizer.step() found gradients that were not computed at x_half: run the forward through the wrapped model (the "
    "module that SAEFState was given), with gradients enabled"
)
