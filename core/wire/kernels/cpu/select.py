"""Top-k of a block that is read in chunks: exact, NaN largest, ties to the lower index.

Every entry whose magnitude is above a bar (or NaN) is a candidate; when their room is full they are cut to the k
largest, and the bar rises to the least of them. A later entry equal to it loses to the lower index.
"""

from __future__ import annotations

import numpy as np

from ...compressors import TOPK
from ..table import COUNT, KIND, NUMEL
from .compiling import helper
from .records import CHUNK, ZERO, Candidates

_DIGIT = 8  # bits of a digit of the radix selection: few enough that counting few entries costs little
_DIGITS = 1 << _DIGIT


@helper
def make_candidates(table, like):  # type: ignore[no-untyped-def]
    """Room for four times the largest k of a table, so that they are rarely cut, and eight that are not yet."""
    room = 0
    for r in range(len(table)):
        if table[r, KIND] == TOPK:
            room = max(room, min(table[r, NUMEL], 4 * table[r, COUNT] + 64))
    return Candidates(np.empty(room + 8, like.dtype), np.empty(room + 8, np.int64))


@helper
def offer(D, lo, n, k, candidates, found, bar, above):  # type: ignore[no-untyped-def]
    """Put the entries of a chunk that may be among the k largest into the candidates, in order. (found, bar) then.

    `above` takes one byte an entry, whether it is above the bar: a loop that vectorizes. Few eights of them have one.
    """
    value, index = candidates
    for i in range(CHUNK):
        above[i] = not abs(D[i]) <= bar
    eights = above.view(np.uint64)
    for j in range((n + 7) // 8):
        if eights[j] == 0:
            continue
        if found + 8 > value.size:
            found, bar = keep_largest(k, candidates, found)
        for i in range(8 * j, min(8 * j + 8, n)):
            value[found] = D[i]
            index[found] = lo + i
            found += not abs(D[i]) <= bar
    return found, bar


@helper
def guess_bar(D, n, row):  # type: ignore[no-untyped-def]
    """A magnitude that about twice as many entries of the block exceed as are kept, judged by its first chunk.

    If it proves too high, so that fewer than k are found, the block is gone through again without a guess.
    """
    rank = 2 * row[COUNT] * n // row[NUMEL] + 32
    if rank >= n:
        return D.dtype.type(-1)
    return _kth_largest(D[:n], rank)


@helper
def keep_largest(k, candidates, found):  # type: ignore[no-untyped-def]
    """Cut candidates (index ascending) to the k of largest magnitude, order kept. (k, least magnitude kept)."""
    value, index = candidates
    bar = _kth_largest(value[:found], k)
    above = ZERO
    for i in range(found):
        a = abs(value[i])
        above += a > bar or (np.isnan(a) and not np.isnan(bar))
    ties = k - above
    kept = ZERO
    for i in range(found):
        a = abs(value[i])
        larger = a > bar or (np.isnan(a) and not np.isnan(bar))
        tie = a == bar or (np.isnan(a) and np.isnan(bar))
        if larger or (tie and ties > 0):
            ties -= not larger
            value[kept] = value[i]
            index[kept] = index[i]
            kept += 1
    return kept, bar


@helper
def _kth_largest(v, k):  # type: ignore[no-untyped-def]
    """The k-th largest magnitude (k from 1), NaN above infinity: radix selection on the bits of float64.

    They are integers in the order of the magnitudes. Digit by digit, from the highest bit in which they differ, only
    those are kept that have the digit of the k-th; no order of the entries is a bad one.
    """
    wide = np.empty(v.size, np.float64)
    for i in range(v.size):
        wide[i] = abs(v[i])
    keys, count = wide.view(np.int64), np.empty(_DIGITS, np.int64)
    n, shift = v.size, _differing_bits(keys)
    while shift > 0 and n > 1:
        shift = max(shift - _DIGIT, ZERO)
        for d in range(_DIGITS):
            count[d] = 0
        for i in range(n):
            count[(keys[i] >> shift) & (_DIGITS - 1)] += 1
        digit = np.int64(_DIGITS - 1)
        while count[digit] < k:
            k -= count[digit]
            digit -= 1
        same = ZERO
        for i in range(n):
            key = keys[i]
            keys[same] = key
            same += (key >> shift) & (_DIGITS - 1) == digit
        n = same
    return v.dtype.type(wide[0])


@helper
def _differing_bits(keys):  # type: ignore[no-untyped-def]
    """How many low bits of these keys, which are not negative, are not the same in all of them."""
    different = ZERO
    for i in range(keys.size):
        different |= keys[i] ^ keys[0]
    bits = ZERO
    while different > 0:
        different >>= 1
        bits += 1
    return bits
