"""torch's `replicate` that is made of FSDP2, whose all-reduce saef takes the place of. More is in test_nodes.py."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Replicate

import saef
from support.nodes import everything, go_on, make, mesh_of, part, refusal, replicated, step, train_ddp, train_replicated
from support.ranks import RankPool
from support.training import ADAMW, Job, make_net, make_optimizer

SIGN = Job(
    state={"compressor": saef.ScaledSign(block=7), "exchange": "sharded", "averaging": saef.Rotating(4)},
    groups=[{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}],
    lrs=[0.05] * 6,
)
TOPK = Job(
    state={
        "compressor": saef.TopK(0.3, block=10),
        "exchange": "replicated",
        "averaging": saef.AllReduce(3),
        "max_grad_norm": 0.3,
    },
    groups=[{"lr": 0.01, **ADAMW, "weight_decay": 1e-2}],
    optimizer="AdamW",
    lrs=[0.01] * 6,
)


@pytest.mark.parametrize("nodes", [0, 2], ids=["a worker a rank", "a worker a node"])
@pytest.mark.parametrize("job", [SIGN, TOPK], ids=["sign-sgd", "topk-adamw"])
def test_the_steps_are_those_with_ddp_bit_for_bit(pool: RankPool, job: Job, nodes: int) -> None:
    """x after each step, errors, momentum, and server errors; memory, too."""
    for ours, theirs in zip(pool.run(train_replicated, job, nodes), pool.run(train_ddp, job, nodes), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("x", "e", "m", "e_server"))


def uncompressed(group: Any, factor: float | None, job: Job, options: dict[str, Any]) -> float:
    """Ten steps beside replicate's own; then the state is detached, and three more. The largest difference of x.

    factor: what replicate divides the gradients' sum by; None: the ranks. A layer of ours recomputes its activations.
    """
    rank, mesh = dist.get_rank(group), mesh_of(1, 4)["shard"]
    net = make_net(job.dtype)
    net[2] = checkpoint_wrapper(net[2])
    ours, theirs = (replicated(model, mesh, **options) for model in (net, make_net(job.dtype)))
    optimizers = [make_optimizer(model, job.groups, job.optimizer) for model in (ours, theirs)]
    for module in [*ours.modules(), *theirs.modules()] if factor is not None else []:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(factor)
    state = saef.SAEFState(ours, optimizers[0], **job.state)
    for t in range(13):
        if t == 10:
            assert float(state.m.abs().max()) > 0
            state.engine.share()
            state.detach()
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            go_on(model, optimizer, job, rank, range(t, t + 1))
    assert state.steps == 10
    return float((part(ours) - part(theirs)).abs().max())


IDENTITY = Job(state={"compressor": saef.Identity()}, groups=[{"lr": 0.05, "momentum": 0.9}], micro_batches=2)
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


@pytest.mark.parametrize("factor", [None, 1.0])
def test_uncompressed_it_trains_as_replicate_does_by_itself(pool: RankPool, factor: float | None) -> None:
    """13 steps in float64 on numbers of order 1, 1/(1 - mu) = 10 roundings of 1e-16 each: 1e-14; required is 1e-12.

    With a sum in place of a mean the rate is 1/4.
    """
    job = IDENTITY if factor is None else replace(IDENTITY, groups=[{"lr": 0.0125, "momentum": 0.9}])
    assert max(pool.run(uncompressed, factor, job, {})) < 1e-12


@pytest.mark.slow
def test_a_mixed_precision_policy_trains_as_in_replicate(pool: RankPool) -> None:
    """13 steps in float32, 10 roundings of 6e-8 each: 8e-6. Weights rounded to bfloat16 would differ by 1e-3."""
    job = replace(IDENTITY, dtype=torch.float32, micro_batches=1)
    assert max(pool.run(uncompressed, None, job, BF16)) < 8e-6


def resumes(group: Any, folder: str) -> None:
    """By torch's own functions for model and optimizer, and the state beside them; DDP's state_dict fits, too."""
    rank = dist.get_rank(group)
    model, optimizer, state = make(group, TOPK, 0, "replicate")
    go_on(model, optimizer, TOPK, rank, range(4))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "saef": state}, checkpoint_id=folder)
    of_replicate = state.state_dict()
    go_on(model, optimizer, TOPK, rank, range(4, 8))

    other, second, loaded = make(group, TOPK, 0, "replicate")
    go_on(other, second, TOPK, rank, range(20, 22))  # it has states of its own, to be replaced
    weights, moments = get_state_dict(other, second)
    dcp.load({"model": weights, "optimizer": moments, "saef": loaded}, checkpoint_id=folder)
    set_state_dict(other, second, model_state_dict=weights, optim_state_dict=moments)
    go_on(other, second, TOPK, rank, range(4, 8))
    assert loaded.steps == 8
    assert all(map(torch.equal, everything(state), everything(loaded)))

    other, second, loaded = make(group, TOPK, 0, "ddp")
    loaded.load_state_dict(of_replicate)
    go_on(other, second, TOPK, rank, range(4, 8))
    assert all(map(torch.equal, everything(state), everything(loaded)))


def test_it_resumes_bit_for_bit(pool: RankPool, tmp_path: Any) -> None:
    pool.run(resumes, str(tmp_path / "checkpoint"))


def places(group: Any) -> None:
    """Its mesh says who the workers are; with a mesh of nodes it may be that of all ranks."""
    pair = replicated(make_net(), mesh_of(2, 2)["shard"])
    assert saef.SAEFState(pair, make_optimizer(pair, SIGN.groups), **SIGN.state).engine.transport.size == 2
    over_all = replicated(make_net(), mesh_of(1, 4)["shard"])
    optimizer = make_optimizer(over_all, SIGN.groups)
    state = saef.SAEFState(over_all, optimizer, mesh=mesh_of(2, 2), **SIGN.state)
    within, second, other = make(group, SIGN, 2, "replicate")
    for model, one in ((over_all, optimizer), (within, second)):
        go_on(model, one, SIGN, dist.get_rank(group), range(3))
    assert all(map(torch.equal, everything(state), everything(other)))


def test_which_ranks_are_alike_its_mesh_says(pool: RankPool) -> None:
    pool.run(places)


def succeeded(group: Any) -> None:
    """A second state for the same model; the first one is detached when the model is not its own any more."""
    rank = dist.get_rank(group)
    model, _, first = make(group, SIGN, 0, "replicate")
    optimizer = make_optimizer(model, SIGN.groups)
    second = saef.SAEFState(model, optimizer, **SIGN.state)
    first.detach()
    go_on(model, optimizer, SIGN, rank, range(2))
    alone, plain, only = make(group, SIGN, 0, "replicate")
    go_on(alone, plain, SIGN, rank, range(2))
    assert all(map(torch.equal, everything(second), everything(only)))


def test_the_all_reduce_stays_out_as_long_as_some_state_has_the_model(pool: RankPool) -> None:
    pool.run(succeeded)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(group: Any, what: str) -> str:
    both, settings = mesh_of(2, 2), dict[str, Any]()
    mesh, net = both["shard"], make_net()
    options: dict[str, Any] = {"ignored_params": {net[0].bias}} if what == "in part" else {}
    if what == "tensor parallelism":
        net[0].weight = nn.Parameter(distribute_tensor(net[0].weight.detach(), mesh, [Replicate()]))
        replicate(net[4], mesh=mesh)
    else:
        replicated(net, both["replicate"] if what == "other ranks than the node" else mesh, **options)
    if what in ("other ranks than the node", "local steps", "in part"):
        settings["mesh"] = both
    if what == "local steps":
        settings["local_steps"] = 2
    if what == "another group":
        settings["process_group"] = group
    if what == "another hook":
        net[0].set_all_reduce_hook(torch.Tensor.zero_)
    return refusal(net, "RMSprop" if what == "another optimizer" else "SGD", **settings)


REFUSED = {
    "another group": r"process_group has ranks \[0, 1, 2, 3\], the mesh that replicate got has \[.*Leave process_",
    "other ranks than the node": r"replicated over ranks \[.*replicate\(module, mesh=mesh\[\"shard\"\]\), or",
    "local steps": r"FSDP2 and replicate are for SGD, AdamW and Adam with local_steps=1",
    "another optimizer": r"FSDP2 and replicate are for SGD, AdamW and Adam with local_steps=1",
    "in part": r"parameters \['0\.bias'\] are not sharded or replicated.*without ignored_params",
    "another hook": r"set_all_reduce_hook\(\): saef takes the place of replicate's all-reduce",
    "tensor parallelism": r"parameter 0\.weight is .*call replicate for the whole model, with one mesh of one axis",
}


def test_what_cannot_be_honoured_is_refused_at_once(pool: RankPool) -> None:
    for what, expected in REFUSED.items():
        for said in pool.run(refused, what):
            assert re.search(expected, said, re.S), said


def refused_later(group: Any) -> None:
    """What would have to do with an all-reduce, or leaves gradients with FSDP: found at the end of a backward."""
    for change, value, expected in CHANGES:
        model, optimizer, state = make(group, SIGN, 0, "replicate")
        go_on(model, optimizer, SIGN, dist.get_rank(group), range(1))
        getattr(model[0], change)(value)
        with pytest.raises(RuntimeError, match=expected):
            step(model, SIGN, dist.get_rank(group), 1)
        assert state.steps == 1


CHANGES: list[tuple[str, Any, str]] = [
    ("set_all_reduce_hook", torch.Tensor.zero_, r"set_all_reduce_hook\(\): saef takes the place"),
    ("set_gradient_divide_factor", 1.0, r"after SAEFState was created: call it before"),
]


def test_what_comes_too_late_is_refused_in_the_backward(pool: RankPool) -> None:
    pool.run(refused_later)
