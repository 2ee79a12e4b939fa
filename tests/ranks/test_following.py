"""What is trained may change between two steps: frozen, unfrozen, added, regrouped, laid out anew."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from saef.step.memory import all_server_errors
from saef.step.ways import Copies
from support.following import CHANGED_AT, CHANGES, GONE, STEPS, Images, Twin, due, images, loss_of, make_optimizer
from support.ranks import RankPool
from support.training import flat

pytestmark = pytest.mark.slow


def train(model: DDP, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    """A step of some micro-batches."""
    optimizer.zero_grad()
    for x in batches[:-1]:
        with model.no_sync():
            loss_of(model, x).backward()
    loss_of(model, batches[-1]).backward()
    optimizer.step()


def follow(group: dist.ProcessGroup, change: Callable[..., None], view: bool) -> None:
    def mean(v: Tensor) -> Tensor:
        dist.all_reduce(v, group=group)
        return v / dist.get_world_size(group)

    for settings, copies in WAYS:
        net, rank = Images(), dist.get_rank(group)
        optimizer, twin = make_optimizer(net), Twin(net, mean)
        options = {"find_unused_parameters": change in GONE, "gradient_as_bucket_view": view}
        model = DDP(net, process_group=group, bucket_cap_mb=0.0005, **options)
        with mock.patch("saef.step.joining.create", Copies) if copies else nullcontext():
            state = saef.SAEFState(model, optimizer, compressor=saef.Identity(), **settings)
        model.register_comm_hook(state, saef_hook)
        for t in range(STEPS):
            for what in due(change, t):
                twin.change(what, net, optimizer)
            train(model, optimizer, images(rank, t, 2))
            twin.step(images(rank, t, 2))
            torch.testing.assert_close(flat(net), flat(twin.net), rtol=0, atol=1e-12)
        if hasattr(net, "large"):
            assert (net.large[:, :2] == 5).all() and (net.large[:, 6:] == 5).all()


WAYS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"step_ahead": 0.0, "exchange": "sharded"}, False),
    ({"max_grad_norm": 1e9, "exchange": "replicated"}, False),
    ({"exchange": "sharded"}, True),
]


@pytest.mark.parametrize("view", [False, True], ids=["copies of buckets", "views of buckets"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_followed(pool: RankPool, change: Any, view: bool) -> None:
    pool.run(follow, change, view, ranks=2)


def owed(group: dist.ProcessGroup, change: Callable[..., None], exchange: Any, copies: bool, kind: str) -> list[Any]:
    """What is owed before and after a change, then x on going on, here and from a checkpoint."""
    net, rank = Images(), dist.get_rank(group)
    optimizer = make_optimizer(net, kind)
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005, find_unused_parameters=change in GONE)
    settings = {"compressor": saef.TopK(0.3, block=5), "exchange": exchange, "averaging": saef.Rotating(4)}
    settings["server_step_ahead"] = kind == "AdamW"
    with mock.patch("saef.step.joining.create", Copies) if copies else nullcontext():
        state = saef.SAEFState(model, optimizer, **settings)
    model.register_comm_hook(state, saef_hook)

    def look() -> dict[Tensor, list[Tensor]]:
        context = state.engine.context
        server = context.transport.call(lambda: all_server_errors(state.engine.memory, context, "checkpoint"))
        vectors = [state.weights.cut(v) for v in (state.e, *state.engine.memory.m, server)]
        return {p: [v.clone() for v in each] for p, *each in zip(state.weights.parameters, *vectors, strict=True)}

    for t in range(CHANGED_AT):
        train(model, optimizer, images(rank, t))
    before = look()
    change(net, optimizer)
    if all(p.is_contiguous() for p in net.parameters()):
        state.state_dict()  # before the change is followed: what was there
    else:
        with pytest.raises(RuntimeError, match="save the state before the change"):
            state.state_dict()
    state.engine._follow("changed")
    after = look()
    assert state.steps == CHANGED_AT
    assert state.weights.names == [n for n, p in net.named_parameters() if p.requires_grad]
    for p, vectors in after.items():
        for v, was in zip(vectors, before.get(p, [torch.zeros_like(v) for v in vectors]), strict=True):
            assert torch.equal(v, was)
    train(model, optimizer, images(rank, CHANGED_AT))
    saved, weights, momenta = state.state_dict(), flat(net), optimizer.state_dict()
    for t in range(CHANGED_AT + 1, STEPS):
        train(model, optimizer, images(rank, t))
    went_on = flat(net)
    state.load_state_dict(saved)
    assert torch.equal(flat(net), weights) and momenta["param_groups"] == optimizer.state_dict()["param_groups"]
    for t in range(CHANGED_AT + 1, STEPS):
        train(model, optimizer, images(rank, t))
    assert torch.equal(flat(net), went_on)
    return [weights, went_on, state.x_tilde()]


@pytest.mark.parametrize(
    ("exchange", "copies", "kind"),
    [("sharded", False, "SGD"), ("replicated", True, "SGD"), ("sharded", True, "SGD"), ("sharded", False, "AdamW")],
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_owed_goes_over_and_nothing_else(
    pool: RankPool, change: Any, exchange: str, copies: bool, kind: str
) -> None:
    first, second, third = pool.run(owed, change, exchange, copies, kind, ranks=3)
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
