"""The hot loops, behind one interface: six functions that `select` picks by device.

A *table* lists blocks, one row each (int64, columns below); a *message* is one uint8 vector laid
out by `saef.codec`. All vectors are flat, of the state's dtype (float32 or float64).

    compress(table, rule, g, m, e, x, message)     message <- C(D), D = e + eta u     Alg. 1, 10-12, 18-19
    commit(table, rule, g, m, e, x, message)       m <- m', e <- D - C(D)             Alg. 1, 10, 18
    serve(table, reply_table, messages, e, reply)  reply <- C(e + mean_k C(D_k))      Alg. 1, 21, 23
    settle(table, reply_table, messages, e, reply) e <- D - C(D), D as in serve       Alg. 1, 22
    subtract(table, message, v)                    v <- v - C                         Alg. 1, 25
    inspect(table, message)                        is it a message of this table?

`compress` and `serve` change nothing but the message: a step that is abandoned leaves no trace. `serve`
and `inspect` check what came from other ranks, so that a commit cannot stop half way.
`commit` and `settle` compute D again, from the same numbers in the same order, so they get the same
bits; one more pass over memory costs less than keeping D would (and needs no memory).

The backends agree bit for bit on signs and indices. A scale is a sum in float64 rounded once: in float32
it agrees to one unit in the last place, in float64 to the rounding of the sum, 2 n 2^-53 relative.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Columns of a table; offsets count elements, except BYTE.
KIND = 0  # DENSE, SIGN or TOPK of saef.compressors
GRAD = 1  # block's offset in the gradient vector g
STATE = 2  # block's offset in m, e, x (worker tables) or in the server error (reply tables)
NUMEL = 3  # coordinates of the block
GROUP = 4  # row of rule.hyper: the optimizer's parameter group
FLOAT = 5  # offset of the block's scalars in the message, counted in scalars
BYTE = 6  # offset of the block's bits or indices in the message, in bytes
COUNT = 7  # scalars of the block: 1 for SIGN, k for TOPK, n for DENSE
UNIT = 8  # 1: the SIGN scale is fixed to 1 (majority vote)
COLUMNS = 9

# Columns of rule.hyper.
LR, MU, GAIN, NESTEROV, DECAY, FACTOR = range(6)


class Rule(NamedTuple):
    """The local update rule for one step: how a gradient becomes u (see `saef.feedback`).

    Attributes:
        hyper: [groups, 6] of the state's dtype: eta, mu, gain on g in the momentum, Nesterov (0 or 1),
            coupled weight decay, factor on g (clipping, maximize).
        step_ahead: s in x_half = x - s e; only weight decay needs it here.
        feedback: whether D contains e, and e is kept.
    """

    hyper: Tensor
    step_ahead: float
    feedback: bool


class Kernels(Protocol):
    """What a backend provides; see the module's docstring for the meaning.

    Shapes: table [B, COLUMNS] int64; g, e, x flat vectors, m likewise or empty (no momentum);
    message [bytes] uint8; messages [K, bytes] uint8, bytes > 0. A message whose indices are out of range
    or out of order raises ValueError, at once or (CUDA) in `check`; nothing is written beyond a block.
    """

    def compress(
        self, table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor
    ) -> None: ...
    def commit(
        self, table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor
    ) -> None: ...
    def serve(self, table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None: ...
    def settle(self, table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None: ...
    def subtract(self, table: Tensor, message: Tensor, v: Tensor) -> None: ...
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


def check(device: torch.device) -> None:
    """Raise ValueError for a malformed message met since the last call. CUDA only, and waits; others raise at once."""
    if device.type == "cuda":
        from . import cuda

        cuda.check(device)


def malformed(row: int) -> ValueError:
    """The error for a message whose block `row` (counted from 0 in its table) cannot be decoded."""
    return ValueError(
        f"malformed message: the indices of block {row} are not increasing, or not inside the block; "
        "it was damaged on the way or sent by a rank with other settings"
    )
