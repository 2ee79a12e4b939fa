"""Ranks that differ, at the start or later, are told on all ranks which one differs in what; none waits."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import saef
from saef.comm.agreement import checksum
from support.ranks import RankPool
from support.training import ADAMW, MOMENTUM, Job, batch, make_net, wrap

ODD = 2  # the rank that differs


def train(group: dist.ProcessGroup, model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def create(group: dist.ProcessGroup, **settings: Any) -> Any:
    net = make_net()
    return saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1), process_group=group, **settings)


def setting(group: dist.ProcessGroup, odd: bool, name: str, value: Any) -> None:
    create(group, **({name: value} if odd else {}))


def dtype(group: dist.ProcessGroup, odd: bool) -> None:
    net = make_net(torch.bfloat16 if odd else torch.float32)
    saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1), process_group=group)


def order(group: dist.ProcessGroup, odd: bool) -> None:
    net = nn.ModuleDict({name: nn.Linear(2, 2) for name in (("b", "a") if odd else ("a", "b"))})
    saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1), process_group=group)


def groups(group: dist.ProcessGroup, odd: bool) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    parts = [{"params": b.parameters()}, {"params": a.parameters()}]
    optimizer = torch.optim.SGD(parts[:: -1 if odd else 1], lr=0.1)
    saef.SAEFState(nn.ModuleList([a, b]), optimizer, process_group=group)


def first_step(group: dist.ProcessGroup, odd: bool, job: Job = Job(groups=[MOMENTUM]), **options: Any) -> None:
    _, model, optimizer, _ = wrap(group, job)
    optimizer.param_groups[0].update(options if odd else {})
    train(group, model, optimizer, range(1))


def weights(group: dist.ProcessGroup, odd: bool, steps: int, audit_every: int | None) -> None:
    """One entry of one rank's weights differs by one bit, after `steps` steps."""
    net, model, optimizer, state = wrap(group, Job(state={"audit_every": audit_every}, groups=[{"momentum": 0.9}]))
    train(group, model, optimizer, range(steps))
    with torch.no_grad():
        if odd:
            entry = net[2].weight[3, 2]
            entry.copy_(torch.nextafter(entry, entry + 1))
    train(group, model, optimizer, range(steps, steps + 6))
    if audit_every is None:
        raise RuntimeError("nobody noticed")


def lr_later(group: dist.ProcessGroup, odd: bool) -> None:
    _, model, optimizer, _ = wrap(group, Job(state={"audit_every": 3}, groups=[{"momentum": 0.9}]))
    train(group, model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.2 if odd else 0.1
    train(group, model, optimizer, range(2, 6))


ADAM = Job(groups=[ADAMW], optimizer="AdamW")
HERE = f"rank 0 has .*rank {ODD} has "
CASES: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (setting, {"name": "compressor", "value": saef.TopK(0.5)}, f"compressor: {HERE}TopK"),
    (setting, {"name": "server_compressor", "value": None}, f"server_compressor: {HERE}None"),
    (setting, {"name": "step_ahead", "value": 0.5}, f"step_ahead: {HERE}0.5"),
    (setting, {"name": "averaging", "value": saef.AllReduce(3)}, f"averaging: {HERE}AllReduce"),
    (setting, {"name": "weight_decay_mode", "value": "outer"}, f"weight_decay_mode: {HERE}'outer'"),
    (setting, {"name": "exchange", "value": "sharded"}, f"exchange: {HERE}'sharded'"),
    (setting, {"name": "max_grad_norm", "value": 2.0}, f"max_grad_norm: {HERE}2.0"),
    (setting, {"name": "max_consecutive_skips", "value": 1}, f"max_consecutive_skips: {HERE}1"),
    (setting, {"name": "audit_every", "value": 1}, f"audit_every: {HERE}1"),
    (dtype, {}, f"parameters: {HERE}.*bfloat16"),
    (order, {}, rf"parameters: {HERE}\[\('b.weight'"),
    (groups, {}, f"groups: {HERE}"),
    (first_step, {"lr": 0.7}, f"differ at step 0: .*optimizer: {HERE}.*lr=0.7"),
    (first_step, {"momentum": 0.7}, f"optimizer: {HERE}.*momentum=0.7"),
    (first_step, {"nesterov": True}, f"optimizer: {HERE}.*nesterov=True"),
    (first_step, {"job": ADAM, "betas": (0.7, 0.95)}, f"optimizer: {HERE}.*beta1=0.7"),
    (first_step, {"job": ADAM, "weight_decay": 0.5}, f"optimizer: {HERE}.*decay_at_x=0.5"),
    (setting, {"name": "noise_correction", "value": False}, f"noise_correction: {HERE}False"),
    (weights, {"steps": 0, "audit_every": None}, f"at step 0: .*checksum of the weights x: {HERE}'[0-9a-f]{{16}}'"),
    (weights, {"steps": 4, "audit_every": 5}, f"differ at step 5: .*checksum of the weights x: {HERE}"),
    (weights, {"steps": 5, "audit_every": 1}, f"differ at step 5: .*checksum of the weights x: {HERE}"),
    (lr_later, {}, f"differ at step 3: .*optimizer: {HERE}.*lr=0.2"),
]


