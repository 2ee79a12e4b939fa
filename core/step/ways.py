"""The two ways of keeping x, and which one serves.

Copies   x lies in a flat vector, and is copied into the parameters. Any device; for bf16 parameters the
         flat vector is their float32 master. FSDP's `replicate` has views of the parameters' storage.
Swaps    x stays in the parameters' own storage; x_half lies in a flat vector, and in a window `p.data`
         points there: float32 and float64. `OnCPU`, where memory traffic is what a step costs, x_half is
         written by the kernel that has e and x in cache; `OnCUDA`, where launches cost too, by one at the
         forward.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..rules import step_ahead
from ..wire import kernels
from ..wire.codec import Block, lay_out
from ..wire.compressors import Identity
from ..wire.kernels.table import STATE, Update, Worker
from ..wire.plan import Plan
from .fsdp import uses_fsdp
from .weights import Weights

FULL = {torch.float32, torch.float64}


class Copying(Weights):
    """`flat` is x; subclasses say how the parameters become x_half, and x."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        with torch.no_grad():
            for p, x in zip(self.held, self.views, strict=True):
                x.copy_(p)
        self._half = self.flat  # x_half, where it takes more than x and e: with `server`
        self._locals: list[Tensor] = []  # X, where an optimizer steps on it

    @torch.no_grad()
    def take_over(self, old: Weights) -> None:
        super().take_over(old)
        if isinstance(old, Copying):  # a bf16 parameter is x rounded
            x = {id(p): view for p, view in zip(old.parameters, old.views, strict=True)}
            for p, mine in zip(self.parameters, self.views, strict=True):
                if id(p) in x:
                    mine.copy_(x[id(p)])

    def x(self) -> Tensor:
        return self.flat

    def x_half(self) -> tuple[Tensor, float]:
        return (self.flat, self.s) if self.server is None else (self._half, 0.0)

    @torch.no_grad()
    def _absorb(self) -> None:
        for p, x in zip(self.held, self.views, strict=True):
            # A bf16 parameter is x rounded: only where it was changed does it replace the master.
            x.copy_(p if p.dtype == self.dtype else torch.where(x.to(p.dtype) == p, x, p.to(self.dtype)))

    @torch.no_grad()
    def write(self, x: Sequence[Tensor]) -> None:
        for mine, value in zip(self.views, x, strict=True):
            mine.copy_(value)
        self._show_x()  # which autograd sees

    def _differs(self) -> Tensor:
        both = zip(self.held, self.views, strict=True)
        return torch.stack([((p != x.to(p.dtype)) & ~(p.isnan() & x.isnan())).any() for p, x in both]).any()

    def _derive(self, e: Tensor, averaged: slice) -> None:
        self._cut_errors(e)  # x_half is made when it is shown
        if self.server is not None:  # or here, in a vector of its own
            self._half = step_ahead(self.flat, e, self.s)
            self.server.step(self._half)
        if self.local:
            if not self._locals:
                self._locals = [torch.empty_like(p) for p in self.held]
            halves = self.cut(self._half) if self.server is not None or not self._errors else None
            for i, mine in enumerate(self._locals):
                mine.copy_(halves[i] if halves else step_ahead(self.views[i], self._errors[i], self.s))

    @torch.no_grad()
    def _copy_half(self) -> None:
        """`held` <- x_half, or X."""
        self.rest()
        if self.local:
            torch._foreach_copy_(self.held, self._locals)
            return
        if self.server is not None:
            torch._foreach_copy_(self.held, self.cut(self._half))
            return
        for p, x, error in zip(self.held, self.views, self._errors, strict=True):
            p.copy_(step_ahead(x, error, self.s))

    @torch.no_grad()
    def _copy_x(self) -> None:
        """`held` <- x."""
        self.rest()
        torch._foreach_copy_(self.held, self.views)

    @torch.no_grad()
    def _keep_local(self) -> None:
        torch._foreach_copy_(self._locals, self.held)

    def local_of(self, i: int) -> Tensor:
        return self._locals[i]

    def _x_of(self, i: int) -> Tensor:
        return self.views[i]

    def committed(self) -> None:
        self._show_x()
        super().committed()

    def parts(self) -> list[Tensor]:
        return list(self.flat.split(self.numels))

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        self._kernels.commit(plan.send.table, update, worker, message)
        self.apply(plan, rates, replies)

    def apply(self, plan: Plan, rates: Tensor, replies: Tensor) -> None:
        self._kernels.subtract(plan.apply.table, rates, replies, self.flat)


