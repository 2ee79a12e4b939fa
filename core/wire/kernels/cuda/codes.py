"""Decoding messages and encoding D, a tile a program: the layout of `saef.wire.codec`.

Arguments of all functions:

    r, row          a block's number, and the pointer to its row of a table
    lo, i, inside   offset of the tile in the block; [TILE] its coordinates; whether they are in the block
    D               [TILE] what is coded, in registers
    floats, message pointers to a message's floats and to its bytes, which are the same memory
    rate            what C is multiplied with before it is subtracted
    bad             pointer to the lowest row of a malformed message
"""

from __future__ import annotations

import triton.language as tl

from .constants import _BYTE, _CHUNK, _COUNT, _DENSE, _DIGITS, _FLOAT, _KIND, _NUMEL, _SIGN, jit
from .select import add_histogram, histogram_of, key_of, pick


# fmt: off
@jit
def signed(row, i, inside, message, scale):  # type: ignore[no-untyped-def]
    """scale * sign; bit i % 8 of byte i // 8 is 1 for +."""
    bits = tl.load(message + tl.load(row + _BYTE) + i // 8, mask=inside, other=0).to(tl.int32)
    return tl.where((bits >> (i % 8).to(tl.int32)) & 1 != 0, scale, -scale)


@jit
def index_bytes(n):  # type: ignore[no-untyped-def]
    """As saef.wire.compressors.index_bytes."""
    return 1 + (n > 1 << 8).to(tl.int32) + (n > 1 << 16).to(tl.int32) + (n > 1 << 24).to(tl.int32)


@jit
def index_at(start, j, width, mask):  # type: ignore[no-untyped-def]
    """Indices j of a block, little-endian; 0 where masked."""
    index, there = tl.zeros_like(j), tl.where(mask, width, 0)
    for b in tl.static_range(4):
        index |= tl.load(start + j * width + b, mask=b < there, other=0).to(tl.int64) << (8 * b)
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
    K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):
    """v[index] += factor * value for the entries of K messages in [lo, lo + TILE), in rank order.

    Every entry of a message is checked, by the tile that finds it or as a rest of the last tile, and only
    used if it lies in the tile.
    """
    n, count = tl.load(row + _NUMEL), tl.load(row + _COUNT)
    width = index_bytes(n)
    floats += tl.load(row + _FLOAT)
    messages += tl.load(row + _BYTE)
    found = find(messages, byte_stride, count, width, lo, K, LANES, TILE)
    lane = tl.arange(0, LANES)
    wrong = tl.full((), 0, tl.int32)
    for k in range(K):
        start = tl.sum(tl.where(lane == 2 * k, found, 0), 0)
        end = tl.sum(tl.where(lane == 2 * k + 1, found, 0), 0)
        for chunk in range(start, end, _CHUNK):
            j = chunk + tl.arange(0, _CHUNK)
            index = index_at(messages, j, width, j < end)
            before = index_at(messages, j - 1, width, (j < end) & (j > 0))
            fine = (index >= lo) & (index < tl.minimum(lo + TILE, n)) & ((index > before) | (j == 0))
            wrong += tl.sum(((j < end) & (fine == 0)).to(tl.int32), 0)
            used = (j < end) & fine
            value = tl.load(floats + j, mask=used, other=0) * factor
            tl.store(v + index, tl.load(v + index, mask=used, other=0) + value, mask=used)
        if lo + TILE >= n:
            wrong += (end != count).to(tl.int32)
        tl.debug_barrier()  # the next message may add to what another thread has written
        floats += float_stride
        messages += byte_stride
    if wrong > 0:
        tl.atomic_min(bad, r.to(tl.int32))


@jit
def take(  # type: ignore[no-untyped-def]
    r, row, lo, i, inside, D, rate, floats, message, v, bad, STORED: tl.constexpr, TILE: tl.constexpr
):
    """v <- D - rate * C on a tile; `v` points to the block. STORED: for top-k, v is D already."""
    kind = tl.load(row + _KIND)
    at = floats + tl.load(row + _FLOAT)
    if kind == _SIGN:
        tl.store(v + i, D - signed(row, i, inside, message, tl.load(at) * rate), mask=inside)
    elif kind == _DENSE:
        tl.store(v + i, D - tl.load(at + i, mask=inside, other=0) * rate, mask=inside)
    else:
        if not STORED:
            tl.store(v + i, D, mask=inside)
            tl.debug_barrier()  # a thread may subtract from what another has written
        minus = tl.full((), -1.0, floats.dtype.element_ty) * rate
        add_kept(r, row, lo, floats, 0, message, 0, minus, v, bad, 1, 2, TILE)


