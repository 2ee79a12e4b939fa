"""What Horovod's ranks do for the tests."""

from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn import functional as F

import saef
from saef.integrations.horovod import SAEFCompression
from support.training import Job, flat, make_model, make_optimizer, micro_batches, outcome, set_lr


def make(job: Job, net: nn.Module, **options: Any) -> tuple[Any, saef.SAEFState]:
    """(DistributedOptimizer, its state)."""
    optimizer = make_optimizer(net, job.groups, job.optimizer)
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
    set_lr(optimizer, job, job.lrs[t])
    optimizer.zero_grad()
    parts = micro_batches(job, hvd.rank(), t)
    for xs, ys in parts:
        (F.mse_loss(net(xs), ys) / len(parts)).backward()


def steps(net: nn.Module, optimizer: Any, job: Job, which: Iterable[int]) -> None:
    for t in which:
        backward(net, optimizer, job, t)
        optimizer.step()


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
    return outcome(state, trajectory)
