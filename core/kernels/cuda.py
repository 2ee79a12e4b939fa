"""The kernels for CUDA, in Triton: one program per *tile*, at most TILE coordinates of one block.

A program *produces* its tile of D and *encodes* it. Signs and dense values are written at once; scales are
finished by a second kernel from the tiles' sums. Top-k of a block that is one tile is selected at once too;
of a longer block by radix selection: D's magnitudes, read as integers, are narrowed down digit by digit with
a histogram of the block (one launch a digit), then every tile counts what it keeps, and writes it behind what
the tiles before it keep. Atomics only count, in integers, and sums run in a fixed order, so that no result
depends on how programs are scheduled.

Differences from the reference: a NaN may have other bits (the hardware makes its own), and a malformed
message raises when `check` is called, because raising at once would make the host wait for the device.
Nothing is written outside a block, whatever a message says.

A table must not change once a kernel has seen it: the cut into tiles is made once for a tensor object (the
only time the host waits). Without a GPU the kernels run on CPU tensors if TRITON_INTERPRET=1 was set before
triton was imported; then a malformed message raises at once.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..compressors import DENSE, SIGN, TOPK
from . import (
    BYTE,
    COLUMNS,
    COUNT,
    DECAY,
    FACTOR,
    FLOAT,
    GAIN,
    GRAD,
    GROUP,
    KIND,
    LR,
    MU,
    NESTEROV,
    NUMEL,
    STATE,
    UNIT,
    Rule,
    malformed,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "saef needs Triton for tensors on a GPU. PyTorch's CUDA builds for Linux bring it; "
        "otherwise: pip install triton"
    ) from error

TILE = 2048  # coordinates of a program; a power of two, at least 8, so that a tile's bits start at a byte
WARPS = 8  # of a program: 8 coordinates a thread, few enough for its registers
NO_ROW = 2**31 - 1

# Triton reads a global only if it is a constexpr.
_KIND, _GRAD, _STATE, _NUMEL, _GROUP, _FLOAT, _BYTE, _COUNT, _UNIT, _COLUMNS = (
    tl.constexpr(c) for c in (KIND, GRAD, STATE, NUMEL, GROUP, FLOAT, BYTE, COUNT, UNIT, COLUMNS)
)
_LR, _MU, _GAIN, _NESTEROV, _DECAY, _FACTOR = (tl.constexpr(c) for c in (LR, MU, GAIN, NESTEROV, DECAY, FACTOR))
_DENSE, _SIGN, _TOPK = tl.constexpr(DENSE), tl.constexpr(SIGN), tl.constexpr(TOPK)
_HYPERS = tl.constexpr(6)  # columns of rule.hyper
_TILE_COLUMNS = tl.constexpr(4)  # of Plan.tiles
_DIGIT = tl.constexpr(8)  # bits of a digit of the radix selection
_DIGITS = tl.constexpr(256)
_CHUNK = tl.constexpr(256)  # entries of a top-k message, or tiles, that a program reads at a time

_jit: Any = triton.jit
# Compiled for any value of these; by default Triton compiles again for 1 and for multiples of 16.
_kernel: Any = triton.jit(do_not_specialize=["slots", "digits", "float_stride", "byte_stride"])


class Plan(NamedTuple):
    """How the blocks of a table are cut into tiles.

    Attributes:
        tiles: [T, 4] int64: row, offset of the tile in its block, offset of the block in a scratch vector,
            and the block's number among those that need radix selection, or -1. A block's tiles are neighbours.
        first: [B] int64: each block's first tile.
        numel: length of a scratch vector, the coordinates of all blocks.
        signs, topk: whether there are blocks of kind SIGN, TOPK.
        slots: number of blocks that need radix selection.
        tile: TILE.
    """

    tiles: Tensor
    first: Tensor
    numel: int
    signs: bool
    topk: bool
    slots: int
    tile: int


class Work(NamedTuple):
    """Scratch of one call, from the caching allocator.

    Attributes:
        partial: [T] float64: sum of |D| of each tile.
        vector: [numel] of the state's dtype, or empty: the mean of top-k messages, then D of top-k blocks.
        hist: [digits, slots, 256] int32: histograms of the radix selection.
        counts: [T, 2] int32: entries of each tile above, and at, its block's threshold.
    """

    partial: Tensor
    vector: Tensor
    hist: Tensor
    counts: Tensor


def compress(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    plan, floats = _plan(table), message.view(e.dtype)
    work = _work(plan, e, plan.slots > 0)
    args, flags = _worker_args(rule, g, m, e, x)
    codes = (floats, message, work.partial, work.vector, work.hist)
    _launch(_compress, plan, table, *args, *codes, **flags, HAS_TOPK=plan.topk)
    _finish(plan, work, table, floats, message)


def commit(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    args, flags = _worker_args(rule, g, m, e, x)
    if rule.feedback or m.numel():
        _launch(_commit, _plan(table), table, *args, message.view(e.dtype), message, _bad(e.device), **flags)
    _check_now(e)


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    plan, floats = _plan(reply_table), reply.view(e.dtype)
    work = _work(plan, e, plan.slots > 0 or _plan(table).topk)
    codes = (floats, reply, work.partial, work.vector, work.hist)
    args, flags = _server_args(messages, e)
    flags.update(HAS_E=e.numel() > 0, HAS_TOPK=plan.topk)
    _launch(_serve, plan, table, reply_table, *args, *codes, **flags)
    _finish(plan, work, reply_table, floats, reply)
    _check_now(e)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    plan = _plan(reply_table)
    vector = e.new_empty(plan.numel if _plan(table).topk else 0)
    args, flags = _server_args(messages, e)
    _launch(_settle, plan, table, reply_table, *args, reply.view(e.dtype), reply, vector, **flags)
    _check_now(e)


def subtract(table: Tensor, message: Tensor, v: Tensor) -> None:
    _launch(_subtract, _plan(table), table, message.view(v.dtype), message, v, _bad(v.device))
    _check_now(v)


def inspect(table: Tensor, message: Tensor) -> None:
    plan = _plan(table)
    if plan.topk:
        _launch(_inspect, plan, table, message, _bad(message.device), programs=len(table))
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


_plans = WeakIdKeyDictionary()


def _plan(table: Tensor) -> Plan:
    """The cut of a table; made when the tensor object is seen first."""
    plan: Plan | None = _plans.get(table)
    if plan is None or plan.tile != TILE:
        _plans[table] = plan = _cut(table.cpu(), table.device)
    return plan


def _cut(table: Tensor, device: torch.device) -> Plan:
    numel, topk = table[:, NUMEL], table[:, KIND] == TOPK
    tiles = (numel + TILE - 1) // TILE
    first = tiles.cumsum(0) - tiles
    selected = topk & (tiles > 1)
    slot = torch.where(selected, selected.cumsum(0) - 1, -1)
    row = torch.arange(len(table)).repeat_interleave(tiles)
    lo = (torch.arange(len(row)) - first[row]) * TILE
    columns = [row, lo, (numel.cumsum(0) - numel)[row], slot[row]]
    return Plan(
        torch.stack(columns, 1).to(device),
        first.to(device),
        int(numel.sum()),
        bool((table[:, KIND] == SIGN).any()),
        bool(topk.any()),
        int(selected.sum()),
        TILE,
    )


def _work(plan: Plan, e: Tensor, vector: bool) -> Work:
    tiles, digits = len(plan.tiles), e.dtype.itemsize * 8 // _DIGIT.value
    return Work(
        e.new_empty(tiles if plan.signs else 0, dtype=torch.float64),
        e.new_empty(plan.numel if vector else 0),
        e.new_zeros((digits, plan.slots, _DIGITS.value), dtype=torch.int32),
        e.new_empty((tiles if plan.slots else 0, 2), dtype=torch.int32),
    )


Args = tuple[tuple[Any, ...], dict[str, Any]]


def _worker_args(rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor) -> Args:
    hyper = rule.hyper.to(e.device, non_blocking=True)
    s = _number(rule.step_ahead, e.dtype, e.device)
    flags = {"FEEDBACK": rule.feedback, "HAS_M": m.numel() > 0, "HAS_E": e.numel() > 0}
    return (hyper, s, g, m, e, x), flags


def _server_args(messages: Tensor, e: Tensor) -> Args:
    floats, K = messages.view(e.dtype), len(messages)
    args = (floats, floats.stride(0), messages, messages.stride(0), e, _bad(e.device))
    return args, {"K": K, "LANES": triton.next_power_of_2(2 * K)}


def _launch(kernel: Any, plan: Plan, *args: Any, programs: int = -1, **flags: Any) -> None:
    """One program per tile, or `programs`. Products and sums are rounded separately, as in the reference."""
    programs = len(plan.tiles) if programs < 0 else programs
    if programs:
        with torch.cuda.device_of(plan.tiles):
            options = {"num_warps": WARPS, "enable_fp_fusion": False}
            kernel[(programs,)](plan.tiles, *args, TILE=plan.tile, **flags, **options)


def _finish(plan: Plan, work: Work, table: Tensor, floats: Tensor, message: Tensor) -> None:
    """Finish what one tile cannot tell: scales, and top-k of blocks of more than one tile."""
    if plan.signs:
        _launch(_write_scale, plan, plan.first, table, work.partial, floats, programs=len(table))
    if plan.slots:
        digits = len(work.hist)
        args = (table, work.vector, work.hist, plan.slots)
        for known in range(1, digits):
            _launch(_narrow, plan, *args, known)
        _launch(_count, plan, *args, digits, work.counts)
        _launch(_keep, plan, *args, digits, work.counts, floats, message)


# ---------------------------------------------------------------------------------------------
# Producing D. In all kernels `row` points to a block's row of a table, `i` are coordinates of the block.


# fmt: off
@_jit
def _tile(tiles):  # type: ignore[no-untyped-def]
    """This program's row of Plan.tiles."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_COLUMNS
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@_jit
def _produce(  # type: ignore[no-untyped-def]
    row, hyper, s, g, m, e, x, i, inside,
    STORE: tl.constexpr, FEEDBACK: tl.constexpr, HAS_M: tl.constexpr, HAS_E: tl.constexpr,
):
    """D = e + eta u; with STORE, m <- m'. As saef.feedback, operation by operation."""
    h = hyper + tl.load(row + _GROUP) * _HYPERS
    at = tl.load(row + _STATE) + i
    D = tl.load(g + tl.load(row + _GRAD) + i, mask=inside, other=0) * tl.load(h + _FACTOR)
    error = tl.zeros_like(D)
    if HAS_E:
        error = tl.load(e + at, mask=inside, other=0)
    decay = tl.load(h + _DECAY)
    if decay != 0:
        D += (tl.load(x + at, mask=inside, other=0) - error * tl.load(s)) * decay
    if HAS_M:
        mu = tl.load(h + _MU)
        momentum = tl.load(m + at, mask=inside, other=0) * mu + D * tl.load(h + _GAIN)
        if STORE:
            tl.store(m + at, momentum, mask=inside)
        if tl.load(h + _NESTEROV) != 0:
            D += momentum * mu
        else:
            D = momentum
    if FEEDBACK:
        D = error + D * tl.load(h + _LR)
    return D


