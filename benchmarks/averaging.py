"""One step of each averaging protocol, interleaved, on gloo ranks of this machine.

    python benchmarks/averaging.py [--ranks 8] [--numel 1000000] [--rounds 15]

In a network namespace of its own, `tc qdisc add dev lo root ...` makes the network: docs/performance.md, Speed.
"""

import argparse
import os
import tempfile
from functools import partial
from itertools import count

import torch
import torch.distributed as dist
from machine import describe, interleaved, table

import saef
from saef.comm.torch_transport import TorchTransport


def protocols(ranks: int) -> dict[str, saef.Averaging | None]:
    """The first is the unit; None is the barrier that all of them end with."""
    found = {
        "AllReduce(1)": saef.AllReduce(1),
        "Rotating(20)": saef.Rotating(20),
        "Ring()": saef.Ring(),
        "AsyncRing()": saef.AsyncRing(),
    }
    if ranks & (ranks - 1) == 0 and ranks > 1:
        cube = [(k, k ^ (1 << b)) for k in range(ranks) for b in range(ranks.bit_length() - 1)]
        found["Gossip, hypercube"] = saef.Gossip.metropolis(cube)
    return {**found, "nothing": None}


class Worker:
    """One protocol's vector, and its next step."""

    def __init__(self, protocol: saef.Averaging | None, numel: int) -> None:
        self.protocol, self.x, self.steps = protocol, torch.randn(numel), count()
        self.transport = TorchTransport(None, torch.device("cpu"))

    def step(self) -> None:
        if self.protocol is not None:
            t = next(self.steps)
            part = self.x[self.protocol.due(t, self.x.numel())]
            self.transport.call(partial(self.protocol.average, t, part, self.transport))


def run_rank(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    workers = {name: Worker(protocol, args.numel) for name, protocol in protocols(args.ranks).items()}
    seconds = interleaved({name: w.step for name, w in workers.items()}, args.rounds, barrier=dist.barrier)
    if rank == 0:
        print(describe())
        print(f"averaging {args.ranks} gloo ranks, {args.numel:,} float32, {args.rounds} interleaved rounds\n")
        print(table(seconds, next(iter(workers))), "\n")
        for name, worker in workers.items():
            if worker.protocol is not None:
                sent = worker.transport.sent_bytes["averaging"] / (args.rounds + 1)
                t_mix = saef.mixing_time(worker.protocol, args.ranks)
                print(f"{name:26}{sent / 1e6:8.3f} MB sent by rank 0 per step, mixing time {t_mix:.0f} events")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("ranks", 8), ("numel", 1_000_000), ("rounds", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (args, os.path.join(folder, "store")), nprocs=args.ranks)


if __name__ == "__main__":
    main()
