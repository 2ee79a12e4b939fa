"""How tables are cut into tiles, and kernels launched over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...compressors import SIGN, TOPK
from ..table import KIND, NUMEL, check_kinds
from . import constants


class Tiling(NamedTuple):
    """How the blocks of a table are cut into tiles.

    Attributes:
        tiles: [T, 4] int64: row, offset of the tile in its block, offset of the block in a scratch vector,
            and the block's number among those that need radix selection, or -1. A block's tiles are neighbours.
        first: [B] int64: each block's first tile.
        numel: length of a scratch vector, the coordinates of all blocks.
        signs, topk: whether there are blocks of kind SIGN, TOPK.
        slots: number of blocks that need radix selection.
        tile: constants.TILE.
    """

    tiles: Tensor
    first: Tensor
    numel: int
    signs: bool
    topk: bool
    slots: int
    tile: int


class Work(NamedTuple):
    """Scratch of one call, from the caching allocator.

    Attributes:
        partial: [T] float64: sum of |D| of each tile.
        vector: [numel] of the state's dtype, or empty: the mean of top-k messages, then D of top-k blocks.
        hist: [digits, slots, 256] int32: histograms of the radix selection.
        counts: [T, 2] int32: entries of each tile above, and at, its block's threshold.
    """

    partial: Tensor
    vector: Tensor
    hist: Tensor
    counts: Tensor


_tilings = WeakIdKeyDictionary()


def tiling_of(table: Tensor) -> Tiling:
    """The tiling of a table; made when the tensor object is seen first."""
    tiling: Tiling | None = _tilings.get(table)
    if tiling is None or tiling.tile != constants.TILE:
        _tilings[table] = tiling = _tiling(table.cpu(), table.device)
    return tiling


def _tiling(table: Tensor, device: torch.device) -> Tiling:
    check_kinds(table[:, KIND].unique().tolist())
    TILE = constants.TILE
    numel, topk = table[:, NUMEL], table[:, KIND] == TOPK
    tiles = (numel + TILE - 1) // TILE
    first = tiles.cumsum(0) - tiles
    selected = topk & (tiles > 1)
    slot = torch.where(selected, selected.cumsum(0) - 1, -1)
    row = torch.arange(len(table)).repeat_interleave(tiles)
    lo = (torch.arange(len(row)) - first[row]) * TILE
    columns = [row, lo, (numel.cumsum(0) - numel)[row], slot[row]]
    return Tiling(
        torch.stack(columns, 1).to(device),
        first.to(device),
        int(numel.sum()),
        bool((table[:, KIND] == SIGN).any()),
        bool(topk.any()),
        int(selected.sum()),
        TILE,
    )


def make_work(tiling: Tiling, e: Tensor, vector: bool) -> Work:
    """Scratch for vectors like `e`; with `vector`, one of the blocks' coordinates."""
    tiles, digits = len(tiling.tiles), e.dtype.itemsize * 8 // constants._DIGIT.value
    return Work(
        e.new_empty(tiles if tiling.signs else 0, dtype=torch.float64),
        e.new_empty(tiling.numel if vector else 0),
        e.new_zeros((digits, tiling.slots, constants._DIGITS.value), dtype=torch.int32),
        e.new_empty((tiles if tiling.slots else 0, 2), dtype=torch.int32),
    )


def launch(kernel: Any, tiling: Tiling, *args: Any, programs: int = -1, **flags: Any) -> None:
    """One program per tile, or `programs`. Products and sums are rounded separately, as in the reference."""
    programs = len(tiling.tiles) if programs < 0 else programs
    if programs:
        with torch.cuda.device_of(tiling.tiles):
            options = {"num_warps": constants.WARPS, "enable_fp_fusion": False}
            kernel[(programs,)](tiling.tiles, *args, TILE=tiling.tile, **flags, **options)
