"""What a step costs with several local steps between two exchanges: real gloo ranks, on a link of a chosen rate.

    python benchmarks/local_steps.py [--mbit 100] [--ranks 4] [--local-steps 16] [--layers 10] [--width 1024]
                                     [--batch 8] [--rounds 5] [--methods "sign, H" ...]

--mbit shapes the loopback of a network namespace of its own (needs `unshare` and `tc`) to so many Mb/s for each rank,
which all share. Times are by step of the optimizer, AdamW: of whole rounds, divided by their steps. "no exchange" is
the same training without any communication. Then bytes on the interface, and the memory of each form on one rank.
--methods takes those whose names have one of these words in them: fewer of them disturb one another less.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, interleaved, sent_by
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

MIB = 1 << 20


def methods(H: int) -> dict[str, dict[str, Any] | None]:
    sign = {"compressor": saef.ScaledSign()}
    return {
        "plain DDP": None,
        "SAEF sign": sign,
        f"dense averaging, H = {H}": {"compressor": saef.Identity(), "local_steps": H},
        f"SAEF sign, H = {H}": {**sign, "local_steps": H},
        f"SAEF sign, H = {H}, without DDP": {**sign, "local_steps": H, "ddp": False},
        f"SAEF sign, H = {H}, no copy": {**sign, "local_steps": H, "on_bad_round": "keep"},
        f"SAEF sign, H = {H}, overlap, without DDP": {**sign, "local_steps": H, "overlap": True, "ddp": False},
        f"SAEF top-1 %, H = {H}": {"compressor": saef.TopK(0.01), "local_steps": H, "step_ahead": 0.25},
    }


class Trainer:
    """One method's model, optimizer and state."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        settings = None if settings is None else {**settings}
        self.model = DDP(self.net) if settings is None or settings.pop("ddp", True) else self.net
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self.data, self.state = torch.randn(args.batch, args.width), None
        self.steps = (settings or {}).get("local_steps", 1)
        if settings is not None:
            self.state = saef.SAEFState(self.model, self.optimizer, **settings)
            if isinstance(self.model, DDP):
                self.model.register_comm_hook(self.state, saef_hook)

    def round(self) -> None:
        for _ in range(self.steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.data).square().mean().backward()
        self.optimizer.step()

    def alone(self) -> None:
        """A step without communication."""
        assert isinstance(self.model, DDP)
        with self.model.no_sync():
            self.step()

    def memory(self) -> str:
        """Vectors of the model's size beside parameters and gradients."""
        d = sum(p.numel() for p in self.net.parameters())
        kept = [
            v for p in self.net.parameters() for v in self.optimizer.state[p].values() if isinstance(v, torch.Tensor)
        ]
        own = sum(v.numel() for v in kept if v.dim())
        found = {"optimizer": own / d}
        if self.state is not None:
            found = {"x_half": self.state.weights.flat.numel() / d, "errors": self.state.e.numel() / d, **found}
            found["server error"] = self.state.e_server.numel() / d
            if self.state.settings.on_bad_round == "restore" and not self.state.engine.rule.rule.of_gradients:
                found["copy of the optimizer's"], found["difference, in the exchange"] = own / d, 1.0
            if self.state.settings.overlap:
                found["on its way"], found["copies of errors and optimizer's"] = 1.0, 1.0 + own / d
        return ", ".join(f"{name} {vectors:.2f}" for name, vectors in found.items())


def run_rank(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    chosen = {n: s for n, s in methods(args.local_steps).items() if any(word in n for word in args.methods)}
    trainers = {name: Trainer(args, settings) for name, settings in chosen.items()}
    alone = Trainer(args, None)
    work: dict[str, Callable[[], None]] = {"no exchange": lambda: [alone.alone() for _ in range(16)] and None}
    work |= {name: trainer.round for name, trainer in trainers.items()}
    seconds = interleaved(work, args.rounds, barrier=dist.barrier, warm_up=2)
    steps = {"no exchange": 16} | {name: trainer.steps for name, trainer in trainers.items()}
    rate = f"{args.mbit:g} Mb/s a rank" if args.mbit else "not shaped"
    each = {name: [s / steps[name] for s in took] for name, took in seconds.items()}
    if rank == 0:
        d = sum(p.numel() for p in alone.net.parameters())
        print(describe())
        print(
            f"step      {args.ranks} gloo ranks, 1 thread each; {d:,} parameters, batch {args.batch}; loopback {rate}\n"
        )
        heads = f"{'least .. most':>22}{'to no exchange':>16}{'bytes a step':>14}{'on the interface':>18}"
        print(f"{'':38}{'a step':>12}{heads}")
    for name, took in each.items():
        bytes_before, trainer = sent_by("lo"), trainers.get(name)
        dist.barrier()
        if trainer is not None:
            trainer.round()
        dist.barrier()
        seen = (sent_by("lo") - bytes_before) / args.ranks / steps[name]
        if rank == 0:
            counted = trainer.state.metrics()["bytes_per_step"] if trainer is not None and trainer.state else 0.0
            unit = median(each["no exchange"])
            print(
                f"{name:38}{median(took) * 1e3:9.1f} ms{min(took) * 1e3:12.1f} .. {max(took) * 1e3:.1f}"
                f"{median(took) / unit:13.2f}{counted:16,.0f}{seen if trainer else 0:16,.0f}",
                flush=True,
            )
    if rank == 0:
        print("\nmemory of one rank in vectors of the model's size, beside parameters and gradients")
        for name, trainer in trainers.items():
            print(f"{name:38}{trainer.memory()}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=16)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=[""], metavar="WORDS")
    args = parser.parse_args()
    if args.mbit and "SAEF_SHAPED" not in os.environ:
        rate = f"rate {args.mbit * args.ranks:g}mbit burst 256k latency 1s"
        shape = f"ip link set lo up && tc qdisc add dev lo root tbf {rate}"
        again = f"{shape} && SAEF_SHAPED=1 exec {shlex.join([sys.executable, *sys.argv])}"
        os.execvp("unshare", ["unshare", "-n", "sh", "-c", again])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