@jit
def average(  # type: ignore[no-untyped-def]
    r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, total,
    K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):
    """mean_k C(D_k), summed in rank order. `total`: scratch for the block."""
    dtype = floats.dtype.element_ty
    kind = tl.load(row + _KIND)
    share = tl.full((), 1.0 / K, tl.float64).to(dtype)
    mean = tl.zeros((TILE,), dtype)
    at = floats + tl.load(row + _FLOAT)
    if kind == _SIGN:
        for _ in range(K):
            mean += signed(row, i, inside, messages, tl.load(at) * share)
            at += float_stride
            messages += byte_stride
    elif kind == _DENSE:
        for _ in range(K):
            mean += tl.load(at + i, mask=inside, other=0) * share
            at += float_stride
    else:
        tl.store(total + i, mean, mask=inside)
        tl.debug_barrier()  # a thread may add to what another has written
        add_kept(
            r, row, lo, floats, float_stride, messages, byte_stride, share, total, bad, K, LANES, TILE
        )
        mean = tl.load(total + i, mask=inside, other=0)
    return mean


@jit
def encode(  # type: ignore[no-untyped-def]
    row, lo, slot, i, inside, D, floats, message, partial, vector, hist,
    TILE: tl.constexpr, HAS_TOPK: tl.constexpr,
):
    """Code of a tile of D, as far as one tile can tell. `vector`: scratch for the block."""
    kind = tl.load(row + _KIND)
    if kind == _SIGN:
        bits = tl.reshape(((D >= 0) & inside).to(tl.int32), (TILE // 8, 8))  # sign(0) = +1
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        j = lo // 8 + tl.arange(0, TILE // 8)
        mask = j < (tl.load(row + _NUMEL) + 7) // 8
        tl.store(message + tl.load(row + _BYTE) + j, packed.to(tl.uint8), mask=mask)
        magnitude = tl.where(inside, tl.abs(D).to(tl.float64), 0.0)
        tl.store(partial + tl.program_id(0), tl.sum(magnitude, 0))
    elif kind == _DENSE:
        tl.store(floats + tl.load(row + _FLOAT) + i, D, mask=inside)
    elif HAS_TOPK:
        key = key_of(D, inside)
        prefix = tl.full((), 0, key.dtype)
        if slot < 0:
            need = tl.load(row + _COUNT).to(tl.int32)
            for known in range(4 if key.dtype == tl.int32 else 8):
                prefix, need = pick(histogram_of(key, known, prefix), prefix, need)
            write_kept(row, i, D, key, prefix, need, 0, 0, floats, message)
        else:
            tl.store(vector + i, D, mask=inside)
            add_histogram(hist + slot * _DIGITS, histogram_of(key, 0, prefix))


@jit
def write_kept(row, i, D, key, threshold, need, above, ties, floats, message):  # type: ignore[no-untyped-def]
    """Write the entries of a tile above the threshold, and the first `need` ties of the block.

    `above` and `ties`: entries above, and at, the threshold in the block's tiles before this one.
    """
    tie = (key == threshold).to(tl.int32)
    kept = ((key > threshold) | ((tie != 0) & (ties + tl.cumsum(tie, 0) <= need))).to(tl.int32)
    place = (above + tl.minimum(ties, need) + tl.cumsum(kept, 0) - 1).to(tl.int64)
    tl.store(floats + tl.load(row + _FLOAT) + place, D, mask=kept != 0)
    width = index_bytes(tl.load(row + _NUMEL))
    start = message + tl.load(row + _BYTE) + place * width
    for b in tl.static_range(4):
        tl.store(start + b, ((i >> (8 * b)) & 255).to(tl.uint8), mask=b < kept * width)
