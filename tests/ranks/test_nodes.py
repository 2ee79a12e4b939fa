"""Nodes of several ranks, each node a worker, against the reference with as many workers."""

import copy
import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from saef.step import buckets
from saef.step.weights import held
from support import reference
from support.cases import close, job_of, pairwise
from support.nodes import (
    Cut,
    entries,
    everything,
    go_on,
    gradient_of_nodes,
    joined,
    make,
    mesh_of,
    reference_of_nodes,
    refusal,
    shard,
    shards,
    step,
    train_ddp,
    train_replicated,
    train_sharded,
    whole,
    x_tilde,
)
from support.ranks import RankPool
from support.training import ADAMW, Job, batch, make_net, make_optimizer

VALUES: dict[str, list[Any]] = {
    "compressor": [saef.ScaledSign(block="layer"), saef.TopK(0.3, block=10), saef.ScaledSign(block=7)],
    "rule": ["momentum", "adamw", "sgd"],
    "averaging": [None, saef.Rotating(4), saef.AllReduce(5)],
    "exchange": ["replicated", "sharded"],
    "options": [{}, {"reshard_after_forward": False}, {"reshard_after_forward": True}],
}
FIXED = {"server": "same", "decay": "coupled", "step_ahead": 1.0}


def matches(
    runs: list[dict[str, Any]], expected: reference.SAEF, lrs: list[float], nodes: int, cut: Cut = shards
) -> None:
    """x at every step on every rank, and e and m of its part at the end. Tolerance: `support.cases`."""
    ranks = len(runs) // nodes
    _, x, _ = reference.drive(expected, gradient_of_nodes(ranks, cut), lrs)
    sizes = [run["e"].numel() for run in runs[:ranks]]
    assert sum(sizes) == expected.d and (max(sizes) < expected.d or ranks == 1)
    for rank, run in enumerate(runs):
        node, place = divmod(rank, ranks)
        own = x.split(sizes, dim=1)[place]
        if cut is entries:  # every rank has all of x
            whole = [joined([*row.split(expected.numels)]) for row in x]
            own = torch.stack([torch.cat([p.reshape(-1) for p in tensors]) for tensors in whole])
        close(run["x"], own)
        close(run["e"], expected.e[node].split(sizes)[place])
        kept = [expected.m[node], expected.v[node]] if isinstance(expected, reference.AdamW) else [expected.m[node]]
        if run["m"].numel():
            close(run["m"], torch.cat([v.split(sizes)[place] for v in kept]))


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise(VALUES), ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_sharded_nodes_equal_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """2 x 2: the reference has two workers, whose blocks are cut within the ranks' parts."""
    case = {**FIXED, **case}
    job = replace(job_of(case), lrs=job_of(case).lrs[:14])  # up to the step with lr = 0 and one more
    runs = pool.run(train_sharded, job, 2, case["options"])
    matches(runs, reference_of_nodes(case, 2, 2), job.lrs, 2)
    assert all(run["strategy"] == case["exchange"] for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", pairwise({k: v for k, v in VALUES.items() if k != "options"}), ids=lambda c: "-".join(map(str, c.values()))
)
def test_ddp_with_nodes_equals_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """2 x 2: each rank has half of each parameter's entries, or one more, or none."""
    case = {**FIXED, **case}
    job = replace(job_of(case), lrs=job_of(case).lrs[:14])
    runs = pool.run(train_ddp, job, 2)
    matches(runs, reference_of_nodes(case, 2, 2, entries), job.lrs, 2, entries)
    assert all(run["strategy"] == case["exchange"] for run in runs)


