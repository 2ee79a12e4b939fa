"""Algorithm 1, lines 10 to 25, for the buckets of one step: `send` prepares, `commit` takes effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from ..comm.exchange import answer, send
from ..wire import kernels
from ..wire.kernels.table import Update, Worker
from .clock import Clock
from .local_rule import LocalRule
from .memory import Context, Memory
from .outer import Nesterov
from .prepared import Bucket, Prepared, changed
from .weights import Weights

Arriving = Callable[[], Tensor]  # waits for what is on its way


@final
class Algorithm:
    """What a step computes; when it may is the engine's.

    Args:
        context, memory: of the state; `memory` changes in `commit` alone.
        rule: how a gradient becomes u.
        clock: counts "compress" and "exchange".
    """

    def __init__(self, context: Context, memory: Memory, rule: LocalRule, clock: Clock) -> None:
        self._weights, self._transport, self._placement = context.weights, context.transport, context.placement
        self._memory, self._rule, self._clock = memory, rule, clock
        self._sharded, self._pipelines = context.placement.strategy == "sharded", context.piece_numel is not None
        self._error_decay = context.settings.error_decay
        self._clips, self._outer, self._node = context.clips, context.settings.outer, context.node
        self._kernels = kernels.select(context.weights.device)

    @torch.no_grad()
    def send(self, prepared: Prepared, buckets: Sequence[Bucket]) -> None:
        """Compress these buckets of a step and have them exchanged; their futures tell when that is done."""
        if self._clips and prepared.update is None:
            for bucket in buckets:
                self._transport.call(partial(self._average, bucket))
            prepared.norms = self._node.gather(prepared.norm(self._weights.dtype))
        update = prepared.update or prepared.fix(self._make_update(prepared))
        for bucket in buckets:
            if bucket.parts:
                self._transport.submit(partial(self._compress_node, bucket, update), bucket.done, bucket.given)
                continue
            with self._transport.stream(), self._clock.span("compress"):
                self._kernels.compress(bucket.plan.send.table, update, self._worker(bucket), bucket.message)
            self._transport.submit(partial(self._exchange, bucket), bucket.done, bucket.given)

    @torch.no_grad()
    def _compress_node(self, bucket: Bucket, update: Update) -> Tensor | None:
        """The node's gradient, its message, and both phases; in the transport's order."""
        if not self._clips:  # else it is there
            self._average(bucket)
        with self._clock.span("compress"):
            self._kernels.compress(bucket.plan.send.table, update, self._worker(bucket), bucket.message)
        return self._exchange(bucket)

    @torch.no_grad()
    def _average(self, bucket: Bucket) -> None:
        """gradient <- mean over the node's ranks, for this place's coordinates. In the transport's order."""
        if bucket.parts:
            every = self._node.for_this_place([torch.cat([*part]) for part in bucket.parts])
            bucket.gradient.copy_(every.to(self._weights.dtype).mean(0))

    @torch.no_grad()
    def check_sent(self, prepared: Prepared, rewritten: Sequence[Bucket]) -> None:
        """Raise RuntimeError unless the gradients as they are now would have made the messages that were sent.

        If they do, the step is Algorithm 1's with these gradients, bit for bit, whatever they were before: the commit
        makes D from them, and C(D) is what travelled.

        Args:
            rewritten: the buckets that were written to since.
        """
        if not rewritten:
            return
        now = self._make_update(prepared)
        if prepared.update is None or not torch.equal(now.hyper, prepared.update.hyper):  # the clipping
            raise changed([self._weights.names[i] for b in rewritten for i in b.parameters])
        for bucket in rewritten:
            with self._transport.stream():
                message = torch.zeros_like(bucket.message)
                self._kernels.compress(bucket.plan.send.table, now, self._worker(bucket), message)
                if not torch.equal(message, bucket.message):
                    raise changed([self._weights.names[i] for i in bucket.parameters])

    def _make_update(self, prepared: Prepared) -> Update:
        """The rule for this step: the optimizer's settings, the loss scale and the clipping coefficient."""
        self._rule.grow(self._memory, prepared.hyper)
        norm = 0.0
        if self._clips:  # of the whole gradient, with this rank's part as it is now
            prepared.norms[self._node.place] = prepared.norm(self._weights.dtype)
            norm = self._node.norm(prepared.norms)
        return self._rule.update(prepared.hyper, norm, self._weights)

    def _worker(self, bucket: Bucket) -> Worker:
        """What the bucket's D is made from."""
        g = bucket.gradient.to(self._weights.dtype)
        return Worker(g, self._memory.m, self._memory.e, self._weights.x_half()[0])

    @torch.no_grad()
    def _exchange(self, bucket: Bucket) -> Tensor | None:
        """Phase 1, in the transport's order."""
        with self._clock.span("exchange"):
            arrive = send(self._transport, self._sharded, bucket.message, bucket.plan.send_bytes)
        return self._go_on(self._serve, bucket, arrive)

    @torch.no_grad()
    def _serve(self, bucket: Bucket, arrive: Arriving) -> Tensor | None:
        """What this server makes of the workers' messages, and phase 2."""
        plan = bucket.plan
        with self._clock.span("exchange"):
            received = arrive()
            reply = received.new_zeros(plan.reply.message_bytes)
            if reply.numel():  # a server may have no block in a small bucket
                self._kernels.serve(plan.receive.table, plan.reply.table, received, self._memory.e_server, reply)
            way = self._transport.replies if self._pipelines else self._transport
            arrive = answer(way, self._sharded, reply, plan.reply_bytes)
        bucket.received.append(received)
        return self._go_on(self._receive, bucket, arrive)

    @torch.no_grad()
    def _receive(self, bucket: Bucket, arrive: Arriving) -> Tensor:
        """What all servers have answered."""
        with self._clock.span("exchange"):
            replies = arrive()
            if self._sharded:
                self._kernels.inspect(bucket.plan.apply.table, replies)
        bucket.replies.append(replies)
        return bucket.given

    def _go_on(
        self, stage: Callable[[Bucket, Arriving], Tensor | None], bucket: Bucket, arrive: Arriving
    ) -> Tensor | None:
        """The next stage of a bucket: now, or beside what is sent next where the transport can do both."""
        if not self._pipelines:
            return stage(bucket, arrive)
        self._transport.replies.submit(partial(stage, bucket, arrive), bucket.done, bucket.given)
        return None

    @torch.no_grad()
    def owe(self, prepared: Prepared) -> None:
        """e <- D - C(D) before the replies are there: what `commit` with `owed` then leaves out."""
        if (update := prepared.update) is None:
            raise RuntimeError("nothing was sent that could be owed")
        self._transport.catch_up()
        for b in prepared.buckets:
            self._kernels.commit(b.plan.send.table, update, self._worker(b), b.message)

    @torch.no_grad()
    def commit(self, prepared: Prepared, owed: bool = False) -> None:
        """The one place where a step takes effect: m, e, the server error and x move together.

        Args:
            owed: e has been moved before, by `owe`.
        """
        if (update := prepared.update) is None:
            raise RuntimeError("nothing was sent that could be committed")
        memory, at = self._memory, self._placement.rank
        kernels.check(self._weights.device)
        self._rule.decay(prepared.hyper, self._weights, memory)
        rates = self._rule.rates(update)
        if self._outer is not None:
            rates = self._step_outer(self._outer, prepared, rates)
        for b in prepared.buckets:
            plan, replies = b.plan, b.replies[0]
            if memory.e_server.numel() and plan.reply.message_bytes:
                own = replies.narrow(0, sum(plan.reply_bytes[:at]), plan.reply_bytes[at])
                self._kernels.settle(plan.receive.table, plan.reply.table, b.received[0], memory.e_server, own)
            if owed:
                self._weights.apply(plan, rates, replies)
            else:
                self._weights.commit(plan, update, rates, self._worker(b), b.message, replies)
        memory.commit(self._error_decay)

    def _step_outer(self, outer: Nesterov, prepared: Prepared, rates: Tensor) -> Tensor:
        """b <- mu b + R, x <- x - eta mu b; what R is multiplied with, that x moves by it too (`Nesterov`)."""
        b = self._memory.outer.mul_(outer.momentum)
        for bucket in prepared.buckets:
            self._kernels.subtract(bucket.plan.apply.table, -rates, bucket.replies[0], b)
        for x, part in zip(self._weights.parts(), b.split(self._weights.numels), strict=True):
            x.sub_(part * (outer.lr * outer.momentum))
        return rates * outer.lr


@torch.no_grad()
def minus_sent(messages: Sequence[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    """[d] - C(D_k), what this worker has sent, with the sign that it has in x. messages: with their tables."""
    minus = torch.zeros_like(weights.flat)
    once = minus.new_ones(1 + max(weights.groups))
    for table, message in messages:
        kernels.select(minus.device).subtract(table, once, message, minus)
    return minus
