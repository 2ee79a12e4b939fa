"""MixML's Figures 2 and 3: how long protocols take to mix, and what that does to training.

    python mixing.py [--data FOLDER] [--epochs 100] [--out mixing]

Figure 3: the mixing time of five protocols against the number of workers, from their operators (up to 64 workers)
and measured on live groups of 2 to 8 gloo ranks. Figure 2: eight ranks train a ResNet-8 by local SGD, which they
average at a lower frequency or by a slack matrix, both at mixing times of 8 to 8000 events: training loss and
stationary distance. Beside it, in the table alone, both rings and the asynchronous parameter server. Two pictures and
two CSV files in the folder --out.
"""

import argparse
import copy
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import local_ranks
import saef
from data import Dataset, load
from resnet import ResNet
from train_ddp import evaluate

PROTOCOLS = {
    "AllReduce": saef.AllReduce(1),
    "Local step (m = 2)": saef.LocalStep(2),
    "Async parameter server": saef.AsyncParameterServer(),
    "Ring": saef.Ring(),
    "Async ring": saef.AsyncRing(),
}
OPERATORS_AT = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
LIVE_AT = (2, 3, 4, 5, 6, 7, 8)

WORKERS = 8
BATCH = 128  # of all workers together
LR = 0.1
FACTORS = (1, 10, 100, 1000)  # by which the mixing time is longer than the all-reduce's, 8 events


def averaged_by() -> dict[tuple[str, int], saef.Averaging]:
    """(method, t_mix) -> protocol. Slack's gamma is such that its distance halves in exactly `factor` rounds."""
    found = {}
    for factor in FACTORS:
        protocols = {"reduced frequency": saef.AllReduce(factor), "slack": saef.Slack(1 - 2 ** (-1 / factor))}
        if factor == 1:
            protocols = dict.fromkeys(protocols, saef.AllReduce(1))
        for method, protocol in protocols.items():
            found[method, round(saef.mixing_time(protocol, WORKERS))] = protocol
    for method, protocol in (("ring", saef.Ring()), ("async ring", saef.AsyncRing())):
        found[method, round(saef.mixing_time(protocol, WORKERS))] = protocol
    return found


# -- Figure 3 ---------------------------------------------------------------------------------------------------------


def row(name: str, n: int, how: str, time: saef.MixingTime) -> dict:
    return {
        "protocol": name,
        "workers": n,
        "how": how,
        "mean": float(time),
        "p10": time.quantile(0.1),
        "p90": time.quantile(0.9),
    }


def from_operators(seeds: int, largest: int) -> list[dict]:
    cases = [(name, n) for n in OPERATORS_AT if n <= largest for name in PROTOCOLS]
    bar = tqdm(cases, desc="operators", unit="protocol")
    return [row(name, n, "operators", saef.mixing_time(PROTOCOLS[name], n, seeds=seeds)) for name, n in bar]


def live(seeds: int, largest: int) -> list[dict]:
    """Runs on every rank; one rank more than the largest number of workers, for the server."""
    rows = []
    for n in tqdm([n for n in LIVE_AT if n <= largest], desc="live groups", disable=dist.get_rank() > 0):
        groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (n, n + 1)}
        for name, protocol in PROTOCOLS.items():
            ranks = n + protocol.parameter_servers
            if dist.get_rank() < ranks:
                rows.append(row(name, n, "live", saef.estimate_mixing_time(protocol, groups[ranks], seeds=seeds)))
    return rows


# -- Figure 2 ---------------------------------------------------------------------------------------------------------