HOW = {"fsdp": (train_sharded, shards), "ddp": (train_ddp, entries)}
ALL = {**HOW, "replicate": (train_replicated, entries)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("more", [{"max_grad_norm": 0.5}, {"micro_batches": 2}], ids=lambda m: next(iter(m)))
def test_a_nodes_gradient_is_clipped_and_accumulated_as_one(pool: RankPool, more: dict[str, Any], how: str) -> None:
    """The norm is that of the mean gradient of a node's ranks, of which none has more than its part."""
    case = {
        **FIXED,
        "compressor": saef.TopK(0.3, block=10),
        "rule": "momentum",
        "averaging": None,
        "exchange": "sharded",
    }
    job = replace(job_of(case), lrs=job_of(case).lrs[:14])
    settings = {}
    if "max_grad_norm" in more:
        job.state.update(more)
        settings = more
    else:
        job = replace(job, **more)
    train, cut = ALL[how]
    matches(pool.run(train, job, 2), reference_of_nodes(case, 2, 2, cut, **settings), job.lrs, 2, cut)


def reduced_each_time(group: Any) -> None:
    """Without set_requires_gradient_sync(False) FSDP reduces, and saef exchanges, in each backward: the same steps."""
    found = []
    for each_time in (False, True):
        model, optimizer, state = make(group, JOB, 2)
        for t in range(4):
            optimizer.zero_grad()
            x, y = batch(dist.get_rank(group), t)
            for i in (0, 1):
                model.set_requires_gradient_sync(each_time or i == 1)
                (nn.functional.mse_loss(model(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]) / 2).backward()
            optimizer.step()
        found.append(everything(state))
        assert state.steps == 4
    for a, b in zip(*found, strict=True):
        close(a, b)  # the two gradients are added before or after they are averaged


@pytest.mark.slow
def test_each_backward_may_be_reduced(pool: RankPool) -> None:
    pool.run(reduced_each_time)


JOB = Job(
    state={"compressor": saef.ScaledSign(block=7), "exchange": "sharded", "averaging": saef.Rotating(4)},
    groups=[{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}],
)


def skips(group: Any, how: str, nodes: int) -> None:
    """A NaN on rank 3 in one row of one weight, which is in its part alone: all four skip, and go on together."""
    rank = dist.get_rank(group)
    model, optimizer, state = make(group, JOB, nodes, how)
    go_on(model, optimizer, JOB, rank, range(5))
    before = everything(state)
    bad: list[Any] = []

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: torch.cat([g[:, :-1], g[:, -1:] * float("nan")], dim=1))

    if rank == 3:
        bad.append(getattr(model, "module", model)[0].register_forward_hook(spoil))
    go_on(model, optimizer, JOB, rank, range(5, 6))
    if how == "fsdp":  # the rank of rank 3's node that has the other rows sees nothing of it
        assert all(bool(torch.isfinite(p.grad.to_local()).all()) for p in model.parameters()) == (rank != 3)
    assert (state.skipped, state.steps) == (1, 5)
    assert all(map(torch.equal, everything(state), before))
    for hook in bad:
        hook.remove()
    go_on(model, optimizer, JOB, rank, range(6, 8))
    assert (state.skipped, state.steps, state.skipped_in_a_row) == (1, 7, 0)


@pytest.mark.parametrize(("how", "nodes"), [("fsdp", 2), ("ddp", 2), ("replicate", 0)])
def test_a_nan_on_one_rank_skips_on_all(pool: RankPool, how: str, nodes: int) -> None:
    pool.run(skips, how, nodes)


def looks(group: Any, how: str, nodes: int, options: dict[str, Any]) -> None:
    """zero_grad() and evaluation wherever a loop has them: FSDP may hold parameters that were gathered before."""
    runs = []
    for busy in (False, True):
        model, optimizer, state = make(group, JOB, nodes, how, **options)
        for t in range(6):
            x, y = batch(dist.get_rank(group), t)
            loss = nn.functional.mse_loss(model(x), y)
            if busy:
                evaluate(model, state, x)
            optimizer.zero_grad()
            loss.backward()
            if busy:
                evaluate(model, state, x)
            optimizer.step()
            if busy:
                evaluate(model, state, x)
        assert float(state.e.abs().max()) > 1e-3
        runs.append(everything(state))
    assert all(map(torch.equal, *runs))


def evaluate(model: Any, state: saef.SAEFState, x: Tensor) -> None:
    """At x: the same operations, so 1e-12 for numbers of order 1 in float64; x_half is elsewhere by 1e-3."""
    with torch.no_grad():
        shown = model(x)
    net = make_net()
    for p, value in zip(net.parameters(), whole(state, state.weights.x()), strict=True):
        p.data.copy_(value)
    torch.testing.assert_close(shown, net(x), rtol=0, atol=1e-12)


RESHARDS, HOLDS = {"reshard_after_forward": True}, {"reshard_after_forward": False}


@pytest.mark.parametrize(
    ("how", "nodes", "options"),
    [("fsdp", 2, RESHARDS), ("fsdp", 2, HOLDS), ("ddp", 2, {}), ("replicate", 2, {}), ("replicate", 0, {})],
)
def test_evaluation_sees_x_and_training_x_half_wherever_they_are(
    pool: RankPool, how: str, nodes: int, options: dict[str, Any]
) -> None:
    pool.run(looks, how, nodes, options)


def early(group: Any, how: str, nodes: int) -> int:
    """Buckets that are on their way when the first layer's gradient, the backward's last, has been reduced."""
    with mock.patch.object(buckets, "BUCKET_BYTES", 64):
        model, optimizer, state = make(group, JOB, nodes, how)
        found: list[int] = []
        model[0].weight.register_post_accumulate_grad_hook(
            lambda _: found.append(len(state.engine.sending.prepared.buckets))
        )
        go_on(model, optimizer, JOB, dist.get_rank(group), range(1))
    return found[0]


