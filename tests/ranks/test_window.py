"""The parameters are x whenever a user can look: x_half lives from a training forward to the end of its backward.

Both ways of keeping x. With `Identity()` saef is plain momentum SGD, so what a script does in between must have the
effect that it has with plain DDP.
"""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import SIZES, batch, flat, make_net, way_of_keeping_x

pytestmark = pytest.mark.slow

both_ways = pytest.mark.parametrize("way", ["copies", "swaps"])


class Setting:
    """One rank's network under DDP, with saef or (`compressor` None) without."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        way: str,
        compressor: saef.Compressor | None,
        sizes: tuple[int, ...] = SIZES,
        local_steps: int = 1,
        **ddp: Any,
    ) -> None:
        self.net, self.rank = make_net(sizes=sizes), dist.get_rank(group)
        self.model = DDP(self.net, process_group=group, bucket_cap_mb=0.0005, **ddp)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.state: Any = None
        if compressor is not None:
            with mock.patch("saef.step.joining.create", way_of_keeping_x(way)):
                self.state = saef.SAEFState(self.model, self.optimizer, compressor=compressor, local_steps=local_steps)
            self.model.register_comm_hook(self.state, saef_hook)

    def loss(self, t: int) -> Tensor:
        x, y = batch(self.rank, t)
        return F.mse_loss(self.model(x), y)

    def step(self, t: int) -> None:
        self.optimizer.zero_grad()
        self.loss(t).backward()
        self.optimizer.step()

    def trained(self, steps: int = 3) -> "Setting":
        for t in range(steps):
            self.step(t)
        return self

    @property
    def x(self) -> Tensor:
        return self.state.weights.x().clone()


def make(group: dist.ProcessGroup, way: str) -> Setting:
    """Errors that are not 0, so that x_half is not x."""
    made = Setting(group, way, saef.TopK(0.2, block=10)).trained()
    assert made.state.e.abs().max() > 0
    return made


# ---- looking ------------------------------------------------------------------------------------------------------


def averaged(net: nn.Module) -> Tensor:
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    return flat(average.module)


def pickled(net: nn.Module) -> Tensor:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return flat(torch.load(file, weights_only=False))


LOOKS: list[Callable[[nn.Module], Tensor]] = [
    flat,
    lambda net: nn.utils.parameters_to_vector(net.parameters()).detach(),
    lambda net: flat(copy.deepcopy(net)),
    averaged,
    pickled,
    lambda net: torch.cat([v.reshape(-1) for layer in net for v in layer.state_dict().values()]),
    lambda net: torch.from_numpy(flat(net).cpu().numpy().copy()).to(next(net.parameters()).device),
]


def look(group: dist.ProcessGroup, way: str) -> str:
    """After a backward; after a micro-batch; after a forward whose loss is dropped, and zero_grad()."""
    at = make(group, way)
    x = at.x
    with at.model.no_sync():
        at.loss(3).backward()
    assert all(torch.equal(see(at.net), x) for see in LOOKS)
    at.loss(4).backward()
    assert all(torch.equal(see(at.net), x) for see in LOOKS)
    at.optimizer.step()
    x = at.x
    loss = at.loss(5)
    assert not torch.equal(flat(at.net), x)
    del loss
    at.optimizer.zero_grad()
    assert all(torch.equal(see(at.net), x) for see in LOOKS)
    return "ok"


@both_ways
def test_between_a_backward_and_the_next_forward_everyone_sees_x(pool: RankPool, way: str) -> None:
    assert pool.run(look, way, ranks=2) == ["ok"] * 2


# ---- writing outside of the window ----------------------------------------------------------------------------------


def clamp(at: Setting) -> None:
    with torch.no_grad():
        for p in at.net.parameters():
            p.clamp_(-0.2, 0.2)


def clamp_data(at: Setting) -> None:
    for p in at.net.parameters():
        p.data.clamp_(-0.2, 0.2)


def new_storage(at: Setting) -> None:
    at.net[0].weight.data = at.net[0].weight.data * 0.5


def load(at: Setting) -> None:
    at.net.load_state_dict({k: v * 0.9 for k, v in at.net.state_dict().items()})


def another_optimizer(at: Setting) -> None:
    """Of other parameters: the discriminator's, say."""
    other = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    clamp(at)


def evaluate(at: Setting) -> None:
    with torch.no_grad():
        at.model(batch(0, 9)[0])
    clamp(at)


