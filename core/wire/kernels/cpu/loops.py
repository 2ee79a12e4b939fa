"""The eight kernels, over the rows of a table: arguments as in the package's docstring.

Each returns -1, or the first row whose message is malformed. `a`, `b` and `c` are where a chunk begins in g, in the
state's vectors, and in what a reply's table points into.
"""

from __future__ import annotations

import numpy as np

from ...compressors import SIGN, TOPK
from ..table import BYTE, COUNT, GRAD, GROUP, KIND, NUMEL, STATE
from .codes import (
    add,
    average,
    begin,
    clear,
    copy,
    encode,
    finish,
    fold,
    index_at,
    index_bytes,
    make_room,
    make_scratch,
    missed,
    pack_bits,
    take,
)
from .compiling import kernel
from .prints import fingerprint
from .records import CHUNK, NO, YES, ZERO, Progress
from .rules import fuses_signs, produce, produce_signs
from .select import make_candidates


@kernel
def compress(table, update, worker, message):  # type: ignore[no-untyped-def]
    g, m, e, x = worker
    scratch, candidates = make_scratch(g), make_candidates(table, g)
    D, half, (spread, words) = scratch
    packed = message.bytes
    for r in range(len(table)):
        row = table[r]
        h = update.hyper[row[GROUP]]
        fused = row[KIND] == SIGN and fuses_signs(update, h, m)
        progress, lo, guess, total = begin(row, g), ZERO, YES, 0.0
        while lo < row[NUMEL]:
            n = min(CHUNK, row[NUMEL] - lo)
            a, b = row[GRAD] + lo, row[STATE] + lo
            if fused and n == CHUNK:
                produce_signs(update, h, g[a : a + n], m, b, e[b : b + n], x[b : b + n], half, spread)
                total += fold(half)
                pack_bits(n, packed[row[BYTE] + lo // 8 :], spread)
            else:
                produce(update, h, NO, g[a : a + n], m, b, e[b : b + n], x[b : b + n], D)
                progress = encode(row, lo, n, guess, scratch, candidates, progress, message)
            lo += n
            if missed(row, lo, progress):
                lo, guess = ZERO, NO
        finish(row, candidates, Progress(progress.found, progress.bar, total + progress.total), message, words)
    return -1


@kernel
def commit(table, update, worker, message):  # type: ignore[no-untyped-def]
    g, m, e, x = worker
    scratch, once = make_scratch(g), g.dtype.type(1)
    D = scratch.D
    for r in range(len(table)):
        row, cursor = table[r], ZERO
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            a, b = row[GRAD] + lo, row[STATE] + lo
            produce(update, update.hyper[row[GROUP]], YES, g[a : a + n], m, b, e[b : b + n], x[b : b + n], D)
            if update.feedback:
                cursor = take(row, lo, n, once, message, cursor, D, scratch.room)
                if cursor < 0:
                    return r
                copy(D, e[b : b + n])
    return -1


@kernel
def advance(table, reply_table, prints, update, worker, message, rates, replies, half, ahead):  # type: ignore[no-untyped-def]
    g, m, e, x = worker
    words, size = x.view(np.uint32), x.itemsize // 4
    scratch, once = make_scratch(g), g.dtype.type(1)
    D = scratch.D
    for r in range(len(table)):
        row, out, cursor, taken = table[r], reply_table[r], ZERO, ZERO
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            a, b, c = row[GRAD] + lo, row[STATE] + lo, out[STATE] + lo
            xx, hh = x[c : c + n], half[b : b + n]
            produce(update, update.hyper[row[GROUP]], YES, g[a : a + n], m, b, e[b : b + n], hh, D)
            if update.feedback:
                cursor = take(row, lo, n, once, message, cursor, D, scratch.room)
                copy(D, e[b : b + n])
            taken = take(out, lo, n, rates[out[GROUP]], replies, taken, xx, scratch.room)
            if cursor < 0 or taken < 0:
                return r
            if ahead != 0:
                for i in range(n):
                    hh[i] = xx[i] - D[i] * ahead
            else:
                copy(xx, hh)
            if prints.size:
                prints[r] += fingerprint(words, c * size, n * size)
    return -1


@kernel
def serve(table, reply_table, messages, e, reply):  # type: ignore[no-untyped-def]
    scratch, candidates = make_scratch(reply.floats), make_candidates(reply_table, reply.floats)
    cursor = np.empty(len(messages.bytes), np.int64)
    for r in range(len(table)):
        row, out = table[r], reply_table[r]
        progress, lo, guess = begin(out, reply.floats), ZERO, YES
        while lo < row[NUMEL]:
            n = min(CHUNK, row[NUMEL] - lo)
            if lo == 0:
                clear(cursor)
            if not average(row, lo, n, messages, cursor, scratch.D, scratch.room):
                return r
            if e.size:
                c = out[STATE] + lo
                add(e[c : c + n], scratch.D)
            progress = encode(out, lo, n, guess, scratch, candidates, progress, reply)
            lo += n
            if missed(out, lo, progress):
                lo, guess = ZERO, NO
        finish(out, candidates, progress, reply, scratch.room.words)
    return -1


@kernel
def settle(table, reply_table, messages, e, reply):  # type: ignore[no-untyped-def]
    scratch, once = make_scratch(e), e.dtype.type(1)
    D, cursor = scratch.D, np.empty(len(messages.bytes), np.int64)
    for r in range(len(table)):
        row, out, taken = table[r], reply_table[r], ZERO
        clear(cursor)
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            if not average(row, lo, n, messages, cursor, D, scratch.room):
                return r
            c = out[STATE] + lo
            add(e[c : c + n], D)
            taken = take(out, lo, n, once, reply, taken, D, scratch.room)
            if taken < 0:
                return r
            copy(D, e[c : c + n])
    return -1


@kernel
def subtract(table, rates, message, v):  # type: ignore[no-untyped-def]
    room = make_room()
    for r in range(len(table)):
        row, cursor = table[r], ZERO
        rate = rates[row[GROUP]]
        for lo in range(0, row[NUMEL], CHUNK):
            n = min(CHUNK, row[NUMEL] - lo)
            b = row[STATE] + lo
            cursor = take(row, lo, n, rate, message, cursor, v[b : b + n], room)
            if cursor < 0:
                return r
    return -1


@kernel
def inspect(table, packed):  # type: ignore[no-untyped-def]
    for r in range(len(table)):
        row, last = table[r], np.int64(-1)
        if row[KIND] == TOPK:
            width = index_bytes(row[NUMEL])
            for j in range(row[COUNT]):
                index = index_at(packed, row[BYTE], width, j)
                if index <= last or index >= row[NUMEL]:
                    return r
                last = index
    return -1


@kernel
def fingerprints(words, starts, counts, out):  # type: ignore[no-untyped-def]
    for k in range(len(starts)):
        out[k] = fingerprint(words, starts[k], counts[k])
