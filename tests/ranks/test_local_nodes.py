"""Local steps, and any optimizer, where a worker is a node of two ranks: against the reference with as many workers."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef import SAEFState
from saef.hooks import saef_hook
from support import reference
from support.cases import OPTIMIZERS, close, operator, pairwise, start
from support.nodes import each_place, entries, gradient_of_nodes, joined, mesh_of, parts_of, servers_of, whole, x_tilde
from support.ranks import RankPool
from support.training import batch, flat, make_net, wild_lrs

pytestmark = pytest.mark.slow
VALUES: dict[str, list[Any]] = {
    "optimizer": [*OPTIMIZERS],
    "compressor": [saef.ScaledSign(block=7), saef.TopK(0.3, block=10)],
    "exchange": ["replicated", "sharded"],
    "outer": [None, saef.Nesterov(lr=0.7, momentum=0.8)],
    "averaging": [None, saef.Rotating(4)],
    "overlap": [False, True],
    "ddp": [True, False],
}
H = 3
FIXED = {"step_ahead": 1.0, "server": "same", "error_decay": 1.0}


def make(case: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Any, Any, SAEFState]:
    """(model, optimizer, state) of two nodes."""
    net = make_net(dtype)
    model = DDP(net, bucket_cap_mb=0.0005) if case["ddp"] else net
    optimizer = getattr(torch.optim, case["optimizer"])(net.parameters(), lr=1.0, **OPTIMIZERS[case["optimizer"]])
    names = ("compressor", "exchange", "outer", "averaging", "overlap")
    given = {"local_steps": H, "server_step_ahead": False, **{name: case[name] for name in names}, **more}
    state = SAEFState(model, optimizer, mesh=mesh_of(2, 2), **given)
    if case["ddp"]:
        model.register_comm_hook(state, saef_hook)
    return model, optimizer, state


def step(model: Any, optimizer: Any, t: int, lr: float, factor: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    x, y = batch(dist.get_rank(), t, next(model.parameters()).dtype)
    (mse_loss(model(x), y) * factor).backward()
    optimizer.step()


def rates(case: dict[str, Any]) -> list[float]:
    return [lr * (1.0 if case["optimizer"] == "SGD" else 0.1) for lr in wild_lrs(24)]


def train(group: Any, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(x after each round, e of this rank's part)."""
    model, optimizer, state = make(case)
    x = [flat(model)]
    for t, lr in enumerate(rates(case)):
        step(model, optimizer, t, lr)
        if state.local_step == 0:
            x.append(flat(model))
        assert torch.equal(flat(model), x[-1])
    return torch.stack(x), state.e.clone()


