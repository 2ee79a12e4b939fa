"""Ways to train the GPT of `train_gpt.py` with AdamW on four local ranks: a table and a picture.

    python lm.py [--data FILE] [--steps 300] [--batch 128] [--seeds 1] [--picture lm.png] [--methods adamw saef ef ...]

Every method sees the same batches from the same start, at the same learning rate. What is expected of them is compared
with what they did; with --check a difference ends the program with status 1.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

import local_ranks
import train_gpt

NAMES = {
    "adamw": "AdamW",
    "saef": "SAEF-AdamW, sign",
    "paper": "without the server's error",
    "plain-v": "with plain v",
    "ef": "EF-AdamW, sign",
    "saef-topk": "SAEF-AdamW, top-1 %",
}


EXPECTED = [  # (method, other, at least, at most): how far the first one's loss is above the other's
    ("saef", "adamw", None, 0.03),
    ("ef", "saef", 0.08, None),
    ("paper", "saef", 0.025, None),
]


def work(methods: list[str], flags: list[str], seeds: int) -> dict[str, list[list[dict]]]:
    """Runs on every rank: all methods and seeds, one after the other."""
    device = torch.device("cpu")
    return {
        method: [
            train_gpt.train(train_gpt.parse(["--method", method, *flags, "--seed", str(s)]), device)
            for s in range(seeds)
        ]
        for method in methods
    }


def table(results: dict[str, list[list[dict]]]) -> str:
    lines = [f"{'method':28}{'held-out loss':>20}{'bytes/step/rank':>17}{'ratio':>8}"]
    for method, runs in results.items():
        losses, last = torch.tensor([run[-1]["loss"] for run in runs]), runs[0][-1]
        spread = f" +- {losses.std():.3f}" if len(losses) > 1 else ""
        lines.append(
            f"{NAMES[method]:28}{f'{losses.mean():.3f}{spread}':>20}{last['bytes_per_step']:17,.0f}{last['ratio']:7.1f}x"
        )
    return "\n".join(lines)


def check(results: dict[str, list[list[dict]]]) -> tuple[list[str], bool]:
    """What is expected beside what came, a line each; and whether all of it did."""
    mean = {method: sum(run[-1]["loss"] for run in runs) / len(runs) for method, runs in results.items()}
    lines, good = [], True
    for method, other, least, most in EXPECTED:
        if method in mean and other in mean:
            found = mean[method] - mean[other]
            held = (least is None or found >= least) and (most is None or found <= most)
            bound = f"at least {least}" if most is None else f"at most {most}"
            lines.append(f"{NAMES[method]} is {found:+.3f} from {NAMES[other]}, {bound}: {'yes' if held else 'NO'}")
            good &= held
    return lines, good


def draw(results: dict[str, list[list[dict]]], path: Path) -> None:
    """Held-out loss of the first seed against steps, and against the bytes that one rank sent."""
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, key, label in (
        (panels[0], "step", "steps"),
        (panels[1], "bytes", "bytes sent by each rank (log scale)"),
    ):
        for method, (records, *_) in results.items():
            panel.plot([r[key] for r in records], [r["loss"] for r in records], label=NAMES[method])
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss at x")
    panels[1].set_xscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train_gpt.HELP_FORMAT)
    parser.add_argument("--data", help="a text (default: the sources of Python's standard library)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=[*NAMES])
    parser.add_argument("--steps", default="300")
    parser.add_argument("--lr", default="8e-3")
    parser.add_argument("--batch", default="128", help="total over the four ranks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=Path("lm.png"))
    parser.add_argument("--check", action="store_true", help="status 1 if something is not as expected")
    args = parser.parse_args()
    flags = ["--steps", args.steps, "--lr", args.lr, "--batch", args.batch]
    results = local_ranks.run(work, args.methods, flags + (["--data", args.data] if args.data else []), args.seeds)
    lines, good = check(results)
    print(table(results), *lines, sep="\n")
    print("ratio: what plain DDP sends, divided by what the method sends")
    draw(results, args.picture)
    print(f"picture saved to {args.picture.resolve()}")
    if args.check and not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
