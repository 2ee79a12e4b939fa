"""Writes to p.grad between backward and step: of the same values they are nothing, of others they are refused.

DDP's p.grad are copies of its buckets, or (`gradient_as_bucket_view`) views of them, as they are under DeepSpeed and
Horovod; the last two have tests of their own with these writes.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from saef.step.prepared import Marks, Prepared
from support.ranks import RankPool
from support.training import batch, flat, make_net, way_of_keeping_x
from support.writes import OTHER_VALUES, SAME_VALUES

pytestmark = pytest.mark.slow

WAYS = ["copies", "swaps"]
both_ways = pytest.mark.parametrize("way", WAYS)
both_layouts = pytest.mark.parametrize("views", [False, True], ids=["p.grad is a copy", "p.grad is a view"])
COMPRESSORS = [saef.TopK(0.2, block=10), saef.ScaledSign(block=7), saef.Identity()]


class Run:
    def __init__(self, group: dist.ProcessGroup, way: str, views: bool, **settings: Any) -> None:
        self.net, self.rank = make_net(), dist.get_rank(group)
        options = {"gradient_as_bucket_view": views, "find_unused_parameters": True}
        self.model = DDP(self.net, process_group=group, bucket_cap_mb=0.0005, **options)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        with mock.patch("saef.step.joining.create", way_of_keeping_x(way)):
            self.state = saef.SAEFState(self.model, self.optimizer, **settings)
        self.model.register_comm_hook(self.state, saef_hook)

    def backward(self, t: int) -> None:
        self.optimizer.zero_grad()
        x, y = batch(self.rank, t)
        F.mse_loss(self.model(x), y).backward()


def same(group: dist.ProcessGroup, way: str, views: bool, write: Any, settings: dict[str, Any]) -> list[Tensor]:
    run = Run(group, way, views, **settings)
    for t in range(5):
        run.backward(t)
        if write is not None and t != 2:
            write(run.net)
        run.optimizer.step()
    return [flat(run.net), run.state.e, run.state.m, run.state.e_server]


@both_ways
@both_layouts
@pytest.mark.parametrize("settings", [{"compressor": c} for c in COMPRESSORS] + [{"max_grad_norm": 0.1}], ids=repr)
def test_writes_of_the_same_values_change_no_bit(pool: RankPool, way: str, views: bool, settings: Any) -> None:
    expected = pool.run(same, way, views, None, settings, ranks=2)
    for write in SAME_VALUES:
        for ours, plain in zip(pool.run(same, way, views, write, settings, ranks=2), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)), write.__name__


def change(group: dist.ProcessGroup, way: str, views: bool, settings: dict[str, Any]) -> str:
    """Each is refused by name, leaves nothing behind, and the next step is as if it had not been."""
    run = Run(group, way, views, **settings)
    for t in range(3):
        run.backward(t)
        run.optimizer.step()
    before = [v.clone() for v in (flat(run.net), run.state.e, run.state.m, run.state.e_server)]
    for write in OTHER_VALUES:
        run.backward(3)
        write(run.net)
        with pytest.raises(RuntimeError, match=r"gradients of \['.*were changed between .*max_grad_norm"):
            run.optimizer.step()
        after = (flat(run.net), run.state.e, run.state.m, run.state.e_server)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), write.__name__
    run.backward(3)
    run.optimizer.step()
    assert run.state.steps == 4
    return "ok"


@both_ways
@both_layouts
@pytest.mark.parametrize("settings", [{"compressor": c} for c in COMPRESSORS] + [{"max_grad_norm": 0.1}], ids=repr)
def test_writes_of_other_values_are_refused(pool: RankPool, way: str, views: bool, settings: Any) -> None:
    assert pool.run(change, way, views, settings, ranks=2) == ["ok"] * 2


def nudge(gradient: Tensor) -> None:
    """Changes an entry that top-k does not select, neither before nor after."""
    smallest = gradient.reshape(-1).abs().argmin()
    gradient.reshape(-1)[smallest] *= 1 + 1e-9


def nudged(group: dist.ProcessGroup, compressor: saef.Compressor, early: bool) -> list[Tensor]:
    run = Run(group, "swaps", True, compressor=compressor)
    weight = run.net[0].weight

    def before_it_is_sent(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        nudge(gradient)
        return gradient

    if early:
        weight.register_hook(before_it_is_sent)
    for t in range(4):
        run.backward(t)
        if not early and weight.grad is not None:
            nudge(weight.grad)
        run.optimizer.step()
    return [flat(run.net), run.state.e, run.state.m, run.state.e_server]


def test_what_changes_no_byte_that_was_sent_counts_as_if_it_had_come_before(pool: RankPool) -> None:
    """The commit makes D from the gradient as it is, and C(D) is what travelled: Algorithm 1's step, bit for bit."""
    compressor = saef.TopK(0.2, block=10)
    late, early = (pool.run(nudged, compressor, when, ranks=2) for when in (False, True))
    for a, b in zip(late, early, strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def one_rank(group: dist.ProcessGroup, views: bool) -> str:
    """Every rank decides on its own gradients; the other one waits in vain no longer than its exchange takes."""
    run = Run(group, "swaps", views)
    run.backward(0)
    if run.rank == 0:
        nn.utils.clip_grad_norm_(run.net.parameters(), float("inf"))
    run.optimizer.step()
    return "ok"


@both_layouts
def test_one_rank_alone_may_log_its_norm(pool: RankPool, views: bool) -> None:
    assert pool.run(one_rank, views, ranks=2) == ["ok"] * 2


def skipped(group: dist.ProcessGroup, views: bool, write: Callable[[nn.Module], None]) -> int:
    """A NaN is not equal to itself, but the step is skipped on all ranks before anyone compares."""
    run = Run(group, "swaps", views, compressor=saef.TopK(0.2, block=10))
    run.backward(0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    x, y = batch(run.rank, 1)
    (F.mse_loss(run.model(x), y) * (float("nan") if run.rank == 1 else 1.0)).backward()
    write(run.net)
    run.optimizer.step()
    return run.state.skipped


@both_layouts
@pytest.mark.parametrize("write", SAME_VALUES, ids=lambda w: w.__name__)
def test_a_bad_step_is_skipped_by_all_whoever_wrote(pool: RankPool, views: bool, write: Any) -> None:
    assert pool.run(skipped, views, write, ranks=2) == [1, 1]


def test_no_gradient_stays_none_where_a_change_is_expected() -> None:
    """Horovod sets p.grad once more, of the parameters that have one."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.ones(2)
    prepared = Prepared()
    prepared.backward_ended(parameters)
    for i in range(2):
        prepared.expect_change(i)
    assert prepared.gradients.differ(Marks.of(parameters)) == {0}
    parameters[0].grad.add_(0)
    assert prepared.gradients.differ(Marks.of(parameters)) == set()