@final
class Copies(Copying):
    """Of whole parameters."""

    def _show_half(self) -> None:
        self._copy_half()

    def _show_x(self) -> None:
        self._copy_x()


class Swaps(Weights):
    """`flat` is x_half, during a step. For the kernels x of all parameters lies in one vector, `_memory`.

    It begins with the x that lies lowest and spans them all, with whatever lies between: so one call serves them all.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        self._x: list[Tensor] = []
        self._addresses: list[int] = []
        self._sizes = [n * self.dtype.itemsize for n in self.numels]
        self._made_from: Tensor | None = None  # [parameters] fingerprints of the x that `flat` was made from
        self._starts = torch.tensor(self.offsets, device=self.device)
        self._halves_at = [*map(Tensor.data_ptr, self.views)]
        self.absorb()

    def x(self) -> Tensor:
        return torch.cat(self.parts())

    def x_half(self) -> tuple[Tensor, float]:
        return self.flat, 0.0

    def _absorb(self) -> None:
        addresses = self._seen[0]
        if addresses != self._addresses:
            self._x, self._addresses = [p.data for p in self.parameters], addresses
            size, filled = self.dtype.itemsize, [a for a, n in zip(addresses, self.numels, strict=True) if n]
            lowest = min(filled, default=0)
            self._in_memory = torch.tensor([(max(a, lowest) - lowest) // size for a in addresses], device="cpu")
            self._memory = self._span(next((x for x in self._x if x.data_ptr() == lowest), self.flat))
            self._shifts = self._in_memory.to(self.device) - self._starts
            self._tables: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _span(self, lowest: Tensor) -> Tensor:
        """`_memory`: kernels on a GPU look at nothing but where it begins."""
        return lowest

    def _at_x(self, table: Tensor) -> Tensor:
        """The table with STATE counted in `_memory`; kept, since kernels know a table by its object."""
        moved: Tensor | None = self._tables.get(table)
        if moved is None:
            self._tables[table] = moved = table.clone()
            moved[:, STATE] += self._shifts[self._parameter_of(table)]
        return moved

    def _parameter_of(self, table: Tensor) -> Tensor:
        """[B] the number of each block's parameter."""
        return torch.searchsorted(self._starts, table[:, STATE].contiguous(), right=True) - 1

    @torch.no_grad()
    def write(self, x: Sequence[Tensor]) -> None:
        for mine, value in zip(self._x, x, strict=True):
            mine.copy_(value)
        torch.autograd.graph.increment_version(self.parameters)

    def _half_places(self) -> list[int]:
        return self._halves_at

    def _show_half(self) -> None:
        exchange(self.parameters, self.views)

    def _show_x(self) -> None:
        exchange(self.parameters, self._x)

    def apply(self, plan: Plan, rates: Tensor, replies: Tensor) -> None:
        self._kernels.subtract(self._at_x(plan.apply.table), rates, replies, self._memory)

    def _keep_local(self) -> None:
        """The optimizer has stepped on `flat` itself."""

    def local_of(self, i: int) -> Tensor:
        return self.views[i]

    def _x_of(self, i: int) -> Tensor:
        return self._x[i]

    def parts(self) -> list[Tensor]:
        return [line(x) for x in self._x]

    def _differs(self) -> Tensor:
        return self._differ(self._prints()).any()

    def _prints(self) -> Tensor:
        """[parameters] fingerprints of x: writes through `.data` and numpy leave no other trace."""
        return kernels.fingerprints_at(self._addresses, self._sizes, self.device)

    def _differ(self, found: Tensor) -> Tensor:
        """[parameters] bool: whether x, with these fingerprints, is not what `flat` was made from."""
        return torch.ones_like(found, dtype=torch.bool) if self._made_from is None else found != self._made_from


