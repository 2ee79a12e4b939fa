"""The kernels for CPU, fused with numba: each reads its inputs once, in chunks that stay in cache.

A worker or server *produces* a chunk of D into scratch; a code *consumes* it. The loops run without
the interpreter lock, and rows of a table are shared out to `torch.get_num_threads()` threads (torchrun
sets one per rank). No reduction depends on the number of threads or the vector width of the machine:
sums are made in float64 in a fixed order.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..compressors import DENSE, SIGN, TOPK
from . import (
    BYTE,
    COUNT,
    DECAY,
    FACTOR,
    FLOAT,
    GAIN,
    GRAD,
    GROUP,
    KIND,
    LR,
    MU,
    NESTEROV,
    NUMEL,
    STATE,
    UNIT,
    Rule,
    malformed,
)

CHUNK = 4096  # coordinates; a multiple of 8, so that a chunk's bits start at a byte
PARALLEL_NUMEL = 1 << 19  # below this, starting threads costs more than it gains

_GATHER = np.uint64(0x0102040810204080)
_jit = njit(nogil=True, cache=True, error_model="numpy")


def compress(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    _run(_compress, [table], _rule(rule), g, m, e, x, _floats(message, e), message)


def commit(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    _run(_commit, [table], _rule(rule), g, m, e, x, _floats(message, e), message)


def advance(
    table: Tensor,
    reply_table: Tensor,
    rule: Rule,
    ahead: float,
    g: Tensor,
    m: Tensor,
    e: Tensor,
    x: Tensor,
    half: Tensor,
    message: Tensor,
    replies: Tensor,
) -> None:
    """`commit`, `subtract` from x, and half <- x - ahead e for the next step, in one pass over memory.

    reply_table's STATE points into x. During the step x_half is in `half`, which weight decay reads.
    """
    settings = (*_rule(rule), e.numpy().dtype.type(ahead))
    own, other = _floats(message, e), _floats(replies, e)
    _run(_advance, [table, reply_table], settings, g, m, e, x, half, own, message, other, replies)


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    floats = _floats(messages, e)
    _run(_serve, [table, reply_table], (), floats, messages, e, _floats(reply, e), reply)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    floats = _floats(messages, e)
    _run(_settle, [table, reply_table], (), floats, messages, e, _floats(reply, e), reply)


def subtract(table: Tensor, message: Tensor, v: Tensor) -> None:
    _run(_subtract, [table], (), _floats(message, v), message, v)


def inspect(table: Tensor, message: Tensor) -> None:
    _run(_inspect, [table], (), message)


def _floats(message: Tensor, like: Tensor) -> Tensor:
    return message.view(like.dtype)


def _rule(rule: Rule) -> tuple[Any, ...]:
    hyper = rule.hyper.numpy()
    return hyper, hyper.dtype.type(rule.step_ahead), rule.feedback


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saef-kernel")


def _run(kernel: Any, tables: list[Tensor], scalars: tuple[Any, ...], *vectors: Tensor) -> None:
    """Call `kernel` on the tables' rows, in equal shares of coordinates, one per thread."""
    rows = [table.numpy() for table in tables]
    arrays = [vector.detach().numpy() for vector in vectors]
    threads = min(torch.get_num_threads(), len(rows[0]))
    ends = np.cumsum(rows[0][:, NUMEL])
    if threads < 2 or ends[-1] < PARALLEL_NUMEL:
        bad = int(kernel(*rows, *scalars, *arrays))
    else:
        cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads).tolist(), len(ends)]
        shares = [[table[a:b] for table in rows] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        found = _pool(threads).map(lambda share: int(kernel(*share, *scalars, *arrays)), shares)
        bad = next((a + b for a, b in zip(cuts[:-1], found, strict=True) if b >= 0), -1)
    if bad >= 0:
        raise malformed(bad)


# ---------------------------------------------------------------------------------------------
# Producing D


@_jit
def _produce(h, s, feedback, store, g, m, e, x, D):  # type: ignore[no-untyped-def]
    """D <- e + eta u for one chunk; with `store`, m <- m'. Mirrors `saef.feedback` operation by operation."""
    n, factor, lr, mu, gain = g.size, h[FACTOR], h[LR], h[MU], h[GAIN]
    if h[DECAY] != 0:
        decay = h[DECAY]
        for i in range(n):
            D[i] = g[i] * factor + (x[i] - e[i] * s) * decay
        g, factor = D, h.dtype.type(1)  # exact
    if not m.size:
        for i in range(n):
            D[i] = g[i] * factor
    elif h[NESTEROV] != 0:
        for i in range(n):
            d = g[i] * factor
            t = m[i] * mu + d * gain
            if store:
                m[i] = t
            D[i] = d + t * mu
    elif feedback and store:  # the usual case in one loop: three streams in, two out
        for i in range(n):
            t = m[i] * mu + g[i] * factor * gain
            m[i] = t
            D[i] = e[i] + t * lr
    elif feedback:
        for i in range(n):
            D[i] = e[i] + (m[i] * mu + g[i] * factor * gain) * lr
    else:
        for i in range(n):
            t = m[i] * mu + g[i] * factor * gain
            if store:
                m[i] = t
            D[i] = t
    if feedback and (not m.size or h[NESTEROV] != 0):
        for i in range(n):
            D[i] = e[i] + D[i] * lr


@_jit
def _produce_signs(h, s, g, m, e, x, half, spread):  # type: ignore[no-untyped-def]
    """For one whole chunk, with momentum: `_produce`, the first fold of `_sum_abs`, and the signs of `_pack`.

    In one loop, so that arithmetic hides behind the three streams that are read; the same bits.
    """
    factor, lr, mu, gain, decay = h[FACTOR], h[LR], h[MU], h[GAIN], h[DECAY]
    width = CHUNK // 2
    g2, m2, e2, x2, spread2 = g[width:], m[width:], e[width:], x[width:], spread[width:]
    if decay != 0:
        for i in range(width):
            a = e[i] + (m[i] * mu + (g[i] * factor + (x[i] - e[i] * s) * decay) * gain) * lr
            b = e2[i] + (m2[i] * mu + (g2[i] * factor + (x2[i] - e2[i] * s) * decay) * gain) * lr
            spread[i] = a >= 0
            spread2[i] = b >= 0
            half[i] = abs(np.float64(a)) + abs(np.float64(b))
    else:
        for i in range(width):
            a = e[i] + (m[i] * mu + g[i] * factor * gain) * lr
            b = e2[i] + (m2[i] * mu + g2[i] * factor * gain) * lr
            spread[i] = a >= 0
            spread2[i] = b >= 0
            half[i] = abs(np.float64(a)) + abs(np.float64(b))


@_jit
def _collect(row, lo, floats, messages, cursor, D, n, spread):  # type: ignore[no-untyped-def]
    """D <- mean_k C(D_k) on coordinates [lo, lo + n) of a block; False if a message is malformed."""
    share = D.dtype.type(1.0 / len(messages))
    D[:n] = 0
    for k in range(len(messages)):
        at = row[FLOAT]
        if row[KIND] == SIGN:
            _add_signs(messages[k, row[BYTE] + lo // 8 :], floats[k, at] * share, D[:n], spread)
        elif row[KIND] == DENSE:
            values = floats[k, at + lo : at + lo + n]
            for i in range(n):
                D[i] += values[i] * share
        else:
            after = _add_kept(row, floats[k], messages[k], cursor[k], lo, n, share, D)
            if after < 0:
                return False
            cursor[k] = after
    return True


@_jit
def _add(D, v):  # type: ignore[no-untyped-def]
    """D[:n] <- v + D[:n]. Slices, here and elsewhere: an index that is a sum may be negative for the compiler."""
    for i in range(v.size):
        D[i] = v[i] + D[i]


@_jit
def _add_signs(bits, scale, v, spread):  # type: ignore[no-untyped-def]
    """v += scale * sign, the signs packed 8 a byte, lowest bit first, 1 for +.

    `spread` takes one byte a bit: two simple loops vectorize, one over bits and floats does not.
    """
    for j in range((v.size + 7) // 8):
        b = bits[j]
        for i in range(8):
            spread[8 * j + i] = (b >> np.uint8(i)) & np.uint8(1)
    for i in range(v.size):
        v[i] += scale if spread[i] else -scale


@_jit
def _add_kept(row, floats, message, cursor, lo, n, factor, v):  # type: ignore[no-untyped-def]
    """v[index - lo] += factor * value for the entries from `cursor` on whose index is below lo + n.

    Returns the next cursor, or -1 if an index is not above its predecessor or not inside the block.
    """
    width = _index_bytes(row[NUMEL])
    last = _index(message, row[BYTE], width, cursor - 1) if cursor > 0 else -1
    while cursor < row[COUNT]:
        index = _index(message, row[BYTE], width, cursor)
        if index <= last or index >= row[NUMEL]:
            return -1
        if index >= lo + n:
            break
        v[index - lo] += floats[row[FLOAT] + cursor] * factor
        last = index
        cursor += 1
    return cursor


@_jit
def _index_bytes(n):  # type: ignore[no-untyped-def]
    """As saef.compressors.index_bytes."""
    return 1 + (n > 1 << 8) + (n > 1 << 16) + (n > 1 << 24)


@_jit
def _index(message, start, width, j):  # type: ignore[no-untyped-def]
    """Index j of a block, little-endian."""
    value = np.int64(0)
    for b in range(width):
        value |= np.int64(message[start + j * width + b]) << (8 * b)
    return value


# ---------------------------------------------------------------------------------------------
# Consuming D: encoding it


@_jit
def _sum_abs(D, n, half):  # type: ignore[no-untyped-def]
    """Sum of |D[:n]| in float64, folding the chunk in half again and again: the same order on every machine."""
    D[n:] = 0
    width = CHUNK // 2
    for i in range(width):
        half[i] = abs(np.float64(D[i])) + abs(np.float64(D[width + i]))
    return _fold(half)


@_jit
def _fold(half):  # type: ignore[no-untyped-def]
    """The sum of `half`, which is overwritten."""
    width = CHUNK // 2
    while width > 1:
        width //= 2
        for i in range(width):
            half[i] += half[width + i]
    return half[0]


@_jit
def _pack(D, n, bits, spread):  # type: ignore[no-untyped-def]
    """Bit i % 8 of bits[i // 8] <- D[i] >= 0. D is zero beyond n (`_sum_abs`)."""
    for i in range(CHUNK):
        spread[i] = D[i] >= 0
    for i in range(n, (n + 7) // 8 * 8):
        spread[i] = 0
    _gather(n, bits, spread)


@_jit
def _gather(n, bits, spread):  # type: ignore[no-untyped-def]
    """n bytes of 0 or 1 to bits."""
    eight = spread.view(np.uint64)
    for j in range((n + 7) // 8):
        bits[j] = np.uint8((eight[j] * _GATHER) >> np.uint64(56))  # byte i's lowest bit to bit i of the top byte


@_jit
def _offer(D, lo, n, k, value, index, found, bar):  # type: ignore[no-untyped-def]
    """Put the entries of a chunk that may be among the k largest into the candidates, in order.

    Every entry whose magnitude is above `bar` (or NaN) is a candidate; when the candidates' room is
    full they are cut to the k largest and the bar rises to the least of them. A later entry equal
    to it loses to the lower index, so the result is exact. Returns (candidates, bar).
    """
    for start in range(0, n, 8):
        end = min(start + 8, n)
        below = True
        for i in range(start, end):
            below &= abs(D[i]) <= bar
        if below:
            continue
        for i in range(start, end):
            if not abs(D[i]) <= bar:
                if found == value.size:
                    found, bar = _keep_largest(k, value, index, found)
                    if abs(D[i]) <= bar:
                        continue
                value[found] = D[i]
                index[found] = lo + i
                found += 1
    return found, bar


@_jit
def _guess_bar(D, n, row):  # type: ignore[no-untyped-def]
    """A magnitude that about twice as many entries of the block exceed as are kept, judged by its first chunk.

    If it proves too high, so that fewer than k are found, the block is gone through again without a guess.
    """
    rank = 2 * row[COUNT] * n // row[NUMEL] + 32
    if rank >= n:
        return D.dtype.type(-1)
    return np.partition(np.abs(D[:n]), n - rank)[n - rank]


@_jit
def _keep_largest(k, value, index, found):  # type: ignore[no-untyped-def]
    """Cut candidates (index ascending) to the k of largest magnitude, NaN largest, ties to the lower
    index, order kept. Returns (k, least magnitude kept)."""
    magnitude = np.abs(value[:found])
    bar = np.partition(magnitude, found - k)[found - k]
    above = 0
    for i in range(found):
        above += magnitude[i] > bar or (np.isnan(magnitude[i]) and not np.isnan(bar))
    ties = k - above
    kept = 0
    for i in range(found):
        a = magnitude[i]
        larger = a > bar or (np.isnan(a) and not np.isnan(bar))
        tie = a == bar or (np.isnan(a) and np.isnan(bar))
        if larger or (tie and ties > 0):
            ties -= not larger
            value[kept] = value[i]
            index[kept] = index[i]
            kept += 1
    return kept, bar


@_jit
def _write_kept(row, value, index, found, floats, message):  # type: ignore[no-untyped-def]
    k = row[COUNT]
    if found > k:
        _keep_largest(k, value, index, found)
    width = _index_bytes(row[NUMEL])
    for j in range(k):
        floats[row[FLOAT] + j] = value[j]
        for b in range(width):
            message[row[BYTE] + j * width + b] = np.uint8((index[j] >> (8 * b)) & 255)


@_jit
def _write_scale(row, total, floats):  # type: ignore[no-untyped-def]
    scale = total / row[NUMEL]
    if row[UNIT]:
        scale = 1.0 if np.isfinite(scale) else np.nan
    floats[row[FLOAT]] = scale


@_jit
def _scratch(dtype_of):  # type: ignore[no-untyped-def]
    """D, a chunk of float64 for sums, a chunk of bytes for bits."""
    return np.empty(CHUNK, dtype_of.dtype), np.empty(CHUNK // 2), np.empty(CHUNK, np.uint8)


@_jit
def _room(table):  # type: ignore[no-untyped-def]
    """Candidates to make room for: four times the largest k, so that they are rarely cut."""
    room = 0
    for row in table:
        if row[KIND] == TOPK:
            room = max(room, min(row[NUMEL], 4 * row[COUNT] + 64))
    return room


@_jit
def _consume(  # type: ignore[no-untyped-def]
    row, lo, n, guess, D, half, spread, value, index, found, bar, total, floats, message
):
    """Code of coordinates [lo, lo + n) of a block, as far as a chunk can tell. Returns (found, bar, total)."""
    if row[KIND] == SIGN:
        total += _sum_abs(D, n, half)
        _pack(D, n, message[row[BYTE] + lo // 8 :], spread)
    elif row[KIND] == DENSE:
        floats[row[FLOAT] + lo : row[FLOAT] + lo + n] = D[:n]
    else:
        if lo == 0:
            found, bar = 0, _guess_bar(D, n, row) if guess else D.dtype.type(-1)
        found, bar = _offer(D, lo, n, row[COUNT], value, index, found, bar)
    return found, bar, total


@_jit
def _finish(row, value, index, found, total, floats, message):  # type: ignore[no-untyped-def]
    """What only the whole block tells: its scale, or which entries are kept."""
    if row[KIND] == SIGN:
        _write_scale(row, total, floats)
    elif row[KIND] == TOPK:
        _write_kept(row, value, index, found, floats, message)


@_jit
def _missed(row, lo, found):  # type: ignore[no-untyped-def]
    """At the end of a block: too few entries were above the guessed bar."""
    return lo == row[NUMEL] and row[KIND] == TOPK and found < row[COUNT]


# ---------------------------------------------------------------------------------------------
# The kernels. Each returns -1, or the first row whose message is malformed.


@_jit
def _compress(table, hyper, s, feedback, g, m, e, x, floats, message):  # type: ignore[no-untyped-def]
    (D, half, spread), room = _scratch(e), _room(table)
    value, index = np.empty(room, e.dtype), np.empty(room, np.int64)
    for row in table:
        found, bar, total, lo, guess = 0, e.dtype.type(-1), 0.0, 0, True
        while lo < row[NUMEL]:
            n = min(CHUNK, row[NUMEL] - lo)
            a, b = row[GRAD] + lo, row[STATE] + lo
            h, mm = hyper[row[GROUP]], m[b : b + n] if m.size else m
            if row[KIND] == SIGN and n == CHUNK and feedback and m.size and h[NESTEROV] == 0:
                _produce_signs(h, s, g[a : a + n], mm, e[b : b + n], x[b : b + n], half, spread)
                total += _fold(half)
                _gather(n, message[row[BYTE] + lo // 8 :], spread)
            else:
                _produce(h, s, feedback, False, g[a : a + n], mm, e[b : b + n], x[b : b + n], D)
                found, bar, total = _consume(
                    row, lo, n, guess, D, half, spread, value, index, found, bar, total, floats, message
                )
            lo += n
            if _missed(row, lo, found):
                lo, guess = 0, False
        _finish(row, value, index, found, total, floats, message)
    return -1


@_jit
def _serve(table, reply_table, floats, messages, e, reply_floats, reply):  # type: ignore[no-untyped-def]
    (D, half, spread), room = _scratch(e), _room(reply_table)
    value, index = np.empty(room, e.dtype), np.empty(room, np.int64)
    cursor = np.empty(len(messages), np.int64)
    for r in range(len(table)):
        row, out = table[r], reply_table[r]
        found, bar, total, lo, guess = 0, e.dtype.type(-1), 0.0, 0, True
        while lo < row[NUMEL]:
            n = min(CHUNK, row[NUMEL] - lo)
            if lo == 0:
                cursor[:] = 0
            if not _collect(row, lo, floats, messages, cursor, D, n, spread):
                return r
            if e.size:
                _add(D, e[out[STATE] + lo : out[STATE] + lo + n])
            found, bar, total = _consume(
                out, lo, n, guess, D, half, spread, value, index, found, bar, total, reply_floats, reply
            )
            lo += n
            if _missed(out, lo, found):
                lo, guess = 0, False
        _finish(out, value, index, found, total, reply_floats, reply)
    return -1


@_jit
def _take(row, lo, n, floats, message, cursor, v, spread):  # type: ignore[no-untyped-def]
    """v[:n] -= C on coordinates [lo, lo + n) of a block; the next cursor, or -1."""
    if row[KIND] == SIGN:
        _add_signs(message[row[BYTE] + lo // 8 :], -floats[row[FLOAT]], v[:n], spread)
    elif row[KIND] == DENSE:
        values = floats[row[FLOAT] + lo : row[FLOAT] + lo + n]
        for i in range(n):
            v[i] -= values[i]
    else:
        return _add_kept(row, floats, message, cursor, lo, n, floats.dtype.type(-1), v)
    return cursor


@_jit
def _commit(table, hyper, s, feedback, g, m, e, x, floats, message):  # type: ignore[no-untyped-def]
    D, _, spread = _scratch(e)
    for r in range(len(table)):
        row, cursor = table[r], np.int64(0)
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            a, b = row[GRAD] + lo, row[STATE] + lo
            mm = m[b : b + n] if m.size else m
            _produce(hyper[row[GROUP]], s, feedback, True, g[a : a + n], mm, e[b : b + n], x[b : b + n], D)
            if feedback:
                cursor = _take(row, lo, n, floats, message, cursor, D, spread)
                if cursor < 0:
                    return r
                e[b : b + n] = D[:n]
    return -1


@_jit
def _advance(  # type: ignore[no-untyped-def]
    table, reply_table, hyper, s, feedback, ahead, g, m, e, x, half, floats, message, reply_floats, replies
):
    D, _, spread = _scratch(e)
    for r in range(len(table)):
        row, out, cursor, taken = table[r], reply_table[r], np.int64(0), np.int64(0)
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            a, b, c = row[GRAD] + lo, row[STATE] + lo, out[STATE] + lo
            mm, xx, hh = m[b : b + n] if m.size else m, x[c : c + n], half[b : b + n]
            _produce(hyper[row[GROUP]], s, feedback, True, g[a : a + n], mm, e[b : b + n], hh, D)
            if feedback:
                cursor = _take(row, lo, n, floats, message, cursor, D, spread)
                e[b : b + n] = D[:n]
            taken = _take(out, lo, n, reply_floats, replies, taken, xx, spread)
            if cursor < 0 or taken < 0:
                return r
            if ahead != 0:
                for i in range(n):
                    hh[i] = xx[i] - D[i] * ahead
            else:
                hh[:] = xx
    return -1


@_jit
def _settle(table, reply_table, floats, messages, e, reply_floats, reply):  # type: ignore[no-untyped-def]
    (D, _, spread), cursor = _scratch(e), np.empty(len(messages), np.int64)
    for r in range(len(table)):
        row, out, taken = table[r], reply_table[r], np.int64(0)
        cursor[:] = 0
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            if not _collect(row, lo, floats, messages, cursor, D, n, spread):
                return r
            b = out[STATE] + lo
            _add(D, e[b : b + n])
            taken = _take(out, lo, n, reply_floats, reply, taken, D, spread)
            if taken < 0:
                return r
            e[b : b + n] = D[:n]
    return -1


@_jit
def _subtract(table, floats, message, v):  # type: ignore[no-untyped-def]
    spread = np.empty(CHUNK, np.uint8)
    for r in range(len(table)):
        row, cursor = table[r], np.int64(0)
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            b = row[STATE] + lo
            cursor = _take(row, lo, n, floats, message, cursor, v[b : b + n], spread)
            if cursor < 0:
                return r
    return -1


@_jit
def _inspect(table, message):  # type: ignore[no-untyped-def]
    for r in range(len(table)):
        row, last = table[r], np.int64(-1)
        if row[KIND] == TOPK:
            width = _index_bytes(row[NUMEL])
            for j in range(row[COUNT]):
                index = _index(message, row[BYTE], width, j)
                if index <= last or index >= row[NUMEL]:
                    return r
                last = index
    return -1
