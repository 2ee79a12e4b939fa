"""The kernels in torch operations: any device, any floating dtype. Clear first, slow: one block a turn.

This is the definition that the numba and Triton kernels are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressors import DENSE, SIGN, TOPK, index_bytes
from ..feedback import Hyper, correct, local_update, step_ahead
from . import BYTE, COUNT, FLOAT, GRAD, GROUP, KIND, NUMEL, STATE, UNIT, Rule, malformed

Row = list[int]


def compress(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    for row in table.tolist():
        _, D = _worker(row, rule, g, m, e, x)
        _encode(row, D, message)


def commit(table: Tensor, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor, message: Tensor) -> None:
    for i, row in enumerate(table.tolist()):
        m_new, D = _worker(row, rule, g, m, e, x)
        if m.numel():
            _at(row, m).copy_(m_new)
        if rule.feedback:
            _at(row, e).copy_(D - _decode(i, row, message, e.dtype))  # Alg. 1, line 18


def serve(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    for i, (row, out) in enumerate(zip(table.tolist(), reply_table.tolist(), strict=True)):
        _encode(out, _server(i, row, out, messages, e), reply)


def settle(table: Tensor, reply_table: Tensor, messages: Tensor, e: Tensor, reply: Tensor) -> None:
    for i, (row, out) in enumerate(zip(table.tolist(), reply_table.tolist(), strict=True)):
        D = _server(i, row, out, messages, e)
        _at(out, e).copy_(D - _decode(i, out, reply, e.dtype))  # Alg. 1, line 22


def subtract(table: Tensor, message: Tensor, v: Tensor) -> None:
    for i, row in enumerate(table.tolist()):
        _at(row, v).sub_(_decode(i, row, message, v.dtype))


def inspect(table: Tensor, message: Tensor) -> None:
    for i, row in enumerate(table.tolist()):
        if row[KIND] == TOPK:
            _indices(i, row, message)


def _at(row: Row, v: Tensor) -> Tensor:
    return v[row[STATE] : row[STATE] + row[NUMEL]]


def _worker(row: Row, rule: Rule, g: Tensor, m: Tensor, e: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(m', D) of one block."""
    lr, mu, gain, nesterov, decay, factor = rule.hyper[row[GROUP]].tolist()
    h = Hyper(lr, mu, gain, nesterov != 0.0, decay, factor)
    g = g[row[GRAD] : row[GRAD] + row[NUMEL]]
    e = _at(row, e)
    x_half = step_ahead(_at(row, x), e, rule.step_ahead) if decay != 0.0 else x
    m_new, u = local_update(h, g, _at(row, m) if m.numel() else m, x_half)
    return m_new, correct(h, e, u, rule.feedback)


def _server(i: int, row: Row, out: Row, messages: Tensor, e: Tensor) -> Tensor:
    """D = e + mean_k C(D_k) of one block, summed in rank order (Alg. 1, line 21)."""
    share = torch.tensor(1.0 / len(messages), dtype=e.dtype, device=e.device)
    total = torch.zeros(row[NUMEL], dtype=e.dtype, device=e.device)
    for message in messages:
        total += _decode(i, row, message, e.dtype, share)
    return _at(out, e) + total if e.numel() else total


def _floats(row: Row, message: Tensor, dtype: torch.dtype) -> Tensor:
    return message.view(dtype)[row[FLOAT] : row[FLOAT] + row[COUNT]]


def _encode(row: Row, D: Tensor, message: Tensor) -> None:
    """message <- code of C(D) for one block; layout in `saef.codec`."""
    floats, n = _floats(row, message, D.dtype), row[NUMEL]
    if row[KIND] == DENSE:
        floats.copy_(D)
    elif row[KIND] == SIGN:
        scale = D.abs().sum(dtype=torch.float64) / n
        if row[UNIT]:
            scale = torch.where(torch.isfinite(scale), 1.0, torch.nan)
        floats.fill_(scale)
        bits = torch.zeros((n + 7) // 8 * 8, dtype=torch.uint8, device=D.device)
        bits[:n] = D >= 0  # sign(0) = +1
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=D.device)
        message[row[BYTE] : row[BYTE] + (n + 7) // 8] = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    else:
        k, width = row[COUNT], index_bytes(n)
        kept = D.abs().sort(descending=True, stable=True).indices[:k].sort().values
        floats.copy_(D[kept])
        lowest = kept.view(-1, 1) >> (8 * torch.arange(width, device=D.device)) & 255
        message[row[BYTE] : row[BYTE] + k * width] = lowest.view(-1).to(torch.uint8)


def _decode(i: int, row: Row, message: Tensor, dtype: torch.dtype, share: Tensor | None = None) -> Tensor:
    """C(D) of one block, its scalars multiplied by `share` (before use, as the fused kernels do)."""
    floats, n = _floats(row, message, dtype), row[NUMEL]
    if share is not None:
        floats = floats * share
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
