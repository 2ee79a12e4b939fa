"""SAEFState: errors, momentum, kept x and the step; the one state module of all integrations.

What happens in a step is in `saef.step`; here is what users call between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from . import checkpoint, telemetry
from .comm.exchange import Strategy
from .comm.node import Node
from .comm.transport import Transport
from .protocols.averaging import Averaging
from .step.arguments import BadRound, Exchange, ServerCompressor, ServerStepAhead, WeightDecayMode, check_keywords
from .step.engine import Engine, logger
from .step.memory import all_server_errors
from .step.outer import Nesterov
from .step.settings import Settings
from .step.weights import Weights
from .wire.compressors import Compressor, ScaledSign


@final
class SAEFState:
    """Step-ahead error feedback (SAEF Algorithm 1) for one model and one optimizer on one rank.

    Create it after the model is on its device and wrapped, before the first forward, on all ranks of
    the process group (a collective call). SGD, AdamW and Adam stay the source of lr, momentum, nesterov, betas,
    eps, weight_decay and maximize, read at every step; their own arithmetic is replaced. Other optimizers, and all
    with local steps, step by themselves.

    Between steps the parameters are x, the same bits on every rank. From the first training forward
    of a step (module in training mode, gradients enabled) to the optimizer step they are x - s e_k, or
    x - s (e_k + e).
    A forward without gradients or in evaluation mode, and state_dict(), put x back first. A parameter
    that no rank used in a step counts as one with a zero gradient.

    A step in which some rank's gradient has a NaN or an infinity, or overflows, is skipped on all ranks:
    x, e, m and the server error stay as they were before its forward.

    Args:
        model: the module whose parameters are trained (a DistributedDataParallel, usually).
        optimizer: any that changes parameters in place, over the model's trainable parameters, any number of groups.
        compressor: C on the way to the servers.
        server_compressor: C on the way back: "same" (double-way), None (single-way), or a compressor.
        step_ahead: s in x_half = x - s e_k: 1 is SAEF, 0 plain error feedback (EF), between is SA-PEF.
        averaging: of the local errors, a protocol (`saef.protocols`) that preserves their mean, e.g.
            AllReduce(20), Rotating(20) or Ring(); None: p = infinity.
        weight_decay_mode: of SGD. "coupled": in the gradient, at x_half, as torch.optim.SGD does it; "outer":
            dist-EF appendix A: uncompressed, at x, with a momentum of its own. AdamW decays at x in any case,
            Adam in the gradient.
        exchange: "replicated", "sharded", or "auto" (the cost rule `saef.comm.exchange.choose`).
        max_grad_norm: clip this worker's whole gradient to this L2 norm before momentum. It needs all
            gradients first, so the exchange no longer overlaps with the backward.
        max_consecutive_skips: raise FloatingPointError on all ranks when more steps than this were
            skipped in a row; 0: at the first; None: never.
        audit_every: compare a checksum of x, and the optimizer's settings, across the ranks every so many
            steps; None: only at the first step, and at the first after a checkpoint was loaded.
        noise_correction: of AdamW and Adam: v estimates the second moment of the mean gradient (`saef.rules.adamw`);
            False: of this worker's own, which is up to K times larger.
        server_step_ahead: full step ahead, x_half = x - s (e_k + e), by the server's error too
            (`saef.step.server_ahead`). "auto": with AdamW or Adam and a sign compressor, among at most 16 ranks if
            sharded.
        error_decay: beta; all errors are multiplied by it after each step, so that x~ moves by
            (1 - beta) (e + mean_k e_k) more.
        v_averaging: of AdamW's and Adam's v_k, a protocol as for `averaging`: for ranks whose data differ, of which one
            alone does not see how large the mean gradient is.
        local_steps: H, steps of the optimizer between two exchanges. Every rank takes its own, from x_half on; then
            how far that moved is compressed, exchanged and averaged (`saef.rules.difference`). 1: SGD, AdamW and Adam
            are computed within saef, in the backward; any other optimizer, and H > 1, steps by itself.
        outer: saef.Nesterov(lr, momentum): an outer optimizer on what comes back (DiLoCo); None: x <- x - R.
        on_bad_round: what becomes of the state of an optimizer that steps by itself when a round is skipped:
            "restore": as before the round, of which a copy is kept; "keep": as it is.
        overlap: the exchange of a round runs while the next one computes, and takes effect at that one's end. x lags a
            round behind; call flush() at the end of training.
        grad_scaler: the torch.amp.GradScaler that scales the loss, for float16. saef divides by the scale
            before clipping and momentum; call scaler.step(optimizer) and scaler.update() as ever.
        mesh: a worker is a node: [nodes, ranks a node], `saef.node_mesh(device)` or another DeviceMesh of two axes; for
            a DistributedDataParallel over all ranks, or a model that FSDP2 has sharded, or replicated, over the inner
            axis (docs/nodes.md). None: a worker is a rank.
        process_group: the ranks that train together; None: the model's (DDP, replicate), or the default group.
        transport: what carries the bytes, a `saef.comm.transport.Transport`, or a `saef.comm.node.Node` of two; None:
            torch.distributed.

    Attributes:
        steps: exchanges committed so far, t: steps, or rounds of `local_steps` steps. skipped, skipped_in_a_row: those
            skipped, in all and just now. local_step: steps of the optimizer in the round so far; 0 between rounds.
        weights: parameters and kept x. e, m, e_server: flat errors and what the rule keeps (momentum; AdamW's m, then
            v), of `weights.dtype`; e_server holds the blocks that this rank serves. With `mesh` all are of this rank's
            part of every parameter, of about d / S coordinates.
        settings: what was chosen, checked. strategy: "replicated" or "sharded".
        engine: what communication hooks and adapters of frameworks call (`saef.step.engine.Engine`).

    Raises:
        TypeError, ValueError: on anything that cannot be honoured, saying what to do instead.
    """

    @check_keywords
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compressor: Compressor = ScaledSign(),  # noqa: B008 - frozen
        server_compressor: ServerCompressor = "same",
        step_ahead: float = 1.0,
        averaging: Averaging | None = None,
        weight_decay_mode: WeightDecayMode = "coupled",
        exchange: Exchange = "auto",
        max_grad_norm: float | None = None,
        max_consecutive_skips: int | None = 10,
        audit_every: int | None = 100,
        noise_correction: bool = True,
        server_step_ahead: ServerStepAhead = "auto",
        error_decay: float = 1.0,
        v_averaging: Averaging | None = None,
        local_steps: int = 1,
        outer: Nesterov | None = None,
        on_bad_round: BadRound = "restore",
        overlap: bool = False,
        grad_scaler: GradScaler | None = None,
        mesh: DeviceMesh | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        transport: Transport | Node | None = None,
    ) -> None:
        settings = Settings(
            compressor,
            server_compressor,
            step_ahead,
            averaging,
            weight_decay_mode,
            exchange,
            max_grad_norm,
            max_consecutive_skips,
            audit_every,
            noise_correction,
            server_step_ahead,
            error_decay,
            v_averaging,
            local_steps,
            outer,
            on_bad_round,
            overlap,
        )
        self.engine = Engine(model, optimizer, settings, grad_scaler, mesh, process_group, transport)

    def __reduce__(self) -> tuple[type[Copied], tuple[()]]:
        """In a copy or a pickle of the model, whose hook it belongs to: the copy trains without saef."""
        return Copied, ()

    def __repr__(self) -> str:
        return f"<SAEFState: {telemetry.describe(self.engine.memory, self.engine.context)}>"

    @property
    def weights(self) -> Weights:
        return self.engine.weights

    @property
    def settings(self) -> Settings:
        return self.engine.context.settings

    @property
    def strategy(self) -> Strategy:
        return self.engine.context.placement.strategy

    @property
    def steps(self) -> int:
        return self.engine.memory.steps

    @property
    def skipped(self) -> int:
        return self.engine.memory.skipped

    @property
    def skipped_in_a_row(self) -> int:
        return self.engine.memory.skipped_in_a_row

    @property
    def local_step(self) -> int:
        return self.engine.local_step

    @property
    def e(self) -> Tensor:
        return self.engine.memory.e

    @property
    def m(self) -> Tensor:
        return self.engine.memory.m.view(-1)

    @property
    def e_server(self) -> Tensor:
        return self.engine.memory.e_server

    def detach(self) -> None:
        """Put x into the parameters and let go of model and optimizer, which are then as without saef.

        The optimizer keeps its momentum where all ranks have the same: of a single rank, or right after `flush()`.
        """
        self.engine.detach()

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, as it was before the step under way: copies, plain tensors and numbers.

        Loaded by the same rank of as many ranks with load_state_dict, training goes on bit for bit. The
        layout is in `saef.checkpoint`. Each rank saves its own, or all together to
        torch.distributed.checkpoint, where an SAEFState can stand for its state_dict.
        """
        engine = self.engine
        return checkpoint.rank_form(engine.snapshot(), engine.context, engine.own_state())

    def consolidated_state_dict(self) -> dict[str, Any]:
        """The state of all ranks together, the same on each: errors and momenta as their means, all server errors.

        Loaded with load_state_dict by any number of ranks with any `exchange`; x~ and the mean momentum are
        kept to rounding. A collective call: two dense all-reduces and an all-gather.
        """
        engine = self.engine
        return checkpoint.consolidated_form(engine.snapshot(), engine.context, engine.own_state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of either form: weights, errors, momenta, counters, and torch's random state (rank form).

        Every rank must load one of the same step; the next forward compares. A step under way is dropped. What
        belongs to model (buffers), optimizer and scheduler is theirs to save; load them before or after.

        Raises:
            ValueError: if it is of another model, other compressors, a newer format, another rank or (rank form)
                another number of ranks, naming the difference; nothing has changed then.
        """
        engine = self.engine
        checkpoint.check(state_dict, engine.memory, engine.context)
        engine.abandon()
        engine.loaded(checkpoint.load(state_dict, engine.memory, engine.context))

    def x_tilde(self) -> Tensor:
        """x~ = x - (e + mean_k e_k), flat, of the state's dtype; the same bits on every rank. Collective.

        With `mesh` of this rank's part, [d / S]; the same on ranks of the same place.
        """
        return self._x_tilde("SAEFState.x_tilde()")

    def _x_tilde(self, what: str) -> Tensor:
        memory, context = self.engine.snapshot(), self.engine.context
        mean = memory.e

        def total() -> Tensor:
            if mean.numel():
                context.transport.mean(mean, "checkpoint")
            server = all_server_errors(memory, context, "checkpoint")
            return mean + server if server.numel() else mean

        context.transport.meet(what)
        error = context.transport.call(total)
        return self.weights.x() - error if error.numel() else self.weights.x().clone()

    def flush(self) -> None:
        """x <- x~ = x - (e + mean_k e_k), errors <- 0: nothing is owed any more. Collective; drops a step under way.

        For exporting x~, or going on without saef or with another compressor. What the rule keeps (momentum) becomes
        the ranks' mean, alike on all of them: a `detach()` before the next step leaves it to the optimizer.
        """
        x_tilde = self._x_tilde("SAEFState.flush()")
        self.engine.abandon()
        self.weights.move(x_tilde)
        self.engine.memory.owe_nothing()
        self.engine.share()

    def reset_errors(self) -> None:
        """Errors <- 0; momentum and the step are taken from the optimizer. Drops a step under way. On every rank.

        For going on from model.state_dict() and optimizer.state_dict() alone, which have no errors: what they owed is
        lost, x~ becomes x.
        """
        self.engine.reset_errors()

    def metrics(self) -> dict[str, float]:
        """Counters, flat, ready for a logger. Not collective. Bytes are those to other workers, also with `mesh`.

        steps, steps_skipped, steps_skipped_in_a_row; bytes_sent by this rank and its parts
        bytes_sent_{phase1,phase2,averaging,settings,checkpoint,telemetry}; bytes_per_step (its first three);
        bytes_per_step_uncompressed (a ring all-reduce of the gradients, as plain DDP does); compression_ratio
        between these two; seconds_{compress,exchange,apply} since the state was created (on CUDA: of launching).
        """
        return telemetry.metrics(self.engine.memory, self.engine.context, self.engine.clock)

    def summary(self) -> str:
        """metrics() and the norm of e_k in one line."""
        return telemetry.summary(self.engine.memory, self.engine.context, self.engine.clock)

    def log_summary(self, level: int = logging.INFO) -> None:
        """Log summary() to the logger "saef", on rank 0."""
        if self.engine.node.everyone.rank == 0:
            logger.log(level, self.summary())

    def diagnose(self) -> dict[str, float]:
        """Measure the errors and the compressor, flat, ready for a logger. Collective: a dense all-reduce of e.

        With e_k this rank's error, e' their mean, e the servers' error, s the step ahead:

            error_norm, error_norm_rms       ||e_k||; root of mean_k ||e_k||^2
            mean_error_norm                  ||e'||
            server_error_norm                ||e||
            mismatch_eq9                     ||e + e'||^2, SAEF eq. (9) without L^2 and sigma^2; also ||x - x~||^2
            mismatch_eq10                    mean_k ||e + e' - s e_k||^2, eq. (10) likewise; of what x_half is
            mean_gradient_mismatch           ||e + e' - s e'||: how far from x~ the mean gradient is taken; with full
                                             step ahead ||(1 - s) (e + e')||
            stationary_distance              mean_k ||e_k - e'||^2 (MixML section 6)
            delta/LAYER                      Assumption 4: 1 - ||D - C(D)||^2 / ||D||^2 of each layer's last
                                             message, mean over ranks; between optimizer.step() and the next forward

        Empty for methods without error feedback.
        """
        return telemetry.diagnose(self.engine.memory, self.engine.context, self.engine.committed)


@final
class Copied:
    """Stands for a SAEFState in a copy or a pickle of the DistributedDataParallel that has its hook."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what copying and pickling look for
        raise RuntimeError(
            "this is a copy or a pickle of a SAEFState, which has none of its contents: save and restore them by "
            "state_dict() and load_state_dict(), and create a SAEFState for a copied model that shall train"
        )
