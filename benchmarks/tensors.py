"""What a step costs with few and with many tensors, and what the watch over x costs in it: real gloo ranks.

    python benchmarks/tensors.py [--ranks 2] [--millions 10,100] [--tensors 100,1000,10000] [--cap-mb 25,0.001]
                                 [--batch 32] [--rounds 7]

Of each model of so many million parameters in so many tensors, with DDP's buckets of so many MB: the step of plain DDP
and of SAEF sign, and of the latter the share, in plain steps, of what keeps the parameters x whenever a user can look:

    window    x_half into the parameters and out again, with versions that autograd sees
    watch     has what is trained changed, its layout, its groups
    x         was x written to: fingerprints of all of it
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, interleaved
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

PARTS = {
    "window": [("weights", "enter"), ("weights", "leave"), ("weights", "committed")],
    "watch": [("_watch", "changes"), ("_watch", "check_groups")],
    "x": [("weights", "step_ahead"), ("weights", "absorb"), ("weights", "_marks_now")],
}


class Layers(nn.Module):
    """Square layers that add to their input, so that many of them train."""

    def __init__(self, numel: int, tensors: int) -> None:
        super().__init__()
        width = max(1, round(sqrt(numel / (tensors // 2))))
        self.width, self.layers = width, nn.ModuleList(nn.Linear(width, width) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.01 * torch.tanh(layer(x))
        return x


def make(numel: int, tensors: int, cap_mb: float, batch: int, with_saef: bool) -> tuple[Callable[[], None], Any]:
    torch.manual_seed(0)
    net = Layers(numel, tensors)
    model = DDP(net, bucket_cap_mb=cap_mb)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    state = saef.SAEFState(model, optimizer) if with_saef else None
    if state is not None:
        model.register_comm_hook(state, saef_hook)
    x = torch.randn(batch, net.width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, state


@contextmanager
def timed(state: Any) -> Iterator[dict[str, float]]:
    """Seconds in each of PARTS, without what one calls of another: of this thread, which may wait for others."""
    spent: dict[str, float] = defaultdict(float)
    running: list[str] = []
    restore = []
    for part, methods in PARTS.items():
        for owner_name, name in methods:
            owner = getattr(state.engine, owner_name)
            original = getattr(owner, name)

            def run(*args: Any, part: str = part, original: Any = original, **more: Any) -> Any:
                start = time.thread_time()
                running.append(part)
                try:
                    return original(*args, **more)
                finally:
                    running.pop()
                    took = time.thread_time() - start
                    spent[part] += took
                    if running:
                        spent[running[-1]] -= took

            setattr(owner, name, run)
            restore.append((owner, name))
    yield spent
    for owner, name in restore:
        delattr(owner, name)


def measure(numel: int, tensors: int, cap_mb: float, args: argparse.Namespace) -> str:
    plain, _ = make(numel, tensors, cap_mb, args.batch, with_saef=False)
    ours, state = make(numel, tensors, cap_mb, args.batch, with_saef=True)
    work = {"plain": plain, "saef": ours}
    seconds = interleaved(work, args.rounds, barrier=dist.barrier, warm_up=2)
    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        dist.barrier()
        with timed(state) as spent:
            ours()
        for part in PARTS:
            shares[part].append(spent[part])
    unit = median(seconds["plain"])
    parts = "".join(f"{median(shares[part]) / unit:9.2%}" for part in PARTS)
    together = sum(median(shares[part]) for part in PARTS) / unit
    buckets = len(state.engine.sending._plans)
    return (
        f"{numel / 1e6:8.0f} M{tensors:9,}{buckets:9,}{unit * 1e3:10.1f} ms{median(seconds['saef']) / unit:8.2f}"
        f"{parts}{together:10.2%}"
    )


def run_rank(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    if rank == 0:
        print(describe())
        print(
            f"step      {args.ranks} gloo ranks, 1 thread each; batch {args.batch}; {args.rounds} interleaved rounds\n"
        )
        print(f"parameters  tensors    plans      plain    saef   {'   '.join(PARTS):>22}   together", flush=True)
    for millions in args.millions:
        for tensors in args.tensors:
            for cap_mb in args.cap_mb:
                line = measure(int(millions * 1e6), tensors, cap_mb, args)
                if rank == 0:
                    print(line, flush=True)
    dist.destroy_process_group()


def numbers(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--millions", type=numbers, default=[10.0, 100.0])
    parser.add_argument("--tensors", type=lambda words: [int(n) for n in numbers(words)], default=[100, 1000, 10_000])
    parser.add_argument("--cap-mb", type=numbers, default=[25.0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
