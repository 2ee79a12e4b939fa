"""What a start costs: importing saef beside torch, and the first step with the CPU kernels compiled or not.

    python benchmarks/start.py [--rounds 5] [--ranks 1 4]

Imports are whole processes in turn, `import torch` beside `import saef`: medians, quartiles, and their difference. The
first step is from creating the state to the end of one DDP step, on real gloo ranks: cold, with an empty cache of
compiled kernels, as in a fresh container; and warm, again with that cache. The slowest rank counts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe, table
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook


def imports(rounds: int) -> dict[str, list[float]]:
    """Seconds of a process that only imports, each in turn; the first round, from disk, does not count."""
    found: dict[str, list[float]] = {"import torch": [], "import saef": []}
    for r in range(1 + rounds):
        for words, seconds in found.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", words], check=True)
            if r:
                seconds.append(time.perf_counter() - start)
    return found


def first_step(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, data = DDP(net), torch.randn(8, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    dist.barrier()
    start = time.perf_counter()
    state = saef.SAEFState(model, optimizer)
    model.register_comm_hook(state, saef_hook)
    model(data).sum().backward()
    optimizer.step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, "seconds").write_text(str(float(seconds)))
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, cache: str) -> float:
    os.environ.update(NUMBA_CACHE_DIR=cache, OMP_NUM_THREADS="1")  # for the children
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(first_step, (ranks, folder), nprocs=ranks)
        return float(Path(folder, "seconds").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    print(describe())
    found = imports(args.rounds)
    print(table(found, "import torch"))
    more = median(found["import saef"]) - median(found["import torch"])
    print(f"import saef costs {more:.2f} s more than import torch")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as cache:
            cold = measure(ranks, cache)
            warm = [measure(ranks, cache) for _ in range(args.rounds)]
        spread = f"{min(warm):.2f} to {max(warm):.2f}"
        print(f"first step, {ranks} ranks: cold {cold:.1f} s, warm {median(warm):.2f} s ({spread})")


if __name__ == "__main__":
    main()