def one_entry(at: Setting) -> None:
    at.net[2].weight.data[13, 21] = 0.75


def a_row_by_numpy(at: Setting) -> None:
    w = at.net[2].weight.detach()
    (w.numpy() if w.device.type == "cpu" else w)[5] = 0.0


def swapped_entries(at: Setting) -> None:
    w = at.net[2].weight.data
    w[3, [1, 2]] = w[3, [2, 1]]


def negated(at: Setting) -> None:
    at.net[2].weight.data[7].neg_()


EDITS = [clamp, clamp_data, new_storage, load, another_optimizer, evaluate]
EDITS += [one_entry, a_row_by_numpy, swapped_entries, negated]


def edited(group: dist.ProcessGroup, way: str, edit: Callable[[Setting], None], plain: bool) -> Tensor:
    at = Setting(group, way, None if plain else saef.Identity(), sizes=(6, 40, 30, 1))
    for t in range(6):
        at.optimizer.zero_grad()
        at.loss(t).backward()
        if t in (2, 4):
            edit(at)
        at.optimizer.step()
        if t == 3:
            edit(at)
    return flat(at.net)


@both_ways
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_written_between_backward_and_step_counts(pool: RankPool, edit: Any, way: str) -> None:
    ours, plain = (pool.run(edited, way, edit, without, ranks=2) for without in (False, True))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- writing inside of it -------------------------------------------------------------------------------------------

DOORS: dict[str, Callable[[Setting, Tensor], Any]] = {
    "backward": lambda at, loss: loss.backward(),
    "step": lambda at, loss: at.optimizer.step(),
    "zero_grad": lambda at, loss: at.optimizer.zero_grad(),
    "evaluation": lambda at, loss: torch.no_grad()(at.model)(batch(0, 0)[0]),
    "state_dict": lambda at, loss: at.net.state_dict(),
    "checkpoint": lambda at, loss: at.state.state_dict(),
}


def fill(p: Tensor) -> None:
    with torch.no_grad():
        p.fill_(0.5)


def replace(p: Tensor) -> None:
    p.data = torch.full_like(p, 0.5)


def write_inside(group: dist.ProcessGroup, way: str, door: str, write: Callable[[Tensor], None]) -> str:
    at = make(group, way)
    x, loss = at.x, at.loss(3)
    write(at.net[4].bias)  # which no backward needs, or torch itself would refuse
    with pytest.raises(RuntimeError, match=r"'4\.bias'.*while they were x_half") as caught:
        DOORS[door](at, loss)
    assert torch.equal(flat(at.net), x)
    at.optimizer.zero_grad()
    at.step(4)
    return str(caught.value)


@both_ways
@pytest.mark.parametrize("write", [fill, replace])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_written_to_x_half_is_refused_at_the_next_door(pool: RankPool, door: str, write: Any, way: str) -> None:
    for said in pool.run(write_inside, way, door, write, ranks=2):
        assert "after step()" in said


def one_bias(at: Setting) -> None:
    at.net[0].bias.data[1] += 1.0


def renorm(at: Setting) -> None:
    w = at.net[2].weight.data
    torch.renorm(w, 2, 0, 0.1, out=w)


INSIDE = [clamp_data, one_entry, a_row_by_numpy, swapped_entries, negated, one_bias, renorm]


def write_unseen(
    group: dist.ProcessGroup, way: str, write: Callable[[Setting], None], where: str, local_steps: int
) -> str:
    """Each forward, or backward, writes to the parameters where neither versions nor addresses tell."""
    at = Setting(group, way, saef.TopK(0.2, block=10), sizes=(6, 40, 30, 1), local_steps=local_steps).trained()
    at.state.weights._spot.waits = where == "late"  # as on a GPU
    if where == "backward":
        at.net[2].register_full_backward_pre_hook(lambda *_: write(at))
    else:
        at.net[2].register_forward_pre_hook(lambda *_: write(at))
    with pytest.raises(RuntimeError, match=r"while they were x_half.*after step\(\)") as caught:
        for t in range(31):
            at.step(t)
    return str(caught.value)


@both_ways
@pytest.mark.parametrize(("where", "local_steps"), [("forward", 1), ("backward", 1), ("late", 1), ("forward", 2)])
@pytest.mark.parametrize("write", INSIDE)
def test_a_model_that_writes_to_its_weights_without_a_trace_is_found(
    pool: RankPool, write: Any, where: str, local_steps: int, way: str
) -> None:
    names = {clamp_data: "", one_bias: "'0.bias'"}
    for said in pool.run(write_unseen, way, write, where, local_steps, ranks=2):
        assert names.get(write, "'2.weight'") in said


