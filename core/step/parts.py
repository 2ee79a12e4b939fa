"""x and x_half of a model that every rank of a node has whole, while each has a part of its flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import final

import torch
from torch import Tensor, nn

from ..comm.node import Node
from ..rules import step_ahead
from ..wire import kernels
from .ways import Copying, captured, check_storage, exchange, line
from .weights import Weights, cut, held


@final
class Parts(Copying):
    """`flat` is x of this rank's part of each parameter: entries [place c, (place + 1) c) of n, c = ceil(n / ranks).

    The parameters' own storage is x, all of it, and in a window `p.data` points to x_half, all of it: each is gathered
    within the node when it changes.

    Args:
        place, ranks: this rank's number in its node, and how many they are.

    Attributes:
        node: the same ranks, to be set before the first step.
    """

    joint = False
    node: Node

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float, place: int, ranks: int) -> None:
        check_storage(model)
        if captured(model):
            raise ValueError(
                "parts of the model were captured by torch.cuda.make_graphed_callables: its graphs read their own "
                "storage, while with mesh x_half lies elsewhere. Leave one of the two out"
            )
        trained = [(name, held(p)) for name, p in model.named_parameters() if p.requires_grad]
        if gaps := [name for name, p in trained if not kernels.is_dense(p)]:
            raise ValueError(f"parameters {gaps[:5]} have gaps in memory: with mesh make them contiguous first")
        self._place, self._ranks = place, ranks
        self._addresses: list[int] = []
        self._own: list[Tensor] = []  # x, whole, and as it is cut: for each place its parts
        self._cut_own: list[list[Tensor]] = []
        self._halves: list[Tensor] = []  # the same of x_half
        self._cut_halves: list[list[Tensor]] = []
        super().__init__(model, optimizer, s)
        dtypes = {p.dtype for p in self.parameters}
        self._sent_as = dtypes.pop() if len(dtypes) == 1 else self.dtype

    @property
    def held(self) -> list[Tensor]:
        return (self._cut_own or self.by_place(self.shown))[self._place]

    def places(self, whole: Tensor) -> list[Tensor]:
        """Each place's part of a tensor without gaps, 1-D views in memory order."""
        entries, numel = line(whole.detach()), whole.numel()
        c = -(-numel // self._ranks)
        return [entries[min(numel, place * c) : min(numel, (place + 1) * c)] for place in range(self._ranks)]

    def by_place(self, whole: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each place its parts of several tensors."""
        return [[*parts] for parts in zip(*map(self.places, whole), strict=True)]

    def apart(self, views: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """Of gradients of this rank: (the node's for this place, to be filled; as cut; what is for each place)."""
        every = self.by_place(views)
        mine = every[self._place]
        flat = torch.empty(sum(map(Tensor.numel, mine)), dtype=self.dtype, device=self.device)
        return flat, cut(flat, mine), every

    @torch.no_grad()
    def _spread(self, part: Tensor, targets: Sequence[Sequence[Tensor]], sent_as: torch.dtype) -> None:
        """targets, for each place its parts, <- what the ranks have as `part`, flat. Collective within the node."""
        sizes = [[*map(Tensor.numel, parts)] for parts in targets]
        width = max(map(sum, sizes))  # gathered are vectors of one length
        mine = torch.zeros(width, dtype=sent_as, device=self.device)
        mine[: part.numel()] = part
        every = self.node.every_part(mine).split(width)
        found = [vector[: sum(n)].split(n) for vector, n in zip(every, sizes, strict=True)]
        torch._foreach_copy_([*chain(*targets)], [*chain(*found)])

    # -- x ------------------------------------------------------------------------------------

    def _absorb(self) -> None:
        if self._addresses != self._seen[0]:
            self._addresses, self._own = self._seen[0], [p.data for p in self.shown]
            self._cut_own = self.by_place(self._own)
        super()._absorb()

    @torch.no_grad()
    def write(self, x: Sequence[Tensor]) -> None:
        """`x`: whole."""
        self.rest()
        for i, (own, mine, value) in enumerate(zip(self._own, self.views, x, strict=True)):
            own.copy_(value)
            mine.copy_(self.part_of(i, value))
        torch.autograd.graph.increment_version(self.shown)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        self.flat.copy_(x)
        self.committed()

    def renew(self) -> None:
        self.restart()
        torch.autograd.graph.increment_version(self.shown)

    def committed(self) -> None:
        self.rest()
        self._spread(self.flat, self._cut_own, self._sent_as)
        Weights.committed(self)

    def _show_x(self) -> None:
        self._exchange(self._own)

    @torch.no_grad()
    def _exchange(self, storages: Sequence[Tensor]) -> None:
        """The parameters lie there. Where FSDP has views of their storage, that and `_halves` swap contents instead."""
        if not self._fsdp:
            exchange(self.parameters, storages)
            return
        self.rest()
        for p, other in zip(self.shown, self._halves, strict=True):
            before = p.clone()
            p.copy_(other)
            other.copy_(before)

    # -- x_half -------------------------------------------------------------------------------

    def _derive(self, e: Tensor, averaged: slice) -> None:
        self._make_half(e)
        if not self._halves:
            self._halves = [torch.empty_like(p) for p in self.shown]
            self._cut_halves = self.by_place(self._halves)
        self._spread(self._half, self._cut_halves, self._sent_as)

    def _make_half(self, e: Tensor) -> None:
        """x_half of this rank's part."""
        self._half = step_ahead(self.flat, e, self.s) if e.numel() else self.flat
        if self.server is not None:
            self.server.step(self._half)

    def follow(self, e: Tensor) -> None:
        """What weight decay needs is this rank's part: nothing is gathered, since not all ranks may have written."""
        self.absorb()
        if self._marks != self._seen:
            self._make_half(e)

    def _show_half(self) -> None:
        self._exchange(self._halves)

    # -- X: what an optimizer makes of x_half, alike on the ranks of the node ---------------------

    def _keep_local(self) -> None:
        pass  # it lies where x_half lay

    def local_of(self, i: int) -> Tensor:
        return self._cut_halves[self._place][i]

    def local_written(self) -> None:
        self._spread(torch.cat(self._cut_halves[self._place]), self._cut_halves, self._sent_as)

    # -- parts and whole tensors --------------------------------------------------------------

    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        return part

    def part_of(self, i: int, value: Tensor) -> Tensor:
        like = self.shown[i]
        if value.shape == self.views[i].shape:
            return value
        whole = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
        return self.places(whole.copy_(value))[self._place]

    def gathered(self, flat: Tensor) -> list[Tensor]:
        whole = [torch.empty_like(p, dtype=self.dtype) for p in self.shown]
        self._spread(flat, self.by_place(whole), self.dtype)
        return whole

    def whole_x(self) -> list[Tensor]:
        """As the parameters have it: of 16-bit ones rounded, while this rank's part of their master is `flat`."""
        return [p.detach().to(self.dtype, copy=True) for p in self.shown]
