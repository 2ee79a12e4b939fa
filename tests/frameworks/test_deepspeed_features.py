"""What users of DeepSpeed rely on: bf16, accumulation of every kind, skipped steps, evaluation, the papers' methods."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import saef
import saef.hooks
import saef.integrations.deepspeed
from support.deepspeed_ranks import Net, Setup, held_out_loss, json_config, start, steps, train
from support.equal import snapshot
from support.following import CHANGES, STEPS, Images, Twin, due, images, loss_of, make_optimizer
from support.ranks import RankPool
from support.training import Job, batch, flat, make_net
from support.training import train as train_ddp
from support.writes import OTHER_VALUES, SAME_VALUES

TOPK = {"lr": 0.1, "momentum": 0.9, "compressor": {"type": "topk", "ratio": 0.1, "block": "layer"}}
BF16 = {"bf16": {"enabled": True}}


# ---- bf16 -----------------------------------------------------------------------------------


def final_loss(group: dist.ProcessGroup, setup: Setup, count: int) -> tuple[Tensor, Tensor, float, tuple[int, bool]]:
    """(parameters, their float32 masters, loss on batches not trained on, steps and changes made by initialize)."""
    dtype = torch.bfloat16 if "bf16" in setup.config else torch.float32
    net = make_net(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    engine = start(setup, net)
    state = engine.optimizer.saef
    changed = any(not torch.equal(p, b.to(dtype)) for p, b in zip(net.parameters(), before, strict=True))
    begun = (state.steps, changed)
    steps(engine, range(setup.first, setup.first + count), dtype)
    loss = held_out_loss(net, 2, dtype)
    engine.destroy()
    return flat(net), state.weights.x().clone(), loss, begun


@pytest.mark.parametrize("compressor", [{"type": "sign", "block": "layer"}, TOPK["compressor"]], ids=["sign", "topk"])
def test_bf16_trains_as_fp32_does(pools: dict[int, RankPool], compressor: dict[str, Any]) -> None:
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for first in (0, 1000, 2000, 3000):  # the seeds of the batches
        for name, config in (("fp32", {}), ("bf16", BF16)):
            setup = Setup({**TOPK, "lr": 0.05, "compressor": compressor}, config=config, first=first)
            runs = pools[2].run(final_loss, setup, 300, ranks=2)
            for parameters, master, loss, begun in runs:
                assert torch.equal(parameters, runs[0][0])
                assert torch.equal(master, runs[0][1])
                assert loss == runs[0][2]
                assert begun == (0, False)  # DeepSpeed's own wrapper would have made a step
            losses[name].append(runs[0][2])
    untrained = pools[2].run(final_loss, Setup({**TOPK, "compressor": compressor}), 0, ranks=2)[0][2]
    fp32, bf16 = (torch.tensor(losses[name]) for name in ("fp32", "bf16"))
    assert max(fp32.max(), bf16.max()) < untrained / 3
    # The difference of two means of n = 4 seeds has a standard error of sqrt(2 / n) std; three of them are allowed.
    spread = torch.stack([fp32.std(), bf16.std()]).square().mean().sqrt()
    assert abs(float(bf16.mean() - fp32.mean())) < 3 * math.sqrt(2 / 4) * spread, losses


# ---- whatever a step is made of -------------------------------------------------------------


def accumulate(group: dist.ProcessGroup, way: str) -> Tensor:
    """Four micro-batches a step, in one of DeepSpeed's ways; x at the end."""
    parts = 1 if way in ("no_sync", "several backwards") else 4
    config = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    net = make_net(torch.float32)
    engine = start(Setup(TOPK, micro_batches=parts, config=config), net)
    for t in range(10):
        x, y = batch(dist.get_rank(), t, torch.float32)
        chunks = list(zip(x.chunk(4), y.chunk(4), strict=True))
        for i, (xs, ys) in enumerate(chunks):
            loss = F.mse_loss(engine(xs), ys) * (1 if parts == 4 else 0.25)
            last = i == len(chunks) - 1
            if way == "boundary by hand":
                engine.set_gradient_accumulation_boundary(last)
            if way == "no_sync" and not last:
                with engine.no_sync():
                    engine.backward(loss)
            else:
                engine.backward(loss)
            if way == "managed" or last:
                engine.step()
    assert engine.global_steps == engine.optimizer.saef.steps == 10
    engine.destroy()
    return flat(net)


