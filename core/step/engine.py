"""One worker's steps of Algorithm 1, from the gradient to x.

A step is a transaction. The backward *prepares* it: every bucket's message is computed from the state
and exchanged, and the state does not change. The optimizer step *commits* it: m, e, the server error
and x move together, in `Algorithm.commit` and nowhere else. Or it *skips* it, on all ranks, if a number is not
finite. An exception, a backward without an optimizer step or a second backward (accumulation without
no_sync) therefore leaves nothing half done. What is computed is in `saef.step.algorithm`; here is when.

The path of one gradient:

    forward          e averaged; parameters <- x_half = x - s e          Alg. 1, 6-9     _begin
    backward         message = C(D), D = e + eta u; exchange; replies    Alg. 1, 10-23   exchange, Algorithm.send
    optimizer step   m, e, server error; x <- x - R; parameters <- x     Alg. 1, 18-25   before_step, Algorithm.commit
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future

from ..comm.exchange import choose
from ..comm.torch_transport import TorchTransport
from ..comm.transport import Transport
from ..wire import kernels
from ..wire.codec import message_bytes
from ..wire.plan import Placement, Plans, place
from .algorithm import Algorithm
from .attachment import Attachment
from .audit import Audit, compare_settings
from .buckets import SPARSE, Buckets, flatten_gradients
from .clock import Clock
from .error_averaging import ErrorAveraging
from .local_rule import LocalRule
from .loss_scale import LossScale
from .memory import Context, Memory
from .prepared import Bucket, Prepared, group_sizes
from .settings import Settings
from .weights import create

logger = logging.getLogger("saef")


@final
class Engine:
    """The steps of a `saef.SAEFState`, whose arguments these are.

    What hooks and adapters may call, in the order of a step:

        exchange, or gradient_ready and exchange_gradients    in the backward
        backward_ended, expect_change                         after it
        before_step, after_step                               around the optimizer's own step
        adopt, recheck                                        when an adapter has another optimizer, or loads weights
        attached, under_way, transport, weights               to look at

    The rest is for SAEFState.

    Attributes:
        context: weights, settings, placement of the servers, transport. memory: all that evolves besides x.
        weights, transport: of the context.
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
        process_group: torch.distributed.ProcessGroup | None,
        transport: Transport | None,
    ) -> None:
        self.loss_scale = LossScale(grad_scaler)
        self.rule = LocalRule(optimizer, settings, self.loss_scale)
        hyper = self.rule.read(step=0)
        self.weights = weights = create(model, optimizer, settings.step_ahead)
        self.loss_scale.check_dtypes(p.dtype for p in weights.parameters)
        if process_group is not None and transport is not None:
            raise ValueError("give a process_group or a transport, not both")
        kernels.prepare(weights.device, weights.dtype)
        group = process_group or getattr(model, "process_group", None)
        self.transport = transport or TorchTransport(group, weights.device)
        compare_settings(settings, weights, self.transport, self.loss_scale.used)
        self._averaging = ErrorAveraging(settings.averaging, self.transport)
        self.context = Context(weights, settings, self._place_servers(settings), self.transport)
        self._plans = Plans(self.context.placement, weights.parameters, weights.dtype)
        self.memory = Memory.create(self.context)
        self.rule.grow(self.memory, hyper)
        self.clock = Clock()
        self._algorithm = Algorithm(self.context, self.memory, self.rule, self.clock)

        self._settings, self._optimizer = settings, optimizer
        self._audit = Audit(settings.audit_every)
        self.committed: list[tuple[Tensor, Tensor]] = []
        self._at_half = False
        self._sizes = group_sizes(optimizer)
        self._buckets = Buckets(weights.parameters, self._exchange_bucket)
        self._hidden: list[Tensor | None] = []
        self._prepared = Prepared()
        self._attachment = Attachment(model, optimizer, self._begin, self.restore, self.before_step, self.after_step)

    def _place_servers(self, settings: Settings) -> Placement:
        """Choose the strategy, and which rank serves which blocks."""
        weights, transport = self.weights, self.transport
        up, down = settings.compressor, settings.reply_compressor
        strategy = settings.exchange
        if strategy == "auto":
            sizes = (message_bytes(c, weights.numels, weights.dtype) for c in (up, down))
            strategy = choose(transport.size, *sizes)
        return place(weights.numels, weights.groups, up, down, strategy, transport.size, transport.rank)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer with the same groups in the place of the one it was created with."""
        self._optimizer = optimizer
        self.rule.adopt(optimizer)

    def recheck(self) -> None:
        """The next forward looks whether all ranks have the same weights: some were loaded."""
        self._audit.again()

    def detach(self) -> None:
        """The parameters are x; model and optimizer are as without saef."""
        self.restore()
        self._attachment.remove()

    def snapshot(self) -> Memory:
        """What evolves as it was before the step under way, e a copy. The parameters are x."""
        self.restore()
        self.weights.absorb()
        return replace(self.memory, e=self._averaging.before(self.memory.e))

    # -- forward: step ahead ------------------------------------------------------------------

    def _begin(self) -> None:
        """Average the errors, once a step, and step ahead. Micro-batches stay at x_half."""
        if self._at_half:
            return
        if self.weights.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a training forward of the wrapped model is being captured into a CUDA graph, which would replay it "
                "without saef's part of the step: capture parts of the model with torch.cuda.make_graphed_callables, "
                'or use torch.compile(mode="reduce-overhead")'
            )
        memory = self.memory
        self.weights.absorb()
        if self._audit.due(memory.steps):
            self._audit.run(
                memory.steps, self.rule.read(memory.steps), self.loss_scale.value(), self.weights, self.transport
            )
        self.committed = []
        self.weights.begin(memory.e, self._averaging.make(memory.steps, memory.e))
        self.weights.watch()
        self._at_half = True

    def restore(self) -> None:
        """Put x into the parameters if they are at x_half. The next training forward steps ahead again."""
        if self._at_half and self._attachment.newest:
            self._at_half = False
            self.weights.restore()

    @property
    def under_way(self) -> bool:
        """Whether a step has begun: there was a forward at x_half, or gradients were exchanged."""
        return self._at_half or bool(self._prepared.buckets)

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
        if flat.layout != torch.strided:
            raise TypeError(SPARSE)
        self.loss_scale.check_dtypes([flat.dtype])
        indices, plan = self._plans.find(parameters, views, flat)
        if not self._at_half:
            raise RuntimeError(
                "a gradient arrived that was not computed at x_half: run the forward through the wrapped model, in "
                "training mode with gradients enabled, and do not evaluate, save or restore between forward and "
                "backward"
            )
        # Of a second backward before the step the gradients contain the first's, so what is prepared is made anew.
        if not self._prepared.buckets or self._prepared.contains(indices):
            self._prepared = Prepared(hyper=self.rule.read_scaled(self.memory.steps))
        message = torch.zeros(plan.send.message_bytes, dtype=torch.uint8, device=self.weights.device)
        bucket = Bucket(indices, plan, flat, views, message, self.transport.future(), [], [])
        self._prepared.buckets.append(bucket)
        if self._settings.max_grad_norm is None:
            self._algorithm.send(self._prepared, [bucket])
        elif last:
            self._algorithm.send(self._prepared, self._prepared.buckets)
        return bucket.done

    def gradient_ready(self, parameter: int) -> None:
        """Within a backward, for frameworks without buckets: p.grad of `weights.parameters[parameter]` is final.

        It is exchanged as soon as the others of its bucket, and the buckets before, are ready too. The ranks may
        call it in different orders. `exchange_gradients` must follow after the backward.
        """
        self._buckets.ready(parameter)

    def exchange_gradients(self) -> None:
        """Exchange every p.grad that was not before, after a backward. For frameworks without buckets; on every rank.

        The same steps as with DDP, bit for bit. p.grad stay this worker's own and become views of the buckets.
        """
        self._buckets.finish()
        self.backward_ended()

    def _exchange_bucket(self, bucket: list[int], last: bool) -> None:
        parameters = [self.weights.parameters[i] for i in bucket]
        flat, views = flatten_gradients(parameters)
        self.exchange(parameters, views, flat, last)

    def expect_change(self, parameter: int) -> None:
        """After a backward: p.grad of this parameter will be set once more, to what it is."""
        self._prepared.expect_change(parameter)

    def backward_ended(self) -> None:
        """After the last exchange, when p.grad are what was sent: from here on no change of them can count."""
        self._prepared.backward_ended(self.weights.parameters)
        self.loss_scale.claim(self._optimizer)

    # -- optimizer step: commit, or skip ------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Commit or skip, and hide the gradients, so that the optimizer's own arithmetic finds nothing to do."""
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise TypeError("step(closure) would evaluate the model inside the step; call backward(), then step()")
        self.loss_scale.check(optimizer)
        parameters = self.weights.parameters
        if self._at_half and (changed := self.weights.changed()):
            raise RuntimeError(
                f"parameters {changed[:5]} were changed between the forward and optimizer.step(), while they were "
                "x_half, which the step replaces: change them after step()"
            )
        if self._prepared.buckets:
            self._prepared.wait()
            cause = self.transport.failure
            if cause is not None:
                raise self.transport.lost(cause) from cause
            self._prepared.check(
                self.weights, self.rule.read_scaled(self.memory.steps), self._sizes, group_sizes(optimizer)
            )
            bad = self._prepared.not_finite(self.weights)
            self.loss_scale.decide(bool(bad))
            if bad:
                self._skip(bad)
            else:
                with self.clock.span("apply"):
                    self._commit()
        elif any(p.grad is not None for p in parameters):
            raise RuntimeError(
                "optimizer.step() found gradients that were never exchanged: run the last micro-batch outside "
                "no_sync() and, with DDP, register the hook (model.register_comm_hook(state, saef_hook)). "
                "DDP with static_graph=True skips its hooks after no_sync(): leave one of the two out"
            )
        self.restore()
        self.loss_scale.hide(optimizer)
        self._hidden = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p, g in zip(self.weights.parameters, self._hidden, strict=True):
            p.grad = g
        self._hidden = []

    def _commit(self) -> None:
        self._algorithm.commit(self._prepared)
        self.committed = [(b.plan.send.table, b.message) for b in self._prepared.buckets]
        self._prepared = Prepared()
        self._averaging.commit()
        self._at_half = False
        self.weights.restore()

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
        if self.transport.rank == 0:
            logger.warning("%s (%d in a row)", what, in_a_row)

    def abandon(self) -> None:
        """Drop the step that is under way: the parameters are x, and the errors as before it."""
        self._prepared.wait()
        self._prepared = Prepared()
        self._buckets.restart()
        self.restore()
        self._averaging.undo(self.memory.e)
        self.committed = []
