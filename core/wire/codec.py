"""Signs, scales, values and indices of many blocks <-> one uint8 message.

Layout of a message for blocks 1..B, in this order (no header: ranks know the layout):

    scalars of block 1 | ... | scalars of block B      state's dtype, 4 or 8 bytes each
    halves of block 1  | ... | halves of block B       bfloat16, 2 bytes each
    bytes of block 1   | ... | bytes of block B        packed bits or indices
    zeros up to a multiple of 8 bytes                  so that messages can lie one after the other

    code        scalars of a block of n         bytes of a block of n
    sign        1: the scale                    ceil(n / 8): bit i % 8 of byte i // 8 is D[i] >= 0
    top-k       k: the values, by index         k * w: indices, ascending, little-endian, w = 1..4 bytes
    dense       n: the values                   0

Where a code's values are bfloat16 they are halves instead of scalars: the upper 16 bits of a float32, rounded to
nearest, ties to even; any NaN is 0x7FC0.

Little-endian machines only (all that PyTorch supports today). A message that is not exactly of this form
is refused: wrong length, an index out of range or out of order, a scalar that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules.sgd import PLAIN, SGD
from . import kernels
from .compressors import Code, Compressor, Identity, MajorityVote, ScaledSign, TopK, codes_of
from .kernels.table import (
    BYTE,
    COLUMNS,
    COUNT,
    FLOAT,
    GRAD,
    GROUP,
    HALF,
    KIND,
    NUMEL,
    STATE,
    UNIT,
    Update,
    Worker,
    check_kinds,
)

ALIGNMENT_BYTES, HALF_BYTES = 8, 2
CODES = (Identity, ScaledSign, MajorityVote, TopK)  # what the format has a code for


class Block(NamedTuple):
    """One block of the model. Offsets in coordinates.

    Attributes:
        up, down: its codes on the way to and from the server.
        grad: offset in the gradient vector at hand (a DDP bucket).
        state: offset in the state's flat vectors.
        served: offset in the server error of the rank that serves it.
        numel: coordinates.
        group: the optimizer's parameter group.
    """

    up: Code
    down: Code
    grad: int
    state: int
    served: int
    numel: int
    group: int


class Layout(NamedTuple):
    """Where each block's code lies in a message.

    Attributes:
        table: [B, COLUMNS] int64, as the kernels read it.
        message_bytes: length of the message; used_bytes: without the padding.
        scalars: number of floating-point scalars at its head; halves: of bfloat16 ones behind them.
    """

    table: Tensor
    message_bytes: int
    scalars: int
    halves: int
    used_bytes: int


def lay_out(blocks: Sequence[Block], itemsize: int, *, reply: bool, served: bool, start: int = 0) -> Layout:
    """Lay out one message.

    Args:
        blocks: in the order in which they are coded.
        itemsize: bytes of a scalar, 4 or 8.
        reply: code with the blocks' codes on the way back from the server.
        served: let the STATE column point into the server error instead of the flat state.
        start: where the message begins in a longer buffer, in bytes (a multiple of 8).

    Raises:
        TypeError: if the format has no code for a block's compressor.
    """
    codes = [b.down if reply else b.up for b in blocks]
    for code in codes:
        if type(code) not in CODES:
            raise TypeError(
                f"the wire format has no code for {type(code).__name__}; it has for "
                f"{', '.join(c.__name__ for c in CODES)}: let `for_tensor` return one of these"
            )
    counts = [code.scalars(b.numel) for code, b in zip(codes, blocks, strict=True)]
    halves = sum(n for code, n in zip(codes, counts, strict=True) if code.half)
    scalars = sum(counts) - halves
    at_half = start + scalars * itemsize
    at, at_byte = [start // itemsize, at_half // HALF_BYTES], at_half + halves * HALF_BYTES  # at: by whether half
    rows = []
    for code, block, count in zip(codes, blocks, counts, strict=True):
        row = [0] * COLUMNS
        row[KIND], row[UNIT], row[HALF] = code.kind, code.unit_scale, code.half
        row[GRAD], row[STATE] = block.grad, block.served if served else block.state
        row[NUMEL], row[GROUP], row[COUNT] = block.numel, block.group, count
        row[FLOAT], row[BYTE] = at[code.half], at_byte
        at[code.half] += count
        at_byte += code.raw_bytes(block.numel)
        rows.append(row)
    check_kinds(row[KIND] for row in rows)
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, COLUMNS)
    length = -(-(at_byte - start) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Layout(table, length, scalars, halves, at_byte - start)


def block_ranges(numel: int, block_numel: int | None) -> list[tuple[int, int]]:
    """(offset, numel) of the blocks of a tensor; one block if `block_numel` is None, none if it is empty."""
    size = block_numel or max(1, numel)
    return [(start, min(size, numel - start)) for start in range(0, numel, size)]


def message_bytes(
    compressor: Compressor | Sequence[Code], numels: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Exact length in bytes of one message with the parameter tensors of sizes `numels`."""
    return Codec(compressor, numels, dtype).message_bytes


