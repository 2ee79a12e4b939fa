"""A fingerprint of each of many tensors, by which a change of any entry shows: as `saef.wire.kernels.cpu.prints`.

The sum over words has no order, so tiles add theirs to it as they come.

    tiles        [T, 4] int64: number of the tensor, address of the tile's first word, words, the first one's number
    prints       [n] int64
    TURNS        how often LANES words make a tile
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from .constants import kernel

WORD_BYTES = 4
LANES, TURNS = 2048, 8
_PLACE, _VALUE = tl.constexpr(0x9E3779B1), tl.constexpr(0x85EBCA77)  # odd: 2^32 over the golden ratio, and murmur's


# fmt: off
@kernel
def fingerprint(tiles, prints, LANES: tl.constexpr, TURNS: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    words = tl.load(tile + 1).to(tl.pointer_type(tl.int32))
    n, start = tl.load(tile + 2), tl.load(tile + 3)
    total = tl.zeros((LANES,), tl.uint64)
    for turn in range(TURNS):
        i = turn * LANES + tl.arange(0, LANES)
        word = tl.load(words + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
        place = (start + i).to(tl.uint32) * _PLACE
        product = (word ^ place).to(tl.uint64) * _VALUE
        total += tl.where(i < n, product ^ (product >> 31), 0)
    tl.atomic_add(prints + tl.load(tile), tl.sum(total, 0).to(tl.int64, bitcast=True), sem="relaxed")
# fmt: on


def fingerprints(addresses: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64 on `device`: of the memory at n addresses.

    Args:
        addresses: of tensors on `device` without gaps.
        sizes: in bytes; whole words are read, so up to 3 bytes more on either side.
    """
    prints = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    tiles = tiles_of(tuple(addresses), tuple(sizes), device)
    if len(tiles):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # the interpreter
            fingerprint[(len(tiles),)](tiles, prints, LANES=LANES, TURNS=TURNS, num_warps=8)
    return prints


@lru_cache(40)  # x and parts of x_half stay where they are, and gradients mostly
def tiles_of(addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensors cut into tiles."""
    at, size = torch.tensor([addresses, sizes], dtype=torch.int64, device="cpu").view(2, -1)
    first = at // WORD_BYTES
    words = torch.where(size > 0, -(-(at + size) // WORD_BYTES) - first, 0)
    tiles = -(-words // (LANES * TURNS))
    tensor = torch.arange(len(at), device="cpu").repeat_interleave(tiles)
    start = (torch.arange(len(tensor), device="cpu") - (tiles.cumsum(0) - tiles)[tensor]) * (LANES * TURNS)
    columns = [tensor, (first[tensor] + start) * WORD_BYTES, words[tensor] - start, start]
    found = torch.stack(columns, 1).contiguous()
    if device.type != "cuda":
        return found
    return found.pin_memory().to(device, non_blocking=True)  # from other memory the host would wait
