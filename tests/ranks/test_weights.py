"""The two ways of keeping x agree bit for bit, and neither loses what a user does to the parameters."""

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import saef
import saef.hooks
from saef.rules import SGD, step_ahead
from saef.rules.rule import table as hyper_table
from saef.rules.sgd import PLAIN
from saef.step import joining
from saef.step.ways import Copies, OnCPU, create
from saef.wire.codec import Block, block_ranges, lay_out
from saef.wire.kernels import cpu
from saef.wire.kernels.table import Update, Worker
from support.ranks import RankPool
from support.training import MOMENTUM, SETTINGS, Job, batch, flat, make_net, train, way_of_keeping_x, wild_lrs, wrap

COMPRESSORS = [saef.ScaledSign(block=100), saef.TopK(0.1, block=5000), saef.Identity()]


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advance_is_commit_then_subtract_then_step_ahead(
    compressor: saef.Compressor, decay: float, s: float, dtype: torch.dtype
) -> None:
    n = 9000  # several chunks of the kernel, the last one short
    g, m, e, x, R = (torch.randn(n, dtype=dtype) for _ in range(5))
    half = step_ahead(x, e, s)
    blocks = [Block(compressor, compressor, a, a, a, k, 0) for a, k in block_ranges(n, compressor.block_numel(n))]
    layout = lay_out(blocks, dtype.itemsize, reply=False, served=False)
    message = torch.zeros(layout.message_bytes, dtype=torch.uint8)
    hyper = hyper_table([PLAIN._replace(lr=0.1, momentum=0.9, weight_decay=decay)], dtype, x.device)
    at_half = Update(SGD.kind, hyper, 0.0, True)  # x_half itself is handed over, in place of x and s
    cpu.compress(layout.table, at_half, Worker(g, m[None], e, half), message)
    replies, once = saef.Codec(compressor, [n], dtype).encode([R]), torch.ones(1, dtype=dtype)

    m1, e1, x1 = m.clone(), e.clone(), x.clone()
    cpu.commit(layout.table, at_half, Worker(g, m1[None], e1, half), message)
    cpu.subtract(layout.table, once, replies, x1)
    cpu.advance(layout.table, layout.table, at_half, Worker(g, m[None], e, x), message, once, replies, half, s)
    for fused, separate in ((m, m1), (e, e1), (x, x1), (half, step_ahead(x1, e1, s))):
        assert torch.equal(fused, separate)


def test_create_swaps_where_it_can() -> None:
    def kind(net: nn.Module) -> type:
        return type(create(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0))

    assert kind(nn.Linear(3, 2)) is OnCPU
    assert kind(nn.Linear(3, 2).double()) is OnCPU
    assert kind(nn.Linear(3, 2).bfloat16()) is Copies
    assert kind(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).bfloat16())) is Copies
    gaps = nn.Linear(3, 2)
    gaps.weight = nn.Parameter(torch.zeros(2, 6)[:, ::2])
    assert kind(gaps) is Copies