def test_all_ways_to_accumulate_give_the_same_bits(pools: dict[int, RankPool]) -> None:
    expected = pools[2].run(accumulate, "managed", ranks=2)
    assert torch.equal(*expected)
    for way in ("unmanaged", "no_sync", "several backwards", "boundary by hand"):
        for found in pools[2].run(accumulate, way, ranks=2):
            assert torch.equal(found, expected[0]), way


LAYERS = {"type": "sign", "block": "layer"}
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    # JSON; preset of saef.hooks; its settings; SGD's
    "EF": ({"step_ahead": 0}, "ef", {}, {"momentum": 0.9}),
    "EF, 1-way": ({"step_ahead": 0, "server_compressor": None}, "ef", {"server_compressor": None}, {"momentum": 0.9}),
    "dist-EF-blockSGD": (
        {"momentum": 0, "step_ahead": 0, "weight_decay_mode": "outer", "compressor": LAYERS},
        "dist_ef_block_sgd",
        {},
        {},
    ),
    "dist-EF-blockSGDM": (
        {"nesterov": True, "step_ahead": 0, "weight_decay_mode": "outer", "compressor": LAYERS},
        "dist_ef_block_sgdm",
        {},
        {"momentum": 0.9, "nesterov": True},
    ),
    "signum": (
        {"step_ahead": 0, "weight_decay_mode": "outer", "compressor": {"type": "majority_vote"}},
        "signum_majority_vote",
        {},
        {"momentum": 0.9},
    ),
    "everything": (
        {
            "maximize": False,
            "compressor": {"type": "min_size", "numel": 8, "inner": {"type": "topk", "ratio": 0.2, "block": 16}},
            "server_compressor": {"type": "sign", "block": 16},
            "averaging": {"type": "rotating", "period": 3},
            "step_ahead": 0.5,
            "exchange": "sharded",
            "max_grad_norm": 0.1,
            "max_consecutive_skips": 3,
            "audit_every": 4,
        },
        "",
        {
            "compressor": saef.MinSize(8, saef.TopK(0.2, 16)),
            "server_compressor": saef.ScaledSign(16),
            "averaging": saef.Rotating(3),
            "step_ahead": 0.5,
            "exchange": "sharded",
            "max_grad_norm": 0.1,
        },
        {"momentum": 0.9},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_of_the_papers_are_in_reach_of_the_json(pools: dict[int, RankPool], method: str) -> None:
    params, preset, state, sgd = METHODS[method]
    params = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, **params}
    runs = pools[4].run(train, Setup(params), 20)
    job = Job(state, [{"weight_decay": 1e-2, **sgd}], lrs=[0.05] * 20, dtype=torch.float32, preset=preset or None)
    for run, ddp in zip(runs, pools[4].run(train_ddp, job), strict=True):
        for name in ("x", "e", "m", "e_server"):
            assert torch.equal(run[name], ddp[name]), name


def follow(group: dist.ProcessGroup, change: Callable[..., None]) -> None:
    def mean(v: Tensor) -> Tensor:
        dist.all_reduce(v)
        return v / dist.get_world_size()

    for exchange in ("replicated", "sharded"):
        net = Images()
        twin = Twin(net, mean)
        params = {"compressor": {"type": "identity"}, "lr": 0.1, "momentum": 0.9, "exchange": exchange}
        setup = Setup(params, micro_batches=2)
        groups = make_optimizer(net).param_groups
        wanted = [{k: group[k] for k in ("params", "lr", "weight_decay")} for group in groups]
        engine = deepspeed.initialize(model=net, model_parameters=wanted, config=json_config(setup))[0]
        for t in range(STEPS):
            for what in due(change, t):
                twin.change(what, net, engine.optimizer)
            batches = images(dist.get_rank(), t, 2)
            for x in batches:
                engine.backward(loss_of(engine, x))
                engine.step()
            twin.step(batches, share=0.5)
            torch.testing.assert_close(flat(net), flat(twin.net), rtol=0, atol=1e-12)
        engine.destroy()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_is_trained_is_followed(pools: dict[int, RankPool], change: Callable[..., None]) -> None:
    pools[2].run(follow, change, ranks=2)


