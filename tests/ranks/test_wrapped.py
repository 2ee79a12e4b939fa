"""Wrappers of frameworks around model and optimizer are looked into; copies and pickles are free of saef.

The wrappers here have the shape of Accelerate's AcceleratedOptimizer and Lightning Fabric's `_FabricOptimizer` and
`_FabricModule`, which are no dependencies of saef.
"""

import copy
import io
import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import register, saef_hook
from support.ranks import RankPool
from support.training import batch, flat, make_net, way_of_keeping_x

pytestmark = pytest.mark.slow

WAYS = ["copies", "swaps"]
both_ways = pytest.mark.parametrize("way", WAYS)
ERRORS = saef.TopK(0.2, block=10)


class Held(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer by its type, whose parts are all the inner one's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure) if closure else self.optimizer.step()


class Mixed:
    """As Fabric's: an instance of a class derived from the inner one's, with a copy of its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__.update({k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step")})
        self.__class__ = type(f"Mixed{type(optimizer).__name__}", (Mixed, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure) if closure else self._optimizer.step()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: optimizer,
    "held": Held,
    "mixed": Mixed,
    "twice": lambda optimizer: Held(Mixed(optimizer)),  # type: ignore[arg-type]
}


class Shell(nn.Module):
    """As Fabric's: the wrapped module, and the one inside it."""

    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module
        self._original_module = forward_module.module

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


def attach(way: str, model: nn.Module, optimizer: Any, compressor: saef.Compressor) -> saef.SAEFState:
    with mock.patch("saef.step.joining.create", way_of_keeping_x(way)):
        return saef.SAEFState(model, optimizer, compressor=compressor)


def train(
    group: dist.ProcessGroup, way: str, compressor: Any, wrapper: str, given: str, shell: bool
) -> tuple[Tensor, list[str]]:
    """The state is given the wrapper, or made with what is inside, before or after it is wrapped."""
    net, said = make_net(), []
    ddp = DDP(net, process_group=group)
    model = Shell(ddp) if shell else ddp
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("saef"), logging.getLogger("saef").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    state = attach(way, ddp, inner, compressor) if given == "the inner one, before" else None
    optimizer = WRAPPERS[wrapper](inner)
    state = state or attach(way, model, optimizer if given == "the wrapper" else inner, compressor)
    logger.removeHandler(handler)
    logger.setLevel(level)
    ddp.register_comm_hook(state, saef_hook)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 2, 0.5)
    for t in range(6):
        model(batch(dist.get_rank(group), 50 + t)[0])  # a loss that is dropped
        optimizer.zero_grad()
        assert given == "the inner one, after" or torch.equal(flat(net), state.weights.x())
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    assert state.steps == 6
    state.detach()
    assert "zero_grad" not in vars(inner) and (given != "the wrapper" or "zero_grad" not in vars(optimizer))
    return flat(net), [line for line in said if "inside" in line]


@both_ways
@pytest.mark.parametrize("given", ["the wrapper", "the inner one, after", "the inner one, before"])
def test_wrapped_optimizers(pool: RankPool, way: str, given: str) -> None:
    expected = pool.run(train, way, ERRORS, "none", "the inner one, after", False, ranks=2)
    for wrapper in ("held", "mixed", "twice"):
        for (x, said), (plain, _) in zip(
            pool.run(train, way, ERRORS, wrapper, given, False, ranks=2), expected, strict=True
        ):
            assert torch.equal(x, plain)
            assert len(said) == (given == "the wrapper")
            assert not said or said[0].startswith("SAEFState is for the SGD inside the ")


@both_ways
def test_wrapped_models(pool: RankPool, way: str) -> None:
    expected = pool.run(train, way, ERRORS, "none", "the inner one, after", False, ranks=2)
    for (x, said), (plain, _) in zip(
        pool.run(train, way, ERRORS, "held", "the wrapper", True, ranks=2), expected, strict=True
    ):
        assert torch.equal(x, plain)
        assert said == [
            f"SAEFState is for the {a}"
            for a in ("DistributedDataParallel inside the Shell it was given", "SGD inside the Held it was given")
        ]


