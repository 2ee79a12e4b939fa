"""What is saved comes back: bit for bit on the same ranks in fresh processes, x~ on any number of ranks."""

import copy
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.checkpoint_runs import END, SIGN, TOPK, Run
from support.equal import assert_equal, snapshot
from support.ranks import RankPool
from support.slopes import setup, slope
from support.training import batch, randn

STOP = 7


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def fresh() -> Iterator[RankPool]:
    """Eight processes that did not see the first part of a run."""
    ranks = RankPool(8)
    yield ranks
    ranks.stop()


# ---- the rank form ------------------------------------------------------------------------------------------

CASES = [
    {"compressor": c, "exchange": x, "averaging": a, "dtype": d}
    for c, x, a, d in itertools.product(
        (SIGN, TOPK),
        ("replicated", "sharded"),
        (saef.AllReduce(5), saef.Rotating(5)),
        (torch.float32, torch.bfloat16),
    )
]
CASES += [
    {"compressor": TOPK, "exchange": "sharded", "weight_decay_mode": "outer", "max_grad_norm": 0.5},
    {"compressor": SIGN, "exchange": "sharded", "server_compressor": None, "step_ahead": 0.5},
    {"compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"},
    {"compressor": SIGN, "exchange": "sharded", "averaging": saef.Rotating(5), "optimizer": "AdamW"},
    {"compressor": TOPK, "exchange": "replicated", "dtype": torch.bfloat16, "optimizer": "Adam"},
    {"compressor": TOPK, "v_averaging": saef.AllReduce(5), "optimizer": "AdamW"},
]


def ids(case: dict[str, Any]) -> str:
    return "-".join(str(v) for v in case.values()).replace(" ", "")


def make(group: dist.ProcessGroup, case: dict[str, Any]) -> Run:
    case = dict(case)
    dtype = case.pop("dtype", torch.float32)
    run = Run(group, case, dtype)
    if not run.state.settings.feedback:
        for options in run.optimizer.param_groups:
            options["nesterov"] = False
    return run


