"""ZeRO 3 within nodes of two ranks, saef between them: the steps of DDP with nodes, bit for bit."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from torch.nn import functional as F

import saef
from saef.integrations.deepspeed import Nodes, initialize
from support.deepspeed_ranks import Setup, json_config, steps
from support.equal import snapshot
from support.nodes import train_ddp
from support.ranks import RankPool
from support.training import Job, batch, make_net, param_groups

ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
GROUPS = [{"weight_decay": 1e-2}, {"weight_decay": 1e-3}]
SIGN = {"momentum": 0.9, "compressor": {"type": "sign", "block": 7}, "averaging": {"type": "rotating", "period": 4}}
TOPK = {"rule": {"type": "adamw", "eps": 1e-3}, "compressor": {"type": "topk", "ratio": 0.3, "block": 10}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Job]] = {
    "sign, SGD": (
        {**SIGN, "exchange": "sharded"},
        {},
        Job(
            {"compressor": saef.ScaledSign(7), "exchange": "sharded", "averaging": saef.Rotating(4)},
            [{"momentum": 0.9}],
            dtype=torch.float32,
        ),
    ),
    "top-k, AdamW, clipped": (
        {**TOPK, "exchange": "replicated"},
        {"gradient_clipping": 0.5},
        Job(
            {"compressor": saef.TopK(0.3, 10), "exchange": "replicated", "max_grad_norm": 0.5},
            [{"eps": 1e-3}],
            "AdamW",
            dtype=torch.float32,
        ),
    ),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """DeepSpeed keeps an mpu for the life of the process."""
    found = RankPool(4)
    yield found
    found.stop()


def begin(params: dict[str, Any], config: dict[str, Any], micro_batches: int = 1, net: Any = None) -> tuple[Any, Any]:
    """(engine, its state)."""
    net = make_net(torch.float32) if net is None else net
    setup = Setup({"lr": 0.05, "node_size": 2, **params}, GROUPS, torch.float32, micro_batches, {**ZERO, **config})
    groups = param_groups(net, GROUPS)
    engine = initialize(model=net, model_parameters=groups, mpu=Nodes(2), config=json_config(setup))[0]
    return engine, engine.optimizer.saef


def weights(engine: Any) -> Tensor:
    """What the model computes with, gathered."""
    with deepspeed.zero.GatheredParameters([*engine.module.parameters()]):
        return torch.cat([p.detach().reshape(-1).clone() for p in engine.module.parameters()])


def train(group: Any, params: dict[str, Any], config: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    engine, state = begin(params, config, micro_batches)
    x = [weights(engine)]
    for t in range(12):
        steps(engine, range(t, t + 1), torch.float32)
        x.append(weights(engine))
    assert (state.steps, engine.global_steps) == (12, 12)
    return {"x": torch.stack(x), "e": state.e, "m": state.m, "e_server": state.e_server}


@pytest.mark.parametrize("case", CASES)
def test_zero_within_nodes_is_ddp_with_nodes_bit_for_bit(ranks: RankPool, pool: RankPool, case: str) -> None:
    """Which equals the reference with two workers, in test_nodes.py."""
    params, config, job = CASES[case]
    job = replace(job, groups=[{**job.groups[0], **group} for group in GROUPS], lrs=[0.05] * 12)
    runs = ranks.run(train, params, config, job.micro_batches)
    for run, other in zip(runs, pool.run(train_ddp, job, 2), strict=True):
        for name in run:
            assert torch.equal(run[name], other[name]), name


def test_accumulated_gradients_are_averaged_each_time(ranks: RankPool, pool: RankPool) -> None:
    """Uncompressed: 4 roundings more of gradients of order 1, 6e-8 each; 12 steps at a rate of lr / (1 - mu) = 0.5."""
    params = {"momentum": 0.9, "compressor": {"type": "identity"}}
    groups = [{"momentum": 0.9, **group} for group in GROUPS]
    job = Job({"compressor": saef.Identity()}, groups, lrs=[0.05] * 12, dtype=torch.float32, micro_batches=2)
    for run, other in zip(ranks.run(train, params, {}, 2), pool.run(train_ddp, job, 2), strict=True):
        torch.testing.assert_close(run["x"], other["x"], rtol=0, atol=12 * 0.5 * 4 * 6e-8)


def half_precision(group: Any) -> tuple[Tensor, Tensor]:
    """(what the model computes with, x of this rank's part)."""
    engine, state = begin(SIGN, {"bf16": {"enabled": True}})
    for t in range(6):
        steps(engine, range(t, t + 1), torch.bfloat16)
    assert state.steps == 6 and state.weights.x().dtype == torch.float32
    assert torch.equal(torch.cat(shards(engine, state)), state.weights.x().bfloat16())
    return weights(engine), state.weights.x().clone()


def shards(engine: Any, state: saef.SAEFState) -> list[Tensor]:
    """What this rank has of what the model computes with."""
    every = zip(engine.module.parameters(), state.weights.numels, strict=True)
    return [p.ds_tensor.view(-1)[:n] for p, n in every]


def test_16_bit_weights_have_zeros_master(ranks: RankPool) -> None:
    runs = ranks.run(half_precision)
    assert all(torch.equal(run[0], runs[0][0]) for run in runs)
    assert torch.equal(runs[0][1], runs[2][1]) and not torch.equal(runs[0][1], runs[0][1].bfloat16().float())


def goes_on(group: Any, folder: Path) -> Tensor:
    """Looks at x in the middle of steps; a NaN on rank 3 alone; a checkpoint, and from it the same bits."""
    rank, found, saved = dist.get_rank(), [], torch.empty(0)
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 8}}}
    for loaded in (False, True):
        engine, state = begin({**SIGN, "exchange": "sharded"}, schedule)
        if loaded:
            with pytest.raises(ValueError, match="load_module_only"):
                engine.load_checkpoint(str(folder), load_module_only=True)
            steps(engine, range(20, 22), torch.float32)  # it has a state of its own, to be replaced
            _, client = engine.load_checkpoint(str(folder))
            assert client["epoch"] == 3 and torch.equal(weights(engine), saved)
        else:
            steps(engine, range(5), torch.float32)
            before, at_x = snapshot(state), weights(engine)
            x, y = batch(rank, 5, torch.float32)
            engine(x)
            assert not torch.equal(weights(engine), at_x)
            engine.backward(F.mse_loss(engine(x), y) * (math.nan if rank == 3 else 1.0))
            assert torch.equal(weights(engine), at_x)
            engine.step()
            assert (state.steps, state.skipped, engine.skipped_steps, engine.was_step_applied()) == (5, 1, 1, False)
            assert all(map(torch.equal, before, snapshot(state))) and torch.equal(weights(engine), at_x)
            engine.save_checkpoint(str(folder), client_state={"epoch": 3})
            saved = weights(engine)
            with pytest.raises(ValueError, match=r"save_checkpoint\(consolidate=False\)"):
                state.consolidated_state_dict()
        for t in range(6, 10):
            x, y = batch(rank, t, torch.float32)
            loss = F.mse_loss(engine(x), y)
            if not loaded:  # a look between changes nothing
                at_x = state.weights.x().clone()
                engine.eval()
                with torch.no_grad():
                    engine(x)
                assert torch.equal(torch.cat(shards(engine, state)), at_x)
                engine.train()
            engine.backward(loss)
            engine.step()
        found.append([*snapshot(state), weights(engine), torch.tensor(engine.get_lr())])
        assert (state.steps, engine.global_steps, engine.skipped_steps) == (9, 10, 1)
    assert all(map(torch.equal, *found))
    return saved


