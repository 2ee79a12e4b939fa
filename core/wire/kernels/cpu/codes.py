"""Encoding D and decoding messages, chunk by chunk: the layout of `saef.wire.codec`.

Arguments of all functions:

    row           [COLUMNS]     a block's row of a table
    lo, n         int           the chunk: coordinates [lo, lo + n) of the block
    D             [CHUNK]       what is coded, in its first n entries
    v             [n]           what is added to or subtracted from
    message       `Message`     its floats and bytes
    cursor        int           of a top-k block, the first entry that the chunks before have not used
    half, room                  of `Scratch`; spread, words: of `Room`

Slices everywhere: an index that is a sum may be negative for the compiler, which then does not vectorize.
"""

from __future__ import annotations

import numpy as np

from ...compressors import DENSE, SIGN, TOPK
from ..table import BYTE, COUNT, FLOAT, HALF, KIND, NUMEL, UNIT
from .compiling import helper
from .records import CHUNK, WIDTH, ZERO, Message, Progress, Room, Scratch
from .select import guess_bar, keep_largest, offer

_BITS = np.uint64(0x0102040810204080)


@helper
def make_scratch(like):  # type: ignore[no-untyped-def]
    return Scratch(np.empty(CHUNK, like.dtype), np.empty(WIDTH), make_room())


@helper
def make_room():  # type: ignore[no-untyped-def]
    return Room(np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint32))


@helper
def copy(source, v):  # type: ignore[no-untyped-def]
    """v <- source's first entries. An assignment to a slice compiles its error message, too: seconds in all."""
    for i in range(v.size):
        v[i] = source[i]


@helper
def clear(v):  # type: ignore[no-untyped-def]
    for i in range(v.size):
        v[i] = 0


# ---------------------------------------------------------------------------------------------
# Decoding


