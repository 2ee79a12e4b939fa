"""What a local update rule is: how a worker's gradient becomes u, of which D = e + eta u is made (Alg. 1, 9-12).

Everything that differs between optimizers lies in a rule: its hyperparameters, which are the columns that the kernels
read; the vectors it keeps; how it reads the user's optimizer; its arithmetic; and what is decayed at x. The rest of
Algorithm 1 does not know which rule it has.

The letters are the paper's: x weights, e local error, m the rule's memory, g gradient, D what is compressed, eta
learning rate. Errors are in parameter units (they contain eta), so a changing learning rate needs no rescaling. The
functions here and in the rules fix the arithmetic, operation by operation: the fused kernels repeat it and are compared
with it bit by bit. Products and sums are rounded separately (no fused multiply-add).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

LR = 0  # the column of eta, in every rule's table


class AnyHyper(Protocol):
    """One parameter group's settings for one step, numbers of the state's dtype; each rule has its NamedTuple.

    Attributes:
        lr: eta; the first field.
        factor: multiplies g: the clipping coefficient over the loss scale, negative to maximize.
    """

    @property
    def lr(self) -> float: ...
    @property
    def factor(self) -> float: ...
    def __iter__(self) -> Iterator[Any]: ...
    def _replace(self, *, factor: float = ...) -> Self: ...


class Rule(ABC):
    """A rule with what the user chose of it. Subclasses are frozen dataclasses, one file each.

    Attributes:
        kind: the branch of the kernels that computes it.
        hyper: the NamedTuple of one group's settings; its fields are the columns that the kernels read.
        names: what torch calls the vectors that the rule keeps, in the optimizer's state.
        second: which of the vectors is a second moment, v; None if none is.
        counter: what torch calls the number of steps there, of each parameter; None if it counts none.
        of_gradients: whether u is made of gradients, as they arrive in the backward; else of what weights have moved.
    """

    kind: ClassVar[int]
    hyper: ClassVar[type[Any]]
    names: ClassVar[tuple[str, ...]]
    counter: ClassVar[str | None] = None
    second: ClassVar[int | None] = None
    of_gradients: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def reads(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the rule's arithmetic is that of this optimizer's `step`."""

    @abstractmethod
    def read(self, optimizer: torch.optim.Optimizer, step: int, workers: int) -> list[AnyHyper]:
        """The groups' settings for step t of K workers. ValueError on what would change the algorithm.

        Args:
            step, workers: t and K, on which some settings depend.
        """

    @abstractmethod
    def vectors(self, hyper: Sequence[AnyHyper]) -> int:
        """S: how many vectors of the model's size the rule keeps with these settings."""

    @staticmethod
    @abstractmethod
    def update(h: Any, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
        """(m', u) of one block: the definition that the kernels repeat.

        Args:
            h: the settings, the NamedTuple of this rule.
            g, x_half: [n].
            m: [S, n], or [0, n] where the rule keeps nothing; then m' is empty too.
        """

    @abstractmethod
    def reads_x_half(self, hyper: Sequence[AnyHyper]) -> bool:
        """Whether u depends on x_half itself with these settings, as by a coupled weight decay."""

    @staticmethod
    def saved(name: str, v: Tensor) -> Tensor:
        """A vector as torch's own optimizer can go on with it."""
        return v

    @property
    @abstractmethod
    def decays_at_x(self) -> bool:
        """Whether weight decay is applied to x, uncompressed, rather than to the gradient."""

    @abstractmethod
    def keeps_decay(self, groups: Sequence[Mapping[str, Any]], hyper: Sequence[AnyHyper]) -> bool:
        """Whether the decay at x keeps a vector m~ of its own."""

    @abstractmethod
    def decay(self, weight_decay: float, h: Any, x: Tensor, m: Tensor) -> None:
        """x <- x decayed, before it moves by R: in place, and m~ (empty where none is kept) likewise."""


def table(hyper: Sequence[AnyHyper], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[groups, columns]: what the kernels read, a row a group in the order of the fields."""
    rows = [[float(v) for v in h] for h in hyper]
    pinned = device.type == "cuda"  # nobody waits for the copy
    host = torch.tensor(rows, dtype=dtype, device="cpu", pin_memory=pinned)
    return host.to(device, non_blocking=True)


def step_ahead(x: Tensor, e: Tensor, s: float) -> Tensor:
    """x_half = x - s e (Alg. 1, line 9). s = 1: SAEF; 0: EF; between: the partial step of SA-PEF."""
    return x - (e if s == 1.0 else e * s)


def correct(h: AnyHyper, e: Tensor, u: Tensor, feedback: bool = True) -> Tensor:
    """D = e + eta u (Alg. 1, lines 11 and 12 together). Without feedback D = u."""
    return e + u * h.lr if feedback else u
