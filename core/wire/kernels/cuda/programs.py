"""The kernels: one program a tile, or (`write_scale`, `inspect`) a block. Arguments as in the package's docstring.

`at` is the offset of the block in a scratch vector, and `slot` its number among the blocks of the radix selection.
"""

from __future__ import annotations

import triton.language as tl

from .codes import average, encode, index_at, index_bytes, take
from .constants import (
    _BYTE,
    _CHUNK,
    _COLUMNS,
    _COUNT,
    _FLOAT,
    _GROUP,
    _KIND,
    _NUMEL,
    _SIGN,
    _STATE,
    _TOPK,
    _UNIT,
    entry,
    jit,
    kernel,
    tile_of,
)
from .radix import bar_of, sampled
from .rules import produce


# fmt: off
@jit
def is_needed(slot, row, found, REFILL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether this tile is coded. REFILL: only if its block has fewer candidates than are kept."""
    needed = tl.full((), True, tl.int1)
    if REFILL:
        needed = slot >= 0
        if needed:
            needed = tl.load(found + slot) < tl.load(row + _COUNT)
    return needed


@kernel
def compress(  # type: ignore[no-untyped-def]
    tiles, table, hyper, s, g, m, d, e, x, floats, message, partial, vector, where, bars, found, counts,
    TILE: tl.constexpr, ALIGN: tl.constexpr, RULE: tl.constexpr, FEEDBACK: tl.constexpr,
    HAS_M: tl.constexpr, HAS_E: tl.constexpr, SPACING: tl.constexpr, CODED: tl.constexpr, REFILL: tl.constexpr,
):
    r, lo, at, slot = tile_of(tiles, TILE)
    row = table + r * _COLUMNS
    if is_needed(slot, row, found, REFILL):
        i = lo + tl.arange(0, TILE)
        inside = i < entry(row, _NUMEL, ALIGN)
        D = produce(row, hyper, s, g, m, d, e, x, i, inside, False, RULE, FEEDBACK, HAS_M, HAS_E, SPACING, ALIGN)
        encode(
            row, lo, at, slot, i, inside, D, floats, message, partial, vector, where, bars, found, counts,
            TILE, CODED, REFILL,
        )


@kernel
def sample(  # type: ignore[no-untyped-def]
    tiles, table, large, hyper, s, g, m, d, e, x, bars,
    TILE: tl.constexpr, ALIGN: tl.constexpr, RULE: tl.constexpr, FEEDBACK: tl.constexpr,
    HAS_M: tl.constexpr, HAS_E: tl.constexpr, SPACING: tl.constexpr,
):
    """One program per block that is longer than a tile."""
    slot = tl.program_id(0)
    row = table + tl.load(large + slot) * _COLUMNS
    i = sampled(row, TILE)
    D = produce(row, hyper, s, g, m, d, e, x, i, i >= 0, False, RULE, FEEDBACK, HAS_M, HAS_E, SPACING, ALIGN)
    tl.store(bars + slot, bar_of(row, D, TILE))


@kernel
def sample_error(tiles, table, large, e, bars, TILE: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for a server, by its error alone: D is larger where something was sent, and seldom smaller."""
    slot = tl.program_id(0)
    row = table + tl.load(large + slot) * _COLUMNS
    D = tl.load(e + tl.load(row + _STATE) + sampled(row, TILE))
    tl.store(bars + slot, bar_of(row, D, TILE))


@kernel
def commit(  # type: ignore[no-untyped-def]
    tiles, table, hyper, s, g, m, d, e, x, floats, message, bad,
    TILE: tl.constexpr, ALIGN: tl.constexpr, RULE: tl.constexpr, FEEDBACK: tl.constexpr,
    HAS_M: tl.constexpr, HAS_E: tl.constexpr, SPACING: tl.constexpr, SENT: tl.constexpr,
):
    r, lo, at, slot = tile_of(tiles, TILE)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < entry(row, _NUMEL, ALIGN)
    D = produce(row, hyper, s, g, m, d, e, x, i, inside, True, RULE, FEEDBACK, HAS_M, HAS_E, SPACING, ALIGN)
    if FEEDBACK:
        once = tl.full((), 1.0, floats.dtype.element_ty)
        take(r, row, lo, i, inside, D, once, floats, message, e + entry(row, _STATE, ALIGN), bad, False, SENT, TILE)


@kernel
def serve(  # type: ignore[no-untyped-def]
    tiles, table, reply_table, messages_floats, float_stride, messages, byte_stride, e, bad,
    floats, reply, partial, vector, where, bars, found, counts,
    TILE: tl.constexpr, ALIGN: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
    HAS_E: tl.constexpr, SENT: tl.constexpr, CODED: tl.constexpr, REFILL: tl.constexpr,
):
    r, lo, at, slot = tile_of(tiles, TILE)
    row, out = table + r * _COLUMNS, reply_table + r * _COLUMNS
    if is_needed(slot, out, found, REFILL):
        i = lo + tl.arange(0, TILE)
        inside = i < entry(row, _NUMEL, ALIGN)
        D = average(
            r, row, lo, i, inside, messages_floats, float_stride, messages, byte_stride, bad, vector + at,
            K, LANES, SENT, TILE,
        )
        if HAS_E:
            D = tl.load(e + entry(out, _STATE, ALIGN) + i, mask=inside, other=0) + D
        encode(
            out, lo, at, slot, i, inside, D, floats, reply, partial, vector, where, bars, found, counts,
            TILE, CODED, REFILL,
        )


@kernel
def settle(  # type: ignore[no-untyped-def]
    tiles, table, reply_table, floats, float_stride, messages, byte_stride, e, bad,
    reply_floats, reply, vector, TILE: tl.constexpr, ALIGN: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
    SENT: tl.constexpr, CODED: tl.constexpr,
):
    r, lo, at, slot = tile_of(tiles, TILE)
    row, out = table + r * _COLUMNS, reply_table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < entry(row, _NUMEL, ALIGN)
    D = average(
        r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, vector + at, K, LANES, SENT, TILE
    )
    v = e + entry(out, _STATE, ALIGN)
    D = tl.load(v + i, mask=inside, other=0) + D
    once = tl.full((), 1.0, floats.dtype.element_ty)
    take(r, out, lo, i, inside, D, once, reply_floats, reply, v, bad, False, CODED, TILE)


@kernel
def subtract(  # type: ignore[no-untyped-def]
    tiles, table, rates, floats, message, v, bad, TILE: tl.constexpr, ALIGN: tl.constexpr, SENT: tl.constexpr
):
    r, lo, at, slot = tile_of(tiles, TILE)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.where(tl.load(row + _KIND) == _TOPK, 0, entry(row, _NUMEL, ALIGN))
    v += entry(row, _STATE, ALIGN)
    D = tl.load(v + i, mask=inside, other=0)
    rate = tl.load(rates + tl.load(row + _GROUP))
    take(r, row, lo, i, inside, D, rate, floats, message, v, bad, True, SENT, TILE)


@kernel
def step_ahead(  # type: ignore[no-untyped-def]
    tiles, table, x_table, x, e, half, ahead, TILE: tl.constexpr, ALIGN: tl.constexpr, AHEAD: tl.constexpr
):
    """half <- x - ahead e; AHEAD: whether ahead is not 0."""
    r, lo, at, slot = tile_of(tiles, TILE)
    row, out = table + r * _COLUMNS, x_table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < entry(row, _NUMEL, ALIGN)
    here = entry(row, _STATE, ALIGN) + i
    stepped = tl.load(x + entry(out, _STATE, ALIGN) + i, mask=inside, other=0)
    if AHEAD:
        stepped -= tl.load(e + here, mask=inside, other=0) * tl.load(ahead)
    tl.store(half + here, stepped, mask=inside)


@kernel
def write_scale(tiles, first, table, partial, floats, TILE: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per block: the scale from the tiles' sums."""
    r = tl.program_id(0).to(tl.int64)
    row = table + r * _COLUMNS
    if tl.load(row + _KIND) == _SIGN:
        n = tl.load(row + _NUMEL)
        start = tl.load(first + r)
        end = start + (n + TILE - 1) // TILE
        total = tl.zeros((_CHUNK,), tl.float64)
        for chunk in range(start, end, _CHUNK):
            t = chunk + tl.arange(0, _CHUNK)
            total += tl.load(partial + t, mask=t < end, other=0)
        scale = tl.sum(total, 0) / n.to(tl.float64)
        if tl.load(row + _UNIT) != 0:
            scale = tl.where(scale - scale == 0, 1.0, float("nan")).to(tl.float64)
        tl.store(floats + tl.load(row + _FLOAT), scale.to(floats.dtype.element_ty))


@kernel
def inspect(tiles, table, message, bad, TILE: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per block."""
    r = tl.program_id(0).to(tl.int64)
    row = table + r * _COLUMNS
    count = tl.where(tl.load(row + _KIND) == _TOPK, tl.load(row + _COUNT), 0)
    n = tl.load(row + _NUMEL)
    width = index_bytes(n)
    start = message + tl.load(row + _BYTE)
    wrong = tl.full((), 0, tl.int32)
    for chunk in range(0, count, _CHUNK):
        j = chunk + tl.arange(0, _CHUNK).to(tl.int64)
        index = index_at(start, j, width, j < count)
        before = index_at(start, j - 1, width, (j < count) & (j > 0))
        fine = (index < n) & ((index > before) | (j == 0))
        wrong += tl.sum(((j < count) & (fine == 0)).to(tl.int32), 0)
    if wrong > 0:
        tl.atomic_min(bad, r.to(tl.int32))
