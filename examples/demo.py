"""Five ways to train the same network on the same digits, on four local ranks: a table and a picture.

    python demo.py [--data FOLDER] [--epochs 30] [--picture demo.png]

The training loop is the one in `train_ddp.py`; every method sees the same batches from the same start.
The first run compiles saef's kernels at the first step of "EF sign"; later runs find them on disk.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

import local_ranks
import train_ddp
from data import load

METHODS = {
    "full precision": ["--method", "full"],
    "EF sign": ["--method", "ef-sign"],
    "SAEF sign": ["--method", "saef-sign"],
    "EF top-1 %": ["--method", "ef-topk"],
    "SAEF top-1 %": ["--method", "saef-topk"],
}
COLOURS = {"full precision": "black", "EF sign": "tab:cyan", "SAEF sign": "tab:blue"}
COLOURS |= {"EF top-1 %": "tab:orange", "SAEF top-1 %": "tab:red"}


def work(data: str, epochs: int, seed: int) -> dict[str, list[dict]]:
    """Runs on every rank: all methods, one after the other."""
    dataset = load(data)
    results = {}
    for name, flags in METHODS.items():
        args = train_ddp.parse([*flags, "--data", data, "--epochs", str(epochs), "--seed", str(seed)])
        results[name] = train_ddp.train(args, dataset, torch.device("cpu"), label=f"{name:14}")
    return results


def table(results: dict[str, list[dict]]) -> str:
    lines = [f"{'method':16}{'training loss':>15}{'test accuracy':>15}{'bytes/step/rank':>17}{'ratio':>8}"]
    for name, records in results.items():
        last = records[-1]
        lines.append(
            f"{name:16}{last['loss']:15.4f}{last['accuracy']:13.1f} %"
            f"{last['bytes_per_step']:17,.0f}{last['ratio']:7.1f}x"
        )
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Training loss against epochs, and against the bytes that one rank sent."""
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, key, label in (
        (panels[0], "epoch", "epochs"),
        (panels[1], "megabytes", "megabytes sent by each rank (log scale)"),
    ):
        for name, records in results.items():
            across = [r["bytes"] / 1e6 if key == "megabytes" else r["epoch"] for r in records]
            style = "--" if name.startswith("EF") else "-"
            panel.plot(across, [r["loss"] for r in records], style, color=COLOURS[name], label=name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss at x (log scale)")
    panels[0].set_yscale("log")
    panels[1].set_xscale("log")
    figure.suptitle("ResNet-8, four DDP ranks, total batch 128")
    # Below the panels: inside, it would lie over some curve whatever the data.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train_ddp.HELP_FORMAT)
    parser.add_argument("--data", default="digits", help='"digits" or a folder; see data.py')
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    args = parser.parse_args()

    results = local_ranks.run(work, args.data, args.epochs, args.seed)
    print(table(results))
    print("ratio: what plain DDP sends, divided by what the method sends")
    draw(results, args.picture)
    print(f"picture saved to {args.picture.resolve()}")


if __name__ == "__main__":
    main()
