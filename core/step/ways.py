"""The two ways of keeping x, and which one serves.

Copies   x lies in a flat vector, and is copied into the parameters. Any device; for bf16 parameters the
         flat vector is their float32 master.
Swaps    x stays in the parameters' own storage; x_half lies in a flat vector, and in a window `p.data`
         points there: float32 and float64. `OnCPU`, where memory traffic is what a step costs, x_half is
         written by the kernel that has e and x in cache; `OnCUDA`, where launches cost too, by one at the
         forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..rules import step_ahead
from ..wire.codec import Block, lay_out
from ..wire.compressors import Identity
from ..wire.kernels.table import STATE, Update, Worker
from ..wire.plan import Plan
from .weights import Weights, is_dense

SAMPLES = 64  # entries of each parameter by which a change through `.data` is noticed
FULL = {torch.float32, torch.float64}


@final
class Copies(Weights):
    """`flat` is x."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        with torch.no_grad():
            for p, x in zip(self.parameters, self.views, strict=True):
                x.copy_(p)

    def x(self) -> Tensor:
        return self.flat

    def x_half(self) -> tuple[Tensor, float]:
        return self.flat, self.s

    @torch.no_grad()
    def absorb(self) -> None:
        for p, x in zip(self.parameters, self.views, strict=True):
            # A bf16 parameter is x rounded: only where it was changed does it replace the master.
            x.copy_(p if p.dtype == self.dtype else torch.where(x.to(p.dtype) == p, x, p.to(self.dtype)))

    @torch.no_grad()
    def write(self, x: Sequence[Tensor]) -> None:
        for mine, value in zip(self.views, x, strict=True):
            mine.copy_(value)
        self._show_x()  # which autograd sees

    def _derive(self, e: Tensor, averaged: slice) -> None:
        self._cut_errors(e)  # x_half is made when it is shown

    @torch.no_grad()
    def _show_half(self) -> None:
        for p, x, error in zip(self.parameters, self.views, self._errors, strict=True):
            p.copy_(step_ahead(x, error, self.s))

    @torch.no_grad()
    def _show_x(self) -> None:
        torch._foreach_copy_(self.parameters, self.views)

    def committed(self) -> None:
        self._show_x()
        super().committed()

    def parts(self) -> list[Tensor]:
        return list(self.flat.split(self.numels))

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        self._kernels.commit(plan.send.table, update, worker, message)
        self._kernels.subtract(plan.apply.table, rates, replies, self.flat)


class Swaps(Weights):
    """`flat` is x_half, during a step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        self._x = [p.data for p in self.parameters]

    def x(self) -> Tensor:
        return torch.cat(self.parts())

    def x_half(self) -> tuple[Tensor, float]:
        return self.flat, 0.0

    def absorb(self) -> None:
        self._x = [p.data for p in self.parameters]

    @torch.no_grad()
    def write(self, x: Sequence[Tensor]) -> None:
        for mine, value in zip(self._x, x, strict=True):
            mine.copy_(value)
        torch.autograd.graph.increment_version(self.parameters)

    def _show_half(self) -> None:
        for p, half in zip(self.parameters, self.views, strict=True):
            p.data = half

    def _show_x(self) -> None:
        for p, x in zip(self.parameters, self._x, strict=True):
            p.data = x

    def parts(self) -> list[Tensor]:
        return [_line(x) for x in self._x]


@final
class OnCPU(Swaps):
    """`flat` is made ready by the commit of the step before, unless x or e has changed since."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        self._ready: list[tuple[tuple[int, int], Tensor]] = []  # of each x when `flat` was made from it

    def write(self, x: Sequence[Tensor]) -> None:
        super().write(x)
        self._ready = []

    def _derive(self, e: Tensor, averaged: slice) -> None:
        errors = self._cut_errors(e)
        ready = len(self._ready) == len(self._x) and all(
            mark == made and torch.equal(_sample(x), sample)
            for x, mark, (made, sample) in zip(self._x, self._marks, self._ready, strict=True)
        )
        for i, (x, half) in enumerate(zip(self._x, self.views, strict=True)):
            at, n = self.offsets[i], self.numels[i]
            if not ready or (at < averaged.stop and averaged.start < at + n):
                if self.s == 1.0:
                    torch.sub(x, errors[i], out=half)  # as below, without a temporary
                else:
                    half.copy_(step_ahead(x, errors[i], self.s) if errors else x)
        if not ready:
            self._note()

    def follow(self, e: Tensor) -> None:
        self.absorb()
        self.step_ahead(e, slice(0, 0))  # which looks at samples of x, too

    def committed(self) -> None:
        super().committed()
        self._marks = self._marks_now()
        self._note()

    def _note(self) -> None:
        """`flat` is made from x as it is now."""
        self._ready = [(mark, _sample(x).clone()) for mark, x in zip(self._marks, self._x, strict=True)]

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        for i, table, reply_table in plan.of_parameter:
            of_x = worker._replace(x=_line(self._x[i]))
            self._kernels.advance(table, reply_table, update, of_x, message, rates, replies, self.flat, self.s)


