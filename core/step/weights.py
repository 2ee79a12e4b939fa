"""The parameters and x: the only place that writes to the model's parameters.

Between steps the parameters are x, during one x_half. x_half is derived from x and never the other way
round: restoring x as x_half + e would round, and replicas would drift apart. So x is kept during a step,
in one of two ways:

    Copies   x lies in a flat vector, and is copied into the parameters. Any device; for bf16
             parameters the flat vector is their float32 master.
    Swaps    x stays in the parameters' own storage; x_half lies in a flat vector, and for the time of a
             step `p.data` points there: float32 and float64. `OnCPU`, where memory traffic is what a step
             costs, x_half is written by the kernel that has e and x in cache; `OnCUDA`, where launches
             cost too, by one at the forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

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

SAMPLES = 64  # entries of each parameter by which a change through `.data` is noticed


class Weights(ABC):
    """What both ways share. Create with `create`.

    Args:
        model: its trainable parameters, shared ones once, in the order of `named_parameters()`.
        optimizer: every trainable parameter must be in exactly one of its groups.
        s: the step-ahead coefficient.

    Attributes:
        names, parameters, groups: of each trainable parameter: name (without what DDP and torch.compile put
            before it), tensor, index of its param group.
        numels, offsets: size, and where it begins in a flat vector. Entries lie there in the parameter's
            memory order, as in DDP's buckets.
        dtype: float64 for a float64 model, else float32: of x, errors, momentum and scalars on the wire.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = _plain([name for name, _ in named])
        self.parameters: list[Tensor] = [p for _, p in named]
        self.groups = _groups(self.names, self.parameters, optimizer)
        self.dtype = _master_dtype(self.names, self.parameters)
        self.numels = [p.numel() for p in self.parameters]
        self.offsets = [sum(self.numels[:i]) for i in range(len(self.numels))]
        self.device = self.parameters[0].device
        self.flat = torch.empty(sum(self.numels), dtype=self.dtype, device=self.device)
        self.views = self.cut(self.flat)
        self.s = s
        self._kernels = kernels.select(self.device)
        self._versions: list[int] = []

    def watch(self) -> None:
        """Begin to notice changes of the parameters, which would be lost while they are x_half."""
        self._versions = [p._version for p in self.parameters]

    def changed(self) -> list[str]:
        """Names of the parameters that were changed in place since `watch`."""
        now = [p._version for p in self.parameters]
        return [n for n, a, b in zip(self.names, self._versions, now, strict=True) if a != b]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat vector, each in its parameter's shape and strides."""
        return cut(flat, self.parameters)

    @abstractmethod
    def absorb(self) -> None:
        """x <- parameters, which are at x: whatever was done to them since the last step (loaded, clamped) counts."""

    @abstractmethod
    def x(self) -> Tensor:
        """x as a flat vector of the state's dtype: [d], possibly a copy."""

    @abstractmethod
    def write(self, x: Sequence[Tensor]) -> None:
        """x <- `x`, a tensor of any dtype for each parameter, of its shape; the parameters, which are at x, follow."""

    @abstractmethod
    def x_half(self) -> tuple[Tensor, float]:
        """(v, s) with x_half = v - s e, v flat: what weight decay needs during a step."""

    @abstractmethod
    def begin(self, e: Tensor, averaged: slice) -> None:
        """parameters <- x_half = x - s e (Alg. 1, line 9); after `absorb`.

        Args:
            e: [d], or empty if there is none, with s = 0.
            averaged: coordinates of e that were changed since the last commit.
        """

    @abstractmethod
    def restore(self) -> None:
        """parameters <- x."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """x of each parameter, 1-D in memory order; writing to it changes x."""

    @abstractmethod
    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        """m <- m', e <- D - C(D), x <- x - rates R for one bucket (Alg. 1, lines 10, 18, 25).

        Args:
            update, worker: as the message was made with; `worker.x` is what `x_half` gave.
            rates: what R of each param group is multiplied with.
        """


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
        self.restore()

    @torch.no_grad()
    def begin(self, e: Tensor, averaged: slice) -> None:
        if self.s != 0.0:
            for p, x, error in zip(self.parameters, self.views, self.cut(e), strict=True):
                p.copy_(step_ahead(x, error, self.s))

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self.views)

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

    def restore(self) -> None:
        for p, x in zip(self.parameters, self._x, strict=True):
            p.data = x

    def parts(self) -> list[Tensor]:
        return [x.as_strided((x.numel(),), (1,)) for x in self._x]


@final
class OnCPU(Swaps):
    """`flat` is made ready by the commit of the step before, unless x or e has changed since."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        super().__init__(model, optimizer, s)
        self._ready: list[tuple[int, int, Tensor]] = []  # of each x when `flat` was made from it

    def write(self, x: Sequence[Tensor]) -> None:
        super().write(x)
        self._ready = []

    @torch.no_grad()
    def begin(self, e: Tensor, averaged: slice) -> None:
        errors = self.cut(e) if e.numel() else []
        ready = len(self._ready) == len(self._x) and all(
            p.data_ptr() == address and p._version == version and torch.equal(_sample(x), sample)
            for p, x, (address, version, sample) in zip(self.parameters, self._x, self._ready, strict=True)
        )
        for i, (p, x, half) in enumerate(zip(self.parameters, self._x, self.views, strict=True)):
            at, n = self.offsets[i], self.numels[i]
            if not ready or (at < averaged.stop and averaged.start < at + n):
                if self.s == 1.0:
                    torch.sub(x, errors[i], out=half)  # as below, without a temporary
                else:
                    half.copy_(step_ahead(x, errors[i], self.s) if errors else x)
            p.data = half

    def restore(self) -> None:
        super().restore()
        self._ready = [
            (p.data_ptr(), p._version, _sample(x).clone()) for p, x in zip(self.parameters, self._x, strict=True)
        ]

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        parts = self.parts()
        for i, table, reply_table in plan.of_parameter:
            of_x = worker._replace(x=parts[i])
            self._kernels.advance(table, reply_table, update, of_x, message, rates, replies, self.flat, self.s)


