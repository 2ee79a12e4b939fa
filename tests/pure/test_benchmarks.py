"""What the benchmarks on slow networks compute from what they have measured."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import saef
from saef.comm.cost import alpha_beta, step_seconds
from support import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
import peers
import scaling
import time_to_loss
import workloads

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


# -- peers.py ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room_gib", [1, 8, 16, 24, 1000])
def test_a_cells_parts_have_all_methods_and_what_they_are_compared_with(room_gib: int) -> None:
    names = workloads.methods_for(workloads.WORKLOADS["linear"])
    parts = peers.in_parts("linear", 8, names, room_gib * 2.0**30)
    assert {name for part in parts for name in part} == {*names}
    assert all(workloads.unit(name) in part for part in parts for name in part)
    assert (len(parts) == 1) == (room_gib == 1000)
    others = [name for part in parts for name in part if name != workloads.unit(name)]
    assert len(others) == len({*others})


def test_parts_are_one_cell_again() -> None:
    part = {"model": "m", "ranks": 2, "rate_mbit": None, "delay_ms": 0.0}
    (whole,) = peers.merged(
        [
            {**part, "methods": {"plain DDP": {"seconds": [2.0]}, "SAEF sign": {"seconds": [1.0]}}},
            {**part, "methods": {"plain DDP": {"seconds": [3.0]}, "fp16 hook": {"seconds": [1.5]}}},
        ]
    )
    found = {name: (way["seconds"], way["unit_s"]) for name, way in whole["methods"].items()}
    assert found == {"plain DDP": ([2.0], 2.0), "SAEF sign": ([1.0], 2.0), "fp16 hook": ([1.5], 3.0)}


# -- time_to_loss.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([3.0, 2.0, 1.0], 24.0),  # half way between two evaluations
        ([3.0, 2.0, 1.5], 32.0),
        ([3.0, 1.0, 2.0, 1.0], 12.0),  # the first time counts
        ([1.0, 1.0], 16.0),
        ([3.0, 2.0, 1.6], math.inf),
    ],
)
def test_steps_to_a_loss(losses: list[float], steps: float) -> None:
    curve = [(16 * i, loss, 0.0) for i, loss in enumerate(losses)]
    assert time_to_loss.steps_to(curve, 1.5) == steps


def test_longer_runs_are_whole_rounds() -> None:
    assert [time_to_loss.longer(steps) for steps in (32, 64, 256)] == [64, 96, 384]


def test_a_rate_for_a_share_of_the_step(tmp_path: Path) -> None:
    """Of a step of 0.1 s and 1 MB: at 90 % the network takes 0.9 s."""
    args = argparse.Namespace(task="gpt", ranks=4, methods=["plain DDP"], mbit=None, shares=[50.0, 90.0])
    results = time_to_loss.Results(tmp_path / "none.json", args)
    cell = {"model": "gpt", "ranks": 4, "rate_mbit": None, "delay_ms": 0.0}
    results.found["cells"] = [{**cell, "methods": {"plain DDP": {"seconds": [0.1], "wire_bytes": 1e6}}}]
    mbit = 8 * scaling.HEADERS
    assert results.mbits() == [float(f"{mbit / 0.1:.3g}"), float(f"{mbit / 0.9:.3g}")]


def test_every_method_of_the_tables_is_known() -> None:
    assert {*scaling.METHODS} | {f"PowerSGD rank {r}" for r in (1, 2, 4)} == {*workloads.METHODS}
    assert {*peers.ADVISED, *peers.ADVISED_ADAMW} <= {*workloads.METHODS}


def test_the_table_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 1 s and 0.1 s; plain DDP is at its last loss of 2 after 64 steps, sign after 96 of a longer run."""
    names = ["plain DDP", "SAEF sign", "PowerSGD rank 1"]
    args = argparse.Namespace(task="gpt", ranks=4, methods=names, mbit=[10.0], steps=64, lrs=[0.1, 0.2], seeds=1)
    results = time_to_loss.Results(tmp_path / "none.json", args)
    for mbit, plain_s in ((None, 0.1), (10.0, 1.0)):
        ways = {n: {"seconds": [plain_s if n == "plain DDP" else 0.1] * 3, "wire_bytes": 1e6} for n in names}
        cell = {"model": "gpt", "ranks": 4, "rate_mbit": mbit, "delay_ms": 0.0}
        results.found["cells"].append({**cell, "methods": ways})
    ends = {("plain DDP", 64): 2.0, ("plain DDP", 96): 2.5, ("SAEF sign", 64): 2.1, ("SAEF sign", 96): 2.0}
    for name in names:
        for steps in (64, 96):
            last = ends.get((name, steps), 3.0)
            curve = [[0, 5.0, 0.0], [32, 4.0, 1.0], [steps, last, 2.0]]
            results.found["runs"].append({**results.run(name, 0.1, steps), "curve": curve})
    plain, sign, power = time_to_loss.report(results)
    assert (plain["steps"], plain["seconds"], plain["sooner"]) == (64, 64.0, 1.0)
    assert (sign["steps"], sign["seconds"], sign["bytes"]) == (96, pytest.approx(9.6), 96e6)
    assert sign["sooner"] == pytest.approx(64 / 9.6) and math.isinf(power["steps"]) and power["final_loss"] == 3.0
    said = capsys.readouterr().out
    assert "10 Mb/s: plain DDP spends 90% of a step on the network" in said and "never" in said
    time_to_loss.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
