"""How far it goes: an alpha-beta model fitted on measured steps, its error, and what it says of larger clusters.

    python benchmarks/scaling.py --peers .cache/peers.json [--out .cache/scaling.json] [--plot .cache/scaling.png]
                                 [--parameters 1e8 1e9 1e10 1e11] [--ranks 8 64 512 4096] [--shards 1]
                                 [--tokens 8192] [--flops 3e14] [--kernels 2.5e-11]

The formulas are `saef.comm.cost`'s, as in `python -m saef advise`. Fitted by non-negative least squares of relative
errors on the cells of benchmarks/peers.py, whose rates and delays are known:

    compute of each model and number of ranks; kernel seconds a coordinate of each method there; how many of the link's
    delays a hop takes (gloo asks before it sends, which is a delay there and one back); a latency of each hop and
    seconds a byte in software, which come on top of the link's

The last and the kernels grow with the ranks that share a core. Nothing overlaps in it, since the ranks of peers.py use
all cores. Printed for each point: measured, fitted, and predicted by a fit without any cell of that link (rate and
delay). Then, for other clusters, steps of plain DDP, bf16 all-reduce and saef: hops as in a tree, computation of
6 x parameters x tokens / flops a rank, kernels of the given seconds a coordinate (sign on an H100, docs/performance.md;
top-1 % twice of it), --shards S ranks of a node that share a model and the node's link, so that each has 1/S of
the coordinates and workers are nodes. --model-only leaves the fit out.
"""

import argparse
import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from machine import for_json
from peers import load, merged

from saef.comm.cost import (
    Method,
    alpha_beta,
    break_even_bits_per_s,
    buckets_of,
    step_bytes,
    step_seconds,
)
from saef.comm.exchange import choose

BLOCK = 1 << 16
HEADERS = 1 + 66 / 1448  # what a link carries for a byte of TCP's
METHODS = {  # of peers.py: (kind, steps between exchanges, period of averaging)
    "plain DDP": ("dense", 1, 0),
    "fp16 hook": ("half", 1, 0),
    "PostLocalSGD, H = 4": ("dense", 4, 0),
    "PostLocalSGD, H = 16": ("dense", 16, 0),
    "SAEF sign": ("sign", 1, 0),
    "SAEF sign, Rotating(20)": ("sign", 1, 20),
    "SAEF top-1 %": ("top", 1, 0),
    "SAEF sign, H = 4": ("sign", 4, 0),
    "SAEF sign, H = 16": ("sign", 16, 0),
    "plain DDP, AdamW": ("dense", 1, 0),
    "SAEF-AdamW sign": ("sign", 1, 0),
}


def method_of(name: str, d: float, workers: int, strategy: str = "", **kwargs: Any) -> Method:
    """What a method sends for d coordinates."""
    kind, every, period = METHODS[name]
    n = buckets_of(math.ceil(d))
    if kind in ("dense", "half"):
        return Method(name, (4.0 if kind == "dense" else 2.0) * d, every=every, buckets=n, **kwargs)
    a = d / 8 + 4 * math.ceil(d / BLOCK) if kind == "sign" else math.ceil(d / 100) * 6
    chosen: Any = strategy or choose(workers, math.ceil(a), math.ceil(a))
    averaged = 4.0 * d / period if period else 0.0
    return Method(name, averaged, a, a, chosen, every, buckets=n, **kwargs)