class TwoHeads(nn.Module):
    """Rank k uses head k alone, nobody the third, and the body is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.heads = nn.Linear(6, 9), nn.ModuleList([nn.Linear(9, 1) for _ in range(3)])
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[dist.get_rank()](torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def uneven(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(x trained by an engine, x trained with DDP)."""
    engine, net = start(Setup(TOPK), TwoHeads()), TwoHeads()
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, compressor=saef.TopK(0.1, "layer"))
    model.register_comm_hook(state, saef.hooks.saef_hook)
    steps(engine, range(5))
    for t in range(5):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(), t, torch.float32)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    found = flat(engine.module), flat(net)
    engine.destroy()
    return found


def test_frozen_and_unused_parameters(pools: dict[int, RankPool]) -> None:
    runs = pools[2].run(uneven, ranks=2)
    begin = flat(TwoHeads())
    for engine, ddp in runs:
        assert torch.equal(engine, ddp)
        assert torch.equal(engine, runs[0][0])
        moved = engine != begin
        assert not moved[: 6 * 9 + 9].any()
        assert moved[6 * 9 + 9 :].split(10)[0].any()
        assert moved[6 * 9 + 9 :].split(10)[1].any()


# ---- steps that do not happen, evaluation, other ways to run a model -----------------------------


def skip(group: dist.ProcessGroup, dtype: str) -> None:
    """A NaN on one rank in the step after the fifth: nobody makes it, the scheduler waits, training goes on."""
    warmup = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 30}}}
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    engine = start(Setup(TOPK, config=warmup | (BF16 if dtype == "bf16" else {})), Net())
    state = engine.optimizer.saef
    assert engine.get_mom() == [0.9]
    steps(engine, range(5), low)
    assert engine.was_step_applied()
    before = snapshot(state)
    lr = engine.get_lr()
    x, y = batch(dist.get_rank(), 5, low)
    engine.backward(F.mse_loss(engine(x), y) * (math.nan if dist.get_rank() == 1 else 1.0))
    engine.step()
    after = snapshot(state)
    assert not engine.was_step_applied()
    assert (engine.skipped_steps, state.skipped, state.steps, engine.global_steps) == (1, 1, 5, 6)
    assert engine.get_lr() == lr
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    steps(engine, range(6, 9), low)
    assert (engine.skipped_steps, state.steps, engine.was_step_applied()) == (1, 8, True)
    assert engine.get_lr() != lr
    engine.destroy()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bad_number_is_an_overflow_of_all_ranks(pools: dict[int, RankPool], dtype: str) -> None:
    pools[2].run(skip, dtype, ranks=2)


def autocast(group: dist.ProcessGroup) -> tuple[Tensor, float, int, float]:
    """float16 by DeepSpeed's torch_autocast, whose GradScaler starts so high that the first steps overflow."""
    config = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    net = make_net(torch.float32)
    engine = start(Setup(TOPK, config=config), net)
    before = held_out_loss(engine, 2)
    engine.torch_autocast_z0_gradscaler._init_scale = 2.0**24
    steps(engine, range(300))
    after = held_out_loss(engine, 2)
    scale = engine.torch_autocast_z0_gradscaler.get_scale()
    state = engine.optimizer.saef
    assert state.steps + state.skipped == 300
    assert engine.skipped_steps == state.skipped
    engine.destroy()
    return flat(net), after / before, state.skipped, scale


def test_float16_by_autocast(pools: dict[int, RankPool]) -> None:
    runs = pools[2].run(autocast, ranks=2)
    for parameters, ratio, skipped, scale in runs:
        assert torch.equal(parameters, runs[0][0])
        assert ratio < 0.3
        assert 0 < skipped < 20
        assert scale == 2.0 ** (24 - skipped)


