"""How tables are cut into tiles, and kernels launched over them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...compressors import SIGN, TOPK
from ..table import GRAD, HALF, KIND, NUMEL, STATE, check_kinds
from . import constants


class Tiling(NamedTuple):
    """How the blocks of a table are cut into tiles.

    Attributes:
        tiles: [T, 4] int64: row, offset of the tile in its block, offset of the block in a scratch vector,
            and the block's number among the large ones, or -1. A block's tiles are neighbours.
        first: [B] int64: each block's first tile.
        large: [slots] int64: rows of the blocks of kind TOPK that are more than one tile.
        groups: [G, 3] int64: their tiles by SPAN: first tile, number of tiles, the block's first group.
        numel: length of a scratch vector, the coordinates of all blocks.
        kinds: bit k: whether there are blocks of kind k; HALVES: whether there are bfloat16 scalars.
        tile: coordinates of a tile: a power of two in which each block fits, at most TILE.
        align: 4 if all NUMEL, GRAD and STATE are multiples of it, else 1.
        limit: what TILE was.
    """

    tiles: Tensor
    first: Tensor
    large: Tensor
    groups: Tensor
    numel: int
    kinds: int
    tile: int
    align: int
    limit: int


class Work(NamedTuple):
    """Scratch of one call, from the caching allocator; empty where it is not needed.

    Attributes:
        partial: [T] float64: sum of |D| of each tile.
        vector: [numel] of the state's dtype: the mean of top-k messages, then candidates.
        where: [numel] int32: the candidates' coordinates in their block.
        bars: [slots] int64; found: [slots] int32: the bar, as a key, and the number of candidates of each large block.
        counts: [T] int32: the candidates of each tile.
    """

    partial: Tensor
    vector: Tensor
    where: Tensor
    bars: Tensor
    found: Tensor
    counts: Tensor


_tilings = WeakIdKeyDictionary()


def tiling_of(table: Tensor) -> Tiling:
    """The tiling of a table; made when the tensor object is seen first."""
    tiling: Tiling | None = _tilings.get(table)
    if tiling is None or tiling.limit != constants.TILE:
        _tilings[table] = tiling = _tiling(table.cpu(), table.device)
    return tiling


def _tiling(table: Tensor, device: torch.device) -> Tiling:
    kinds = table[:, KIND].unique().tolist()
    check_kinds(kinds)
    numel, topk = table[:, NUMEL], table[:, KIND] == TOPK
    tile = _tile(int(numel.max()) if len(table) else 0)
    tiles = (numel + tile - 1) // tile
    first = tiles.cumsum(0) - tiles
    selected = topk & (tiles > 1)
    slot = torch.where(selected, selected.cumsum(0) - 1, -1)
    row = torch.arange(len(table), device=table.device).repeat_interleave(tiles)
    lo = (torch.arange(len(row), device=table.device) - first[row]) * tile
    columns = [row, lo, (numel.cumsum(0) - numel)[row], slot[row]]
    return Tiling(
        torch.stack(columns, 1).to(device),
        first.to(device),
        selected.nonzero().view(-1).to(device),
        _groups(first[selected], tiles[selected]).to(device),
        int(numel.sum()),
        sum(1 << kind for kind in kinds) + constants.HALVES * bool(table[:, HALF].any()),
        tile,
        1 if (table[:, [NUMEL, GRAD, STATE]] % 4).any() else 4,
        constants.TILE,
    )


def _tile(longest: int) -> int:
    """The least power of two, at least LEAST, in which the longest block fits; else TILE."""
    return min(constants.TILE, max(constants.LEAST, 1 << (longest - 1).bit_length() if longest else 0))


def _groups(first: Tensor, tiles: Tensor) -> Tensor:
    """`Tiling.groups` of blocks by their first tile and number of tiles."""
    groups = (tiles + constants.SPAN - 1) // constants.SPAN
    start = groups.cumsum(0) - groups
    block = torch.arange(len(tiles), device=tiles.device).repeat_interleave(groups)
    before = (torch.arange(len(block), device=tiles.device) - start[block]) * constants.SPAN
    columns = [first[block] + before, (tiles[block] - before).clamp(max=constants.SPAN), start[block]]
    return torch.stack(columns, 1)


def make_work(tiling: Tiling, e: Tensor, *, mean: bool = False) -> Work:
    """Scratch for vectors like `e`; `mean`: that of top-k messages needs some."""
    tiles, slots, none = tiling.tiles.size(0), tiling.large.size(0), nothing(e.dtype, e.device)
    partial = e.new_empty(tiles, dtype=torch.float64) if tiling.kinds & 1 << SIGN else none
    vector = e.new_empty(tiling.numel) if slots or mean else none
    if not slots:
        return Work(partial, vector, none, none, none, none)
    where, bars = e.new_empty(tiling.numel, dtype=torch.int32), e.new_empty(slots, dtype=torch.int64)
    found, counts = e.new_zeros(slots, dtype=torch.int32), e.new_empty(tiles, dtype=torch.int32)
    return Work(partial, vector, where, bars, found, counts)


@cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[0]: making an empty tensor takes as long as a small kernel."""
    return torch.empty(0, dtype=dtype, device=device)


def launch(kernel: Any, tiling: Tiling, *args: Any, programs: int = -1, **flags: Any) -> None:
    """One program per tile, or `programs`. Products and sums are rounded separately, as in the reference.

    Triton's own look at the arguments takes longer than most kernels run. So what it has compiled is kept here, by what
    it depends on: flags, types, and which addresses 16 divides.
    """
    programs = tiling.tiles.size(0) if programs < 0 else programs
    if not programs:
        return
    args = tiling.tiles, *args
    flags |= {"TILE": tiling.tile, "ALIGN": tiling.align}
    kinds = [(a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a.bit_length() > 31 for a in args]
    device = tiling.tiles.get_device()  # -1: the interpreter's
    key = id(kernel), device, *kinds, *flags.values()
    with nullcontext() if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device):
        if key in _compiled:
            compiled, rest = _compiled[key]
            compiled[(programs, 1, 1)](*args, *rest)
            return
        options = {"num_warps": max(1, tiling.tile // constants.A_THREAD // 32), "enable_fp_fusion": False}
        compiled = kernel[(programs,)](*args, **flags, **options)
        if device >= 0:
            _compiled[key] = compiled, [flags[name] for name in kernel.arg_names[len(args) :]]


_compiled: dict[Any, Any] = {}
