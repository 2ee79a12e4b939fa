"""Producing D: one branch for each rule. A new rule adds its function here, its kind to `KINDS` and to `produce`.

row, i, inside   a block's row of the table; [TILE] coordinates of the block; whether they are in it
hyper            [groups, columns of the rule]
s                [1]
g, m, e, x       the worker's vectors; m is [S, d], vector j begins at m + j d
d, SPACING       coordinates of the model, and what divides them
h                the group's row of hyper
STORE            whether m <- m'
RULE, FEEDBACK   update.kind, update.feedback
HAS_M, HAS_E     whether m, e are there
"""

from __future__ import annotations

import triton.language as tl

from ....rules import adamw, sgd
from .constants import _GRAD, _GROUP, _LR, _STATE, entry, jit

_SGD, _SGD_COLUMNS = tl.constexpr(sgd.SGD.kind), tl.constexpr(sgd.COLUMNS)
_MU, _GAIN, _NESTEROV, _DECAY, _FACTOR = (
    tl.constexpr(c) for c in (sgd.MU, sgd.GAIN, sgd.NESTEROV, sgd.DECAY, sgd.FACTOR)
)
_ADAMW, _ADAMW_COLUMNS = tl.constexpr(adamw.AdamW.kind), tl.constexpr(adamw.COLUMNS)
_BETA1, _A_GAIN, _BETA2, _OWN, _CROSS = (
    tl.constexpr(c) for c in (adamw.BETA1, adamw.GAIN, adamw.BETA2, adamw.OWN, adamw.CROSS)
)
_CORRECT1, _CORRECT2, _EPS, _BOUND, _A_DECAY, _A_FACTOR = (
    tl.constexpr(c) for c in (adamw.CORRECT1, adamw.CORRECT2, adamw.EPS, adamw.BOUND, adamw.DECAY, adamw.FACTOR)
)
KINDS = (sgd.SGD.kind, adamw.AdamW.kind)


# fmt: off
@jit
def produce(  # type: ignore[no-untyped-def]
    row, hyper, s, g, m, d, e, x, i, inside, STORE: tl.constexpr, RULE: tl.constexpr, FEEDBACK: tl.constexpr,
    HAS_M: tl.constexpr, HAS_E: tl.constexpr, SPACING: tl.constexpr, ALIGN: tl.constexpr,
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
    elif RULE == _ADAMW:
        h = hyper + tl.load(row + _GROUP) * _ADAMW_COLUMNS
        v = m + tl.multiple_of(d.to(tl.int64), SPACING) + at
        D = _adamw(h, s, D, m + at, v, error, x + at, inside, STORE)
    if FEEDBACK:
        D = error + D * tl.load(h + _LR)
    return D


@jit
def _sgd(h, s, D, m, error, x, inside, STORE: tl.constexpr, HAS_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """u of g, which is in D: m' = mu m + gain g, u = m' or g + mu m' (Nesterov); without mu u = g, and m is left."""
    D = D * tl.load(h + _FACTOR)
    decay = tl.load(h + _DECAY)
    if decay != 0:
        D += (tl.load(x, mask=inside, other=0) - error * tl.load(s)) * decay
    if HAS_M:
        mu = tl.load(h + _MU)
        if mu != 0:
            momentum = tl.load(m, mask=inside, other=0) * mu + D * tl.load(h + _GAIN)
            if STORE:
                tl.store(m, momentum, mask=inside)
            if tl.load(h + _NESTEROV) != 0:
                D += momentum * mu
            else:
                D = momentum
    return D


@jit
def _adamw(h, s, D, m, v, error, x, inside, STORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """u of g, which is in D: as `AdamW.update`."""
    D = D * tl.load(h + _A_FACTOR)
    decay = tl.load(h + _A_DECAY)
    if decay != 0:
        D += (tl.load(x, mask=inside, other=0) - error * tl.load(s)) * decay
    before = tl.load(m, mask=inside, other=0)
    first = before * tl.load(h + _BETA1) + D * tl.load(h + _A_GAIN)
    square = D * (D * tl.load(h + _OWN) + before * tl.load(h + _CROSS))
    second = tl.load(v, mask=inside, other=0) * tl.load(h + _BETA2) + square
    if STORE:
        tl.store(m, first, mask=inside)
        tl.store(v, second, mask=inside)
    corrected = second * tl.load(h + _CORRECT2)
    root = _sqrt(tl.where(corrected < 0, 0.0, corrected)) + tl.load(h + _EPS)
    u = _divide(first * tl.load(h + _CORRECT1), root)
    bound = tl.load(h + _BOUND)
    return tl.where(u > bound, bound, tl.where(u < -bound, -bound, u)) + (corrected - corrected)


@jit
def _sqrt(v):  # type: ignore[no-untyped-def]
    """Rounded to nearest; in float32 the plain one is not."""
    if v.dtype == tl.float32:
        return tl.sqrt_rn(v)
    else:
        return tl.sqrt(v)


@jit
def _divide(a, b):  # type: ignore[no-untyped-def]
    """Rounded to nearest; in float32 the plain one is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b
