"""Who serves which block, and where everything lies in the messages of one bucket.

A block has exactly one server rank, whatever bucket it travels in: servers are a function of the
model and the number of ranks alone, so DDP may rebuild its buckets without moving any server error.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.exchange import Strategy
from .codec import Block, Layout, block_ranges, finite, lay_out
from .compressors import Code, Compressor, codes_of
from .kernels.table import COLUMNS


class Blocks(NamedTuple):
    """The blocks of the whole model.

    Attributes:
        of_parameter: for each parameter tensor its blocks, with `grad` counted from the tensor's start.
        owner: for each parameter tensor the server rank of each of its blocks.
        served: coordinates that each server rank serves (the length of its server error).
    """

    of_parameter: list[list[Block]]
    owner: list[list[int]]
    served: list[int]

    def served_by(self, server: int) -> list[Block]:
        """The blocks of one server rank."""
        pairs = zip(chain(*self.of_parameter), chain(*self.owner), strict=True)
        return [block for block, owner in pairs if owner == server]


def partition(
    numels: Sequence[int],
    groups: Sequence[int],
    up: Compressor | Sequence[Code],
    down: Compressor | Sequence[Code],
    servers: int,
) -> Blocks:
    """Cut the parameter tensors into blocks and give each block to the server with the least load.

    Args:
        numels, groups: size and optimizer group of each parameter tensor, in the order of the flat state.
        up, down: the compressors on the way to and from the servers, or the codes of each tensor.
        servers: how many ranks serve; 1 if every rank serves everything (replicated).

    Raises:
        ValueError: if the two compressors cut a tensor differently.
    """
    load = [(0, r) for r in range(servers)]
    of_parameter, owner, served, offset = [], [], [0] * servers, 0
    codes = zip(codes_of(up, numels), codes_of(down, numels), strict=True)
    for numel, group, (there, back) in zip(numels, groups, codes, strict=True):
        sizes = {s for s in (there.block_numel(numel), back.block_numel(numel)) if s is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"compressor {there} and server_compressor {back} cut a tensor of {numel} entries into "
                "different blocks; a block has one server, so give both the same block size"
            )
        mine, owners = [], []
        for start, n in block_ranges(numel, sizes.pop() if sizes else None):
            busy, r = heapq.heappop(load)
            heapq.heappush(load, (busy + n, r))
            mine.append(Block(there, back, start, offset + start, served[r], n, group))
            owners.append(r)
            served[r] += n
        of_parameter.append(mine)
        owner.append(owners)
        offset += numel
    return Blocks(of_parameter, owner, served)


class Placement(NamedTuple):
    """Which rank serves which blocks.

    Attributes:
        strategy: "replicated": every rank serves all blocks, as if it were server 0 of 1; "sharded": each its own.
        rank: this rank's number among the servers.
        servers: how many there are: 1, or the number of workers.
        blocks: the blocks and their servers.
    """

    strategy: Strategy
    rank: int
    servers: int
    blocks: Blocks


def place(
    numels: Sequence[int],
    groups: Sequence[int],
    up: Compressor | Sequence[Code],
    down: Compressor | Sequence[Code],
    strategy: Strategy,
    workers: int,
    rank: int,
) -> Placement:
    """Place the servers.

    Args:
        numels, groups, up, down: as for `partition`.
        strategy: "replicated" or "sharded".
        workers, rank: how many ranks exchange, and which of them this is.
    """
    if strategy not in ("replicated", "sharded"):
        raise ValueError(f'the strategy must be "replicated" or "sharded", got {strategy!r}')
    servers, rank = (workers, rank) if strategy == "sharded" else (1, 0)
    return Placement(strategy, rank, servers, partition(numels, groups, up, down, servers))


class Plan(NamedTuple):
    """The messages of one bucket. Server r's part is called its section; sections lie one after the other.

    Attributes:
        send: this worker's C(D_k), all sections (phase 1, out).
        send_bytes: length of each server's section in it.
        receive: this server's section as it comes from every worker (phase 1, in).
        reply: R of the blocks this server serves (phase 2, out).
        reply_bytes: length of each server's reply.
        apply: R of all blocks, the servers' replies one after the other (phase 2, in).
        heads: (start in bytes, scalars, halves) of each server's reply in `apply`.
    """

    send: Layout
    send_bytes: list[int]
    receive: Layout
    reply: Layout
    reply_bytes: list[int]
    apply: Layout
    heads: list[tuple[int, int, int]]

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tables on `device`."""
        moved = [
            layout._replace(table=layout.table.to(device))
            for layout in (self.send, self.receive, self.reply, self.apply)
        ]
        return self._replace(send=moved[0], receive=moved[1], reply=moved[2], apply=moved[3])

    def finite(self, replies: Tensor, dtype: torch.dtype) -> Tensor:
        """0-dim bool tensor: whether every scale and value of the replies is a finite number."""
        return finite(self.heads, replies, dtype)


