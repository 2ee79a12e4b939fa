"""Seconds and bytes until a method has the held-out loss at which full precision ends, on slow links.

    python benchmarks/time_to_loss.py --task gpt [--steps 256] [--lrs 1e-3 2e-3 4e-3] [--seeds 1] [--shares 50 90 97]
    python benchmarks/time_to_loss.py --task resnet --data .cache/fashion-mnist
    python benchmarks/time_to_loss.py --task gpt --live "SAEF sign" [--live-mbit 25]

Losses by step do not depend on the network, and step times do not depend on the loss. So each method and learning
rate is trained once, on links that are not shaped; steps are measured apart, by peers.py, on links of the rates at
which plain DDP spends --shares per cent of a step on the network; and a time to a loss is the product: steps until
then, times the median step. --live checks one such product, end to end: it trains a method, as tuned, on a link of that
rate, and prints the seconds that this took (evaluations not counted) beside the product. Needs root for
benchmarks/netlab.

The tasks are gpt (1.2 M parameters on the bytes of Python's standard library, AdamW, clipping at 1) and resnet (1.2 M
parameters, 12,800 images of Fashion-MNIST at 14x14, momentum SGD); 4 ranks, batches of 32 and 64 in all; a warm-up
over a tenth of the steps and then a cosine. Every method gets the same budget: each of --lrs, and the best of them once
more over half as many steps again. With --seeds N the best is run N times. The target is the lowest loss at which plain
DDP ends after --steps. A method that never gets there has no time, and the table says how far it came. Results are kept
in --out, and a run that is started again goes on.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from machine import for_json
from peers import HERE as PEERS
from peers import measure
from torch import Tensor
from torch.optim.swa_utils import update_bn
from workloads import METHODS, PLAIN, WORKLOADS, Trainer, methods_for, train_gpt

from data import load as load_images

NETLAB, HERE = PEERS.parent / "netlab", Path(__file__).resolve()
EVERY = 32  # steps between evaluations: whole rounds of all methods
LONGER = 1.5
LRS = {"gpt": [1e-3, 2e-3, 4e-3], "resnet": [0.025, 0.05, 0.1]}
HELD_OUT, NORM_IMAGES = 1000, 512
HEADERS = 1 + 66 / 1448
Record = dict[str, Any]


# -- tasks -------------------------------------------------------------------------------------------------------------


class Text:
    """The GPT's: batches that depend on seed and step alone, of which each rank takes its share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.text = train_gpt.read(None)
        self.held_out = len(self.text) * 95 // 100
        self.total = WORKLOADS["gpt"].batch * dist.get_world_size()

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = torch.randint(self.held_out - 65, (self.total,), generator=generator)
        return train_gpt.cut(self.text, starts[dist.get_rank() :: dist.get_world_size()], 64)

    @torch.no_grad()
    def loss(self, net: torch.nn.Module) -> float:
        rest = self.text[self.held_out :]
        starts = torch.linspace(0, len(rest) - 65, 256).long()[dist.get_rank() :: dist.get_world_size()]
        return shared(net(*train_gpt.cut(rest, starts, 64)).item() * len(starts), len(starts))


class Images:
    """The ResNet's. Batch norm is estimated at x before each evaluation, by each rank on its share of the images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.data = load_images(str(args.data), fm14=True)
        self.total = WORKLOADS["resnet"].batch * dist.get_world_size()

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        epoch, at = divmod(step, len(self.data.train) // self.total)
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed + 1000 * epoch))
        mine = order[at * self.total : (at + 1) * self.total][dist.get_rank() :: dist.get_world_size()]
        return self.data.train.batch(mine)

    @torch.no_grad()
    def loss(self, net: torch.nn.Module) -> float:
        update_bn([self.data.train.batch(torch.arange(NORM_IMAGES)[dist.get_rank() :: dist.get_world_size()])[0]], net)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
        net.eval()
        mine = torch.arange(HELD_OUT)[dist.get_rank() :: dist.get_world_size()]
        total = 0.0
        for part in mine.split(250):
            images, labels = self.data.test.batch(part)
            total += torch.nn.functional.cross_entropy(net(images), labels, reduction="sum").item()
        net.train()
        return shared(total, len(mine))


TASKS: dict[str, Callable[[argparse.Namespace], Text | Images]] = {"gpt": Text, "resnet": Images}


def shared(total: float, count: int) -> float:
    """The mean over all ranks' examples."""
    v = torch.tensor([total, count], dtype=torch.float64)
    dist.all_reduce(v)
    return float(v[0] / v[1])


