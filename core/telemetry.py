"""What one wants to see of a state: counters at no cost, and measurements on demand."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import record_function

from .agreement import gather
from .checkpoint import server_errors
from .exchange import PURPOSES

if TYPE_CHECKING:
    from .step import Step


class Clock:
    """Seconds spent in each part of the work; the parts also show in a profiler's trace as "saef: NAME".

    On CUDA these are the seconds it took to launch the work, not to do it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside of it as `name`. One thread at a time for each name."""
        start = time.perf_counter()
        with record_function(f"saef: {name}"):
            yield
        self.seconds[name] += time.perf_counter() - start


def metrics(state: Step) -> dict[str, float]:
    """See `SAEFState.metrics`."""
    sent, size = state.transport.sent_bytes, state.transport.size
    full = 2 * (size - 1) / size * sum(p.numel() * p.element_size() for p in state.weights.parameters)
    in_steps = sum(sent[p] for p in ("phase1", "phase2", "averaging"))
    steps = state.steps - state.counted_from
    per_step = in_steps / steps if steps > 0 else 0.0
    return {
        "steps": float(state.steps),
        "steps_skipped": float(state.skipped),
        "steps_skipped_in_a_row": float(state.skipped_in_a_row),
        "bytes_sent": float(sum(sent[p] for p in PURPOSES)),
        **{f"bytes_sent_{p}": float(sent[p]) for p in PURPOSES},
        "bytes_per_step": per_step,
        "bytes_per_step_uncompressed": full,
        "compression_ratio": full / per_step if per_step else 1.0,
        **{f"seconds_{part}": state.clock.seconds[part] for part in ("compress", "exchange", "apply")},
    }


def summary(state: Step) -> str:
    """See `SAEFState.summary`."""
    m = metrics(state)
    error = f", |e_k| {float(torch.linalg.vector_norm(state.e)):.3g}" if state.e.numel() else ""
    took = ", ".join(f"{part} {m[f'seconds_{part}']:.2f} s" for part in ("compress", "exchange", "apply"))
    return (
        f"saef step {state.steps}: {m['bytes_per_step']:,.0f} bytes/step (1/{m['compression_ratio']:.1f}), "
        f"skipped {state.skipped}{error}; {took}"
    )


@torch.no_grad()
def diagnose(state: Step) -> dict[str, float]:
    """See `SAEFState.diagnose`."""
    if not state.settings.feedback:
        return {}
    transport, device, s = state.transport, state.weights.device, state.settings.step_ahead
    deltas = _quality(state)
    mean = state.e.clone()

    def together() -> tuple[Tensor, list[dict[str, float]]]:
        transport.mean(mean, "telemetry")
        server = server_errors(state, "telemetry")
        server = server if server.numel() else torch.zeros_like(mean)
        mine = {
            "error": _square(state.e),
            "worker mismatch": _square(server + mean - s * state.e),
            "distance": _square(state.e - mean),
            **deltas,
        }
        return server, gather(mine, transport, device, "telemetry")

    server, ranks = transport.call(together)

    def average(name: str) -> float:
        return sum(r[name] for r in ranks) / len(ranks)

    return {
        "error_norm": _square(state.e) ** 0.5,
        "error_norm_rms": average("error") ** 0.5,
        "mean_error_norm": _square(mean) ** 0.5,
        "server_error_norm": _square(server) ** 0.5,
        "mismatch_eq9": _square(server + mean),
        "mismatch_eq10": average("worker mismatch"),
        "mean_gradient_mismatch": _square(server + mean - s * mean) ** 0.5,
        "stationary_distance": average("distance"),
        **{name: average(name) for name in deltas},
    }


def _quality(state: Step) -> dict[str, float]:
    """delta/LAYER: 1 - ||D - C(D)||^2 / ||D||^2 of this rank's last message (D - C(D) is e)."""
    if not state.committed:
        return {}
    minus_sent = torch.zeros_like(state.e)
    for table, message in state.committed:
        state.kernels.subtract(table, message, minus_sent)
    weights, found = state.weights, {}
    parts = (weights.cut(state.e), weights.cut(state.e - minus_sent))
    for name, e, D in zip(weights.names, *parts, strict=True):
        size = _square(D)
        found[f"delta/{name}"] = 1.0 - _square(e) / size if size else 1.0
    return found


def _square(v: Tensor) -> float:
    """||v||_2^2, summed in float64."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2
