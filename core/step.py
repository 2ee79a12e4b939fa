"""One worker's steps of Algorithm 1, from the gradient to x.

A step is a transaction. The backward *prepares* it: every bucket's message is computed from the state
and exchanged, and the state does not change. The optimizer step *commits* it: m, e, the server error
and x move together, in `_commit` and nowhere else. Or it *skips* it, on all ranks, if a number is not
finite. An exception, a backward without an optimizer step or a second backward (accumulation without
no_sync) therefore leaves nothing half done.

The path of one gradient:

    forward          e averaged; parameters <- x_half = x - s e          Alg. 1, 6-9     _begin
    backward         message = C(D), D = e + eta u; exchange; replies    Alg. 1, 10-23   exchange, _send
    optimizer step   m, e, server error; x <- x - R; parameters <- x     Alg. 1, 18-25   _commit
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future

from . import agreement, kernels
from .attachment import Attachment
from .averaging import Averaging, ErrorAveraging
from .buckets import SPARSE, Buckets, gather
from .codec import message_bytes
from .compressors import DENSE, Compressor, ScaledSign
from .decay import OuterDecay
from .exchange import Transport, choose, two_way
from .feedback import Hyper
from .kernels import FLOAT, GROUP, LR
from .loss_scale import LossScale
from .optimizer import check_optimizer, read_hyper
from .plan import Plans, partition
from .prepared import Bucket, Prepared, gradients, group_sizes
from .settings import Server, Settings
from .telemetry import Clock
from .transport import TorchTransport
from .weights import create

logger = logging.getLogger("saef")


class Step:
    """What `saef.SAEFState` does in a step; arguments and attributes as there."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compressor: Compressor = ScaledSign(),  # noqa: B008 - frozen
        server_compressor: Server = "same",
        step_ahead: float = 1.0,
        averaging: Averaging | None = None,
        weight_decay_mode: str = "coupled",
        exchange: str = "auto",
        max_grad_norm: float | None = None,
        max_consecutive_skips: int | None = 10,
        audit_every: int | None = None,
        grad_scaler: GradScaler | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.settings = settings = Settings(
            compressor,
            server_compressor,
            step_ahead,
            averaging,
            weight_decay_mode,
            exchange,
            max_grad_norm,
            max_consecutive_skips,
            audit_every,
        )
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.loss_scale = LossScale(grad_scaler)
        hyper = self.read_optimizer()
        self.weights = weights = create(model, optimizer, settings.step_ahead)
        self.loss_scale.check_dtypes(p.dtype for p in weights.parameters)
        self.kernels = kernels.select(weights.device)
        if process_group is not None and transport is not None:
            raise ValueError("give a process_group or a transport, not both")
        group = process_group or getattr(model, "process_group", None)
        self.transport = transport or TorchTransport(group, weights.device)
        agreement.compare_settings(self)
        self._averaging = ErrorAveraging(settings.averaging, self.transport)
        self._place_servers()
        self._allocate(hyper)

        self.steps = self.skipped = self.skipped_in_a_row = 0
        self.counted_from = 0  # the step since when bytes are counted
        self.clock = Clock()
        self.committed: list[tuple[Tensor, Tensor]] = []  # tables and messages of the last step, until the next
        self.compared_at: int | None = None  # the step when the ranks were last compared
        self._at_half = False
        self._sizes = group_sizes(optimizer)
        self._buckets = Buckets(weights.parameters, self._exchange_bucket)
        self._hidden: list[Tensor | None] = []
        self._prepared = Prepared()
        self._attachment = Attachment(model, optimizer, self._begin, self.restore, self.before_step, self.after_step)

    def _place_servers(self) -> None:
        """Choose the strategy, and which rank serves which blocks."""
        weights, settings, workers = self.weights, self.settings, self.transport.size
        worker, server = settings.compressor, settings.server
        up, down = (message_bytes(c, weights.numels, weights.dtype) for c in (worker, server))
        self.strategy = choose(workers, up, down) if settings.exchange == "auto" else settings.exchange
        # Replicated: every rank serves all blocks, as if it were server 0 of 1.
        servers, self.server_rank = (workers, self.transport.rank) if self.strategy == "sharded" else (1, 0)
        self.blocks = partition(weights.numels, weights.groups, worker, server, servers)
        self._plans = Plans(self.blocks, servers, self.server_rank, weights.parameters, weights.dtype)

    def _allocate(self, hyper: Sequence[Hyper]) -> None:
        """Errors and momentum, where the method has them."""
        weights, settings = self.weights, self.settings
        none = weights.flat.new_empty(0)
        self.e = torch.zeros_like(weights.flat) if settings.feedback else none
        self._errors = weights.cut(self.e) if settings.feedback else []
        dense = all(settings.server.for_tensor(n).kind == DENSE for n in weights.numels)  # then D - C(D) = 0
        self.serves_with_error = settings.feedback and not dense
        served = self.blocks.served[self.server_rank] if self.serves_with_error else 0
        self.e_server = weights.flat.new_zeros(served)
        self.m, self.decay = none, OuterDecay(weights)
        self._prepare_momentum(hyper)

    # -- forward: step ahead ------------------------------------------------------------------

    def _begin(self) -> None:
        """Average the errors, once a step, and step ahead. Micro-batches stay at x_half."""
        if self._at_half:
            return
        self.weights.absorb()
        agreement.audit(self)
        self.committed = []
        self.weights.begin(self._errors, self._averaging.make(self.steps, self.e))
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

    def errors_before_step(self) -> Tensor:
        """A copy of e_k as it was before the step that is under way averaged it."""
        return self._averaging.before(self.e)

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
        if self._prepared.contains(indices):
            self._prepared = Prepared()  # a second backward before the step; its gradients contain the first's
        if not self._prepared.buckets:
            self._prepared.hyper = self._read_hyper()
        message = torch.zeros(plan.send.message_bytes, dtype=torch.uint8, device=self.weights.device)
        bucket = Bucket(indices, plan, flat, views, message, self.transport.future(), [], [])
        self._prepared.buckets.append(bucket)
        if self.settings.max_grad_norm is None:
            self._send([bucket])
        elif last:
            self._send(self._prepared.buckets)
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
        flat, views = gather(parameters)
        self.exchange(parameters, views, flat, last)

    def expect_change(self, parameter: int) -> None:
        """After a backward: p.grad of this parameter will be set once more, to what it is."""
        found = self._prepared.gradients[parameter]
        if found is not None:
            self._prepared.gradients[parameter] = found[0], found[1] + 1

    def backward_ended(self) -> None:
        """After the last exchange, when p.grad are what was sent: from here on no change of them can count."""
        self._prepared.gradients = gradients(self.weights.parameters)
        self.loss_scale.claim(self.optimizer)

    @torch.no_grad()
    def _send(self, buckets: Sequence[Bucket]) -> None:
        if not self._prepared.rule.hyper.numel():
            self._prepared.rule = self._make_rule()
        for bucket in buckets:
            with self.transport.stream(), self.clock.span("compress"):
                g = bucket.gradient.to(self.weights.dtype)
                v, _ = self.weights.x_half()
                self.kernels.compress(bucket.plan.send.table, self._prepared.rule, g, self.m, self.e, v, bucket.message)
            self.transport.submit(partial(self._exchange, bucket), bucket.done, bucket.gradient)

    @torch.no_grad()
    def _exchange(self, bucket: Bucket) -> Tensor:
        """Both phases; runs in the transport's order."""
        plan, sharded = bucket.plan, self.strategy == "sharded"

        def serve(messages: Tensor) -> Tensor:
            reply = messages.new_zeros(plan.reply.message_bytes)
            if reply.numel():  # a server may have no block in a small bucket
                self.kernels.serve(plan.receive.table, plan.reply.table, messages, self.e_server, reply)
            return reply

        with self.clock.span("exchange"):
            received, replies = two_way(
                self.transport, sharded, bucket.message, plan.send_bytes, plan.reply_bytes, serve
            )
            if sharded:
                self.kernels.inspect(plan.apply.table, replies)
        bucket.received.append(received)
        bucket.replies.append(replies)
        return bucket.gradient

    def _make_rule(self) -> kernels.Rule:
        """This step's rule: the optimizer's settings, the loss scale and the clipping coefficient."""
        self._prepare_momentum(self._prepared.hyper)
        clip, dtype = 1.0, self.weights.dtype
        if self.settings.max_grad_norm is not None:
            norm = self._prepared.norm(dtype) * self.loss_scale.inverse()
            # A norm that is not finite must show, not turn the gradient into zeros.
            clip = min(1.0, self.settings.max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
        rows = [[float(v) for v in h._replace(factor=h.factor * clip)] for h in self._prepared.hyper]
        hyper = torch.tensor(rows, dtype=dtype, device=self.weights.device)
        return kernels.Rule(hyper, self.weights.x_half()[1], self.settings.feedback)

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
            self._prepared.check(self.weights, self._read_hyper(), self._sizes, group_sizes(optimizer))
            bad = self._prepared.not_finite(self.weights)
            self.loss_scale.decide(bool(bad))
            if bad:
                self._skip(bad)
            else:
                with self.clock.span("apply"):
                    self._commit(self._prepared.rule)
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

    @torch.no_grad()
    def _commit(self, rule: kernels.Rule) -> None:
        """The one place where a step takes effect."""
        kernels.check(self.weights.device)
        if self.settings.outer:
            self.decay.apply(self.optimizer.param_groups, self._prepared.hyper)
        for b in self._prepared.buckets:
            plan, replies = b.plan, b.replies[0]
            if self.e_server.numel() and plan.reply.message_bytes:
                at = self.server_rank
                own = replies.narrow(0, sum(plan.reply_bytes[:at]), plan.reply_bytes[at])
                self.kernels.settle(plan.receive.table, plan.reply.table, b.received[0], self.e_server, own)
            if not self.settings.feedback:  # the vote is +-1; x moves by eta
                table = plan.apply.table
                replies.view(self.e.dtype)[table[:, FLOAT]] = rule.hyper[table[:, GROUP], LR]
            g = b.gradient.to(self.e.dtype)
            self.weights.commit(plan, rule, g, self.m, self.e, b.message, replies)
        self.steps += 1
        self.skipped_in_a_row = 0
        self.committed = [(b.plan.send.table, b.message) for b in self._prepared.buckets]
        self._prepared = Prepared()
        self._averaging.commit()
        self._at_half = False
        self.weights.restore()

    def _skip(self, names: list[str]) -> None:
        """The step has not happened: only these counters know of it. All ranks come here together."""
        self.abandon()
        self.skipped += 1
        self.skipped_in_a_row += 1
        what = (
            f"a gradient on some rank is NaN or infinite, or overflowed, among those of {names[:5]}: all ranks skip "
            f"step {self.steps}, with their state as before it"
        )
        limit = self.settings.max_consecutive_skips
        if limit is not None and self.skipped_in_a_row > limit:
            raise FloatingPointError(
                f"{what}. {self.skipped_in_a_row} in a row, more than max_consecutive_skips={limit}: lower lr, clip "
                "with max_grad_norm, or look for the bad input"
            )
        if self.transport.rank == 0:
            logger.warning("%s (%d in a row)", what, self.skipped_in_a_row)

    def abandon(self) -> None:
        """Drop the step that is under way: the parameters are x, and the errors as before it."""
        self._prepared.wait()
        self._prepared = Prepared()
        self._buckets.restart()
        self.restore()
        self._averaging.undo(self.e)
        self.committed = []

    # -- shared -------------------------------------------------------------------------------

    def read_optimizer(self) -> list[Hyper]:
        """The optimizer's settings now, one `Hyper` a group. Raises ValueError on what cannot be honoured."""
        return read_hyper(self.optimizer, outer=self.settings.outer, signum=not self.settings.feedback)

    def _read_hyper(self) -> list[Hyper]:
        """The optimizer's settings for this step, gradients divided by the loss scale."""
        inverse = self.loss_scale.inverse()
        return [h._replace(factor=h.factor * inverse) for h in self.read_optimizer()]

    def _prepare_momentum(self, hyper: Sequence[Hyper]) -> None:
        """Make room for m and m~ when a group first has momentum."""
        if self.m.numel() == 0 and any(h.momentum for h in hyper):
            self.m = torch.zeros_like(self.weights.flat)
        if self.settings.outer and self.settings.feedback:
            self.decay.prepare(self.optimizer.param_groups, hyper)
