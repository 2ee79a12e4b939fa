"""Optimizers of other makes: what their steps take, what they keep and hold on to, and what is saved of it."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import batch, flat, make_net, way_of_keeping_x

pytestmark = pytest.mark.slow

Closure = Callable[[], Tensor]


def made(
    group: dist.ProcessGroup, optimizer: Callable[[Any], Any], compressor: saef.Compressor | None, **settings: Any
) -> tuple[nn.Module, DDP, Any, Any]:
    """compressor None: plain DDP."""
    net = make_net()
    model, given = DDP(net, process_group=group), optimizer([*net.parameters()])
    if compressor is None:
        return net, model, given, None
    state = saef.SAEFState(model, getattr(given, "base_optimizer", given), compressor=compressor, **settings)
    model.register_comm_hook(state, saef_hook)
    return net, model, given, state


def backward(group: dist.ProcessGroup, model: nn.Module, optimizer: Any, t: int) -> Tensor:
    optimizer.zero_grad()
    x, y = batch(dist.get_rank(group), t)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- arguments of step() ------------------------------------------------------------------------------------


class Takes(torch.optim.Optimizer):
    """As Sophia's, Polyak's and others' do: more than a closure, or something else."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None, scale: float = 1.0, *, more: float = 0.0) -> Any:  # type: ignore[override]
        loss = torch.enable_grad()(closure)() if callable(closure) else closure
        factor = scale + more + (0.0 if loss is None else float(loss))
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * factor)
        return loss


CALLS: dict[str, Callable[[Any, Closure], Any]] = {
    "closure, scale": lambda optimizer, closure: optimizer.step(closure, 3.0),
    "closure, more=": lambda optimizer, closure: optimizer.step(closure, more=2.0),
    "closure=, scale=": lambda optimizer, closure: optimizer.step(closure=closure, scale=3.0),
    "scale=": lambda optimizer, closure: (closure(), optimizer.step(scale=3.0))[0],
    "loss": lambda optimizer, closure: optimizer.step(closure().detach()),
    "loss, scale, more=": lambda optimizer, closure: optimizer.step(closure().detach(), 2.0, more=1.0),
    "closure=loss": lambda optimizer, closure: optimizer.step(closure=closure().detach()),
}


def call(group: dist.ProcessGroup, how: str, compressor: saef.Compressor | None) -> Tensor:
    """With the loss of one batch on all ranks, as a script must that steps by it."""
    net, model, optimizer, _ = made(group, Takes, compressor)
    for t in range(5):

        def closure(t: int = t) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(0, t)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        assert float(CALLS[how](optimizer, closure)) > 0
    return flat(net)


@pytest.mark.parametrize("how", CALLS)
def test_whatever_step_takes_arrives(pool: RankPool, how: str) -> None:
    ours, plain = (pool.run(call, how, c, ranks=2) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        close(a, b)


# ---- optimizers that hold another ---------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) around another optimizer, which steps."""

    def __init__(self, base: Any, rho: float = 0.05) -> None:
        self.base_optimizer = base
        super().__init__(base.param_groups, {})
        self.param_groups, self.rho = base.param_groups, rho

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.data for p in parameters]
        for p in parameters:  # by the ranks' mean, which is what DDP's gradient is
            slope = p.grad.clone()
            dist.all_reduce(slope)
            p.data = p + self.rho * slope / dist.get_world_size()
        self.zero_grad()
        loss = torch.enable_grad()(closure)()
        for p, x in zip(parameters, before, strict=True):
            p.data = x
        self.base_optimizer.step()
        self.zero_grad()
        return loss


def sharpness(group: dist.ProcessGroup, compressor: saef.Compressor | None) -> Tensor:
    def around(parameters: Any) -> SAM:
        return SAM(torch.optim.SGD(parameters, lr=0.05, momentum=0.9))

    net, model, optimizer, _ = made(group, around, compressor)
    for t in range(5):
        x, y = batch(dist.get_rank(group), t)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        closure()
        assert optimizer.step(closure) > 0
    return flat(net)


