"""Decoding messages and encoding D, a tile a program: the layout of `saef.wire.codec`.

Arguments of all functions:

    r, row          a block's number, and the pointer to its row of a table
    lo, i, inside   offset of the tile in the block; [TILE] its coordinates; whether they are in the block
    D               [TILE] what is coded, in registers
    floats, message pointers to a message's floats and to its bytes, which are the same memory
    halves          pointer to its bfloat16 numbers, as int16, and the same memory
    rate            what C is multiplied with before it is subtracted
    SENT, CODED     the kinds of blocks that there can be: code for others takes registers that these need
    bad             pointer to the lowest row of a malformed message
"""

from __future__ import annotations

import triton.language as tl

from .constants import (
    _BYTE,
    _CHUNK,
    _COUNT,
    _DENSE,
    _FLOAT,
    _HALF,
    _HAS_DENSE,
    _HAS_HALVES,
    _HAS_SIGN,
    _HAS_TOPK,
    _KIND,
    _NUMEL,
    _SIGN,
    _TOPK,
    jit,
)
from .select import key_of, largest


# fmt: off
@jit
def signed(row, lo, message, scale, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale * sign on a tile; bit i % 8 of byte i // 8 is 1 for +.

    A thread has four neighbours, whose bits are in one byte: it reads that once.
    """
    four = lo // 4 + tl.arange(0, TILE // 4)
    there = 4 * four < tl.load(row + _NUMEL)
    bytes_ = tl.load(message + tl.load(row + _BYTE) + four // 2, mask=there, other=0).to(tl.int32)
    bits = (bytes_ >> (four % 2 * 4).to(tl.int32))[:, None] >> tl.arange(0, 4)[None, :]
    return tl.where(tl.reshape(bits & 1, (TILE,)) != 0, scale, -scale)


@jit
def halves_of(message):  # type: ignore[no-untyped-def]
    return message.to(tl.pointer_type(tl.int16), bitcast=True)


@jit
def scalars(row, j, mask, floats, halves, KINDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scalars j of a block."""
    at = tl.load(row + _FLOAT) + j
    if _HAS_HALVES & KINDS:
        half = tl.load(row + _HALF) != 0
        wide = tl.load(halves + at, mask=mask & half, other=0).to(tl.int32) << 16
        value = tl.load(floats + at, mask=mask & (half == 0), other=0)
        return tl.where(half, wide.to(tl.float32, bitcast=True).to(value.dtype), value)
    else:
        return tl.load(floats + at, mask=mask, other=0)


@jit
def write_scalars(row, j, D, mask, floats, message, KINDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scalars j of a block <- D, as bfloat16 if it has these: nearest, ties to even; any NaN is 0x7FC0."""
    at = tl.load(row + _FLOAT) + j
    if _HAS_HALVES & KINDS:
        half = tl.load(row + _HALF) != 0
        bits = D.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = tl.where(D != D, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        tl.store(halves_of(message) + at, nearest.to(tl.int16), mask=mask & half)
        tl.store(floats + at, D, mask=mask & (half == 0))
    else:
        tl.store(floats + at, D, mask=mask)


@jit
def index_bytes(n):  # type: ignore[no-untyped-def]
    """As saef.wire.compressors.index_bytes."""
    return 1 + (n > 1 << 8).to(tl.int32) + (n > 1 << 16).to(tl.int32) + (n > 1 << 24).to(tl.int32)


@jit
def index_at(start, j, width, mask):  # type: ignore[no-untyped-def]
    """Indices j of a block, little-endian; 0 where masked."""
    index = tl.zeros_like(j)
    for b in tl.static_range(4):
        if b < width:
            index |= tl.load(start + j * width + b, mask=mask, other=0).to(tl.int64) << (8 * b)
    return index


@jit
def find(messages, byte_stride, count, width, lo, K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lane 2k: the first entry of message k whose index is not below lo; 2k + 1: not below lo + TILE.

    A binary search. Whatever the indices are, neighbouring tiles agree on where one's entries end and the
    next one's begin, and no end is before its beginning.
    """
    lane = tl.arange(0, LANES)
    message = messages + tl.minimum(lane // 2, K - 1).to(tl.int64) * byte_stride
    bound = lo + (lane % 2) * TILE
    low = tl.zeros((LANES,), tl.int64)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        below = (low < high) & (index_at(message, middle, width, low < high) < bound)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
        left = left // 2
    return low


@jit
def add_kept(  # type: ignore[no-untyped-def]
    r, row, lo, floats, float_stride, messages, byte_stride, factor, v, bad,
    K: tl.constexpr, LANES: tl.constexpr, SENT: tl.constexpr, TILE: tl.constexpr,
):
    """v[index] += factor * value for the entries of K messages in [lo, lo + TILE), in rank order.

    Every entry of a message is checked, by the tile that finds it or as a rest of the last tile, and only
    used if it lies in the tile.
    """
    n, count = tl.load(row + _NUMEL), tl.load(row + _COUNT)
    width = index_bytes(n)
    if (n <= TILE) & (count <= _CHUNK):
        wrong = add_few(row, n, count, width, floats, float_stride, messages, byte_stride, factor, v, K, SENT)
    else:
        wrong = add_many(
            row, n, count, width, lo, floats, float_stride, messages, byte_stride, factor, v, K, LANES, SENT, TILE
        )
    if tl.max(wrong, 0) > 0:
        tl.atomic_min(bad, r.to(tl.int32))


@jit
def add_few(  # type: ignore[no-untyped-def]
    row, n, count, width, floats, float_stride, messages, byte_stride, factor, v, K: tl.constexpr, SENT: tl.constexpr
):
    """The block is one tile, and its entries fit into registers: the next message's are read before these are added."""
    j = tl.arange(0, _CHUNK).to(tl.int64)
    index, before, value = entries(row, j, j < count, width, floats, messages, SENT)
    wrong = tl.zeros((_CHUNK,), tl.int32)
    for k in range(K):
        here, below, add = index, before, value * factor
        floats += float_stride
        messages += byte_stride
        index, before, value = entries(row, j, (j < count) & (k + 1 < K), width, floats, messages, SENT)
        fine = (here < n) & ((here > below) | (j == 0))
        wrong += ((j < count) & (fine == 0)).to(tl.int32)
        used = (j < count) & fine
        tl.store(v + here, tl.load(v + here, mask=used, other=0) + add, mask=used)
        tl.debug_barrier()  # the next message may add to what another thread has written
    return wrong


@jit
def add_many(  # type: ignore[no-untyped-def]
    row, n, count, width, lo, floats, float_stride, messages, byte_stride, factor, v,
    K: tl.constexpr, LANES: tl.constexpr, SENT: tl.constexpr, TILE: tl.constexpr,
):
    """A tile of several, or with many entries: those in it are found, and read in chunks."""
    found = find(messages + tl.load(row + _BYTE), byte_stride, count, width, lo, K, LANES, TILE)
    lane = tl.arange(0, LANES)
    wrong = tl.zeros((_CHUNK,), tl.int32)
    for k in range(K):
        start = tl.sum(tl.where(lane == 2 * k, found, 0), 0)
        end = tl.sum(tl.where(lane == 2 * k + 1, found, 0), 0)
        for chunk in range(start, end, _CHUNK):
            j = chunk + tl.arange(0, _CHUNK)
            index, before, value = entries(row, j, j < end, width, floats, messages, SENT)
            fine = (index >= lo) & (index < tl.minimum(lo + TILE, n)) & ((index > before) | (j == 0))
            wrong += ((j < end) & (fine == 0)).to(tl.int32)
            used = (j < end) & fine
            tl.store(v + index, tl.load(v + index, mask=used, other=0) + value * factor, mask=used)
        if lo + TILE >= n:
            wrong += (end != count).to(tl.int32)
        tl.debug_barrier()  # the next message may add to what another thread has written
        floats += float_stride
        messages += byte_stride
    return wrong


@jit
def entries(row, j, there, width, floats, message, SENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries j of a block where they are `there`: index, the index before, value."""
    start = message + tl.load(row + _BYTE)
    index = index_at(start, j, width, there)
    before = index_at(start, j - 1, width, there & (j > 0))
    return index, before, scalars(row, j, there, floats, halves_of(message), SENT)


@jit
def take(  # type: ignore[no-untyped-def]
    r, row, lo, i, inside, D, rate, floats, message, v, bad,
    STORED: tl.constexpr, SENT: tl.constexpr, TILE: tl.constexpr,
):
    """v <- D - rate * C on a tile; `v` points to the block. STORED: for top-k, v is D already."""
    kind = tl.load(row + _KIND)
    at = floats + tl.load(row + _FLOAT)
    if _HAS_SIGN & SENT:
        if kind == _SIGN:
            tl.store(v + i, D - signed(row, lo, message, tl.load(at) * rate, TILE), mask=inside)
    if _HAS_DENSE & SENT:
        if kind == _DENSE:
            C = scalars(row, i, inside, floats, halves_of(message), SENT)
            tl.store(v + i, D - C * rate, mask=inside)
    if _HAS_TOPK & SENT:
        if kind == _TOPK:
            if not STORED:
                tl.store(v + i, D, mask=inside)
                tl.debug_barrier()  # a thread may subtract from what another has written
            minus = tl.full((), -1.0, floats.dtype.element_ty) * rate
            add_kept(r, row, lo, floats, 0, message, 0, minus, v, bad, 1, 2, SENT, TILE)


@jit
def average(  # type: ignore[no-untyped-def]
    r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, total,
    K: tl.constexpr, LANES: tl.constexpr, SENT: tl.constexpr, TILE: tl.constexpr,
):
    """mean_k C(D_k), summed in rank order. `total`: scratch for the block."""
    dtype = floats.dtype.element_ty
    kind = tl.load(row + _KIND)
    share = tl.full((), 1.0 / K, tl.float64).to(dtype)
    mean = tl.zeros((TILE,), dtype)
    at = floats + tl.load(row + _FLOAT)
    if _HAS_SIGN & SENT:
        if kind == _SIGN:
            for _ in tl.range(0, K, loop_unroll_factor=4):
                mean += signed(row, lo, messages, tl.load(at) * share, TILE)
                at += float_stride
                messages += byte_stride
    if _HAS_DENSE & SENT:
        if kind == _DENSE:
            for _ in tl.range(0, K, loop_unroll_factor=4):
                mean += scalars(row, i, inside, floats, halves_of(messages), SENT) * share
                floats += float_stride
                messages += byte_stride
    if _HAS_TOPK & SENT:
        if kind == _TOPK:
            tl.store(total + i, mean, mask=inside)
            tl.debug_barrier()  # a thread may add to what another has written
            add_kept(r, row, lo, floats, float_stride, messages, byte_stride, share, total, bad, K, LANES, SENT, TILE)
            mean = tl.load(total + i, mask=inside, other=0)
    return mean


@jit
def encode(  # type: ignore[no-untyped-def]
    row, lo, at, slot, i, inside, D, floats, message, partial, vector, where, bars, found, counts,
    TILE: tl.constexpr, CODED: tl.constexpr, REFILL: tl.constexpr,
):
    """Code of a tile of D, as far as one tile can tell; of a longer top-k block its candidates (`radix`)."""
    kind = tl.load(row + _KIND)
    if _HAS_SIGN & CODED:
        if kind == _SIGN:
            bits = tl.reshape(((D >= 0) & inside).to(tl.int32), (TILE // 8, 8))  # sign(0) = +1
            packed = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
            j = lo // 8 + tl.arange(0, TILE // 8)
            mask = j < (tl.load(row + _NUMEL) + 7) // 8
            tl.store(message + tl.load(row + _BYTE) + j, packed.to(tl.uint8), mask=mask)
            magnitude = tl.where(inside, tl.abs(D).to(tl.float64), 0.0)
            tl.store(partial + tl.program_id(0), tl.sum(magnitude, 0))
    if _HAS_DENSE & CODED:
        if kind == _DENSE:
            write_scalars(row, i, D, inside, floats, message, CODED)
    if _HAS_TOPK & CODED:
        if kind == _TOPK:
            key = key_of(D, inside)
            if slot < 0:
                bar, need = largest(key, tl.load(row + _COUNT).to(tl.int32))
                above, ties = ranks(key > bar, key == bar)
                write_kept(row, i, D, key, bar, need, above, ties, floats, message, CODED)
            else:
                offer(slot, at + lo, i, D, key, vector, where, bars, found, counts, REFILL)


@jit
def offer(slot, start, i, D, key, vector, where, bars, found, counts, REFILL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Put the tile's candidates, those not below the block's bar, in order where the tile begins. REFILL: all."""
    bar = tl.full((), 0, key.dtype)
    if not REFILL:
        bar = tl.load(bars + slot).to(key.dtype)
    place, _ = ranks(key >= bar, key < 0)
    at = start + place - 1
    tl.debug_barrier()  # `average` has read from there what another thread may now write
    tl.store(vector + at, D, mask=key >= bar)
    tl.store(where + at, i.to(tl.int32), mask=key >= bar)
    count = tl.sum((key >= bar).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), count)
    if not REFILL:
        tl.atomic_add(found + slot, count, sem="relaxed")


@jit
def ranks(above, tie):  # type: ignore[no-untyped-def]
    """Along the last axis, how many entries are `above`, and how many `tie`, up to each one and with it."""
    if above.shape[-1] < 1 << 15:
        both = tl.cumsum(above.to(tl.int32) | (tie.to(tl.int32) << 16), -1)
        return both & 0xFFFF, both >> 16
    else:
        return tl.cumsum(above.to(tl.int32), -1), tl.cumsum(tie.to(tl.int32), -1)


@jit
def write_kept(row, i, D, key, bar, need, above, ties, floats, message, CODED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the entries above the bar, and the first `need` of the block's that are equal to it.

    `above` and `ties`: the block's entries above the bar, and equal to it, up to each one.
    """
    kept = (key > bar) | ((key == bar) & (ties <= need))
    place = (above + tl.minimum(ties, need) - 1).to(tl.int64)
    write_scalars(row, place, D, kept, floats, message, CODED)
    width = index_bytes(tl.load(row + _NUMEL))
    start = message + tl.load(row + _BYTE) + place * width
    for b in tl.static_range(4):
        if b < width:
            tl.store(start + b, ((i >> (8 * b)) & 255).to(tl.uint8), mask=kept)
