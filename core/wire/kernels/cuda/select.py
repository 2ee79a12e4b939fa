"""Selecting the k largest magnitudes by their bits, which as integers are in the same order.

D, inside   [TILE] a tile, and what of it is in the block
key         the magnitudes as integers, -1 for what does not take part
need        int: the rank of the key that is looked for, from 1
"""

from __future__ import annotations

import triton.language as tl

from .constants import _DIGIT, _DIGITS, jit


# fmt: off
@jit
def key_of(D, inside):  # type: ignore[no-untyped-def]
    """Integers ordered as |D|, all NaN alike and above infinity; -1 outside of the block."""
    if D.dtype == tl.float32:
        key = tl.minimum(D.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    else:
        key = tl.minimum(D.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001)
    return tl.where(inside, key, -1)


@jit
def largest(key, need):  # type: ignore[no-untyped-def]
    """(bar, ties): the `need` largest of these keys are those above `bar`, and the first `ties` that are equal to it.

    Fewer than `need` keys are not below `high`, as many or more are not below `low`. From the largest key down in
    steps that double, then by halves; once exactly `need` are not below `low`, what lies between does not matter: after
    some ten turns for common numbers.
    """
    top = tl.max(key, 0) + 1
    step = tl.full((), 1, key.dtype) << (key.dtype.primitive_bitwidth - 11)  # a quarter of a factor of 2
    low, high, count = top, top, tl.full((), 0, tl.int32)
    while count < need:
        high = low
        low = tl.maximum(top - step, 0)
        step = tl.where(step > top // 2, top, step * 2).to(key.dtype)
        count = tl.sum((key >= low).to(tl.int32), 0)
    while (count != need) & (high - low > 1):
        middle = low + (high - low) // 2
        found = tl.sum((key >= middle).to(tl.int32), 0)
        enough = found >= need
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, found, count)
    return low, need - tl.sum((key > low).to(tl.int32), 0)


@jit
def histogram_of(key, known, prefix):  # type: ignore[no-untyped-def]
    """How often each value of the next digit occurs among the keys that begin with `known` digits `prefix`."""
    lowest = 24 if key.dtype == tl.int32 else 56  # bit of the first digit
    upper = key >> (lowest - _DIGIT * known)
    match = upper >> _DIGIT == prefix
    count = tl.histogram(tl.where(match, upper & (_DIGITS - 1), 0).to(tl.int32), _DIGITS)
    others = tl.sum((match == 0).to(tl.int32), 0)  # they were counted as 0
    return count - tl.where(tl.arange(0, _DIGITS) == 0, others, 0)


@jit
def add_histogram(hist, count):  # type: ignore[no-untyped-def]
    tl.atomic_add(hist + tl.arange(0, _DIGITS), count, mask=count > 0, sem="relaxed")


@jit
def pick(count, prefix, need):  # type: ignore[no-untyped-def]
    """The next digit of the need-th largest key joins `prefix`, and `need` is then its rank among such keys."""
    at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    digit = tl.sum((at_least >= need).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, _DIGITS) > digit, count, 0), 0)
    return (prefix << _DIGIT) | digit.to(prefix.dtype), need - above
