"""What is trained, and as what, is compared in every step; what no step could honour is refused with the state."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import MOMENTUM, Job, batch, flat, randn, wrap

pytestmark = pytest.mark.slow


class Images(nn.Module):
    """Something with a memory format, two layers of one shape, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(torch.tanh(self.first(self.conv(x).mean((2, 3))))))


def images(group: dist.ProcessGroup) -> tuple[Images, DDP, torch.optim.SGD, saef.SAEFState]:
    net = Images()
    model = DDP(net, process_group=group)
    groups = [{"params": net.first.parameters()}, {"params": net.second.parameters(), "lr": 0.2}]
    groups.append({"params": net.conv.parameters()})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, compressor=saef.TopK(0.3))
    model.register_comm_hook(state, saef_hook)
    return net, model, optimizer, state


def train(group: dist.ProcessGroup, model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(10 * t + dist.get_rank(group))
    model(randn(generator, 2, 3, 5, 5, dtype=torch.float32)).pow(2).mean().backward()
    optimizer.step()


def freeze(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.first.weight.requires_grad_(False)


def freeze_a_layer(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.conv.requires_grad_(False)


def add_a_parameter(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.extra = nn.Parameter(torch.zeros(2))


def replace_a_layer(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second = nn.Linear(4, 4)


def replace_a_parameter(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())


def to_double(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.double()


def to_bfloat16(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second.bfloat16()


def tie(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second.weight.data = net.first.weight.data


def tie_biases(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second.bias.data = net.first.bias.data


def drop_a_parameter(net: Images, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]["params"][0]


def unfreeze(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.frozen.requires_grad_(True)


CHANGES = [
    (freeze, r"RuntimeError: parameters \['first\.weight'\] were frozen.*find_unused_parameters=True"),
    (freeze_a_layer, r"RuntimeError: parameters \['conv\.weight', 'conv\.bias'\] were frozen"),
    (replace_a_layer, r"RuntimeError: parameters \['second\.weight', 'second\.bias'\] were frozen or replaced"),
    (replace_a_parameter, r"RuntimeError: parameters \['second\.weight'\] were frozen or replaced"),
    (add_a_parameter, r"ValueError: trainable parameters \['extra'\] are not in the optimizer"),
    (unfreeze, r"ValueError: trainable parameters \['frozen\.weight'\] are not in the optimizer"),
    (drop_a_parameter, r"ValueError: trainable parameters \['first\.weight'\] are not in the optimizer"),
    (to_double, "RuntimeError: parameter conv.weight.*torch.float64.*was torch.float32.*create SAEFState again"),
    (to_bfloat16, "RuntimeError: parameter second.weight.*torch.bfloat16.*was torch.float32"),
    (tie, "RuntimeError: parameters first.weight and second.weight are tied"),
    (tie_biases, "RuntimeError: parameters first.bias and second.bias are tied"),
]


def change(group: dist.ProcessGroup, what: Callable[..., None]) -> str:
    net, model, optimizer, state = images(group)
    for t in range(3):
        train(group, model, optimizer, t)
    what(net, optimizer)
    for _ in range(2):  # not only the first time
        with pytest.raises((RuntimeError, ValueError)) as caught:
            train(group, model, optimizer, 3)
        assert state.steps == 3
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(("what", "message"), CHANGES, ids=lambda v: v.__name__ if callable(v) else "")
def test_a_change_that_cannot_be_followed_is_refused_on_all_ranks(pool: RankPool, what: Any, message: str) -> None:
    for said in pool.run(change, what, ranks=2):
        assert re.search(message, said, re.S), said


def within(group: dist.ProcessGroup, what: str) -> list[str]:
    """A change between a forward and the step of its backward, once and once more."""
    net, model, optimizer, state = images(group)
    train(group, model, optimizer, 0)
    x = torch.randn(2, 3, 5, 5)
    if what == "between micro-batches":
        with model.no_sync():
            model(x).sum().backward()
    else:
        model(x).sum().backward()
    net.frozen.requires_grad_(True)
    optimizer.add_param_group({"params": net.frozen.parameters()})
    said = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            optimizer.step() if what == "before the step" else model(x)
        said.append(str(caught.value))
    assert state.steps == 1
    net.frozen.requires_grad_(False)
    del optimizer.param_groups[-1]
    if what != "before the step":
        model(x).sum().backward()
    optimizer.step()
    assert state.steps == 2
    return said


@pytest.mark.parametrize("what", ["between micro-batches", "before another forward", "before the step"])
def test_a_change_within_a_step_is_refused(pool: RankPool, what: str) -> None:
    expected = "changed between a forward and step()" if what == "before the step" else "within a step"
    for said in pool.run(within, what, ranks=2):
        assert all(expected in each and "after step()" in re.sub(r"\s+", " ", each) for each in said), said


def build(group: dist.ProcessGroup, what: str) -> str:
    net: nn.Module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    settings: dict[str, Any] = {}
    if what == "max_norm":
        net[0].max_norm = 1.0
    elif what == "a bag with max_norm":
        net[0] = nn.EmbeddingBag(5, 4, max_norm=2.0)
    elif what == "tied":
        net[1].weight.data = net[2].weight.data
    elif what == "DTensor":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[1], mesh=DeviceMesh.from_group(group, "cpu"))
    model = net if what == "DTensor" else DDP(net, process_group=group)
    if what == "another group":
        settings["process_group"] = dist.group.WORLD  # not a new one: the ranks would number later groups differently
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        saef.SAEFState(model, torch.optim.SGD(net.parameters(), lr=0.1), **settings)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("max_norm", r"ValueError: module\.0 has max_norm=1\.0.*Clamp the weight after"),
        ("a bag with max_norm", r"ValueError: module\.0 has max_norm=2\.0"),
        ("tied", r"RuntimeError: parameters 1\.weight and 2\.weight are tied"),
        ("DTensor", r"TypeError: parameter 1\.weight is a DTensor.*mesh=saef\.node_mesh\(device\)"),
        ("another group", r"ValueError: process_group has ranks.*Leave process_group out"),
    ],
)
def test_what_no_step_could_honour_is_refused_at_once(pool: RankPool, what: str, message: str) -> None:
    for said in pool.run(build, what, ranks=2):
        assert re.search(message, said, re.S), said


# ---- interrupts -----------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As KeyboardInterrupt, which nobody catches as an Exception."""


def interrupt(group: dist.ProcessGroup, where: str) -> str:
    """Interrupted on all ranks in the middle of a step; then the loop goes on, as in a notebook."""
    net, model, optimizer, state = wrap(group, Job(state={"compressor": saef.TopK(0.3)}, groups=[MOMENTUM]))
    optimizer.param_groups[0]["lr"] = 0.05
    rank = dist.get_rank(group)

    def step(t: int) -> None:
        optimizer.zero_grad()
        x, y = batch(rank, t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    for t in range(3):
        step(t)
    saved, before = state.state_dict(), state.weights.x().clone()
    owner, name = {
        "commit of the first bucket": (state.engine.weights, "commit"),
        "end of the commit": (state.engine.memory.__class__, "commit"),
        "count of the step": (state.engine.weights, "committed"),
        "check before the commit": (state.engine.sending.prepared.__class__, "finite"),
    }[where]
    original = getattr(owner, name)

    def stop(*args: Any, **kwargs: Any) -> None:
        if "first bucket" in where:
            original(*args, **kwargs)
        raise Interrupted

    setattr(owner, name, stop)
    with pytest.raises(Interrupted):
        step(3)
    setattr(owner, name, original)
    if where == "check before the commit":
        assert torch.equal(state.weights.x(), before)
        step(3)
        return "went on"
    for again in (lambda: step(3), state.state_dict, state.x_tilde):
        with pytest.raises(RuntimeError, match=r"interrupted.*Load a checkpoint"):
            again()
    state.load_state_dict(saved)
    assert torch.equal(state.weights.x(), before)
    step(3)
    assert torch.isfinite(flat(net)).all() and state.steps == 4
    return "refused"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("commit of the first bucket", "refused"),
        ("end of the commit", "refused"),
        ("count of the step", "refused"),
        ("check before the commit", "went on"),
    ],
)
def test_an_interrupted_commit_is_not_gone_on_from(pool: RankPool, where: str, expected: str) -> None:
    assert pool.run(interrupt, where, ranks=2) == [expected] * 2