INSIDE: dict[str, Callable[[DDP], Any]] = {
    "DDP": lambda ddp: ddp,
    "a shell": Shell,
    "compiled": lambda ddp: torch.compile(ddp, backend="eager"),
    "both": lambda ddp: torch.compile(Shell(ddp), backend="eager"),
}


def registers(group: dist.ProcessGroup, inside: str, later: bool) -> tuple[Tensor, dict[str, str]]:
    """The hook is registered by what is around DDP: (x after two steps, what is refused)."""
    net, said = make_net(), {}
    model = INSIDE[inside](DDP(net, process_group=group))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    settings: Any = {"compressor": ERRORS}
    state: Any = saef.Later(**settings) if later else saef.SAEFState(model, optimizer, **settings)
    register(model, state)
    if later:
        state = state.bind(model, optimizer)
    for t in range(2):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert state.steps == 2
    more = Shell(DDP(make_net(), process_group=group))
    more.extra = nn.Linear(2, 2)
    two = nn.ModuleList([DDP(make_net(), process_group=group) for _ in range(2)])
    for name, other in (("no DDP", make_net()), ("more", more), ("two", two)):
        with pytest.raises(ValueError, match="needs a model with one DistributedDataParallel inside") as caught:
            register(other, state)
        said[name] = str(caught.value)
    return flat(net), said


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("inside", INSIDE)
def test_the_hook_is_registered_with_the_ddp_inside(pool: RankPool, inside: str, later: bool) -> None:
    expected = pool.run(registers, "DDP", False, ranks=2)
    for (x, said), (plain, _) in zip(pool.run(registers, inside, later, ranks=2), expected, strict=True):
        assert torch.equal(x, plain)
        assert "got Shell: give it DDP itself" in said["more"]
        assert "got ModuleList" in said["two"]


def others(group: dist.ProcessGroup, what: str) -> str:
    """What is no wrapper of the parameters is not looked into, and says what it said."""
    net, extra = make_net(), nn.Linear(2, 2).double()
    model: nn.Module = DDP(net, process_group=group)
    parameters = list(net.parameters())
    optimizer: Any = torch.optim.SGD(parameters, lr=0.1)
    if what == "a wrapper that trains more":
        model = Shell(model)
        model.extra = extra
    elif what == "a wrapped ZeroRedundancyOptimizer":
        optimizer = Held(ZeroRedundancyOptimizer(parameters, torch.optim.SGD, process_group=group, lr=0.1))
    else:
        optimizer = Held(torch.optim.SGD(extra.parameters(), lr=0.1))
    with pytest.raises((TypeError, ValueError)) as caught:
        saef.SAEFState(model, optimizer, process_group=group)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a wrapper that trains more", "are not in the optimizer"),
        ("a wrapped ZeroRedundancyOptimizer", "makes the ranks' parameters alike itself"),
        ("another's optimizer", "are not in the optimizer"),
    ],
)
def test_what_is_no_wrapper_is_refused_as_ever(pool: RankPool, what: str, message: str) -> None:
    for said in pool.run(others, what, ranks=2):
        assert message in said


def other_wrapper_steps(group: dist.ProcessGroup, wrapper: str) -> str:
    """A wrapper around another optimizer of the parameters is as wrong as that one."""
    net = make_net()
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = saef.SAEFState(model, optimizer)
    model.register_comm_hook(state, saef_hook)
    other = WRAPPERS[wrapper](torch.optim.SGD(net.parameters(), lr=0.1))
    x, y = batch(dist.get_rank(group), 0)
    F.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="Create SAEFState with the optimizer that steps") as caught:
        other.step()
    return str(caught.value)


@pytest.mark.parametrize("wrapper", ["held", "mixed", "twice"])
def test_another_wrapped_optimizer_is_refused(pool: RankPool, wrapper: str) -> None:
    pool.run(other_wrapper_steps, wrapper, ranks=2)


# ---- copies -------------------------------------------------------------------------------------------------------


def pickled(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "average with a function": lambda model: (
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)).module
    ),
}


