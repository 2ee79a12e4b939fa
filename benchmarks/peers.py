"""Steps of plain DDP, its other communication hooks and saef side by side, on links of several rates and delays.

    python benchmarks/peers.py [--rates 100 250 1000 none] [--delays 0 20] [--ranks 2 4 8] [--models linear resnet gpt]
                               [--methods NAME...] [--rounds 9] [--seconds 90] [--advise] [--out .cache/peers.json]
    python benchmarks/peers.py --show .cache/peers.json [--plot peers.png]
    benchmarks/netlab 100 4 -- python benchmarks/peers.py --cell [--model linear] [--bucket-mb 4]

The first form measures each cell of the grid in `benchmarks/netlab` (needs root), writes it to --out at once and prints
its table; started again it goes on with the cells that are missing. A cell is one run of all methods, in turn, so that
a noisy neighbour hits all alike: at least three rounds, at most --rounds, and none begins after --seconds. Step times
are the slowest rank's, by step of the optimizer, of pieces of about a second. `wire` is what a rank's interface has
sent, `counted` what saef says it has sent, or what a ring all-reduce sends. Ratios are to plain DDP by the same
optimizer in the same cell, and above 1 where the method is faster. Where the machine's memory does not hold all methods
at once, a cell is measured in two or more parts, each with plain DDP. With --advise the functions of `python -m saef
advise` predict each cell's steps, in the cell itself, and the table has their error. --cell is one cell alone, on ranks
that someone else has started.
"""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, sent_by
from workloads import METHODS, PLAIN, PLAIN_ADAMW, WORKLOADS, Trainer, methods_for, optimizer_of, unit

from saef import advise, probe

HERE = Path(__file__).resolve()
PARTS = ("compress", "exchange", "apply")
PIECE_S, MOST_STEPS, LEAST_ROUNDS = 1.0, 16, 3
VECTORS = 5.5  # of the model's size, that a method needs in a rank
Record = dict[str, Any]


# -- one cell, on every rank -------------------------------------------------------------------------------------------


def interface_bytes() -> float:
    """What this rank's interface has sent since the machine, or the namespace, is there."""
    return sent_by(os.environ.get("GLOO_SOCKET_IFNAME", "eth0"))