# -- training, on every rank -------------------------------------------------------------------------------------------


def rate(step: int, steps: int) -> float:
    """What the learning rate is multiplied by."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def train(task: Text | Images, run: Record) -> list[tuple[int, float, float]]:
    """(step, held-out loss at x, seconds of training until then), every so many steps."""
    trainer = Trainer(WORKLOADS[run["task"]], run["method"], run["lr"], run["seed"])
    curve, seconds = [(0, task.loss(trainer.net), 0.0)], 0.0
    dist.barrier()
    began = time.perf_counter()
    for step in range(run["steps"]):
        trainer.set_lr(run["lr"] * rate(step, run["steps"]))
        trainer.step(task.batch(run["seed"], step))
        if (step + 1) % EVERY == 0:
            dist.barrier()
            seconds += time.perf_counter() - began
            curve.append((step + 1, task.loss(trainer.net), seconds))
            dist.barrier()
            began = time.perf_counter()
    return curve


def train_all(args: argparse.Namespace) -> None:
    """The runs of a file, to a file, a line each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    task = TASKS[args.task](args)
    for run in json.loads(args.train.read_text()):
        curve = train(task, run)
        if dist.get_rank() == 0:
            with args.into.open("a") as file:
                file.write(json.dumps({**run, "curve": curve}) + "\n")
            print(f"{run['method']}, lr {run['lr']:g}, {run['steps']} steps, seed {run['seed']}: {curve[-1][1]:.4f}")
            sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


# -- the driver --------------------------------------------------------------------------------------------------------


class Results:
    """All that has been measured of a task, in one file."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path, self.args = path, args
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: Record = {"runs": [], "cells": []}
        if path.exists():
            self.found = json.loads(path.read_text())

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found))

    def runs(self, **given: Any) -> list[Record]:
        """Those of this task, ranks and length that have what is given."""
        steps = (self.args.steps, longer(self.args.steps))
        return [
            r
            for r in self.found["runs"]
            if r["task"] == self.args.task
            and r["ranks"] == self.args.ranks
            and r["steps"] in steps
            and given.items() <= r.items()
        ]

    def do(self, wanted: list[Record], rate_text: str = "none") -> list[Record]:
        """Train what is not there yet."""
        missing = [w for w in wanted if not self.runs(**w)] if rate_text == "none" else wanted
        if not missing:
            return []
        plan, into = self.path.with_suffix(".plan"), self.path.with_suffix(".runs")
        plan.write_text(json.dumps(missing))
        into.unlink(missing_ok=True)
        words = [NETLAB, rate_text, f"{self.args.ranks}", "--", sys.executable, HERE, "--task", self.args.task]
        words += ["--train", plan, "--into", into, "--data", self.args.data]
        try:
            env = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
            done = subprocess.run([sys.executable, *map(str, words)], env=env)
        finally:
            new = [json.loads(line) for line in into.read_text().splitlines()] if into.exists() else []
            if rate_text == "none":
                self.found["runs"] += new
                self.save()
        if done.returncode:
            raise SystemExit(f"training has failed with status {done.returncode}")
        return new

    def run(self, method: str, lr: float, steps: int, seed: int = 0) -> Record:
        return {
            "task": self.args.task,
            "ranks": self.args.ranks,
            "method": method,
            "lr": lr,
            "steps": steps,
            "seed": seed,
        }

    def target(self) -> float:
        """The lowest loss at which plain DDP ends."""
        return min(r["curve"][-1][1] for r in self.runs(method=PLAIN, steps=self.args.steps, seed=0))

    def best(self, method: str, steps: int | None = None) -> Record:
        """The run of the first seed, and of so many steps, that is soonest at the target, or else ends lowest."""
        target = self.target()

        def key(r: Record) -> tuple[float, float]:
            return steps_to(r["curve"], target), r["curve"][-1][1]

        runs = self.runs(method=method, seed=0, **({} if steps is None else {"steps": steps}))
        return min((r for r in runs if r["lr"] in self.args.lrs), key=key)

    def cell(self, mbit: float | None) -> Record:
        """Steps of all methods on links of this rate."""
        where = {"model": self.args.task, "ranks": self.args.ranks, "rate_mbit": mbit, "delay_ms": 0.0}
        for cell in self.found["cells"]:
            if where.items() <= cell.items() and {*self.args.methods} <= {*cell["methods"]}:
                return cell
        options = argparse.Namespace(out=self.path, rounds=9, seconds=self.args.seconds, advise=False)
        self.found["cells"].append(measure(options, {**where, "part": 1, "parts": 1}, self.args.methods))
        self.save()
        return self.found["cells"][-1]

    def mbits(self) -> list[float]:
        """The links' rates."""
        return self.args.mbit or [self.mbit_for(share) for share in self.args.shares]

    def mbit_for(self, share: float) -> float:
        """The rate at which plain DDP spends so many per cent of a step on the network; three digits of it.

        Its step is taken to be that on a link that is not shaped, and the bytes that it sends at this rate.
        """
        plain = self.cell(None)["methods"][PLAIN]
        network_s = median(plain["seconds"]) * share / (100 - share)
        return float(f"{8e-6 * HEADERS * plain['wire_bytes'] / network_s:.3g}")


