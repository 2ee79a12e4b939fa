"""Any optimizer, and several local steps between exchanges: real ranks against a list of workers."""

import copy
import io
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only

import saef
from saef import SAEFState
from saef.hooks import saef_hook
from saef.step import joining
from support import reference
from support.cases import OPTIMIZERS, close, operator, pairwise, servers_of, start
from support.ranks import RankPool
from support.training import batch, flat, gradient, make_net, way_of_keeping_x, wild_lrs

VALUES: dict[str, list[Any]] = {
    "optimizer": [*OPTIMIZERS],
    "local_steps": [1, 4],
    "compressor": [saef.ScaledSign(block=7), saef.TopK(0.3, block=10)],
    "exchange": ["replicated", "sharded"],
    "step_ahead": [0.0, 0.25, 1.0],
    "error_decay": [1.0, 0.95],
    "outer": [None, saef.Nesterov(lr=0.7, momentum=0.8)],
    "server": ["same", None],
    "averaging": [None, saef.Rotating(4)],
    "ranks": [2, 3],
}
STEPS = 24  # six rounds of four: of a protocol's four turns each comes once, two come twice
pytestmark = pytest.mark.slow


class Seen(torch.optim.Optimizer):
    """One of torch's with a step of its own, so that saef leaves it to itself; it notes what it is given and makes."""

    before: Tensor
    after: Tensor

    def step(self, closure: Any = None) -> Any:
        self.before = self.where()
        loss = super().step(closure)  # type: ignore[safe-super]
        self.after = self.where()
        return loss

    def where(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for group in self.param_groups for p in group["params"]])


def make_optimizer(kind: str, parameters: list[Tensor], **options: Any) -> Any:
    own = getattr(torch.optim, kind)
    own([nn.Parameter(torch.zeros(1))], lr=1.0)  # from now on torch runs the hooks anew in super().step()
    return type(kind, (Seen, own), {})(parameters, **{"lr": 1.0, **OPTIMIZERS[kind], **options})


def rates(case: dict[str, Any]) -> list[float]:
    return [lr * (1.0 if case["optimizer"] == "SGD" else 0.1) for lr in wild_lrs(STEPS)]


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    given = {k: case[k] for k in ("local_steps", "compressor", "exchange", "step_ahead", "error_decay", "outer")}
    full = case.get("server_step_ahead", False)
    given["overlap"] = case.get("overlap", False)
    return given | {"server_compressor": case["server"], "averaging": case["averaging"], "server_step_ahead": full}


def make(group: Any, case: dict[str, Any], **more: Any) -> tuple[nn.Module, nn.Module, Any, SAEFState]:
    net = make_net()
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005) if case.get("ddp", True) else net
    optimizer = make_optimizer(case["optimizer"], list(net.parameters()))
    if isinstance(model, DDP):
        state = SAEFState(model, optimizer, **settings_of(case) | more)
        model.register_comm_hook(state, saef_hook)
    else:
        state = SAEFState(model, optimizer, process_group=group, **settings_of(case) | more)
    return net, model, optimizer, state


def step(model: nn.Module, optimizer: Any, k: int, t: int, lr: float) -> None:
    for g in optimizer.param_groups:
        g["lr"] = lr
    optimizer.zero_grad()
    x, y = batch(k, t)
    mse_loss(model(x), y).backward()
    optimizer.step()


def train(group: Any, case: dict[str, Any]) -> dict[str, Any]:
    """x and x~ after each round; between, the parameters are x."""
    net, model, optimizer, state = make(group, case)
    x, x_tilde = [flat(net)], [state.x_tilde()]
    for t, lr in enumerate(rates(case)):
        step(model, optimizer, dist.get_rank(group), t, lr)
        assert state.local_step == (t + 1) % case["local_steps"]
        if state.local_step == 0:
            x.append(flat(net))
            x_tilde.append(state.x_tilde())
        else:
            assert torch.equal(flat(net), x[-1])
    assert state.steps == STEPS // case["local_steps"] - case.get("overlap", False)
    return {"x": torch.stack(x), "x_tilde": torch.stack(x_tilde), "e": state.e, "text": repr(state)}


def expected(case: dict[str, Any]) -> reference.LocalSteps:
    C, block = operator(case["compressor"])
    settings = reference.Settings(
        C,
        server=case["server"],
        block=block,
        step_ahead=case["step_ahead"],
        averaging=None if case["averaging"] is None else ("rotating", 4),
        servers=servers_of(case, case["ranks"]) if case["exchange"] == "sharded" else None,
        error_decay=case["error_decay"],
    )
    outer = case["outer"] and (case["outer"].lr, case["outer"].momentum)
    return reference.LocalSteps(
        settings,
        start(),
        case["ranks"],
        lambda X: make_optimizer(case["optimizer"], X),
        outer,
        case.get("overlap", False),
    )