# -- the fit -----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A measured step, and what is known of it.

    Attributes:
        link: (Mb/s or None, ms). compute: (model, ranks, AdamW or not), which have a compute time in common.
        share: ranks that share a core. link_s: its bytes on the link. hops, bytes: that it sends.
    """

    link: tuple[float | None, float]
    compute: tuple[Any, ...]
    name: str
    d: int
    ranks: int
    share: float
    seconds: float
    link_s: float
    hops: float
    bytes: float


def points_of(cells: list[dict[str, Any]], cores: int) -> list[Point]:
    found = []
    for cell in cells:
        K, d, rate = cell["ranks"], cell["parameters"], cell["rate_mbit"]
        for name in METHODS:
            if name not in cell["methods"]:
                continue
            way = cell["methods"][name]
            method = method_of(name, d, K, way.get("strategy", ""))

            def on_network(latency_s: float, s_per_byte: float, method: Method = method, K: int = K) -> float:
                return step_seconds(method, alpha_beta(K, latency_s, 1 / s_per_byte), 0.0, overlap=False)

            each = HEADERS * 8 / (rate * 1e6) if rate else 0.0
            none = 1e-30  # next to nothing
            link_s = on_network(0.0, max(each, none))
            adamw = "AdamW" in name
            found.append(
                Point(
                    (rate, cell["delay_ms"]),
                    (cell["model"], K, adamw),
                    name,
                    d,
                    K,
                    max(1.0, K / cores),
                    median(way["seconds"]),
                    link_s,
                    on_network(1.0, none),
                    step_bytes(method, K),
                )
            )
    return found


class Fit(NamedTuple):
    """What was found: delays of the link in a hop; latency_s of a hop and s_per_byte in software, beside the link's;
    compute by `Point.compute`, kernels by model and method."""

    delays: float
    latency_s: float
    s_per_byte: float
    compute: dict[tuple[Any, ...], float]
    kernels: dict[tuple[str, str], float]

    def __call__(self, p: Point) -> float:
        own = self.compute.get(p.compute, math.nan) + self.kernels.get((p.compute[0], p.name), 0.0) * p.d * p.share
        hop_s = self.latency_s + self.delays * p.link[1] / 1e3
        return own + p.link_s + hop_s * p.hops + self.s_per_byte * p.bytes * p.share


def fit(points: list[Point]) -> Fit:
    from scipy.optimize import nnls

    computes = sorted({p.compute for p in points})
    of = {p: (p.compute[0], p.name) for p in points}
    names = sorted({key for key in of.values() if not key[1].startswith("plain")})
    first, at = 3, 3 + len(computes)
    A = np.zeros((len(points), at + len(names)))
    for row, p in zip(A, points, strict=True):
        row[:first] = p.hops * p.link[1] / 1e3, p.hops, p.bytes * p.share
        row[first + computes.index(p.compute)] = 1.0
        if of[p] in names:
            row[at + names.index(of[p])] = p.d * p.share
    measured = np.array([p.seconds for p in points])
    rest = np.array([p.seconds - p.link_s for p in points])
    size = A.max(axis=0)
    size[size == 0] = 1.0
    found = nnls(A / size / measured[:, None], rest / measured)[0] / size
    return Fit(
        *found[:first].tolist(),
        dict(zip(computes, found[first:at].tolist(), strict=True)),
        dict(zip(names, found[at:].tolist(), strict=True)),
    )


def compare(points: list[Point]) -> tuple[Fit, list[dict[str, Any]]]:
    """The fit, and each point beside it and beside one that has not seen its link."""
    whole, rows = fit(points), []
    links = {p.link for p in points}
    without = {link: fit(others) for link in links if (others := [p for p in points if p.link != link])}
    for p in points:
        blind = without[p.link](p) if p.link in without else math.nan
        rows.append({**p._asdict(), "fitted_s": whole(p), "blind_s": blind})
    return whole, rows


def print_fit(found: Fit, rows: list[dict[str, Any]]) -> None:
    print(f"a hop     {found.delays:.2f} delays of the link, and {found.latency_s * 1e6:.0f} us")
    print(f"a byte    {found.s_per_byte * 1e9:.2f} ns beside the link's")
    for (model, ranks, adamw), seconds in found.compute.items():
        print(f"compute   {model}, {ranks} ranks{', AdamW' * adamw}: {seconds * 1e3:.1f} ms")
    for (model, name), each in found.kernels.items():
        print(f"kernels   {model}, {name}: {each * 1e9:.2f} ns a coordinate")
    print(f"\n{'':34}{'link':>22}{'measured':>12}{'fitted':>10}{'error':>8}{'unseen link':>13}{'error':>8}")
    for row in rows:
        rate, delay = row["link"]
        link = f"{f'{rate:g} Mb/s' if rate else 'not shaped'}, {delay:g} ms"
        label = f"{row['compute'][0]}, {row['ranks']}: {row['name']}"
        line = f"{label:34}{link:>22}{row['seconds'] * 1e3:9.1f} ms"
        for key, width in (("fitted_s", 10), ("blind_s", 13)):
            line += f"{row[key] * 1e3:{width}.1f}{row[key] / row['seconds'] - 1:+8.0%}"
        print(line)
    for key, label in (("fitted_s", "fitted"), ("blind_s", "of a link not seen")):
        errors = [abs(r[key] / r["seconds"] - 1) for r in rows if math.isfinite(r[key])]
        if errors:
            near = sum(e <= 0.25 for e in errors)
            print(f"{label}: median error {median(errors):.1%}, {near} of {len(errors)} within 25 %")


# -- larger clusters ---------------------------------------------------------------------------------------------------

PLAIN, HALF, SIGN, TOP, LOCAL = "plain DDP", "fp16 hook", "SAEF sign", "SAEF top-1 %", "SAEF sign, H = 16"
LABELS = {PLAIN: "plain", HALF: "bf16", SIGN: "sign", TOP: "top-1 %", LOCAL: "sign, H = 16"}


class Cluster(NamedTuple):
    """d parameters on K ranks, S of them to a node and a model, of which each has 1/S."""

    d: float
    ranks: int
    args: argparse.Namespace

    @property
    def workers(self) -> int:
        return max(1, self.ranks // self.args.shards)

    @property
    def compute_s(self) -> float:
        return 6 * self.d * self.args.tokens / self.args.flops / self.args.shards

    def method(self, name: str) -> Method:
        """Of a whole node: its link carries what its ranks send, and each computes its share."""
        share = self.args.kernels * self.d / self.args.shards
        kernels = {SIGN: share, LOCAL: share, TOP: 2 * share}.get(name, 0.0)
        return method_of(name, self.d, self.workers, kernels_s=kernels)

    def step(self, name: str, bits_per_s: float, latency_s: float) -> float:
        network = alpha_beta(self.workers, latency_s, bits_per_s / 8, message_s=self.args.message_us / 1e6, tree=True)
        return step_seconds(self.method(name), network, self.compute_s)

    def break_even(self, name: str, base: str, latency_s: float) -> float:
        fast = alpha_beta(self.workers, latency_s, 1e13, message_s=self.args.message_us / 1e6, tree=True)
        return break_even_bits_per_s(self.method(name), self.method(base), fast, self.compute_s)


def print_clusters(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(
        f"\n{args.tokens:g} tokens a model and step, {args.flops:.3g} flop/s a rank, {args.shards} ranks a model; "
        f"{args.latency_us:g} us a hop; speed-up over plain (and over bf16) at links of"
    )
    heads = "".join(f"{f'{rate:g} Gb/s':>16}" for rate in args.gbit)
    print(f"{'d':>8}{'ranks':>7}  {'':14}{heads}{'pays below, Gb/s: plain, bf16':>32}")
    for d in args.parameters:
        for K in args.ranks:
            cluster = Cluster(d, K, args)
            if cluster.workers < 2:
                continue
            for name in (SIGN, TOP, LOCAL):
                row: dict[str, Any] = {"d": d, "ranks": K, "method": name}
                line = f"{d:8.0e}{K:7}  {LABELS[name]:14}"
                for rate in args.gbit:
                    took = {n: cluster.step(n, rate * 1e9, args.latency_us / 1e6) for n in (PLAIN, HALF, name)}
                    row[f"{rate:g}"] = took
                    line += f"{f'{took[PLAIN] / took[name]:.2f} ({took[HALF] / took[name]:.2f})':>16}"
                even = [cluster.break_even(name, base, args.latency_us / 1e6) / 1e9 for base in (PLAIN, HALF)]
                row["break_even_gbit"] = even
                print(line + f"{even[0]:22.3g}{even[1]:10.3g}")
                rows.append(row)
    return rows


def draw(args: argparse.Namespace, path: Path) -> None:
    """Speed-up of sign over plain and over bf16, against the links' rate and delay."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    rates, delays = np.logspace(8, 11.6, 60), np.logspace(-5, -1, 50)
    models = args.parameters[:4]
    figure, axes = pyplot.subplots(
        2, len(models), figsize=(4.2 * len(models), 7.4), layout="constrained", squeeze=False
    )
    levels = [0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 32]
    for column, d in enumerate(models):
        cluster = Cluster(d, args.ranks[min(1, len(args.ranks) - 1)], args)
        for line, base in enumerate((PLAIN, HALF)):
            axis = axes[line][column]
            gain = [[cluster.step(base, r, t) / cluster.step(SIGN, r, t) for r in rates] for t in delays]
            shown = axis.contourf(rates / 1e9, delays * 1e3, gain, levels=levels, norm="log", extend="both")
            axis.contour(rates / 1e9, delays * 1e3, gain, levels=[1.0], colors="k")
            axis.set(xscale="log", yscale="log", title=f"over {LABELS[base]}, d = {d:.0e}, {cluster.ranks} ranks")
            axis.set(xlabel="Gb/s of a link", ylabel="delay of a hop, ms")
    bar = figure.colorbar(shown, ax=axes, label="speed-up of sign (black: 1)", ticks=levels)
    bar.ax.set_yticklabels([f"{level:g}" for level in levels])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", type=Path, default=Path(".cache/peers.json"))
    add("--model-only", action="store_true")
    add("--cores", type=int, default=os.cpu_count(), help="of the machine that peers.py ran on")
    add("--parameters", type=float, nargs="+", default=[1e8, 1e9, 1e10, 1e11])
    add("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    add("--shards", type=int, default=1)
    add("--tokens", type=float, default=8192.0, help="of each model in a step")
    add("--flops", type=float, default=3e14, help="of a rank, as it trains")
    add("--kernels", type=float, default=2.5e-11, help="seconds a coordinate")
    add("--latency-us", type=float, default=20.0, help="of a hop")
    add("--message-us", type=float, default=2.0, help="to send each message of an all-to-all")
    add("--gbit", type=float, nargs="+", default=[1.0, 10.0, 100.0, 400.0])
    add("--out", type=Path, default=Path(".cache/scaling.json"))
    add("--plot", type=Path, default=Path(".cache/scaling.png"))
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if not args.model_only:
        cells = merged(load(args.peers))
        if not cells:
            parser.error(f"{args.peers} has no cells: measure some with benchmarks/peers.py, or give --model-only")
        found, rows = compare(points_of(cells, args.cores))
        print_fit(found, rows)
        compute = [{"of": list(key), "seconds": s} for key, s in found.compute.items()]
        kernels = [{"of": list(key), "s_per_coordinate": s} for key, s in found.kernels.items()]
        result = {"fit": {**found._asdict(), "compute": compute, "kernels": kernels}, "points": rows}
    result["clusters"] = print_clusters(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(for_json(result), indent=1))
    draw(args, args.plot)
    print(f"\nnumbers in {args.out}, picture in {args.plot}")


if __name__ == "__main__":
    main()