def evaluate(group: dist.ProcessGroup) -> None:
    """engine.eval() shows x, in the middle of a step too; the engine itself always says it is training."""
    net = make_net(torch.float32)
    engine = start(Setup(TOPK, micro_batches=2), net)
    state, (x, y) = engine.optimizer.saef, batch(dist.get_rank(), 0, torch.float32)
    steps(engine, range(4))
    weights = state.weights.x().clone()

    def at_x() -> bool:
        return torch.equal(flat(net), weights)

    assert at_x()
    loss = F.mse_loss(engine(x[:4]), y[:4])
    assert not at_x()
    engine.backward(loss)
    engine.step()  # not at the boundary
    assert at_x()
    engine.eval()
    with torch.no_grad():
        engine(x)
    assert at_x()
    engine.train()
    loss = F.mse_loss(engine(x[4:]), y[4:])
    with torch.no_grad():
        engine(x)
    assert at_x()
    engine.backward(loss)
    assert at_x()
    engine.step()
    assert state.steps == 5
    engine.backward(F.mse_loss(engine(x), y))
    weights = state.weights.x().clone()
    engine.destroy()
    assert at_x()
    engine = start(Setup(TOPK), net)  # the model is free for another
    steps(engine, range(2))
    assert not at_x()
    engine.destroy()


def replaced(group: dist.ProcessGroup) -> Tensor:
    """An engine that is destroyed in the middle of a step, when another has the model already."""
    net = make_net(torch.float32)
    engine = start(Setup(TOPK), net)
    x, y = batch(dist.get_rank(), 0, torch.float32)
    engine.backward(F.mse_loss(engine(x), y))
    second = start(Setup(TOPK), net)
    steps(second, range(3))
    before = flat(net)
    engine.destroy()
    assert torch.equal(flat(net), before)
    steps(second, range(3, 6))
    second.destroy()
    return flat(net)


def test_an_engine_that_is_destroyed_late_leaves_the_model_to_the_next(pools: dict[int, RankPool]) -> None:
    runs = pools[2].run(replaced, ranks=2)
    assert torch.equal(*runs)


def test_evaluation_sees_x(pools: dict[int, RankPool]) -> None:
    pools[2].run(evaluate, ranks=2)


def compiled(group: dist.ProcessGroup, how: str) -> Tensor:
    """Ten steps of a compiled model, with an evaluation between; the backend is one that needs no compiler."""
    net = make_net(torch.float32)
    engine = start(Setup(TOPK), torch.compile(net, backend="aot_eager") if how == "model" else net)
    if how == "engine":
        engine.compile(backend="aot_eager")
    steps(engine, range(5))
    engine.eval()
    with torch.no_grad():
        engine(batch(0, 0, torch.float32)[0])
    engine.train()
    steps(engine, range(5, 10))
    engine.destroy()
    return flat(net)


def test_compiled_models_train_the_same(pools: dict[int, RankPool]) -> None:
    expected = pools[2].run(compiled, "not", ranks=2)
    for how in ("model", "engine"):
        for found in pools[2].run(compiled, how, ranks=2):
            torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)  # as for DDP in test_weights.py


@pytest.mark.parametrize("bf16", [False, True])
def test_local_steps_are_ddps_bit_for_bit(pools: dict[int, RankPool], bf16: bool) -> None:
    """And an outer optimizer, from JSON; under bf16 the optimizer steps on bfloat16, and x is of float32."""
    params = {"rule": {"type": "adamw", "eps": 1e-3}, "lr": 0.01, "local_steps": 3}
    params |= {"outer": {"type": "nesterov", "lr": 0.7, "momentum": 0.8}, "on_bad_round": "keep"}
    setup = Setup(params, [{"weight_decay": 1e-2}], config=BF16 if bf16 else {})
    state = {"local_steps": 3, "outer": saef.Nesterov(0.7, 0.8), "on_bad_round": "keep"}
    dtype = torch.bfloat16 if bf16 else torch.float32
    job = Job(state, [{"weight_decay": 1e-2, "eps": 1e-3}], "AdamW", lrs=[0.01] * 12, dtype=dtype)
    runs = pools[2].run(train, setup, 12, ranks=2)
    for run, ddp in zip(runs, pools[2].run(train_ddp, job, ranks=2), strict=True):
        assert torch.equal(run["x"][1:].to(dtype), ddp["x"][1:]) and torch.equal(run["e"], ddp["e"])
        assert run["steps"] == (4, 12)