def test_an_optimizer_that_steps_by_ours_may_step(pool: RankPool) -> None:
    ours, plain = (pool.run(sharpness, c, ranks=4) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        close(a, b)


# ---- what they keep -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    count: int


class Keeps(torch.optim.Optimizer):
    """Under a key of its own, in a namedtuple, and an array in a group."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.02, "shape": np.array([1.0, 2.0])})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        whole = self.state["whole"]
        whole["steps"] = whole.get("steps", 0) + 1
        whole["rate"] = torch.as_tensor(whole.get("rate", 1.0)) * 0.9
        for p in (p for group in self.param_groups for p in group["params"]):
            pair = self.state[p].get("pair", Pair(torch.zeros_like(p), 0))
            self.state[p]["pair"] = Pair(0.9 * pair.first + p.grad, pair.count + 1)
            rate = self.param_groups[0]["lr"] * float(whole["rate"]) / whole["steps"]
            p.sub_(self.state[p]["pair"].first, alpha=rate)


def kept(group: dist.ProcessGroup, case: str, compressor: saef.Compressor, local_steps: int) -> list[Tensor]:
    """Six steps; in between a bad one, or another run that loads the first one's state."""
    rank = dist.get_rank(group)
    net, model, optimizer, state = made(group, Keeps, compressor, local_steps=local_steps)
    for t in range(6):
        if t == 2 and case == "a bad round":
            for _ in range(local_steps):
                optimizer.zero_grad()
                x, y = batch(rank, 50)
                (F.mse_loss(model(x), y) * (float("nan") if rank == 1 else 1.0)).backward()
                optimizer.step()
            assert state.skipped == 1
        if t == 3 and case == "loaded":
            saved = copy.deepcopy(state.state_dict())
            net, model, optimizer, state = made(group, Keeps, compressor, local_steps=local_steps)
            state.load_state_dict(saved)
        backward(group, model, optimizer, t)
        optimizer.step()
    return [flat(net), optimizer.state["whole"]["rate"]]


@pytest.mark.parametrize("local_steps", [1, 2])
@pytest.mark.parametrize("case", ["a bad round", "loaded"])
def test_what_is_kept_for_no_parameter_is_saved_and_put_back(pool: RankPool, case: str, local_steps: int) -> None:
    for compressor in (saef.Identity(), saef.TopK(0.3)):
        found = pool.run(kept, case, compressor, local_steps, ranks=2)
        expected = pool.run(kept, "nothing", compressor, local_steps, ranks=2)
        for a, b in zip(found, expected, strict=True):
            assert all(map(torch.equal, a, b))


def lbfgs(group: dist.ProcessGroup, resumed: bool, local_steps: int) -> Tensor:
    def bound(parameters: Any) -> Any:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3, line_search_fn="strong_wolfe")

    net, model, optimizer, state = made(group, bound, saef.TopK(0.3), local_steps=local_steps)
    for t in range(8):
        if t == 4 and resumed:
            file = io.BytesIO()
            torch.save(state.state_dict(), file)
            file.seek(0)
            net, model, optimizer, state = made(group, bound, saef.TopK(0.3), local_steps=local_steps)
            state.load_state_dict(torch.load(file, weights_only=True))
        optimizer.step(partial(backward, group, model, optimizer, t))
    return flat(net)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_lbfgs_resumes_bit_for_bit(pool: RankPool, local_steps: int) -> None:
    """It holds on to its state while its closure runs, whose forward puts the loaded one there."""
    resumed, whole = (pool.run(lbfgs, yes, local_steps, ranks=2) for yes in (True, False))
    for a, b in zip(resumed, whole, strict=True):
        assert torch.equal(a, b)


# ---- within a round -----------------------------------------------------------------------------------------


def adam(parameters: Any) -> Any:
    return torch.optim.NAdam(parameters, lr=0.01)


def look_around(group: dist.ProcessGroup, way: str, at: int) -> str:
    """Values that are written through .data for one forward, and put back: the round would not know of them."""
    with mock.patch("saef.step.joining.create", way_of_keeping_x(way)):
        net, model, optimizer, state = made(group, adam, saef.Identity(), local_steps=3)
    for t in range(3):
        if t == at:
            before = net[0].weight.data.clone()
            net[0].weight.data.add_(0.1)
            with pytest.raises(RuntimeError, match=f"within a round of local steps, after {at} of 3"):
                backward(group, model, optimizer, 50)
            net[0].weight.data.copy_(before)
            with pytest.raises(RuntimeError, match=f"within a round of local steps, after {at} of 3"):
                backward(group, model, optimizer, t)  # it was seen
            state.reset_errors()
        backward(group, model, optimizer, t)
        optimizer.step()
    return "refused"