# ---- who steps ------------------------------------------------------------------------------------------------------


def step_with(group: dist.ProcessGroup, way: str, which: str) -> str:
    at = make(group, way)
    others = {
        "the same class": lambda: torch.optim.SGD(at.net.parameters(), lr=0.1, momentum=0.9),
        "another class": lambda: torch.optim.AdamW(at.net.parameters()),
        "a part": lambda: torch.optim.SGD(at.net[0].parameters(), lr=0.1),
    }
    other = others[which]()
    other.zero_grad()
    at.loss(3).backward()
    x = at.x
    with pytest.raises(RuntimeError, match="Create SAEFState with the optimizer that steps") as caught:
        other.step()
    assert torch.equal(flat(at.net), x)
    at.optimizer.step()
    at.state.detach()
    other.step()  # it is free now
    return str(caught.value)


@both_ways
@pytest.mark.parametrize("which", ["the same class", "another class", "a part"])
def test_another_optimizer_of_the_parameters_is_refused(pool: RankPool, which: str, way: str) -> None:
    for said in pool.run(step_with, way, which, ranks=2):
        assert said.startswith("AdamW" if which == "another class" else "SGD")


# ---- graphs ---------------------------------------------------------------------------------------------------------


def stale(group: dist.ProcessGroup, way: str, how: str) -> str:
    at = make(group, way)
    at.optimizer.zero_grad()
    data, target = batch(at.rank, 3)
    if how == "kept over a step":
        kept = at.loss(3)
        kept.backward(retain_graph=True)
        at.optimizer.step()
        loss = kept
    elif how == "carried over a step":
        carried = at.model(data)
        F.mse_loss(carried, target).backward(retain_graph=True)
        at.optimizer.step()
        loss = F.mse_loss(at.model(data + carried.mean()), target)
    elif how == "before the forward":
        loss = at.net[2](torch.tanh(at.net[0](data))).pow(2).mean() + at.loss(3)
    else:  # "changed in between"
        first = at.loss(3)
        with torch.no_grad():
            at.model(data)
            at.net[0].weight.mul_(0.5)
        loss = first + at.loss(4)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    return str(caught.value)


@both_ways
@pytest.mark.parametrize("how", ["kept over a step", "carried over a step", "before the forward", "changed in between"])
def test_a_backward_through_other_weights_raises(pool: RankPool, how: str, way: str) -> None:
    for said in pool.run(stale, way, how, ranks=2):
        assert "modified by an inplace operation" in said or "of an earlier step" in said


def idioms(group: dist.ProcessGroup, way: str, idiom: str, plain: bool, compressor: Any) -> tuple[Tensor, list[float]]:
    at = Setting(group, way, None if plain else compressor)
    seen: list[float] = []
    if idiom == "hook that reads gradients":
        at.optimizer.register_step_pre_hook(
            lambda *_: seen.append(float(sum(p.grad.abs().sum() for p in at.net.parameters()) > 0))
        )
    if idiom == "frozen statistics":
        at.net.eval()
    for t in range(6):
        data, target = batch(at.rank, t)
        at.optimizer.zero_grad()
        if idiom == "closure":

            def closure(t: int = t) -> Tensor:
                at.optimizer.zero_grad()
                loss = at.loss(t)
                loss.backward()
                return loss

            seen.append(float(at.optimizer.step(closure)))
            continue
        if idiom == "no_grad pass in between":
            loss = at.loss(t)
            with torch.no_grad():
                at.model(data)
            loss.backward()
        elif idiom.startswith("kept"):
            where, door = idiom.split(", ")[1:]
            loss = at.loss(t)
            own = at.net[0].weight.sin().square().mean()
            leave_in_the_model(at.net, own, where)
            if door == "zero_grad":
                at.optimizer.zero_grad()
            elif door == "evaluated":
                with torch.no_grad():
                    at.model(data)
            else:
                at.net.state_dict()
            (loss + own).backward()
        elif idiom == "two forwards":
            first, second = at.loss(t), at.loss(t + 50)
            (first + second).backward()
        elif idiom == "output in a structure":
            out = Structured(at.model)(data)
            F.mse_loss(out["nested"][0].value, target).backward()
        elif idiom == "backward in parts":
            with at.model.no_sync():
                first, second = at.loss(t), at.loss(t + 50)
                first.backward()
                second.backward()
            at.loss(t + 100).backward()
        elif idiom == "gradient penalty":
            data = data.clone().requires_grad_()
            with at.model.no_sync():  # DDP would wait for gradients of this forward
                (slope,) = torch.autograd.grad(at.model(data).sum(), data, create_graph=True)
            (F.mse_loss(at.model(data), target) + slope.pow(2).mean()).backward()
        elif idiom == "checkpoint inside":
            F.mse_loss(checkpoint(at.model, data, use_reentrant=False), target).backward()
        else:
            at.loss(t).backward()
        at.optimizer.step()
    return flat(at.net), seen


