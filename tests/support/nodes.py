"""Training with nodes of several ranks, and the reference: a worker is a node, blocks lie within the ranks' parts.

And with torch's `replicate` in DDP's place, where each rank may be a worker, too.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from saef import SAEFState
from saef.hooks import saef_hook
from saef.wire.plan import partition
from support import reference
from support.cases import reference_of, reference_settings, start
from support.training import Job, flat, gradient, make_net, make_optimizer, micro_batches, set_lr

AXES = ("replicate", "shard")


@cache
def mesh_of(nodes: int, ranks: int) -> DeviceMesh:
    """Of the pool's ranks; made once, since each makes process groups."""
    return init_device_mesh("cpu", (nodes, ranks), mesh_dim_names=AXES)


def shard(net: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """As in torch's tutorial: each layer, then the whole."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["shard"], **options)
    return fully_shard(net, mesh=mesh["shard"], **options)


def replicated(net: nn.Module, mesh: DeviceMesh, **options: Any) -> Any:
    """As torchtitan does it: each layer, then the whole."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            replicate(layer, mesh=mesh, **options)
    return replicate(net, mesh=mesh, **options)


def part(net: nn.Module) -> Tensor:
    """x of this rank's part, flat."""
    return torch.cat([p.detach().to_local().reshape(-1) for p in net.parameters()])


def train_sharded(group: Any, job: Job, nodes: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """With FSDP2 in each of the nodes."""
    mesh = mesh_of(nodes, dist.get_world_size(group) // nodes)
    net = shard(make_net(job.dtype), mesh, **(options or {}))
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    state = SAEFState(net, optimizer, mesh=mesh, **job.state)
    return follow(net, optimizer, state, job, dist.get_rank(group))


def train_replicated(group: Any, job: Job, nodes: int) -> dict[str, Any]:
    """With `replicate` in each of the nodes; over all ranks, each a worker, if 0."""
    net, optimizer, state = make(group, job, nodes, "replicate")
    return follow(net, optimizer, state, job, dist.get_rank(group))


def train_ddp(group: Any, job: Job, nodes: int) -> dict[str, Any]:
    """With DDP over all ranks, which are as many nodes; without a mesh, if 0."""
    model, optimizer, state = wrap_nodes(group, job, nodes)
    return follow(model, optimizer, state, job, dist.get_rank(group))


def follow(model: Any, optimizer: torch.optim.Optimizer, state: SAEFState, job: Job, rank: int) -> dict[str, Any]:
    """The outcome of the whole job, with x before and after each step."""

    def x() -> Tensor:
        return flat(model.module) if isinstance(model, DDP) else part(model)

    trajectory = [x()]
    for t, lr in enumerate(job.lrs):
        set_lr(optimizer, job, lr)
        go_on(model, optimizer, job, rank, range(t, t + 1))
        trajectory.append(x())
    return outcome(state, trajectory)


def refusal(net: nn.Module, kind: str = "SGD", **settings: Any) -> str:
    """What is said where a state cannot be made."""
    with pytest.raises((TypeError, ValueError)) as caught:
        SAEFState(net, getattr(torch.optim, kind)(net.parameters(), lr=0.1), **settings)
    return str(caught.value)


def wrap_nodes(group: Any, job: Job, nodes: int) -> tuple[Any, Any, SAEFState]:
    """(DDP, optimizer, state)."""
    net = make_net(job.dtype)
    model = DDP(net, process_group=group, **{"bucket_cap_mb": 0.0005, **job.ddp})
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    mesh = mesh_of(nodes, dist.get_world_size(group) // nodes) if nodes else None
    state = SAEFState(model, optimizer, mesh=mesh, **job.state)
    model.register_comm_hook(state, saef_hook)
    return model, optimizer, state


def go_on(model: Any, optimizer: torch.optim.Optimizer, job: Job, rank: int, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        step(model, job, rank, t)
        optimizer.step()


def step(model: Any, job: Job, rank: int, t: int) -> None:
    """Forward and backward of all micro-batches, of which the last one's is reduced."""
    parts = micro_batches(job, rank, t)
    for i, (x, y) in enumerate(parts):
        last = i + 1 == len(parts)
        if not isinstance(model, DDP):
            model.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(model, DDP) else model.no_sync():
            (nn.functional.mse_loss(model(x), y) / len(parts)).backward()


def outcome(state: SAEFState, trajectory: list[Tensor]) -> dict[str, Any]:
    memory = {"e": state.e, "m": state.m, "e_server": state.e_server}
    return {
        "x": torch.stack(trajectory),
        **{name: v.clone() for name, v in memory.items()},
        "metrics": state.metrics(),
        "strategy": state.strategy,
        "text": repr(state),
    }


# ---- the reference: a worker is a node. Its parameters are the first rank's parts, then the second's ----------------


def shards(t: Tensor, ranks: int) -> list[Tensor]:
    """A parameter's parts as FSDP2 cuts it: rows, of which the last ranks may have fewer, or none."""
    rows = [*t.chunk(ranks)]
    return rows + [t[:0]] * (ranks - len(rows))


def entries(t: Tensor, ranks: int) -> list[Tensor]:
    """A parameter's parts as saef cuts it: entries in the order of memory."""
    return shards(t.reshape(-1), ranks)


Cut = Callable[[Tensor, int], list[Tensor]]


def parts_of(tensors: list[Tensor], ranks: int, cut: Cut) -> list[Tensor]:
    return [cut(t, ranks)[place] for place in range(ranks) for t in tensors]


def joined(parts: list[Tensor]) -> list[Tensor]:
    like = start()
    return [torch.cat(parts[i :: len(like)]).view(t.shape) for i, t in enumerate(like)]


def gradient_of_nodes(ranks: int, cut: Cut = shards) -> reference.GradFn:
    """A node's gradient is the mean of its ranks'."""

    def mean_gradient(node: int, t: int, parts: list[Tensor]) -> list[Tensor]:
        x = joined(parts)
        every = [gradient(node * ranks + place, t, x) for place in range(ranks)]
        return parts_of([torch.stack(g).mean(0) for g in zip(*every, strict=True)], ranks, cut)

    return mean_gradient


def reference_of_nodes(case: dict[str, Any], nodes: int, ranks: int, cut: Cut = shards, **more: Any) -> reference.SAEF:
    """Settings by parameter are repeated for each place; servers and protocols are of one place's coordinates."""
    x0 = parts_of(start(), ranks, cut)
    settings = reference_settings(case, nodes)
    protocol = settings.averaging
    settings = replace(
        settings,
        weight_decay=settings.weight_decay * ranks,
        averaging=protocol and each_place(protocol, x0, ranks),
        servers=servers_of(case, x0, nodes, ranks) if case["exchange"] == "sharded" else None,
        **more,
    )
    return reference_of(case)(settings, x0, nodes)


def servers_of(case: dict[str, Any], x0: list[Tensor], nodes: int, ranks: int) -> list[int]:
    found, n, C = [], len(x0) // ranks, case["compressor"]
    for place in range(ranks):
        numels = [p.numel() for p in x0[place * n : (place + 1) * n]]
        found += sum(partition(numels, [0] * n, C, C, nodes).owner, [])
    return found


def each_place(protocol: tuple[str, int], x0: list[Tensor], ranks: int) -> reference.Protocol:
    """The protocol over the coordinates of each place, which the ranks of that place average among themselves."""
    n = len(x0) // ranks
    sizes = [sum(p.numel() for p in x0[place * n : (place + 1) * n]) for place in range(ranks)]

    def average(t: int, X: list[Tensor]) -> list[Tensor]:
        kind, p = protocol
        found = [[] for _ in X]
        for vectors in zip(*(v.split(sizes) for v in X), strict=True):
            d, j, mean = len(vectors[0]), t % p, reference.mean(vectors)
            a, b = (0, d * ((t + 1) % p == 0)) if kind == "allreduce" else (d * j // p, d * (j + 1) // p)
            for own, v in zip(found, vectors, strict=True):
                own.append(torch.cat([v[:a], mean[a:b], v[b:]]))
        return [torch.cat(own) for own in found]

    return average


# ---- what can go wrong, or must go on ------------------------------------------------------------------------------


def make(group: Any, job: Job, nodes: int, how: str = "fsdp", **options: Any) -> tuple[Any, Any, SAEFState]:
    """(model, optimizer, state), "fsdp", "replicate" or "ddp"; of the last two over all ranks, without a mesh, if 0."""
    if how == "ddp":
        return wrap_nodes(group, job, nodes)
    ranks = dist.get_world_size(group)
    mesh = mesh_of(nodes or 1, ranks // (nodes or 1))
    net = make_net(job.dtype)
    model = shard(net, mesh, **options) if how == "fsdp" else replicated(net, mesh["shard"], **options)
    optimizer = make_optimizer(model, job.groups, job.optimizer)
    return model, optimizer, SAEFState(model, optimizer, mesh=mesh if nodes else None, **job.state)


def everything(state: SAEFState) -> list[Tensor]:
    return [v.clone() for v in (state.weights.x(), state.e, state.m, state.e_server)]


def whole(state: SAEFState, flat: Tensor) -> list[Tensor]:
    """For each parameter, what the ranks of a node have of a vector."""
    found: list[Any] = state.weights.gathered(flat)
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in found]


def x_tilde(state: SAEFState) -> Tensor:
    return torch.cat([v.reshape(-1) for v in whole(state, state.x_tilde())])
