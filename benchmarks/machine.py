"""What every benchmark prints first, and how it measures."""

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numba
import numpy
import torch

import saef


def describe() -> str:
    """Machine and versions, one line each."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return (
        f"machine   {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        f"versions  saef {saef.__version__}, torch {torch.__version__}, numba {numba.__version__}, "
        f"numpy {numpy.__version__}, Python {platform.python_version()}"
    )


def interleaved(
    work: dict[str, Callable[[], object]],
    rounds: int,
    *,
    barrier: Callable[[], object] = lambda: None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each piece of work, `rounds` times in turn, so that a noisy neighbour hits all alike.

    barrier: waits for the other ranks, or for a GPU, before and after each piece.
    warm_up: rounds that do not count: to compile, to allocate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for r in range(warm_up + rounds):
        for name, run in work.items():
            barrier()
            start = time.perf_counter()
            run()
            barrier()
            if r >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def sent_by(interface: str) -> float:
    """Bytes that this network namespace has sent by an interface; NaN if it has none of that name."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    found = [line.split(":")[1] for line in lines if line.split(":")[0].strip() == interface]
    return float(found[0].split()[8]) if found else math.nan


def table(seconds: dict[str, list[float]], unit: str) -> str:
    """Median, quartiles and ratio of medians to `unit`, one line for each piece of work."""
    lines = [f"{'':44}{'median':>10}{'quartiles':>20}{'ratio':>8}"]
    for name, values in seconds.items():
        low, _, high = quantiles(values, n=4)
        ratio = median(values) / median(seconds[unit])
        lines.append(f"{name:44}{median(values) * 1e3:7.4g} ms{low * 1e3:10.4g} .. {high * 1e3:.4g} ms{ratio:8.2f}")
    return "\n".join(lines)


def for_json(value: Any) -> Any:
    """With None, which is null in JSON, for what is not a finite number."""
    if isinstance(value, dict):
        return {key: for_json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
