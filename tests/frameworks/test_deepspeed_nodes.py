"""DeepSpeed engines whose workers are nodes of two ranks: those of DDP bit for bit, resumed, skipped, refused."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import saef
from support.deepspeed_ranks import Net, Setup, resume, save, start, steps, train
from support.equal import assert_equal, snapshot
from support.nodes import train_ddp
from support.ranks import RankPool
from support.training import Job, batch

SIGN = {"momentum": 0.9, "compressor": {"type": "sign", "block": 7}, "exchange": "sharded", "node_size": 2}
ADAMW = {"rule": {"type": "adamw", "eps": 1e-3}, "node_size": 2}
TOPK = {**ADAMW, "compressor": {"type": "topk", "ratio": 0.3, "block": 10}, "exchange": "replicated"}
BF16 = {"bf16": {"enabled": True}}
ONE_BUCKET = {"bucket_cap_mb": 25}  # as here
# Params, further keys of the JSON, and the same for DDP.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Job]] = {
    "sign, SGD, accumulated": (
        {**SIGN, "averaging": {"type": "rotating", "period": 4}},
        {},
        Job(
            {"compressor": saef.ScaledSign(7), "exchange": "sharded", "averaging": saef.Rotating(4)},
            [{"momentum": 0.9}],
            micro_batches=2,
        ),
    ),
    "top-k, AdamW, clipped": (
        TOPK,
        {"gradient_clipping": 0.5},
        Job(
            {"compressor": saef.TopK(0.3, 10), "exchange": "replicated", "max_grad_norm": 0.5},
            [{"eps": 1e-3}],
            "AdamW",
        ),
    ),
    "sign, AdamW, bf16": (ADAMW, BF16, Job({}, [{"eps": 1e-3}], "AdamW", dtype=torch.bfloat16)),
    "sign, AdamW, local steps": (
        {**ADAMW, "local_steps": 5},
        {},
        Job({"local_steps": 5}, [{"eps": 1e-3}], "AdamW", micro_batches=2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_those_of_ddp_bit_for_bit(pools: dict[int, RankPool], case: str) -> None:
    """Two nodes of two ranks; DDP's equal the reference with two workers, in test_nodes.py."""
    params, config, job = CASES[case]
    setup = Setup({**params, "lr": 0.05}, [{"weight_decay": 1e-2}], job.dtype, job.micro_batches, config)
    job = replace(job, groups=[{**job.groups[0], "weight_decay": 1e-2}], lrs=[0.05] * 20, ddp=ONE_BUCKET)
    runs = pools[4].run(train, setup, 20)
    for run, ddp in zip(runs, pools[4].run(train_ddp, job, 2), strict=True):
        for name in ("x", "e", "m", "e_server"):
            assert torch.equal(run[name], ddp[name]), name
        for name in ("bytes_sent_phase1", "bytes_sent_phase2", "bytes_sent_averaging"):
            assert run["metrics"][name] == ddp["metrics"][name], name
        assert torch.equal(run["x"], runs[0]["x"]) and run["steps"] == (20 // params.get("local_steps", 1), 20)
    assert runs[0]["e"].numel() + runs[1]["e"].numel() == runs[0]["x"].shape[1]  # each owes a part of a node's
    assert not torch.equal(runs[0]["e"], runs[2]["e"])  # and each node what is its own


METHODS = {
    "sign": {**SIGN, "averaging": {"type": "rotating", "period": 7}, "lr": 0.1},
    "bf16 top-k": {**TOPK, "lr": 0.01},
}


def checkpoint_setup(method: str, **changed: Any) -> Setup:
    bf16 = method.startswith("bf16")
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 20}}}
    params = {**METHODS[method], **changed}
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Setup(params, [{"weight_decay": 1e-3}], dtype, 2, {**config, **(BF16 if bf16 else {})})


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_is_bit_for_bit_and_on_other_nodes_x_tilde_is_kept(
    pools: dict[int, RankPool], tmp_path: Path, method: str
) -> None:
    saved = pools[4].run(save, checkpoint_setup(method), tmp_path, 12, 20)
    resumed = pools[4].run(resume, checkpoint_setup(method), tmp_path, 20)
    before = saved[0][1]
    for k, ((expected, _, _), (found, loaded, _)) in enumerate(zip(saved, resumed, strict=True)):
        assert_equal(expected, found, f"rank {k}")
        assert torch.equal(before, loaded)
    for ranks, size in ((4, 1), (2, 2)):  # a worker a rank, and one node
        runs = pools[ranks].run(resume, checkpoint_setup(method, node_size=size), tmp_path, 20, ranks=ranks)
        for found, loaded, _ in runs:
            # Three vectors of float32 are added, each rounded to 6e-8 of its largest entry.
            torch.testing.assert_close(loaded, before, rtol=0, atol=1e-6 * float(before.abs().max()))
            assert found["counters"][0] == found["counters"][3] == 20
            assert torch.equal(found["parameters"], runs[0][0]["parameters"])


def skip(group: dist.ProcessGroup) -> None:
    """A NaN on rank 3 alone; and tags that differ within a node."""
    engine = start(Setup({**SIGN, "lr": 0.1}), Net())
    state = engine.optimizer.saef
    steps(engine, range(5))
    before = snapshot(state)
    x, y = batch(dist.get_rank(), 5, torch.float32)
    engine.backward(F.mse_loss(engine(x), y) * (math.nan if dist.get_rank() == 3 else 1.0))
    engine.step()
    assert not engine.was_step_applied()
    assert (engine.skipped_steps, state.skipped, state.steps, engine.global_steps) == (1, 1, 5, 6)
    assert all(map(torch.equal, before, snapshot(state)))
    steps(engine, range(6, 8))
    assert (engine.skipped_steps, state.steps) == (1, 7)
    with pytest.raises(ValueError, match="tag: rank 0 has 'a', rank 3 has 'b'"):
        engine.save_checkpoint("nowhere", tag="b" if dist.get_rank() == 3 else "a")
    engine.destroy()


def test_what_one_rank_finds_all_ranks_of_all_nodes_do(pools: dict[int, RankPool]) -> None:
    pools[4].run(skip)


def sizes(group: dist.ProcessGroup) -> dict[str, str]:
    """How many ranks a node has, by what the JSON and the launcher say; or what is wrong with it."""
    found = {}
    for name, size, said in (
        ("torchrun", "auto", {"LOCAL_WORLD_SIZE": "2"}),
        ("deepspeed", "auto", {"LOCAL_SIZE": "4"}),
        ("neither", "auto", {}),
        ("uneven", 3, {}),
    ):
        with mock.patch.dict(os.environ, said):
            try:
                engine = start(Setup({"node_size": size}), Net())
                node = engine.optimizer.saef.engine.node
                found[name] = f"rank {node.place} of {node.size}"
                engine.destroy()
            except (RuntimeError, ValueError) as error:
                found[name] = str(error)
    return found


def test_the_launcher_says_how_many_ranks_a_node_has(pools: dict[int, RankPool]) -> None:
    for rank, found in enumerate(pools[4].run(sizes)):
        assert found["torchrun"] == f"rank {rank % 2} of 2" and found["deepspeed"] == f"rank {rank} of 4"
        assert "start with one of them, or say node_size" in found["neither"]
        assert "4 ranks are no whole number of nodes of 3" in found["uneven"]