def test_all_skip_and_all_resume_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    """And DeepSpeed's own tool makes whole weights, x, of what the first node has written."""
    saved = ranks.run(goes_on, tmp_path)[2]
    written = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert torch.equal(torch.cat([written[name].reshape(-1) for name, _ in make_net().named_parameters()]), saved)


def refused(group: Any) -> dict[str, str]:
    said = {}
    threshold = {"zero_optimization": {"stage": 3}}
    data = [torch.zeros(6)] * 16
    for name, params, config, more in (
        ("persistent", {}, threshold, {}),
        ("stage 0", {}, {"zero_optimization": {"stage": 0}}, {}),
        ("stage 2", {}, {"zero_optimization": {"stage": 2}}, {}),
        ("another size", {"node_size": 4}, {}, {}),
        ("local steps", {"local_steps": 2}, {}, {}),
        ("a loader", {}, {}, {"training_data": data}),
    ):
        setup = Setup({"node_size": 2, **params}, [{}], torch.float32, 1, {**ZERO, **config})
        with pytest.raises(ValueError) as caught:
            initialize(model=make_net(torch.float32), mpu=Nodes(2), config=json_config(setup), **more)
        said[name] = str(caught.value)
    return said


def test_what_zero_within_nodes_cannot_honour_is_refused(ranks: RankPool) -> None:
    for said in ranks.run(refused):
        assert "stage3_param_persistence_threshold is 100000, expected 0" in said["persistent"]
        assert "at ZeRO stage 0 node_size alone" in said["stage 0"]
        assert "zero_optimization.stage is 2, expected 0" in said["stage 2"]
        assert "Nodes(size)), with the node_size of the JSON, 4" in said["another size"]
        assert "local_steps=1" in said["local steps"]
        assert "DistributedSampler over all ranks" in said["a loader"]


