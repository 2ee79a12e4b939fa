"""A fingerprint of a vector, by which a change of any entry shows.

It is a sum, modulo 2^64, over the vector's words. What a word adds is another number for every value of it, so the
change of one always shows. It depends on the place and, by an exclusive or of the halves of a product, on all bits, so
that the changes of several do not cancel but for a chance of some 2^-60.
"""

from __future__ import annotations

import numpy as np

from .compiling import helper

_HALF = np.uint64(31)
_PLACE, _VALUE = np.uint32(0x9E3779B1), np.uint64(0x85EBCA77)  # odd: 2^32 over the golden ratio, and murmur's


@helper
def fingerprint(words, start, n):  # type: ignore[no-untyped-def]
    """Of words[start : start + n], uint32."""
    part, total = words[start : start + n], np.uint64(0)
    place = np.uint32(np.uint64(start) * np.uint64(_PLACE))  # counted on, which costs less than a product a word
    for i in range(n):
        product = np.uint64(np.uint32(part[i] ^ place)) * _VALUE
        total += product ^ (product >> _HALF)
        place = np.uint32(place + _PLACE)
    return total