@helper
def average(row, lo, n, messages, cursor, D, room):  # type: ignore[no-untyped-def]
    """D <- mean_k C(D_k), in rank order; False if a message is malformed. `cursor`: [K]."""
    share = D.dtype.type(1.0 / len(messages.bytes))
    clear(D[:n])
    for k in range(len(messages.bytes)):
        at = row[FLOAT]
        if row[KIND] == SIGN:
            add_signs(messages.bytes[k, row[BYTE] + lo // 8 :], messages.floats[k, at] * share, D[:n], room.spread)
        elif row[KIND] == DENSE:
            if row[HALF]:
                add_values(widen(messages.halves[k, at + lo : at + lo + n], room.words), share, D[:n])
            else:
                add_values(messages.floats[k, at + lo : at + lo + n], share, D[:n])
        else:
            message = Message(messages.floats[k], messages.halves[k], messages.bytes[k])
            cursor[k] = add_kept(row, lo, n, message, cursor[k], share, D, room.words)
            if cursor[k] < 0:
                return False
    return True


@helper
def take(row, lo, n, rate, message, cursor, v, room):  # type: ignore[no-untyped-def]
    """v -= rate * C; the next cursor, or -1 if the message is malformed."""
    if row[KIND] == SIGN:
        add_signs(message.bytes[row[BYTE] + lo // 8 :], -(message.floats[row[FLOAT]] * rate), v[:n], room.spread)
    elif row[KIND] == DENSE:
        at = row[FLOAT] + lo
        if row[HALF]:
            add_values(widen(message.halves[at : at + n], room.words), -rate, v[:n])
        else:
            add_values(message.floats[at : at + n], -rate, v[:n])
    else:
        return add_kept(row, lo, n, message, cursor, -rate, v, room.words)
    return cursor


@helper
def add_values(values, factor, v):  # type: ignore[no-untyped-def]
    """v += factor * value."""
    for i in range(v.size):
        v[i] += values[i] * factor


@helper
def widen(halves, words):  # type: ignore[no-untyped-def]
    """bfloat16 as float32, in `words`."""
    for i in range(halves.size):
        words[i] = np.uint32(halves[i]) << np.uint32(16)
    return words.view(np.float32)


@helper
def add(v, D):  # type: ignore[no-untyped-def]
    """D <- v + D."""
    for i in range(v.size):
        D[i] = v[i] + D[i]


@helper
def add_signs(bits, scale, v, spread):  # type: ignore[no-untyped-def]
    """v += scale * sign, the signs packed 8 a byte, lowest bit first, 1 for +.

    `spread` takes one byte a bit: two simple loops vectorize, one over bits and floats does not.
    """
    for j in range((v.size + 7) // 8):
        b = bits[j]
        for i in range(8):
            spread[8 * j + i] = (b >> np.uint8(i)) & np.uint8(1)
    for i in range(v.size):
        v[i] += scale if spread[i] else -scale


@helper
def add_kept(row, lo, n, message, cursor, factor, v, words):  # type: ignore[no-untyped-def]
    """v[index - lo] += factor * value for the entries from `cursor` on whose index is below lo + n.

    Returns the next cursor, or -1 if an index is not above its predecessor or not inside the block.
    """
    width, packed = index_bytes(row[NUMEL]), message.bytes
    last = index_at(packed, row[BYTE], width, cursor - 1) if cursor > 0 else np.int64(-1)
    while cursor < row[COUNT]:
        index = index_at(packed, row[BYTE], width, cursor)
        if index <= last or index >= row[NUMEL]:
            return np.int64(-1)
        if index >= lo + n:
            break
        at = row[FLOAT] + cursor
        if row[HALF]:
            v[index - lo] += widen(message.halves[at : at + 1], words)[0] * factor
        else:
            v[index - lo] += message.floats[at] * factor
        last = index
        cursor += 1
    return cursor


@helper
def index_bytes(n):  # type: ignore[no-untyped-def]
    """As saef.wire.compressors.index_bytes."""
    return 1 + (n > 1 << 8) + (n > 1 << 16) + (n > 1 << 24)


@helper
def index_at(packed, start, width, j):  # type: ignore[no-untyped-def]
    """Index j of a block, little-endian."""
    value = ZERO
    for b in range(width):
        value |= np.int64(packed[start + j * width + b]) << (8 * b)
    return value


# ---------------------------------------------------------------------------------------------
# Encoding


@helper
def begin(row, like):  # type: ignore[no-untyped-def]
    """Before a block's first chunk."""
    return Progress(ZERO, like.dtype.type(-1), 0.0)


@helper
def encode(row, lo, n, guess, scratch, candidates, progress, message):  # type: ignore[no-untyped-def]
    """Code a chunk, as far as one can tell; what is known then. `guess`: guess the bar of a top-k block."""
    D, (found, bar, total) = scratch.D, progress
    if row[KIND] == SIGN:
        total += sum_abs(D, n, scratch.half)
        pack(D, n, message.bytes[row[BYTE] + lo // 8 :], scratch.room.spread)
    elif row[KIND] == DENSE:
        at = row[FLOAT] + lo
        if row[HALF]:
            narrow(D, message.halves[at : at + n], scratch.room.words)
        else:
            copy(D, message.floats[at : at + n])
    else:
        if lo == 0:
            found, bar = ZERO, guess_bar(D, n, row) if guess else D.dtype.type(-1)
        found, bar = offer(D, lo, n, row[COUNT], candidates, found, bar, scratch.room.spread)
    return Progress(found, bar, total)


@helper
def narrow(values, halves, words):  # type: ignore[no-untyped-def]
    """bfloat16 of a chunk's first values: nearest, ties to even; any NaN is 0x7FC0."""
    floats = words.view(np.float32)
    for i in range(halves.size):
        floats[i] = values[i]
    for i in range(halves.size):
        bits = np.uint64(words[i])
        nearest = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        halves[i] = np.uint16(nearest) if bits & np.uint64(0x7FFFFFFF) <= np.uint64(0x7F800000) else np.uint16(0x7FC0)


@helper
def missed(row, lo, progress):  # type: ignore[no-untyped-def]
    """At the end of a block: too few entries were above the guessed bar."""
    return lo == row[NUMEL] and row[KIND] == TOPK and progress.found < row[COUNT]


@helper
def finish(row, candidates, progress, message, words):  # type: ignore[no-untyped-def]
    """What only the whole block tells: its scale, or which entries are kept."""
    if row[KIND] == SIGN:
        scale = progress.total / row[NUMEL]
        if row[UNIT]:
            scale = 1.0 if np.isfinite(scale) else np.nan
        message.floats[row[FLOAT]] = scale
    elif row[KIND] == TOPK:
        write_kept(row, candidates, progress.found, message, words)


@helper
def sum_abs(D, n, half):  # type: ignore[no-untyped-def]
    """Sum of |D[:n]| in float64, folding the chunk in half again and again: the same order on every machine."""
    clear(D[n:])
    for i in range(WIDTH):
        half[i] = abs(np.float64(D[i])) + abs(np.float64(D[WIDTH + i]))
    return fold(half)


@helper
def fold(half):  # type: ignore[no-untyped-def]
    """The sum of `half`, which is overwritten."""
    width = WIDTH
    while width > 1:
        width //= 2
        for i in range(width):
            half[i] += half[width + i]
    return half[0]


@helper
def pack(D, n, bits, spread):  # type: ignore[no-untyped-def]
    """Bit i % 8 of bits[i // 8] <- D[i] >= 0. D is zero beyond n (`sum_abs`)."""
    for i in range(CHUNK):
        spread[i] = D[i] >= 0
    for i in range(n, (n + 7) // 8 * 8):
        spread[i] = 0
    pack_bits(n, bits, spread)


@helper
def pack_bits(n, bits, spread):  # type: ignore[no-untyped-def]
    """n bytes of 0 or 1 to bits."""
    eight = spread.view(np.uint64)
    for j in range((n + 7) // 8):
        bits[j] = np.uint8((eight[j] * _BITS) >> np.uint64(56))  # byte i's lowest bit to bit i of the top byte


@helper
def write_kept(row, candidates, found, message, words):  # type: ignore[no-untyped-def]
    k, (value, index) = row[COUNT], candidates
    if found > k:
        keep_largest(k, candidates, found)
    width = index_bytes(row[NUMEL])
    for j in range(k):
        at = row[FLOAT] + j
        if row[HALF]:
            narrow(value[j : j + 1], message.halves[at : at + 1], words)
        else:
            message.floats[at] = value[j]
        for b in range(width):
            message.bytes[row[BYTE] + j * width + b] = np.uint8((index[j] >> (8 * b)) & 255)