@pytest.mark.parametrize(("job", "options", "message"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_any_difference_is_raised_on_all_ranks(
    pool: RankPool, job: Callable[..., None], options: dict[str, Any], message: str
) -> None:
    """The odd rank is named, and no other."""
    for said in pool.run(catch, job, options, ranks=3):
        assert re.search(message, said, re.S), said
        assert "rank 1 has" not in said


def catch(group: dist.ProcessGroup, job: Callable[..., None], options: dict[str, Any]) -> str:
    try:
        job(group, dist.get_rank(group) == ODD, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def bytes_of_audits(group: dist.ProcessGroup, audit_every: int | None) -> tuple[float, float, float]:
    _, model, optimizer, state = wrap(group, Job(state={"audit_every": audit_every}, groups=[{"momentum": 0.9}]))
    train(group, model, optimizer, range(1))
    first = state.metrics()
    train(group, model, optimizer, range(1, 11))
    last = state.metrics()
    return first["bytes_sent_settings"], last["bytes_sent_settings"], last["bytes_per_step"]


def test_an_audit_sends_a_few_hundred_bytes_and_only_when_asked(pool: RankPool) -> None:
    first, last, per_step = pool.run(bytes_of_audits, None, ranks=2)[0]
    assert first == last
    first, last, with_audits = pool.run(bytes_of_audits, 5, ranks=2)[0]
    assert 0 < last - first < 2 * 1000  # at steps 5 and 10
    assert per_step == with_audits


# ---- the checksum -------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.data())
def test_a_checksum_sees_every_change(sizes: list[int], data: st.DataObject) -> None:
    """Any bit of any entry; two entries exchanged; not how the parts are cut."""
    d = sum(sizes)
    double = data.draw(st.booleans())
    v = torch.randn(d, generator=torch.Generator().manual_seed(d), dtype=torch.float64 if double else torch.float32)
    before = checksum(list(v.split(sizes)))
    assert before == checksum([v]) and re.fullmatch("[0-9a-f]{16}", before)
    if d:
        bits = v.view(torch.int64 if double else torch.int32)
        i, bit = data.draw(st.integers(0, d - 1)), data.draw(st.integers(0, 62 if double else 30))
        bits[i] ^= 1 << bit
        assert checksum([v]) != before
        bits[i] ^= 1 << bit
        j = data.draw(st.integers(0, d - 1))
        v[[i, j]] = v[[j, i]]
        assert (checksum([v]) == before) == (i == j)


def test_a_checksum_of_many_chunks() -> None:
    v = torch.randn(3 * (1 << 20) + 5)
    before = checksum([v])
    assert before == checksum(list(v.split(1_000_003)))
    for i in (0, (1 << 20) - 1, 1 << 20, len(v) - 1):
        old = v[i].clone()
        v[i] += 1
        assert checksum([v]) != before
        v[i] = old
    assert checksum([v]) == before
