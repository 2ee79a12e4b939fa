"""SAEF's Table 1 at scale: ResNet-56, eight workers, top-1 % and scaled sign both ways, on one GPU in minutes.

    python table1.py --data FOLDER --seconds-per-row 30
    python table1.py --data FOLDER --time                  # milliseconds a step of each --way, and nothing else
    python table1.py --data digits --device cpu --width 4 --blocks 1 --steps 20

The paper's setting: CIFAR-100 (any folder that `data.py` reads will do), total batch 128, momentum 0.9, weight decay
5e-4, learning rate 0.1, divided by 10 after half and after three quarters of the run, double-way, one block a layer;
random crops (the images padded by 4 pixels of zeros, by 2 if they are smaller than CIFAR's) and flips. It trains for
200 epochs; how long this does is set once, for all rows alike. The K workers are a list in this one process
(`one_device.py`), each with batch norm on its own 16 images; all rows see the same images, crops and flips.

Test accuracy on all test images and training loss on the first 5,000 training images, neither cropped nor flipped, at
x, with batch norm statistics estimated at x on these 5,000. As in the paper's table the accuracy is the best up to the
first decay; the one at the end stands beside it. Bytes are those that a worker sends in a step, if K ranks share the
server's part (`exchange="sharded"`), to the other K - 1: for full precision that is a ring all-reduce.

Each row is written to --out once it is there. Started again with the same settings, the rows in the file are kept.
"""

import argparse
import json
import os
import platform
import re
import time
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import saef
from data import Dataset, Images, load
from one_device import WAYS, Workers, capture
from resnet import ResNet

EVALUATION_IMAGES = 5000
CURVE = 48  # points of a loss curve


class Method(NamedTuple):
    compressor: saef.Compressor
    ahead: float
    period: int | None = None  # of AllReduce; None: p = inf
    paper: float | None = None  # Table 1: best test accuracy up to epoch 100 of 200, CIFAR-100, top-1 %


TOP, SIGN = saef.TopK(0.01, block="layer"), saef.ScaledSign(block="layer")
METHODS = {
    "full precision": Method(saef.Identity(), ahead=0.0),  # C(v) = v: momentum SGD, see test_table1.py
    "EF top-1 %": Method(TOP, ahead=0.0, paper=50.00),
    "SAEF top-1 %, p = inf": Method(TOP, ahead=1.0, paper=60.59),
    "SAEF top-1 %, p = 20": Method(TOP, ahead=1.0, period=20, paper=63.96),
    "SAEF top-1 %, p = 1": Method(TOP, ahead=1.0, period=1, paper=65.89),
    "EF sign": Method(SIGN, ahead=0.0),
    "SAEF sign, p = inf": Method(SIGN, ahead=1.0),
    "SAEF sign, p = 20": Method(SIGN, ahead=1.0, period=20),
    "SAEF sign, p = 1": Method(SIGN, ahead=1.0, period=1),
}
SLOWEST = "SAEF top-1 %, p = 1"


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help='"digits" or a folder with CIFAR, Fashion-MNIST or MNIST files')
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds-per-row", type=float, default=30.0, help="of training and evaluating")
    length.add_argument("--epochs", type=float)
    length.add_argument("--steps", type=int)
    add("--workers", type=int, default=8)
    add("--batch", type=int, default=128, help="total over all workers")
    add("--lr", type=float, default=0.1)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--width", type=int, default=16, help="channels of the network's first stage")
    add("--blocks", type=int, default=9, help="residual blocks a stage: 9 is ResNet-56, 1 is ResNet-8")
    add("--seed", type=int, default=0)
    add("--images", type=int, help="only so many training and test images")
    add("--evaluations", type=int, default=8, help="in a run; one of an even number is at the first decay")
    add("--way", choices=WAYS, default="streams", help="how the K gradients are taken: see one_device.py")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--no-graph", dest="graph", action="store_false", help="do without a CUDA graph of the step")
    add("--time", action="store_true", help="time a step of each --way, and stop")
    add("--out", type=Path, default=Path("docs/table1.json"))
    args = parser.parse_args(arguments)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.graph &= args.device == "cuda"
    if args.batch % args.workers:
        parser.error(f"--batch {args.batch} is not a multiple of --workers {args.workers}")
    return args


