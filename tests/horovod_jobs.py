"""What Horovod's ranks do for the tests."""

from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saef
from saef.integrations.horovod import SAEFCompression
from training import Job, batch, flat, make_model, make_optimizer


def make(job: Job, net: nn.Module, **options: Any) -> tuple[Any, saef.SAEFState]:
    """(DistributedOptimizer, its state)."""
    optimizer = make_optimizer(net, job.groups)
    compression = SAEFCompression(net, optimizer, **job.state)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=net.named_parameters(),
        compression=compression,
        backward_passes_per_step=job.micro_batches,
        **options,
    )
    return optimizer, compression.state


def backward(net: nn.Module, optimizer: Any, job: Job, t: int) -> None:
    """The gradients of step t."""
    for g, options in zip(optimizer.param_groups, job.groups, strict=True):
        g["lr"] = job.lrs[t] * options.get("lr", 1.0)
    optimizer.zero_grad()
    x, y = (v.to(job.device) for v in batch(hvd.rank(), job.first + t, job.dtype))
    parts = list(zip(x.chunk(job.micro_batches), y.chunk(job.micro_batches), strict=True))
    for xs, ys in parts:
        (F.mse_loss(net(xs), ys) / len(parts)).backward()


def steps(net: nn.Module, optimizer: Any, job: Job, which: Iterable[int]) -> None:
    for t in which:
        backward(net, optimizer, job, t)
        optimizer.step()


def everything(state: saef.SAEFState) -> list[Tensor]:
    return [v.cpu().clone() for v in (state.weights.x(), state.e, state.m, state.e_server)]


def train(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    """Train as `training.train` does with DDP; what the tests look at afterwards."""
    net = make_model(job, hvd.rank())
    optimizer, state = make(job, net, **options)
    begun = flat(net)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert state.steps == 0
    trajectory = [flat(net)]
    assert torch.equal(trajectory[0], begun)  # broadcast_optimizer_state makes a step, which must do nothing
    for t in range(len(job.lrs)):
        steps(net, optimizer, job, [t])
        trajectory.append(flat(net))
    _, e, m, e_server = everything(state)
    return {
        "x": torch.stack(trajectory),
        "e": e,
        "m": m,
        "e_server": e_server,
        "metrics": state.metrics(),
        "strategy": state.strategy,
        "buckets": len(state._plans),
    }