def leave_in_the_model(net: nn.Module, loss: Tensor, where: str) -> None:
    """As a forward leaves an auxiliary loss there."""
    owner = net[0] if where == "inner attribute" else net
    owner.auxiliary = {"list": [None, loss], "dictionary": {"a": loss}}.get(where, loss)


class Structured(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Any]:
        class Output:
            value = None

        found = Output()
        found.value = self.inner(x)
        return {"nested": [found], "text": "a"}


IDIOMS = ["closure", "no_grad pass in between", "two forwards", "output in a structure", "backward in parts"]
IDIOMS += ["checkpoint inside", "gradient penalty", "frozen statistics", "hook that reads gradients"]
IDIOMS += ["kept, attribute, zero_grad", "kept, list, evaluated", "kept, dictionary, zero_grad"]
IDIOMS += ["kept, inner attribute, saved"]


@both_ways
@pytest.mark.parametrize("idiom", IDIOMS)
def test_idioms_have_the_effect_they_have_without_saef(pool: RankPool, idiom: str, way: str) -> None:
    ours = pool.run(idioms, way, idiom, False, saef.Identity(), ranks=2)
    plain = pool.run(idioms, way, idiom, True, None, ranks=2)
    for (a, seen), (b, expected) in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_both_ways_of_keeping_x_agree_on_idioms(pool: RankPool, idiom: str) -> None:
    copies, swaps = (pool.run(idioms, way, idiom, False, saef.TopK(0.2, block=10), ranks=2) for way in WAYS)
    for (a, _), (b, _) in zip(copies, swaps, strict=True):
        assert torch.equal(a, b)


class Slots:
    __slots__ = ("inner", "value")
    inner: Any
    value: Tensor

    def __init__(self, value: Tensor, inner: Any = None) -> None:
        self.value, self.inner = value, inner


class Single(Slots):
    __slots__ = "more"


class Raises:
    __slots__ = ("unset", "value")
    value: Tensor

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "distribution": (lambda y: Normal(y, 1.0), lambda out: out.mean),
    "of distributions": (lambda y: Independent(Normal(y, 1.0), 1), lambda out: out.base_dist.loc),
    "transformed": (
        lambda y: TransformedDistribution(Normal(y, 1.0), [TanhTransform()]),
        lambda out: out.base_dist.mean,
    ),
    "slots": (Slots, lambda out: out.value),
    "slots of a base": (Single, lambda out: out.value),
    "objects in objects": (lambda y: SimpleNamespace(a=SimpleNamespace(b=[Slots(y)])), lambda out: out.a.b[0].value),
    "a circle": (lambda y: circle(y), lambda out: out.inner["back"].inner["value"]),
    "much else": (lambda y: {"boxes": [[(i, i)] for i in range(12_000)], "y": y}, lambda out: out["y"]),
    "much else, after it": (lambda y: (y, [[(i,)] for i in range(12_000)]), lambda out: out[0]),
    "a slot that raises": (lambda y: Raises(y), lambda out: out.value),
    "dictionary's attributes": (lambda y: OrderedDict(a={1: (y, None)}), lambda out: out["a"][1][0]),
}


def circle(y: Tensor) -> Slots:
    found = Slots(y.detach())
    found.inner = {"back": found, "value": y, "type": Slots, "module": nn.Linear(1, 1)}
    return found


