"""The parameters and x: the only place that writes to the model's parameters.

The parameters are x, but for a *window* from the beginning of a training forward to the end of its backward, in which
they are x_half. x_half is derived from x and never the other way round: restoring x as x_half + e would round, and
replicas would drift apart. So x is kept in a window, in one of the two ways of `saef.step.ways`.

Autograd is told by the parameters' versions. Those of x rise as for any write; x_half has versions of its own, another
for each x_half there ever is. A backward through what was saved at x or at an earlier x_half so meets another version,
and torch raises as it does after any change in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..rules import step_ahead
from ..wire import kernels
from ..wire.compressors import Code, Compressor
from ..wire.kernels.table import Update, Worker
from ..wire.plan import Plan
from .fsdp import check_reduced, lay_down, modules_of, uses_fsdp
from .server_ahead import ServerAhead
from .spot_check import SpotCheck

_VERSION = attrgetter("_version")
_WHOLE: set[Any] = {Tensor, nn.Parameter}
T = TypeVar("T", bound=Tensor | None)
FIRST_HALF, NEXT_HALF = 1 << 30, 16  # versions of the x_half: from where on, and how far apart (writes in between show)


class Weights(ABC):
    """What both ways share. Create with `create`.

    Args:
        model: its trainable parameters, shared ones once, in the order of `named_parameters()`.
        optimizer: every trainable parameter must be in exactly one of its groups.
        s: the step-ahead coefficient.

    Attributes:
        names, parameters, groups: of each trainable parameter: name (without what DDP and torch.compile put
            before it), tensor, index of its param group.
        server: steps x_half ahead by the server's error too, if it is to.
        local: whether an optimizer steps on x_half, which then becomes X; kept from one window to the next.
        ahead: whether the parameters are x_half, or X. number: of that; another after every change of it.
        numels, offsets: size, and where it begins in a flat vector. Entries lie there in the parameter's
            memory order, as in DDP's buckets. flat, views: such a vector, and as it is cut.
        dtype: float64 for a float64 model, else float32: of x, errors, momentum and scalars on the wire.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._fsdp = modules_of(model) if uses_fsdp(model) else []
        self.names = _plain([name for name, _ in named])
        self.parameters: list[Tensor] = [p for _, p in named]
        self.groups = _groups(self.names, self.parameters, optimizer)
        self.dtype = _master_dtype(self.names, self.parameters)
        self.numels = [p.numel() for p in self.held]
        self.offsets = [0, *accumulate(self.numels)][:-1]
        self.device = self.parameters[0].device
        self.flat = torch.empty(sum(self.numels), dtype=self.dtype, device=self.device)
        self.views = cut(self.flat, self.held)
        self.s = s
        self.server: ServerAhead | None = None
        self.local = False
        self.ahead = False
        self.number = 0
        self._kernels = kernels.select(self.device)
        self._marks: list[list[int]] = []  # of x when x_half was made from it
        self._seen: list[list[int]] = []  # the same when it was last looked at
        self._versions: list[int] = []  # of x, in a window
        self._places: list[int] = []  # where x_half lies, in a window
        self._spot = SpotCheck(self.shown)
        self._rewritten = torch.zeros((), dtype=torch.bool, device=self.device)  # what `untouched` has found
        self._e: Tensor | None = None  # the errors, and as they are cut
        self._errors: list[Tensor] = []

    joint = True  # whether `like_parameter` gives what all ranks of a node have together

    @property
    def held(self) -> list[Tensor]:
        """What of each parameter this rank has in its flat vectors: all of it, or a part."""
        return self.shown

    @property
    def shown(self) -> list[Tensor]:
        """The tensors that are x or x_half: the parameters; of DTensors what lies on this rank."""
        return [*all_held(self.parameters)] if self._fsdp else self.parameters  # FSDP may replace them

    def rest(self) -> None:
        """Have the model's modules hold `parameters`, and nothing that was made of their values.

        FSDP gathers or copies them before a forward and a backward, and may keep that: it is dropped whenever the
        parameters become x_half, or x.
        """
        lay_down(self._fsdp)

    def check_reduced(self) -> None:
        """Raise RuntimeError if gradients are not there that a framework should have made."""
        if self._fsdp:
            check_reduced(self._fsdp, self.parameters)

    @torch.no_grad()
    def step_ahead(self, e: Tensor, averaged: slice) -> None:
        """x_half <- x - s e (Alg. 1, line 9); after `absorb`, outside of a window.

        Args:
            e: [d], or empty if there is none, with s = 0.
            averaged: coordinates of e that were changed since x_half was last made.
        """
        marks = self._seen
        if marks != self._marks or averaged.stop > averaged.start:
            self._marks, self.number = marks, self.number + 1
        self._derive(e, averaged)
        self._rewritten.zero_()

    def follow(self, e: Tensor) -> None:
        """Before the commit: if x was written to since, x_half <- x - s e again, since weight decay is taken there."""
        self.absorb()
        if self._marks != self._seen:
            self.step_ahead(e, slice(0, 0))

    def _marks_now(self) -> list[list[int]]:
        """Addresses and versions of the parameters: others after a write that autograd sees, or other storage."""
        return [self._places_now(), self._versions_now()]

    def _places_now(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.shown)]

    def _half_places(self) -> list[int]:
        """Where they lie as x_half."""
        return self._places_now()

    def _versions_now(self) -> list[int]:
        return [*map(_VERSION, self.shown)]

    def _cut_errors(self, e: Tensor) -> list[Tensor]:
        """e cut like the parameters, once for one vector; empty if there is none."""
        if self._e is not e:
            self._e, self._errors = e, self.cut(e) if e.numel() == self.flat.numel() else []
        return self._errors

    def look(self) -> list[int]:
        """Where the parameters lie; `absorb` goes by what they are now."""
        self._seen = self._marks_now()
        return self._seen[0]

    def absorb(self, looked: bool = False) -> None:
        """x <- parameters, which are at x: whatever was done to them since the last step (loaded, clamped) counts.

        Args:
            looked: whether `look` has just looked at them.

        Raises:
            RuntimeError: if they are what another state has made of them.
        """
        if not looked:
            self.look()
        if max(self._seen[1]) >= FIRST_HALF:
            raise RuntimeError(
                "parameters of this state are the x_half of another SAEFState that shares them, whose training forward "
                "still waits for its backward: run forward and backward of one model before the other's forward"
            )
        self._absorb()

    def enter(self, absorbed: bool = False) -> None:
        """parameters <- x_half: the window opens. Where that is x for good (s = 0) nothing happens.

        Args:
            absorbed: whether `absorb` has just looked at them.
        """
        if self.ahead or (self.s == 0.0 and not self.local):
            return
        self._versions = self._seen[1] if absorbed else self._versions_now()
        self._show_half()
        self._places = self._half_places()
        self._spot.opened(self._places)
        self.ahead = True
        _set_versions(self.shown, [self._half_version] * len(self.parameters))

    def leave(self) -> list[str]:
        """parameters <- x: the window closes. Names of the parameters that were written to in it, in vain.

        On a GPU, which would have to be waited for, those that only their values tell are in `changed_unseen`.
        """
        if not self.ahead:
            return []
        expected, versions, places = self._half_version, self._versions_now(), self._places_now()
        written = []
        if places != self._places or versions.count(expected) < len(versions):
            every = zip(self.names, versions, places, self._places, strict=True)
            written = [name for name, version, now, place in every if version != expected or now != place]
        self._spot.closed(places)
        if not self._spot.waits:
            written += [name for name in self.written_unseen() if name not in written]
        self._show_x()
        self.ahead = False
        _set_versions(self.shown, self._versions)
        return written

    @property
    def changed_unseen(self) -> Tensor:
        """[parameters] bool, on their device: which a window's spot check has found changed."""
        return self._spot.changed

    def written_unseen(self) -> list[str]:
        """Names of those, which are forgotten."""
        return [self.names[i] for i in self._spot.found()]

    def moved(self) -> list[str]:
        """In a window, whose optimizer has made X of x_half: it counts. Names of parameters that lie elsewhere now."""
        places = self._places_now()
        elsewhere = [n for n, now, place in zip(self.names, places, self._places, strict=True) if now != place]
        self._places = places
        self._spot.dropped()
        self._keep_local()
        self.number += 1
        _set_versions(self.shown, [self._half_version] * len(self.parameters))
        return elsewhere

    @torch.no_grad()
    def untouched(self, wait: bool) -> bool:
        """Whether x, outside of a window, is what x_half was made from, and was whenever this was asked since.

        By its values, too. wait: for a GPU, which else tells when it is waited for.
        """
        self._rewritten = self._rewritten | self._differs()
        known = wait or self.device.type == "cpu"
        return self._marks_now() == self._marks and not (known and bool(self._rewritten))

    @abstractmethod
    def _differs(self) -> Tensor:
        """[] bool, on the device: whether the parameters have other values than the x that x_half was made from."""

    @torch.no_grad()
    def difference(self, i: int, e: Tensor, out: Tensor, part: Tensor, shift: Tensor | None) -> None:
        """x_half - X of one parameter, outside of a window.

        Args:
            e: as x_half was made with. out: [d], of which `part` is the parameter's, in its shape, and written.
            shift: what else x_half has, in the parameter's shape.
        """
        self._half_of(i, e, out, part, shift)
        X = self.local_of(i)
        part.copy_(part.to(X.dtype) - X.to(self.dtype))  # x_half as the parameter could hold it

    @torch.no_grad()
    def shift_local(self, i: int, e: Tensor, out: Tensor, part: Tensor, shift: Tensor) -> None:
        """X <- x_half of one parameter, with a shift: arguments as of `difference`; `part` is written, too."""
        self._half_of(i, e, out, part, shift)
        self.local_of(i).copy_(part)

    def _half_of(self, i: int, e: Tensor, out: Tensor, part: Tensor, shift: Tensor | None) -> None:
        errors = self._cut_errors(e)
        part.copy_(step_ahead(self._x_of(i), errors[i], self.s) if errors else self._x_of(i))
        if self.server is not None:
            self.server.step(out, i)
        if shift is not None:
            part.add_(shift)

    def local_written(self) -> None:  # noqa: B027 - most have all of X
        """What `local_of` gives was written to, on all ranks of the node. Collective within it."""

    def restart(self) -> None:
        """x_half is to be made anew: it has become X."""
        self._marks = []

    def committed(self) -> None:
        """x has moved, by kernels that autograd does not see."""
        torch.autograd.graph.increment_version(self.shown)
        self.number += 1

    @property
    def _half_version(self) -> int:
        return FIRST_HALF + NEXT_HALF * (self.number % (FIRST_HALF // NEXT_HALF))

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat vector, each in the shape and strides that its parameter had at the start."""
        return cut(flat, self.views)

    @torch.no_grad()
    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        """A part of a flat vector as the parameter is: itself, or a DTensor of what all ranks of the node have."""
        if not self._fsdp:
            return part
        from torch.distributed.tensor import DTensor

        like: Any = self.parameters[i]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def part_of(self, i: int, value: Tensor) -> Tensor:
        """What this rank has of a value for a parameter: `own`'s, this rank's part, or the whole."""
        return value

    def own(self, flat: Tensor) -> list[Tensor]:
        """What this rank saves of a vector for each parameter: copies."""
        return [part.clone() for part in self.cut(flat)]

    def gathered(self, flat: Tensor) -> list[Tensor]:
        """For each parameter a vector's part that all ranks of the node can save together. Collective within it."""
        return self.own(flat)

    def whole_x(self) -> list[Tensor]:
        """x for each parameter, for a checkpoint: copies, not collective."""
        return self.own(self.x())

    def move(self, x: Tensor) -> None:
        """x <- `x`, flat; the parameters, which are at x, follow. Collective within the node."""
        self.write(self.cut(x))

    def renew(self) -> None:
        """x_half is to be made anew, and what was computed at it does not count."""
        self.write(self.cut(self.x()))

    def codes(self, compressor: Compressor) -> list[Code]:
        """Of each parameter."""
        return [compressor.for_parameter(name, p) for name, p in zip(self.names, self.parameters, strict=True)]

    def take_over(self, old: Weights) -> None:
        """Go on where `old`, of other parameters or another layout, left off: outside of a window, after `absorb`."""
        self.number = old.number + 1

    @abstractmethod
    def _absorb(self) -> None:
        """x <- parameters."""

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
    def _derive(self, e: Tensor, averaged: slice) -> None:
        """x_half <- x - s e; see `step_ahead`."""

    @abstractmethod
    def _show_half(self) -> None:
        """parameters <- x_half, or X."""

    @abstractmethod
    def _keep_local(self) -> None:
        """X <- parameters."""

    @abstractmethod
    def local_of(self, i: int) -> Tensor:
        """X of one parameter, in its shape and dtype, or this rank's part of it; writing to it changes X."""

    @abstractmethod
    def _x_of(self, i: int) -> Tensor:
        """x of one parameter, in its shape."""

    @abstractmethod
    def _show_x(self) -> None:
        """parameters <- x."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """x of each parameter, 1-D in memory order; writing to it changes x."""

    @abstractmethod
    def apply(self, plan: Plan, rates: Tensor, replies: Tensor) -> None:
        """x <- x - rates R for one bucket, of `commit` that alone."""

    @abstractmethod
    def commit(
        self, plan: Plan, update: Update, rates: Tensor, worker: Worker, message: Tensor, replies: Tensor
    ) -> None:
        """m <- m', e <- D - C(D), x <- x - rates R for one bucket (Alg. 1, lines 10, 18, 25).

        Args:
            update, worker: as the message was made with; `worker.x` is what `x_half` gave.
            rates: what R of each param group is multiplied with.
        """


def held(tensor: T) -> T:
    """What of a parameter, or of its gradient, lies on this rank: of a DTensor its shard, of another all of it."""
    return tensor if type(tensor) in _WHOLE else getattr(tensor, "_local_tensor", tensor)


def all_held(tensors: Sequence[T]) -> Sequence[T]:
    """`held` of each, of thousands without a loop in Python. None stays."""
    return tensors if {*map(type, tensors)} <= _WHOLE else [held(t) for t in tensors]


def cut(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' parts of a flat vector, each in its parameter's shape and, if they have no gaps, strides."""
    views, at = [], 0
    for p in parameters:
        part = flat[at : at + p.numel()]
        views.append(part.as_strided(p.shape, p.stride()) if kernels.is_dense(p) else part.view(p.shape))
        at += p.numel()
    return views


def _set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def _plain(names: list[str]) -> list[str]:
    """The names in the module that was wrapped, so that a checkpoint fits with and without the wrappers."""
    names = [name.replace("_orig_mod.", "") for name in names]
    return [name.removeprefix("module.") for name in names] if all(n.startswith("module.") for n in names) else names


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