def sharded_before(group: Any, how: str) -> Any:
    """A model that zero.Init has sharded; the weights after a step, or what is said."""
    nodes = Nodes(2)
    config = json_config(Setup({"lr": 0.05, "node_size": 2}, [{}], torch.float32, 1, ZERO))
    of = {"data_parallel_group": nodes.get_data_parallel_group()} if how == "nodes" else {"mpu": nodes}
    with deepspeed.zero.Init(config_dict_or_path=config, **(of if how != "all" else {})):
        net = make_net(torch.float32)
    try:
        engine = initialize(model=net, model_parameters=net.parameters(), mpu=nodes, config=config)[0]
    except ValueError as error:
        return str(error)
    steps(engine, range(2), torch.float32)
    assert engine.get_global_grad_norm() is None  # 0 would be a lie
    return weights(engine)


def test_a_model_that_was_sharded_before_has_its_nodes_ranks(ranks: RankPool) -> None:
    first, *others = ranks.run(sharded_before, "nodes")
    assert all(torch.equal(first, x) for x in others)
    for how in ("all", "mpu"):
        for said in ranks.run(sharded_before, how):
            assert "was sharded over ranks [0, 1, 2, 3]" in said and "data_parallel_group" in said


def past_the_engine(group: Any) -> str:
    engine, _ = begin(SIGN, {})
    x, y = batch(dist.get_rank(), 0, torch.float32)
    F.mse_loss(engine.module(x), y).backward()
    with pytest.raises(RuntimeError) as caught:
        engine.step()
    return str(caught.value)


def test_a_forward_past_the_engine_is_refused(ranks: RankPool) -> None:
    assert all("run the forward through the engine, engine(x)" in said for said in ranks.run(past_the_engine))


def another_engine(group: Any) -> str:
    """What DeepSpeed keeps of the nodes would make them the whole job."""
    begin(SIGN, {})[0].destroy()
    plain = json_config(Setup({}, [{}], torch.float32, 1, {}))
    with pytest.raises(ValueError, match=r"deepspeed.utils.groups.mpu = None") as caught:
        initialize(model=(net := make_net(torch.float32)), model_parameters=net.parameters(), config=plain)
    deepspeed.utils.groups.mpu = None
    net = make_net(torch.float32)
    engine = initialize(model=net, model_parameters=net.parameters(), config=plain)[0]
    assert engine.optimizer.saef.engine.transport.size == 4
    return str(caught.value)


def test_what_deepspeed_keeps_of_an_earlier_engine_is_seen(ranks: RankPool) -> None:
    assert all("an engine that this process has made before" in said for said in ranks.run(another_engine))
