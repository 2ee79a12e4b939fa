"""What one wants to see of a state: counters at no cost, and measurements on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .comm.agreement import gather_values
from .comm.exchange import sent_bytes
from .comm.transport import PURPOSES
from .rules import SGD, AdamW, Difference
from .step.algorithm import minus_sent
from .step.clock import Clock
from .step.memory import Context, Memory, all_server_errors
from .wire.codec import message_bytes
from .wire.compressors import DENSE

LOGGED = ("bytes_per_step", "compression_ratio", "steps_skipped")  # of `metrics`, what trainers log unless told


def metrics(memory: Memory, context: Context, clock: Clock) -> dict[str, float]:
    """See `SAEFState.metrics`."""
    sent, size = context.transport.sent_bytes, context.transport.size
    full = 2 * (size - 1) / size * sum(p.numel() * p.element_size() for p in context.weights.held)
    in_steps = sum(sent[p] for p in ("phase1", "phase2", "averaging"))
    steps = (memory.steps - memory.counted_from) * context.settings.local_steps
    per_step = in_steps / steps if steps > 0 else 0.0
    return {
        "steps": float(memory.steps),
        "steps_skipped": float(memory.skipped),
        "steps_skipped_in_a_row": float(memory.skipped_in_a_row),
        "bytes_sent": float(sum(sent[p] for p in PURPOSES)),
        **{f"bytes_sent_{p}": float(sent[p]) for p in PURPOSES},
        "bytes_per_step": per_step,
        "bytes_per_step_uncompressed": full,
        "compression_ratio": full / per_step if per_step else 1.0,
        **{f"seconds_{part}": clock.seconds[part] for part in ("compress", "exchange", "apply")},
    }


def summary(memory: Memory, context: Context, clock: Clock) -> str:
    """See `SAEFState.summary`."""
    m = metrics(memory, context, clock)
    error = f", |e_k| {float(torch.linalg.vector_norm(memory.e)):.3g}" if memory.e.numel() else ""
    took = ", ".join(f"{part} {m[f'seconds_{part}']:.2f} s" for part in ("compress", "exchange", "apply"))
    return (
        f"saef step {memory.steps}: {m['bytes_per_step']:,.0f} bytes/step (1/{m['compression_ratio']:.1f}), "
        f"skipped {memory.skipped}{error}; {took}"
    )


def describe(memory: Memory, context: Context) -> str:
    """What `repr(state)` says: method, compressors, ranks, size, bytes. Not collective."""
    settings, weights, placement = context.settings, context.weights, context.placement
    up, down, averaging = settings.compressor, settings.reply_compressor, settings.averaging
    parts = [f"{_method(memory, context)}, {up} "]
    parts[0] += (
        "both ways" if up == down else "single-way" if settings.server_compressor is None else f"and {down} back"
    )
    if averaging is not None:
        text = repr(averaging)  # which of a Gossip is all its weights
        parts.append(f"errors averaged by {text if len(text) <= 40 else f'{text[:37]}...'}")
    if settings.feedback and settings.outer_decay:
        parts.append("weight decay at x")
    ranks, of_a_node = context.transport.size, context.node.size
    if settings.outer is not None:
        parts.append(f"outer {settings.outer}")
    workers = f"{ranks} rank{'s' * (ranks > 1)}"
    if of_a_node > 1:
        workers = f"{ranks} node{'s' * (ranks > 1)} of {of_a_node} ranks"
    parts.append(f"{workers}, {placement.strategy}")
    parts.append(f"{sum(p.numel() for p in weights.parameters):,} parameters")
    if memory.steps > memory.counted_from:
        measured = metrics(memory, context, Clock())
        parts.append(f"{measured['bytes_per_step']:,.0f} bytes a step and rank")
    else:
        sizes = [message_bytes(weights.codes(c), weights.numels, weights.dtype) for c in (up, down)]
        a_step = sent_bytes(placement.strategy, ranks, *sizes) / context.settings.local_steps
        expected = f"about {a_step:,.0f} bytes a step and rank"
        parts.append(expected + (", beside the averaging" if averaging is not None else ""))
    return "; ".join(parts)


def _method(memory: Memory, context: Context) -> str:
    """What the settings amount to, in the papers' names."""
    settings = context.settings
    momentum = len(memory.m) > 0
    if not settings.feedback:
        return f"{'signum' if momentum else 'signSGD'} with majority vote"
    both = (settings.compressor, settings.reply_compressor)
    if all(code.kind == DENSE for c in both for code in context.weights.codes(c)):
        return f"plain {_rule(context, 'momentum ' * momentum)}"
    s = settings.step_ahead
    method = "SAEF" if s == 1 else "EF" if s == 0 else f"SA-PEF (step_ahead={s})"
    method += " (full step ahead)" if context.server_ahead else ""
    return method if isinstance(context.rule, SGD) else f"{method} with {_rule(context)}"