def copy_ddp(group: dist.ProcessGroup, way: str, how: str, moment: str) -> str:
    """The copied DDP trains as plain DDP, and the one that was copied goes on. DDP wants the default group for it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = make_net()
    model = DDP(net, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = attach(way, model, optimizer, ERRORS)
    model.register_comm_hook(state, saef_hook)

    def loss(m: nn.Module, t: int) -> Tensor:
        x, y = batch(rank, t)
        return F.mse_loss(m(x), y)

    for t in range(3):
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()
    optimizer.zero_grad()
    if moment == "after a step":
        other = COPIES[how](model)
        loss(model, 3).backward()
    elif moment == "in the window":
        value = loss(model, 3)
        other = COPIES[how](model)
        value.backward()
    else:
        loss(model, 3).backward()
        other = COPIES[how](model)
    x = flat(net)
    assert torch.equal(flat(other), x) == (moment != "in the window")
    optimizer.step()
    assert state.steps == 4 and not torch.equal(flat(net), x)
    begun = flat(other)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other_optimizer.zero_grad()
    loss(other, 4).backward()
    own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(other.module, 4), list(other.parameters()))])
    dist.all_reduce(own)
    mean = torch.cat([p.grad.reshape(-1) for p in other.parameters() if p.grad is not None])
    torch.testing.assert_close(mean, own / size, rtol=0, atol=1e-12)
    other_optimizer.step()
    torch.testing.assert_close(flat(other), begun - 0.1 * mean, rtol=0, atol=1e-12)
    return "ok"


@both_ways
@pytest.mark.parametrize("moment", ["after a step", "in the window", "after the backward"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_ddp_is_free_of_saef(pool: RankPool, way: str, how: str, moment: str) -> None:
    assert pool.run(copy_ddp, way, how, moment) == ["ok"] * 4


def copy_optimizer(group: dist.ProcessGroup, way: str, how: str) -> str:
    """A copied optimizer has the momentum, and no hooks: it steps its own parameters by its own arithmetic."""
    net = make_net()
    model = DDP(net, process_group=group)
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = attach(way, model, inner, ERRORS)
    model.register_comm_hook(state, saef_hook)
    rank = dist.get_rank(group)
    for t in range(3):
        inner.zero_grad()
        x, y = batch(rank, t)
        loss = F.mse_loss(model(x), y)
        in_window = copy.deepcopy(inner.state_dict())
        loss.backward()
        inner.step()
    other = COPIES[how](inner)
    both = [(p, q) for p, q in zip(net.parameters(), other.param_groups[0]["params"], strict=True)]
    for p, q in both:
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
        m = other.state[q]["momentum_buffer"]
        assert torch.equal(m, inner.state[p]["momentum_buffer"])
        q.grad = torch.ones_like(q)
        before, expected = q.detach().clone(), m * 0.9 + 1
        other.step()
        torch.testing.assert_close(q.detach(), before - 0.1 * expected, rtol=0, atol=1e-12)
        q.grad = None
    x = flat(net)
    assert torch.equal(x, state.weights.x()) and state.steps == 3
    saved = copy.deepcopy(inner.state_dict())
    assert in_window["state"][0]["saef_step"] == 2 and saved["state"][0]["saef_step"] == 3
    assert all(
        torch.equal(saved["state"][i]["momentum_buffer"], inner.state[p]["momentum_buffer"])
        for i, (p, _) in enumerate(both)
    )
    return "ok"


@both_ways
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_is_free_of_saef(pool: RankPool, way: str, how: str) -> None:
    assert pool.run(copy_optimizer, way, how, ranks=2) == ["ok"] * 2


def copy_state(group: dist.ProcessGroup, how: str) -> str:
    net = make_net()
    state = saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1), process_group=group)
    other = COPIES[how](state)
    for use in (
        lambda: other.steps,
        lambda: other.state_dict(),
        lambda: saef_hook(other, mock.Mock(spec=dist.GradBucket)),
    ):
        with pytest.raises(RuntimeError, match=r"copy or a pickle of a SAEFState.*state_dict\(\)"):
            use()
    assert state.steps == 0
    return repr(copy.copy(other))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_state_says_that_it_is_none(pool: RankPool, how: str) -> None:
    assert all("Copied" in said for said in pool.run(copy_state, how, ranks=2))
