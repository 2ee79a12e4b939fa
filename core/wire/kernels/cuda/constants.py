"""What all Triton code here reads: the columns, the sizes of things, and which tile a program has.

Triton reads a global only if it is a constexpr, and only under the name that a function's own module has for it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ....rules.rule import LR
from ...compressors import DENSE, SIGN, TOPK
from ..table import BYTE, COLUMNS, COUNT, FLOAT, GRAD, GROUP, HALF, KIND, NUMEL, STATE, UNIT

TILE = 4096  # coordinates of a program, at most; a power of two
LEAST = 256  # at least
A_THREAD = 16  # coordinates of a thread: many enough to keep memory busy, few enough for its registers
SPAN, WIDTH = 16, 128  # tiles, and candidates of each, that a program of the radix selection looks at together
NO_ROW = 2**31 - 1

_KIND, _GRAD, _STATE, _NUMEL, _GROUP, _FLOAT, _BYTE, _COUNT, _UNIT, _HALF, _COLUMNS = (
    tl.constexpr(c) for c in (KIND, GRAD, STATE, NUMEL, GROUP, FLOAT, BYTE, COUNT, UNIT, HALF, COLUMNS)
)
_DENSE, _SIGN, _TOPK = tl.constexpr(DENSE), tl.constexpr(SIGN), tl.constexpr(TOPK)
HALVES = 1 << 3  # of `Tiling.kinds`
_HAS_DENSE, _HAS_SIGN, _HAS_TOPK = tl.constexpr(1 << DENSE), tl.constexpr(1 << SIGN), tl.constexpr(1 << TOPK)
_HAS_HALVES = tl.constexpr(HALVES)
_LR = tl.constexpr(LR)
_TILE_COLUMNS = tl.constexpr(4)  # of Tiling.tiles
_DIGIT = tl.constexpr(8)  # bits of a digit of the radix selection
_DIGITS = tl.constexpr(256)
_CHUNK = tl.constexpr(256)  # entries of a top-k message, tiles or groups that a program reads at a time
_GROUP_COLUMNS = tl.constexpr(3)  # of Tiling.groups
_RUN = tl.constexpr(32)  # neighbouring coordinates in a sample

jit: Any = triton.jit
# Compiled for any value of these; by default Triton compiles again for 1 and for multiples of 16.
kernel: Any = triton.jit(do_not_specialize=["d", "slots", "digits", "float_stride", "byte_stride"])


@jit
def tile_of(tiles, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's row of Tiling.tiles: row, offset in the block, offset of the block in a scratch vector, slot."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_COLUMNS
    return tl.load(tile), tl.multiple_of(tl.load(tile + 1), TILE), tl.load(tile + 2), tl.load(tile + 3)


@jit
def entry(row, column, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """NUMEL, GRAD or STATE of a row; all are multiples of ALIGN, so that threads may move several numbers at once."""
    return tl.multiple_of(tl.load(row + column), ALIGN)
