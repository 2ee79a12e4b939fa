"""`benchmarks/scaling.py`: the fit finds what measurements were made from, and the formulas fit saef's own bytes."""

import sys
from typing import Any

import pytest

import saef
from saef.comm.cost import alpha_beta, step_seconds
from support import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
import scaling

D, COMPUTE_S, HOP_S, BYTE_S, DELAYS = 10_000_000, 0.2, 2e-4, 1e-9, 2.0
KERNELS = {name: 1e-9 * (i % 3) for i, name in enumerate(scaling.METHODS)}


def cell(rate_mbit: float | None, delay_ms: float, ranks: int) -> dict[str, Any]:
    """What a cluster of known constants would take, on as many cores as ranks."""
    each = BYTE_S + (scaling.HEADERS * 8 / (rate_mbit * 1e6) if rate_mbit else 0.0)
    network = alpha_beta(ranks, HOP_S + DELAYS * delay_ms / 1e3, 1 / each)
    methods = {}
    for name in scaling.METHODS:
        kernels = 0.0 if name.startswith("plain") else KERNELS[name] * D
        method = scaling.method_of(name, D, ranks, kernels_s=kernels)
        took = step_seconds(method, network, COMPUTE_S, overlap=False)
        methods[name] = {"seconds": [took] * 3, "strategy": method.strategy}
    return {
        "model": "m",
        "parameters": D,
        "ranks": ranks,
        "rate_mbit": rate_mbit,
        "delay_ms": delay_ms,
        "methods": methods,
    }


def test_the_fit_finds_the_constants() -> None:
    cells = [cell(r, t, K) for K in (2, 4) for r in (100.0, 1000.0, None) for t in (0.0, 20.0)]
    found, rows = scaling.compare(scaling.points_of(cells, cores=4))
    close = pytest.approx  # least squares of some hundred float64 numbers that span four orders of magnitude
    assert (
        found.delays == close(DELAYS, rel=1e-4)
        and found.latency_s == close(HOP_S, rel=1e-4)
        and found.s_per_byte == close(BYTE_S, rel=1e-4)
    )
    assert all(seconds == close(COMPUTE_S, rel=1e-4) for seconds in found.compute.values())
    assert all(seconds == close(KERNELS[name], abs=1e-13) for (_, name), seconds in found.kernels.items())
    assert all(row[key] == close(row["seconds"], rel=1e-4) for row in rows for key in ("fitted_s", "blind_s"))


@pytest.mark.parametrize(("name", "compressor"), [("SAEF sign", saef.ScaledSign()), ("SAEF top-1 %", saef.TopK(0.01))])
def test_messages_are_as_long_as_saefs(name: str, compressor: saef.Compressor) -> None:
    for d in (65536, 10_000_000):
        exact = saef.message_bytes(compressor, [d])
        assert scaling.method_of(name, d, 4).message_bytes == pytest.approx(exact, rel=1e-3)  # padding; k of each block