# ---- images -------------------------------------------------------------------------------------------------------


class Batches:
    """Training batches, cropped and flipped at random. What is random is drawn before, and the same for all rows.

    Attributes:
        plan: [T, batch, 4] int64: image, rows and columns that the crop is moved by, whether it is flipped.
        now: [batch, 4] int64: the step's row of the plan.
    """

    def __init__(self, split: Images, batch: int) -> None:
        self.pad = 4 if split.images.shape[-1] >= 32 else 2
        self.padded = F.pad(split.images, (self.pad,) * 4)
        self.labels, self.mean, self.std = split.labels, split.mean, split.std
        device, channels, size = self.padded.device, *split.images.shape[1:3]
        self.channel, self.span = torch.arange(channels, device=device), torch.arange(size, device=device)
        self.now = torch.zeros(batch, 4, dtype=torch.int64, device=device)
        self.plan = self.now[None]

    @property
    def per_epoch(self) -> int:
        return len(self.labels) // len(self.now)

    def draw(self, steps: int, seed: int) -> None:
        generator, batch = torch.Generator().manual_seed(seed), len(self.now)
        epochs = -(-steps // self.per_epoch)
        orders = [torch.randperm(len(self.labels), generator=generator) for _ in range(epochs)]
        index = torch.cat([order[: self.per_epoch * batch] for order in orders])[: steps * batch]
        moved = torch.randint(2 * self.pad + 1, (len(index), 2), generator=generator)
        flipped = torch.randint(2, (len(index), 1), generator=generator)
        self.plan = torch.cat([index[:, None], moved, flipped], 1).view(steps, batch, 4).to(self.now.device)

    def take(self) -> tuple[Tensor, Tensor]:
        """The images [batch, channels, height, width] and labels [batch] of `now`."""
        index, down, right, flipped = self.now[:, :, None].unbind(1)
        rows = down + self.span
        columns = right + torch.where(flipped == 1, self.span.flip(0), self.span)
        pixels = self.padded[
            index[:, :, None, None], self.channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
        return (pixels.to(self.mean.dtype) - self.mean) / self.std, self.labels[self.now[:, 0]]


def first_images(dataset: Dataset, count: int | None) -> Dataset:
    def cut(split: Images) -> Images:
        return Images(split.images[:count], split.labels[:count], split.mean, split.std)

    return Dataset(dataset.name, cut(dataset.train), cut(dataset.test), dataset.classes)


# ---- a row --------------------------------------------------------------------------------------------------------


class Run:
    """One row's workers with their batches, and the function that makes a step of them."""

    def __init__(self, method: Method, net: nn.Module, batches: Batches, args: Namespace) -> None:
        averaging = saef.AllReduce(method.period) if method.period else None
        decay = {"momentum": args.momentum, "weight_decay": args.weight_decay}
        self.workers = Workers(
            net, args.workers, method.compressor, method.ahead, averaging, lr=args.lr, way=args.way, **decay
        )
        self.batches = batches
        self.loss = torch.zeros((), dtype=self.workers.dtype, device=self.workers.device)  # sum since it was read
        self.step: Callable[[], None] = self.eager
        if args.graph:
            batches.now.copy_(batches.plan[0])
            workers = self.workers
            state = [*workers.state, self.loss]
            self.step = capture(self.eager, state, lambda: [workers.losses, workers.g, workers.x_tilde()])
            workers.check()

    def eager(self) -> None:
        images, labels = self.batches.take()
        K = self.workers.K
        self.workers.step(images.unflatten(0, (K, -1)), labels.unflatten(0, (K, -1)))
        self.loss.add_(self.workers.losses.mean())

    def advance(self, t: int, lr: float) -> None:
        """Step t."""
        self.workers.lr.fill_(lr)
        self.workers.begin(t)
        self.batches.now.copy_(self.batches.plan[t])
        self.step()

    def mean_loss(self, steps: int) -> float:
        """Mean training loss at x_half of the last `steps` steps, since it was asked for last."""
        mean = self.loss.item() / steps
        self.loss.zero_()
        return mean


def rate(t: int, steps: int, lr: float) -> float:
    """eta_t: divided by 10 after half and after three quarters of the run (the paper's epochs 100 and 150 of 200)."""
    return lr * 0.1 ** ((2 * t >= steps) + (4 * t >= 3 * steps))


@torch.no_grad()
def evaluate(net: nn.Module, workers: Workers, dataset: Dataset) -> dict[str, float]:
    """Training loss and test accuracy in per cent, at x."""
    for p, view in zip(net.parameters(), workers.tensors(workers.x), strict=True):
        p.copy_(view)
    count = min(EVALUATION_IMAGES, len(dataset.train))
    seen = [dataset.train.batch(slice(i, min(i + 1000, count))) for i in range(0, count, 1000)]
    update_bn((images for images, _ in seen), net)
    net.eval()
    loss = sum(F.cross_entropy(net(images), labels, reduction="sum") for images, labels in seen)
    tests = (dataset.test.batch(slice(i, i + 1000)) for i in range(0, len(dataset.test), 1000))
    correct = sum((net(images).argmax(1) == labels).sum() for images, labels in tests)
    net.train()
    return {"loss": loss.item() / count, "accuracy": 100 * correct.item() / len(dataset.test)}


def train(label: str, net: nn.Module, batches: Batches, dataset: Dataset, args: Namespace, steps: int) -> dict:
    """A row of the table."""
    start = time.perf_counter()
    net = deepcopy(net)
    run = Run(METHODS[label], net, batches, args)
    seconds = {"setup": time.perf_counter() - start, "training": 0.0, "evaluation": 0.0}
    print(f"{label:24} ready after {seconds['setup']:.1f} s", flush=True)
    points = {steps * i // CURVE for i in range(1, CURVE + 1)} - {0}
    evaluations = {steps * i // args.evaluations for i in range(1, args.evaluations + 1)} - {0}
    row: dict = {"evaluations": [], "curve": []}
    start, read = time.perf_counter(), 0
    for t in range(steps):
        run.advance(t, rate(t, steps, args.lr))
        done = t + 1
        if done in points:
            row["curve"].append([done, round(run.mean_loss(done - read), 5)])
            read = done
        if done in evaluations:
            synchronize(args)
            middle = time.perf_counter()
            found = {"step": done} | evaluate(net, run.workers, dataset)
            end = time.perf_counter()
            seconds["training"] += middle - start
            seconds["evaluation"] += end - middle
            start = end
            row["evaluations"].append(found)
            print(
                f"{label:24} step {done} of {steps}  training loss {found['loss']:.4f}  "
                f"test accuracy {found['accuracy']:.2f} %  {seconds['training']:.1f} s",
                flush=True,
            )
    run.workers.check()
    early = [e["accuracy"] for e in row["evaluations"] if 2 * e["step"] <= steps]
    return row | {
        "loss": found["loss"],
        "accuracy": found["accuracy"],
        "accuracy_before_decay": max(early, default=None),
        "bytes_per_step": bytes_sent(METHODS[label], net, args.workers),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def bytes_sent(method: Method, net: nn.Module, K: int) -> float:
    """A step and worker, to the other ranks: C(D_k) to the servers, R from its own, and the errors' all-reduce."""
    numels = [p.numel() for p in net.parameters()]
    averaging = 4 * sum(numels) / method.period if method.period else 0.0
    return 2 * (K - 1) / K * (saef.message_bytes(method.compressor, numels) + averaging)


# ---- how long -----------------------------------------------------------------------------------------------------


def synchronize(args: Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def seconds_per_step(run: Run, args: Namespace, steps: int) -> float:
    """After as many steps to warm up; moves the weights."""
    for begin in (0, steps):
        synchronize(args)
        start = time.perf_counter()
        for t in range(begin, begin + steps):
            run.advance(t, args.lr)
    synchronize(args)
    return (time.perf_counter() - start) / steps


def steps_in(seconds: float, net: nn.Module, batches: Batches, dataset: Dataset, args: Namespace) -> int:
    """How many steps of the slowest row, with its evaluations, take so long."""
    net, timed = deepcopy(net), 20 if args.device == "cuda" else 2
    batches.draw(2 * timed, args.seed)
    run = Run(METHODS[SLOWEST], net, batches, args)
    step = seconds_per_step(run, args, timed)
    for _ in range(2):
        start = time.perf_counter()
        evaluate(net, run.workers, dataset)
    evaluation = time.perf_counter() - start
    steps = max(args.evaluations, int((seconds - args.evaluations * evaluation) / step))
    print(f"{1e3 * step:.2f} ms a step of {SLOWEST}, {evaluation:.2f} s an evaluation: {steps} steps a row", flush=True)
    return steps


def time_ways(net: nn.Module, batches: Batches, args: Namespace) -> None:
    batches.draw(100, args.seed)
    for way in WAYS:
        start = time.perf_counter()
        try:
            run = Run(METHODS[SLOWEST], net, batches, Namespace(**vars(args) | {"way": way}))
            ready = time.perf_counter() - start
            step = seconds_per_step(run, args, 50)
            print(f"{way:16} {1e3 * step:8.2f} ms a step, ready after {ready:.1f} s", flush=True)
        except RuntimeError as error:  # one that does not work here must not hide the others
            print(f"{way:16} {error}", flush=True)


# ---- results ------------------------------------------------------------------------------------------------------


def settings(args: Namespace, net: nn.Module, batches: Batches, dataset: Dataset) -> dict:
    """All that a row depends on but its method and the number of steps."""
    chosen = "workers batch lr momentum weight_decay width blocks seed images evaluations way device".split()
    return {name: getattr(args, name) for name in chosen} | {
        "data": f"{dataset.name}, {len(dataset.train)} training and {len(dataset.test)} test images of "
        + "x".join(map(str, dataset.train.images.shape[1:])),
        "parameters": sum(p.numel() for p in net.parameters()),
        "augmentation": f"random crops of the images padded by {batches.pad}, random flips",
        "decay": "learning rate divided by 10 after 1/2 and 3/4 of the steps",
        "statistics": f"batch norm's, estimated at x on the first {EVALUATION_IMAGES} training images",
        "tf32_convolutions": args.device == "cuda" and torch.backends.cudnn.allow_tf32,
    }


def machine(args: Namespace) -> dict:
    """On what a row was made."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    versions = {"saef": saef.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if args.device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"machine": name, "graph": args.graph} | versions


def resume(path: Path, wanted: dict, steps: int | None) -> dict:
    """What the file holds, if it is of these settings. A run whose length is left open takes over the file's."""
    if not path.exists():
        return {"settings": wanted, "steps": steps, "rows": {}}
    found = json.loads(path.read_text(encoding="utf-8"))
    theirs = found["settings"] | {"steps": found["steps"]}
    ours = wanted | {"steps": theirs["steps"] if steps is None else steps}
    if others := [f"{k} {theirs.get(k)!r}, not {v!r}" for k, v in ours.items() if theirs.get(k) != v]:
        raise SystemExit(f"{path} has rows with other settings ({'; '.join(others)}): give another --out, or remove it")
    return found


def save(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = re.sub(r"\[\s+(\d+),\s+(\S+)\s+\]", r"[\1, \2]", json.dumps(results, indent=1))  # a point of a curve a line
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def markdown(results: dict) -> str:
    half = f"up to step {results['steps'] // 2}"
    lines = [
        f"| method | bytes/step/worker | training loss | test accuracy, % | best {half}, % | the paper's Table 1, % |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in results["rows"].items():
        paper = METHODS[label].paper
        early = row["accuracy_before_decay"]
        cells = [
            label,
            f"{row['bytes_per_step']:,.0f}",
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.2f}",
            "" if early is None else f"{early:.2f}",
            "" if paper is None else f"{paper:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    dataset = first_images(load(args.data), args.images).to(device)
    batches = Batches(dataset.train, args.batch)
    torch.manual_seed(args.seed)
    net = ResNet(dataset.channels, dataset.classes, args.width, args.blocks).to(device)
    if args.time:
        time_ways(net, batches, args)
        return

    steps = round(args.epochs * batches.per_epoch) if args.epochs else args.steps
    results = resume(args.out, settings(args, net, batches, dataset), steps)
    steps = results["steps"] or steps_in(args.seconds_per_row, net, batches, dataset, args)
    results |= {"steps": steps, "epochs": steps / batches.per_epoch}
    batches.draw(steps, args.seed)
    for label in METHODS:
        if label not in results["rows"]:
            results["rows"][label] = train(label, net, batches, dataset, args, steps) | machine(args)
            save(args.out, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