def _rule(context: Context, momentum: str = "") -> str:
    """SGD or AdamW, and how; or whose own steps are taken."""
    if isinstance(context.rule, Difference):
        several = f", {context.settings.local_steps} steps a round" if context.settings.local_steps > 1 else ""
        return f"{context.rule.optimizer}'s own steps{several}"
    if isinstance(context.rule, AdamW):
        corrected = context.rule.noise_correction and context.transport.size > 1
        return f"AdamW ({'noise-corrected' if corrected else 'plain'} v)"
    return f"{momentum}SGD"


@torch.no_grad()
def diagnose(memory: Memory, context: Context, committed: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """See `SAEFState.diagnose`. committed: tables and messages of the last step."""
    if not context.settings.feedback:
        return {}
    transport, device, s, e = context.transport, context.weights.device, context.settings.step_ahead, memory.e
    everyone, of_a_node = context.node.everyone, context.node.size
    deltas = _quality(memory, context, committed)
    mean, rate = e.clone(), context.server_ahead

    def together() -> list[Any]:
        transport.mean(mean, "telemetry")
        server = all_server_errors(memory, context, "telemetry")
        server = server if server.numel() else torch.zeros_like(mean)
        ahead = s * e
        for b in context.placement.blocks.served_by(context.placement.rank):
            at = slice(b.state, b.state + b.numel)
            ahead[at] += rate * server[at]
        mine = {
            "error": _square(e),
            "worker mismatch": _square(server + mean - ahead),
            "distance": _square(e - mean),
            "mean": _square(mean),
            "server": _square(server),
            "both": _square(server + mean),
            "mean mismatch": _square(server + mean - s * (mean + (rate > 0) * server)),
            "deltas": deltas,
        }
        return gather_values(mine, everyone, device, "telemetry")

    everyone.meet("SAEFState.diagnose()")
    ranks = everyone.call(together)
    nodes = [ranks[i : i + of_a_node] for i in range(0, len(ranks), of_a_node)]

    def average(name: str) -> float:
        return float(sum(r[name] for r in ranks) / len(nodes))

    def here(name: str) -> float:  # the whole vector's, of which each rank of this node has a part
        return float(sum(r[name] for r in nodes[transport.rank]))

    def delta(name: str) -> float:
        return sum(_delta([r["deltas"][name] for r in node]) for node in nodes) / len(nodes)

    return {
        "error_norm": here("error") ** 0.5,
        "error_norm_rms": average("error") ** 0.5,
        "mean_error_norm": here("mean") ** 0.5,
        "server_error_norm": here("server") ** 0.5,
        "mismatch_eq9": here("both"),
        "mismatch_eq10": average("worker mismatch"),
        "mean_gradient_mismatch": here("mean mismatch") ** 0.5,
        "stationary_distance": average("distance"),
        **{f"delta/{name}": delta(name) for name in deltas},
    }


def _delta(squares: Sequence[tuple[float, float]]) -> float:
    """1 - ||D - C(D)||^2 / ||D||^2, from both norms' squares of each part."""
    residual, size = sum(r for r, _ in squares), sum(s for _, s in squares)
    return 1.0 - residual / size if size else 1.0


def _quality(
    memory: Memory, context: Context, committed: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, tuple[float, float]]:
    """||D - C(D)||^2, ||D||^2 of this rank's last message, by layer (D - C(D) is e, before it decays)."""
    if not committed:
        return {}
    weights, e, found = context.weights, memory.e / context.settings.error_decay, {}
    D_of = weights.cut(e - minus_sent(committed, weights))
    for name, residual, D in zip(weights.names, weights.cut(e), D_of, strict=True):
        found[name] = _square(residual), _square(D)
    return found


def _square(v: Tensor) -> float:
    """||v||_2^2, summed in float64."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2
