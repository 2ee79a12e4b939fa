"""The DDP communication hook. (No `from __future__ import annotations`: DDP compares the types.)"""

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket  # torch.distributed.GradBucket, for type checkers
from torch._compile import _disable_dynamo  # as torch.compiler.disable, but imports the compiler at the first call
from torch.autograd import Variable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from saef import Later, SAEFState
from saef.step.unwrap import unwrap_model


@_disable_dynamo
def saef_hook(state: SAEFState | Later, bucket: GradBucket) -> Future[torch.Tensor]:
    """Compress a bucket's gradient and exchange it: `ddp_model.register_comm_hook(state, saef_hook)`.

    One hook for all methods; the state says which. The gradient in `p.grad` stays this worker's own: the optimizer step
    applies what came back. Reading it is fine, changing it is refused by the step. After `state.detach()` the hook
    averages gradients, as DDP does without one. A `saef.Later` stands for the state that it is bound to.

    Raises:
        TypeError: if called without a state, or without a `GradBucket` (DDP compiled with the python_reducer).
        RuntimeError: if a `saef.Later` is not bound.
    """
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            f"saef_hook needs DDP's GradBucket, got {type(bucket).__name__}: under torch.compile leave "
            'torch._dynamo.config.optimize_ddp at its default instead of "python_reducer"'
        )
    if state is None:
        raise TypeError(
            "saef_hook has no state: create a SAEFState from the DDP and its optimizer, and register it with the hook. "
            "Lightning makes both by itself: leave DDPStrategy(ddp_comm_hook=...) out, and give the Trainer a "
            "saef.integrations.lightning.SAEFCallback"
        )
    if isinstance(state, Later):
        state = state.bound()
    if not state.engine.attached:
        return allreduce_hook(state.engine.process_group or dist.group.WORLD, bucket)  # type: ignore[arg-type]
    engine, autograd = state.engine, Variable._execution_engine
    done = engine.exchange(bucket.parameters(), bucket.gradients(), bucket.buffer(), bucket.is_last())
    if bucket.is_last():  # DDP's own callback waits for the buckets, and moves them into p.grad
        late, ended = torch.compiler.disable(engine.exchange_late), torch.compiler.disable(engine.backward_ended)
        autograd.queue_callback(late)  # before it
        autograd.queue_callback(lambda: autograd.queue_callback(ended))  # after it
    return done


def register(model: nn.Module, state: SAEFState | Later) -> None:
    """Register `saef_hook` with the DistributedDataParallel inside `model`.

    Args:
        model: DDP, or what a framework or torch.compile has made of it; Lightning Fabric's, for example, has no
            `register_comm_hook`.
        state: of that model, or a `saef.Later` for it.

    Raises:
        ValueError: if there is no DDP inside, or if there are several or parameters beside it.
    """
    ddp = unwrap_model(model)
    if not isinstance(ddp, DistributedDataParallel):
        raise ValueError(
            "register() needs a model with one DistributedDataParallel inside, which has all that it trains, got "
            f"{type(model).__name__}: give it DDP itself, or what fabric.setup() returned, in several processes with "
            'strategy="ddp". Several DDPs want a state and a register() each'
        )
    ddp.register_comm_hook(state, saef_hook)