@pytest.mark.parametrize(
    "case",
    [c for c in pairwise(VALUES) if not (c["overlap"] and c["averaging"])],
    ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""),
)
def test_rounds_of_nodes_equal_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """A node's ranks take the same steps, on the mean of their gradients; each sends how far its part has moved."""
    case = {**FIXED, **case}
    C, block = operator(case["compressor"])
    x0 = parts_of(start(), 2, entries)
    settings = reference.Settings(
        C,
        block=block,
        averaging=each_place(("rotating", 4), x0, 2) if case["averaging"] else None,
        servers=servers_of(case, x0, 2, 2) if case["exchange"] == "sharded" else None,
    )
    outer = case["outer"] and (case["outer"].lr, case["outer"].momentum)
    kind = getattr(torch.optim, case["optimizer"])
    make_one = lambda X: kind(X, lr=1.0, **OPTIMIZERS[case["optimizer"]])  # noqa: E731
    oracle = reference.LocalSteps(settings, x0, 2, make_one, outer, case["overlap"])
    x, _ = reference.drive_rounds(oracle, gradient_of_nodes(2, entries), rates(case), H)
    expected = [torch.cat([p.reshape(-1) for p in joined([*row.split(oracle.numels)])]) for row in x]
    runs = pool.run(train, case)
    sizes = [e.numel() for _, e in runs[:2]]
    for rank, (found, e) in enumerate(runs):
        close(found, torch.stack(expected))
        close(e, oracle.e[rank // 2].split(sizes)[rank % 2])


CASE: dict[str, Any] = {
    "optimizer": "AdamW",
    "compressor": saef.ScaledSign(block=7),
    "exchange": "sharded",
    "outer": saef.Nesterov(0.7, 0.8),
    "averaging": saef.Rotating(4),
    "overlap": False,
    "ddp": True,
}


def everything(model: Any, optimizer: Any, state: SAEFState) -> list[Tensor]:
    kept = [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [v.clone() for v in (flat(model), state.weights.x(), state.e, state.e_server, *kept)]


def resumed(group: Any, at: int, dtype: torch.dtype) -> None:
    """Saved in the middle of a round and loaded by new objects; later a NaN on rank 3 alone drops a round."""
    model, optimizer, state = make(CASE, dtype)
    for t in range(at):
        step(model, optimizer, t, 0.01)
    saved = io.BytesIO()
    torch.save([state.state_dict(), copy.deepcopy(optimizer.state_dict())], saved)
    other = make(CASE, dtype)
    step(*other[:2], 50, 0.01)  # it has states of its own, to be replaced
    saved.seek(0)
    found, of_optimizer = torch.load(saved, weights_only=True)
    other[1].load_state_dict(of_optimizer)
    other[2].load_state_dict(found)
    for t in range(at, at + 9):
        for one in ((model, optimizer, state), other):
            step(*one[:2], t, 0.01, math.nan if t == at + 1 and dist.get_rank() == 3 else 1.0)
    assert state.skipped == other[2].skipped == 1 and state.steps == other[2].steps >= 3
    assert all(map(torch.equal, everything(model, optimizer, state), everything(*other)))


@pytest.mark.parametrize(("at", "dtype"), [(6, torch.float64), (8, torch.float32), (7, torch.bfloat16)], ids=str)
def test_a_round_is_resumed_in_its_middle_and_dropped_by_all(pool: RankPool, at: int, dtype: torch.dtype) -> None:
    pool.run(resumed, at, dtype)


def consolidated(group: Any) -> tuple[dict[str, Any], Tensor]:
    model, optimizer, state = make(CASE)
    for t in range(9):
        step(model, optimizer, t, 0.01)
    return state.consolidated_state_dict(), x_tilde(state)


def taken_over(group: Any, saved: dict[str, Any], before: Tensor) -> None:
    """By a worker a rank."""
    net = make_net()
    model = DDP(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **OPTIMIZERS["AdamW"])
    names = ("compressor", "outer", "averaging")
    state = SAEFState(model, optimizer, local_steps=H, **{name: CASE[name] for name in names})
    model.register_comm_hook(state, saef_hook)
    state.load_state_dict(saved)
    close(torch.cat([v.reshape(-1) for v in whole(state, state.x_tilde())]), before)
    kept = saved["workers"]["rounds"]["optimizer"]["state"]["0.weight"]["exp_avg"]
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], kept) and float(kept.abs().max()) > 0
    for t in range(H):
        step(model, optimizer, t, 0.01)
    assert state.steps == 4


def test_ranks_that_are_workers_go_on_from_nodes(pool: RankPool) -> None:
    saved, before = pool.run(consolidated)[0]
    pool.run(taken_over, saved, before)


def scaled(group: Any) -> None:
    """A GradScaler whose scale overflows on rank 1 alone: its node takes one step less, and stays alike."""
    model, optimizer, state = make({**CASE, "averaging": None, "outer": None}, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for t in range(6):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(), t, torch.float32)
        loss = mse_loss(model(x), y) * (math.inf if t == 1 and dist.get_rank() == 1 else 1.0)
        optimizer.param_groups[0]["lr"] = 0.01
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    steps = {int(optimizer.state[p]["step"]) for p in model.parameters()}
    assert steps == {5 if dist.get_rank() < 2 else 6}
    assert (state.steps, state.skipped) == (2, 0)
    gathered = [torch.empty_like(flat(model)) for _ in range(4)]
    dist.all_gather(gathered, flat(model))
    assert all(torch.equal(one, gathered[0]) for one in gathered)


def test_a_node_takes_its_local_steps_together(pool: RankPool) -> None:
    pool.run(scaled)


def closure(group: Any) -> None:
    model, optimizer, _ = make(CASE)
    model(batch(0, 0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"another loss: call backward\(\), then step\(\) without it"):
        optimizer.step(lambda: 0.0)
    optimizer.step()


def test_a_closure_is_refused(pool: RankPool) -> None:
    pool.run(closure)
