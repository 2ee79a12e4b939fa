"""Producing D: one branch for each rule. A new rule adds its function here, its kind to `KINDS` and to `produce`.

row, i, inside   a block's row of the table; [TILE] coordinates of the block; whether they are in it
hyper            [groups, columns of the rule]
s                [1]
g, m, e, x       the worker's vectors; m is [S, d], vector j begins at m + j d
h                the group's row of hyper
STORE            whether m <- m'
RULE, FEEDBACK   update.kind, update.feedback
HAS_M, HAS_E     whether m, e are there
"""

from __future__ import annotations

import triton.language as tl

from ....rules import sgd
from .constants import _GRAD, _GROUP, _LR, _STATE, entry, jit

_SGD, _SGD_COLUMNS = tl.constexpr(sgd.SGD.kind), tl.constexpr(sgd.COLUMNS)
_MU, _GAIN, _NESTEROV, _DECAY, _FACTOR = (
    tl.constexpr(c) for c in (sgd.MU, sgd.GAIN, sgd.NESTEROV, sgd.DECAY, sgd.FACTOR)
)
KINDS = (sgd.SGD.kind,)


# fmt: off
@jit
def produce(  # type: ignore[no-untyped-def]
    row, hyper, s, g, m, e, x, i, inside, STORE: tl.constexpr,
    RULE: tl.constexpr, FEEDBACK: tl.constexpr, HAS_M: tl.constexpr, HAS_E: tl.constexpr, ALIGN: tl.constexpr,
):
    """D = e + eta u; with STORE, m <- m'. As `saef.rules`, operation by operation."""
    at = entry(row, _STATE, ALIGN) + i
    D = tl.load(g + entry(row, _GRAD, ALIGN) + i, mask=inside, other=0)
    error = tl.zeros_like(D)
    if HAS_E:
        error = tl.load(e + at, mask=inside, other=0)
    if RULE == _SGD:
        h = hyper + tl.load(row + _GROUP) * _SGD_COLUMNS
        D = _sgd(h, s, D, m + at, error, x + at, inside, STORE, HAS_M)
    if FEEDBACK:
        D = error + D * tl.load(h + _LR)
    return D


@jit
def _sgd(h, s, D, m, error, x, inside, STORE: tl.constexpr, HAS_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """u of g, which is in D: m' = mu m + gain g, u = m' or g + mu m' (Nesterov)."""
    D = D * tl.load(h + _FACTOR)
    decay = tl.load(h + _DECAY)
    if decay != 0:
        D += (tl.load(x, mask=inside, other=0) - error * tl.load(s)) * decay
    if HAS_M:
        mu = tl.load(h + _MU)
        momentum = tl.load(m, mask=inside, other=0) * mu + D * tl.load(h + _GAIN)
        if STORE:
            tl.store(m, momentum, mask=inside)
        if tl.load(h + _NESTEROV) != 0:
            D += momentum * mu
        else:
            D = momentum
    return D
