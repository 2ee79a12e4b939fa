"""The kernels for CUDA, in Triton: one program per *tile*, at most TILE coordinates of one block.

A program *produces* its tile of D (`rules`, `codes.average`) and *encodes* it (`codes`). Signs and dense values are
written at once; scales are finished by a second kernel from the tiles' sums. Top-k of a block that is one tile is
selected at once too, in registers (`select`); of a longer block among candidates, those that pass a bar from a sample,
digit by digit (`radix`). Atomics only count, in integers, and sums run in a fixed order, so that no result depends on
how programs are scheduled.

Differences from the reference: a NaN may have other bits (the hardware makes its own), and a malformed
message raises when `check` is called, because raising at once would make the host wait for the device.
Nothing is written outside a block, whatever a message says.

A table must not change once a kernel has seen it: the cut into tiles is made once for a tensor object (the
only time the host waits). Without a GPU the kernels run on CPU tensors if TRITON_INTERPRET=1 was set before
triton was imported; then a malformed message raises at once.

Arguments of the kernels (T is the state's dtype), all in device memory but the numbers and flags:

    tiles, first              of `Tiling`; a program's tile, a block's first
    table, reply_table        [B, COLUMNS] int64
    hyper, s                  update.hyper [groups, columns] T, update.step_ahead [1] T
    g, m, e, x                of `Worker`: [n], [S, d], [d], [d] T; e also the server error [served]
    d                         from one vector of m to the next; SPACING divides it
    floats, message           a message as [scalars] T and as [bytes] uint8, the same memory; reply_floats, reply too
    messages                  [K, bytes] uint8; float_stride, byte_stride: from one message to the next, in entries
    rates, half, ahead        [groups], [d], [1] T
    x_table                   [B, COLUMNS] int64, STATE counted in x; x may be where an address is counted from
    partial, vector, where, bars, found, counts   of `Work`
    large                     of `Tiling`
    bad                       [1] int32: the lowest row of a malformed message, or NO_ROW
    groups, hist, slots, digits, kept   see `radix`
    REFILL                    only blocks with too few candidates, of which all entries become candidates
    ALIGN                     divides NUMEL, GRAD and STATE: `constants.entry`
    TILE, K                   coordinates of a tile, number of messages; LANES: a power of two, at least 2 K
    RULE, FEEDBACK            update.kind, update.feedback
    HAS_M, HAS_E, AHEAD   what there is: m, e, ahead != 0
    SENT, CODED      `Tiling.kinds` of what is decoded, and of what is coded or replied
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ...compressors import SIGN, TOPK
from ..table import Update, Worker, malformed, unknown_rule

try:
    import triton
except ImportError as error:
    raise ImportError(
        "saef needs Triton for tensors on a GPU. PyTorch's CUDA builds for Linux bring it; "
        "otherwise: pip install triton"
    ) from error

from . import constants, programs, radix, rules
from .constants import NO_ROW
from .tiling import Tiling, Work, launch, make_work, tiling_of

Args = tuple[tuple[Any, ...], dict[str, Any]]


def compress(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    tiling, floats = tiling_of(table), message.view(worker.g.dtype)
    work = make_work(tiling, worker.g)
    args, flags = _worker_args(update, worker)
    launch(programs.sample, tiling, table, tiling.large, *args, work.bars, programs=tiling.large.size(0), **flags)
    _encode(programs.compress, tiling, work, table, table, *args, floats, message, **flags)


def commit(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    args, flags = _worker_args(update, worker)
    if update.feedback or worker.m.numel():
        codes = (message.view(worker.g.dtype), message, _bad(worker.g.device))
        tiling = tiling_of(table)
        launch(programs.commit, tiling, table, *args, *codes, SENT=tiling.kinds, **flags)
    _check_now(worker.g)


def advance(
    table: Tensor,
    reply_table: Tensor,
    update: Update,
    worker: Worker,
    message: Tensor,
    rates: Tensor,
    replies: Tensor,
    half: Tensor,
    ahead: float,
) -> None:
    """`commit`, `subtract` from x, and half <- x - ahead e. During the step x_half is in `half`; decay reads it."""
    commit(table, update, worker._replace(x=half), message)
    subtract(reply_table, rates, replies, worker.x)
    step_ahead(table, reply_table, worker.x, worker.e, half, ahead)


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    tiling, floats = tiling_of(reply_table), reply.view(e.dtype)
    work = make_work(tiling, e, mean=_has_topk(table))
    args, flags = _server_args(messages, e)
    flags |= {"SENT": tiling_of(table).kinds, "HAS_E": e.numel() > 0}
    if flags["HAS_E"]:
        launch(programs.sample_error, tiling, reply_table, tiling.large, e, work.bars, programs=tiling.large.size(0))
    else:
        work.bars.fill_(1)  # the mean of top-k messages is mostly 0
    _encode(programs.serve, tiling, work, reply_table, table, reply_table, *args, floats, reply, **flags)
    _check_now(e)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    tiling = tiling_of(reply_table)
    vector = e.new_empty(tiling.numel if _has_topk(table) else 0)
    args, flags = _server_args(messages, e)
    flags |= {"SENT": tiling_of(table).kinds, "CODED": tiling.kinds}
    launch(programs.settle, tiling, table, reply_table, *args, reply.view(e.dtype), reply, vector, **flags)
    _check_now(e)


def subtract(table: Tensor, rates: Tensor, message: Tensor, v: Tensor) -> None:
    tiling, codes = tiling_of(table), (message.view(v.dtype), message)
    launch(programs.subtract, tiling, table, rates, *codes, v, _bad(v.device), SENT=tiling.kinds)
    _check_now(v)


def step_ahead(table: Tensor, x_table: Tensor, x: Tensor, e: Tensor, half: Tensor, ahead: float) -> None:
    tiling = tiling_of(table)
    tiling = tiling._replace(align=min(tiling.align, tiling_of(x_table).align))
    s = _number(ahead, half.dtype, half.device)
    launch(programs.step_ahead, tiling, table, x_table, x, e, half, s, AHEAD=ahead != 0)


def inspect(table: Tensor, message: Tensor) -> None:
    tiling = tiling_of(table)
    if _has_topk(table):
        launch(programs.inspect, tiling, table, message, _bad(message.device), programs=table.size(0))
    _check_now(message)


def check(device: torch.device) -> None:
    """Raise ValueError if a kernel on `device` has met a malformed message since the last call.

    Waits for the device: call it once per optimizer step, and where a message is decoded for its own sake. Of
    several malformed blocks the lowest row is named.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    bad = _bad(device)
    row = int(bad.item())
    if row != NO_ROW:
        bad.fill_(NO_ROW)
        raise malformed(row)


