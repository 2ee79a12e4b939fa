"""A rule is one object: a rule of any number of vectors goes through table, memory and the kernels' definition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import saef
from saef.rules import RULES, SGD, AdamW, AnyHyper, Difference, Rule, adamw, rule_for
from saef.rules.rule import LR, table
from saef.rules.sgd import COLUMNS, PLAIN, Hyper
from saef.step.memory import Memory
from saef.wire.codec import Block, lay_out
from saef.wire.kernels import reference
from saef.wire.kernels.table import Update, Worker


class TwoHyper(NamedTuple):
    lr: float
    beta: float
    factor: float


@dataclass(frozen=True)
class Two(Rule):
    """Two vectors a coordinate: a running sum of g, and one of g^2."""

    kind: ClassVar[int] = 77
    hyper: ClassVar[type[Any]] = TwoHyper
    names: ClassVar[tuple[str, ...]] = ("first", "second")

    @classmethod
    def reads(cls, optimizer: torch.optim.Optimizer) -> bool:
        return False

    def read(self, optimizer: torch.optim.Optimizer, step: int, workers: int) -> list[AnyHyper]:
        return [TwoHyper(0.5, 0.25, 2.0)]

    def vectors(self, hyper: Sequence[AnyHyper]) -> int:
        return 2

    def reads_x_half(self, hyper: Sequence[AnyHyper]) -> bool:
        return False

    @staticmethod
    def update(h: TwoHyper, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
        g = g * h.factor
        new = m * h.beta + torch.stack([g, g * g])
        return new, new[0] + new[1]

    @property
    def decays_at_x(self) -> bool:
        return False

    def keeps_decay(self, groups: Sequence[Mapping[str, Any]], hyper: Sequence[AnyHyper]) -> bool:
        return False

    def decay(self, weight_decay: float, h: TwoHyper, x: Tensor, m: Tensor) -> None:
        raise AssertionError("there is none")


def test_a_rule_with_two_vectors_goes_through_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, Two.kind, Two)
    rule, n, d = Two(), 5, 9  # one block, at 3 of 9 coordinates
    hyper = table(rule.read(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0, 1), torch.float64, torch.device("cpu"))
    g, m, e, x = torch.randn(n).double(), torch.randn(2, d).double(), torch.randn(d).double(), torch.randn(d).double()
    layout = lay_out([Block(saef.Identity(), saef.Identity(), 0, 3, 3, n, 0)], 8, reply=False, served=False)
    message = torch.zeros(layout.message_bytes, dtype=torch.uint8)
    update, worker = Update(rule.kind, hyper, 1.0, True), Worker(g, m, e, x)
    at = slice(3, 3 + n)
    m_new, u = rule.update(TwoHyper(0.5, 0.25, 2.0), g, m[:, at], x[at])
    D, before = e[at] + u * 0.5, m.clone()

    reference.compress(layout.table, update, worker, message)
    assert torch.equal(message.view(torch.float64), D) and torch.equal(m, before)
    reference.commit(layout.table, update, worker, message)
    assert torch.equal(m[:, at], m_new) and not e[at].any()  # all was sent
    assert torch.equal(m[:, :3], before[:, :3]) and torch.equal(m[:, 8:], before[:, 8:])


def test_memory_grows_and_keeps_what_is_there() -> None:
    memory = Memory(torch.zeros(3), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0))
    memory.grow(1, decay=False)
    memory.m[0] = torch.arange(3.0)
    memory.grow(0, decay=True)
    assert memory.m.shape == (1, 3) and memory.m_decay.shape == (3,)
    memory.grow(2, decay=True)
    assert memory.m.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_columns_are_the_fields_in_one_order() -> None:
    assert Hyper._fields[LR] == "lr" and COLUMNS == len(Hyper._fields)
    assert adamw.COLUMNS == len(adamw.Hyper._fields)
    for rule in RULES.values():
        assert rule.hyper._fields[LR] == "lr" and "factor" in rule.hyper._fields
    rows = table([PLAIN, PLAIN._replace(momentum=0.5, nesterov=True)], torch.float32, torch.device("cpu"))
    assert rows.tolist() == [[1, 0, 1, 0, 0, 1], [1, 0.5, 1, 1, 0, 1]]


def test_a_rule_is_found_by_the_optimizers_own_step() -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert rule_for(sgd, outer=True, signum=False) == SGD(outer=True, signum=False)
    assert RULES[SGD.kind] is SGD


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_mu_sgd_leaves_what_it_kept(nesterov: bool) -> None:
    h = PLAIN._replace(momentum=0.0, nesterov=nesterov, factor=2.0, lr=0.5)
    g, m, x = torch.tensor([1.0, -3.0]), torch.tensor([[torch.inf, 5.0]]), torch.tensor([1.0, 2.0])
    m_new, u = SGD.update(h, g, m, x)
    assert m_new.tolist() == [[torch.inf, 5]] and u.tolist() == [2, -6]
    decayed = torch.tensor([7.0, 8.0])
    SGD(outer=True).decay(0.5, h, x, decayed)
    assert decayed.tolist() == [7, 8] and x.tolist() == [0.75, 1.5]


# ---- AdamW --------------------------------------------------------------------------------------------------


def groups_of(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adamw_and_adam_are_one_rule(kind: type[torch.optim.Optimizer]) -> None:
    for options in ({}, {"foreach": True}, {"fused": True}, {"maximize": True}, {"lr": torch.tensor(0.1)}):
        assert rule_for(groups_of(kind, **options), outer=False, signum=False) == AdamW(noise_correction=True)
    assert RULES[AdamW.kind] is AdamW


def test_what_adamw_reads_in_a_step() -> None:
    """Corrections in float64, K in the share of g^2; t = 0 has no momentum before it."""
    optimizer = groups_of(betas=(0.5, 0.75), eps=0.25, weight_decay=0.125)
    (first,) = AdamW().read(optimizer, 0, 4)
    assert first == adamw.Hyper(0.1, 0.5, 0.5, 0.75, 0.25, 0.0, 2.0, 4.0, 0.25, 1.0, 0.0, 0.125, 1.0)
    (second,) = AdamW().read(optimizer, 1, 4)
    expected = adamw.Hyper(0.1, 0.5, 0.5, 0.75, 0.0625, 0.375, 4 / 3, 16 / 7, 0.25, 1.0, 0.0, 0.125, 1.0)
    assert list(second) == pytest.approx(list(expected), rel=1e-15)
    (plain,) = AdamW(noise_correction=False).read(optimizer, 1, 4)
    assert (plain.own, plain.cross, plain.bound) == (0.25, 0.0, 1.0)
    (alone,) = AdamW().read(optimizer, 1, 1)
    assert (alone.own, alone.cross, alone.bound) == (0.25, 0.0, float("inf"))
    optimizer.param_groups[0].update(lr=torch.tensor(0.5), betas=(0.0, 0.0), maximize=True)
    (live,) = AdamW().read(optimizer, 1, 1)
    assert (live.lr, live.beta1, live.correct2, live.factor) == (0.5, 0.0, 1.0, -1.0)


def test_adams_decay_is_in_the_gradient_and_adamws_at_x() -> None:
    for kind, coupled in ((torch.optim.Adam, True), (torch.optim.AdamW, False)):
        (h,) = AdamW().read(groups_of(kind, weight_decay=0.25), 3, 2)
        assert (h.weight_decay, h.decay_at_x) == ((0.25, 0.0) if coupled else (0.0, 0.25))  # type: ignore[attr-defined]
        x = torch.ones(3)
        AdamW().decay(0.25, h, x, torch.empty(0))  # type: ignore[arg-type]
        assert x.tolist() == [1.0 if coupled else torch.tensor(1 - 0.1 * 0.25).item()] * 3
    if "decoupled_weight_decay" in groups_of(torch.optim.Adam).param_groups[0]:
        (h,) = AdamW().read(groups_of(torch.optim.Adam, weight_decay=0.25, decoupled_weight_decay=True), 3, 2)
        assert h.decay_at_x == 0.25  # type: ignore[attr-defined]


def test_update_is_torchs_adamw_for_one_worker() -> None:
    """In float64, to rounding, for 20 steps of one block whose settings change."""
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    x, m = p.detach().clone(), torch.zeros(2, 50, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for t in range(20):
        optimizer.param_groups[0].update(lr=0.1 * (t % 4), weight_decay=0.1 * (t % 3), betas=(0.8 - t % 2 / 10, 0.9))
        p.grad = torch.sin(3 * p.detach() + t)
        (h,) = AdamW().read(optimizer, t, 1)
        m, u = AdamW.update(h, torch.sin(3 * x + t), m, x)  # type: ignore[arg-type]
        AdamW().decay(0.0, h, x, torch.empty(0))  # type: ignore[arg-type]
        x -= h.lr * u
        optimizer.step()
        torch.testing.assert_close(x, p.detach(), rtol=0, atol=1e-13)
    state = optimizer.state[p]
    torch.testing.assert_close(m, torch.stack([state["exp_avg"], state["exp_avg_sq"]]), rtol=0, atol=1e-13)


BAD = [
    ({"amsgrad": True}, r"amsgrad=True: a maximum .*Use amsgrad=False"),
    ({"eps": 0.0}, r"eps=0\.0: .*Use eps=1e-8"),
    ({"eps": 1e-60}, "which float32 still holds"),
    ({"betas": (1.0, 0.9)}, r"betas=\(1\.0, 0\.9\).*0 <= beta < 1"),
    ({"betas": (0.9, -0.1)}, "0 <= beta < 1"),
    ({"betas": (0.9, float("nan"))}, "0 <= beta < 1"),
    ({"lr": -1.0}, "finite lr >= 0"),
    ({"lr": float("inf")}, "finite lr >= 0"),
    ({"weight_decay": -0.1}, "finite weight_decay >= 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_adamw_refuses(options: dict[str, Any], message: str) -> None:
    """Also what was written into the groups later."""
    optimizer = groups_of()
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=f"param group 0 has .*{message}"):
        AdamW().read(optimizer, 0, 4)


def test_methods_of_momentum_sgd_refuse_adamw() -> None:
    with pytest.raises(ValueError, match="AdamW decays at x by itself.*leave weight_decay_mode out"):
        rule_for(groups_of(), outer=True, signum=False)
    with pytest.raises(ValueError, match="MajorityVote is of signSGD and signum"):
        rule_for(groups_of(), outer=True, signum=True)


class Half(torch.optim.AdamW):
    """A step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [Half, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_relatives_of_adam_take_their_own_steps(kind: type[torch.optim.Optimizer]) -> None:
    rule = rule_for(groups_of(kind), outer=False, signum=False)
    assert rule == Difference(kind.__name__, 1) and not rule.of_gradients
    assert rule.read(groups_of(kind)) == [PLAIN] * len(groups_of(kind).param_groups)
    g = torch.tensor([1.0, -2.0])
    m, u = rule.update(PLAIN, g, g.new_empty(0, 2), g)
    assert torch.equal(u, g) and not m.numel() and not rule.vectors([PLAIN])


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_what_is_saved_torch_can_take_the_root_of(name: str) -> None:
    v = torch.tensor([-1.0, 2.0])
    assert AdamW.saved(name, v).tolist() == ([0.0, 2.0] if name == "exp_avg_sq" else [-1.0, 2.0])
    assert v.tolist() == [-1.0, 2.0]
