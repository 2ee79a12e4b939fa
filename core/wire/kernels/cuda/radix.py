"""Radix selection for top-k blocks of more than one tile: a launch a digit, then one to count and one to write.

Each kernel works out the digits that are known from the histograms so far, which is cheaper than a launch of its own.

    tiles, table   `Tiling.tiles` and the table
    vector         [numel] D of the blocks, as `codes.encode` has put it there
    hist           [digits, slots, 256] histograms
    slots, digits  int: blocks to select from; digits known so far
    counts         [T, 2] entries of each tile above, and at, its block's threshold
"""

from __future__ import annotations

import triton.language as tl

from .codes import write_kept
from .constants import _CHUNK, _COLUMNS, _COUNT, _DIGITS, _NUMEL, jit, kernel, tile_of
from .select import add_histogram, histogram_of, key_of, pick


# fmt: off
@jit
def select_digits(tiles, table, vector, hist, slots, digits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile of D, its keys, and the first `digits` digits of its block's threshold.

    Returns (slot, row, offset of the tile, coordinates, D, keys, digits, rank among the keys that begin with
    these digits); slot < 0 if there is nothing to select.
    """
    r, lo, at, slot = tile_of(tiles)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.where(slot >= 0, tl.load(row + _NUMEL), 0)
    D = tl.load(vector + at + i, mask=inside, other=0)
    key = key_of(D, inside)
    prefix, need = tl.full((), 0, key.dtype), tl.load(row + _COUNT).to(tl.int32)
    start = hist + tl.maximum(slot, 0) * _DIGITS + tl.arange(0, _DIGITS)
    for _ in range(digits):
        prefix, need = pick(tl.load(start), prefix, need)
        start += slots * _DIGITS
    return slot, row, lo, i, D, key, prefix, need


@kernel
def narrow(tiles, table, vector, hist, slots, digits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The histogram of the next digit."""
    slot, row, lo, i, D, key, prefix, need = select_digits(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        add_histogram(hist + (slot + digits * slots) * _DIGITS, histogram_of(key, digits, prefix))


@kernel
def count_kept(tiles, table, vector, hist, slots, digits, counts, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many entries of a tile are above, and at, the threshold."""
    slot, row, lo, i, D, key, threshold, need = select_digits(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        at = counts + tl.program_id(0).to(tl.int64) * 2
        tl.store(at, tl.sum((key > threshold).to(tl.int32), 0))
        tl.store(at + 1, tl.sum((key == threshold).to(tl.int32), 0))


@kernel
def keep(tiles, table, vector, hist, slots, digits, counts, floats, message, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what a tile keeps, behind what the tiles before it keep."""
    slot, row, lo, i, D, key, threshold, need = select_digits(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        this = tl.program_id(0).to(tl.int64)
        above, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for chunk in range(this - lo // TILE, this, _CHUNK):
            t = chunk + tl.arange(0, _CHUNK)
            above += tl.sum(tl.load(counts + 2 * t, mask=t < this, other=0), 0)
            ties += tl.sum(tl.load(counts + 2 * t + 1, mask=t < this, other=0), 0)
        write_kept(row, i, D, key, threshold, need, above, ties, floats, message)
