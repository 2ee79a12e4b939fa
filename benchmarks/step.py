"""A training step with and without saef: real gloo ranks on this machine, in turn in the same processes.

    python benchmarks/step.py [--ranks 4] [--layers 10] [--width 1024] [--batch 8] [--rounds 15] [--trace FILE]
    python benchmarks/step.py --deepspeed ...

Prints medians, quartiles and ratios of the step time, bytes per step, and the memory beyond parameters and
gradients. Without --deepspeed all are DDP models, with it DeepSpeed engines at stage 0. --trace writes a Chrome
trace of one step, with the ranges "saef: compress", "saef: exchange" and "saef: apply", and prints how much of the
exchange lay inside the backward.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, interleaved, table
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

MIB = 1 << 20
METHODS: dict[str, dict[str, Any] | None] = {
    "plain DDP": None,
    "SAEF sign": {"compressor": saef.ScaledSign()},
    "SAEF sign, Rotating(20)": {"compressor": saef.ScaledSign(), "averaging": saef.Rotating(20)},
    "SAEF top-1 %": {"compressor": saef.TopK(0.01)},
    "EF sign": {"compressor": saef.ScaledSign(), "step_ahead": 0.0},
}


ENGINES: dict[str, dict[str, Any] | None] = {
    "plain DeepSpeed": None,
    "SAEF sign": {"compressor": {"type": "sign"}},
    "SAEF sign, Rotating(20)": {"compressor": {"type": "sign"}, "averaging": {"type": "rotating", "period": 20}},
    "SAEF top-1 %": {"compressor": {"type": "topk", "ratio": 0.01}},
    "EF sign": {"compressor": {"type": "sign"}, "step_ahead": 0.0},
}


class Trainer:
    """One method's model, optimizer and state."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        self.model = DDP(net)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        self.data = torch.randn(args.batch, args.width)
        self.state = None
        if settings is not None:
            self.state = saef.SAEFState(self.model, self.optimizer, **settings)
            self.model.register_comm_hook(self.state, saef_hook)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.data).square().mean().backward()

    def apply(self) -> None:
        self.optimizer.step()

    def step(self) -> None:
        self.backward()
        self.apply()


class EngineTrainer(Trainer):
    """One method's DeepSpeed engine."""

    def __init__(self, args: argparse.Namespace, params: dict[str, Any] | None) -> None:
        import deepspeed

        import saef.integrations.deepspeed  # noqa: F401

        # An all-reduce for ranks of one machine, which ranks on several could not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel("ERROR")
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        kind = "SGD" if params is None else "SAEF"
        config = {
            "train_micro_batch_size_per_gpu": args.batch,
            "gradient_clipping": 0.0,
            "optimizer": {"type": kind, "params": {"lr": 1e-3, "momentum": 0.9, **(params or {})}},
        }
        self.engine, *_ = deepspeed.initialize(model=self.model, config=config)
        self.data = torch.randn(args.batch, args.width)
        self.state = None if params is None else self.engine.optimizer.saef

    def backward(self) -> None:
        self.engine.zero_grad()
        self.engine.backward(self.engine(self.data).square().mean())

    def apply(self) -> None:
        self.engine.step()


def held_bytes(state: saef.SAEFState) -> dict[str, int]:
    """Memory of a state between backward and optimizer step, when it holds most."""
    vectors = {"x or x_half": state.weights.flat, "error": state.e, "momentum": state.m, "server error": state.e_server}
    held = {name: v.numel() * v.element_size() for name, v in vectors.items()}
    held["messages of both phases"] = sum(
        v.numel() for b in state.engine.sending.prepared.buckets for v in [b.message, *b.received, *b.replies]
    )
    return held


def overlap(path: str) -> str:
    """How much of the exchange in a trace lay inside the backward."""
    with open(path) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    backward = next(e for e in events if e["name"] == "benchmark: backward")
    exchanges = [e for e in events if e["name"] == "saef: exchange"]
    hooks = max(e["ts"] + e["dur"] for e in events if e["name"] == "saef: compress")
    inside = sum(max(0.0, min(e["ts"] + e["dur"], hooks) - max(e["ts"], backward["ts"])) for e in exchanges)
    total = sum(e["dur"] for e in exchanges)
    return (
        f"overlap   {len(exchanges)} buckets; {inside / 1e3:.1f} of {total / 1e3:.1f} ms of exchange ran "
        f"before the last gradient was ready; trace in {path}"
    )


def trace(trainer: Trainer, path: str) -> None:
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=config
    ) as profiler:
        with torch.profiler.record_function("benchmark: backward"):
            trainer.backward()
        trainer.apply()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(path)
        print(overlap(path))


def run_rank(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    os.environ["LOCAL_RANK"] = str(rank)
    kind, methods = (EngineTrainer, ENGINES) if args.deepspeed else (Trainer, METHODS)
    trainers = {name: kind(args, settings) for name, settings in methods.items()}
    # Two rounds to compile, to allocate, and for DDP to rebuild its buckets.
    work = {name: trainer.step for name, trainer in trainers.items()}
    seconds = interleaved(work, args.rounds, barrier=dist.barrier, warm_up=2)
    if rank == 0:
        report(args, trainers, seconds)
    if args.trace:
        trace(trainers["SAEF sign"], args.trace)
    dist.barrier()
    for name, trainer in trainers.items():
        trainer.backward()
        if rank == 0 and trainer.state is not None:
            print(memory(name, trainer.state))
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace, trainers: dict[str, Trainer], seconds: dict[str, list[float]]) -> None:
    plain = next(iter(trainers))
    d = sum(p.numel() for p in trainers[plain].model.parameters())
    print(describe())
    print(
        f"step      {args.ranks} gloo ranks, 1 thread each; {args.layers} x Linear({args.width}), {d:,} parameters, "
        f"batch {args.batch}, {args.rounds} interleaved rounds, ratio to {plain}\n"
    )
    print(table(seconds, plain), "\n")
    for name, trainer in trainers.items():
        if trainer.state is not None:
            m = trainer.state.metrics()
            print(
                f"{name:26}{m['bytes_per_step'] / 1e6:8.3f} MB sent per rank and step, "
                f"1/{m['compression_ratio']:.1f} of a plain step's {m['bytes_per_step_uncompressed'] / 1e6:.1f} MB "
                f"({trainer.state.strategy})"
            )
    print()


def memory(name: str, state: saef.SAEFState) -> str:
    held = held_bytes(state)
    bucket = 25 * MIB  # DDP's default bucket_cap_mb
    x = held["x or x_half"]
    limit = 3 * x + held["server error"] + 2 * bucket
    parts = ", ".join(f"{part} {size / MIB:.1f}" for part, size in held.items())
    total = sum(held.values())
    return (
        f"memory    {name}: {parts}; together {total / MIB:.1f} MiB = {total / x:.2f} times the parameters "
        f"(at most {limit / MIB:.1f} with two buckets: {'yes' if total <= limit else 'NO'})"
    )


def main(spawn: Callable[..., Any] = torch.multiprocessing.spawn) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("ranks", 4), ("layers", 10), ("width", 1024), ("batch", 8), ("rounds", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeed engines instead of DDP models")
    parser.add_argument("--trace", help="file for a Chrome trace of one step of rank 0")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (args, os.path.join(folder, "store")), nprocs=args.ranks)


if __name__ == "__main__":
    main()