def test_names_are_those_of_the_module_that_was_wrapped() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    wrapped = nn.Module()
    wrapped.module = torch.compile(net)  # as DDP keeps it
    for model in (net, torch.compile(net), wrapped):
        assert create(model, torch.optim.SGD(net.parameters(), lr=0.1), 1.0).names == names
    net = nn.Sequential()
    net.add_module("module", nn.Linear(3, 2))
    net.add_module("head", nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert create(net, optimizer, 1.0).names == ["module.weight", "module.bias", "head.weight"]


def train_with(group: dist.ProcessGroup, job: Job, way: str) -> dict[str, Any]:
    original = joining.create
    joining.create = way_of_keeping_x(way)
    try:
        return train(group, job)
    finally:
        joining.create = original


@pytest.mark.slow
@pytest.mark.parametrize("averaging", [None, saef.Rotating(3), saef.AllReduce(4)])
@pytest.mark.parametrize(("step_ahead", "full"), [(1.0, False), (0.5, False), (0.0, False), (1.0, True), (0.5, True)])
def test_copies_and_swaps_are_bit_identical(pool: RankPool, step_ahead: float, full: bool, averaging: Any) -> None:
    job = Job(
        state={
            "compressor": saef.TopK(0.2, block=10),
            "step_ahead": step_ahead,
            "averaging": averaging,
            "server_step_ahead": full,
            "error_decay": 0.9 if full else 1.0,
            "exchange": "sharded" if full else "auto",
        },
        groups=[{"momentum": 0.9, "weight_decay": 1e-2}],
        lrs=wild_lrs(20),
        dtype=torch.float32,
    )
    copies, swaps = (pool.run(train_with, job, way, ranks=2) for way in ("copies", "swaps"))
    for a, b in zip(copies, swaps, strict=True):
        for name in ("x", "e", "m", "e_server"):
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.data.clamp_(-0.05, 0.05),
        lambda p: p.data.copy_(torch.full_like(p, 0.1)),
        lambda p: p.detach().mul_(0.5),
        lambda p: p.detach()[..., 0].fill_(1.0),
        lambda p: setattr(p, "data", torch.full_like(p, 0.2)),
    ],
)
def test_a_changed_parameter_is_stepped_ahead_from(edit: Any) -> None:
    """x_half is prepared by the commit; what was edited since, in place, through .data or by .data =, counts."""
    net = nn.Linear(40, 30)
    weights = create(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0)
    e = 0.01 * torch.randn(weights.flat.numel())
    errors = weights.cut(e)

    def expected() -> list[Tensor]:
        return [p.detach() - error for p, error in zip(net.parameters(), errors, strict=True)]

    for step in range(3):
        if step:
            edit(net.weight)
        ahead, before = expected(), [p.detach().clone() for p in net.parameters()]
        weights.absorb()
        weights.step_ahead(e, slice(0, 0))
        weights.enter()
        assert all(torch.equal(p, a) for p, a in zip(net.parameters(), ahead, strict=True))
        assert weights.leave() == []
        assert all(torch.equal(p, x) for p, x in zip(net.parameters(), before, strict=True))


def compiled(group: dist.ProcessGroup) -> Tensor:
    """torch.compile inside DDP; the backend is the one that needs no compiler."""

    net = make_net()
    model = nn.parallel.DistributedDataParallel(torch.compile(net, backend="aot_eager"), process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, **SETTINGS)
    model.register_comm_hook(state, saef.hooks.saef_hook)
    for t, lr in enumerate(wild_lrs(20)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return flat(net)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(pool: RankPool) -> None:

    eager = pool.run(train, Job(state=SETTINGS, groups=[MOMENTUM], lrs=wild_lrs(20)), ranks=2)
    for x, run in zip(pool.run(compiled, ranks=2), eager, strict=True):
        torch.testing.assert_close(x, run["x"][-1], rtol=0, atol=1e-10)  # float64, as test_ddp.py derives


def dropped(group: dist.ProcessGroup, steps: int) -> list[bool]:
    """What is left of a state that nobody holds any more, and whether its exchange thread is among it."""
    gc.collect()
    threads = threading.active_count()
    run = Job(state={"compressor": saef.ScaledSign()}, groups=[MOMENTUM], lrs=[0.1] * steps)
    net, model, optimizer, state = wrap(group, run)
    for t in range(steps):
        optimizer.zero_grad()
        x, y = batch(0, t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    left = [weakref.ref(one) for one in (state.engine, model, optimizer, net)]
    del net, model, optimizer, state
    deadline = time.monotonic() + 10  # the exchange thread may still have its last bucket in its hands
    while True:
        gc.collect()
        found = [one() is not None for one in left] + [threading.active_count() > threads]
        if not any(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_that_is_dropped_takes_its_state_with_it(pool: RankPool, steps: int) -> None:
    """DDP's reducer holds the state where the garbage collector does not look: the state must not hold DDP."""
    assert pool.run(dropped, steps, ranks=2) == [[False] * 5] * 2