@final
class OnCPU(Swaps):
    """`flat` is made ready by the commit of the step before, unless x or e has changed since.

    That a fingerprint of every x tells, for half of what a copy costs.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        from ..wire.kernels import cpu  # numba

        super().__init__(model, optimizer, s)
        self._cpu = cpu
        self._to_come = torch.zeros(
            len(self.numels), dtype=torch.int64, device="cpu"
        )  # of what x becomes in the commit under way

    def write(self, x: Sequence[Tensor]) -> None:
        super().write(x)
        self._made_from = None

    def _span(self, lowest: Tensor) -> Tensor:
        numel = max(1, *(at + n for at, n in zip(self._in_memory.tolist(), self.numels, strict=True)))
        memory = (ctypes.c_uint8 * (numel * self.dtype.itemsize)).from_address(lowest.data_ptr())
        return torch.frombuffer(memory, dtype=self.dtype)

    def _derive(self, e: Tensor, averaged: slice) -> None:
        errors, found = self._cut_errors(e), self._prints()
        stale = self._differ(found)
        if averaged.stop > averaged.start:
            ends = self._starts + torch.tensor(self.numels, device="cpu")
            stale |= (self._starts < averaged.stop) & (averaged.start < ends)
        for i in stale.nonzero().view(-1).tolist():
            x, half = self._x[i], self.views[i]
            if self.s == 1.0:
                torch.sub(x, errors[i], out=half)  # as below, without a temporary
            else:
                half.copy_(step_ahead(x, errors[i], self.s) if errors else x)
            if self.server is not None:
                self.server.step(self.flat, i)
        self._made_from = found

    def follow(self, e: Tensor) -> None:
        self.absorb()
        self.step_ahead(e, slice(0, 0))  # which looks at fingerprints, too

    def restart(self) -> None:
        super().restart()
        self._made_from = None

    def committed(self) -> None:
        super().committed()
        if self.server is not None:
            self.server.step(self.flat)  # what `advance` has made is x - s e_k
        self._marks, self._made_from = [self._seen[0], [v + 1 for v in self._seen[1]]], self._to_come
        self._to_come = torch.zeros_like(self._to_come)

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        table, reply_table = plan.send.table, self._at_x(plan.apply.table)
        worker, prints = worker._replace(x=self._memory), self._to_come.new_zeros(len(table))
        self._cpu.advance(table, reply_table, update, worker, message, rates, replies, self.flat, self.s, prints)
        self._to_come.index_add_(0, self._parameter_of(table), prints)


@final
class OnCUDA(Swaps):
    """`flat` is made from x at every forward: whatever has been done to x counts.

    Where it would count before that, by a fingerprint of every x, as `OnCPU`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        whole = [Block(Identity(), Identity(), a, a, a, n, 0) for a, n in zip(self.offsets, self.numels, strict=True)]
        self._whole = lay_out(whole, self.dtype.itemsize, reply=False, served=False).table.to(self.device)

    def _derive(self, e: Tensor, averaged: slice) -> None:
        self._kernels.step_ahead(self._whole, self._at_x(self._whole), self._memory, e, self.flat, self.s)
        if self.server is not None:
            self.server.step(self.flat)
        self._made_from = self._prints()

    def follow(self, e: Tensor) -> None:
        self.absorb()
        if self._marks != self._seen or bool(self._differs()):
            self.step_ahead(e, slice(0, 0))

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        self._kernels.commit(plan.send.table, update, worker, message)
        self.apply(plan, rates, replies)


def create(model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> Weights:
    """Swaps where they are possible and pay, else Copies. `s`: the step-ahead coefficient."""
    check_storage(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtypes, devices = {p.dtype for p in trainable}, {p.device.type for p in trainable}
    free = not (uses_fsdp(model) or captured(model))
    if free and len(dtypes) == 1 and dtypes <= FULL and all(map(kernels.is_dense, trainable)):
        if devices == {"cpu"}:
            return OnCPU(model, optimizer, s)
        if devices == {"cuda"}:
            return OnCUDA(model, optimizer, s)
    return Copies(model, optimizer, s)


def check_storage(model: nn.Module) -> None:
    """Raise ValueError if another exchanges the parameters' storage."""
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
        raise ValueError(
            "DDP's mixed_precision exchanges the parameters' storage during a step, as saef does: use torch.autocast "
            "or bfloat16 parameters"
        )


def captured(model: nn.Module) -> bool:
    """Whether `torch.cuda.make_graphed_callables` has a part of it: its graphs read the parameters' own storage."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return any(getattr(forward, "__module__", None) == torch.cuda.graphs.__name__ for forward in forwards)


def exchange(parameters: Sequence[Tensor], storages: Sequence[Tensor]) -> None:
    """p.data = its storage, of thousands of small ones without a loop in Python."""
    deque(map(_SET_DATA, parameters, storages), maxlen=0)


_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


def line(x: Tensor) -> Tensor:
    """The entries of a tensor without gaps in memory order."""
    return x.as_strided((x.numel(),), (1,))
