"""Compressors: the operator C of Algorithm 1, as frozen descriptions.

A compressor says *what* is kept of a block (`__call__`, pure tensor maths) and how many scalars and
bytes one block costs on the wire; it neither packs bits (`saef.codec`) nor communicates
(`saef.exchange`). C acts per block: `block="layer"` makes every parameter tensor one block (the
papers' setting), an integer is a maximal block size that splits larger tensors. A block never
crosses a parameter tensor.

Conventions: sign(0) = +1; a block's scale is the mean of |v|; top-k keeps max(1, ceil(ratio n))
coordinates, largest |v| first, ties to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal

import torch
from torch import Tensor

Block = Literal["layer"] | int
DEFAULT_BLOCK = 1 << 16  # 16-bit indices suffice, and a large tensor is shared by all servers

DENSE, SIGN, TOPK = 0, 1, 2  # how a block is coded; a column of the kernels' tables


@dataclass(frozen=True)
class Compressor:
    """What all compressors answer. `kind` selects the code, `feedback` whether an error is kept.

    Attributes:
        kind: DENSE, SIGN or TOPK.
        feedback: False for methods without error feedback (majority vote).
    """

    kind: ClassVar[int] = DENSE
    feedback: ClassVar[bool] = True

    def for_tensor(self, numel: int) -> Compressor:
        """The compressor that a parameter tensor of `numel` entries gets; policies override this."""
        return self

    def block_numel(self, numel: int) -> int | None:
        """Block size for a tensor of `numel` entries; None if any partition gives the same C."""
        return None

    def scalars(self, numel: int) -> int:
        """Floating-point numbers in the code of a block of `numel` coordinates."""
        return numel

    def raw_bytes(self, numel: int) -> int:
        """Bytes of packed bits or indices in the code of a block of `numel` coordinates."""
        return 0

    def compress_block(self, v: Tensor) -> Tensor:
        """C(v) for one block, a 1-D floating-point tensor; same shape and dtype."""
        return v.clone()

    def __call__(self, v: Tensor) -> Tensor:
        """C(v) for one parameter tensor of any shape, block by block (in row-major order)."""
        code = self.for_tensor(v.numel())
        flat = v.reshape(-1)
        size = code.block_numel(v.numel()) or max(1, v.numel())
        return _per_block(code.compress_block, flat, size).reshape(v.shape)


def _per_block(compress: Callable[[Tensor], Tensor], flat: Tensor, size: int) -> Tensor:
    return torch.cat([compress(block) for block in flat.split(size)]) if flat.numel() else flat.clone()


def _block_numel(block: Block, numel: int) -> int:
    return max(1, numel) if block == "layer" else min(block, max(1, numel))


def _check_block(block: object) -> None:
    if block == "layer":
        return
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f'block must be "layer" or an integer (coordinates), got {block!r}')
    if not 1 <= block < 2**31:
        raise ValueError(f"block must be between 1 and 2**31 - 1 coordinates, got {block}")


def index_bytes(numel: int) -> int:
    """Bytes of one index into a block of `numel` coordinates: the least of 1, 2, 3, 4 that suffices."""
    return max(1, ((numel - 1).bit_length() + 7) // 8)


@dataclass(frozen=True)
class Identity(Compressor):
    """C(v) = v: no compression, the yardstick. Turns SAEF and EF into plain momentum SGD."""


@dataclass(frozen=True)
class ScaledSign(Compressor):
    """C(v) = ||v||_1 / n * sign(v) per block of n coordinates (SAEF eq. (2); dist-EF eq. (1)).

    One bit a coordinate and one scale a block. Relative error 1 - ||v||_1^2 / (n ||v||_2^2), below 1
    for every v (dist-EF Proposition 1).

    Args:
        block: "layer", or the largest number of coordinates that share a scale.
    """

    block: Block = DEFAULT_BLOCK
    kind: ClassVar[int] = SIGN

    def __post_init__(self) -> None:
        _check_block(self.block)

    def block_numel(self, numel: int) -> int:
        return _block_numel(self.block, numel)

    def scalars(self, numel: int) -> int:
        return 1

    def raw_bytes(self, numel: int) -> int:
        return (numel + 7) // 8

    def compress_block(self, v: Tensor) -> Tensor:
        scale = v.abs().mean(dtype=torch.float64).to(v.dtype)
        return torch.where(v >= 0, scale, -scale)


@dataclass(frozen=True)
class MajorityVote(ScaledSign):
    """C(v) = sign(v), unscaled and without error feedback: signSGD and signum with majority vote.

    The server's C of the mean of signs is the vote (a tie is +1). The one scalar a block carries on
    the wire is 1, or NaN if the sender's block has a number that is not finite: signs alone would
    hide it.
    """

    feedback: ClassVar[bool] = False

    def compress_block(self, v: Tensor) -> Tensor:
        one = torch.ones((), dtype=v.dtype, device=v.device)
        return torch.where(v >= 0, one, -one)


@dataclass(frozen=True)
class TopK(Compressor):
    """C(v) keeps the k = max(1, ceil(ratio n)) entries of largest magnitude of each block of n.

    Values travel at full precision, so e is exactly 0 where a coordinate was sent.

    Args:
        ratio: share of the coordinates that is sent, in (0, 1].
        block: "layer", or the largest number of coordinates among which is selected.
    """

    ratio: float = 0.01
    block: Block = DEFAULT_BLOCK
    kind: ClassVar[int] = TOPK

    def __post_init__(self) -> None:
        _check_block(self.block)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real):
            raise TypeError(f"ratio must be a number in (0, 1], got {self.ratio!r}; 0.01 sends 1 %")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}; 0.01 sends 1 %")

    def block_numel(self, numel: int) -> int:
        return _block_numel(self.block, numel)

    def scalars(self, numel: int) -> int:
        return min(numel, max(1, math.ceil(self.ratio * numel)))

    def raw_bytes(self, numel: int) -> int:
        return self.scalars(numel) * index_bytes(numel)

    def compress_block(self, v: Tensor) -> Tensor:
        kept = v.abs().sort(descending=True, stable=True).indices[: self.scalars(v.numel())]
        return torch.zeros_like(v).index_copy(0, kept, v[kept])


@dataclass(frozen=True)
class MinSize(Compressor):
    """Policy: tensors with fewer than `numel` entries are sent uncompressed, others by `inner`.

    Biases and batch-norm weights are few but matter: `MinSize(4096, TopK(0.01))`.
    """

    numel: int
    inner: Compressor

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Compressor):
            raise TypeError(f"MinSize wraps a compressor, got {self.inner!r}; write MinSize(4096, TopK(0.01))")
        if not self.inner.feedback:
            raise ValueError(f"{self.inner!r} keeps no error and votes on every tensor; do not wrap it")
        if isinstance(self.numel, bool) or not isinstance(self.numel, int):
            raise TypeError(f"numel must be an integer number of entries, got {self.numel!r}")
        if self.numel < 0:
            raise ValueError(f"numel must be at least 0, got {self.numel}")

    def for_tensor(self, numel: int) -> Compressor:
        return Identity() if numel < self.numel else self.inner.for_tensor(numel)
