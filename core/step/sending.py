"""Gradients on their way: a backward's become buckets, and these messages that are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.futures import Future

from ..wire.plan import Plans
from .algorithm import Algorithm
from .buckets import SPARSE, Buckets, flatten_gradients, gather_gradients, group
from .local_rule import LocalRule
from .loss_scale import LossScale
from .memory import Context, Memory
from .parts import Parts
from .prepared import Bucket, Prepared
from .weights import Weights

AGAIN = "a second backward before step()"


class Since(NamedTuple):
    """What has changed since DDP made its buckets.

    Attributes:
        left_out: parameters that were trained and are no longer; they may still come with a bucket.
        joined: ids of parameters that came later, for which there is no bucket.
        relaid: whether parameters lie in memory in another way than in the buckets.
    """

    left_out: Sequence[Tensor] = ()
    joined: frozenset[int] = frozenset()
    relaid: bool = False

    def then(self, old: Weights, new: Weights, relaid: bool) -> Since:
        """After a further change, from the parameters of `old` to those of `new`."""
        before, now = {id(p) for p in old.parameters}, {id(p) for p in new.parameters}
        left_out = [p for p in (*self.left_out, *old.parameters) if id(p) not in now]
        return Since(left_out, frozenset((self.joined & now) | (now - before)), self.relaid or relaid)


@final
class Sending:
    """What a backward sends, of the parameters of `context`.

    Args:
        context, memory, rule, loss_scale, algorithm: of the engine, whose docstring has them.
        since: what has changed since the state was made.

    Attributes:
        begun: whether there was a forward at x_half: only then there can be a gradient at it.
        prepared: what the backward under way has sent. since: as given.
    """

    def __init__(
        self,
        context: Context,
        memory: Memory,
        rule: LocalRule,
        loss_scale: LossScale,
        algorithm: Algorithm,
        since: Since,
    ) -> None:
        self._weights, self._transport, self._memory = context.weights, context.transport, memory
        self._rule, self._loss_scale, self._algorithm = rule, loss_scale, algorithm
        self._clips, self._everyone = context.clips, context.node.everyone
        whole = isinstance(self._weights, Parts)
        self._plans = Plans(
            context.placement,
            self._weights.parameters,
            self._weights.dtype,
            since.left_out,
            None if whole else context.piece_numel,
        )
        self._buckets = Buckets(self._weights.parameters, self._send_own)
        self._numbers = {id(p): i for i, p in enumerate(self._weights.parameters)}
        self._joined = {i for i, p in enumerate(self._weights.parameters) if id(p) in since.joined}
        self.since = since
        self.begun, self.prepared = False, Prepared()

    def exchange(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool
    ) -> Future[Tensor]:
        """A framework's bucket: `saef.step.engine.Engine.exchange`."""
        if flat.layout != torch.strided:
            raise TypeError(SPARSE)
        if not self.since.relaid:
            return self._send(parameters, views, flat, last)
        own, views = gather_gradients(parameters)
        return self._send(parameters, views, own, last).then(lambda _: flat)

    def number_of(self, parameter: Tensor) -> int | None:
        """Among those that are trained."""
        return self._numbers.get(id(parameter))

    def restart(self) -> None:
        """A backward that will not end: of the next, all gradients are to become ready anew."""
        self._buckets.restart()

    def ready(self, parameter: int) -> None:
        """p.grad of the parameter of this number is final."""
        self._buckets.ready(parameter)

    def finish(self) -> None:
        """The backward has ended: send every p.grad that was not sent, in buckets of our own."""
        self._buckets.finish()

    def send(self, parameters: Sequence[int], views: Sequence[Tensor], flat: Tensor, last: bool) -> None:
        """Something else in the gradients' place; parameters by number."""
        self._send([self._weights.parameters[i] for i in parameters], views, flat, last)

    def send_late(self) -> None:
        """The same after a backward with a framework's buckets: what these do not have."""
        late = sorted(self._joined - self.prepared.parameters)
        for bucket in group([self._weights.parameters[i] for i in late]):
            self._send_own([late[i] for i in bucket], last=True)

    @property
    def under_way(self) -> bool:
        """Whether a step has begun: there was a forward at x_half, or something was sent."""
        return self.begun or bool(self.prepared.buckets)

    def fly(self) -> None:
        """What was sent stays on its way while the next step begins."""
        self.begun = False

    def land(self) -> None:
        """It has arrived, and the step that is under way is to be sent."""
        self.begun = True

    def committed(self) -> None:
        """A step has taken what was prepared."""
        self.begun, self.prepared = False, Prepared()

    def drop(self) -> None:
        """Wait for what is on its way, and forget it."""
        self.prepared.wait()
        self.committed()
        self._buckets.restart()

    def _send_own(self, bucket: list[int], last: bool) -> None:
        parameters = [self._weights.parameters[i] for i in bucket]
        flat, views = flatten_gradients(parameters)
        self._send(parameters, views, flat, last)

    def _send(self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor, last: bool) -> Future[Tensor]:
        """A bucket of gradients in the order of `weights`. With clipping, all go when the last is there."""
        self._loss_scale.check_dtypes([flat.dtype])
        if not self.begun:
            raise RuntimeError(
                "a gradient arrived that was not computed at x_half: run the forward through the wrapped model, with "
                "gradients enabled. If it is compiled, and another model of its class was before: torch._dynamo.reset()"
            )
        given, given_views, parts = flat, views, list[list[Tensor]]()
        if isinstance(self._weights, Parts) and self._rule.rule.of_gradients:  # differences are of this rank's part
            flat, views, parts = self._weights.apart(given_views)
        given_views = [v for p, v in zip(parameters, given_views, strict=True) if id(p) in self._numbers]
        pieces, views = self._plans.find(parameters, views, flat)
        # Of a second backward before the step the gradients contain the first's, so what is prepared is made anew.
        if not self.prepared.buckets or any(self.prepared.contains(piece.parameters) for piece in pieces):
            if self._rule.rule.of_gradients and not self.prepared.met and self.prepared.exchanged(self._weights):
                self._everyone.meet(AGAIN)  # if others have taken the first one's step, x is another there
            self.prepared = Prepared(hyper=self._rule.read_scaled(self._memory.steps))
        buckets = []
        for indices, among, plan in pieces:
            message = torch.zeros(plan.send.message_bytes, dtype=torch.uint8, device=self._weights.device)
            done = self._transport.future()
            own, own_given = views[among], given_views[among]
            buckets.append(Bucket(indices, plan, flat, own, given, own_given, parts, message, done, [], []))
        if not views:
            done.set_result(given)
            buckets = []
        for bucket in buckets:
            self.prepared.add(bucket)
        if not self._clips:
            self._algorithm.send(self.prepared, buckets)
        elif last and self._joined <= self.prepared.parameters:
            self._algorithm.send(self.prepared, self.prepared.buckets)
        return done  # of the last piece: they are answered in order