@pytest.mark.parametrize("case", pairwise(VALUES), ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_rounds_equal_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """x after each round, e, and x~ where errors do not decay (after a step here, before the next one there)."""
    runs, oracle = pool.run(train, case, ranks=case["ranks"]), expected(case)
    x, x_tilde = reference.drive_rounds(oracle, gradient, rates(case), case["local_steps"])
    for k, run in enumerate(runs):
        close(run["x"], x)
        if case["error_decay"] == 1.0:
            close(run["x_tilde"], x_tilde)
        close(run["e"], case["error_decay"] * oracle.e[k])
        assert f"{case['optimizer']}'s own steps" in run["text"]


# ---- what must hold whatever the reference ----------------------------------------------------------------------

CASE: dict[str, Any] = {
    "optimizer": "AdamW",
    "local_steps": 3,
    "compressor": saef.ScaledSign(block=7),
    "exchange": "sharded",
    "step_ahead": 1.0,
    "error_decay": 1.0,
    "outer": None,
    "server": "same",
    "averaging": None,
    "ranks": 2,
}


def moved(group: Any, way: str, server_step_ahead: bool) -> None:
    """Over ten rounds: x~' = x~ - mean_k (x_half - X); full step ahead starts at x~ in the mean."""
    with mock.patch.object(joining, "create", way_of_keeping_x(way)):
        net, model, optimizer, state = make(group, CASE, server_step_ahead=server_step_ahead)
    for t in range(30):
        begins, x_tilde = state.local_step == 0, state.x_tilde()
        before = flat(net)
        step(model, optimizer, dist.get_rank(group), t, 0.01)
        if begins:
            half, start_of = optimizer.before.clone(), x_tilde
            if server_step_ahead:
                torch.testing.assert_close(mean(half, group), start_of, rtol=0, atol=1e-12)
        if state.local_step == 0:
            moved_by = mean(half - optimizer.after, group)
            torch.testing.assert_close(state.x_tilde(), start_of - moved_by, rtol=0, atol=1e-12)
            assert float(moved_by.abs().max()) > 1e-3
        else:
            assert torch.equal(flat(net), before)
    assert float(state.e.abs().max()) > 1e-3


def mean(v: Tensor, group: Any) -> Tensor:
    v = v.clone()
    dist.all_reduce(v, group=group)
    return v / dist.get_world_size(group)


@pytest.mark.parametrize("server_step_ahead", [False, True])
@pytest.mark.parametrize("way", ["copies", "swaps"])
def test_x_tilde_moves_by_the_mean_difference(pool: RankPool, way: str, server_step_ahead: bool) -> None:
    pool.run(moved, way, server_step_ahead, ranks=2)


def both_forms(group: Any, optimizer: str) -> float:
    """The largest difference of x between the difference form with H = 1 and the rule that saef computes itself."""
    found = []
    for kind in (lambda p: make_optimizer(optimizer, p), lambda p: plain(optimizer, p)):
        net = make_net()
        model = DDP(net, process_group=group)
        chosen = kind(list(net.parameters()))
        state = SAEFState(model, chosen, compressor=saef.ScaledSign(block=7), server_step_ahead=False)
        model.register_comm_hook(state, saef_hook)
        for t in range(30):
            step(model, chosen, dist.get_rank(group), t, 0.01)
        assert ("own steps" in repr(state)) == (not found)
        found.append(flat(net))
    return float((found[0] - found[1]).abs().max())


def plain(kind: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return getattr(torch.optim, kind)(parameters, lr=1.0, **OPTIMIZERS[kind])  # type: ignore[no-any-return]


def test_one_local_step_of_sgd_is_the_rule(pool: RankPool) -> None:
    """Coupled decay, at x_half in both. AdamW's is another: its decay is at X here, there at x; and u is clamped."""
    assert max(pool.run(both_forms, "SGD", ranks=2)) < 1e-12


# ---- rounds that do not happen ----------------------------------------------------------------------------------


def bad_round(group: Any, on_bad_round: str, local_steps: int) -> None:
    """A NaN on rank 0 alone, in the middle of a round: all drop it, and go on as if it had not been."""
    case = {**CASE, "local_steps": local_steps, "averaging": saef.Rotating(4)}
    rank = dist.get_rank(group)
    net, model, optimizer, state = make(group, case, on_bad_round=on_bad_round)
    for t in range(2 * local_steps):
        step(model, optimizer, rank, t, 0.01)
    before = everything(net, optimizer, state)
    for t in range(local_steps):
        optimizer.zero_grad()
        x, y = batch(rank, t)
        mse_loss(model(x), y * (math.nan if rank == 0 and t == local_steps // 2 else 1.0)).backward()
        optimizer.step()
    after = everything(net, optimizer, state)
    same = {name for name in before if equal(before[name], after[name])}
    assert state.skipped == 1 and state.local_step == 0
    assert {"x", "e", "e_server", "steps"} <= same
    assert ("optimizer" in same) == (on_bad_round == "restore")
    if on_bad_round == "restore":  # and to the bit as if it had not been
        twin_net, twin, twin_optimizer, twin_state = make(group, case, on_bad_round=on_bad_round)
        for t in range(4 * local_steps):
            if t >= 2 * local_steps:
                step(model, optimizer, rank, t, 0.01)
            step(twin, twin_optimizer, rank, t, 0.01)
        assert equal(everything(net, optimizer, state), everything(twin_net, twin_optimizer, twin_state))


def everything(net: nn.Module, optimizer: Any, state: SAEFState) -> dict[str, Any]:
    kept = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in net.parameters()]
    found = {"x": flat(net), "e": state.e.clone(), "e_server": state.e_server.clone()}
    return {**found, "steps": state.steps, "optimizer": kept}


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, NaN or not."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("on_bad_round", ["restore", "keep"])
def test_a_bad_round_is_dropped_by_all(pool: RankPool, on_bad_round: str, local_steps: int) -> None:
    pool.run(bad_round, on_bad_round, local_steps, ranks=2)


class BySign(torch.optim.Optimizer):
    """Steps by the sign of an average of the gradients, as Lion does: finite, whatever comes."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
            p.sub_(self.param_groups[0]["lr"] * torch.nan_to_num(average.sign()))
        return loss


def swallowed(group: Any, kind: str, value: float, local_steps: int, overlap: bool, closure: bool) -> None:
    """Rank 1 has a number that is none, in the middle of the second round, of four."""
    rank, net = dist.get_rank(group), make_net()
    model = DDP(net, process_group=group)
    optimizer = BySign(net.parameters()) if kind == "BySign" else getattr(torch.optim, kind)(net.parameters(), lr=0.01)
    state = SAEFState(model, optimizer, compressor=saef.TopK(0.3), local_steps=local_steps, overlap=overlap)
    model.register_comm_hook(state, saef_hook)
    for t in range(4 * local_steps):

        def loss(t: int = t) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(rank, t)
            found = mse_loss(model(x), y) * (value if rank == 1 and t == local_steps + local_steps // 2 else 1.0)
            found.backward()
            return found

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    state.flush()
    assert state.skipped == 1 and (overlap or state.steps == 3)  # with overlap others go with it
    kept = [v for of in optimizer.state.values() for v in of.values() if isinstance(v, Tensor)]
    assert all(bool(v.isfinite().all()) for v in [*net.parameters(), *kept])


@pytest.mark.parametrize(
    ("kind", "value", "local_steps", "overlap", "closure"),
    [
        ("BySign", math.nan, 1, False, False),
        ("BySign", math.inf, 4, False, True),
        ("BySign", math.nan, 4, True, True),
        ("BySign", math.inf, 4, True, False),
        ("Rprop", math.nan, 4, False, False),
        ("Rprop", math.inf, 1, False, True),
        ("Rprop", math.nan, 4, True, True),
        ("RMSprop", math.inf, 4, False, False),
    ],
)
def test_a_number_that_the_optimizer_swallows_drops_the_round(
    pool: RankPool, kind: str, value: float, local_steps: int, overlap: bool, closure: bool
) -> None:
    pool.run(swallowed, kind, value, local_steps, overlap, closure, ranks=2)


def spoilt_and_saved(group: Any, value: float) -> None:
    """A checkpoint within the round, after rank 1 has swallowed it, and before the round ends."""
    rank = dist.get_rank(group)

    def made() -> tuple[Any, Any, SAEFState]:
        model = DDP(make_net(), process_group=group)
        optimizer = BySign(model.parameters())
        state = SAEFState(model, optimizer, compressor=saef.TopK(0.3), local_steps=4)
        model.register_comm_hook(state, saef_hook)
        return model, optimizer, state

    def train(model: Any, optimizer: Any, first: int, last: int) -> None:
        for t in range(first, last):
            optimizer.zero_grad()
            x, y = batch(rank, t)
            (mse_loss(model(x), y) * (value if rank == 1 and t == 5 else 1.0)).backward()
            optimizer.step()

    file = io.BytesIO()
    model, optimizer, state = made()
    train(model, optimizer, 0, 7)
    torch.save(state.state_dict(), file)
    file.seek(0)
    other, other_optimizer, other_state = made()
    other_state.load_state_dict(torch.load(file, weights_only=True))
    for of in ((model, optimizer), (other, other_optimizer)):
        train(*of, 7, 12)
    assert state.skipped == other_state.skipped == 1
    assert torch.equal(state.weights.x(), other_state.weights.x())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_in_a_round_knows_what_its_optimizer_swallowed(pool: RankPool, value: float) -> None:
    pool.run(spoilt_and_saved, value, ranks=2)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def resumed(group: Any, at: int, case: dict[str, Any]) -> None:
    """Saved after `at` steps and loaded by new objects: the rest is the same bits, and so is a later bad round."""
    rank = dist.get_rank(group)
    net, model, optimizer, state = make(group, case)
    for t in range(at):
        step(model, optimizer, rank, t, 0.01)
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    other_net, other, other_optimizer, other_state = make(group, case)
    with torch.no_grad():
        for p in other_net.parameters():
            p.add_(1.0)
    of_rank_0 = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(of_rank_0, group=group, group_src=0)
    other_state.load_state_dict(torch.load(buffer, weights_only=True))
    other_optimizer.load_state_dict(of_rank_0[0])  # as most scripts do; each rank has its own all the same
    for t in range(at, at + 9):
        spoilt = math.nan if t == at + 1 else 1.0
        for m, o in ((model, optimizer), (other, other_optimizer)):
            o.param_groups[0]["lr"] = 0.01
            o.zero_grad()
            x, y = batch(rank, t)
            mse_loss(m(x), y * spoilt).backward()
            o.step()
        assert state.local_step == other_state.local_step
    assert state.skipped == other_state.skipped == 1
    assert equal(everything(net, optimizer, state), everything(other_net, other_optimizer, other_state))


@pytest.mark.parametrize("at", [6, 7, 8])
def test_a_round_is_resumed_in_its_middle(pool: RankPool, at: int) -> None:
    """With averaged errors, which were averaged at the round's beginning, and an outer optimizer."""
    case = {**CASE, "averaging": saef.Rotating(4), "outer": saef.Nesterov(0.7, 0.8), "server_step_ahead": True}
    pool.run(resumed, at, case, ranks=2)


def consolidate(group: Any) -> dict[str, Any]:
    net, model, optimizer, state = make(group, CASE)
    for t in range(9):
        step(model, optimizer, dist.get_rank(group), t, 0.01)
    averages = [mean(optimizer.state[p]["exp_avg_sq"], group) for p in net.parameters()]
    return {"saved": state.consolidated_state_dict(), "x_tilde": state.x_tilde(), "v": averages}


def take_over(group: Any, saved: dict[str, Any], x_tilde: Tensor, v: list[Tensor]) -> None:
    net, model, optimizer, state = make(group, CASE)
    state.load_state_dict(saved)
    torch.testing.assert_close(state.x_tilde().cpu(), x_tilde, rtol=0, atol=1e-12)
    for p, second in zip(net.parameters(), v, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].cpu(), second, rtol=0, atol=1e-12)
    for t in range(6):
        step(model, optimizer, dist.get_rank(group), t, 0.01)
    assert state.steps == 5


def test_another_number_of_ranks_goes_on(pool: RankPool) -> None:
    """x~ is kept, and the optimizer's moments become their means."""
    runs = pool.run(consolidate, ranks=2)
    assert equal(runs[0]["saved"], runs[1]["saved"])
    pool.run(take_over, runs[0]["saved"], runs[0]["x_tilde"], runs[0]["v"], ranks=3)


def refuse_checkpoints(group: Any) -> None:
    net, model, optimizer, state = make(group, CASE)
    for t in range(5):
        step(model, optimizer, dist.get_rank(group), t, 0.01)
    saved = state.state_dict()
    _, _, _, fewer = make(group, {**CASE, "local_steps": 2})
    with pytest.raises(ValueError, match="2 local steps behind it, and here local_steps is 2"):
        fewer.load_state_dict(saved)
    _, _, _, other = make(group, {**CASE, "optimizer": "RMSprop"})
    with pytest.raises(ValueError, match="rule is Difference of AdamW in the checkpoint, Difference of RMSprop here"):
        other.load_state_dict(saved)
    _, _, _, outer = make(group, {**CASE, "outer": saef.Nesterov()})
    with pytest.raises(ValueError, match="outer is missing in the checkpoint"):
        outer.load_state_dict(saved)
    # A model and an optimizer that are loaded alone: the errors are of another step.
    plain = optimizer.state_dict()
    for t in range(5, 9):
        step(model, optimizer, dist.get_rank(group), t, 0.01)
    optimizer.load_state_dict(plain)
    with pytest.raises(RuntimeError, match="loaded the state of step 1, but this state's errors are of step 3"):
        step(model, optimizer, dist.get_rank(group), 9, 0.01)
    state.reset_errors()
    step(model, optimizer, dist.get_rank(group), 9, 0.01)
    assert state.steps == 1 and not state.e.any()


def test_checkpoints_that_do_not_fit_are_refused(pool: RankPool) -> None:
    pool.run(refuse_checkpoints, ranks=2)


def aliased(group: Any, which: str) -> float:
    """A round is resumed, what was saved is overwritten, and then the round is dropped for a NaN."""
    case, finals = {**CASE, "optimizer": "AdamW"}, []
    for overwrite in (False, True):
        net, model, optimizer, state = make(group, case)
        k = dist.get_rank(group)
        for t in range(6):
            step(model, optimizer, k, t, 0.05)
        saved = state.state_dict()
        if which == "given":
            state.load_state_dict(saved)
        if overwrite:
            tree_map_only(Tensor, lambda v: v.fill_(3.0) if v.is_floating_point() else v, saved)
        for t in range(6, 12):
            x, y = batch(k, t)
            optimizer.zero_grad()
            (mse_loss(model(x), y) * (math.nan if t == 7 and k == 1 else 1.0)).backward()
            optimizer.step()
        finals.append(flat(net))
        assert state.skipped == 1
    return float((finals[0] - finals[1]).abs().max())


@pytest.mark.parametrize("which", ["returned", "given"])
def test_what_is_saved_is_a_copy_within_a_round_too(pool: RankPool, which: str) -> None:
    assert pool.run(aliased, which, ranks=2) == [0.0, 0.0]


def by_dcp(group: Any, folder: str, steps: int) -> list[str]:
    """torch.distributed.checkpoint fills what is there already: of a new optimizer, nothing."""
    case, said = {**CASE, "optimizer": "AdamW"}, []
    _, model, optimizer, state = make(group, case)
    for t in range(steps):
        step(model, optimizer, dist.get_rank(group), t, 0.05)
    dcp.save({"saef": state}, checkpoint_id=folder, process_group=group)
    fresh = make(group, case)[-1]
    for target in (fresh, state):
        try:
            dcp.load({"saef": target}, checkpoint_id=folder, process_group=group)
            said.append("")
        except Exception as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("steps", [8, 6])
def test_a_state_that_dcp_loses_is_refused(pool: RankPool, tmp_path: Path, steps: int) -> None:
    """Where all of it is there already, all of it is loaded."""
    for fresh, same in pool.run(by_dcp, str(tmp_path), steps, ranks=2):
        assert "torch.distributed.checkpoint fills only what a state has already" in fresh
        assert "saef.save_checkpoint" in fresh and same == ""


# ---- overlap ----------------------------------------------------------------------------------------------------


OVERLAP: dict[str, list[Any]] = {
    **{key: VALUES[key] for key in ("optimizer", "local_steps", "compressor", "exchange", "step_ahead", "outer")},
    "server": ["same", None],
    "ranks": [2, 3],
    "error_decay": [1.0],
    "averaging": [None],
    "overlap": [True],
}


@pytest.mark.parametrize("case", pairwise(OVERLAP), ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_overlapping_rounds_equal_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """x, which lags a round behind, and x~, which counts what is on its way as not sent."""
    runs, oracle = pool.run(train, case, ranks=case["ranks"]), expected(case)
    x, x_tilde = reference.drive_rounds(oracle, gradient, rates(case), case["local_steps"])
    for k, run in enumerate(runs):
        close(run["x"], x)
        close(run["x_tilde"], x_tilde)
        close(run["e"], oracle.e[k])


def overlapping(group: Any, way: str) -> None:
    """x~ moves by the mean difference at the end of each round; bad rounds, checkpoints, flush."""
    case, rank = {**CASE, "overlap": True}, dist.get_rank(group)
    with mock.patch.object(joining, "create", way_of_keeping_x(way)):
        net, model, optimizer, state = make(group, case)
        twin_net, twin, twin_optimizer, twin_state = make(group, case)
        _, other, other_optimizer, other_state = make(group, case)
    half, start_of = torch.empty(0), torch.empty(0)
    for t in range(21):
        begins, x_tilde = state.local_step == 0, state.x_tilde()
        step(model, optimizer, rank, t, 0.01)
        step(twin, twin_optimizer, rank, t, 0.01)
        if begins:
            half, start_of = optimizer.before.clone(), x_tilde
        if state.local_step == 0:
            moved_by = mean(half - optimizer.after, group)
            torch.testing.assert_close(state.x_tilde(), start_of - moved_by, rtol=0, atol=1e-12)
            assert float(moved_by.abs().max()) > 1e-3
    assert state.steps == 6  # of seven rounds, the last is on its way
    # A NaN shows a round later: both go, on all ranks, and all is as if they had not been.
    for spoilt in range(6):
        optimizer.zero_grad()
        x, y = batch(rank, spoilt)
        mse_loss(model(x), y * (math.nan if (rank, spoilt) == (0, 1) else 1.0)).backward()
        optimizer.step()
    # The good round that was on its way has been applied meanwhile; the twin's is, when its next ends.
    assert (state.steps, state.skipped, state.local_step) == (7, 1, 0)
    for t in range(30, 39):
        step(model, optimizer, rank, t, 0.01)
    # A checkpoint takes back what is on its way: x~ goes on where it was.
    other_state.load_state_dict(state.state_dict())
    torch.testing.assert_close(other_state.x_tilde(), state.x_tilde(), rtol=0, atol=1e-12)
    for t in range(39, 45):
        step(other, other_optimizer, rank, t, 0.01)
        step(model, optimizer, rank, t, 0.01)
    x_tilde = state.x_tilde()
    state.flush()
    torch.testing.assert_close(flat(net), x_tilde, rtol=0, atol=1e-12)
    before = everything(net, optimizer, state)
    state.flush()
    assert equal(everything(net, optimizer, state), before) and not state.e.any()
    step(model, optimizer, rank, 0, 0.01)


@pytest.mark.parametrize("way", ["copies", "swaps"])
def test_overlapping_rounds_keep_the_invariant_and_lose_nothing(pool: RankPool, way: str) -> None:
    pool.run(overlapping, way, ranks=2)


def bad_flight(group: Any) -> None:
    """After a bad round and the one that was made on it, all is to the bit as before them."""
    case, rank = {**CASE, "overlap": True, "step_ahead": 0.25}, dist.get_rank(group)
    net, model, optimizer, state = make(group, case)
    twin_net, twin, twin_optimizer, twin_state = make(group, case)
    for t in range(6):
        step(model, optimizer, rank, t, 0.01)
        step(twin, twin_optimizer, rank, t, 0.01)
    for t in range(6, 12):  # a bad round, which is sent at its end, and another
        optimizer.zero_grad()
        x, y = batch(rank, t)
        mse_loss(model(x), y * (math.nan if (rank, t) == (1, 7) else 1.0)).backward()
        optimizer.step()
        if t == 8:
            before_it = state.steps
    assert state.skipped == 1 and state.steps == before_it == 2 and twin_state.steps == 1
    # The twin's second round is on its way; here it was applied when the bad one ended. What each owes is the same.
    torch.testing.assert_close(state.x_tilde(), twin_state.x_tilde(), rtol=0, atol=1e-12)
    for a, b in zip(net.parameters(), twin_net.parameters(), strict=True):
        assert equal(dict(optimizer.state[a]), dict(twin_optimizer.state[b]))


def test_a_bad_round_on_its_way_takes_the_next_with_it(pool: RankPool) -> None:
    pool.run(bad_flight, ranks=2)


# ---- exempt parameters ------------------------------------------------------------------------------------------


def vectors_whole(name: str, p: Tensor) -> bool:
    return p.ndim < 2


def exempt(group: Any, local_steps: int) -> None:
    """Biases travel whole: they owe nothing, and with patterns of their names it is the same, bit for bit."""
    found = []
    for which in (vectors_whole, ["*.bias"]):
        case = {**CASE, "compressor": saef.Exempt(which, saef.TopK(0.2, block=10)), "local_steps": local_steps}
        net, model, optimizer, state = make(group, case)
        expected = float(repr(state).partition("about ")[2].partition(" bytes")[0].replace(",", ""))
        for t in range(6):
            step(model, optimizer, dist.get_rank(group), t, 0.01)
        owed = dict(zip(state.weights.names, state.weights.cut(state.e), strict=True))
        assert all(bool(e.any()) == name.endswith("weight") for name, e in owed.items())
        assert abs(state.metrics()["bytes_per_step"] - expected) < 100
        found.append(flat(net))
    assert torch.equal(*found)
    # Another choice on one rank is told on all.
    names = ["*.bias"] if dist.get_rank(group) else ["0.bias"]
    with pytest.raises(ValueError, match="compressor: rank 0 has Exempt"):
        make(group, {**CASE, "compressor": saef.Exempt(names, saef.TopK(0.2, block=10))})
    odd = dist.get_rank(group) % 2 == 1
    with pytest.raises(ValueError, match="codes to the servers: rank 0 has"):
        make(group, {**CASE, "compressor": saef.Exempt(lambda name, p: odd, saef.TopK(0.2, block=10))})


@pytest.mark.parametrize("local_steps", [1, 3])
def test_exempt_parameters_travel_whole(pool: RankPool, local_steps: int) -> None:
    pool.run(exempt, local_steps, ranks=2)


# ---- what users do ----------------------------------------------------------------------------------------------


def idioms(group: Any) -> None:
    """Closures, clipping, frozen layers, evaluation, no DDP: what is done between local steps."""
    rank = dist.get_rank(group)
    # No DDP at all: optimizer.step() exchanges by itself.
    net, model, optimizer, state = make(group, {**CASE, "ddp": False})
    twin_net, twin, twin_optimizer, _ = make(group, CASE)
    for t in range(9):
        step(model, optimizer, rank, t, 0.01)
        step(twin, twin_optimizer, rank, t, 0.01)
    assert torch.equal(flat(net), flat(twin_net))
    # A closure is run at X, by the optimizer, and clipping is local.
    net, model, optimizer, state = make(group, CASE, max_grad_norm=0.05)
    twin_net, twin, twin_optimizer, _ = make(group, CASE)
    for t in range(9):
        x, y = batch(rank, t)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        for o in (optimizer, twin_optimizer):
            o.param_groups[0]["lr"] = 0.01
        loss = optimizer.step(closure)
        twin_optimizer.zero_grad()
        expected = mse_loss(twin(x), y)
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        twin_optimizer.step()
        assert torch.equal(loss, expected) and torch.equal(flat(net), flat(twin_net))
    # In a round the model is x for whoever looks, and what is written to it is refused.
    x0 = flat(net)
    step(model, optimizer, rank, 9, 0.01)
    assert state.local_step == 1 and torch.equal(flat(net), x0)
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.cat([v.reshape(-1) for v in net.state_dict().values()]), x0)
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="changed within a round of local steps, after 1 of 3"):
        model(x)
    state.reset_errors()
    for local_steps in (1, 3):  # what leaves no trace but the values is seen before the round ends
        net, model, optimizer, state = make(group, {**CASE, "local_steps": local_steps})
        for t in range(local_steps):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            if t + 1 < local_steps:
                optimizer.step()
        net[0].weight.data.mul_(1.01)
        with pytest.raises(RuntimeError, match=f"within a round of local steps, after {local_steps - 1} of"):
            optimizer.step()
        state.reset_errors()
        assert state.local_step == 0
    for t in range(3):
        step(model, optimizer, rank, t, 0.01)
    assert state.local_step == 0
    # Between rounds what is trained may change.
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.detach().clone()
    net, model, optimizer, state = make(group, {**CASE, "ddp": False})
    net[0].bias.requires_grad_(False)
    frozen = net[0].bias.detach().clone()
    for t in range(3):
        step(model, optimizer, rank, t, 0.01)
    assert torch.equal(net[0].bias, frozen) and state.steps == 1
    net[0].bias.requires_grad_(True)
    for t in range(3):
        step(model, optimizer, rank, t, 0.01)
    assert not torch.equal(net[0].bias, frozen) and state.steps == 2


def test_common_idioms_work(pool: RankPool) -> None:
    pool.run(idioms, ranks=2)


def odd_optimizers(group: Any) -> None:
    """One that runs its closure many times; one made of two; Muon; one that keeps its sums in its groups."""
    rank = dist.get_rank(group)
    net = make_net()
    model = DDP(net, process_group=group)
    lbfgs = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    state = SAEFState(model, lbfgs, local_steps=2, compressor=saef.ScaledSign(block=7))
    model.register_comm_hook(state, saef_hook)
    x, y = batch(rank, 0)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [lbfgs.step(closure).item() for _ in range(12)]
    assert state.steps == 6 and losses[-1] < 0.5 * losses[0]

    net = make_net()
    model = DDP(net, process_group=group)
    both = Chained(
        torch.optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=0.02),
        torch.optim.AdamW([p for p in net.parameters() if p.ndim != 2], lr=0.01),
    )
    state = SAEFState(model, both, compressor=saef.ScaledSign(block=7))
    model.register_comm_hook(state, saef_hook)
    losses = []
    for t in range(40):
        both.zero_grad()
        x, y = batch(rank, t % 4)
        loss = mse_loss(model(x), y)
        loss.backward()
        both.step()
        losses.append(loss.item())
    assert state.steps == 40 and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert "full step ahead" in repr(state)