def batches(dataset: Dataset, worker: int, epoch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A worker's share of each batch of an epoch."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(1000 * epoch + seed))
    share = BATCH // WORKERS
    for start in range(0, len(order) // BATCH * BATCH, BATCH):
        yield dataset.train.batch(order[start + worker * share : start + (worker + 1) * share])


def backward(net: ResNet, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    return loss.detach()


def curve(losses: list[list[torch.Tensor]], distances: list[float]) -> list[dict]:
    """A record for each epoch: the mean loss of all workers' batches, and the distance."""
    means = torch.tensor([sum(epoch) / len(epoch) if epoch else 0.0 for epoch in losses])
    dist.all_reduce(means)
    rows = zip((means / WORKERS).tolist(), distances, strict=True)
    return [{"epoch": i, "loss": loss, "distance": distance} for i, (loss, distance) in enumerate(rows, 1)]


def train(dataset: Dataset, protocol: saef.Averaging, epochs: int, seed: int) -> list[dict]:
    """One rank's local SGD; the last record has the accuracy of the workers' average."""
    torch.manual_seed(seed)
    net = ResNet(dataset.channels, dataset.classes)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    averager = saef.ModelAverager(protocol)
    losses, distances = [], []
    for epoch in range(epochs):
        losses.append([])
        for images, labels in batches(dataset, dist.get_rank(), epoch, seed):
            losses[-1].append(backward(net, images, labels))
            optimizer.step()
            averager.average_parameters(net.parameters())
        distances.append(saef.stationary_distance(net.parameters()))
    records = curve(losses, distances)
    consensus = copy.deepcopy(net)
    saef.ModelAverager(saef.AllReduce(1)).average_parameters(consensus.parameters())
    records[-1]["accuracy"] = evaluate(consensus, dataset)["accuracy"]
    return records


def parameter_server(data: str, epochs: int, seed: int) -> list[dict]:
    """Runs on every rank, one more than there are workers: rank 0 serves, the others train without a barrier."""
    dataset = load(data)
    torch.manual_seed(seed)
    net = ResNet(dataset.channels, dataset.classes)
    server = saef.ParameterServer(net.parameters())
    losses: list[list[torch.Tensor]] = [[] for _ in range(epochs)]
    if server.is_server:
        # each push is one worker's gradient, where an average of models has all of them in one
        server.serve(torch.optim.SGD(net.parameters(), lr=LR / WORKERS))
    else:
        for epoch in range(epochs):
            for images, labels in batches(dataset, server.rank - 1, epoch, seed):
                server.pull()
                losses[epoch].append(backward(net, images, labels))
                server.push()
        server.leave()
    records = curve(losses, [0.0] * epochs)
    if server.is_server:
        records[-1]["accuracy"] = evaluate(net, dataset)["accuracy"]
    t_mix = round(saef.mixing_time(saef.AsyncParameterServer(), WORKERS))
    return [{"method": "async parameter server", "t_mix": t_mix, "accuracy": "", **r, "distance": ""} for r in records]


def weakly_consistent(data: str, epochs: int, seed: int) -> list[dict]:
    """Runs on every rank: all methods, one after the other."""
    dataset, rows, done = load(data), [], {}
    bar = tqdm(averaged_by().items(), desc="training", unit="run", disable=dist.get_rank() > 0)
    for (method, t_mix), protocol in bar:
        if protocol not in done:
            done[protocol] = train(dataset, protocol, epochs, seed)
        rows += [{"method": method, "t_mix": t_mix, "accuracy": "", **record} for record in done[protocol]]
    return rows


# -- tables and pictures ----------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_figure_3(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for i, name in enumerate(PROTOCOLS):
        ours = [r for r in rows if r["protocol"] == name]
        for how, style in (("operators", "-"), ("live", "o")):
            points = [r for r in ours if r["how"] == how]
            label = name if how == "operators" else None
            axes.plot([r["workers"] for r in points], [r["mean"] for r in points], style, color=f"C{i}", label=label)
            if how == "operators":
                spread = [[r[q] for r in points] for q in ("p10", "p90")]
                axes.fill_between([r["workers"] for r in points], *spread, color=f"C{i}", alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="mixing time, events")
    axes.set_xticks(sorted({r["workers"] for r in rows if r["workers"] not in (5, 7)}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_title("lines: from the operators, 10 to 90 % of seeds shaded; dots: live ranks", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_figure_2(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row", layout="constrained")
    for column, method in enumerate(("reduced frequency", "slack")):
        for t_mix in sorted({r["t_mix"] for r in rows if r["method"] == method}):
            chosen = [r for r in rows if (r["method"], r["t_mix"]) == (method, t_mix)]
            for panel, key in zip(panels[:, column], ("loss", "distance"), strict=True):
                points = [(r["epoch"], max(r[key], 1e-5)) for r in chosen]  # it is 0 after an all-reduce
                panel.plot(*zip(*points, strict=True), label=f"$t_{{mix}}$ = {t_mix}")
        panels[0, column].set(title=method, yscale="log")
        panels[1, column].set(xlabel="epochs", yscale="log")
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("stationary distance")
    panels[0, 1].legend()
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def report(figure_3: list[dict], figure_2: list[dict]) -> str:
    at = max(r["workers"] for r in figure_3 if r["how"] == "operators")
    lines = [f"{'mixing time, events':24}{'operators':>12}{'live':>12}{f'n = {at}':>12}"]
    both = max(r["workers"] for r in figure_3 if r["how"] == "live")
    for name in PROTOCOLS:
        mean = {(r["workers"], r["how"]): r["mean"] for r in figure_3 if r["protocol"] == name}
        columns = (mean[both, "operators"], mean[both, "live"], mean[at, "operators"])
        lines.append(f"{name:24}" + "".join(f"{value:12,.1f}" for value in columns))
    lines[0] += f"     (first two: n = {both})"
    lines += ["", f"{'training, 8 workers':24}{'t_mix':>12}{'loss':>12}{'distance':>12}{'accuracy':>12}"]
    for r in figure_2:
        if r["accuracy"] != "":
            distance = f"{r['distance']:12.3g}" if r["distance"] != "" else " " * 12
            numbers = f"{r['t_mix']:12,}{r['loss']:12.4f}{distance}{r['accuracy']:10.1f} %"
            lines.append(f"{r['method']:24}{numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help='"digits" or a folder; see data.py')
    parser.add_argument("--epochs", type=int, default=100, help="of Figure 2")
    parser.add_argument("--seed", type=int, default=0, help="of Figure 2")
    parser.add_argument("--seeds", type=int, default=100, help="of the random protocols in Figure 3")
    parser.add_argument("--workers", type=int, default=64, help="most workers in Figure 3")
    parser.add_argument("--live", type=int, default=8, help="most live workers in Figure 3")
    parser.add_argument("--out", type=Path, default=Path("mixing"), help="folder for pictures and CSV files")
    args = parser.parse_args()
    if args.epochs < 1 or args.workers < 2 or args.live < 2 or args.seeds < 1:
        sys.exit("mixing.py: needs --epochs and --seeds of at least 1, --workers and --live of at least 2")

    matplotlib.use("Agg")  # no display needed
    args.out.mkdir(parents=True, exist_ok=True)
    figure_3 = from_operators(args.seeds, args.workers)
    figure_3 += local_ranks.run(live, args.seeds, args.live, ranks=args.live + 1)
    write(args.out / "figure3.csv", figure_3)
    draw_figure_3(figure_3, args.out / "figure3.png")
    figure_2 = local_ranks.run(weakly_consistent, args.data, args.epochs, args.seed, ranks=WORKERS)
    figure_2 += local_ranks.run(parameter_server, args.data, args.epochs, args.seed, ranks=WORKERS + 1)
    write(args.out / "figure2.csv", figure_2)
    draw_figure_2(figure_2, args.out / "figure2.png")
    print(report(figure_3, figure_2))
    print(f"pictures and tables saved to {args.out.resolve()}")


if __name__ == "__main__":
    main()
