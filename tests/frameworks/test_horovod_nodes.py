"""Horovod where a worker is a node of two ranks: the steps of DDP with nodes, bit for bit."""

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if find_spec("horovod") is None:
    pytest.skip("needs Horovod: `make horovod` builds it", allow_module_level=True)

import horovod.torch as hvd

import saef
from saef.integrations.horovod import SAEFCompression
from support import horovod_jobs as jobs
from support.equal import snapshot
from support.horovod_ranks import HorovodPool
from support.nodes import train_ddp
from support.ranks import RankPool
from support.training import ADAMW, Job, batch, make_model, wild_lrs

SIGN = Job(
    {"compressor": saef.ScaledSign(7), "exchange": "sharded", "averaging": saef.Rotating(4)},
    [{"momentum": 0.9, "weight_decay": 1e-2}],
    lrs=wild_lrs(20),
    dtype=torch.float32,
    micro_batches=2,
)
TOPK = Job(
    {"compressor": saef.TopK(0.3, 10), "exchange": "replicated", "max_grad_norm": 0.5},
    [{**ADAMW, "weight_decay": 1e-2}],
    "AdamW",
    lrs=[0.02] * 20,
)
ROUNDS = replace(TOPK, state={"compressor": saef.TopK(0.3, 10), "local_steps": 5})


def on_nodes(job: Job) -> Job:
    return replace(job, state={**job.state, "node_size": 2})


@pytest.mark.parametrize("job", [SIGN, TOPK, ROUNDS], ids=["sign", "top-k", "local steps"])
def test_nodes_are_those_of_ddp_bit_for_bit(pool: RankPool, horovods: dict[int, HorovodPool], job: Job) -> None:
    """Two nodes of two ranks; DDP's equal the reference with two workers, in test_nodes.py."""
    runs = horovods[4].run(jobs.train, on_nodes(job), {})
    for run, other in zip(runs, pool.run(train_ddp, job, 2), strict=True):
        for part in ("x", "e", "m", "e_server"):
            assert torch.equal(run[part], other[part]), part
    assert runs[0]["e"].numel() + runs[1]["e"].numel() == runs[0]["x"].shape[1]  # each owes a part of a node's


def goes_on(folder: Path) -> None:
    """A NaN on rank 3 alone; a checkpoint, and from it the same bits."""
    job = on_nodes(SIGN)
    found = []
    for loaded in (False, True):
        net = make_model(job, hvd.rank())
        optimizer, state = jobs.make(job, net)
        if loaded:
            saef.load_checkpoint(folder, state)
        else:
            jobs.steps(net, optimizer, job, range(5))
            before = snapshot(state)
            optimizer.zero_grad()
            x, y = batch(hvd.rank(), 5, torch.float32)
            for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                (F.mse_loss(net(xs), ys) * (math.nan if hvd.rank() == 3 else 1.0)).backward()
            optimizer.step()
            assert (state.steps, state.skipped) == (5, 1)
            assert all(map(torch.equal, before, snapshot(state)))
            saef.save_checkpoint(folder, state)
        jobs.steps(net, optimizer, job, range(6, 10))
        found.append(snapshot(state))
    assert all(map(torch.equal, *found))


def test_all_skip_and_all_resume(horovods: dict[int, HorovodPool], tmp_path: Path) -> None:
    horovods[4].run(goes_on, tmp_path)


def sizes() -> str:
    """As many as Horovod has on this machine are all four; and what cannot be."""
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    wrong: Any
    for wrong in (3, 0, 2.0, True, "atuo"):
        with pytest.raises(ValueError, match=f"the number of ranks, 4, is a multiple .*, got {wrong!r}"):
            SAEFCompression(net, sgd, node_size=wrong)
    with pytest.raises(TypeError, match="here they are Horovod's: give SAEFCompression node_size"):
        SAEFCompression(net, sgd, mesh=None)  # type: ignore[call-arg]
    node = SAEFCompression(net, sgd, node_size="auto").state.engine.node
    return f"rank {node.place} of {node.size}"


def test_a_node_may_be_what_horovod_has_on_a_machine(horovods: dict[int, HorovodPool]) -> None:
    assert horovods[4].run(sizes) == [f"rank {k} of 4" for k in range(4)]
