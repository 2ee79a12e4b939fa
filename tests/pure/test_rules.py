"""A rule is one object: a rule of any number of vectors goes through table, memory and the kernels' definition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import saef
from saef.rules import RULES, SGD, AnyHyper, Rule, rule_for
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

    def read(self, optimizer: torch.optim.Optimizer, step: int) -> list[AnyHyper]:
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
    hyper = table(rule.read(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0), torch.float64, torch.device("cpu"))
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
    memory = Memory(torch.zeros(3), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0))
    memory.grow(1, decay=False)
    memory.m[0] = torch.arange(3.0)
    memory.grow(0, decay=True)
    assert memory.m.shape == (1, 3) and memory.m_decay.shape == (3,)
    memory.grow(2, decay=True)
    assert memory.m.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_columns_are_the_fields_in_one_order() -> None:
    assert Hyper._fields[LR] == "lr" and COLUMNS == len(Hyper._fields)
    for rule in RULES.values():
        assert rule.hyper._fields[LR] == "lr" and "factor" in rule.hyper._fields
    rows = table([PLAIN, PLAIN._replace(momentum=0.5, nesterov=True)], torch.float32, torch.device("cpu"))
    assert rows.tolist() == [[1, 0, 1, 0, 0, 1], [1, 0.5, 1, 1, 0, 1]]


def test_a_rule_is_found_by_the_optimizers_own_step() -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert rule_for(sgd, outer=True, signum=False) == SGD(outer=True, signum=False)
    assert RULES[SGD.kind] is SGD
