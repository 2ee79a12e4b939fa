"""Real DeepSpeed engines on the tests' ranks. Each function that takes a `group` is a job for a pool of ranks."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import saef
import saef.integrations.deepspeed
from support.nodes import x_tilde
from support.training import SIZES, batch, flat, make_net, param_groups

# On CPU DeepSpeed compiles an all-reduce of its own for ranks of one machine, for 100 s; nothing here goes through it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

BATCH = 8  # samples a rank and step, whatever the micro-batches


@dataclass
class Setup:
    """What one run varies.

    params: of the optimizer, in JSON's form. groups: options of two param groups (matrices, vectors), or of one.
    config: further keys of the JSON. sizes, first: as in `training.Job`.
    """

    params: dict[str, Any]
    groups: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    dtype: torch.dtype = torch.float32
    micro_batches: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = SIZES
    first: int = 0


def json_config(setup: Setup) -> dict[str, Any]:
    """The whole config of a run; what `setup.config` has wins."""
    return {
        "train_micro_batch_size_per_gpu": BATCH // setup.micro_batches,
        "gradient_accumulation_steps": setup.micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "SAEF", "params": setup.params},
        **setup.config,
    }


def start(setup: Setup, net: nn.Module) -> Any:
    """An engine for `net` on all ranks of the pool."""
    parameters = param_groups(net, setup.groups)
    return deepspeed.initialize(model=net, model_parameters=parameters, config=json_config(setup))[0]


def steps(engine: Any, which: range, dtype: torch.dtype = torch.float32) -> None:
    """DeepSpeed's usual loop on the tests' batches."""
    parts = engine.gradient_accumulation_steps()
    for t in which:
        x, y = batch(dist.get_rank(), t, dtype)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.mse_loss(engine(xs), ys)
            engine.backward(loss)
            engine.step()


def train(group: dist.ProcessGroup, setup: Setup, count: int) -> dict[str, Any]:
    """Train `count` steps; what the tests look at afterwards."""
    net = make_net(setup.dtype, setup.sizes)
    engine = start(setup, net)
    state: saef.SAEFState = engine.optimizer.saef
    begun, trajectory, lrs = (state.steps, flat(net)), [flat(net)], []
    for t in range(setup.first, setup.first + count):
        lrs.append([g["lr"] for g in engine.optimizer.param_groups])
        steps(engine, range(t, t + 1), next(net.parameters()).dtype)
        trajectory.append(flat(net))
    found = {
        "begun": begun,
        "x": torch.stack(trajectory),
        "master": state.weights.x().clone(),
        "e": state.e.clone(),
        "m": state.m.clone(),
        "e_server": state.e_server.clone(),
        "lrs": lrs,
        "steps": (state.steps, engine.global_steps),
        "metrics": state.metrics(),
    }
    engine.destroy()
    return found


@torch.no_grad()
def held_out_loss(model: nn.Module, workers: int, dtype: torch.dtype = torch.float32) -> float:
    """Mean loss over batches that no run trains on."""
    batches = [batch(k, t, dtype) for k in range(workers) for t in range(90_000, 90_020)]
    return float(torch.stack([F.mse_loss(model(x).float(), y.float()) for x, y in batches]).mean())


class Net(nn.Module):
    """With dropout, so that the random state counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 20), nn.Linear(20, 1), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.a(x))))  # type: ignore[no-any-return]


def everything(engine: Any) -> dict[str, Any]:
    """All that training depends on."""
    state: saef.SAEFState = engine.optimizer.saef
    metrics = state.metrics()
    return {
        "x": state.weights.x().clone(),
        "parameters": flat(engine.module),
        "e": state.e.clone(),
        "m": state.m.clone(),
        "m_decay": state.engine.memory.m_decay.clone(),
        "e_server": state.e_server.clone(),
        "random": torch.get_rng_state(),
        "counters": [engine.global_steps, engine.skipped_steps, engine.global_samples, state.steps, state.skipped],
        "bytes": [metrics["bytes_sent_phase1"], metrics["bytes_sent_phase2"], metrics["bytes_sent_averaging"]],
        "lr": [g["lr"] for g in engine.optimizer.param_groups],
        "scheduler": engine.lr_scheduler.state_dict(),
    }


def save(group: dist.ProcessGroup, setup: Setup, folder: Path, stop: int, end: int) -> Any:
    """Train to `end`, with a checkpoint at `stop`: (all at the end, x~ at the checkpoint, what save gave)."""
    torch.manual_seed(1)
    engine = start(setup, Net())
    torch.manual_seed(100 + dist.get_rank())
    steps(engine, range(stop), next(engine.module.parameters()).dtype)
    saved = engine.save_checkpoint(str(folder), client_state={"epoch": 3})
    whole = x_tilde(engine.optimizer.saef)
    steps(engine, range(stop, end), next(engine.module.parameters()).dtype)
    found = everything(engine)
    engine.destroy()
    return found, whole, saved


def resume(group: dist.ProcessGroup, setup: Setup, folder: Path, end: int) -> Any:
    """Go on from the checkpoint, from other weights and random numbers: (all at the end, x~ loaded, what load gave)."""
    torch.manual_seed(2 + dist.get_rank())
    engine = start(setup, Net())
    loaded = engine.load_checkpoint(str(folder))
    whole = x_tilde(engine.optimizer.saef)
    steps(engine, range(engine.global_steps, end), next(engine.module.parameters()).dtype)
    found = everything(engine)
    engine.destroy()
    return found, whole, loaded
