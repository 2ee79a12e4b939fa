"""What the compiled loops pass around, and how large a chunk is. numba takes NamedTuples of arrays apart itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 4096  # coordinates; a multiple of 8, so that a chunk's bits start at a byte
WIDTH = CHUNK // 2

# A literal 0 or True would be a type of its own for numba, and its callees would be compiled twice.
ZERO: Any = np.int64(0)
NO: Any = np.bool_(False)
YES: Any = np.bool_(True)


class Message(NamedTuple):
    """One message, or one from every worker, seen three times.

    Attributes:
        floats: [scalars] or [K, scalars] of the state's dtype.
        halves: [bytes / 2] or [K, bytes / 2] uint16: bfloat16; the same memory.
        bytes: [bytes] or [K, bytes] uint8; the same memory.
    """

    floats: Array
    halves: Array
    bytes: Array


class Room(NamedTuple):
    """Where a chunk is unpacked, and packed.

    Attributes:
        spread: [CHUNK] uint8: one byte a bit, since loops over bytes vectorize.
        words: [CHUNK] uint32: float32 by their bits.
    """

    spread: Array
    words: Array


class Scratch(NamedTuple):
    """What a thread works in.

    Attributes:
        D: [CHUNK] of the state's dtype: what is compressed.
        half: [WIDTH] float64: sums of magnitudes.
        room: for its code.
    """

    D: Array
    half: Array
    room: Room


class Candidates(NamedTuple):
    """Entries of a block that may be among the k largest, by index.

    Attributes:
        values: [room] of the state's dtype.
        indices: [room] int64.
    """

    values: Array
    indices: Array


class Progress(NamedTuple):
    """What the chunks of a block so far tell.

    Attributes:
        found: number of candidates (TOPK).
        bar: an entry of no larger magnitude is not among the k largest (TOPK).
        total: sum of magnitudes (SIGN).
    """

    found: Any
    bar: Any
    total: Any


class Adam(NamedTuple):
    """The columns of `saef.rules.adamw` that a coordinate needs, each of the state's dtype; and zero, of it too."""

    beta1: Any
    gain: Any
    beta2: Any
    own: Any
    cross: Any
    correct1: Any
    correct2: Any
    eps: Any
    bound: Any
    zero: Any
