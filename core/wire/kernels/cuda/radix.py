"""Top-k blocks of more than one tile: candidates by a sampled bar, then radix selection among them.

    sample         a bar that some more entries than are kept should reach, judged by a sample of the block
    codes.offer    in `compress` and `serve`: each tile puts its entries not below the bar, its *candidates*, in order
                   into `vector` and `where`, from where its own coordinates would begin
    codes.offer    again, for all tiles of the blocks where fewer candidates were found than are kept: all entries
    narrow         a launch a digit: the histogram of the candidates that begin with the digits known so far
    count_kept     how many candidates of each group are above, and at, the threshold
    keep           writes what a group keeps, behind what the groups before it keep

So whatever the bar was, the selection is exact. The last three work on *groups*, neighbouring tiles of a block: [SPAN,
WIDTH] candidates at a time. Each works out the digits known so far from the histograms, which is cheaper than a launch.

    groups         [G, 3] of `Tiling`: first tile, number of tiles, the block's first group
    tiles, table   `Tiling.tiles` and the table
    large          [slots] int64: the rows of these blocks
    vector, where  [numel] candidates, and their coordinates in the block
    counts         [T] candidates of each tile
    bars, found    [slots] the bar, as a key, and the candidates of each block
    hist           [digits, slots, 256] histograms
    slots, digits  int: number of these blocks; digits known so far
    kept           [G, 2] candidates of each group above, and at, its block's threshold
"""

from __future__ import annotations

import triton.language as tl

from .codes import ranks, write_kept
from .constants import _CHUNK, _COLUMNS, _COUNT, _DIGITS, _GROUP_COLUMNS, _NUMEL, _RUN, _TILE_COLUMNS, jit, kernel
from .select import add_histogram, histogram_of, key_of, largest, pick


# fmt: off
@jit
def sampled(row, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[TILE] coordinates of a longer block, in runs of neighbours that lie evenly in it."""
    n, lane = tl.load(row + _NUMEL), tl.arange(0, TILE)
    return (lane // _RUN) * (n - _RUN) // (TILE // _RUN - 1) + lane % _RUN


@jit
def bar_of(row, D, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bar by a sample: half as many more of it are not below, and some, as would be kept if the block were like it.

    Never 0: zeros are candidates only where all entries are.
    """
    share = (TILE * tl.load(row + _COUNT) // tl.load(row + _NUMEL)).to(tl.int32)
    rank = share + share // 2 + 24
    bar, _ = largest(key_of(D, rank < TILE), rank)
    return tl.maximum(bar, 1).to(tl.int64)


@jit
def group_of(groups, tiles, counts, TILE: tl.constexpr, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's group: (row number, slot, where its tiles' candidates begin, how many each has)."""
    group = groups + tl.program_id(0).to(tl.int64) * _GROUP_COLUMNS
    first, lane = tl.load(group), tl.arange(0, SPAN)
    count = tl.load(counts + first + lane, mask=lane < tl.load(group + 1), other=0)
    tile = tiles + first * _TILE_COLUMNS
    start = tl.load(tile + 2) + tl.load(tile + 1) + lane.to(tl.int64) * TILE
    return tl.load(tile), tl.load(tile + 3), start, count


@jit
def some(vector, start, count, j, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[SPAN, WIDTH] candidates of each tile from its j-th on: where they are, D, keys."""
    lane = j + tl.arange(0, WIDTH)
    there = lane[None, :] < count[:, None]
    at = start[:, None] + lane[None, :]
    D = tl.load(vector + at, mask=there, other=0)
    return at, D, key_of(D, there)


@jit
def known_digits(row, slot, vector, hist, slots, digits):  # type: ignore[no-untyped-def]
    """The first digits of a block's threshold, and its rank among the keys that begin with them."""
    need = tl.load(row + _COUNT).to(tl.int32)
    prefix = tl.full((), 0, tl.int32 if vector.dtype.element_ty == tl.float32 else tl.int64)
    start = hist + slot * _DIGITS + tl.arange(0, _DIGITS)
    for _ in range(digits):
        prefix, need = pick(tl.load(start), prefix, need)
        start += slots * _DIGITS
    return prefix, need


@jit
def beyond(vector, start, count, bar, SPAN: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[SPAN] candidates of each tile above, and at, the threshold."""
    above, ties = tl.zeros((SPAN,), tl.int32), tl.zeros((SPAN,), tl.int32)
    for j in range(0, tl.max(count, 0), WIDTH):
        _, _, key = some(vector, start, count, j, WIDTH)
        above += tl.sum((key > bar).to(tl.int32), 1)
        ties += tl.sum((key == bar).to(tl.int32), 1)
    return above, ties


@kernel
def narrow(  # type: ignore[no-untyped-def]
    groups, tiles, table, vector, counts, hist, slots, digits,
    TILE: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):
    """The histogram of the next digit."""
    r, slot, start, count = group_of(groups, tiles, counts, TILE, SPAN)
    prefix, need = known_digits(table + r * _COLUMNS, slot, vector, hist, slots, digits)
    total = tl.zeros((_DIGITS,), tl.int32)
    for j in range(0, tl.max(count, 0), WIDTH):
        _, _, key = some(vector, start, count, j, WIDTH)
        total += histogram_of(tl.reshape(key, (SPAN * WIDTH,)), digits, prefix)
    add_histogram(hist + (slot + digits * slots) * _DIGITS, total)


@kernel
def count_kept(  # type: ignore[no-untyped-def]
    groups, tiles, table, vector, counts, hist, slots, digits, kept,
    TILE: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):
    r, slot, start, count = group_of(groups, tiles, counts, TILE, SPAN)
    bar, need = known_digits(table + r * _COLUMNS, slot, vector, hist, slots, digits)
    above, ties = beyond(vector, start, count, bar, SPAN, WIDTH)
    out = kept + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum(above, 0))
    tl.store(out + 1, tl.sum(ties, 0))


@kernel
def keep(  # type: ignore[no-untyped-def]
    groups, tiles, table, vector, counts, hist, slots, digits, kept, where, floats, message,
    CODED: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):
    r, slot, start, count = group_of(groups, tiles, counts, TILE, SPAN)
    row = table + r * _COLUMNS
    bar, need = known_digits(row, slot, vector, hist, slots, digits)
    before, equal = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    this = tl.program_id(0).to(tl.int64)
    for chunk in range(tl.load(groups + this * _GROUP_COLUMNS + 2), this, _CHUNK):
        t = chunk + tl.arange(0, _CHUNK)
        before += tl.sum(tl.load(kept + 2 * t, mask=t < this, other=0), 0)
        equal += tl.sum(tl.load(kept + 2 * t + 1, mask=t < this, other=0), 0)
    above, ties = beyond(vector, start, count, bar, SPAN, WIDTH)
    above, ties = before + tl.cumsum(above, 0) - above, equal + tl.cumsum(ties, 0) - ties  # of the tiles before
    for j in range(0, tl.max(count, 0), WIDTH):
        at, D, key = some(vector, start, count, j, WIDTH)
        a, t = ranks(key > bar, key == bar)
        a, t = above[:, None] + a, ties[:, None] + t
        i = tl.load(where + at, mask=key >= bar, other=0)
        write_kept(row, i, D, key, bar, need, a, t, floats, message, CODED)
        above += tl.sum((key > bar).to(tl.int32), 1)
        ties += tl.sum((key == bar).to(tl.int32), 1)
