"""One worker's steps of Algorithm 1, from the gradient to x.

A step is a transaction. The backward *prepares* it: every bucket's message is computed from the state
and exchanged, and the state does not change. The optimizer step *commits* it: m, e, the server error
and x move together, in `Algorithm.commit` and nowhere else. Or it *skips* it, on all ranks, if a number is not
finite. An exception, a backward without an optimizer step or a second backward (accumulation without
no_sync) therefore leaves nothing half done. What is computed is in `saef.step.algorithm`; here is when.

The path of one gradient:

    forward          e averaged; parameters <- x_half = x - s e          Alg. 1, 6-9     begin
    backward         message = C(D), D = e + eta u; exchange; replies    Alg. 1, 10-23   exchange, Algorithm.send
    its end          parameters <- x                                                     leave
    optimizer step   m, e, server error; x <- x - R                      Alg. 1, 18-25   before_step, Algorithm.commit
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..comm.node import Node
from ..comm.transport import Transport
from ..wire import kernels
from .algorithm import Algorithm
from .attachment import Attachment, leave_the_last
from .audit import Audit, compare_settings
from .clock import Clock
from .error_averaging import ErrorAveraging
from .following import carry
from .form import Form, GradientForm
from .fsdp import groups_in
from .joining import Joining
from .kept import Kept
from .local_rule import LocalRule
from .loss_scale import LossScale
from .memory import Context, Memory
from .optimizer_state import Saved
from .parts import Parts
from .prepared import Prepared
from .replicate import give_back, take_out
from .rounds import Rounds
from .sending import Sending, Since
from .server_ahead import ServerAhead
from .settings import Settings
from .unwrap import is_made_of, unwrap_model, unwrap_optimizer
from .watch import Watch, check_moment, check_optimizer
from .weights import Weights

logger = logging.getLogger("saef")


@final
class Engine:
    """The steps of a `saef.SAEFState`, whose arguments these are.

    What hooks and adapters may call, in the order of a step:

        exchange, exchange_late                               in the backward, with buckets of gradients
        gradient_ready, exchange_gradients                    in the backward, without
        forward_begins                                        in a forward, if the state was made within it
        before_backward                                       before one that is within the wrapped model's forward
        backward_ended, expect_change, gradient_norm          after it
        before_step, after_step                               around the optimizer's own step
        adopt, recheck                                        when an adapter has another optimizer, or loads weights
        attached, under_way, transport, weights, left_out     to look at

    The rest is for SAEFState, and for the hooks of `saef.step.attachment`.

    Attributes:
        context: weights, settings, placement of the servers, transport, node. memory: all that evolves besides x.
        weights, transport, node: of the context. process_group: over which the transport goes, None for the default.
        rule: the optimizer's. loss_scale: the GradScaler's part in a step.
        clock: seconds by part of the work.
        committed: tables and messages of the last step, until the next begins.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        grad_scaler: GradScaler | None,
        mesh: DeviceMesh | None,
        process_group: torch.distributed.ProcessGroup | None,
        transport: Transport | Node | None,
    ) -> None:
        given, model, optimizer = optimizer, unwrap_model(model), unwrap_optimizer(optimizer)
        check_optimizer(optimizer)
        leave_the_last(model)
        self.loss_scale = LossScale(grad_scaler)
        self.rule = LocalRule(optimizer, settings, self.loss_scale)
        self.rule.read(step=0)
        self.form: Form = GradientForm(self) if self.rule.rule.of_gradients else Rounds(self, settings)
        self._joining = Joining(mesh, process_group, transport)
        self._joining.check(model)
        self._optimizer, self._settings = optimizer, settings
        self.weights = weights = self._joining.weights_of(model, optimizer, settings.step_ahead)
        self.loss_scale.check_dtypes(p.dtype for p in weights.parameters)  # before any rank waits for another
        kernels.prepare(weights.device, weights.dtype)
        self.process_group = self._joining.group(model)
        self.node = self._joining.node(model, weights.device, self.rule.rule.of_gradients)
        self.transport = self.node.between
        self.rule.workers = self.transport.size
        self._averaging = ErrorAveraging(settings.averaging, self.transport)
        self._v_averaging = ErrorAveraging(settings.v_averaging, self.transport)
        self.clock = Clock()
        self._agree(weights)
        self._kept: Kept
        self._lay_out(model, weights)
        self._audit = Audit(settings.audit_every)
        self.committed: list[tuple[Tensor, Tensor]] = []
        self._committing = False
        self._fresh = False  # whether there was a forward of the wrapped model since the optimizer's last step
        self._shared_at: int | None = None  # the step of a `share`
        self._reducing = False  # whether a backward is under way that hands over reduced gradients
        self._groups = groups_in(model)  # of parameters, FSDP's
        self._attachment = Attachment(model, optimizer, given, weights.parameters if self._groups else (), self)
        if self.rule.rule.of_gradients:  # else what others do to the parameters then is a part of the local step
            self._attachment.come_first_after()
        take_out(self._groups)
        self._kept.save_with(optimizer)

    def _agree(self, weights: Weights, what: str = "SAEFState()") -> None:
        """Raise on all ranks if they train other parameters, or in another way, or are not all here. Collective."""
        self.loss_scale.check_dtypes(p.dtype for p in weights.parameters)
        compare_settings(self._settings, weights, self.node, self.loss_scale.used, what)

    def _lay_out(self, model: nn.Module, weights: Weights, old: Context | None = None, since: Since = Since()) -> None:  # noqa: B008
        """All that depends on which parameters are trained, their groups, and how they lie in memory. Collective.

        Args:
            old: of what was trained before, whose memory goes over.
        """
        self._watch = Watch(model, weights, self._optimizer)
        self.weights = weights
        weights.local = not self.rule.rule.of_gradients
        if isinstance(weights, Parts):
            weights.node = self.node
        self.context = Context.create(weights, self._settings, self.rule.rule, self.transport, self.node)
        self.memory: Memory = Memory.create(self.context) if old is None else carry(self.memory, old, self.context)
        if rate := self.context.server_ahead:
            weights.server = ServerAhead(self.context.placement, self.memory.e_server, rate)
        self.rule.grow(self.memory, self.rule.read(self.memory.steps))
        self._kept = Kept(self.context, self.memory)
        self.algorithm = Algorithm(self.context, self.memory, self.rule, self.clock)
        self.sending = Sending(self.context, self.memory, self.rule, self.loss_scale, self.algorithm, since)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer with the same groups in the place of the one it was created with."""
        self._optimizer = optimizer
        self.rule.adopt(optimizer)
        self._kept.save_with(optimizer)

    def recheck(self) -> None:
        """The next forward looks whether all ranks have the same weights: some were loaded."""
        self._audit.again()

    def detach(self) -> None:
        """The parameters are x; model and optimizer are as without saef."""
        if self.attached:
            self.leave()
            alike = self.transport.size == 1 or self._shared_at == self.memory.steps
            self._kept.release(self._optimizer, keep=alike and self.weights.joint)
            self._attachment.remove()
            if self._attachment.newest:
                give_back(self._groups)

    def share(self) -> None:
        """What the rule keeps <- its mean over the ranks. Collective, between steps."""
        for vector in self.memory.m:
            self.transport.call(partial(self.transport.mean, vector, "checkpoint"))
        self._shared_at = self.memory.steps

    def own_state(self, consolidated: bool = False) -> Saved | None:
        """What an optimizer that makes its own steps keeps, and where in a round it is (`Rounds.saved`); else None.

        Args:
            consolidated: as means over the ranks. Collective.
        """
        if consolidated:
            return self.form.consolidated(self._optimizer, self.transport)
        return self.form.saved(self._optimizer)

    def loaded(self, own: Saved | None) -> None:
        """Memory and weights are a checkpoint's, which has `own_state` too where there is one."""
        self._shared_at = None
        self._kept.loaded(self._optimizer)
        if own is not None:
            self.form.load(self._optimizer, own)
        self.recheck()

    @property
    def local_step(self) -> int:
        """Local steps of the round so far."""
        return self.form.local_step

    def reset_errors(self) -> None:
        """Go on from the weights and the optimizer's state as they are, with nothing owed. Drops a step under way."""
        self.abandon(restored=False)
        self._shared_at = None
        self.memory.owe_nothing()
        self._kept.adopt(self._optimizer)
        self.weights.renew()
        self.recheck()

    def snapshot(self) -> Memory:
        """What evolves as it was before the step under way, e a copy. The parameters are x."""
        self._check_whole()
        self.leave()
        self._watch.check_kinds(self.weights.look())
        self.weights.absorb(looked=True)
        before = replace(self.memory, e=self._averaging.before(self.memory.e))
        self.form.unsend(before.e)
        if self._settings.v_averaging is not None:
            before.m = self.memory.m.clone()
            before.m[self.rule.rule.second] = self._v_averaging.before(self._v)
        return before

    @property
    def _v(self) -> Tensor:
        """[d] the rule's second moment; empty if it has none."""
        second = self.rule.rule.second
        return self.memory.m[second] if second is not None else self.memory.e[:0]

    # -- forward: step ahead ------------------------------------------------------------------

    def forward_begins(self) -> None:
        """Within a forward of the model that began before the state was made: torch does not call new hooks there."""
        self._attachment.before_forward(self._watch.model, ())

    def begin(self) -> int | None:
        """Before a training forward: average the errors, once a step, and step ahead.

        Returns:
            The number of this x_half; None if nothing of the model is trained just now: another is, through it.
        """
        if self._watch.all_frozen():
            self.leave()
            return None
        self._fresh = True
        if self.weights.ahead or not self._attachment.newest:
            return self.weights.number
        check_moment(self.weights.device)
        self.weights.rest()
        if self._reducing:  # a backward that has failed
            self._reducing = False
            self.sending.restart()
        if not self.form.entered:
            self._check_whole()
            self.form.forward_again()
        if changes := self._watch.changes(self._optimizer, self.weights.look()):
            self._follow(changes)
        weights, memory = self.weights, self.memory
        if self.form.go_on():
            weights.enter()
            return weights.number
        weights.absorb(looked=not changes)
        averaged = slice(0, 0)
        if not self.sending.begun:
            if self._audit.new:
                self._compare()
            self._kept.follow(self._optimizer)
            self.committed = []
            averaged = self._averaging.make(memory.steps, memory.e)
            self._v_averaging.make(memory.steps, self._v)
            if self._settings.error_decay != 1.0:
                averaged = slice(0, memory.e.numel())  # all have changed since the commit made x_half
        weights.step_ahead(memory.e, averaged)
        if not self.sending.begun:
            self.form.begin(self._optimizer)
        self.sending.begun = True
        self._attachment.come_last()
        weights.enter(absorbed=True)
        return weights.number

    def _follow(self, changes: str) -> None:
        """Parameters were frozen, unfrozen, added or laid out anew since the last step. Collective: on every rank."""
        if self.under_way:
            raise RuntimeError(
                f"within a step, that is after a forward and before the step() of its backward: {changes}. Change what "
                "is trained after step(), before the next forward"
            )
        if not self.weights.joint and self._watch.relaid:
            raise RuntimeError(
                f"{changes}: with mesh each rank of a node has a part of every parameter, cut where it lies in memory. "
                "Lay the model out (memory_format) before SAEFState is created"
            )
        old, steps, model = self.context, self.memory.steps, self._watch.model
        weights = self._joining.weights_of(model, self._optimizer, self._settings.step_ahead)
        old.weights.absorb()
        weights.take_over(old.weights)
        self._agree(weights, "the trainable parameters changed")
        self._kept.follow(self._optimizer)
        self._kept.let_go(self._optimizer)
        self._lay_out(model, weights, old, self.sending.since.then(old.weights, weights, self._watch.relaid))
        self._kept.take(self._optimizer)
        self._kept.save_with(self._optimizer)
        self.recheck()
        if self.node.everyone.rank == 0:
            logger.info("from step %d on: %s", steps, changes)

    def enter(self, number: int) -> None:
        """Before the backward of a forward at x_half `number`: it reads the parameters again."""
        if number != self.weights.number:
            raise RuntimeError(
                "a backward through a forward of an earlier step, or of before a change of the parameters: they were "
                "changed since, in place, and the x_half of that forward is gone. Run the forward again, and detach "
                "what is carried from one step to the next"
            )
        self.weights.enter()

    def before_backward(self, loss: Tensor) -> None:
        """Within the wrapped model's forward, before the backward of a loss: no hook on the outputs sees that.

        Raises:
            RuntimeError: if the optimizer has stepped since that forward began: there is no x_half any more.
        """
        if not self._fresh:
            raise RuntimeError(
                "a backward after the optimizer's step, within the same forward of the wrapped model: each step ahead "
                "lasts from a forward of the wrapped model to one step. Make one step in each (with Lightning in each "
                "training_step), and give the rest of the work to the next"
            )
        self._attachment.watch(loss)

    def leave(self) -> None:
        """The parameters are x. Raises RuntimeError if they were written to while they were x_half."""
        if self.weights.ahead:
            self._attachment.watch_kept()  # its backward may be still to come
        self._leave()

    def _leave(self) -> None:
        if self.form.entered or not self._attachment.newest:
            return
        if written := self.weights.leave():
            raise _written(written)

    def reduced(self, parameter: Tensor) -> None:
        """Within a backward of a sharded model: p.grad of this parameter is final, its node's."""
        self._reducing = True
        if (number := self.sending.number_of(parameter)) is not None:
            self.gradient_ready(number)

    def over(self) -> None:
        """A backward has ended."""
        if self._reducing:
            self._reducing = False
            self.weights.check_reduced()
            self.exchange_gradients()
        self._leave()

    def zeroing(self) -> None:
        """Before gradients are zeroed: by the user, or within its step by the optimizer."""
        if not self.form.stepping:
            self.leave()

    @property
    def left_out(self) -> Sequence[Tensor]:
        """Parameters that were trained and are no longer."""
        return self.sending.since.left_out

    @property
    def has_hook(self) -> bool:
        """Whether a framework exchanges gradients at the end of a backward: by DDP's hook, or in DeepSpeed's engine."""
        model = self._watch.model
        return isinstance(model, DistributedDataParallel) or hasattr(model, "allreduce_gradients")

    @property
    def under_way(self) -> bool:
        """Whether a step has begun: there was a forward at x_half, or gradients were exchanged."""
        return self.sending.under_way

    @property
    def ahead(self) -> bool:
        """Whether the parameters are x_half."""
        return self.weights.ahead

    @property
    def number(self) -> int:
        """Of the present x_half, or of the last."""
        return self.weights.number

    @property
    def attached(self) -> bool:
        """False after `detach`."""
        return self._attachment.attached

    # -- backward: compress and exchange ------------------------------------------------------

    def exchange(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool
    ) -> Future[Tensor]:
        """Compress one bucket's gradient and exchange it. Every rank calls it for the same buckets in order.

        Args:
            parameters: the bucket's parameters.
            views: their gradients, views of `flat`.
            flat: this worker's gradient of the bucket, 1-D, not divided by the number of ranks. It must stay
                as it is until the optimizer step.
            last: whether this is the last bucket of the backward.

        Returns:
            A future of `flat`, complete when the servers' replies are there.
        """
        return self.form.exchange(parameters, views, flat, last)

    def gradient_ready(self, parameter: int) -> None:
        """Within a backward, for frameworks without buckets: p.grad of `weights.parameters[parameter]` is final.

        It is exchanged as soon as the others of its bucket, and the buckets before, are ready too. The ranks may
        call it in different orders. `exchange_gradients` must follow after the backward.
        """
        self.form.gradient_ready(parameter)

    def exchange_gradients(self) -> None:
        """Exchange every p.grad that was not before, after a backward. For frameworks without buckets; on every rank.

        The same steps as with DDP, bit for bit. p.grad stay this worker's own and become views of the buckets.
        """
        self.form.exchange_gradients()
        self.backward_ended()

    def exchange_late(self) -> None:
        """At the end of a backward with buckets, before they are waited for: exchange what they do not have."""
        self.form.exchange_late()

    def expect_change(self, parameter: int) -> None:
        """After a backward: p.grad of this parameter will be set once more, to what it is."""
        self.form.expect_change(parameter)

    def backward_ended(self) -> None:
        """After the last exchange, when p.grad are what was sent: from here on no change of them can count."""
        self.form.backward_ended(self._optimizer)

    def gradient_norm(self) -> float:
        """L2 norm of this worker's own gradient, unscaled, before any clipping: after the exchange, before the step.

        Of a node's, all its ranks must ask. With local steps it is this rank's, of what its node will average.

        Raises:
            RuntimeError: if nothing was exchanged since the last step.
        """
        inverse = self.loss_scale.inverse()
        if not self.rule.rule.of_gradients:
            own = [p.grad for p in self.weights.parameters if p.grad is not None]
            return float(nn.utils.get_total_norm(own)) * inverse
        if not self.sending.prepared.buckets:
            raise RuntimeError(
                "the norm of a gradient that was not exchanged: ask for it, or clip, between the backward of a step's "
                "last micro-batch and its step() (with Accelerate: if accelerator.sync_gradients)"
            )
        if self.node.size > 1:  # what is averaged within it may be on its way
            self.sending.prepared.wait()
        return self.node.norm(self.node.gather(self.sending.prepared.norm(self.weights.dtype))) * inverse

    # -- optimizer step: commit, or skip ------------------------------------------------------

    def before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the optimizer's own arithmetic, which finds what the form leaves it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # step(loss), of optimizers that take one
            self.form.before_step(optimizer, None)
            return None
        given = self.form.before_step(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": given}
        return (args[0], given, *args[2:]), kwargs

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Commit what was sent, or skip it: on all ranks alike, by what they all have got."""
        prepared = self.sending.prepared
        prepared.wait()
        bad = self.node.together(lambda: self._not_finite(prepared, optimizer))
        self.loss_scale.decide(bool(bad))
        if bad:
            self._skip(bad)
        else:
            if not self._audit.new and self._audit.due(self.memory.steps):  # here all ranks are, whatever else they do
                self._compare()
            self.form.check_sent(prepared)
            with self.clock.span("apply"):
                self._commit()

    def _compare(self) -> None:
        self._audit.run(self.memory.steps, self.form.settings(self._optimizer), self.weights, self.node)

    def skip_bad(self) -> bool:
        """Skip what was exchanged, as ranks do that call step(), if a number in it is not finite. Whether it was so."""
        prepared = self.sending.prepared
        bad = self.node.together(lambda: prepared.without(prepared.finite(self.weights), self.weights))
        if bad:
            self._skip(bad)
        return bool(bad)

    def _not_finite(self, prepared: Prepared, optimizer: torch.optim.Optimizer) -> list[str]:
        """Parameters that a step could not move: none, if it can be committed as far as this rank knows."""
        cause = self.transport.failure
        if cause is not None:
            raise self.transport.lost(cause) from cause
        self._watch.check_groups(optimizer)
        self.form.check(prepared)
        finite = prepared.finite(self.weights)
        if not bool(torch.cat([~finite, self.weights.changed_unseen]).any()):  # one question, since a GPU is waited for
            return []
        if written := self.weights.written_unseen():
            raise _written(written)
        return prepared.without(finite, self.weights)

    def before_other_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RuntimeError if an optimizer that is not this state's is about to move its parameters."""
        ours = self.form.stepping or is_made_of(optimizer, self._optimizer)  # or one that ours is made of
        if ours or not self._attachment.newest:
            return
        if self._watch.is_moved_by(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() would move parameters of a SAEFState that was made with another "
                "optimizer: the exchanged gradients would never be applied. Create SAEFState with the optimizer that "
                "steps (after a resume, and after a framework has made its own), or detach() the state: after a fit, "
                "a callback's is callback.state"
            )

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After it."""
        self._fresh = False
        self.form.after_step(optimizer)

    def _commit(self) -> None:
        if self.rule.reads_x_half(self.sending.prepared.hyper):
            self.weights.follow(self.memory.e)
        else:
            self.weights.absorb()
        self._committing = True  # until the end: an interrupt may come between any two lines
        owed = self.form.owed  # e is of another step than the messages
        self.algorithm.commit(self.sending.prepared, owed)
        self.committed = [] if owed else self.sending.prepared.messages
        self.sending.committed()
        self._averaging.commit()
        self._v_averaging.commit()
        self.weights.committed()
        self._kept.committed(self._optimizer)
        self.form.committed()
        self._committing = False

    def _check_whole(self) -> None:
        """Raise RuntimeError if a commit, or an optimizer's own step, has not come to its end."""
        if self._committing or self.form.stepping:
            raise RuntimeError(
                "the last optimizer.step() was interrupted while it changed x, errors and momentum: they are of two "
                "steps now, and other ranks may be elsewhere. Load a checkpoint on all ranks (load_state_dict, "
                "load_checkpoint), or restart"
            )

    def _skip(self, names: list[str]) -> None:
        """The step has not happened: only these counters know of it. All ranks come here together."""
        self.abandon()
        self.memory.skip()
        in_a_row = self.memory.skipped_in_a_row
        what = (
            f"a gradient on some rank is NaN or infinite, or overflowed, among those of {names[:5]}: all ranks skip "
            f"step {self.memory.steps}, with their state as before it"
        )
        limit = self._settings.max_consecutive_skips
        if limit is not None and in_a_row > limit:
            raise FloatingPointError(
                f"{what}. {in_a_row} in a row, more than max_consecutive_skips={limit}: lower lr, clip "
                "with max_grad_norm, or look for the bad input"
            )
        if self.node.everyone.rank == 0:
            logger.warning("%s (%d in a row)", what, in_a_row)

    def abandon(self, restored: bool = True) -> None:
        """Drop the step that is under way: the parameters are x, and the errors as before it.

        Args:
            restored: so is the state of an optimizer that makes its own steps.
        """
        self.sending.drop()
        self._committing = False
        self.form.drop(self._optimizer, restored)
        self.leave()
        self._averaging.undo(self.memory.e)
        self._v_averaging.undo(self._v)
        self.committed = []


def _written(names: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"parameters {[*names[:5]]} were changed while they were x_half, between a training forward and the end of its "
        "backward. They are x again, without that change: make it before the forward, after the backward, or after "
        "step()"
    )