def uninterrupted(group: dist.ProcessGroup, cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Train to the end, saving at STOP (in the middle of an averaging period) on the way."""
    ends = []
    for number, case in enumerate(cases):
        run = make(group, case)
        run.train(range(STOP))
        torch.save({"saef": run.state.state_dict(), **run.others()}, f"{folder}/{number}-{run.rank}.pt")
        run.train(range(STOP, END))
        ends.append(run.everything())
    return ends


def resumed(group: dist.ProcessGroup, cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    ends = []
    for number, case in enumerate(cases):
        run = make(group, case)
        saved = torch.load(f"{folder}/{number}-{run.rank}.pt", weights_only=True)
        if number % 2:  # in either order
            run.load_others(saved)
            run.state.load_state_dict(saved["saef"])
        else:
            run.state.load_state_dict(saved["saef"])
            run.load_others(saved)
        run.train(range(STOP, END))
        ends.append(run.everything())
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 3])
def test_resuming_in_fresh_processes_is_bit_for_bit(
    pool: RankPool, fresh: RankPool, tmp_path: Path, ranks: int
) -> None:
    """Step 7 of 20: parameters, x, e, m, server error, buffers, counters and random state at the end."""
    cases = CASES if ranks == 4 else CASES[::5] + CASES[-3:]
    expected = pool.run(uninterrupted, cases, str(tmp_path), ranks=ranks)
    found = fresh.run(resumed, cases, str(tmp_path), ranks=ranks)
    for rank, (a, b) in enumerate(zip(expected, found, strict=True)):
        for number, case in enumerate(cases):
            assert_equal(a[number], b[number], f"rank {rank} {case}")
    assert not torch.equal(expected[0][0]["e"], expected[1][0]["e"])


def save_in_a_step(group: dist.ProcessGroup) -> bool:
    """A state saved between forward and backward, or between backward and step, is that of before the step."""
    settings = {"compressor": TOPK, "exchange": "sharded", "averaging": saef.AllReduce(1)}
    run, other = Run(group, settings), Run(group, settings)
    torch.manual_seed(0)
    run.train(range(5))
    before = run.state.state_dict()
    for t in (5, 6):
        random = torch.get_rng_state()
        run.optimizer.zero_grad()
        x, y = batch(run.rank, t)
        loss = F.mse_loss(run.model(x.float()), y.float())
        if t == 6:
            loss.backward()
        saved = run.state.state_dict()
        for name in ("e", "m", "e_server"):
            assert_equal(saved[f"rank_{run.rank}"][name], before[f"rank_{run.rank}"][name], name)
        assert_equal(saved["x"], before["x"])
        if t == 6:
            saved_optimizer = copy.deepcopy(run.optimizer.state_dict())  # of the same step
            run.optimizer.step()  # which the look did not disturb
    other.load_others(through_a_file({**run.others(), "optimizer": other.optimizer.state_dict()}))
    other.state.load_state_dict(through_a_file(saved))
    other.optimizer.load_state_dict(saved_optimizer)
    torch.set_rng_state(random)
    F.mse_loss(other.model(x.float()), y.float()).backward()
    other.optimizer.step()
    assert_equal(
        [run.state.e, run.state.m, run.state.e_server],
        [other.state.e, other.state.m, other.state.e_server],
    )
    return torch.equal(run.state.weights.x(), other.state.weights.x())


def test_a_state_saved_within_a_step_is_that_of_before_the_step(pool: RankPool) -> None:
    assert pool.run(save_in_a_step) == [True] * 4


def load_in_a_step(group: dist.ProcessGroup) -> bool:
    """Loading while buckets are on their way drops the step; what is saved does not change when training goes on."""
    run = Run(group, {"compressor": SIGN, "exchange": "sharded", "averaging": saef.Rotating(2)})
    run.train(range(4))
    saved = run.state.state_dict()
    kept = through_a_file(saved)
    ends = []
    for _ in range(2):
        run.state.load_state_dict(saved)
        run.scheduler.last_epoch = 4
        run.train(range(4, 8))
        ends.append(run.everything())
        x, y = batch(run.rank, 8, torch.float32)
        F.mse_loss(run.model(x), y).backward()
    assert_equal(saved, kept)
    for end in ends:
        del end["lr"], end["metrics"], end["buffers"]
    assert_equal(ends[0]["e"].shape, ends[1]["e"].shape)
    return True


def test_loading_within_a_step_drops_it(pool: RankPool) -> None:
    assert pool.run(load_in_a_step) == [True] * 4


# ---- the consolidated form ------------------------------------------------------------------------------------


def save_consolidated(group: dist.ProcessGroup, settings: dict[str, Any], source: str, target: str) -> list[Tensor]:
    """(x~ as loaded, x~ as saved, mean momentum as loaded, as saved, x as loaded, as saved), 10 steps between them."""
    run = Run(group, settings)
    if source:
        saved = torch.load(source, weights_only=True)
        run.load_others(saved)
        run.state.load_state_dict(saved["saef"])
    looks = [look(run, group)]
    run.train(range(run.state.steps, run.state.steps + 10))
    looks.append(look(run, group))
    assert torch.isfinite(looks[1][0]).all() and not torch.equal(looks[0][0], looks[1][0])
    consolidated = run.state.consolidated_state_dict()
    if run.rank == 0:
        torch.save({"saef": consolidated, **run.others()}, target)
    return [v for pair in zip(*looks, strict=True) for v in pair]


def look(run: Run, group: dist.ProcessGroup) -> list[Tensor]:
    m = run.state.m.clone()
    dist.all_reduce(m, group=group)
    return [run.state.x_tilde(), m / dist.get_world_size(group), run.state.weights.x().clone()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressor", "optimizer"), [(SIGN, "SGD"), (TOPK, "SGD"), (SIGN, "AdamW")], ids=["sign", "top-k", "adamw"]
)
@pytest.mark.parametrize("exchanges", [("sharded", "replicated", "sharded"), ("replicated", "sharded", "sharded")])
def test_consolidated_from_4_to_2_to_8_ranks(
    fresh: RankPool, tmp_path: Path, compressor: saef.Compressor, optimizer: str, exchanges: tuple[str, ...]
) -> None:
    """x~, x and the mean momentum before and after; to 1e-6 of the largest entry, and training goes on.

    float32: a mean over at most 8 ranks is at most 8 roundings, x~ two more: 10 * 2^-24 = 6e-7.
    """
    source, last = "", None
    for number, (ranks, exchange) in enumerate(zip((4, 2, 8), exchanges, strict=True)):
        target = str(tmp_path / f"{number}.pt")
        settings = {
            "compressor": compressor,
            "exchange": exchange,
            "averaging": saef.Rotating(6),
            "optimizer": optimizer,
        }
        runs = fresh.run(save_consolidated, settings, source, target, ranks=ranks)
        for run in runs:
            assert torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1])  # the same bits on all ranks
            if last is not None:
                for now, then in ((run[0], last[1]), (run[2], last[3])):
                    assert float((now - then).abs().max() / then.abs().max()) <= 1e-6
                assert torch.equal(run[4], last[5])
        source, last = target, runs[0]


def consolidated_is_the_mean(group: dist.ProcessGroup, exchange: str) -> bool:
    run = Run(group, {"compressor": TOPK, "exchange": exchange, "weight_decay_mode": "outer"}, torch.float64)
    run.train(range(10))
    x_tilde = run.state.x_tilde()
    saved = through_a_file(run.state.consolidated_state_dict())
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, saved, group=group)
    assert_equal(every[0], saved)
    flat = [torch.cat([saved[key][n].reshape(-1) for n in run.state.weights.names]) for key in ("x", "e_server")]
    e = torch.cat([saved["workers"]["e"][n].reshape(-1) for n in run.state.weights.names])
    torch.testing.assert_close(flat[0] - (flat[1] + e), x_tilde, rtol=0, atol=1e-15)
    assert float(flat[1].abs().min(dim=0).values) >= 0 and float(flat[1].abs().max()) > 0
    run.state.load_state_dict(saved)  # into the same ranks: each has the mean now
    torch.testing.assert_close(run.state.x_tilde(), x_tilde, rtol=0, atol=1e-15)
    torch.testing.assert_close(run.state.e, e, rtol=0, atol=0)
    again = run.state.consolidated_state_dict()
    assert_equal(again["e_server"], saved["e_server"])
    assert_equal(again["m_decay"], saved["m_decay"])
    return True


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_the_consolidated_form_holds_means_and_all_server_errors(pool: RankPool, exchange: str) -> None:
    assert pool.run(consolidated_is_the_mean, exchange) == [True] * 4


def flush_and_train(group: dist.ProcessGroup, exchange: str, averaging: Any) -> list[Tensor]:
    run = Run(group, {"compressor": TOPK, "exchange": exchange, "averaging": averaging}, torch.float64)
    run.train(range(11))
    x_tilde = run.state.x_tilde()
    run.model(batch(run.rank, 11)[0])  # a step under way, errors averaged, does not change it
    run.state.flush()
    flat = torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])
    torch.testing.assert_close(flat, x_tilde, rtol=0, atol=1e-15)
    assert not run.state.e.any() and not run.state.e_server.any() and run.state.m.any()
    assert torch.equal(run.state.x_tilde(), flat)
    run.train(range(11, 15))
    return [flat, run.state.weights.x()]


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_flush_moves_x_to_x_tilde(pool: RankPool, exchange: str) -> None:
    for averaging in (None, saef.AllReduce(1)):
        runs = pool.run(flush_and_train, exchange, averaging)
        for run in runs:
            assert torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1])


# ---- torch.distributed.checkpoint ---------------------------------------------------------------------------


def through_dcp(group: dist.ProcessGroup, folder: str, save: bool) -> dict[str, Any]:
    """Both forms in one checkpoint; an SAEFState stands for its rank form."""
    run = Run(group, {"compressor": TOPK, "exchange": "sharded", "averaging": saef.Rotating(3)})
    if save:
        run.train(range(9))
        consolidated, x_tilde = run.state.consolidated_state_dict(), run.state.x_tilde()
        saved = {"saef": run.state, "all": consolidated, "model": run.model.module.state_dict()}
        dcp.save(saved, checkpoint_id=folder, process_group=group)
    else:
        saved = {"saef": run.state, "all": run.state.consolidated_state_dict(), "model": run.model.module.state_dict()}
        dcp.load(saved, checkpoint_id=folder, process_group=group)
        rank_form = run.state.state_dict()
        x_tilde = run.state.x_tilde()
        run.state.load_state_dict(saved["all"])
        torch.testing.assert_close(run.state.x_tilde(), x_tilde, rtol=1e-6, atol=1e-6)
        run.state.load_state_dict(rank_form)
        for t in range(9):
            run.scheduler.step(t + 1)
    run.train(range(9, 15))
    return {**run.everything(), "x_tilde at 9": x_tilde}


def elsewhere(group: dist.ProcessGroup, folder: str) -> Tensor:
    """The consolidated form on another number of ranks, with another exchange strategy."""
    run = Run(group, {"compressor": TOPK, "exchange": "replicated"})
    saved = {"all": run.state.consolidated_state_dict()}
    dcp.load(saved, checkpoint_id=folder, process_group=group)
    run.state.load_state_dict(saved["all"])
    assert run.state.steps == 9
    try:
        dcp.load({"saef": run.state}, checkpoint_id=folder, process_group=group)
    except (ValueError, RuntimeError, dcp.api.CheckpointException):
        return run.state.x_tilde()
    raise AssertionError("the ranks' own states are of other ranks")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint_keeps_every_ranks_errors(pool: RankPool, fresh: RankPool, tmp_path: Path) -> None:
    """It writes one of equal keys: were the ranks' errors under one key, all would get rank 0's."""
    saved = pool.run(through_dcp, str(tmp_path), True)
    for a, b in zip(saved, fresh.run(through_dcp, str(tmp_path), False), strict=True):
        assert_equal(a["e"], b["e"])
        assert_equal(a["x"], b["x"])
        assert_equal(a["e_server"], b["e_server"])
    x_tilde = saved[0]["x_tilde at 9"]
    for found in fresh.run(elsewhere, str(tmp_path), ranks=2):  # tolerance as for 4 to 2 ranks above
        torch.testing.assert_close(found, x_tilde, rtol=0, atol=1e-6 * float(x_tilde.abs().max()))


# ---- refused ------------------------------------------------------------------------------------------------


def refuse(group: dist.ProcessGroup, ranks: list[int]) -> list[str]:
    """What is said to each damaged or foreign checkpoint; nothing changes."""
    base = {"compressor": TOPK, "exchange": "sharded"}
    run = Run(group, base)
    run.train(range(3))
    saved, whole = run.state.state_dict(), run.state.consolidated_state_dict()
    me = f"rank_{run.rank}"
    before, said = run.everything(), []

    def attempt(state_dict: Any, into: Run = run) -> None:
        try:
            into.state.load_state_dict(state_dict)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("nothing was raised")

    attempt({})
    attempt(run.optimizer.state_dict())
    attempt({**saved, "format": 2, "saef": "9.0"})
    attempt({**whole, "format": 2})
    shape = {**saved["parameters"], "a.weight": [6, 21]}
    attempt({**saved, "parameters": shape})
    attempt({**saved, "parameters": {k: v for k, v in saved["parameters"].items() if k != "b.bias"}})
    attempt(saved, Run(group, {**base, "compressor": SIGN}))
    attempt(saved, Run(group, {**base, "optimizer": "AdamW"}))
    adam = Run(group, {**base, "optimizer": "AdamW"})
    of_adam = adam.state.consolidated_state_dict()
    attempt(of_adam)
    attempt({**of_adam, "workers": {k: v for k, v in of_adam["workers"].items() if k != "v"}}, adam)
    attempt(whole, Run(group, {**base, "server_compressor": None}))
    attempt(saved, Run(group, base, torch.float64))
    attempt({**saved, "world_size": 8})
    attempt(saved, Run(group, {**base, "exchange": "replicated"}))
    attempt({k: v for k, v in saved.items() if k != me} | {"rank_7": saved[me]})
    attempt({k: v for k, v in saved.items() if k != "x"})
    attempt({**saved, me: {k: v for k, v in saved[me].items() if k != "m"}})
    attempt({**saved, me: {**saved[me], "e": {**saved[me]["e"], "a.bias": torch.zeros(3)}}})
    attempt({**saved, me: {**saved[me], "e_server": saved[me]["e_server"][1:]}})
    attempt({k: v for k, v in whole.items() if k != "e_server"})
    attempt({**saved, me: {**saved[me], "strides": {n: [1] for n in saved[me]["strides"]}}})
    attempt({k: v for k, v in whole.items() if k != "steps"})
    attempt({**saved, me: {k: v for k, v in saved[me].items() if k != "random"}})
    assert_equal(run.everything()["e"], before["e"])
    assert_equal(run.everything()["x"], before["x"])
    return said


def test_what_does_not_fit_is_refused_by_name(pool: RankPool) -> None:
    expected = [
        "state_dict() or consolidated_state_dict()",
        "state_dict() or consolidated_state_dict()",
        "format 2 and was written by saef 9.0",
        "format 2",
        "another model: a.weight is [6, 21] in the checkpoint, [20, 6] here",
        "another model: b.bias is missing in the checkpoint, [1] here",
        "compressor is TopK(ratio=0.1, block=30) in the checkpoint, ScaledSign(block=20) here",
        "rule is SGD in the checkpoint, AdamW here",
        "rule is AdamW in the checkpoint, SGD here",
        "'v' is missing",
        "server_compressor is TopK(ratio=0.1, block=30) in the checkpoint, Identity() here",
        "dtype is torch.float32 in the checkpoint, torch.float64 here",
        "one of 8 ranks with exchange='sharded', here are 2",
        "exchange='sharded', here are 2 with 'replicated'",
        "rank_7, here is rank",
        "'x' is missing",
        "'m' is missing",
        "'e' is missing or not of the parameters' shapes",
        "'e_server' is missing or not of this rank's size",
        "'e_server' is missing",
        "memory format",
        "damaged: ['steps'] are missing",
        "damaged: ['random'] are missing",
    ]
    for said in pool.run(refuse, [0, 1], ranks=2):
        for text, part in zip(said, expected, strict=True):
            assert part in text, (part, text)


def different_steps(group: dist.ProcessGroup) -> str:
    """One rank loads another checkpoint than the rest."""
    run = Run(group, {"compressor": TOPK})
    run.train(range(3))
    early = run.state.state_dict()
    run.train(range(3, 5))
    late = run.state.state_dict()
    run.state.load_state_dict(early if run.rank == 1 else late)
    try:
        run.train(range(5, 6))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_load_different_checkpoints_are_told(pool: RankPool) -> None:
    for said in pool.run(different_steps, ranks=3):
        assert "steps: rank 0 has 5, rank 1 has 3" in said and "checksum of the weights x: rank 0 has" in said
        assert "rank 2 has" not in said and "load the last checkpoint" in said


# ---- models of other kinds ----------------------------------------------------------------------------------


def empty_tensors(group: dist.ProcessGroup, folder: str) -> bool:
    """Parameters without entries, scalars and one entry, through torch.distributed.checkpoint and back."""
    states = []
    for number in range(2):
        model, optimizer, state = setup(group, torch.float32, 1.0, 0.9, {"compressor": TOPK, "exchange": "sharded"})
        states.append(state)
        if number:
            dcp.load({"saef": state}, checkpoint_id=folder, process_group=group)
        for t in range(5 * number, 5 + 5 * number):
            optimizer.zero_grad()
            model([v.float() for v in slope(dist.get_rank(group), t)]).backward()
            optimizer.step()
            if t == 4:
                dcp.save({"saef": state}, checkpoint_id=folder, process_group=group)
                saved = through_a_file(state.state_dict())
    first, second = states
    end = snapshot(second)
    first.load_state_dict(saved)
    assert first.steps == 5
    first.load_state_dict(through_a_file(second.state_dict()))
    assert_equal(snapshot(first), end)
    return second.steps == 10


@pytest.mark.filterwarnings("ignore")
def test_parameters_without_entries(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(empty_tensors, str(tmp_path), ranks=2) == [True, True]


def another_memory_format(group: dist.ProcessGroup) -> str:
    """Weights are saved by shape: a consolidated form loads into a channels-last model, a rank form is refused."""

    def make_conv(channels_last: bool) -> tuple[nn.Module, torch.optim.SGD, saef.SAEFState]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 1)).double()
        net = net.to(memory_format=torch.channels_last) if channels_last else net
        model = DDP(net, process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        state = saef.SAEFState(model, optimizer, compressor=TOPK, exchange="sharded")
        model.register_comm_hook(state, saef_hook)
        return model, optimizer, state

    def train(model: nn.Module, optimizer: torch.optim.SGD) -> None:
        for t in range(4):
            gen = torch.Generator().manual_seed(10 * t + dist.get_rank(group))
            optimizer.zero_grad()
            model(randn(gen, 4, 3, 4, 4)).square().mean().backward()
            optimizer.step()

    model, optimizer, state = make_conv(False)
    train(model, optimizer)
    other_model, other_optimizer, other = make_conv(True)
    assert other.weights.parameters[0].stride() != state.weights.parameters[0].stride()
    other.load_state_dict(through_a_file(state.consolidated_state_dict()))

    def by_name(s: saef.SAEFState) -> dict[str, Tensor]:
        return dict(zip(s.weights.names, s.weights.cut(s.x_tilde()), strict=True))

    for name, value in by_name(state).items():
        torch.testing.assert_close(by_name(other)[name], value, rtol=0, atol=1e-14)
    train(other_model, other_optimizer)
    try:
        other.load_state_dict(state.state_dict())
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_another_memory_format(pool: RankPool) -> None:
    for said in pool.run(another_memory_format, ranks=2):
        assert "another memory format" in said and "consolidated" in said


class Two(nn.Module):
    """Two layers, registered in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        layers = {"a": nn.Linear(6, 4).double(), "b": nn.Linear(4, 1).double()}
        for name in order:
            setattr(self, name, layers[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def in_another_order(group: dist.ProcessGroup, folder: str, exchange: Any, compressor: saef.Compressor) -> list[str]:
    def made(order: str) -> tuple[nn.Module, Any, saef.SAEFState]:
        model = DDP(Two(order), process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        state = saef.SAEFState(model, optimizer, compressor=compressor, exchange=exchange)
        model.register_comm_hook(state, saef_hook)
        return model, optimizer, state

    model, optimizer, state = made("ab")
    for t in range(4):
        x, y = batch(dist.get_rank(group), t)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    saved, whole = state.state_dict(), state.consolidated_state_dict()
    x_tilde = dict(zip(state.weights.names, state.weights.cut(state.x_tilde()), strict=True))
    told = []
    for given in (saved, whole):
        _, _, other = made("ba")
        try:
            other.load_state_dict(given)
        except ValueError as error:
            told.append(str(error))
            continue
        for name, part in zip(other.weights.names, other.weights.cut(other.x_tilde()), strict=True):
            torch.testing.assert_close(part, x_tilde[name], rtol=0, atol=1e-12)
        told.append("")
    saef.save_checkpoint(folder, state)
    _, _, other = made("ba")
    saef.load_checkpoint(folder, other)
    for name, part in zip(other.weights.names, other.weights.cut(other.x_tilde()), strict=True):
        torch.testing.assert_close(part, x_tilde[name], rtol=0, atol=1e-12)
    return told


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_a_server_error_lies_by_the_order_of_the_parameters(pool: RankPool, exchange: str, tmp_path: Path) -> None:
    for told, loaded in pool.run(in_another_order, str(tmp_path / "owing"), exchange, TOPK, ranks=2):
        assert "another order here, in which server errors lie: load the consolidated form" in told and loaded == ""
    nothing = pool.run(in_another_order, str(tmp_path / "nothing"), exchange, saef.Identity(), ranks=2)
    assert nothing == [["", ""]] * 2  # is owed