def longer(steps: int) -> int:
    return math.ceil(LONGER * steps / EVERY) * EVERY


def steps_to(curve: list[list[float]], target: float) -> float:
    """Steps until the loss is first at the target, between evaluations on a straight line; infinite if it never is."""
    for (s0, l0, _), (s1, l1, _) in zip(curve, curve[1:], strict=False):
        if l1 <= target:
            return s0 + (s1 - s0) * min(1.0, max(0.0, (l0 - target) / (l0 - l1) if l0 > l1 else 1.0))
    return math.inf


def tune(results: Results) -> None:
    args = results.args
    results.do([results.run(m, lr, args.steps) for m in args.methods for lr in args.lrs])
    results.do([results.run(m, results.best(m, args.steps)["lr"], longer(args.steps)) for m in args.methods])
    for seed in range(1, args.seeds):
        best = [results.best(m) for m in args.methods]
        results.do([results.run(b["method"], b["lr"], b["steps"], seed) for b in best])


def needed(results: Results, method: str) -> tuple[float, float, float]:
    """Steps until the target, mean over the seeds; how many seeds got there; the mean loss at the end."""
    best = results.best(method)
    runs = results.runs(method=method, lr=best["lr"], steps=best["steps"])
    steps = [steps_to(r["curve"], results.target()) for r in runs]
    there = [s for s in steps if math.isfinite(s)]
    return (mean(there) if there else math.inf), len(there) / len(runs), mean(r["curve"][-1][1] for r in runs)


def report(results: Results) -> list[Record]:
    """The table of each link."""
    args, rows = results.args, []
    unshaped = results.cell(None)
    own = median(unshaped["methods"][PLAIN]["seconds"])
    print(f"\n{args.task}, {args.ranks} ranks: held-out loss of {results.target():.4f}, where plain DDP ends")
    for mbit in results.mbits():
        cell = results.cell(mbit)
        plain_s = median(cell["methods"][PLAIN]["seconds"])
        base = needed(results, PLAIN)[0] * plain_s
        print(f"\n{mbit:g} Mb/s: plain DDP spends {1 - own / plain_s:.0%} of a step on the network")
        print(f"{'':26}{'lr':>8}{'steps':>8}{'ms a step':>11}{'seconds':>10}{'sooner':>9}{'MB':>10}{'last loss':>17}")
        for method in args.methods:
            best, (steps, there, last) = results.best(method), needed(results, method)
            way = cell["methods"][method]
            step_s = median(way["seconds"])
            row = {"share": 1 - own / plain_s, "mbit": mbit, "method": method, "lr": best["lr"], "steps": steps}
            row |= {"seconds": steps * step_s, "sooner": base / (steps * step_s), "bytes": steps * way["wire_bytes"]}
            rows.append(row | {"step_s": step_s, "final_loss": last, "seeds_there": there})
            line = f"{method:26}{best['lr']:8g}"
            if math.isfinite(steps):
                line += f"{steps:8.0f}{step_s * 1e3:11.1f}{row['seconds']:10.1f}{row['sooner']:8.2f}x"
                line += f"{row['bytes'] / 1e6:10.1f}"
            else:
                line += f"{'never':>8}{step_s * 1e3:11.1f}{'':29}"
            print(f"{line}{last:17.4f}" + (f"   {there:.0%} of the seeds" if 0 < there < 1 else ""))
    return rows


