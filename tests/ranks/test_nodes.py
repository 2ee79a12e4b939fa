"""Nodes of several ranks, each node a worker, against the reference with as many workers."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import saef
from saef.step import buckets
from support import reference
from support.cases import close, job_of, pairwise
from support.nodes import everything, go_on, gradient_of_nodes, make, reference_of_nodes, train_sharded
from support.ranks import RankPool
from support.training import Job, batch, make_net

VALUES: dict[str, list[Any]] = {
    "compressor": [saef.ScaledSign(block="layer"), saef.TopK(0.3, block=10), saef.ScaledSign(block=7)],
    "rule": ["momentum", "adamw", "sgd"],
    "averaging": [None, saef.Rotating(4), saef.AllReduce(5)],
    "exchange": ["replicated", "sharded"],
    "options": [{}, {"reshard_after_forward": False}, {"reshard_after_forward": True}],
}
FIXED = {"server": "same", "decay": "coupled", "step_ahead": 1.0}


def matches(runs: list[dict[str, Any]], expected: reference.SAEF, lrs: list[float], nodes: int) -> None:
    """x at every step on every rank, and e and m of its part at the end. Tolerance: `support.cases`."""
    ranks = len(runs) // nodes
    _, x, _ = reference.drive(expected, gradient_of_nodes(ranks), lrs)
    sizes = [run["e"].numel() for run in runs[:ranks]]
    assert sum(sizes) == expected.d and max(sizes) < expected.d
    for rank, run in enumerate(runs):
        node, place = divmod(rank, ranks)
        close(run["x"], x.split(sizes, dim=1)[place])
        close(run["e"], expected.e[node].split(sizes)[place])
        kept = [expected.m[node], expected.v[node]] if isinstance(expected, reference.AdamW) else [expected.m[node]]
        if run["m"].numel():
            close(run["m"], torch.cat([v.split(sizes)[place] for v in kept]))


@pytest.mark.parametrize("case", pairwise(VALUES), ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_sharded_nodes_equal_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """2 x 2: the reference has two workers, whose blocks are cut within the ranks' parts."""
    case = {**FIXED, **case}
    job = replace(job_of(case), lrs=job_of(case).lrs[:22])  # up to the step with lr = 0 and one more
    runs = pool.run(train_sharded, job, 2, case["options"])
    matches(runs, reference_of_nodes(case, 2, 2), job.lrs, 2)
    assert all(run["strategy"] == case["exchange"] for run in runs)


@pytest.mark.parametrize("more", [{"max_grad_norm": 0.5}, {"micro_batches": 2}], ids=lambda m: next(iter(m)))
def test_a_nodes_gradient_is_clipped_and_accumulated_as_one(pool: RankPool, more: dict[str, Any]) -> None:
    """The norm is that of the mean gradient of a node's ranks, of which none has more than its part."""
    case = {
        **FIXED,
        "compressor": saef.TopK(0.3, block=10),
        "rule": "momentum",
        "averaging": None,
        "exchange": "sharded",
    }
    job = replace(job_of(case), lrs=job_of(case).lrs[:22])
    settings = {}
    if "max_grad_norm" in more:
        job.state.update(more)
        settings = more
    else:
        job = replace(job, **more)
    matches(pool.run(train_sharded, job, 2), reference_of_nodes(case, 2, 2, **settings), job.lrs, 2)


JOB = Job(
    state={"compressor": saef.ScaledSign(block=7), "exchange": "sharded", "averaging": saef.Rotating(4)},
    groups=[{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}],
)


def skips(group: Any) -> None:
    """A NaN on rank 3 in one row of one weight, which is in its part alone: all four skip, and go on together."""
    rank = dist.get_rank(group)
    model, optimizer, state = make(group, JOB, 2)
    go_on(model, optimizer, JOB, rank, range(5))
    before = everything(state)
    bad: list[Any] = []

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: torch.cat([g[:, :-1], g[:, -1:] * float("nan")], dim=1))

    if rank == 3:
        bad.append(model[0].register_forward_hook(spoil))
    go_on(model, optimizer, JOB, rank, range(5, 6))
    own = [bool(torch.isfinite(p.grad.to_local()).all()) for p in model.parameters()]
    assert all(own) == (rank != 3)  # the rank of rank 3's node that has the other rows sees nothing of it
    assert (state.skipped, state.steps) == (1, 5)
    assert all(map(torch.equal, everything(state), before))
    for hook in bad:
        hook.remove()
    go_on(model, optimizer, JOB, rank, range(6, 8))
    assert (state.skipped, state.steps, state.skipped_in_a_row) == (1, 7, 0)


def test_a_nan_on_one_rank_skips_on_all(pool: RankPool) -> None:
    pool.run(skips)


def looks(group: Any, reshards: bool) -> None:
    """zero_grad() and evaluation wherever a loop has them: FSDP may hold parameters that were gathered before."""
    runs = []
    for busy in (False, True):
        model, optimizer, state = make(group, JOB, 2, reshard_after_forward=reshards)
        sharded = [*model.parameters()]
        for t in range(6):
            x, y = batch(dist.get_rank(group), t)
            loss = nn.functional.mse_loss(model(x), y)
            if busy:
                evaluate(model, sharded, x)
            optimizer.zero_grad()
            loss.backward()
            if busy:
                evaluate(model, sharded, x)
            optimizer.step()
            if busy:
                evaluate(model, sharded, x)
        assert float(state.e.abs().max()) > 1e-3
        runs.append(everything(state))
    assert all(map(torch.equal, *runs))


def evaluate(model: Any, sharded: list[Any], x: Tensor) -> None:
    """At x: the same operations, so 1e-12 for numbers of order 1 in float64; x_half is elsewhere by 1e-3."""
    with torch.no_grad():
        shown = model(x)
    whole = make_net()
    for p, value in zip(whole.parameters(), sharded, strict=True):
        p.data.copy_(value.full_tensor())
    torch.testing.assert_close(shown, whole(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reshards", [True, False])
def test_evaluation_sees_x_and_training_x_half_whatever_fsdp_has_gathered(pool: RankPool, reshards: bool) -> None:
    pool.run(looks, reshards)


def early(group: Any) -> int:
    """Buckets that are on their way when the first layer's gradient, the backward's last, has been reduced."""
    with mock.patch.object(buckets, "BUCKET_BYTES", 64):
        model, optimizer, state = make(group, JOB, 2)
        found: list[int] = []
        model[0].weight.register_post_accumulate_grad_hook(
            lambda _: found.append(len(state.engine.sending.prepared.buckets))
        )
        go_on(model, optimizer, JOB, dist.get_rank(group), range(1))
    return found[0]


def test_the_exchange_overlaps_with_the_backward(pool: RankPool) -> None:
    assert min(pool.run(early)) >= 2