def agreed(value: float) -> float:
    """Rank 0's."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


class Measured:
    """A method's trainer and what was seen of it: seconds a step of each round, bytes and saef's clock in all."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.trainer = Trainer(WORKLOADS[args.model], name, bucket_mb=args.bucket_mb)
        torch.manual_seed(1 + dist.get_rank())
        self.batch = self.trainer.workload.sample(args.batch or self.trainer.workload.batch)
        self.every, self.steps = METHODS[name].steps, 0
        self.seconds: list[float] = []
        self.wire, self.first, self.all_steps = 0.0, 0, 0
        self.before: dict[str, float] = {}
        for _ in range({"power": 3, "local": 1}.get(METHODS[name].kind, 2)):
            self.piece(self.every)  # compiles, allocates, lets DDP rebuild its buckets and PowerSGD begin
        per_step = agreed(self.seconds[-1])
        steps = min(MOST_STEPS, max(1, math.ceil(PIECE_S / per_step)))
        self.length = -(-steps // self.every) * self.every
        self.first = self.every if self.length > self.every else 0
        self.seconds, self.steps, self.all_steps, self.wire, self.before = [], 0, 0, 0.0, self.metrics()

    def metrics(self) -> dict[str, float]:
        return self.trainer.state.metrics() if self.trainer.state is not None else {}

    def piece(self, steps: int) -> None:
        """So many steps, after one or one round that does not count: other methods have had caches and connections."""
        dist.barrier()
        for _ in range(self.first):
            self.trainer.step(self.batch)
        sent, start = interface_bytes(), time.perf_counter()
        for _ in range(steps):
            self.trainer.step(self.batch)
        self.seconds.append((time.perf_counter() - start) / steps)
        self.steps += steps
        self.all_steps += self.first + steps
        self.wire += interface_bytes() - sent

    def report(self) -> Record:
        """What to keep of it; collective."""
        slowest = torch.tensor(self.seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        now = self.metrics()
        keys = [*(f"seconds_{part}" for part in PARTS), "bytes_sent"]
        mine = [self.wire / self.steps, *((now[k] - self.before[k]) / self.all_steps if now else 0.0 for k in keys)]
        mean = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(mean)
        per_step = (mean / dist.get_world_size()).tolist()
        record: Record = {"seconds": slowest.tolist(), "wire_bytes": per_step[0], "steps_a_piece": self.length}
        if self.trainer.state is not None:
            record |= dict(zip(PARTS, per_step[1:4], strict=True), counted_bytes=per_step[4])
            record["strategy"] = self.trainer.state.strategy
        elif (each := {"plain": 4, "fp16": 2, "local": 4}.get(self.trainer.method.kind)) is not None:
            K = dist.get_world_size()  # a ring all-reduce
            record["counted_bytes"] = 2 * (K - 1) / K * each * self.trainer.parameters() / self.every
        return record


def run_cell(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    ways = {name: Measured(name, args) for name in args.methods or methods_for(WORKLOADS[args.model])}
    began = time.perf_counter()
    for r in range(args.rounds):
        if r >= LEAST_ROUNDS and agreed(time.perf_counter() - began) > args.seconds:
            break
        for measured in ways.values():
            measured.piece(measured.length)
    found = {name: measured.report() for name, measured in ways.items()}
    some = next(iter(ways.values()))
    record = {
        "parameters": some.trainer.parameters(),
        "batch": len(some.batch[0]),
        "machine": describe(),
        "memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "tcp": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "methods": found,
    }
    if args.advise:
        record["advised"] = advised(args.model, [*ways], some.batch)
    if dist.get_rank() == 0:
        if args.cell_out:
            args.cell_out.write_text(json.dumps(record))
        else:
            print(table(record))
    dist.barrier()
    dist.destroy_process_group()


ADVISED = {
    PLAIN: probe.PLAIN,
    "fp16 hook": probe.HALF,
    "SAEF sign": "saef sign",
    "SAEF sign, Rotating(20)": "saef sign, Rotating(20)",
    "SAEF top-1 %": "saef top-1 %",
    "SAEF sign, H = 4": "saef sign, H = 4",
    "SAEF sign, H = 16": "saef sign, H = 16",
}
ADVISED_ADAMW = {PLAIN_ADAMW: probe.PLAIN, "SAEF-AdamW sign": "saef sign"}


def advised(model: str, names: list[str], batch: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Seconds of a step that `python -m saef advise` predicts, by method; collective."""
    workload, found = WORKLOADS[model], {}
    for ours, adamw in ((ADVISED, workload.adamw), (ADVISED_ADAMW, True)):
        theirs = [ours[name] for name in names if name in ours]
        if not theirs:
            continue
        net = workload.net()
        optimizer, numels = optimizer_of(workload, net, 1e-6, adamw), [p.numel() for p in net.parameters()]

        def step(net: torch.nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            workload.loss(net, batch).backward()
            if workload.clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), workload.clip)
            optimizer.step()

        def same(net: torch.nn.Module, adamw: bool = adamw) -> torch.optim.Optimizer:
            return optimizer_of(workload, net, 1e-6, adamw)

        few = numels if sum(numels) <= probe.MOST else probe.sample(sum(numels))
        measured = probe.measure(torch.device("cpu"), same, few, step=step, names=theirs)
        kind = "adamw" if adamw else "sgd"
        advice = advise.advise(measured, sum(numels), measured.compute_s, optimizer=kind, numels=numels)
        by_name = {line.method: line.step_s for line in advice.lines}
        found |= {name: by_name[ours[name]] for name in names if name in ours}
    return found


# -- tables and pictures -----------------------------------------------------------------------------------------------


def spread(seconds: list[float]) -> str:
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return f"{low * 1e3:.4g} .. {high * 1e3:.4g}"


def table(record: Record) -> str:
    """One line for each method."""
    advised = record.get("advised")
    head = f"{'':26}{'ms a step':>11}{'quartiles':>20}{'ratio':>8}{'wire, MB':>11}{'counted':>10}"
    head += f"{'compress':>10}{'exchange':>10}{'apply, ms':>11}"
    lines = [head + (f"{'advised':>10}{'error':>8}" if advised else "")]
    for name, way in record["methods"].items():
        took = median(way["seconds"])
        ratio = median(record["methods"][unit(name)]["seconds"]) / took if unit(name) in record["methods"] else math.nan
        line = f"{name:26}{took * 1e3:11.1f}{spread(way['seconds']):>20}"
        line += f"{'-' if math.isnan(ratio) else f'{ratio:.2f}':>8}{way['wire_bytes'] / 1e6:11.3f}"
        line += f"{way['counted_bytes'] / 1e6:10.3f}" if "counted_bytes" in way else " " * 10
        line += "".join(
            f"{way[p] * 1e3:{w}.1f}" if p in way else " " * w for p, w in zip(PARTS, (10, 10, 11), strict=True)
        )
        if advised and name in advised:
            line += f"{advised[name] * 1e3:10.1f}{advised[name] / took - 1:+8.0%}"
        lines.append(line)
    return "\n".join(lines)


def title(cell: Record) -> str:
    rate = f"{cell['rate_mbit']:g} Mb/s" if cell["rate_mbit"] else "not shaped"
    return (
        f"{cell['model']} ({cell['parameters']:,} parameters), {cell['ranks']} ranks, {rate}, {cell['delay_ms']:g} ms"
    )


def merged(cells: list[Record]) -> list[Record]:
    """One record for each cell whose parts were measured one after the other; the first part's plain DDP stays."""
    found: dict[tuple[Any, ...], Record] = {}
    for cell in cells:
        where = tuple(cell[k] for k in ("model", "ranks", "rate_mbit", "delay_ms"))
        if where not in found:
            found[where] = {**cell, "methods": {}, "advised": {}}
        whole = found[where]
        for name, way in cell["methods"].items():
            base = median(cell["methods"][unit(name)]["seconds"]) if unit(name) in cell["methods"] else None
            whole["methods"].setdefault(name, {**way, "unit_s": base})
        whole["advised"] |= cell.get("advised", {})
    return [*found.values()]


def show(cells: list[Record], plot: Path | None) -> None:
    for cell in cells:
        print(f"\n{title(cell)}" + (f", part {cell['part']}" if cell["parts"] > 1 else "") + f"\n{table(cell)}")
    print(traffic(merged(cells)))
    if plot:
        draw(merged(cells), plot)
        print(f"\npicture saved to {plot.resolve()}")


def traffic(cells: list[Record]) -> str:
    """MB on the interface of a rank in a step, by the number of ranks, and what was counted; the first link's."""
    lines = []
    for model in dict.fromkeys(c["model"] for c in cells):
        mine = {c["ranks"]: c for c in reversed(cells) if c["model"] == model}
        ranks = sorted(mine)
        lines.append(f"\n{f'{model}, MB a step':26}" + "".join(f"{f'{k} ranks (counted)':>24}" for k in ranks))
        for name in METHODS:
            ways = [mine[k]["methods"].get(name) for k in ranks]
            if any(ways):
                parts = [(w["wire_bytes"] / 1e6, w.get("counted_bytes", math.nan) / 1e6) if w else None for w in ways]
                lines.append(f"{name:26}" + "".join(f"{f'{p[0]:.3f} ({p[1]:.3f})' if p else '':>24}" for p in parts))
    return "\n".join(lines)


def draw(cells: list[Record], path: Path) -> None:
    """Step time against the link's rate: a panel for each model, number of ranks, and delay."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    panels = sorted({(c["model"], c["ranks"], c["delay_ms"]) for c in cells})
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5.2 * across, 4.2 * down + 1), layout="constrained")
    axes = [axes] if len(panels) == 1 else list(axes.flat)
    for axis, (model, ranks, delay) in zip(axes, panels, strict=False):
        mine = [c for c in cells if (c["model"], c["ranks"], c["delay_ms"]) == (model, ranks, delay)]
        mine.sort(key=lambda c: c["rate_mbit"] or 1e5)
        for index, name in enumerate(METHODS):
            have = [c for c in mine if name in c["methods"]]
            rates = [c["rate_mbit"] or 1e5 for c in have]
            took = [median(c["methods"][name]["seconds"]) for c in have]
            axis.plot(rates, took, "o-" if index < 10 else "s--", ms=4, label=name, color=f"C{index % 10}")
        axis.set(xscale="log", yscale="log", title=f"{model}, {ranks} ranks, {delay:g} ms")
        axis.set(xlabel="Mb/s of each rank's link (right end: not shaped)", ylabel="seconds a step")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = {line.get_label(): line for axis in axes[: len(panels)] for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, 2 * across), fontsize=8)
    figure.savefig(path, dpi=120)


# -- the grid ----------------------------------------------------------------------------------------------------------


def available_bytes() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def in_parts(model: str, ranks: int, names: list[str], room: float) -> list[list[str]]:
    """The methods in as many parts as memory asks for, each with the plain DDP that its methods are compared with."""
    d = sum(p.numel() for p in WORKLOADS[model].net().parameters())
    fit = int((0.85 * room - ranks * 4e8) / (ranks * VECTORS * 4 * d))
    if fit >= len(names):
        return [names]
    rest = [n for n in names if n not in (PLAIN, PLAIN_ADAMW)]
    size = max(1, fit - 2)
    parts = [rest[i : i + size] for i in range(0, len(rest), size)]
    return [[u for u in (PLAIN, PLAIN_ADAMW) if u in {unit(n) for n in part}] + part for part in parts]


def load(path: Path) -> list[Record]:
    return json.loads(path.read_text()) if path.exists() else []


def measure(args: argparse.Namespace, cell: Record, names: list[str]) -> Record:
    """One cell, in netlab."""
    rate = f"{cell['rate_mbit']:g}" if cell["rate_mbit"] else "none"
    into = args.out.with_suffix(".cell")
    words = [HERE.parent / "netlab", rate, "--delay", f"{cell['delay_ms']:g}", f"{cell['ranks']}"]
    words += ["--", sys.executable, HERE, "--cell", "--cell-out", into, "--model", cell["model"]]
    words += ["--rounds", f"{args.rounds}", "--seconds", f"{args.seconds:g}", "--methods", *names]
    env = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}  # not: a namespace's addresses have no names
    done = subprocess.run([sys.executable, *map(str, words), *(["--advise"] if args.advise else [])], env=env)
    if done.returncode:
        raise SystemExit(f"{title({**cell, 'parameters': 0})}: the run has failed with status {done.returncode}")
    record = json.loads(into.read_text())
    into.unlink()
    return {**cell, **record}


def run_grid(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cells = load(args.out)
    room = available_bytes()
    for model in args.models:
        known = methods_for(WORKLOADS[model])
        names = [n for n in args.methods or known if n in known]
        for ranks in args.ranks:
            parts = in_parts(model, ranks, names, room)
            for delay in args.delays:
                for rate in args.rates:
                    for number, part in enumerate(parts, 1):
                        cell = {"model": model, "ranks": ranks, "rate_mbit": rate, "delay_ms": delay}
                        if any(cell.items() <= c.items() and {*part} <= {*c["methods"]} for c in cells):
                            continue
                        began = time.perf_counter()
                        cells.append(measure(args, {**cell, "part": number, "parts": len(parts)}, part))
                        args.out.write_text(json.dumps(cells, indent=1))
                        print(f"\n{title(cells[-1])}   ({time.perf_counter() - began:.0f} s)\n{table(cells[-1])}")
                        sys.stdout.flush()
    print(traffic(merged(cells)))
    draw(merged(cells), args.plot or args.out.with_suffix(".png"))
    print(f"\n{len(cells)} cells in {args.out}, picture in {args.plot or args.out.with_suffix('.png')}")


def rate(text: str) -> float | None:
    return None if text == "none" else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rates", type=rate, nargs="+", default=[100.0, 250.0, 1000.0, None], help='Mb/s, or "none"')
    add("--delays", type=float, nargs="+", default=[0.0, 20.0], help="ms, one way")
    add("--ranks", type=int, nargs="+", default=[4, 2, 8])
    add("--models", choices=WORKLOADS, nargs="+", default=[*WORKLOADS])
    add("--methods", choices=METHODS, nargs="+", metavar="NAME", help="default: all; in quotes, as in the table")
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=90.0, help="after which no further round of a cell begins")
    add("--advise", action="store_true", help="compare with the predictions of `python -m saef advise`")
    add("--out", type=Path, default=Path(".cache/peers.json"))
    add("--plot", type=Path, help="picture (default: beside --out)")
    add("--show", type=Path, metavar="JSON", help="print the tables of a file, and draw it with --plot")
    add("--cell", action="store_true")
    add("--model", choices=WORKLOADS, default="linear", help="of --cell")
    add("--batch", type=int, help="of --cell: examples of each rank")
    add("--bucket-mb", type=float, help="of --cell: DDP's bucket_cap_mb, of all methods")
    add("--cell-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        show(load(args.show), args.plot)
    elif args.cell:
        if "RANK" not in os.environ:
            parser.error("--cell runs on ranks: benchmarks/netlab 100 4 -- python benchmarks/peers.py --cell")
        run_cell(args)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the cell under way, too
        run_grid(args)


if __name__ == "__main__":
    main()
