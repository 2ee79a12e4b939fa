"""What a step costs on two nodes of two ranks each, joined by a link of a chosen rate: real gloo ranks.

    python benchmarks/nodes.py [--mbit 1000] [--layers 10] [--width 1024] [--batch 8] [--steps 5]

It starts itself in `benchmarks/netlab` (which says what that needs): each node is a network namespace of its own, whose
loopback is as it is, with a link of --mbit Mb/s. Then what each node has sent to the other, as the interface counts it,
and the memory of each arrangement on one rank.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, interleaved, sent_by
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has other names for two collectives
NODES, RANKS = 2, 2
NETLAB = Path(__file__).with_name("netlab")


def hierarchical(mesh: DeviceMesh, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Full precision with as few bytes between the nodes as there can be: each rank all-reduces its half there."""
    flat, within = bucket.buffer(), mesh.get_group(1)
    whole = torch.cat([flat, flat.new_zeros(-flat.numel() % RANKS)]) / (NODES * RANKS)
    part = whole.new_empty(whole.numel() // RANKS)
    dist.reduce_scatter_tensor(part, whole, group=within)
    dist.all_reduce(part, group=mesh.get_group(0))
    dist.all_gather_into_tensor(whole, part, group=within)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(flat.copy_(whole[: flat.numel()]))
    return done


class Trainer:
    """One arrangement's model, optimizer and state."""

    def __init__(self, args: argparse.Namespace, mesh: DeviceMesh, kind: str, compressed: bool, nodes: bool) -> None:
        torch.manual_seed(0)
        self.net: Any = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        self.d = sum(p.numel() for p in self.net.parameters())
        self.model: Any = self.net
        if kind == "FSDP2":
            axis = mesh["shard"] if compressed else mesh
            for layer in [*self.net, self.net]:
                fully_shard(layer, mesh=axis)
        else:
            self.model = DDP(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4, momentum=0.9)
        self.data, self.state = torch.randn(args.batch, args.width), None
        if compressed:
            self.state = saef.SAEFState(self.model, self.optimizer, mesh=mesh if nodes else None)
            if kind == "DDP":
                self.model.register_comm_hook(self.state, saef_hook)
        elif kind == "DDP" and nodes:
            self.model.register_comm_hook(mesh, hierarchical)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.data).square().mean().backward()
        self.optimizer.step()

    def memory(self) -> str:
        """Vectors of the model's size beside parameters and gradients."""
        kept = [v for p in self.net.parameters() for v in self.optimizer.state[p].values() if isinstance(v, Tensor)]
        held = [getattr(v, "_local_tensor", v) for v in kept if v.dim()]
        found = {"momentum": sum(v.numel() for v in held)}
        if self.state is not None:
            weights = self.state.weights
            found["errors"], found["server error"] = self.state.e.numel(), self.state.e_server.numel()
            found["x or x_half"] = weights.flat.numel() + sum(v.numel() for v in getattr(weights, "_halves", ()))
        return ", ".join(f"{name} {numel / self.d:.2f}" for name, numel in found.items())


ARRANGEMENTS = {
    "plain DDP": ("DDP", False, False),
    "plain DDP, reduced within the nodes first": ("DDP", False, True),
    "FSDP2, replicated by FSDP": ("FSDP2", False, True),
    "SAEF sign, a worker a rank": ("DDP", True, False),
    "SAEF sign, a worker a node, DDP": ("DDP", True, True),
    "SAEF sign, a worker a node, FSDP2": ("FSDP2", True, True),
}


def run_rank(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (NODES, RANKS), mesh_dim_names=("replicate", "shard"))
    trainers = {name: Trainer(args, mesh, *which) for name, which in ARRANGEMENTS.items()}
    work: dict[str, Callable[[], None]] = {name: trainer.step for name, trainer in trainers.items()}
    seconds = interleaved(work, args.steps, barrier=dist.barrier, warm_up=2)
    if rank == 0:
        print(describe())
        d = next(iter(trainers.values())).d
        print(f"step      2 nodes of 2 gloo ranks, 1 thread each; {d:,} parameters; {args.mbit:g} Mb/s between\n")
        print(f"{'':44}{'a step':>12}{'least .. most':>22}{'sent by a node':>18}")
    for name, took in seconds.items():
        dist.barrier()
        before = sent_by("eth0")
        trainers[name].step()
        dist.barrier()
        sent = sent_by("eth0") - before
        if rank == 0:
            print(
                f"{name:44}{median(took) * 1e3:9.1f} ms{min(took) * 1e3:12.1f} .. {max(took) * 1e3:.1f}{sent:18,.0f}",
                flush=True,
            )
    if rank == 0:
        print("\nmemory of one rank in vectors of the model's size, beside parameters and gradients")
        for name, trainer in trainers.items():
            print(f"{name:44}{trainer.memory()}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if "RANK" in os.environ:
        return run_rank(args)
    ranks = ["--ranks-per-node", str(RANKS), str(NODES * RANKS)]
    os.execv(sys.executable, [sys.executable, str(NETLAB), f"{args.mbit:g}", *ranks, "--", sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
