"""A training step under Horovod: plain, Horovod's fp16, and SAEF, interleaved, on the ranks of this machine.

horovodrun --gloo -np 4 .venv/bin/python benchmarks/horovod_step.py [--layers 10] [--width 1024] [--rounds 15]
"""

import argparse
from typing import Any

import horovod.torch as hvd
import torch
from machine import describe, interleaved, table
from torch import nn

import saef
from saef.integrations.horovod import SAEFCompression

METHODS: dict[str, Any] = {
    "Horovod, no compression": hvd.Compression.none,
    "Horovod, fp16": hvd.Compression.fp16,
    "SAEF sign": {"compressor": saef.ScaledSign()},
    "SAEF sign, Rotating(20)": {"compressor": saef.ScaledSign(), "averaging": saef.Rotating(20)},
    "SAEF top-1 %": {"compressor": saef.TopK(0.01)},
}


class Trainer:
    """One method's model and optimizer."""

    def __init__(self, args: argparse.Namespace, method: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        compression = SAEFCompression(self.model, optimizer, **method) if isinstance(method, dict) else method
        self.state = getattr(compression, "state", None)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=self.model.named_parameters(), compression=compression
        )
        self.data = torch.randn(args.batch, args.width)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.data).square().mean().backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 10), ("width", 1024), ("batch", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    trainers = {name: Trainer(args, method) for name, method in METHODS.items()}
    work = {name: trainer.step for name, trainer in trainers.items()}
    seconds = interleaved(work, args.rounds, barrier=hvd.barrier, warm_up=2)
    if hvd.rank() == 0:
        plain = next(iter(trainers))
        d = sum(p.numel() for p in trainers[plain].model.parameters())
        print(describe())
        print(f"step      Horovod, {hvd.size()} ranks, {d:,} parameters, {args.rounds} interleaved rounds\n")
        print(table(seconds, plain))
        for name, trainer in trainers.items():
            size = {"Horovod, no compression": 4, "Horovod, fp16": 2}.get(name, 0)
            sent = 2 * (hvd.size() - 1) / hvd.size() * size * d
            if trainer.state is not None:
                sent = trainer.state.metrics()["bytes_per_step"]
            print(f"{name:44}{sent / 1e6:10.2f} MB sent per rank and step")
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main()