@final
class OnCUDA(Swaps):
    """x of all parameters as one vector for the kernels, counted from where the first one lies in memory.

    So one launch serves all of them. `flat` is made from x at every `begin`: whatever has been done to x counts.
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

    @torch.no_grad()
    def begin(self, e: Tensor, averaged: slice) -> None:
        self._kernels.step_ahead(self._whole, self._at_x(self._whole), self._x[0], e, self.flat, self.s)
        for p, half in zip(self.parameters, self.views, strict=True):
            p.data = half

    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        self._kernels.commit(plan.send.table, update, worker, message)
        self._kernels.subtract(self._at_x(plan.apply.table), rates, replies, self._x[0])


def cut(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' parts of a flat vector, each in its parameter's shape and, if they have no gaps, strides."""
    views, at = [], 0
    for p in parameters:
        part = flat[at : at + p.numel()]
        views.append(part.as_strided(p.shape, p.stride()) if _dense(p) else part.view(p.shape))
        at += p.numel()
    return views


def create(model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> Weights:
    """Swaps where they are possible and pay, else Copies. `s`: the step-ahead coefficient."""
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
        raise ValueError(
            "DDP's mixed_precision exchanges the parameters' storage during a step, as saef does: use torch.autocast "
            "or bfloat16 parameters"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtypes, devices = {p.dtype for p in trainable}, {p.device.type for p in trainable}
    if len(dtypes) == 1 and dtypes <= FULL and all(map(_dense, trainable)) and not _captured(model):
        if devices == {"cpu"}:
            return OnCPU(model, optimizer, s)
        if devices == {"cuda"}:
            return OnCUDA(model, optimizer, s)
    return Copies(model, optimizer, s)


FULL = {torch.float32, torch.float64}


def _plain(names: list[str]) -> list[str]:
    """The names in the module that was wrapped, so that a checkpoint fits with and without the wrappers."""
    names = [name.replace("_orig_mod.", "") for name in names]
    return [name.removeprefix("module.") for name in names] if all(n.startswith("module.") for n in names) else names


def _sample(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))[:: max(1, x.numel() // SAMPLES)]


def _captured(model: nn.Module) -> bool:
    """Whether `torch.cuda.make_graphed_callables` has a part of it: its graphs read the parameters' own storage."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return any(getattr(forward, "__module__", None) == torch.cuda.graphs.__name__ for forward in forwards)


def _dense(p: Tensor) -> bool:
    """No gaps and no overlaps: entries can be taken in memory order."""
    return torch.empty_like(p, device="meta").stride() == p.stride()


def _groups(names: list[str], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> list[int]:
    """Index of each parameter's group."""
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known = {id(p) for p in parameters}
    missing = [name for name, p in zip(names, parameters, strict=True) if id(p) not in group_of]
    if missing:
        raise ValueError(
            f"trainable parameters {missing[:5]} are not in the optimizer: their gradients would be exchanged and "
            "never applied; add them, or set requires_grad=False before wrapping the model"
        )
    foreign = [
        tuple(p.shape)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and id(p) not in known
    ]
    if foreign:
        raise ValueError(
            f"the optimizer has trainable parameters of shapes {foreign[:5]} that are not in the model: nothing would "
            "exchange their gradients; give them an optimizer of their own"
        )
    return [group_of[id(p)] for p in parameters]


def _master_dtype(names: list[str], parameters: list[Tensor]) -> torch.dtype:
    dtypes = {p.dtype for p in parameters}
    known = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    if not dtypes <= known or (torch.float64 in dtypes and len(dtypes) > 1):
        raise TypeError(
            "parameters must be float32, bfloat16 and float16, or all float64, got "
            f"{sorted(map(str, dtypes))}: convert the model"
        )
    if len({p.device for p in parameters}) > 1 or any(p.is_sparse for p in parameters):
        found = {name: str(p.device) for name, p in zip(names, parameters, strict=True)}
        raise ValueError(f"all parameters must be dense and on one device, got {found}")
    return torch.float64 if torch.float64 in dtypes else torch.float32
