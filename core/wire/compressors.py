"""Compressors: the operator C of Algorithm 1, as frozen descriptions.

A compressor says *what* is kept of a tensor (`__call__`, pure tensor maths). A *code* is one that also says how many
scalars and bytes a block costs on the wire; a *policy* (`MinSize`, `Exempt`) picks a code for each. Neither packs bits
(`saef.wire.codec`) nor communicates (`saef.comm.exchange`). C acts per block: `block="layer"` makes every parameter
tensor one block (the papers' setting), an integer is a maximal block size that splits larger tensors. A block never
crosses a parameter tensor.

Conventions: sign(0) = +1; a block's scale is the mean of |v|; top-k keeps max(1, ceil(ratio n))
coordinates, largest |v| first, ties to the lower index.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from numbers import Real
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

BlockSize = Literal["layer"] | int
DEFAULT_BLOCK = 1 << 16  # 16-bit indices suffice, and a large tensor is shared by all servers

DENSE, SIGN, TOPK = 0, 1, 2  # how a block is coded; a column of the kernels' tables
Values = torch.dtype | Literal["bfloat16"] | None


@dataclass(frozen=True)
class Compressor(ABC):
    """A code, or a policy that picks one for each tensor; what users give.

    Attributes:
        feedback: False for methods without error feedback (majority vote).
    """

    feedback: ClassVar[bool] = True

    @abstractmethod
    def for_tensor(self, numel: int) -> Code:
        """The code of a parameter tensor of `numel` entries."""

    def for_parameter(self, name: str, p: Tensor) -> Code:
        """The code of a parameter, for policies that look at more than its size."""
        return self.for_tensor(p.numel())

    def __call__(self, v: Tensor) -> Tensor:
        """C(v) for one parameter tensor of any shape, block by block (in row-major order)."""
        code = self.for_tensor(v.numel())
        flat = v.reshape(-1)
        size = code.block_numel(v.numel()) or max(1, v.numel())
        return _per_block(code.compress_block, flat, size).reshape(v.shape)


@dataclass(frozen=True)
class Code(Compressor):
    """C of a block. The wire format knows the final classes of this module and no others.

    Attributes:
        kind: DENSE, SIGN or TOPK; a column of the kernels' tables.
        unit_scale: the scale of a SIGN block is 1 (or NaN, if the block has a number that is not finite).
    """

    kind: ClassVar[int]
    unit_scale: ClassVar[bool] = False

    def for_tensor(self, numel: int) -> Code:
        return self

    @abstractmethod
    def block_numel(self, numel: int) -> int | None:
        """Block size for a tensor of `numel` entries; None if any partition gives the same C."""

    @property
    def half(self) -> bool:
        """Whether its numbers are bfloat16 on the wire, where others are of the state's dtype."""
        return False

    @abstractmethod
    def scalars(self, numel: int) -> int:
        """Floating-point numbers in the code of a block of `numel` coordinates."""

    @abstractmethod
    def raw_bytes(self, numel: int) -> int:
        """Bytes of packed bits or indices in the code of a block of `numel` coordinates."""

    @abstractmethod
    def compress_block(self, v: Tensor) -> Tensor:
        """C(v) for one block, a 1-D floating-point tensor; same shape and dtype."""


def _per_block(compress: Callable[[Tensor], Tensor], flat: Tensor, size: int) -> Tensor:
    return torch.cat([compress(block) for block in flat.split(size)]) if flat.numel() else flat.clone()


def _block_numel(block: BlockSize, numel: int) -> int:
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


@dataclass(frozen=True, repr=False)
class Valued(Code):
    """A code that sends entries as they are, or rounded.

    Args:
        values: None: in the state's dtype; torch.bfloat16, or its name: rounded to that, to nearest, from float32.
            What rounding takes away stays in the error.
    """

    values: Values = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.values == "bfloat16":
            object.__setattr__(self, "values", torch.bfloat16)  # one form, which ranks compare
        elif self.values is not None and self.values != torch.bfloat16:
            raise ValueError(f"values must be None (the state's dtype) or torch.bfloat16, got {self.values!r}")

    def __repr__(self) -> str:
        """Without values where they are None, as in checkpoints from before there were any."""
        names = [f.name for f in fields(self) if f.name != "values"] + ["values"] * self.half
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def half(self) -> bool:
        return self.values is not None

    def rounded(self, v: Tensor) -> Tensor:
        """As it arrives."""
        return v.to(torch.float32).to(torch.bfloat16).to(v.dtype) if self.half else v


@final
@dataclass(frozen=True, repr=False)
class Identity(Valued):
    """C(v) = v: no compression, the yardstick. Turns SAEF and EF into plain momentum SGD.

    Args:
        values: None, or torch.bfloat16: C(v) = v rounded to that.
    """

    kind: ClassVar[int] = DENSE

    def block_numel(self, numel: int) -> None:
        return None

    def scalars(self, numel: int) -> int:
        return numel

    def raw_bytes(self, numel: int) -> int:
        return 0

    def compress_block(self, v: Tensor) -> Tensor:
        return self.rounded(v.clone())


@dataclass(frozen=True)
class Sign(Code):
    """One bit a coordinate and one scale a block.

    Args:
        block: "layer", or the largest number of coordinates that share a scale.
    """

    block: BlockSize = DEFAULT_BLOCK
    kind: ClassVar[int] = SIGN

    def __post_init__(self) -> None:
        _check_block(self.block)

    def block_numel(self, numel: int) -> int:
        return _block_numel(self.block, numel)

    def scalars(self, numel: int) -> int:
        return 1

    def raw_bytes(self, numel: int) -> int:
        return (numel + 7) // 8


