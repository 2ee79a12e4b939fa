"""The kernels in torch operations: any device, any floating dtype. Clear first, slow: one block a turn.

This is the definition that the numba and Triton kernels are compared with. The arguments are those of
`saef.wire.kernels.table`; `i` is the number of a row, `row` and `out` the same block's rows of a table and of the
replies' table, as lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import rules
from ...rules import RULES, correct
from ..compressors import DENSE, SIGN, TOPK, index_bytes
from .table import (
    BYTE,
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
    malformed,
    unknown_rule,
)

Row = list[int]


def compress(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    for row in _rows(table):
        _, D = _produce(row, update, worker)
        _encode(row, D, message)


def commit(table: Tensor, update: Update, worker: Worker, message: Tensor) -> None:
    for i, row in enumerate(_rows(table)):
        m_new, D = _produce(row, update, worker)
        _at(row, worker.m).copy_(m_new)
        if update.feedback:
            _at(row, worker.e).copy_(D - _decode(i, row, message, D.dtype))  # Alg. 1, line 18


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
    for i, (row, out) in enumerate(zip(_rows(table), _rows(reply_table), strict=True)):
        _encode(out, _average(i, row, out, messages, e), reply)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    for i, (row, out) in enumerate(zip(_rows(table), _rows(reply_table), strict=True)):
        D = _average(i, row, out, messages, e)
        _at(out, e).copy_(D - _decode(i, out, reply, e.dtype))  # Alg. 1, line 22


def subtract(table: Tensor, rates: Tensor, message: Tensor, v: Tensor) -> None:
    for i, row in enumerate(_rows(table)):
        _at(row, v).sub_(_decode(i, row, message, v.dtype, rates[row[GROUP]]))


def step_ahead(table: Tensor, x_table: Tensor, x: Tensor, e: Tensor, half: Tensor, ahead: float) -> None:
    for row, out in zip(_rows(table), _rows(x_table), strict=True):
        at = _at(out, x)
        _at(row, half).copy_(rules.step_ahead(at, _at(row, e), ahead) if ahead else at)  # Alg. 1, line 9


def inspect(table: Tensor, message: Tensor) -> None:
    for i, row in enumerate(_rows(table)):
        if row[KIND] == TOPK:
            _indices(i, row, message)


def _rows(table: Tensor) -> list[Row]:
    rows: list[Row] = table.tolist()
    check_kinds(row[KIND] for row in rows)
    return rows


def _at(row: Row, v: Tensor) -> Tensor:
    """The block's part of one vector of the state, or of several, [S, d]."""
    return v[..., row[STATE] : row[STATE] + row[NUMEL]]


def _produce(row: Row, update: Update, worker: Worker) -> tuple[Tensor, Tensor]:
    """(m', D) of one block (Alg. 1, lines 10-12)."""
    if update.kind not in RULES:
        raise unknown_rule(update.kind)
    rule = RULES[update.kind]
    h = rule.hyper(*update.hyper[row[GROUP]].tolist())
    g = worker.g[row[GRAD] : row[GRAD] + row[NUMEL]]
    e, x = _at(row, worker.e), _at(row, worker.x)
    x_half = rules.step_ahead(x, e, update.step_ahead) if len(x) and len(e) else x
    m_new, u = rule.update(h, g, _at(row, worker.m), x_half)
    return m_new, correct(h, e, u, update.feedback)


def _average(i: int, row: Row, out: Row, messages: Tensor, e: Tensor) -> Tensor:
    """D = e + mean_k C(D_k) of one block, summed in rank order (Alg. 1, line 21)."""
    share = torch.tensor(1.0 / len(messages), dtype=e.dtype, device=e.device)
    total = torch.zeros(row[NUMEL], dtype=e.dtype, device=e.device)
    for message in messages:
        total += _decode(i, row, message, e.dtype, share)
    return _at(out, e) + total if e.numel() else total


def _floats(row: Row, message: Tensor, dtype: torch.dtype) -> Tensor:
    return message.view(dtype)[row[FLOAT] : row[FLOAT] + row[COUNT]]


def _write(row: Row, values: Tensor, message: Tensor) -> None:
    if not row[HALF]:
        _floats(row, message, values.dtype).copy_(values)
        return
    bits = values.float().view(torch.int32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1) >> 16  # ties to even
    _floats(row, message, torch.int16).copy_(torch.where(values.isnan(), 0x7FC0, nearest))


def _read(row: Row, message: Tensor, dtype: torch.dtype) -> Tensor:
    if not row[HALF]:
        return _floats(row, message, dtype)
    return (_floats(row, message, torch.int16).int() << 16).view(torch.float32).to(dtype)


def _encode(row: Row, D: Tensor, message: Tensor) -> None:
    """message <- code of C(D) for one block; layout in `saef.wire.codec`."""
    n = row[NUMEL]
    if row[KIND] == DENSE:
        _write(row, D, message)
    elif row[KIND] == SIGN:
        scale = D.abs().sum(dtype=torch.float64) / n
        if row[UNIT]:
            scale = torch.where(torch.isfinite(scale), 1.0, torch.nan)
        _floats(row, message, D.dtype).fill_(scale)
        bits = torch.zeros((n + 7) // 8 * 8, dtype=torch.uint8, device=D.device)
        bits[:n] = D >= 0  # sign(0) = +1
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=D.device)
        message[row[BYTE] : row[BYTE] + (n + 7) // 8] = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    else:
        k, width = row[COUNT], index_bytes(n)
        kept = D.abs().sort(descending=True, stable=True).indices[:k].sort().values
        _write(row, D[kept], message)
        lowest = kept.view(-1, 1) >> (8 * torch.arange(width, device=D.device)) & 255
        message[row[BYTE] : row[BYTE] + k * width] = lowest.view(-1).to(torch.uint8)


def _decode(i: int, row: Row, message: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """C(D) of one block, its scalars multiplied by `factor` (before use, as the fused kernels do)."""
    floats, n = _read(row, message, dtype), row[NUMEL]
    if factor is not None:
        floats = floats * factor
    if row[KIND] == DENSE:
        return floats.clone()
    if row[KIND] == SIGN:
        packed = message[row[BYTE] : row[BYTE] + (n + 7) // 8]
        bits = (packed.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        return torch.where(bits.view(-1)[:n].bool(), floats, -floats)
    return torch.zeros(n, dtype=dtype, device=message.device).index_copy(0, _indices(i, row, message), floats)


def _indices(i: int, row: Row, message: Tensor) -> Tensor:
    """The indices of a top-k block, checked: increasing, and inside the block."""
    n, k = row[NUMEL], row[COUNT]
    width = index_bytes(n)
    packed = message[row[BYTE] : row[BYTE] + k * width].view(k, width).long()
    kept = (packed << (8 * torch.arange(width, device=packed.device))).sum(1)
    if bool((kept >= n).any()) or bool((kept[1:] <= kept[:-1]).any()):
        raise malformed(i)
    return kept
