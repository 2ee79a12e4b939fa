"""The kernels for CUDA, in Triton: one program per *tile*, at most TILE coordinates of one block.

A program *produces* its tile of D (`rules`, `codes.average`) and *encodes* it (`codes`). Signs and dense values are
written at once; scales are finished by a second kernel from the tiles' sums. Top-k of a block that is one tile is
selected at once too (`select`); of a longer block by radix selection (`radix`): D's magnitudes, read as integers, are
narrowed down digit by digit with a histogram of the block (one launch a digit), then every tile counts what it keeps,
and writes it behind what the tiles before it keep. Atomics only count, in integers, and sums run in a fixed order, so
that no result depends on how programs are scheduled.

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
    floats, message           a message as [scalars] T and as [bytes] uint8, the same memory; reply_floats, reply too
    messages                  [K, bytes] uint8; float_stride, byte_stride: from one message to the next, in entries
    rates, half, ahead        [groups], [d], [1] T
    partial, vector, hist, counts   of `Work`
    bad                       [1] int32: the lowest row of a malformed message, or NO_ROW
    slots, digits             int: see `radix`
    TILE, K                   coordinates of a tile, number of messages; LANES: a power of two, at least 2 K
    RULE, FEEDBACK            update.kind, update.feedback
    HAS_M, HAS_E, HAS_TOPK, AHEAD   what there is: m, e, blocks of kind TOPK in the table that is coded, ahead != 0
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..table import Update, Worker, malformed, unknown_rule

try:
    import triton
except ImportError as error:
    raise ImportError(
        "saef needs Triton for tensors on a GPU. PyTorch's CUDA builds for Linux bring it; "
        "otherwise: pip install triton"
    ) from error

from . import programs, radix, rules
from .constants import NO_ROW
from .tiling import Tiling, Work, launch, make_work, tiling_of

Args = tuple[tuple[Any, ...], dict[str, Any]]


def compress(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    tiling, floats = tiling_of(table), message.view(worker.g.dtype)
    work = make_work(tiling, worker.g, tiling.slots > 0)
    args, flags = _worker_args(update, worker)
    codes = (floats, message, work.partial, work.vector, work.hist)
    launch(programs.compress, tiling, table, *args, *codes, **flags, HAS_TOPK=tiling.topk)
    _finish(tiling, work, table, floats, message)


def commit(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    args, flags = _worker_args(update, worker)
    if update.feedback or worker.m.numel():
        codes = (message.view(worker.g.dtype), message, _bad(worker.g.device))
        launch(programs.commit, tiling_of(table), table, *args, *codes, **flags)
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
    x, e = worker.x, worker.e
    commit(table, update, worker._replace(x=half), message)
    subtract(reply_table, rates, replies, x)
    s = _number(ahead, half.dtype, half.device)
    launch(programs.step_ahead, tiling_of(table), table, reply_table, x, e, half, s, AHEAD=ahead != 0)


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    tiling, floats = tiling_of(reply_table), reply.view(e.dtype)
    work = make_work(tiling, e, tiling.slots > 0 or tiling_of(table).topk)
    codes = (floats, reply, work.partial, work.vector, work.hist)
    args, flags = _server_args(messages, e)
    flags.update(HAS_E=e.numel() > 0, HAS_TOPK=tiling.topk)
    launch(programs.serve, tiling, table, reply_table, *args, *codes, **flags)
    _finish(tiling, work, reply_table, floats, reply)
    _check_now(e)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    tiling = tiling_of(reply_table)
    vector = e.new_empty(tiling.numel if tiling_of(table).topk else 0)
    args, flags = _server_args(messages, e)
    launch(programs.settle, tiling, table, reply_table, *args, reply.view(e.dtype), reply, vector, **flags)
    _check_now(e)


def subtract(table: Tensor, rates: Tensor, message: Tensor, v: Tensor) -> None:
    launch(programs.subtract, tiling_of(table), table, rates, message.view(v.dtype), message, v, _bad(v.device))
    _check_now(v)


def inspect(table: Tensor, message: Tensor) -> None:
    tiling = tiling_of(table)
    if tiling.topk:
        launch(programs.inspect, tiling, table, message, _bad(message.device), programs=len(table))
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
    flags = {"RULE": update.kind, "FEEDBACK": update.feedback, "HAS_M": m.numel() > 0, "HAS_E": e.numel() > 0}
    return (hyper, s, g, m, e, x), flags


def _server_args(messages: Tensor, e: Tensor) -> Args:
    floats, K = messages.view(e.dtype), len(messages)
    args = (floats, floats.stride(0), messages, messages.stride(0), e, _bad(e.device))
    return args, {"K": K, "LANES": triton.next_power_of_2(2 * K)}


def _finish(tiling: Tiling, work: Work, table: Tensor, floats: Tensor, message: Tensor) -> None:
    """Finish what one tile cannot tell: scales, and top-k of blocks of more than one tile."""
    if tiling.signs:
        launch(programs.write_scale, tiling, tiling.first, table, work.partial, floats, programs=len(table))
    if tiling.slots:
        digits = len(work.hist)
        args = (table, work.vector, work.hist, tiling.slots)
        for known in range(1, digits):
            launch(radix.narrow, tiling, *args, known)
        launch(radix.count_kept, tiling, *args, digits, work.counts)
        launch(radix.keep, tiling, *args, digits, work.counts, floats, message)