class Codec:
    """Encodes a list of tensors as one message and back; the public face of the wire format.

    Args:
        compressor: what is kept; or the code of each tensor.
        numels: size of each tensor.
        dtype: float32 or float64, of the tensors and of the scalars on the wire.
        backend: the kernels; chosen by device if None.
    """

    def __init__(
        self,
        compressor: Compressor | Sequence[Code],
        numels: Sequence[int],
        dtype: torch.dtype = torch.float32,
        backend: kernels.Kernels | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a message's scalars are float32 or float64, not {dtype}")
        blocks, offset = [], 0
        for numel, code in zip(numels, codes_of(compressor, numels), strict=True):
            for start, n in block_ranges(numel, code.block_numel(numel)):
                blocks.append(Block(code, code, offset + start, offset + start, 0, n, 0))
            offset += numel
        self.dtype, self.numels, self.backend = dtype, list(numels), backend
        self.layout = lay_out(blocks, dtype.itemsize, reply=False, served=False)

    @property
    def message_bytes(self) -> int:
        """Exact length of a message in bytes."""
        return self.layout.message_bytes

    def encode(self, tensors: Sequence[Tensor]) -> Tensor:
        """One uint8 message with C of every tensor (row-major); raises ValueError on other sizes or dtypes."""
        if [t.numel() for t in tensors] != self.numels or any(t.dtype != self.dtype for t in tensors):
            raise ValueError(f"expected {self.dtype} tensors of {self.numels} entries")
        if not tensors:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        v = torch.cat([t.detach().reshape(-1) for t in tensors])
        message = torch.zeros(self.message_bytes, dtype=torch.uint8, device=v.device)
        plain = torch.tensor([PLAIN], dtype=self.dtype, device=v.device)
        update = Update(SGD.kind, plain, 0.0, feedback=False)  # D = g
        none = v.new_empty(0)
        worker = Worker(g=v, m=v.new_empty(0, 0), e=none, x=none)
        self._kernels(v).compress(self.layout.table.to(v.device), update, worker, message)
        return message

    def decode(self, message: Tensor) -> list[Tensor]:
        """The flat tensors a message stands for. Raises TypeError or ValueError if it is malformed."""
        if message.dtype != torch.uint8 or message.dim() != 1:
            raise TypeError(f"a message is a 1-D uint8 tensor, got {message.dtype} of shape {tuple(message.shape)}")
        if message.numel() != self.message_bytes:
            raise ValueError(f"malformed message: expected {self.message_bytes} bytes, got {message.numel()}")
        message = message.clone()  # aligned, whatever it was a slice of
        if not bool(finite([(0, self.layout.scalars, self.layout.halves)], message, self.dtype)):
            raise ValueError("malformed message: a scale or value is not finite")
        padding = message[self.layout.used_bytes :]
        if bool(padding.any()):
            raise ValueError("malformed message: its padding is not zero")
        negative = torch.zeros(sum(self.numels), dtype=self.dtype, device=message.device)
        once = torch.ones(1, dtype=self.dtype, device=message.device)
        self._kernels(message).subtract(self.layout.table.to(message.device), once, message, negative)
        kernels.check(message.device)
        return list((0 - negative).split(self.numels))

    def _kernels(self, v: Tensor) -> kernels.Kernels:
        return self.backend or kernels.select(v.device)


def scalars(count: int, message: Tensor, dtype: torch.dtype) -> Tensor:
    """The `count` scales and values at the head of a message, a view."""
    return message[: count * dtype.itemsize].view(dtype)


def finite(heads: Sequence[tuple[int, int, int]], messages: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim bool tensor: whether the scalars and halves of messages that lie one after the other are finite numbers.

    Args:
        heads: of each message: where it begins, in bytes, and its numbers of scalars and halves.
    """
    found = torch.isfinite(torch.cat([scalars(count, messages[start:], dtype) for start, count, _ in heads])).all()
    behind = [(start + count * dtype.itemsize, halves) for start, count, halves in heads if halves]
    if behind:
        found &= torch.isfinite(torch.cat([scalars(n, messages[at:], torch.bfloat16) for at, n in behind])).all()
    return found