def draw(results: Results, path: Path) -> None:
    """Loss against seconds, a panel for each link."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    args, mbits = results.args, results.mbits()
    figure, panels = pyplot.subplots(
        1, len(mbits), figsize=(5.4 * len(mbits), 5), sharey=True, layout="constrained", squeeze=False
    )
    for panel, mbit in zip(panels[0], mbits, strict=True):
        cell = results.cell(mbit)
        for index, method in enumerate(args.methods):
            curve, step_s = results.best(method)["curve"][1:], median(cell["methods"][method]["seconds"])
            style = "-" if index < 10 else "--"
            panel.plot([s * step_s for s, _, _ in curve], [loss for _, loss, _ in curve], style, label=method)
        panel.axhline(results.target(), color="k", lw=0.7)
        panel.set(xscale="log", xlabel="seconds", title=f"{mbit:g} Mb/s")
        panel.grid(alpha=0.3)
    panels[0][0].set(ylabel=f"held-out loss at x, {args.task}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def live(results: Results) -> None:
    """One method on a link of one rate, end to end, beside the product."""
    args = results.args
    cell, best = results.cell(args.live_mbit or results.mbit_for(90.0)), results.best(args.live)
    run = results.run(args.live, best["lr"], best["steps"])
    (found,) = results.do([run], f"{cell['rate_mbit']:g}")
    step_s, (_, loss, seconds) = median(cell["methods"][args.live]["seconds"]), found["curve"][-1]
    print(f"\n{args.live}, lr {best['lr']:g}, {cell['rate_mbit']:g} Mb/s: {best['steps']} steps")
    print(f"took {seconds:.1f} s; the product says {best['steps'] * step_s:.1f} s")
    print(f"held-out loss {loss:.4f}; on links that are not shaped {best['curve'][-1][1]:.4f}")
    results.found.setdefault("live", []).append({**found, "rate_mbit": cell["rate_mbit"], "step_s": step_s})
    results.save()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--data", type=Path, default=Path(".cache/fashion-mnist"), help="folder with Fashion-MNIST's four IDX files")
    add("--ranks", type=int, default=4)
    add("--steps", type=int, default=256, help=f"of plain DDP, a multiple of {EVERY}")
    add("--lrs", type=float, nargs="+", help="the budget (default: three for each task)")
    add("--seeds", type=int, default=1)
    add("--methods", choices=METHODS, nargs="+", metavar="NAME", help="default: all; in quotes, as in the table")
    add("--shares", type=float, nargs="+", default=[50.0, 90.0, 97.0], help="per cent")
    add("--mbit", type=float, nargs="+", help="rates, in place of --shares")
    add("--seconds", type=float, default=90.0, help="after which no further round of measuring steps begins")
    add("--live", choices=METHODS, metavar="NAME", help="train this method on a shaped link, once all is measured")
    add("--live-mbit", type=float, help="of --live (default: that of 90 %% on the network)")
    add("--out", type=Path, help="default: .cache/time_to_loss_TASK.json")
    add("--train", type=Path, help=argparse.SUPPRESS)
    add("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = methods_for(WORKLOADS[args.task])
    args.methods = [m for m in args.methods or known if m in known and not METHODS[m].adamw]
    args.lrs = args.lrs or LRS[args.task]
    args.out = args.out or Path(f".cache/time_to_loss_{args.task}.json")
    if PLAIN not in args.methods:
        args.methods.insert(0, PLAIN)
    if args.live and args.live not in args.methods:
        parser.error(f"--live {args.live!r} is not among --methods")
    if args.steps < EVERY or args.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}, got {args.steps}")
    if not all(0 < share < 100 for share in args.shares):
        parser.error("a share is between 0 and 100 per cent")
    if args.task == "resnet" and not args.data.is_dir():
        parser.error(f"no folder {args.data}: `make .cache/fashion-mnist/.complete` fetches the data")
    return args


def main() -> None:
    args = parse()
    if args.train:
        train_all(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what is under way, too
    results = Results(args.out, args)
    tune(results)
    results.found["rows"] = for_json(report(results))
    results.save()
    draw(results, args.out.with_suffix(".png"))
    print(f"\nnumbers in {args.out}, curves in {args.out.with_suffix('.png')}")
    if args.live:
        live(results)


if __name__ == "__main__":
    main()