def initialized(group: dist.ProcessGroup, path: Path) -> list[str]:
    """saef.integrations.deepspeed.initialize, from a file: the result is deepspeed.initialize's."""
    engine, optimizer, loader, scheduler = saef.integrations.deepspeed.initialize(model=Net(), config=str(path))
    steps(engine, range(4))
    assert optimizer is engine.optimizer
    assert optimizer.saef.steps == 4
    assert engine.get_lr() == scheduler.get_last_lr()
    engine.destroy()
    return [type(part).__name__ for part in (engine, optimizer, loader, scheduler)]


def test_initialize_is_deepspeeds(pools: dict[int, RankPool], tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    warmup = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}
    path.write_text(json.dumps(json_config(Setup(TOPK, config=warmup))))
    for names in pools[2].run(initialized, path, ranks=2):
        assert names == ["DeepSpeedEngine", "SAEF", "NoneType", "WarmupLR"]


def watch(group: dist.ProcessGroup, folder: Path) -> list[str]:
    """DeepSpeed's timers and monitor."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    engine = start(Setup(TOPK, config={"wall_clock_breakdown": True, "csv_monitor": monitor}), Net())
    steps(engine, range(3))
    engine.destroy()
    return [name for name in engine.timers.timers if "allreduce" in name]


def test_timers_and_monitors_go_on(pools: dict[int, RankPool], tmp_path: Path) -> None:
    for timers in pools[2].run(watch, tmp_path, ranks=2):
        assert "bwd_allreduce" in timers
    (rates,) = tmp_path.rglob("*lr.csv")
    assert [float(line.split(",")[1]) for line in rates.read_text().splitlines()[1:]] == [0.1] * 3


def represent(group: dist.ProcessGroup, params: dict[str, Any]) -> tuple[str, str]:
    """repr(optimizer) in an engine, and after the engine has let go of it."""
    engine = start(Setup(params), Net())
    optimizer = engine.optimizer
    found = repr(optimizer)
    engine.destroy()
    return found, repr(optimizer)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (TOPK, "SAEF, TopK(ratio=0.1, block='layer') both ways; 2 ranks, replicated; 161 parameters; about "),
        (
            {"lr": 0.1, "step_ahead": 0, "exchange": "sharded"},
            "EF, ScaledSign(block=65536) both ways; 2 ranks, sharded",
        ),
    ],
    ids=["SAEF", "EF"],
)
def test_the_optimizer_says_what_it_is(pools: dict[int, RankPool], params: dict[str, Any], said: str) -> None:
    for inside, after in pools[2].run(represent, params, ranks=2):
        assert inside.startswith("SAEF (\nParameter Group 0") and "lr: 0.1\n" in inside
        assert inside.splitlines()[-1].startswith(f"<SAEFState: {said}")
        assert inside.startswith(after) and "SAEFState" not in after


# ---- writes to p.grad -----------------------------------------------------------------------


def write(group: dist.ProcessGroup, writes: list[Any]) -> Tensor:
    """Six steps with each of these writes between backward and step; x at the end."""
    net = make_net(torch.float32)
    engine = start(Setup(TOPK), net)
    for t in range(6):
        x, y = batch(dist.get_rank(), t, torch.float32)
        engine.backward(F.mse_loss(engine(x), y))
        for one in writes:
            one(net)
        engine.step()
    engine.destroy()
    return flat(net)


def test_writes_of_the_same_values_change_no_bit(pools: dict[int, RankPool]) -> None:
    plain, written = (pools[2].run(write, writes, ranks=2) for writes in ([], SAME_VALUES))
    assert all(torch.equal(a, b) for a, b in zip(plain, written, strict=True))


def change(group: dist.ProcessGroup) -> int:
    net = make_net(torch.float32)
    engine = start(Setup(TOPK), net)
    steps(engine, range(2))
    before = flat(net)
    for one in OTHER_VALUES:
        x, y = batch(dist.get_rank(), 2, torch.float32)
        engine.backward(F.mse_loss(engine(x), y))
        one(net)
        with pytest.raises(RuntimeError, match="gradients of .* were changed .*max_grad_norm"):
            engine.step()
        assert torch.equal(flat(net), before), one.__name__
        engine.zero_grad()
        engine.optimizer.zero_grad()
    found: int = engine.optimizer.saef.steps
    engine.destroy()
    return found


def test_writes_of_other_values_are_refused(pools: dict[int, RankPool]) -> None:
    assert pools[2].run(change, ranks=2) == [2, 2]