def _check_now(v: Tensor) -> None:
    if v.device.type == "cpu":  # the interpreter
        check(v.device)


@cache
def _bad(device: torch.device) -> Tensor:
    """[1] int32: the lowest row of a malformed message that a kernel has met, or NO_ROW."""
    with torch.inference_mode(False):
        return torch.full((1,), NO_ROW, dtype=torch.int32, device=device)


@lru_cache(64)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number in device memory: Triton would round a float argument to float32."""
    return torch.full((1,), value, dtype=dtype, device=device)


def _worker_args(update: Update, worker: Worker) -> Args:
    if update.kind not in rules.KINDS:
        raise unknown_rule(update.kind)
    g, m, e, x = worker
    hyper = update.hyper.to(g.device, non_blocking=True)
    s = _number(update.step_ahead, g.dtype, g.device)
    d = m.size(1)
    flags = {"RULE": update.kind, "FEEDBACK": update.feedback, "HAS_M": m.numel() > 0, "HAS_E": e.numel() > 0}
    flags["SPACING"] = 1 if d % 4 else 4
    return (hyper, s, g, m, d, e, x), flags


def _has_topk(table: Tensor) -> bool:
    return bool(tiling_of(table).kinds & 1 << TOPK)


def _server_args(messages: Tensor, e: Tensor) -> Args:
    floats, K = messages.view(e.dtype), messages.size(0)
    args = (floats, floats.stride(0), messages, messages.stride(0), e, _bad(e.device))
    return args, {"K": K, "LANES": triton.next_power_of_2(2 * K)}


def _encode(program: Any, tiling: Tiling, work: Work, table: Tensor, *args: Any, **flags: Any) -> None:
    """Run `program`, which codes D tile by tile, and finish what one tile cannot tell. `table`: of what is coded."""
    floats, message = args[-2:]
    flags["CODED"] = tiling.kinds
    launch(program, tiling, *args, *work, REFILL=False, **flags)
    if tiling.kinds & 1 << SIGN:
        launch(programs.write_scale, tiling, tiling.first, table, work.partial, floats, programs=table.size(0))
    if slots := tiling.large.size(0):
        launch(program, tiling, *args, *work, REFILL=True, **flags)
        digits = floats.element_size()
        hist = floats.new_zeros((digits, slots, constants._DIGITS.value), dtype=torch.int32)
        kept = floats.new_empty((tiling.groups.size(0), 2), dtype=torch.int32)
        candidates = (tiling.tiles, table, work.vector, work.counts, hist, slots)
        for known in range(digits):
            _select(radix.narrow, tiling, *candidates, known)
        _select(radix.count_kept, tiling, *candidates, digits, kept)
        _select(radix.keep, tiling, *candidates, digits, kept, work.where, floats, message, CODED=tiling.kinds)


def _select(program: Any, tiling: Tiling, *args: Any, **flags: Any) -> None:
    """One program per group."""
    flags |= {"SPAN": constants.SPAN, "WIDTH": constants.WIDTH}
    launch(program, tiling._replace(tiles=tiling.groups), *args, **flags)
