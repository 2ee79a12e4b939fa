"""What the rule keeps lies in the optimizer's state, where frameworks save it, with a mark of the errors' step."""

import copy
import io
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import ADAMW, MOMENTUM, batch, flat, make_net

pytestmark = pytest.mark.slow

ERRORS = saef.TopK(0.2, block=10)
# The rules, and among how many ranks they are torch's own with Identity: of AdamW each rank has a v.
RULES = pytest.mark.parametrize(("optimizer", "ranks"), [("SGD", 2), ("AdamW", 1)])
OPTIONS: dict[str, dict[str, Any]] = {"SGD": MOMENTUM, "AdamW": ADAMW}
NAMES = {"SGD": ["momentum_buffer"], "AdamW": ["exp_avg", "exp_avg_sq"]}


class Run:
    """One rank's training; `compressor` None: plain DDP."""

    def __init__(
        self, group: dist.ProcessGroup, compressor: saef.Compressor | None, optimizer: str = "SGD", **options: Any
    ) -> None:
        self.net, self.rank, self.group = make_net(), dist.get_rank(group), group
        self.model = DDP(self.net, process_group=group, bucket_cap_mb=0.0005)
        kind, self.names = getattr(torch.optim, optimizer), NAMES[optimizer]
        self.optimizer = kind(self.net.parameters(), **{"lr": 0.05, **OPTIONS[optimizer], **options})
        self.state: Any = None
        self.attach(compressor)

    def attach(self, compressor: saef.Compressor | None) -> None:
        if compressor is not None:
            self.state = saef.SAEFState(self.model, self.optimizer, compressor=compressor)
            self.model.register_comm_hook(self.state, saef_hook)

    def train(self, first: int, last: int) -> "Run":
        for t in range(first, last):
            self.optimizer.zero_grad()
            x, y = batch(self.rank, t)
            F.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def saved(self) -> bytes:
        """What most scripts save."""
        file = io.BytesIO()
        torch.save({"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def saved_second(self) -> list[Tensor]:
        return [state["exp_avg_sq"] for state in self.optimizer.state.values() if "exp_avg_sq" in state]

    def load(self, data: bytes) -> "Run":
        parts = torch.load(io.BytesIO(data), weights_only=True)
        self.net.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return self


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def kept(run: Run) -> Tensor:
    """What lies in the optimizer's state, in the order of state.m."""
    of = [run.optimizer.state[p] for p in run.net.parameters()]
    return torch.cat([state[name].reshape(-1) for name in run.names for state in of])


def resume(group: dist.ProcessGroup, kind: str, optimizer: str) -> str:
    """Identity owes nothing: model and optimizer are the whole state, and all ways of resuming are plain DDP's."""
    plain = Run(group, None, optimizer).train(0, 8)
    data = Run(group, None, optimizer).train(0, 4).saved() if kind == "from plain" else None
    first = Run(group, saef.Identity(), optimizer).train(0, 4)
    same(kept(first), first.state.m)
    if kind == "new objects":
        second = Run(group, saef.Identity(), optimizer).load(first.saved())
    elif kind == "loaded before the state is made":
        second = Run(group, None, optimizer).load(first.saved())
        second.attach(saef.Identity())
    elif kind == "rollback":
        data = first.saved()
        second = first.train(4, 6).load(data)
    elif kind == "from plain":
        assert data is not None
        second = Run(group, saef.Identity(), optimizer).load(data)
    elif kind == "to plain":  # every rank its own momentum, which with Identity is the plain one's share
        second = Run(group, None, optimizer).load(first.saved())
        for p, name in product(second.net.parameters(), second.names):
            dist.all_reduce(second.optimizer.state[p][name], group=group)
            second.optimizer.state[p][name] /= dist.get_world_size(group)
    else:  # "warmed up": saef takes over in the middle
        second = Run(group, None, optimizer).train(0, 4)
        second.attach(saef.Identity())
    second.train(4, 8)
    same(flat(second.net), flat(plain.net))
    if second.state is not None and (optimizer == "AdamW" or kind not in ("from plain", "warmed up")):
        assert second.state.steps == 8  # SGD counts none that could be taken over
    if optimizer == "AdamW":
        assert {float(second.optimizer.state[p]["step"]) for p in second.net.parameters()} == {8.0}
    return "ok"


KINDS = ["new objects", "loaded before the state is made", "rollback", "from plain", "to plain", "warmed up"]


@RULES
@pytest.mark.parametrize("kind", KINDS)
def test_model_and_optimizer_resume_what_owes_nothing(pool: RankPool, kind: str, optimizer: str, ranks: int) -> None:
    assert pool.run(resume, kind, optimizer, ranks=ranks) == ["ok"] * ranks


COMING_AND_GOING = {  # (step, group) -> mu
    "one group's comes later": lambda t, i: 0.9 if i or t >= 4 else 0.0,
    "comes later": lambda t, i: 0.9 if t >= 3 else 0.0,
    "goes and comes again": lambda t, i: [0.9, 0.0, 0.9, 0.5][t // 2 % 4],
    "one group's goes and comes again": lambda t, i: 0.0 if i and t in (3, 4, 5) else 0.8,
    "goes": lambda t, i: 0.9 if t < 4 else 0.0,
}


def momentum_that_comes_and_goes(group: dist.ProcessGroup, case: str, nesterov: bool) -> str:
    """Where mu is 0, a buffer stands still, as torch's does, and counts again when mu is back."""
    runs = []
    for compressor in (None, saef.Identity()):
        run = Run(group, None)
        weights = [p for p in run.net.parameters() if p.dim() > 1]
        biases = [p for p in run.net.parameters() if p.dim() == 1]
        run.optimizer = torch.optim.SGD([{"params": biases}, {"params": weights}], lr=0.05, weight_decay=0.01)
        run.attach(compressor)
        for t in range(9):
            for i, settings in enumerate(run.optimizer.param_groups):
                settings["momentum"] = COMING_AND_GOING[case](t, i)
                settings["nesterov"] = nesterov and settings["momentum"] > 0
            run.train(t, t + 1)
        runs.append(run)
    plain, ours = runs
    same(flat(ours.net), flat(plain.net))
    for p, q in zip(plain.net.parameters(), ours.net.parameters(), strict=True):
        mean = ours.optimizer.state[q]["momentum_buffer"].clone()
        dist.all_reduce(mean, group=group)
        there = plain.optimizer.state[p].get("momentum_buffer")
        same(mean / dist.get_world_size(group), torch.zeros_like(mean) if there is None else there)
    return "ok"


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("case", COMING_AND_GOING)
def test_momentum_that_comes_and_goes(pool: RankPool, case: str, nesterov: bool) -> None:
    assert pool.run(momentum_that_comes_and_goes, case, nesterov, ranks=2) == ["ok"] * 2


def resume_owing(group: dist.ProcessGroup, kind: str, optimizer: str) -> str:
    first = Run(group, ERRORS, optimizer).train(0, 4)
    data, state = first.saved(), first.state.state_dict()
    if kind == "rollback":
        second = first.train(4, 6).load(data)
    elif kind == "plain into errors":
        second = first.load(Run(group, None, optimizer).train(0, 2).saved())
    else:
        second = Run(group, ERRORS, optimizer).load(data)
    with pytest.raises(RuntimeError, match=r"errors are of step.*reset_errors") as caught:
        second.train(4, 5)
    said = str(caught.value)
    if kind == "new objects, then its errors":
        second.state.load_state_dict(state)
        again = Run(group, ERRORS, optimizer)
        again.state.load_state_dict(state)  # in the other order
        again.load(data)
        same(flat(again.train(4, 8).net), flat(first.train(4, 8).net))
        same(flat(second.train(4, 8).net), flat(first.net))
        assert second.state.steps == 8
    else:
        before = kept(second).clone()
        second.state.reset_errors()
        assert not second.state.e.any() and not second.state.e_server.any()
        same(second.state.m, before)
        assert second.state.steps == (2 if optimizer == "AdamW" and kind == "plain into errors" else 4)
        second.train(4, 6)
    return said


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", ["new objects", "rollback", "plain into errors", "new objects, then its errors"])
def test_errors_of_another_step_are_not_gone_on_with_in_silence(pool: RankPool, kind: str, optimizer: str) -> None:
    for said in pool.run(resume_owing, kind, optimizer, ranks=2):
        assert ("without saef" in said) == (kind == "plain into errors")


def clear(group: dist.ProcessGroup, compressor: Any, optimizer: str) -> str:
    """As `optimizer.state.clear()` works without saef: the momentum is 0, and steps are counted anew; errors stay."""
    run = Run(group, compressor, optimizer).train(0, 4)
    e = run.state.e.clone()
    run.optimizer.state.clear()
    x, y = batch(run.rank, 4)
    run.optimizer.zero_grad()
    F.mse_loss(run.model(x), y).backward()
    assert torch.equal(run.state.e, e) and not run.state.m.any()
    run.optimizer.step()
    assert run.state.m.any() and run.state.steps == (1 if optimizer == "AdamW" else 5)
    same(kept(run), run.state.m)
    return "ok"


@pytest.mark.parametrize("compressor", [saef.Identity(), ERRORS], ids=repr)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_cleared_state_is_a_momentum_of_zero(pool: RankPool, compressor: Any, optimizer: str) -> None:
    assert pool.run(clear, compressor, optimizer, ranks=2) == ["ok"] * 2


def by_dcp(group: dist.ProcessGroup, compressor: Any, optimizer: str) -> str:
    """torch.distributed.checkpoint's way, which also steps a new optimizer on zero gradients with lr 0."""
    first = Run(group, compressor, optimizer)
    get_state_dict(first.net, first.optimizer)  # before any step
    first.train(0, 4)
    expected = flat(Run(group, compressor, optimizer).train(0, 4).net)
    same(flat(first.net), expected)
    model, saved = copy.deepcopy(get_state_dict(first.net, first.optimizer))
    second = Run(group, compressor, optimizer)
    set_state_dict(second.net, second.optimizer, model_state_dict=model, optim_state_dict=saved)
    if isinstance(compressor, saef.TopK):
        second.state.load_state_dict(first.state.state_dict())
    same(flat(second.train(4, 8).net), flat(first.train(4, 8).net))
    return "ok"


@pytest.mark.parametrize("compressor", [saef.Identity(), ERRORS], ids=repr)
@RULES
def test_checkpoints_by_torch_distributed(pool: RankPool, compressor: Any, optimizer: str, ranks: int) -> None:
    assert pool.run(by_dcp, compressor, optimizer, ranks=ranks) == ["ok"] * ranks


def without_momentum(group: dist.ProcessGroup) -> str:
    run = Run(group, saef.Identity(), momentum=0.0).train(0, 3)
    assert [list(s) for s in run.optimizer.state_dict()["state"].values()] == [["saef_step"]]
    same(flat(Run(group, saef.Identity(), momentum=0.0).load(run.saved()).train(3, 5).net), flat(run.train(3, 5).net))
    run.state.detach()
    assert all(not s for s in run.optimizer.state_dict()["state"].values())
    return "ok"


def test_without_momentum_there_is_the_mark_alone(pool: RankPool) -> None:
    assert pool.run(without_momentum, ranks=2) == ["ok"] * 2


def to_torch(group: dist.ProcessGroup) -> str:
    """v of a coordinate is negative; what is saved torch's AdamW goes on from, and saef's own state has it all."""
    run = Run(group, ERRORS, "AdamW", eps=1e-8).train(0, 3)
    moments = run.state.engine.memory.m
    moments[1, 5] = -0.5
    saved = run.optimizer.state_dict()["state"]
    assert all(v["exp_avg_sq"].min() >= 0 for v in saved.values())
    assert torch.equal(torch.cat([v["exp_avg"].reshape(-1) for v in saved.values()]), moments[0])
    assert torch.equal(kept(run), run.state.m)  # what is saved is a copy
    plain = Run(group, None, "AdamW").load(run.saved()).train(3, 5)
    assert bool(flat(plain.net).isfinite().all())
    assert {float(plain.optimizer.state[p]["step"]) for p in plain.net.parameters()} == {5.0}
    before = run.state.m.clone()
    again = Run(group, ERRORS, "AdamW")
    again.state.load_state_dict(run.state.state_dict())
    assert torch.equal(again.state.m, before) and torch.equal(kept(again), before)
    run.state.detach()
    assert not run.optimizer._optimizer_state_dict_post_hooks and not any(run.optimizer.state.values())
    return "ok"


def test_torchs_adamw_goes_on_from_what_is_saved(pool: RankPool) -> None:
    assert pool.run(to_torch, ranks=2) == ["ok"] * 2


def handed_back(group: dist.ProcessGroup, optimizer: str, compressor: saef.Compressor, flush: bool) -> list[Tensor]:
    """Back to plain training, from an errand or two ago: with the momentum only where the ranks have one."""
    late = Run(group, compressor, optimizer).train(0, 3)
    late.state.flush()
    late.train(3, 4).state.detach()
    alone = dist.get_world_size(group) == 1
    assert any(late.optimizer.state.values()) == alone
    run = Run(group, compressor, optimizer).train(0, 4)
    if flush:
        run.state.flush()
    run.state.detach()
    assert all(saved >= 0 for saved in map(torch.min, run.saved_second()))
    assert not any("saef_step" in state for state in run.optimizer.state.values())
    momentum = kept(run)
    run.train(4, 8)
    if isinstance(compressor, saef.Identity) and (alone or optimizer == "SGD"):
        same(flat(run.net), flat(Run(group, None, optimizer).train(0, 8).net))
    return [momentum, flat(run.net)]


@pytest.mark.parametrize("compressor", [saef.Identity(), ERRORS], ids=repr)
@pytest.mark.parametrize(("optimizer", "ranks", "flush"), [("SGD", 2, True), ("AdamW", 3, True), ("AdamW", 1, False)])
def test_flush_and_detach_hand_the_momentum_back(
    pool: RankPool, optimizer: str, ranks: int, flush: bool, compressor: Any
) -> None:
    first, *others = pool.run(handed_back, optimizer, compressor, flush, ranks=ranks)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def counts_differ(group: dist.ProcessGroup) -> str:
    run = Run(group, None, "AdamW").train(0, 3)
    run.optimizer.state[run.net[0].bias]["step"] -= 1
    run.attach(saef.Identity())
    with pytest.raises(RuntimeError, match=r"between 2 and 3 steps .*fewer of \['0\.bias'\]") as caught:
        run.train(3, 4)
    return str(caught.value)


def test_parameters_with_other_numbers_of_steps_are_refused(pool: RankPool) -> None:
    assert all('set the "step" of each' in said for said in pool.run(counts_differ, ranks=2))


def fused(group: dist.ProcessGroup) -> bool:
    """A fused optimizer's own claim that it scales by itself outlives saef's."""
    run = Run(group, saef.Identity(), "AdamW", fused=True).train(0, 2)
    run.state.detach()
    return bool(run.optimizer._step_supports_amp_scaling)


def test_a_fused_optimizer_is_as_it_was_after_detach(pool: RankPool) -> None:
    assert pool.run(fused, ranks=1) == [True]


def scaled(name: str, of: dict[str, Any]) -> None:
    of[name] = of[name] * 0.1


def put_elsewhere(name: str, of: dict[str, Any]) -> None:
    of[name].data = of[name] * 0.1


EDITS: dict[str, Any] = {
    "scaled": scaled,
    "scaled in place": lambda name, of: of[name].mul_(0.1),
    "put elsewhere": put_elsewhere,
    "zeros": lambda name, of: of.update({name: torch.zeros_like(of[name])}),
    "removed": lambda name, of: of.pop(name),
    "None": lambda name, of: of.update({name: None}),
}


def edit(group: dist.ProcessGroup, how: str, which: slice) -> str:
    """The momentum of some parameters is another between two steps: it counts as in torch's own optimizer."""
    found = []
    for compressor in (None, saef.Identity()):
        run = Run(group, compressor).train(0, 4)
        for p in [*run.net.parameters()][which]:
            EDITS[how]("momentum_buffer", run.optimizer.state[p])
        found.append(flat(run.train(4, 8).net))
    same(*found)
    return "ok"


@pytest.mark.parametrize("which", [slice(None), slice(1), slice(2, 3)], ids=["all", "the first", "another"])
@pytest.mark.parametrize("how", EDITS)
def test_momentum_that_was_edited_counts(pool: RankPool, how: str, which: slice) -> None:
    assert pool.run(edit, how, which, ranks=2) == ["ok"] * 2


def begin_anew(group: dist.ProcessGroup, how: str) -> list[Tensor]:
    """Adam's moments are zeroed, and its steps, by other tensors or in place."""
    found = []
    for compressor in (None, saef.Identity()):
        run = Run(group, compressor, "AdamW").train(0, 4)
        for p in run.net.parameters():
            of = run.optimizer.state[p]
            for name in ("exp_avg", "exp_avg_sq", "step"):
                of[name] = of[name].zero_() if how == "in place" else torch.zeros_like(of[name])
        found.append(flat(run.train(4, 8).net))
    return found


@pytest.mark.parametrize("how", ["in place", "others"])
def test_moments_and_steps_of_zero_begin_anew(pool: RankPool, how: str) -> None:
    for plain, ours in pool.run(begin_anew, how, ranks=1):
        same(ours, plain)


def try_and_go_back(group: dist.ProcessGroup) -> str:
    """As learning rate finders do: both are loaded as they were before the first step."""
    run = Run(group, ERRORS)
    before = run.saved()
    run.train(0, 4).load(before)
    with pytest.raises(RuntimeError, match="before its first step, but this state's errors are of step 4") as caught:
        run.train(0, 1)
    run.state.reset_errors()
    expected = Run(group, ERRORS).train(0, 3)
    same(flat(run.train(0, 3).net), flat(expected.net))
    return str(caught.value)


def test_a_state_of_before_the_first_step_has_no_errors(pool: RankPool) -> None:
    for said in pool.run(try_and_go_back, ranks=2):
        assert "state.reset_errors()" in said