class Chained(torch.optim.Optimizer):
    """Several optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        for o in optimizers:
            o.state = self.state

    def step(self, closure: Any = None) -> None:
        for o in self.optimizers:
            o.step()


def test_optimizers_of_other_kinds(pool: RankPool) -> None:
    pool.run(odd_optimizers, ranks=2)


def overflow(group: Any) -> None:
    """float16's scaler: a worker whose gradient overflows takes one local step less, and the round goes on."""
    rank = dist.get_rank(group)
    net, model, optimizer, state = make(group, CASE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    twin_net, twin, twin_optimizer, _ = make(group, CASE)
    for t in range(9):
        x, y = batch(rank, t)
        lost = t == 4 and rank == 0
        for o in (optimizer, twin_optimizer):
            o.param_groups[0]["lr"] = 0.01
            o.zero_grad()
        scaler.scale(mse_loss(model(x), y * (math.inf if lost else 1.0))).backward()
        if t % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        mse_loss(twin(x), y).backward()
        if lost:
            twin_optimizer.zero_grad()
        twin_optimizer.step()
        assert state.local_step == (t + 1) % 3
    assert state.steps == 3 and state.skipped == 0
    assert scaler.get_scale() == (2.0**7 if rank == 0 else 2.0**8)
    torch.testing.assert_close(flat(net), flat(twin_net), rtol=0, atol=1e-12)


def test_an_overflow_costs_one_local_step(pool: RankPool) -> None:
    pool.run(overflow, ranks=2)


class Casting(nn.Sequential):
    """Layers of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.to(layer.weight.dtype)) if isinstance(layer, nn.Linear) else layer(x)
        return x


def sixteen_bit(group: Any, mixed: bool) -> None:
    """x is a float32 master; X is of the parameters' dtype, as the optimizer has it, and so is x_half."""
    net = Casting(*make_net()).to(torch.bfloat16)
    if mixed:
        net[0].float()
    model = DDP(net, process_group=group)
    optimizer = make_optimizer("AdamW", list(net.parameters()), lr=0.01)
    state = SAEFState(model, optimizer, local_steps=3, compressor=saef.TopK(0.3))
    model.register_comm_hook(state, saef_hook)
    half = torch.empty(0)
    for t in range(9):
        begins, x_tilde = state.local_step == 0, state.x_tilde()
        x, y = batch(dist.get_rank(group), t, torch.float32)
        optimizer.zero_grad()
        mse_loss(model(x).float(), y).backward()
        optimizer.step()
        if begins:
            half, start_of = optimizer.before.float(), x_tilde
        if state.local_step == 0:
            moved_by = mean(half - optimizer.after.float(), group)
            torch.testing.assert_close(state.x_tilde(), start_of - moved_by, rtol=0, atol=1e-6)
            assert float(moved_by.abs().max()) > 1e-3
    for p, x_of in zip(net.parameters(), state.weights.cut(state.weights.x()), strict=True):
        assert torch.equal(p, x_of.to(p.dtype))


@pytest.mark.parametrize("mixed", [False, True])
def test_sixteen_bit_parameters(pool: RankPool, mixed: bool) -> None:
    pool.run(sixteen_bit, mixed, ranks=2)


def refusals(group: Any) -> None:
    net = make_net()
    model = DDP(net, process_group=group)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for settings, error, message in (
        ({"local_steps": 0}, ValueError, "local_steps must be an integer >= 1"),
        ({"local_steps": True}, ValueError, "local_steps must be an integer >= 1"),
        ({"overlap": True}, ValueError, "SGD is computed within saef, and its exchange overlaps with the backward"),
        ({"overlap": 1, "local_steps": 2}, TypeError, "overlap must be True or False, got 1"),
        ({"overlap": True, "local_steps": 2, "error_decay": 0.9}, ValueError, "leave averaging, error_decay and"),
        ({"outer": 0.7}, TypeError, r"outer must be saef.Nesterov\(lr=..., momentum=...\)"),
        ({"on_bad_round": "kep"}, ValueError, r"on_bad_round must be one of .*did you mean 'keep'\?"),
        ({"local_steps": 2, "weight_decay_mode": "outer"}, ValueError, "leave weight_decay_mode out"),
        ({"local_steps": 2, "v_averaging": saef.Rotating(4)}, ValueError, "with local_steps=2 does not have within"),
        ({"local_steps": 2, "compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"},
         ValueError, "use torch.optim.SGD with local_steps=1 instead of local_steps=2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            SAEFState(model, sgd, **settings)
    for bad in ({"lr": 0.0}, {"lr": math.inf}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match="Nesterov: "):
            saef.Nesterov(**bad)
    other = make_net()
    state = SAEFState(model, make_optimizer("SGD", list(net.parameters())), local_steps=2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="not computed at x_half"):
        state.engine._optimizer.step()
    state.detach()
    # An optimizer that replaces the parameters' memory.
    replacing = type("Replacing", (torch.optim.SGD,), {"step": replace_memory})(other.parameters(), lr=0.1)
    model = DDP(other, process_group=group)
    state = SAEFState(model, replacing, local_steps=2)
    model.register_comm_hook(state, saef_hook)
    with pytest.raises(RuntimeError, match="elsewhere in memory"):
        step(model, replacing, 0, 0, 0.1)
    with pytest.raises(RuntimeError, match="was interrupted while it changed"):
        step(model, replacing, 0, 0, 0.1)


def replace_memory(optimizer: Any, closure: Any = None) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data - 0.1 * p.grad


def test_what_cannot_be_is_refused(pool: RankPool) -> None:
    pool.run(refusals, ranks=2)
