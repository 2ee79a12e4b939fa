"""FM14: step-ahead error feedback against plain error feedback on a small Fashion-MNIST task.

    python reproduce.py --data FOLDER [--out fm14.md]

FOLDER holds Fashion-MNIST's four IDX files. 12,800 training images mean-pooled to 14x14, ResNet-8 of width 8
(19,074 parameters), four local DDP ranks with the real hook, total batch 128, learning rate 0.1, momentum
0.9, weight decay 5e-4, 200 steps, double-way, one block a layer. Training loss on 5,000 images and test
accuracy at x, batch norm re-estimated: mean and standard deviation over the seeds. Exits with 1 if a stated
inequality fails.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
from tqdm import tqdm

import local_ranks
import train_ddp
from data import load

METHODS = {
    "full precision": ["--method", "full"],
    "EF top-1 %": ["--method", "ef-topk"],
    "SAEF top-1 %, p = inf": ["--method", "saef-topk"],
    "SAEF top-1 %, p = 20": ["--method", "saef-topk", "--averaging", "allreduce", "--period", "20"],
    "SAEF top-1 %, p = 1": ["--method", "saef-topk", "--averaging", "allreduce", "--period", "1"],
    "SAEF top-1 %, Rotating(20)": ["--method", "saef-topk", "--averaging", "rotating", "--period", "20"],
    "SAEF top-1 %, AllReduce(5)": ["--method", "saef-topk", "--averaging", "allreduce", "--period", "5"],
    "SAEF top-1 %, Rotating(5)": ["--method", "saef-topk", "--averaging", "rotating", "--period", "5"],
    "SAEF top-1 %, Ring()": ["--method", "saef-topk", "--averaging", "ring", "--period", "1"],
    "SAEF top-1 %, Ring(5)": ["--method", "saef-topk", "--averaging", "ring", "--period", "5"],
    "SAEF top-1 %, AsyncRing()": ["--method", "saef-topk", "--averaging", "async-ring", "--period", "1"],
    "EF sign": ["--method", "ef-sign"],
    "SAEF sign": ["--method", "saef-sign"],
}
# loss of the first minus loss of the second must be at least this
INEQUALITIES = [
    ("EF top-1 %", "SAEF top-1 %, p = inf", 0.20),
    ("SAEF top-1 %, p = inf", "SAEF top-1 %, p = 1", 0.03),
    ("full precision", "SAEF top-1 %, p = 1", -0.03),
    ("EF sign", "SAEF sign", 0.06),
]
# accuracies that must be within so many points of each other
CLOSE = [
    ("SAEF top-1 %, AllReduce(5)", f"SAEF top-1 %, {other}", 1.0) for other in ("Rotating(5)", "Ring()", "AsyncRing()")
]
NOTE = (
    "SAEF below full precision is the effect of averaging iterates: full precision with an average of its "
    "weights does as well. Averaging at p = 1 sends more bytes than full precision."
)


def work(data: str, steps: int, seeds: int) -> dict[str, list[dict]]:
    """Runs on every rank: all methods and seeds, one after the other; the last record of each run."""
    dataset = load(data, fm14=True)
    runs = [(name, seed) for seed in range(seeds) for name in METHODS]
    results = {name: [] for name in METHODS}
    with tqdm(runs, unit="run", disable=dist.get_rank() > 0) as bar:
        for name, seed in bar:
            bar.set_description(f"seed {seed}, {name}")
            flags = [*METHODS[name], "--steps", str(steps), "--eval-every", str(steps), "--seed", str(seed)]
            records = train_ddp.train(train_ddp.parse(flags), dataset, torch.device("cpu"))
            results[name] += records[-1:]
    return results


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def report(results: dict[str, list[dict]]) -> tuple[str, bool]:
    """The markdown table, then one line for each inequality; True if all hold."""
    lines = ["| method | training loss | test accuracy, % | bytes/step/rank | plain DDP's bytes / ours |"]
    lines.append("|---|---|---|---|---|")
    for name, records in results.items():
        loss = spread([r["loss"] for r in records], 3)
        accuracy = spread([r["accuracy"] for r in records], 1)
        per_step = records[-1]["bytes_per_step"]
        lines.append(f"| {name} | {loss} | {accuracy} | {per_step:,.0f} | {records[-1]['ratio']:.2f} |")
    lines += ["", NOTE, ""]
    passed = True
    for worse, better, margin in INEQUALITIES:
        gap = mean(r["loss"] for r in results[worse]) - mean(r["loss"] for r in results[better])
        passed &= gap >= margin
        verdict = "pass" if gap >= margin else "FAIL"
        lines.append(f"- {verdict}: loss of {worse} - {better}: {gap:.3f}, at least {margin:.2f} wanted")
    for one, other, margin in CLOSE:
        gap = mean(r["accuracy"] for r in results[other]) - mean(r["accuracy"] for r in results[one])
        passed &= abs(gap) <= margin
        verdict = "pass" if abs(gap) <= margin else "FAIL"
        lines.append(f"- {verdict}: accuracy of {other} - {one}: {gap:+.2f}, at most {margin:.0f} point wanted")
    return "\n".join(lines), passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train_ddp.HELP_FORMAT)
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST's four IDX files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()

    results = local_ranks.run(work, args.data, args.steps, args.seeds)
    text, passed = report(results)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