@_jit
def _mean(  # type: ignore[no-untyped-def]
    r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, total,
    K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):
    """mean_k C(D_k), summed in rank order. `total`: scratch for the block."""
    dtype = floats.dtype.element_ty
    kind = tl.load(row + _KIND)
    share = tl.full((), 1.0 / K, tl.float64).to(dtype)
    mean = tl.zeros((TILE,), dtype)
    at = floats + tl.load(row + _FLOAT)
    if kind == _SIGN:
        for _ in range(K):
            mean += _signed(row, i, inside, messages, tl.load(at) * share)
            at += float_stride
            messages += byte_stride
    elif kind == _DENSE:
        for _ in range(K):
            mean += tl.load(at + i, mask=inside, other=0) * share
            at += float_stride
    else:
        tl.store(total + i, mean, mask=inside)
        tl.debug_barrier()  # a thread may add to what another has written
        _add_kept(
            r, row, lo, floats, float_stride, messages, byte_stride, share, total, bad, K, LANES, TILE
        )
        mean = tl.load(total + i, mask=inside, other=0)
    return mean


# ---------------------------------------------------------------------------------------------
# Decoding messages


@_jit
def _signed(row, i, inside, message, scale):  # type: ignore[no-untyped-def]
    """scale * sign; bit i % 8 of byte i // 8 is 1 for +."""
    bits = tl.load(message + tl.load(row + _BYTE) + i // 8, mask=inside, other=0).to(tl.int32)
    return tl.where((bits >> (i % 8).to(tl.int32)) & 1 != 0, scale, -scale)


@_jit
def _index_bytes(n):  # type: ignore[no-untyped-def]
    """As saef.compressors.index_bytes."""
    return 1 + (n > 1 << 8).to(tl.int32) + (n > 1 << 16).to(tl.int32) + (n > 1 << 24).to(tl.int32)


@_jit
def _index(start, j, width, mask):  # type: ignore[no-untyped-def]
    """Indices j of a block, little-endian; 0 where masked."""
    index, there = tl.zeros_like(j), tl.where(mask, width, 0)
    for b in tl.static_range(4):
        index |= tl.load(start + j * width + b, mask=b < there, other=0).to(tl.int64) << (8 * b)
    return index


@_jit
def _find(messages, byte_stride, count, width, lo, K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lane 2k: the first entry of message k whose index is not below lo; 2k + 1: not below lo + TILE.

    A binary search. Whatever the indices are, neighbouring tiles agree on where one's entries end and the
    next one's begin, and no end is before its beginning.
    """
    lane = tl.arange(0, LANES)
    message = messages + tl.minimum(lane // 2, K - 1).to(tl.int64) * byte_stride
    bound = lo + (lane % 2) * TILE
    low = tl.zeros((LANES,), tl.int64)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        below = (low < high) & (_index(message, middle, width, low < high) < bound)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
        left = left // 2
    return low


@_jit
def _add_kept(  # type: ignore[no-untyped-def]
    r, row, lo, floats, float_stride, messages, byte_stride, factor, v, bad,
    K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):
    """v[index] += factor * value for the entries of K messages in [lo, lo + TILE), in rank order.

    Every entry of a message is checked, by the tile that finds it or as a rest of the last tile, and only
    used if it lies in the tile.
    """
    n, count = tl.load(row + _NUMEL), tl.load(row + _COUNT)
    width = _index_bytes(n)
    floats += tl.load(row + _FLOAT)
    messages += tl.load(row + _BYTE)
    found = _find(messages, byte_stride, count, width, lo, K, LANES, TILE)
    lane = tl.arange(0, LANES)
    wrong = tl.full((), 0, tl.int32)
    for k in range(K):
        start = tl.sum(tl.where(lane == 2 * k, found, 0), 0)
        end = tl.sum(tl.where(lane == 2 * k + 1, found, 0), 0)
        for chunk in range(start, end, _CHUNK):
            j = chunk + tl.arange(0, _CHUNK)
            index = _index(messages, j, width, j < end)
            before = _index(messages, j - 1, width, (j < end) & (j > 0))
            fine = (index >= lo) & (index < tl.minimum(lo + TILE, n)) & ((index > before) | (j == 0))
            wrong += tl.sum(((j < end) & (fine == 0)).to(tl.int32), 0)
            used = (j < end) & fine
            value = tl.load(floats + j, mask=used, other=0) * factor
            tl.store(v + index, tl.load(v + index, mask=used, other=0) + value, mask=used)
        if lo + TILE >= n:
            wrong += (end != count).to(tl.int32)
        tl.debug_barrier()  # the next message may add to what another thread has written
        floats += float_stride
        messages += byte_stride
    if wrong > 0:
        tl.atomic_min(bad, r.to(tl.int32))


@_jit
def _take(r, row, lo, i, inside, D, floats, message, v, bad, STORED: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """v <- D - C on a tile; `v` points to the block. STORED: for top-k, v is D already."""
    kind = tl.load(row + _KIND)
    at = floats + tl.load(row + _FLOAT)
    if kind == _SIGN:
        tl.store(v + i, D - _signed(row, i, inside, message, tl.load(at)), mask=inside)
    elif kind == _DENSE:
        tl.store(v + i, D - tl.load(at + i, mask=inside, other=0), mask=inside)
    else:
        if not STORED:
            tl.store(v + i, D, mask=inside)
            tl.debug_barrier()  # a thread may subtract from what another has written
        minus = tl.full((), -1.0, floats.dtype.element_ty)
        _add_kept(r, row, lo, floats, 0, message, 0, minus, v, bad, 1, 2, TILE)


# ---------------------------------------------------------------------------------------------
# Encoding D


@_jit
def _encode(  # type: ignore[no-untyped-def]
    row, lo, slot, i, inside, D, floats, message, partial, vector, hist,
    TILE: tl.constexpr, HAS_TOPK: tl.constexpr,
):
    """Code of a tile of D, as far as one tile can tell. `vector`: scratch for the block."""
    kind = tl.load(row + _KIND)
    if kind == _SIGN:
        bits = tl.reshape(((D >= 0) & inside).to(tl.int32), (TILE // 8, 8))  # sign(0) = +1
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        j = lo // 8 + tl.arange(0, TILE // 8)
        mask = j < (tl.load(row + _NUMEL) + 7) // 8
        tl.store(message + tl.load(row + _BYTE) + j, packed.to(tl.uint8), mask=mask)
        magnitude = tl.where(inside, tl.abs(D).to(tl.float64), 0.0)
        tl.store(partial + tl.program_id(0), tl.sum(magnitude, 0))
    elif kind == _DENSE:
        tl.store(floats + tl.load(row + _FLOAT) + i, D, mask=inside)
    elif HAS_TOPK:
        key = _key(D, inside)
        prefix = tl.full((), 0, key.dtype)
        if slot < 0:
            need = tl.load(row + _COUNT).to(tl.int32)
            for known in range(4 if key.dtype == tl.int32 else 8):
                prefix, need = _pick(_histogram(key, known, prefix), prefix, need)
            _write_kept(row, i, D, key, prefix, need, 0, 0, floats, message)
        else:
            tl.store(vector + i, D, mask=inside)
            _add_histogram(hist + slot * _DIGITS, _histogram(key, 0, prefix))


@_jit
def _key(D, inside):  # type: ignore[no-untyped-def]
    """Integers ordered as |D|, all NaN alike and above infinity; -1 outside of the block."""
    if D.dtype == tl.float32:
        key = tl.minimum(D.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    else:
        key = tl.minimum(D.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001)
    return tl.where(inside, key, -1)


@_jit
def _histogram(key, known, prefix):  # type: ignore[no-untyped-def]
    """How often each value of the next digit occurs among the keys that begin with `known` digits `prefix`."""
    lowest = 24 if key.dtype == tl.int32 else 56  # bit of the first digit
    upper = key >> (lowest - _DIGIT * known)
    match = upper >> _DIGIT == prefix
    count = tl.histogram(tl.where(match, upper & (_DIGITS - 1), 0).to(tl.int32), _DIGITS)
    others = tl.sum((match == 0).to(tl.int32), 0)  # they were counted as 0
    return count - tl.where(tl.arange(0, _DIGITS) == 0, others, 0)


@_jit
def _add_histogram(hist, count):  # type: ignore[no-untyped-def]
    tl.atomic_add(hist + tl.arange(0, _DIGITS), count, mask=count > 0, sem="relaxed")


@_jit
def _pick(count, prefix, need):  # type: ignore[no-untyped-def]
    """The next digit of the need-th largest key joins `prefix`, and `need` is then its rank among such keys."""
    at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    digit = tl.sum((at_least >= need).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, _DIGITS) > digit, count, 0), 0)
    return (prefix << _DIGIT) | digit.to(prefix.dtype), need - above


@_jit
def _write_kept(row, i, D, key, threshold, need, above, ties, floats, message):  # type: ignore[no-untyped-def]
    """Write the entries of a tile above the threshold, and the first `need` ties of the block.

    `above` and `ties`: entries above, and at, the threshold in the block's tiles before this one.
    """
    tie = (key == threshold).to(tl.int32)
    kept = ((key > threshold) | ((tie != 0) & (ties + tl.cumsum(tie, 0) <= need))).to(tl.int32)
    place = (above + tl.minimum(ties, need) + tl.cumsum(kept, 0) - 1).to(tl.int64)
    tl.store(floats + tl.load(row + _FLOAT) + place, D, mask=kept != 0)
    width = _index_bytes(tl.load(row + _NUMEL))
    start = message + tl.load(row + _BYTE) + place * width
    for b in tl.static_range(4):
        tl.store(start + b, ((i >> (8 * b)) & 255).to(tl.uint8), mask=b < kept * width)


@_kernel
def _write_scale(tiles, first, table, partial, floats, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per block: the scale from the tiles' sums."""
    r = tl.program_id(0).to(tl.int64)
    row = table + r * _COLUMNS
    if tl.load(row + _KIND) == _SIGN:
        n = tl.load(row + _NUMEL)
        start = tl.load(first + r)
        end = start + (n + TILE - 1) // TILE
        total = tl.zeros((_CHUNK,), tl.float64)
        for chunk in range(start, end, _CHUNK):
            t = chunk + tl.arange(0, _CHUNK)
            total += tl.load(partial + t, mask=t < end, other=0)
        scale = tl.sum(total, 0) / n.to(tl.float64)
        if tl.load(row + _UNIT) != 0:
            scale = tl.where(scale - scale == 0, 1.0, float("nan")).to(tl.float64)
        tl.store(floats + tl.load(row + _FLOAT), scale.to(floats.dtype.element_ty))


# ---------------------------------------------------------------------------------------------
# Radix selection for top-k blocks of more than one tile. Each kernel works out the digits that are known from
# the histograms so far, which is cheaper than a launch of its own.


@_jit
def _select(tiles, table, vector, hist, slots, digits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile of D, its keys, and the first `digits` digits of its block's threshold.

    Returns (slot, row, offset of the tile, coordinates, D, keys, digits, rank among the keys that begin with
    these digits); slot < 0 if there is nothing to select.
    """
    r, lo, at, slot = _tile(tiles)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.where(slot >= 0, tl.load(row + _NUMEL), 0)
    D = tl.load(vector + at + i, mask=inside, other=0)
    key = _key(D, inside)
    prefix, need = tl.full((), 0, key.dtype), tl.load(row + _COUNT).to(tl.int32)
    start = hist + tl.maximum(slot, 0) * _DIGITS + tl.arange(0, _DIGITS)
    for _ in range(digits):
        prefix, need = _pick(tl.load(start), prefix, need)
        start += slots * _DIGITS
    return slot, row, lo, i, D, key, prefix, need


@_kernel
def _narrow(tiles, table, vector, hist, slots, digits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The histogram of the next digit."""
    slot, row, lo, i, D, key, prefix, need = _select(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        _add_histogram(hist + (slot + digits * slots) * _DIGITS, _histogram(key, digits, prefix))


@_kernel
def _count(tiles, table, vector, hist, slots, digits, counts, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many entries of a tile are above, and at, the threshold."""
    slot, row, lo, i, D, key, threshold, need = _select(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        at = counts + tl.program_id(0).to(tl.int64) * 2
        tl.store(at, tl.sum((key > threshold).to(tl.int32), 0))
        tl.store(at + 1, tl.sum((key == threshold).to(tl.int32), 0))


@_kernel
def _keep(tiles, table, vector, hist, slots, digits, counts, floats, message, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what a tile keeps, behind what the tiles before it keep."""
    slot, row, lo, i, D, key, threshold, need = _select(tiles, table, vector, hist, slots, digits, TILE)
    if slot >= 0:
        this = tl.program_id(0).to(tl.int64)
        above, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for chunk in range(this - lo // TILE, this, _CHUNK):
            t = chunk + tl.arange(0, _CHUNK)
            above += tl.sum(tl.load(counts + 2 * t, mask=t < this, other=0), 0)
            ties += tl.sum(tl.load(counts + 2 * t + 1, mask=t < this, other=0), 0)
        _write_kept(row, i, D, key, threshold, need, above, ties, floats, message)


# ---------------------------------------------------------------------------------------------
# The six kernels


@_kernel
def _compress(  # type: ignore[no-untyped-def]
    tiles, table, hyper, s, g, m, e, x, floats, message, partial, vector, hist,
    TILE: tl.constexpr, FEEDBACK: tl.constexpr, HAS_M: tl.constexpr, HAS_E: tl.constexpr,
    HAS_TOPK: tl.constexpr,
):
    r, lo, at, slot = _tile(tiles)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.load(row + _NUMEL)
    D = _produce(row, hyper, s, g, m, e, x, i, inside, False, FEEDBACK, HAS_M, HAS_E)
    _encode(row, lo, slot, i, inside, D, floats, message, partial, vector + at, hist, TILE, HAS_TOPK)


@_kernel
def _commit(  # type: ignore[no-untyped-def]
    tiles, table, hyper, s, g, m, e, x, floats, message, bad,
    TILE: tl.constexpr, FEEDBACK: tl.constexpr, HAS_M: tl.constexpr, HAS_E: tl.constexpr,
):
    r, lo, at, slot = _tile(tiles)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.load(row + _NUMEL)
    D = _produce(row, hyper, s, g, m, e, x, i, inside, True, FEEDBACK, HAS_M, HAS_E)
    if FEEDBACK:
        _take(r, row, lo, i, inside, D, floats, message, e + tl.load(row + _STATE), bad, False, TILE)


@_kernel
def _serve(  # type: ignore[no-untyped-def]
    tiles, table, reply_table, floats, float_stride, messages, byte_stride, e, bad,
    reply_floats, reply, partial, vector, hist,
    TILE: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, HAS_E: tl.constexpr, HAS_TOPK: tl.constexpr,
):
    r, lo, at, slot = _tile(tiles)
    row, out = table + r * _COLUMNS, reply_table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.load(row + _NUMEL)
    D = _mean(
        r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, vector + at, K, LANES, TILE
    )
    if HAS_E:
        D = tl.load(e + tl.load(out + _STATE) + i, mask=inside, other=0) + D
    _encode(out, lo, slot, i, inside, D, reply_floats, reply, partial, vector + at, hist, TILE, HAS_TOPK)


@_kernel
def _settle(  # type: ignore[no-untyped-def]
    tiles, table, reply_table, floats, float_stride, messages, byte_stride, e, bad,
    reply_floats, reply, vector, TILE: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):
    r, lo, at, slot = _tile(tiles)
    row, out = table + r * _COLUMNS, reply_table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.load(row + _NUMEL)
    D = _mean(
        r, row, lo, i, inside, floats, float_stride, messages, byte_stride, bad, vector + at, K, LANES, TILE
    )
    v = e + tl.load(out + _STATE)
    D = tl.load(v + i, mask=inside, other=0) + D
    _take(r, out, lo, i, inside, D, reply_floats, reply, v, bad, False, TILE)


@_kernel
def _subtract(tiles, table, floats, message, v, bad, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    r, lo, at, slot = _tile(tiles)
    row = table + r * _COLUMNS
    i = lo + tl.arange(0, TILE)
    inside = i < tl.where(tl.load(row + _KIND) == _TOPK, 0, tl.load(row + _NUMEL))
    v += tl.load(row + _STATE)
    D = tl.load(v + i, mask=inside, other=0)
    _take(r, row, lo, i, inside, D, floats, message, v, bad, True, TILE)


@_kernel
def _inspect(tiles, table, message, bad, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per block."""
    r = tl.program_id(0).to(tl.int64)
    row = table + r * _COLUMNS
    count = tl.where(tl.load(row + _KIND) == _TOPK, tl.load(row + _COUNT), 0)
    n = tl.load(row + _NUMEL)
    width = _index_bytes(n)
    start = message + tl.load(row + _BYTE)
    wrong = tl.full((), 0, tl.int32)
    for chunk in range(0, count, _CHUNK):
        j = chunk + tl.arange(0, _CHUNK).to(tl.int64)
        index = _index(start, j, width, j < count)
        before = _index(start, j - 1, width, (j < count) & (j > 0))
        fine = (index < n) & ((index > before) | (j == 0))
        wrong += tl.sum(((j < count) & (fine == 0)).to(tl.int32), 0)
    if wrong > 0:
        tl.atomic_min(bad, r.to(tl.int32))