@pytest.mark.parametrize("way", ["copies", "swaps"])
@pytest.mark.parametrize("at", [1, 2])
def test_values_that_are_there_for_one_forward_of_a_round_are_seen(pool: RankPool, way: str, at: int) -> None:
    assert pool.run(look_around, way, at, ranks=2) == ["refused"] * 2


def saved_twice(group: dist.ProcessGroup, folder: str, kind: str, again: int) -> tuple[Tensor, int]:
    """A checkpoint in the middle of a round is loaded and saved as it is, before another forward."""

    def make(parameters: Any) -> Any:
        return getattr(torch.optim, kind)(parameters, lr=0.01)

    net, model, optimizer, state = made(group, make, saef.TopK(0.3), local_steps=3)
    for t in range(12):
        if t == 5:  # two steps of the second round are done
            for number in range(again):
                saef.save_checkpoint(f"{folder}/{number}", state)
                net, model, optimizer, state = made(group, make, saef.TopK(0.3), local_steps=3)
                saef.load_checkpoint(f"{folder}/{number}", state)
                assert state.local_step == 2
        backward(group, model, optimizer, t)
        optimizer.step()
    return flat(net), state.steps


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_a_round_that_was_loaded_can_be_saved_as_it_is(pool: RankPool, kind: str, tmp_path: Path) -> None:
    whole = pool.run(saved_twice, str(tmp_path), kind, 0, ranks=2)
    for again in (1, 3):
        for (a, steps), (b, expected) in zip(
            pool.run(saved_twice, f"{tmp_path}/{again}", kind, again, ranks=2), whole, strict=True
        ):
            assert torch.equal(a, b) and steps == expected == 4


def sparse(group: dist.ProcessGroup) -> str:
    model = DDP(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = saef.SAEFState(model, optimizer, local_steps=2, max_grad_norm=1.0)
    model.register_comm_hook(state, saef_hook)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"max_grad_norm cannot clip sparse gradients: .*sparse=False"):
        optimizer.step()
    return "ok"


def test_sparse_gradients_are_not_clipped(pool: RankPool) -> None:
    assert pool.run(sparse, ranks=2) == ["ok"] * 2


class Counts(torch.optim.SGD):
    """Sets one of its group's settings where something has happened, which on another rank has not."""

    def __init__(self, parameters: Any, marks: bool) -> None:
        super().__init__(parameters, lr=0.05)
        self.marks = marks

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.marks:
            self.param_groups[0]["marked"] = self.param_groups[0].get("marked", 0) + 1
        return super().step(closure)


def audited(group: dist.ProcessGroup, odd_lr: bool) -> str:
    rank = dist.get_rank(group)
    _, model, optimizer, state = made(
        group, lambda p: Counts(p, marks=rank == 1), saef.Identity(), local_steps=2, audit_every=1
    )
    optimizer.param_groups[0]["lr"] = 0.06 if odd_lr and rank == 1 else 0.05
    try:
        for t in range(8):
            backward(group, model, optimizer, t)
            optimizer.step()
    except ValueError as error:
        return str(error)
    assert state.steps == 4
    return ""


def test_audits_leave_out_what_an_optimizer_sets_itself(pool: RankPool) -> None:
    assert pool.run(audited, False, ranks=2) == [""] * 2
    assert all(
        "optimizer, group 0, lr: rank 0 has 0.05, rank 1 has 0.06" in s for s in pool.run(audited, True, ranks=2)
    )


def with_nan(group: dist.ProcessGroup, dtype: torch.dtype) -> str:
    """An unused parameter that is none of numbers, in every round."""
    net = make_net(dtype)
    net.unused = nn.Parameter(torch.full((3,), float("nan"), dtype=dtype))
    model = DDP(net, process_group=group, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    state = saef.SAEFState(model, optimizer, local_steps=2, max_consecutive_skips=None)
    model.register_comm_hook(state, saef_hook)
    for t in range(4):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t, dtype)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return f"{state.steps} {state.skipped}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_is_no_number_is_not_taken_for_a_change(pool: RankPool, dtype: torch.dtype) -> None:
    assert pool.run(with_nan, dtype, ranks=2) == ["0 2"] * 2
