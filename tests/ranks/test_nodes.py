"""Nodes of several ranks, each node a worker, against the reference with as many workers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import saef
from support import reference
from support.cases import close, job_of, pairwise
from support.nodes import gradient_of_nodes, reference_of_nodes, train_sharded
from support.ranks import RankPool

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
