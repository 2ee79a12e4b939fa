"""The hot loops, behind one interface: eight functions that `select` picks by device.

A *table* lists blocks; the names of all arguments are in `saef.wire.kernels.table`.

    compress(table, update, worker, message)        message <- C(D), D = e + eta u     Alg. 1, 10-12, 18-19
    commit(table, update, worker, message)          m <- m', e <- D - C(D)             Alg. 1, 10, 18
    advance(...)                                    commit; x <- x - R; half <- x - s e  Alg. 1, 10, 18, 25, 9
    serve(table, reply_table, messages, e, reply)   reply <- C(e + mean_k C(D_k))      Alg. 1, 21, 23
    settle(table, reply_table, messages, e, reply)  e <- D - C(D), D as in serve       Alg. 1, 22
    subtract(table, rates, message, v)              v <- v - rate C                    Alg. 1, 25
    step_ahead(table, x_table, x, e, half, ahead)   half <- x - s e                    Alg. 1, 9
    inspect(table, message)                         is it a message of this table?

`compress` and `serve` change nothing but the message: a step that is abandoned leaves no trace. `serve`
and `inspect` check what came from other ranks, so that a commit cannot stop half way.
`commit` and `settle` compute D again, from the same numbers in the same order, so they get the same
bits; one more pass over memory costs less than keeping D would (and needs no memory).

The backends agree bit for bit on signs and indices. A scale is a sum in float64 rounded once: in float32
it agrees to one unit in the last place, in float64 to the rounding of the sum, 2 n 2^-53 relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from .table import Update, Worker

_DEVICE = attrgetter("device")


class Kernels(Protocol):
    """What a backend provides; see the module's docstring for the meaning, `saef.wire.kernels.table` for shapes.

    A message whose indices are out of range or out of order raises ValueError, at once or (CUDA) in `check`; nothing
    is written beyond a block.
    """

    def compress(self, table: Tensor, update: Update, worker: Worker, message: Tensor) -> None: ...
    def commit(self, table: Tensor, update: Update, worker: Worker, message: Tensor) -> None: ...
    def advance(
        self,
        table: Tensor,
        reply_table: Tensor,
        update: Update,
        worker: Worker,
        message: Tensor,
        rates: Tensor,
        replies: Tensor,
        half: Tensor,
        ahead: float,
    ) -> None: ...
    def serve(self, table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None: ...
    def settle(self, table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None: ...
    def subtract(self, table: Tensor, rates: Tensor, message: Tensor, v: Tensor) -> None: ...
    def step_ahead(self, table: Tensor, x_table: Tensor, x: Tensor, e: Tensor, half: Tensor, ahead: float) -> None: ...
    def inspect(self, table: Tensor, message: Tensor) -> None: ...


def select(device: torch.device) -> Kernels:
    """The backend for vectors on `device`: numba on CPU, Triton on CUDA, torch operations elsewhere."""
    if device.type == "cpu":
        from . import cpu

        return cpu
    if device.type == "cuda":
        from . import cuda

        return cuda
    from . import reference

    return reference


def has_fingerprints(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def fingerprints(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """[n] int64 by which a change of any bit of n tensors shows; None for devices without kernels of ours.

    Args:
        tensors: on `device`, which is where the result is; None counts as one without entries. One elsewhere: None.
    """
    there = [t for t in tensors if t is not None]
    if not has_fingerprints(device) or any(at.type != device.type for at in {*map(_DEVICE, there)}):
        return None
    if not all(map(Tensor.is_contiguous, there)):  # what has gaps is copied, and so looks changed
        tensors = [t if t is None or is_dense(t) else t.contiguous() for t in tensors]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return fingerprints_at(addresses, [0 if t is None else t.nbytes for t in tensors], device)


def fingerprints_at(addresses: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """The same by where tensors without gaps lie, and by their sizes in bytes. device: a CPU or a GPU."""
    if device.type == "cpu":
        from . import cpu

        return cpu.fingerprints(addresses, sizes)
    from .cuda import prints

    return prints.fingerprints(addresses, sizes, device)


def is_dense(t: Tensor) -> bool:
    """No gaps and no overlaps: entries can be taken in memory order."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def check(device: torch.device) -> None:
    """Raise ValueError for a malformed message met since the last call. CUDA only, and waits; others raise at once."""
    if device.type == "cuda":
        from . import cuda

        cuda.check(device)


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Have the kernels for states of this dtype ready before the first step, so that it is not the slow one.

    On CPU they are loaded from numba's cache; the first time on a machine one process compiles them, says so, and the
    others wait. Does nothing elsewhere.
    """
    if device.type == "cpu":
        from . import cpu

        cpu.prepare(dtype)