def plan_bucket(blocks: Blocks, parameters: Sequence[tuple[int, int]], servers: int, rank: int, itemsize: int) -> Plan:
    """Lay out the messages for a bucket.

    Args:
        parameters: (index of the parameter tensor, its offset in the bucket's gradient vector).
        itemsize: bytes of a scalar on the wire.
    """
    sections: list[list[Block]] = [[] for _ in range(servers)]
    for index, offset in parameters:
        for block, r in zip(blocks.of_parameter[index], blocks.owner[index], strict=True):
            sections[r].append(block._replace(grad=offset + block.grad))
    send = _concatenate(sections, itemsize, reply=False)
    apply = _concatenate(sections, itemsize, reply=True)
    own = sections[rank]
    starts = [sum(apply[1][:r]) for r in range(servers)]
    return Plan(
        send=send[0],
        send_bytes=send[1],
        receive=lay_out(own, itemsize, reply=False, served=True),
        reply=lay_out(own, itemsize, reply=True, served=True),
        reply_bytes=apply[1],
        apply=apply[0],
        heads=[(start, *counts) for start, counts in zip(starts, apply[2], strict=True)],
    )


class Piece(NamedTuple):
    """What of a bucket travels together.

    Attributes:
        parameters: by number. among: their places among the bucket's parameters that travel.
        plan: whose gradients are counted from the bucket's start.
    """

    parameters: tuple[int, ...]
    among: slice
    plan: Plan


class Plans:
    """The plans of the buckets seen so far; DDP rebuilds its buckets after the first step.

    Args:
        parameters: in the order of the flat state.
        dtype: of the state.
        left_out: parameters whose gradients may come, and do not travel.
        piece_numel: coordinates that a message shall have, about: it is cut where a parameter ends. None: a bucket is
            one message.
    """

    def __init__(
        self,
        placement: Placement,
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
        left_out: Sequence[Tensor] = (),
        piece_numel: int | None = None,
    ) -> None:
        self._placement, self._itemsize, self._left_out = placement, dtype.itemsize, [*left_out]  # kept, for their ids
        self._index: dict[int, int | None] = {id(p): i for i, p in enumerate(parameters)}
        self._index.update({id(p): None for p in left_out})
        self._piece_numel = piece_numel
        self._found: dict[tuple[tuple[int, int], ...], list[Piece]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def find(
        self, parameters: Sequence[Tensor], views: Sequence[Tensor], flat: Tensor
    ) -> tuple[list[Piece], list[Tensor]]:
        """Of a bucket the parameters that travel, in one piece or more, and their gradients, views of `flat`."""
        where, own = [], []
        for p, view in zip(parameters, views, strict=True):
            if id(p) not in self._index:
                raise RuntimeError(
                    f"a gradient of shape {tuple(p.shape)} belongs to no parameter of this state: the model's "
                    "trainable parameters changed. Wrap the model and create SAEFState again after changing them"
                )
            if (i := self._index[id(p)]) is not None:
                where.append((i, int(view.storage_offset() - flat.storage_offset())))
                own.append(view)
        key = tuple(where)
        if key not in self._found:
            self._found[key] = self._cut(where, [view.numel() for view in own], flat.device)
        return self._found[key], own

    def _cut(self, where: Sequence[tuple[int, int]], numels: Sequence[int], device: torch.device) -> list[Piece]:
        """where: as `plan_bucket` has it. numels: of the same parameters."""
        total = max(1, sum(numels))  # parameters may be empty
        pieces = 1 if self._piece_numel is None else max(1, round(total / self._piece_numel))
        piece_of = [(max(1, end) * pieces - 1) // total for end in accumulate(numels)]
        cuts = [i for i in range(1, len(where)) if piece_of[i] > piece_of[i - 1]]
        found = [self._plan(where, slice(*ends)) for ends in pairwise([0, *cuts, len(where)])]
        return [piece._replace(plan=piece.plan.to(device)) for piece in found]

    def _plan(self, where: Sequence[tuple[int, int]], among: slice) -> Piece:
        at, mine = self._placement, where[among]
        plan = plan_bucket(at.blocks, mine, at.servers, at.rank, self._itemsize)
        return Piece(tuple(i for i, _ in mine), among, plan)


def _concatenate(
    sections: list[list[Block]], itemsize: int, *, reply: bool
) -> tuple[Layout, list[int], list[tuple[int, int]]]:
    layouts: list[Layout] = []
    start = 0
    for section in sections:
        layouts.append(lay_out(section, itemsize, reply=reply, served=False, start=start))
        start += layouts[-1].message_bytes
    table = torch.cat([layout.table for layout in layouts]).view(-1, COLUMNS)
    counts = [(layout.scalars, layout.halves) for layout in layouts]
    scalars, halves = (sum(c[i] for c in counts) for i in range(2))
    return Layout(table, start, scalars, halves, start), [layout.message_bytes for layout in layouts], counts
