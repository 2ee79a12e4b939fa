"""What the kernels read: the columns of a table, and the records they are called with.

Legend of the names that all backends use (d: coordinates of the model, B: blocks, K: workers, S: vectors of the rule):

    table, reply_table  [B, COLUMNS] int64        the blocks of a message, one row each
    update              `Update`                  the rule for this step
    worker              `Worker`                  what it is applied to
    e                   [served] state's dtype    the server error (serve, settle); empty where a server keeps none
    message, reply      [bytes] uint8             one message, laid out by `saef.wire.codec`
    messages            [K, bytes] uint8          one from every worker, bytes > 0
    rates               [groups] state's dtype    what C is multiplied with: 1 where D contains eta, else eta
    v                   [n] state's dtype         what a message is subtracted from
    half, ahead         [d] state's dtype, float  x_half, and its s: the next step's (advance), this one's (step_ahead)
    x_table             [B, COLUMNS] int64        the blocks with their offsets in x (step_ahead)

The state's dtype is float32 or float64. Offsets in a table count elements, except BYTE.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ..compressors import DENSE, SIGN, TOPK

# Columns of a table.
KIND = 0  # DENSE, SIGN or TOPK of saef.wire.compressors
GRAD = 1  # block's offset in the gradient vector g
STATE = 2  # block's offset in m, e, x (worker tables) or in the server error (reply tables)
NUMEL = 3  # coordinates of the block
GROUP = 4  # row of update.hyper: the optimizer's parameter group
FLOAT = 5  # offset of the block's scalars in the message, counted in scalars; of bfloat16 ones in these
BYTE = 6  # offset of the block's bits or indices in the message, in bytes
COUNT = 7  # scalars of the block: 1 for SIGN, k for TOPK, n for DENSE
UNIT = 8  # 1: the SIGN scale is fixed to 1 (majority vote)
HALF = 9  # 1: the scalars of a DENSE or TOPK block are bfloat16
COLUMNS = 10


class Update(NamedTuple):
    """The local update rule for one step: how a gradient becomes u, and u becomes D (see `saef.rules`).

    Attributes:
        kind: the rule, `Rule.kind`: which branch of the kernels.
        hyper: [groups, columns] of the state's dtype: `saef.rules.rule.table`, its columns in the rule's file.
        step_ahead: s in x_half = x - s e; only weight decay needs it here.
        feedback: whether D contains e, and e is kept.
    """

    kind: int
    hyper: Tensor
    step_ahead: float
    feedback: bool


class Worker(NamedTuple):
    """One worker's vectors, flat, of the state's dtype.

    Attributes:
        g: [n] the gradient vector at hand (a bucket).
        m: [S, d] what the rule keeps; [0, d] if nothing.
        e: [d] the local error; empty without feedback.
        x: [d] what x_half = x - s e is made from.
    """

    g: Tensor
    m: Tensor
    e: Tensor
    x: Tensor


def malformed(row: int) -> ValueError:
    """The error for a message whose block `row` (counted from 0 in its table) cannot be decoded."""
    return ValueError(
        f"malformed message: the indices of block {row} are not increasing, or not inside the block; "
        "it was damaged on the way or sent by a rank with other settings"
    )


def check_kinds(kinds: Iterable[int]) -> None:
    """Raise ValueError unless all blocks are of kinds that the kernels know: they take what is not one for another."""
    if unknown := set(kinds) - {DENSE, SIGN, TOPK}:
        raise ValueError(f"a block of kind {min(unknown)} in a table; the kernels know {DENSE}, {SIGN} and {TOPK}")


def unknown_rule(kind: int) -> ValueError:
    """The error for an update of a rule that a backend has no branch for."""
    return ValueError(f"an update of rule kind {kind}, which these kernels have no branch for")