@final
@dataclass(frozen=True)
class ScaledSign(Sign):
    """C(v) = ||v||_1 / n * sign(v) per block of n coordinates (SAEF eq. (2); dist-EF eq. (1)).

    Relative error 1 - ||v||_1^2 / (n ||v||_2^2), below 1 for every v (dist-EF Proposition 1).

    Args:
        block: "layer", or the largest number of coordinates that share a scale.
    """

    def compress_block(self, v: Tensor) -> Tensor:
        scale = v.abs().mean(dtype=torch.float64).to(v.dtype)
        return torch.where(v >= 0, scale, -scale)


@final
@dataclass(frozen=True)
class MajorityVote(Sign):
    """C(v) = sign(v), unscaled and without error feedback: signSGD and signum with majority vote.

    The server's C of the mean of signs is the vote (a tie is +1). The one scalar a block carries on
    the wire is 1, or NaN if the sender's block has a number that is not finite: signs alone would
    hide it.

    Args:
        block: "layer", or the largest number of coordinates that share that scalar.
    """

    feedback: ClassVar[bool] = False
    unit_scale: ClassVar[bool] = True

    def compress_block(self, v: Tensor) -> Tensor:
        one = torch.ones((), dtype=v.dtype, device=v.device)
        return torch.where(v >= 0, one, -one)


@final
@dataclass(frozen=True, repr=False)
class TopK(Valued):
    """C(v) keeps the k = max(1, ceil(ratio n)) entries of largest magnitude of each block of n.

    Values travel at full precision unless it is said otherwise, so e is exactly 0 where a coordinate was sent.

    Args:
        ratio: share of the coordinates that is sent, in (0, 1].
        block: "layer", or the largest number of coordinates among which is selected.
        values: None, or torch.bfloat16: two bytes a value instead of four.
    """

    ratio: float = 0.01
    block: BlockSize = DEFAULT_BLOCK
    kind: ClassVar[int] = TOPK

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self.block)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real):
            raise TypeError(f"ratio must be a number in (0, 1], got {self.ratio!r}; 0.01 sends 1 %")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}; 0.01 sends 1 %")
        object.__setattr__(self, "ratio", float(self.ratio))  # equal ones read alike in a checkpoint

    def block_numel(self, numel: int) -> int:
        return _block_numel(self.block, numel)

    def scalars(self, numel: int) -> int:
        return min(numel, max(1, math.ceil(self.ratio * numel)))

    def raw_bytes(self, numel: int) -> int:
        return self.scalars(numel) * index_bytes(numel)

    def compress_block(self, v: Tensor) -> Tensor:
        kept = v.abs().sort(descending=True, stable=True).indices[: self.scalars(v.numel())]
        return torch.zeros_like(v).index_copy(0, kept, self.rounded(v[kept]))


@final
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

    def for_tensor(self, numel: int) -> Code:
        return Identity() if numel < self.numel else self.inner.for_tensor(numel)

    def for_parameter(self, name: str, p: Tensor) -> Code:
        return Identity() if p.numel() < self.numel else self.inner.for_parameter(name, p)


@final
@dataclass(frozen=True, repr=False)
class Exempt(Compressor):
    """Policy: parameters that `which` says are sent by `other`, uncompressed if that is left out; others by `inner`.

    Embeddings, norms and heads: `Exempt(lambda name, p: p.ndim < 2, ScaledSign())`, `Exempt(["head.*"], TopK(0.01))`.

    Args:
        which: called with a parameter's name in the model (without DDP's `module.`) and the parameter; or patterns of
            names, as in a shell. The same on every rank.
    """

    which: Callable[[str, Tensor], bool] | Sequence[str]
    inner: Compressor
    other: Compressor | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.which, list | tuple) and all(isinstance(w, str) for w in self.which)
        if not callable(self.which) and not named:
            raise TypeError(
                f"Exempt needs a function of (name, parameter), or a list of patterns of names, got {self.which!r}"
            )
        for compressor in (self.inner, *([] if self.other is None else [self.other])):
            if not isinstance(compressor, Compressor):
                raise TypeError(f"Exempt picks between compressors, got {compressor!r}; write e.g. TopK(0.01)")
            if not compressor.feedback:
                raise ValueError(f"{compressor!r} keeps no error and votes on every tensor; do not wrap it")

    def __repr__(self) -> str:
        """Without an address, which would differ between ranks."""
        which = getattr(self.which, "__qualname__", type(self.which).__name__) if callable(self.which) else self.which
        other = "" if self.other is None else f", other={self.other!r}"
        return f"Exempt({which}, {self.inner!r}{other})"

    def for_tensor(self, numel: int) -> Code:
        raise TypeError("Exempt goes by parameters, and here are only sizes: give it to a SAEFState")

    def for_parameter(self, name: str, p: Tensor) -> Code:
        exempt = self.which(name, p) if callable(self.which) else any(fnmatchcase(name, w) for w in self.which)
        return (self.inner if not exempt else self.other or Identity()).for_parameter(name, p)


def codes_of(compressor: Compressor | Sequence[Code], numels: Sequence[int]) -> Sequence[Code]:
    """The code of each tensor: as the compressor has it for its size, or as given."""
    return [compressor.for_tensor(n) for n in numels] if isinstance(compressor, Compressor) else compressor