class Returns(nn.Module):
    def __init__(self, net: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


def returned(group: dist.ProcessGroup, kind: str, compressor: Any) -> Tensor:
    """Gradients are zeroed between forward and backward, so the backward has to be told of by what is returned."""
    wrap, found_in = OUTPUTS[kind]
    net, rank = make_net(), dist.get_rank(group)
    model = DDP(Returns(net, wrap), process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if compressor is not None:
        model.register_comm_hook(saef.SAEFState(model, optimizer, compressor=compressor), saef_hook)
    for t in range(4):
        x, y = batch(rank, t)
        loss = F.mse_loss(found_in(model(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flat(net)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_tensors_are_found_wherever_a_forward_returns_them(pool: RankPool, kind: str) -> None:
    ours, plain = (pool.run(returned, kind, c, ranks=2) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def kept_for_long(group: dist.ProcessGroup, kind: str, compressor: Any) -> Tensor:
    """Attributes with graphs of other networks, or with none that a backward could go through."""
    net, rank = make_net(), dist.get_rank(group)
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if compressor is not None:
        model.register_comm_hook(saef.SAEFState(model, optimizer, compressor=compressor), saef_hook)
    prototype = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True).exp()
    for t in range(4):
        x, y = batch(rank, t)
        loss = F.mse_loss(model(x), y)
        if kind == "another's":
            net.kept = prototype
            loss = loss * prototype.sum()
        else:
            base = (x * net[0].weight[0]).clone()
            net.kept, _ = base[:2].unbind(0)
            base.mul_(2)
        net.state_dict()
        loss.backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    return flat(net)


@pytest.mark.parametrize("kind", ["another's", "a view whose base was written to"])
def test_attributes_that_have_nothing_to_do_with_a_step(pool: RankPool, kind: str) -> None:
    ours, plain = (pool.run(kept_for_long, kind, c, ranks=2) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def scripted(group: dist.ProcessGroup) -> str:
    """A scripted module takes no hooks, and does not let others be added to one that is compiled."""
    at = Setting(group, "swaps", saef.Identity())
    plain = Setting(group, "swaps", None)
    with pytest.raises(AttributeError, match=r"torch.jit.script would compile the hooks .* state.detach\(\)"):
        torch.jit.script(at.net)
    at.state.detach()
    torch.jit.script(at.net)
    whole = DDP(torch.jit.script(make_net()), process_group=group)
    with pytest.raises(TypeError, match="a scripted module takes no hooks: .* holds it"):
        saef.SAEFState(whole, torch.optim.SGD(whole.parameters(), lr=0.1))
    at.net = nn.Sequential(torch.jit.script(make_net()))
    at.model = DDP(at.net, process_group=group)
    at.optimizer = torch.optim.SGD(at.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    at.state = saef.SAEFState(at.model, at.optimizer, compressor=saef.Identity())
    at.model.register_comm_hook(at.state, saef_hook)
    for setting in (at, plain):
        setting.trained()
    torch.testing.assert_close(flat(at.net), flat(plain.net), rtol=0, atol=1e-12)
    return "ok"


def test_scripted_modules(pool: RankPool) -> None:
    assert pool.run(scripted, ranks=2) == ["ok"] * 2


def replaced(group: dist.ProcessGroup) -> str:
    at = Setting(group, "swaps", saef.Identity())
    x, _ = batch(at.rank, 0)
    for change in (lambda p: 1.1 * p, lambda p: p.detach()):
        others = {name: change(p) for name, p in at.model.named_parameters()}
        with pytest.raises(RuntimeError, match="holds other tensors in its parameters' place .*functional_call"):
            torch.func.functional_call(at.model, others, (x,))
    at.trained()
    return "ok"


def test_other_tensors_in_the_parameters_place_are_refused(pool: RankPool) -> None:
    assert pool.run(replaced, ranks=2) == ["ok"] * 2


WAYS = ("copies", "swaps")


def reentrant(group: dist.ProcessGroup, way: str) -> str:
    at = make(group, way)
    data, target = batch(at.rank, 3)
    loss = F.mse_loss(checkpoint(at.model, data.requires_grad_(), use_reentrant=True), target)
    with pytest.raises(RuntimeError, match="use_reentrant=False") as caught:
        loss.backward()
    return str(caught.value)


@both_ways
def test_reentrant_checkpointing_of_the_whole_model_is_refused(pool: RankPool, way: str) -> None:
    assert all("x_half" in said for said in pool.run(reentrant, way, ranks=2))


def clip_in_a_hook(group: dist.ProcessGroup, way: str) -> str:
    at = make(group, way)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(at.net.parameters(), 1e-3)

    at.optimizer.register_step_pre_hook(clip)
    with pytest.raises(RuntimeError, match="max_grad_norm") as caught:
        at.step(3)
    return str(caught.value)


@both_ways
def test_clipping_in_a_hook_that_was_registered_later_is_refused(pool: RankPool, way: str) -> None:
    pool.run(clip_in_a_hook, way, ranks=2)


def detach(group: dist.ProcessGroup, way: str) -> Tensor:
    """The difference from plain DDP that goes on from the same x, with momentum of its own from then on."""
    at = make(group, way)
    at.state.detach()
    at.state.detach()
    plain = Setting(group, way, None)
    plain.net.load_state_dict(at.net.state_dict())
    for t in range(3, 9):
        at.step(t)
        plain.step(t)
    again = saef.SAEFState(at.model, at.optimizer, compressor=saef.Identity())
    with pytest.raises(RuntimeError):  # DDP takes one hook, which is the old state's
        at.model.register_comm_hook(again, saef_hook)
    return flat(at.net) - flat(plain.net)


@both_ways
def test_after_detach_the_same_ddp_averages_plain_gradients(pool: RankPool, way: str) -> None:
    for difference in pool.run(detach, way, ranks=2):
        assert difference.abs().max() < 1e-12


def share(group: dist.ProcessGroup) -> str:
    """Two states on one set of parameters, each with a wrapper and an optimizer of its own, in turn."""
    net, rank = make_net(), dist.get_rank(group)
    parts = []
    for _ in range(2):
        model = DDP(nn.Sequential(net), process_group=group)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        state = saef.SAEFState(model, optimizer, compressor=saef.Identity())
        model.register_comm_hook(state, saef_hook)
        parts.append((model, optimizer, state))
    plain, plain_optimizers = make_net(), []
    reference = DDP(plain, process_group=group)
    plain_optimizers = [torch.optim.SGD(plain.parameters(), lr=0.05) for _ in range(2)]
    for t in range(10):
        x, y = batch(rank, t)
        for model, optimizer in ((parts[t % 2][0], parts[t % 2][1]), (reference, plain_optimizers[t % 2])):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(flat(net), flat(plain), rtol=0, atol=1e-12)
    x, _ = batch(rank, 0)
    loss = parts[0][0](x).sum()
    with pytest.raises(RuntimeError, match="shares them"):
        parts[1][0](x)
    loss.backward()
    return "ok"


def test_two_states_that_share_parameters_take_turns(pool: RankPool) -> None:
    assert pool.run(share, ranks=2) == ["ok"] * 2


# ---- a default device -----------------------------------------------------------------------------------------------


def with_default(group: dist.ProcessGroup, way: str, device: str | None, settings: dict[str, Any]) -> list[Tensor]:
    """All that a state does beside `device`, which may have no memory: whatever is made must say where it lies."""
    at = Setting(group, way, None)
    batches = [batch(at.rank, t) for t in range(4)]
    kept = way_of_keeping_x(way)
    with torch.device(device) if device else nullcontext():  # the mode that set_default_device enters, to be left again
        with mock.patch("saef.step.joining.create", kept):
            state = saef.SAEFState(at.model, at.optimizer, audit_every=2, **settings)
        at.model.register_comm_hook(state, saef_hook)
        for x, y in batches:
            at.optimizer.zero_grad()
            F.mse_loss(at.model(x), y).backward()
            nn.utils.clip_grad_norm_(at.net.parameters(), float("inf"))
            at.optimizer.step()
        state.diagnose()
        state.load_state_dict(state.state_dict())
        state.load_state_dict(state.consolidated_state_dict())
        state.flush()
        state.reset_errors()
    return [flat(at.net), state.m]


@both_ways
@pytest.mark.parametrize(
    "settings",
    [
        {"compressor": saef.TopK(0.2), "averaging": saef.Rotating(2), "exchange": "sharded"},
        {"compressor": saef.ScaledSign(block=7), "averaging": saef.Ring(), "max_grad_norm": 0.1},
        {"compressor": saef.Identity(), "server_compressor": None, "weight_decay_mode": "outer"},
    ],
    ids=repr,
)
def test_a_default_device_does_not_matter(pool: RankPool, way: str, settings: Any) -> None:
    plain, ours = (pool.run(with_default, way, device, settings, ranks=2) for device in (None, "meta"))
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a, b, strict=True))