@final
class OnCUDA(Swaps):
    """x of all parameters as one vector for the kernels, counted from where the first one lies in memory.

    So one launch serves all of them. `flat` is made from x at every forward: whatever has been done to x counts.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        self._starts = torch.tensor(self.offsets, device=self.device)
        whole = [Block(Identity(), Identity(), a, a, a, n, 0) for a, n in zip(self.offsets, self.numels, strict=True)]
        self._whole = lay_out(whole, self.dtype.itemsize, reply=False, served=False).table.to(self.device)
        self._shifts, self._tables = self._starts, WeakIdKeyDictionary()
        self._addresses: list[int] = []
        self.absorb()

    def absorb(self) -> None:
        super().absorb()
        addresses = [x.data_ptr() for x in self._x]
        if addresses != self._addresses:
            self._addresses, self._tables = addresses, WeakIdKeyDictionary()
            first, size = addresses[0], self.dtype.itemsize
            moved = [(a - first) // size - at for a, at in zip(addresses, self.offsets, strict=True)]
            self._shifts = torch.tensor(moved, device=self.device)

    def _at_x(self, table: Tensor) -> Tensor:
        """The table with STATE counted from the first parameter's x; kept, since kernels know a table by its object."""
        moved: Tensor | None = self._tables.get(table)
        if moved is None:
            self._tables[table] = moved = table.clone()
            parameter = torch.searchsorted(self._starts, table[:, STATE].contiguous(), right=True) - 1
            moved[:, STATE] += self._shifts[parameter]
        return moved

    def _derive(self, e: Tensor, averaged: slice) -> None:
        self._kernels.step_ahead(self._whole, self._at_x(self._whole), self._x[0], e, self.flat, self.s)

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        self._kernels.commit(plan.send.table, update, worker, message)
        self._kernels.subtract(self._at_x(plan.apply.table), rates, replies, self._x[0])


def create(model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> Weights:
    """Swaps where they are possible and pay, else Copies. `s`: the step-ahead coefficient."""
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
        raise ValueError(
            "DDP's mixed_precision exchanges the parameters' storage during a step, as saef does: use torch.autocast "
            "or bfloat16 parameters"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtypes, devices = {p.dtype for p in trainable}, {p.device.type for p in trainable}
    if len(dtypes) == 1 and dtypes <= FULL and all(map(is_dense, trainable)) and not _captured(model):
        if devices == {"cpu"}:
            return OnCPU(model, optimizer, s)
        if devices == {"cuda"}:
            return OnCUDA(model, optimizer, s)
    return Copies(model, optimizer, s)


def _captured(model: nn.Module) -> bool:
    """Whether `torch.cuda.make_graphed_callables` has a part of it: its graphs read the parameters' own storage."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return any(getattr(forward, "__module__", None) == torch.cuda.graphs.__name__ for forward in forwards)


def _line(x: Tensor) -> Tensor:
    """The entries of a tensor without gaps in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _sample(x: Tensor) -> Tensor:
    return _line(x)[:: max(1, x.numel() // SAMPLES)]
