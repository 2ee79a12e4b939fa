"""SAEFState: errors, momentum, kept x and the step; the one state module of all integrations.

A step is a transaction. The backward *prepares* it: every bucket's message is computed from the state
and exchanged, and the state does not change. The optimizer step *commits* it: m, e, the server error
and x move together, in `_commit` and nowhere else. An exception, a backward without an optimizer step
or a second backward (accumulation without no_sync) therefore leaves nothing half done.

The path of one gradient:

    forward          e averaged; parameters <- x_half = x - s e          Alg. 1, 6-9     _begin
    backward         message = C(D), D = e + eta u; exchange; replies    Alg. 1, 10-23   exchange, _send
    optimizer step   m, e, server error; x <- x - R; parameters <- x     Alg. 1, 18-25   _commit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.futures import Future
from torch.profiler import record_function

from . import kernels
from .agreement import compare
from .attachment import Attachment
from .averaging import Averaging
from .codec import message_bytes
from .compressors import DENSE, Compressor, ScaledSign
from .exchange import TorchTransport, choose, two_way
from .feedback import Hyper
from .kernels import FLOAT, GROUP, LR
from .optimizer import check_optimizer, read_hyper
from .plan import Plan, partition, plan_bucket
from .prepared import Bucket, Prepared, gradients, group_sizes
from .settings import Server, Settings
from .weights import create


class SAEFState:
    """Step-ahead error feedback (SAEF Algorithm 1) for one model and one optimizer on one rank.

    Create it after the model is on its device and wrapped, before the first forward, on all ranks of
    the process group (a collective call). The optimizer stays the source of lr, momentum, nesterov,
    weight_decay and maximize, read at every step; its own arithmetic is replaced.

    Between steps the parameters are x, the same bits on every rank. From the first training forward
    of a step (module in training mode, gradients enabled) to the optimizer step they are x - s e_k.
    A forward without gradients or in evaluation mode, and state_dict(), put x back first. A parameter
    that no rank used in a step counts as one with a zero gradient.

    Args:
        model: the module whose parameters are trained (a DistributedDataParallel, usually).
        optimizer: torch.optim.SGD over the model's trainable parameters, any number of groups.
        compressor: C on the way to the servers.
        server_compressor: C on the way back: "same" (double-way), None (single-way), or a compressor.
        step_ahead: s in x_half = x - s e_k: 1 is SAEF, 0 plain error feedback (EF), between is SA-PEF.
        averaging: error averaging protocol, e.g. AllReduce(20) or Rotating(20); None: p = infinity.
        weight_decay_mode: "coupled": in the gradient, at x_half, as torch.optim.SGD does it; "outer":
            dist-EF appendix A: uncompressed, at x, with a momentum of its own.
        exchange: "replicated", "sharded", or "auto" (the cost rule `saef.exchange.choose`).
        max_grad_norm: clip this worker's whole gradient to this L2 norm before momentum. It needs all
            gradients first, so the exchange no longer overlaps with the backward.
        process_group: the ranks that train together; None: the model's (DDP), or the default group.

    Attributes:
        steps: steps committed so far, t.
        weights: parameters and kept x. e, m, e_server: flat errors and momentum, of `weights.dtype`;
            e_server holds the blocks that this rank serves.
        strategy: "replicated" or "sharded".

    Raises:
        TypeError, ValueError: on anything that cannot be honoured, saying what to do instead.
    """

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
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.settings = settings = Settings(
            compressor, server_compressor, step_ahead, averaging, weight_decay_mode, exchange, max_grad_norm
        )
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self._read_hyper()
        self.weights = weights = create(model, optimizer, settings.step_ahead)
        self._kernels = kernels.select(weights.device)
        self.transport = TorchTransport(process_group or getattr(model, "process_group", None), weights.device)
        self._compare_ranks()

        workers, server = self.transport.size, settings.server
        up, down = (message_bytes(c, weights.numels, weights.dtype) for c in (compressor, server))
        self.strategy = choose(workers, up, down) if exchange == "auto" else exchange
        # Replicated: every rank serves all blocks, as if it were server 0 of 1.
        self._servers, self._rank = (workers, self.transport.rank) if self.strategy == "sharded" else (1, 0)
        self._blocks = partition(weights.numels, weights.groups, compressor, server, self._servers, self._rank)

        self._none = weights.flat.new_empty(0)
        self.e = torch.zeros_like(weights.flat) if settings.feedback else self._none
        self._errors = weights.cut(self.e) if settings.feedback else []
        self.m = self.m_decay = self._none  # allocated when a group first has momentum
        dense = all(server.for_tensor(n).kind == DENSE for n in weights.numels)  # then D - C(D) = 0
        self.e_server = self._none if dense or not settings.feedback else weights.flat.new_zeros(self._blocks.served)

        self.steps = 0
        self._averaged_for = -1  # the step whose averaging has been done
        self._at_half = False
        self._plans: dict[tuple[tuple[int, int], ...], Plan] = {}
        self._index = {id(p): i for i, p in enumerate(weights.parameters)}
        self._sizes = group_sizes(optimizer)
        self._hidden: list[Tensor | None] = []
        self._prepared = Prepared()
        self._attachment = Attachment(model, optimizer, self._begin, self.restore, self._before_step, self._after_step)

    def metrics(self) -> dict[str, float]:
        """Counters since creation, flat, ready for a logger. Bytes are what this rank sent.

        steps; bytes_sent and its parts bytes_sent_{phase1,phase2,averaging,settings}; bytes_per_step
        (without settings); bytes_per_step_uncompressed (a ring all-reduce of the gradients, as plain
        DDP does); compression_ratio between these two.
        """
        sent, size = self.transport.sent_bytes, self.transport.size
        parts = {f"bytes_sent_{p}": float(sent[p]) for p in ("phase1", "phase2", "averaging", "settings")}
        full = 2 * (size - 1) / size * sum(p.numel() * p.element_size() for p in self.weights.parameters)
        per_step = (sum(sent.values()) - sent["settings"]) / self.steps if self.steps else 0.0
        return {
            "steps": float(self.steps),
            "bytes_sent": float(sum(sent.values())),
            **parts,
            "bytes_per_step": per_step,
            "bytes_per_step_uncompressed": full,
            "compression_ratio": full / per_step if per_step else 1.0,
        }

    def restore(self) -> None:
        """Put x into the parameters if they are at x_half. The next training forward steps ahead again."""
        if self._at_half:
            self._at_half = False
            self.weights.restore()

    # -- forward: step ahead ------------------------------------------------------------------

    def detach(self) -> None:
        """Put x into the parameters and let go of model and optimizer, which are then as without saef."""
        self.restore()
        self._attachment.remove()

    def _begin(self) -> None:
        """Average the errors, once a step, and step ahead. Micro-batches stay at x_half."""
        if self._at_half:
            return
        self.weights.begin(self._errors, self._average())
        self.weights.watch()
        self._at_half = True

    def _average(self) -> slice:
        """Average the errors if this step has not done so (Alg. 1, lines 6-8); the coordinates that changed."""
        averaging, changed = self.settings.averaging, [slice(0, 0)]
        if averaging is None or self._averaged_for == self.steps:
            return changed[0]

        def average() -> Tensor:
            changed[0] = averaging.average(self.steps, self.e, self.transport)
            return self.e

        self.transport.submit(average, self.transport.future()).wait()
        self._averaged_for = self.steps
        return changed[0]

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
            raise TypeError("sparse gradients cannot be compressed here; use dense ones (Embedding(sparse=False))")
        indices, plan = self._plan(parameters, views, flat)
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
        bucket = Bucket(indices, plan, flat, self._empty(plan), self.transport.future(), [], [])
        self._prepared.buckets.append(bucket)
        if self.settings.max_grad_norm is None:
            self._send([bucket])
        elif last:
            self._send(self._prepared.buckets)
        if last:  # queued twice, to come after DDP's own callback, which moves the buckets into p.grad
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._remember))
        return bucket.done

    @torch.no_grad()
    def _send(self, buckets: Sequence[Bucket]) -> None:
        if not self._prepared.rule.hyper.numel():
            self._prepared.rule = self._make_rule()
        for bucket in buckets:
            with self.transport.stream(), record_function("saef: compress"):
                g = bucket.gradient.to(self.weights.dtype)
                v, _ = self.weights.x_half()
                self._kernels.compress(
                    bucket.plan.send.table, self._prepared.rule, g, self.m, self.e, v, bucket.message
                )
            self.transport.submit(partial(self._exchange, bucket), bucket.done, bucket.gradient)

    @torch.no_grad()
    def _exchange(self, bucket: Bucket) -> Tensor:
        """Both phases; runs in the transport's order."""
        plan = bucket.plan

        def serve(messages: Tensor) -> Tensor:
            reply = messages.new_zeros(plan.reply.message_bytes)
            if reply.numel():  # a server may have no block in a small bucket
                self._kernels.serve(plan.receive.table, plan.reply.table, messages, self.e_server, reply)
            return reply

        sharded = self.strategy == "sharded"
        with record_function("saef: exchange"):
            received, replies = two_way(
                self.transport, sharded, bucket.message, plan.send_bytes, plan.reply_bytes, serve
            )
        bucket.received.append(received)
        bucket.replies.append(replies)
        return bucket.gradient

    def _make_rule(self) -> kernels.Rule:
        """This step's rule: the optimizer's settings and the clipping coefficient."""
        if self.m.numel() == 0 and any(h.momentum for h in self._prepared.hyper):
            self.m = torch.zeros_like(self.weights.flat)
        clip = 1.0
        if self.settings.max_grad_norm is not None:
            norms = [torch.linalg.vector_norm(b.gradient, dtype=self.weights.dtype) for b in self._prepared.buckets]
            norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            # A norm that is not finite must show, not turn the gradient into zeros.
            clip = min(1.0, self.settings.max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
        rows = [[float(v) for v in h._replace(factor=h.factor * clip)] for h in self._prepared.hyper]
        hyper = torch.tensor(rows, dtype=self.weights.dtype, device=self.weights.device)
        return kernels.Rule(hyper, self.weights.x_half()[1], self.settings.feedback)

    def _empty(self, plan: Plan) -> Tensor:
        return torch.zeros(plan.send.message_bytes, dtype=torch.uint8, device=self.weights.device)

    def _plan(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor
    ) -> tuple[tuple[int, ...], Plan]:
        where = []
        for p, view in zip(parameters, views, strict=True):
            i = self._index.get(id(p))
            if i is None:
                raise RuntimeError(
                    f"a gradient of shape {tuple(p.shape)} belongs to no parameter of this state: the model's "
                    "trainable parameters changed. Wrap the model and create SAEFState again after changing them"
                )
            where.append((i, int(view.storage_offset() - flat.storage_offset())))
        key = tuple(where)
        if key not in self._plans:  # DDP rebuilds its buckets after the first step
            plan = plan_bucket(self._blocks, where, self._servers, self._rank, self.weights.dtype.itemsize)
            self._plans[key] = plan.to(self.weights.device)
        return tuple(i for i, _ in where), self._plans[key]

    # -- optimizer step: commit ---------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Commit, and hide the gradients, so that the optimizer's own arithmetic finds nothing to do."""
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise TypeError("step(closure) would evaluate the model inside the step; call backward(), then step()")
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError("torch.amp.GradScaler is not supported yet; use bfloat16 autocast, which needs none")
        parameters = self.weights.parameters
        if self._at_half and (changed := self.weights.changed()):
            raise RuntimeError(
                f"parameters {changed[:5]} were changed between the forward and optimizer.step(), while they were "
                "x_half, which the step replaces: change them after step()"
            )
        if self._prepared.buckets:
            if self.transport.failure is not None:
                raise RuntimeError(
                    f"the exchange with the other ranks failed, and this rank's state is as before step {self.steps}. "
                    f"Restart the job. The cause: {self.transport.failure}"
                ) from self.transport.failure
            self._prepared.check(self.weights, self._read_hyper(), self._sizes, group_sizes(optimizer))
            with record_function("saef: commit"):
                self._commit(self._prepared.rule)
        elif any(p.grad is not None for p in parameters):
            raise RuntimeError(
                "optimizer.step() found gradients that were never exchanged: register the hook "
                "(model.register_comm_hook(state, saef_hook)) and run the last micro-batch outside no_sync(). "
                "DDP with static_graph=True skips its hooks after no_sync(): leave one of the two out"
            )
        self.restore()
        self._hidden = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p, g in zip(self.weights.parameters, self._hidden, strict=True):
            p.grad = g
        self._hidden = []

    @torch.no_grad()
    def _commit(self, rule: kernels.Rule) -> None:
        """The one place where a step takes effect."""
        kernels.check(self.weights.device)
        if self.settings.outer:
            self._decay()
        for b in self._prepared.buckets:
            plan, replies = b.plan, b.replies[0]
            if self.e_server.numel() and plan.reply.message_bytes:
                own = replies.narrow(0, sum(plan.reply_bytes[: self._rank]), plan.reply_bytes[self._rank])
                self._kernels.settle(plan.receive.table, plan.reply.table, b.received[0], self.e_server, own)
            if not self.settings.feedback:  # the vote is +-1; x moves by eta
                table = plan.apply.table
                replies.view(self.e.dtype)[table[:, FLOAT]] = rule.hyper[table[:, GROUP], LR]
            g = b.gradient.to(self.e.dtype)
            self.weights.commit(plan, rule, g, self.m, self.e, b.message, replies)
        self.steps += 1
        self._prepared = Prepared()
        self._at_half = False
        self.weights.restore()

    def _decay(self) -> None:
        """x <- x - eta lambda x, or with the rule's momentum on lambda x (dist-EF appendix A)."""
        groups, hyper = self.optimizer.param_groups, self._prepared.hyper
        momentum = self.settings.feedback and any(
            h.momentum and g["weight_decay"] for h, g in zip(hyper, groups, strict=True)
        )
        if momentum and self.m_decay.numel() == 0:
            self.m_decay = torch.zeros_like(self.weights.flat)
        for x, at, i in zip(self.weights.parts(), self.weights.offsets, self.weights.groups, strict=True):
            u = x * groups[i]["weight_decay"]
            if self.m_decay.numel():
                m = self.m_decay[at : at + x.numel()]
                m.mul_(hyper[i].momentum).add_(u)  # m~ = mu m~ + lambda x
                u = u + m * hyper[i].momentum if hyper[i].nesterov else m
            x.sub_(u * hyper[i].lr)

    def _remember(self) -> None:
        self._prepared.gradients = gradients(self.weights.parameters)

    def _read_hyper(self) -> list[Hyper]:
        return read_hyper(self.optimizer, outer=self.settings.outer, signum=not self.settings.feedback)

    def _compare_ranks(self) -> None:
        w, s = self.weights, self.settings
        fields = {field: getattr(s, field) for field in s.__dataclass_fields__}
        parameters = [(n, tuple(p.shape), p.dtype) for n, p in zip(w.names, w.parameters, strict=True)]
        fields.update(saef=version("saef"), parameters=parameters, groups=w.groups)
        compare(fields, self.transport, w.device)
