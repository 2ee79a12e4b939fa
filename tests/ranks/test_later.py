"""saef.Later: the settings of a state, bound to model and optimizer by themselves or by a call."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import batch, flat, make_net

SETTINGS: Any = {"compressor": saef.TopK(0.2, block=10), "averaging": saef.Rotating(3)}


def given(how: str) -> Any:
    """A Later, as a framework may hand it on."""
    later = saef.Later(**SETTINGS)
    if how == "copied":
        return copy.deepcopy(later)
    return pickle.loads(pickle.dumps(later)) if how == "pickled" else later


def train(group: dist.ProcessGroup, how: str) -> dict[str, Tensor]:
    """Six steps, an evaluation before them. how: "state", "bind", or by itself."""
    if how == "compiled":
        torch.compiler.reset()
    net = make_net()
    model: Any = DDP(net, process_group=group)
    later = None if how == "state" else given(how)
    if later is not None:
        model.register_comm_hook(later, saef_hook)
    inner, rank = model, dist.get_rank(group)
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        model(batch(rank, 0)[0])
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if later is None:
        state = saef.SAEFState(inner, optimizer, **SETTINGS)
        inner.register_comm_hook(state, saef_hook)
    elif how == "bind":
        assert later.bind(inner, optimizer) is later.state
    for t in range(6):
        optimizer.zero_grad()
        x, y = batch(rank, t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    if later is not None:
        assert isinstance(pickle.loads(pickle.dumps(later)), type(copy.deepcopy(later.state)))  # as of a state
        state = later.state
        assert repr(state) in repr(later)
    found = {"x": state.weights.x().clone(), "e": state.e.clone(), "m": state.m.clone(), "steps": state.steps}
    state.detach()
    return found


@pytest.mark.parametrize("how", ["bind", "by itself", "copied", "pickled", "compiled"])
def test_equals_a_state_that_was_made_at_once(pool: RankPool, how: str) -> None:
    for found, expected in zip(pool.run(train, how, ranks=2), pool.run(train, "state", ranks=2), strict=True):
        assert found["steps"] == expected["steps"] == 6 and expected["e"].abs().max() > 0
        assert all(torch.equal(found[name], expected[name]) for name in ("x", "e", "m"))


def disturbed(group: dist.ProcessGroup) -> dict[str, str]:
    """What is said, by what was done."""
    said: dict[str, str] = {}
    handler = logging.Handler()
    handler.emit = lambda record: said.update(warning=record.getMessage())  # type: ignore[method-assign]

    def make() -> tuple[Any, DDP, saef.Later]:
        net, later = make_net(), saef.Later(**SETTINGS)
        ddp = DDP(net, process_group=group)
        ddp.register_comm_hook(later, saef_hook)
        return net, ddp, later

    def note(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError) as raised:
            call()
        said[name] = str(raised.value)

    x = batch(dist.get_rank(group), 0)[0]
    _, ddp, later = make()
    note("unbound", lambda: ddp.forward(x).sum().backward())
    net, ddp, later = make()
    note("none", lambda: ddp(x))
    first, second = (torch.optim.SGD(net.parameters(), lr=lr) for lr in (0.1, 0.2))
    note("two", lambda: ddp(x))
    del second
    ddp(x).sum().backward()  # the other one counts no more
    before = flat(net)
    first.step()
    assert later.state is not None and later.state.steps == 1 and not torch.equal(before, flat(net))
    note("bound", lambda: later.bind(ddp, first))
    later.state.detach()
    assert later.bind(ddp, first, step_ahead=0.5).settings.step_ahead == 0.5
    later.state.detach()
    forgotten = saef.Later()
    logging.getLogger("saef").addHandler(handler)
    plain = DDP(make_net(), process_group=group)
    with torch.no_grad():
        plain(x)
    assert "warning" not in said
    plain(x)
    first_warning = said.pop("warning")
    plain(x)
    assert "warning" not in said and forgotten.state is None
    logging.getLogger("saef").removeHandler(handler)
    return {**said, "plain": first_warning}


def test_what_it_says(pool: RankPool) -> None:
    expected = {
        "none": "no optimizers in this process have the model's parameters",
        "unbound": "was not called as model(...)",
        "two": "2 optimizers (SGD, SGD) in this process",
        "bound": "or detach() its state first",
        "plain": "use saef.integrations.lightning",
    }
    for said in pool.run(disturbed, ranks=2):
        assert {*said} == {*expected}
        for case, words in expected.items():
            assert words in said[case], said[case]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"compresor": saef.TopK(0.1)}, TypeError, "Later: 'compresor' is unknown .did you mean 'compressor'"),
        ({"step_ahead": 2.0}, ValueError, "step_ahead must be in"),
        ({"exchange": "shraded"}, ValueError, "did you mean 'sharded'"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        saef.Later(**settings)


def test_one_that_is_gone_leaves_no_hook() -> None:
    from saef import later as module

    waiting = saef.Later()
    assert module._watcher
    del waiting
    torch.nn.Linear(1, 1)(torch.ones(1))
    assert not module._watcher