@pytest.mark.parametrize(("how", "nodes"), [("fsdp", 2), ("replicate", 0)])
def test_the_exchange_overlaps_with_the_backward(pool: RankPool, how: str, nodes: int) -> None:
    assert min(pool.run(early, how, nodes)) >= 2


# ---- checkpoints --------------------------------------------------------------------------------------------------

ADAM = Job(
    state={"compressor": saef.ScaledSign(block=7), "exchange": "sharded", "averaging": saef.Rotating(4)},
    groups=[{"lr": 0.01, **ADAMW, "weight_decay": 1e-2}],
    optimizer="AdamW",
)


def resumes(group: Any, folder: str, form: str, how: str) -> None:
    """Six steps, a checkpoint, six more; and in another process the last six from the checkpoint: the same bits."""
    rank = dist.get_rank(group)
    model, optimizer, state = make(group, ADAM, 2, how)
    go_on(model, optimizer, ADAM, rank, range(6))
    if form == "folder":
        saef.save_checkpoint(folder, state, {"note": 1, "model": model.state_dict()})
        before = [held(p).clone() for p in model.parameters()]
    else:
        dcp.save({"saef": state}, checkpoint_id=folder)
    go_on(model, optimizer, ADAM, rank, range(6, 12))

    other, second, loaded = make(group, ADAM, 2, how)
    go_on(other, second, ADAM, rank, range(20, 22))  # it has states of its own, to be replaced
    if form == "folder":
        extra = saef.load_checkpoint(folder, loaded)
        assert extra is not None and extra["note"] == 1
        assert all(map(torch.equal, map(held, extra["model"].values()), before))
    else:
        dcp.load({"saef": loaded}, checkpoint_id=folder)
    assert loaded.steps == 6
    go_on(other, second, ADAM, rank, range(6, 12))
    assert all(map(torch.equal, everything(state), everything(loaded)))
    assert loaded.metrics()["bytes_sent_phase1"] == state.metrics()["bytes_sent_phase1"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("form", ["folder", "torch.distributed.checkpoint"])
def test_nodes_resume_bit_for_bit(pool: RankPool, tmp_path: Path, form: str, how: str) -> None:
    pool.run(resumes, str(tmp_path / "checkpoint"), form, how)


def saved(group: Any, folder: str, how: str) -> tuple[Tensor, Tensor]:
    model, optimizer, state = make(group, ADAM, 2, how)
    go_on(model, optimizer, ADAM, dist.get_rank(group), range(6))
    saef.save_checkpoint(f"{folder}/saef", state)
    dcp.save(state.consolidated_state_dict(), checkpoint_id=f"{folder}/dcp")
    return x_tilde(state), state.x_tilde() - state.weights.x()


def taken_over(group: Any, folder: str, nodes: int, form: str, how: str) -> Tensor:
    model, optimizer, state = make(group, ADAM, nodes, how)
    if form == "folder":
        saef.load_checkpoint(f"{folder}/saef", state)
    else:
        target = state.consolidated_state_dict()
        dcp.load(target, checkpoint_id=f"{folder}/dcp")
        state.load_state_dict(target)
    found = x_tilde(state)
    assert state.steps == 6
    go_on(model, optimizer, ADAM, dist.get_rank(group), range(6, 7))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_other_numbers_of_nodes_go_on_from_the_same_x_tilde(pool: RankPool, tmp_path: Path, how: str) -> None:
    """To 1e-12: the means over the nodes are rounded anew, numbers of order 1 in float64. DDP's load FSDP2's, too."""
    before, owed = pool.run(saved, str(tmp_path), how)[0]
    assert float(owed.abs().max()) > 1e-4
    for form, other in (("folder", "ddp"), ("folder", "fsdp"), ("torch.distributed.checkpoint", how)):
        for found in pool.run(taken_over, str(tmp_path), 4, form, other):
            torch.testing.assert_close(found, before, rtol=0, atol=1e-12)
        with pool_of_two() as two:
            for found in two.run(taken_over, str(tmp_path), 1, form, other, ranks=2):
                torch.testing.assert_close(found, before, rtol=0, atol=1e-12)


def crossing(group: Any, folder: str, how: str, other: str) -> tuple[Tensor, Tensor, str]:
    """(x~ before, x~ after, what loading the rank form says) where as many ranks have other parts of the parameters."""
    model, optimizer, state = make(group, ADAM, 2, how)
    go_on(model, optimizer, ADAM, dist.get_rank(group), range(6))
    saef.save_checkpoint(folder, state)
    own, before = state.state_dict(), x_tilde(state)
    _, _, state = make(group, ADAM, 2, other)
    with pytest.raises(ValueError) as caught:
        state.load_state_dict(own)
    saef.load_checkpoint(folder, state)
    return before, x_tilde(state), str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "other"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_as_many_ranks_with_other_parts_take_the_means(pool: RankPool, tmp_path: Path, how: str, other: str) -> None:
    for before, after, said in pool.run(crossing, str(tmp_path), how, other):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
        assert "the ranks of a node had other parts of the parameters" in said and "consolidated form" in said


@contextmanager
def pool_of_two() -> Iterator[RankPool]:
    """A mesh makes process groups, which all ranks of the job must come to."""
    two = RankPool(2)
    yield two
    two.stop()


# ---- FSDP's options -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("how", "nodes"), [("fsdp", 1), ("fsdp", 4), ("ddp", 1)])
def test_one_node_and_nodes_of_one_rank_equal_the_reference(pool: RankPool, how: str, nodes: int) -> None:
    """Of 1 x 4 some ranks have no part of the smallest parameters."""
    case = {**FIXED, "compressor": saef.ScaledSign(block=7), "rule": "adamw", "averaging": None, "exchange": "sharded"}
    job = replace(job_of(case), lrs=job_of(case).lrs[:14])
    train, cut = HOW[how]
    matches(pool.run(train, job, nodes), reference_of_nodes(case, nodes, 4 // nodes, cut), job.lrs, nodes, cut)


def bf16(group: Any) -> float:
    """The largest difference of x from FSDP's own replicas (HSDP), uncompressed, in ten steps."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    job = Job(state={"compressor": saef.Identity()}, groups=[{"lr": 0.1, "momentum": 0.9}], dtype=torch.float32)
    ours, optimizer, state = make(group, job, 2, "fsdp", mp_policy=policy)
    seen: list[torch.dtype] = []
    ours[0].register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    mesh = mesh_of(2, 2)
    theirs = make_net(torch.float32)
    for layer in [*theirs[::2], theirs]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    plain = make_optimizer(theirs, job.groups, "SGD")
    for t in range(10):
        go_on(ours, optimizer, job, dist.get_rank(group), range(t, t + 1))
        go_on(theirs, plain, job, dist.get_rank(group), range(t, t + 1))
    assert {*seen} == {torch.bfloat16} and state.e.dtype == state.weights.x().dtype == torch.float32
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a.to_local() - b.to_local()).abs().max()) for a, b in pairs if a.to_local().numel())


@pytest.mark.slow
def test_a_mixed_precision_policy_trains_as_in_fsdps_own_replicas(pool: RankPool) -> None:
    """x, of order 1, differs by roundings of float32: 10 steps, amplified by 1/(1 - mu) = 10, of 6e-8 each, 6e-6.

    It would be 1e-3 and more if x or the gradients had been rounded to bfloat16 on the way.
    """
    assert max(pool.run(bf16)) < 6e-6


def checkpointed(group: Any) -> None:
    runs = []
    for wrapped in (False, True):
        net = make_net()
        if wrapped:
            for i in (0, 2):
                net[i] = checkpoint_wrapper(net[i])
        mesh = mesh_of(2, 2)
        model: Any = shard(net, mesh)
        optimizer = make_optimizer(model, JOB.groups, "SGD")
        state = saef.SAEFState(model, optimizer, mesh=mesh, **JOB.state)
        go_on(model, optimizer, JOB, dist.get_rank(group), range(6))
        runs.append(everything(state))
    assert all(map(torch.equal, *runs))


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(pool: RankPool) -> None:
    pool.run(checkpointed)


def later(group: Any) -> None:
    """A state that is created when FSDP holds gathered parameters, from an evaluation before."""
    runs = []
    for evaluated in (False, True):
        mesh = mesh_of(2, 2)
        model: Any = shard(make_net(), mesh, reshard_after_forward=False)
        optimizer = make_optimizer(model, JOB.groups, "SGD")
        if evaluated:
            with torch.no_grad():
                model(batch(0, 0)[0])
            assert not hasattr(model[0].weight, "full_tensor")
        state = saef.SAEFState(model, optimizer, mesh=mesh, **JOB.state)
        go_on(model, optimizer, JOB, dist.get_rank(group), range(3))
        runs.append(everything(state))
    assert all(map(torch.equal, *runs))


@pytest.mark.slow
def test_a_state_may_be_created_after_an_evaluation(pool: RankPool) -> None:
    pool.run(later)


def kept(group: Any) -> None:
    """Momentum lies in the optimizer's state as FSDP's optimizers have it, and what torch loads there counts."""
    model, optimizer, state = make(group, JOB, 2)
    go_on(model, optimizer, JOB, dist.get_rank(group), range(3))
    own = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]["momentum_buffer"]
    assert own.shape == (9, 6) and torch.equal(own.to_local().reshape(-1), state.m[: own.to_local().numel()])
    before = state.m.clone()
    saved = optimizer.state_dict()
    doubled = {i: {"momentum_buffer": 2 * entry["momentum_buffer"]} for i, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": doubled})
    state.reset_errors()
    assert torch.equal(state.m, 2 * before)


def test_momentum_is_in_the_optimizers_state(pool: RankPool) -> None:
    pool.run(kept)


def written(group: Any, job: Job, how: str) -> None:
    """torch takes no DTensor that begins in the middle of a vector."""
    model, optimizer, state = make(group, job, 2, how)
    go_on(model, optimizer, job, dist.get_rank(group), range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for saved in (torch.load(file, weights_only=False), copy.deepcopy(optimizer.state_dict())):
        of = [entry for entries in saved["state"].values() for entry in entries.values() if isinstance(entry, DTensor)]
        assert len(of) == (2 if job.optimizer == "AdamW" else 1) * len([*model.parameters()])
    before = state.m.clone()
    optimizer.load_state_dict(saved)
    go_on(model, optimizer, job, dist.get_rank(group), range(3, 4))
    assert not torch.equal(state.m, before)


@pytest.mark.parametrize("job", ["sign", "adamw"])
def test_the_optimizers_state_can_be_written(pool: RankPool, job: str) -> None:
    pool.run(written, JOB if job == "sign" else ADAM, "fsdp")


def halved(group: Any, before: bool) -> Tensor:
    """Hooks that change FSDP's gradients, registered before the state or after it."""
    net = shard(make_net(), mesh := mesh_of(2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    def register() -> None:
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(halve)

    if before:
        register()
    saef.SAEFState(net, optimizer, mesh=mesh, compressor=saef.TopK(0.3))
    if not before:
        register()
    go_on(net, optimizer, JOB, dist.get_rank(group), range(4))
    return torch.cat([held(p).detach().reshape(-1) for p in net.parameters()])


def test_hooks_on_gradients_count_whenever_they_were_registered(pool: RankPool) -> None:
    for a, b in zip(*(pool.run(halved, before) for before in (True, False)), strict=True):
        assert torch.equal(a, b)


# ---- DDP's -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["sign", "adamw"])
def test_nodes_of_one_rank_are_todays_ddp_bit_for_bit(pool: RankPool, job: str) -> None:
    chosen = replace(JOB if job == "sign" else ADAM, lrs=[0.05] * 10, dtype=torch.float32)
    for ours, plain in zip(pool.run(train_ddp, chosen, 4), pool.run(train_ddp, chosen, 0), strict=True):
        assert all(torch.equal(ours[name], plain[name]) for name in ("x", "e", "m", "e_server"))
        assert ours["metrics"]["bytes_sent"] == plain["metrics"]["bytes_sent"]


def alone(group: Any) -> None:
    """A model with neither DDP nor FSDP: optimizer.step() exchanges by itself, with the same bits."""
    runs = []
    for how in ("ddp", "nothing", "buckets"):
        job = replace(JOB, ddp={"gradient_as_bucket_view": True} if how == "buckets" else {})
        if how == "nothing":
            model: Any = make_net()
            optimizer = make_optimizer(model, job.groups, "SGD")
            state = saef.SAEFState(model, optimizer, mesh=mesh_of(2, 2), **job.state)
        else:
            model, optimizer, state = make(group, job, 2, "ddp")
        for t in range(6):
            optimizer.zero_grad()
            x, y = batch(dist.get_rank(group), t)
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        runs.append(everything(state))
    assert all(map(torch.equal, runs[0], runs[1])) and all(map(torch.equal, runs[0], runs[2]))


def test_a_model_without_ddp_trains_the_same(pool: RankPool) -> None:
    pool.run(alone)


def half_precision(group: Any) -> tuple[list[Tensor], list[Tensor]]:
    """bfloat16 parameters are the master rounded, of which each rank has its part; also after a resume."""
    job = replace(ADAM, dtype=torch.bfloat16)
    model, optimizer, state = make(group, job, 2, "ddp")
    rank = dist.get_rank(group)
    go_on(model, optimizer, job, rank, range(4))
    saved = io.BytesIO()
    torch.save(state.state_dict(), saved)
    go_on(model, optimizer, job, rank, range(4, 8))
    master = whole(state, state.weights.x())
    assert all(map(torch.equal, [v.bfloat16() for v in master], [p.detach() for p in model.parameters()]))
    assert any(not torch.equal(v, v.bfloat16().float()) for v in master)
    other, second, loaded = make(group, job, 2, "ddp")
    saved.seek(0)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    go_on(other, second, job, rank, range(4, 8))
    assert all(map(torch.equal, everything(state), everything(loaded)))
    return master, [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
def test_16_bit_parameters_have_a_master_in_parts(pool: RankPool) -> None:
    runs = pool.run(half_precision)
    for run in runs[1:]:
        assert all(map(torch.equal, run[0], runs[0][0])) and all(map(torch.equal, run[1], runs[0][1]))


def looked_at(group: Any) -> None:
    """One rank alone looks at the parameters between a forward and its backward: nothing is gathered for that."""
    model, optimizer, state = make(group, JOB, 2, "ddp")
    rank = dist.get_rank(group)
    go_on(model, optimizer, JOB, rank, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(rank, 3)
    loss = nn.functional.mse_loss(model(x), y)
    assert not all(map(torch.equal, before, [p.detach() for p in model.parameters()]))
    if rank == 0:
        assert all(map(torch.equal, before, model.module.state_dict().values()))
    loss.backward()
    optimizer.step()
    go_on(model, optimizer, JOB, rank, range(4, 6))
    assert state.steps == 6


def test_one_rank_alone_may_look_at_x(pool: RankPool) -> None:
    pool.run(looked_at)


def rewritten(group: Any) -> str:
    job = replace(JOB, ddp={"gradient_as_bucket_view": True})
    model, optimizer, _ = make(group, job, 2, "ddp")
    step(model, job, dist.get_rank(group), 0)
    model.module[0].weight.grad.mul_(0.5)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_gradient_changed_after_it_was_averaged_is_refused(pool: RankPool) -> None:
    assert all("give SAEFState max_grad_norm" in said for said in pool.run(rewritten))


def laid_out(group: Any) -> None:
    """Parts are cut in the order of memory, here channels_last; names and shapes are the model's in a checkpoint."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.LazyLinear(2)).double()
    net(torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    net.to(memory_format=torch.channels_last)
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, mesh=mesh_of(2, 2))
    model.register_comm_hook(state, saef_hook)
    for t in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * t + dist.get_rank(group))
        model(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    saved = state.consolidated_state_dict()
    assert all(torch.equal(saved["x"][name], p) for name, p in net.named_parameters())
    net.to(memory_format=torch.contiguous_format)
    with pytest.raises(RuntimeError, match="Lay the model out"):
        model(torch.zeros(1, 3, 4, 4, dtype=torch.float64))


@pytest.mark.slow
def test_parts_follow_the_memory(pool: RankPool) -> None:
    pool.run(laid_out)


# ---- what is trained -------------------------------------------------------------------------------------------------


def nothing_here(group: Any, how: str) -> None:
    """The only parameter has one row: with FSDP2 the second rank of a node has no part of anything."""
    mesh = mesh_of(2, 2)
    torch.manual_seed(1)
    net: Any = nn.Linear(3, 1, bias=False).double()
    model: Any = fully_shard(net, mesh=mesh["shard"]) if how == "fsdp" else DDP(net, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, mesh=mesh, compressor=saef.Identity())
    if how == "ddp":
        model.register_comm_hook(state, saef_hook)
    (w,), m = whole(state, state.weights.x()), torch.zeros(1, 3, dtype=torch.float64)
    for t in range(5):
        x = [
            torch.randn(4, 3, generator=torch.Generator().manual_seed(9 * t + k), dtype=torch.float64) for k in range(4)
        ]
        model(x[dist.get_rank(group)]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        m = 0.9 * m + torch.stack([(2 * (v @ w.T) * v).mean(0) for v in x]).mean(0)
        w = w - 0.1 * m
    # 5 steps of full-precision SGD with momentum, in float64, on numbers of order 1: some 100 roundings of 1e-16.
    close(whole(state, state.weights.x())[0], w)


@pytest.mark.parametrize("how", HOW)
def test_a_rank_may_have_no_part_of_anything(pool: RankPool, how: str) -> None:
    pool.run(nothing_here, how)


def freezes(group: Any, how: str) -> None:
    """A layer is frozen and thawed: what the others owe stays theirs."""
    job = replace(JOB, ddp={"find_unused_parameters": True})
    model, optimizer, state = make(group, job, 2, how)
    rank = dist.get_rank(group)
    net = getattr(model, "module", model)
    go_on(model, optimizer, job, rank, range(3))
    before = whole(state, state.e)
    for p in net[0].parameters():
        p.requires_grad_(False)
    net[0].zero_grad()
    model(batch(rank, 3)[0])  # the forward follows
    assert all(map(torch.equal, whole(state, state.engine.snapshot().e), before[2:]))
    go_on(model, optimizer, job, rank, range(4, 6))
    for p in net[0].parameters():
        p.requires_grad_(True)
    go_on(model, optimizer, job, rank, range(6, 8))
    assert len(whole(state, state.e)) == 6 and state.steps == 7


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_what_is_trained_may_change(pool: RankPool, how: str) -> None:
    pool.run(freezes, how)


# ---- what it costs --------------------------------------------------------------------------------------------------


def costs(group: Any, exchange: str, how: str) -> tuple[int, dict[str, int], dict[str, float]]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    mesh = mesh_of(2, 2)
    model: Any = shard(net, mesh) if how == "fsdp" else DDP(net, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"compressor": saef.ScaledSign(block="layer"), "exchange": exchange}
    state = saef.SAEFState(model, optimizer, mesh=mesh, **settings)
    if how == "ddp":
        model.register_comm_hook(state, saef_hook)
    for _ in range(3):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = {"e": state.e, "m": state.m, "e_server": state.e_server, "x": state.weights.flat}
    return sum(p.numel() for p in net.parameters()), {n: v.numel() for n, v in held.items()}, state.metrics()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_memory_is_a_half_on_each_of_two_ranks_and_bytes_are_one_workers(
    pool: RankPool, exchange: str, how: str
) -> None:
    """A message of one worker for all of the model, 2 x 2 blocks of 2048: bits and a float32 each; and 8-byte ends."""
    of_a_node = saef.message_bytes(saef.ScaledSign(block="layer"), [2048] * 4)
    runs = pool.run(costs, exchange, how)
    for d, memory, _ in runs:
        assert memory == {"e": d // 2, "m": d, "e_server": d // 2 if exchange == "replicated" else d // 4, "x": d // 2}
    sent = [run[2]["bytes_sent_phase1"] + run[2]["bytes_sent_phase2"] for run in runs]
    assert len({*sent}) == 1  # spread over the ranks of a node
    expected = 3 * of_a_node  # K - 1 = 1 message a step, or half of one there and half of one back
    assert 0 <= sum(sent[:2]) - expected <= 3 * 2 * 4 * 8
    assert sum(sent[:2]) < 3 * saef.message_bytes(saef.ScaledSign(block="layer"), [4096] * 2) * 1.1


# ---- what fails, or is refused ---------------------------------------------------------------------------------------


def disagrees(group: Any) -> str:
    """Rank 3 changes lr when its messages contain it already: so the other rank of its node does not step either."""
    rank = dist.get_rank(group)
    model, optimizer, _ = make(group, JOB, 2)
    step(model, JOB, rank, 0)
    if rank == 3:
        optimizer.param_groups[0]["lr"] = 1.0
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_if_a_rank_cannot_step_none_of_its_node_does(pool: RankPool) -> None:
    said = pool.run(disagrees)
    assert said[:2] == ["", ""]
    assert "lr, momentum, weight_decay" in said[3] and said[2].startswith("rank 1 of this node: lr, momentum")


def dies(group: Any, how: str) -> None:
    model, optimizer, _ = make(group, JOB, 2, how)
    rank = dist.get_rank(group)
    go_on(model, optimizer, JOB, rank, range(2))
    if rank == 3:
        os._exit(1)
    go_on(model, optimizer, JOB, rank, range(2, 4))


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_nodes(pool: RankPool) -> None:
    """Those of its node, those that exchange with it, and those that do neither."""
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        pool.run(dies, "ddp")
    said = str(caught.value)
    assert "rank 3: died" in said and said.count("the exchange with the other ranks failed") >= 3
    assert time.monotonic() - began < 60  # not after the process group's timeout, 120 s


def odd(group: Any) -> str:
    """Rank 1 has another compressor than the rest: all four say so, though it exchanges with rank 3 alone."""
    job = replace(JOB, state={"compressor": saef.TopK(0.5 if dist.get_rank(group) == 1 else 0.1)})
    with pytest.raises(ValueError, match="settings differ") as caught:
        make(group, job, 2)
    return str(caught.value)


def test_settings_are_compared_among_all_ranks(pool: RankPool) -> None:
    said = pool.run(odd)
    assert len({*said}) == 1 and "rank 0 has TopK(ratio=0.1" in said[0] and "rank 1 has TopK(ratio=0.5" in said[0]


def unsynchronised(group: Any) -> None:
    model, optimizer, state = make(group, JOB, 2)
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call model\.set_requires_gradient_sync\(True\)"):
        optimizer.step()
    assert state.steps == 0


def in_part(group: Any) -> None:
    """One of the layers alone holds back: of two micro-batches, and of one."""
    model, optimizer, state = make(group, JOB, 2)
    for parts in (2, 1):
        layer = next(m for m in model if isinstance(m, FSDPModule))
        model.set_requires_gradient_sync(False)
        for i in range(parts):
            if i + 1 == parts:
                model.set_requires_gradient_sync(True)
                layer.set_requires_gradient_sync(False)
            loss = model(torch.ones(1, 6, dtype=torch.float64)).sum()
            if i + 1 < parts:
                loss.backward()
        with pytest.raises(RuntimeError, match=r"call model\.set_requires_gradient_sync\(True\), of the whole model"):
            loss.backward()
        optimizer.zero_grad()
        layer.set_requires_gradient_sync(True)
    assert state.steps == 0


def test_gradients_that_fsdp_has_not_reduced_are_no_zeros(pool: RankPool) -> None:
    pool.run(unsynchronised)
    pool.run(in_part)


def refused(group: Any, what: str) -> str:
    mesh, settings = mesh_of(2, 2), {}
    net: Any = make_net()
    if what == "sharded over all":
        shard(net, {"shard": mesh})
    elif what == "sharded over the outer":
        shard(net, {"shard": mesh["replicate"]})
    elif what == "in part":
        fully_shard(net[0], mesh=mesh["shard"])
    elif what == "a factor within nodes":
        replicate(net, mesh=mesh["shard"]).set_gradient_divide_factor(1.0)
    else:
        shard(net, mesh)
    if what == "a factor":
        net[0].set_gradient_divide_factor(1.0)
    given: Any = {"no mesh": None, "one axis": mesh["shard"], "no DeviceMesh": (2, 2)}.get(what, mesh)
    if what == "local steps":
        settings["local_steps"] = 2
    if what == "a group, too":
        settings["process_group"] = mesh.get_group(0)
    if what == "other ranks than DDP":
        net = DDP(make_net(), process_group=mesh.get_group(1))
    return refusal(net, "RMSprop" if what == "another optimizer" else "SGD", mesh=given, **settings)


REFUSED = {
    "no mesh": r"is a DTensor.*mesh=saef\.node_mesh\(device\)",
    "one axis": r"two axes.*leave mesh out",
    "no DeviceMesh": r"saef\.node_mesh\(device\), or another DeviceMesh.*got \(2, 2\)",
    "sharded over all": r"shard within the nodes alone.*fully_shard\(module, mesh=mesh\[\"shard\"\]\)",
    "sharded over the outer": r"is \(Shard\(dim=0\),\) over ranks.*shard within the nodes alone",
    "in part": r"parameters \['2\.weight'.*are not sharded or replicated.*for the whole model too",
    "a factor": r"set_gradient_divide_factor\(\).*leave it out, and multiply the loss by all ranks over that factor",
    "a factor within nodes": r"set_gradient_divide_factor\(\).*saef averages the nodes",
    "local steps": r"FSDP2 and replicate are for SGD, AdamW and Adam with local_steps=1",
    "another optimizer": r"FSDP2 and replicate are for SGD, AdamW and Adam with local_steps=1",
    "other ranks than DDP": r"mesh has ranks \[0, 1, 2, 3\], DistributedDataParallel's process group has \[",
    "a group, too": r"give a mesh, a process_group or a transport",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nodes_cannot_honour_is_refused_at_once(pool: RankPool, what: str) -> None:
    for said in pool.run(refused, what):
        assert re.search(REFUSED[what], said, re.S), said


def test_node_mesh_needs_a_launcher(pool: RankPool) -> None:
    for found in pool.run(made):
        assert found == ((2, 2), ("replicate", "shard"), "3 ranks a node", "torchrun")


def made(group: Any) -> tuple[Any, ...]:
    found: list[Any] = []
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):
        mesh = saef.node_mesh("cpu")
        found += [tuple(mesh.shape), mesh.mesh_dim_names]
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "3"}):
        with pytest.raises(ValueError, match="4 ranks are no whole number of nodes of 3"):
            saef.node_mesh("cpu")
        found.append("3 ranks a node")
    with mock.patch.dict(os.environ):
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        with pytest.raises(RuntimeError, match="which torchrun and deepspeed set .*say node_size"):
            saef.node_mesh("cpu")
        found.append("torchrun")
    return tuple(found)
