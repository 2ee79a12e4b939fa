"""Producing D: one branch for each rule. A new rule adds its loop here, its kind to `KINDS` and to `produce`.

Arguments of all functions, for a chunk of n coordinates of a block:

    update      `Update` of arrays        hyper [groups, columns]
    h           [columns]                 the group's row of update.hyper
    store       bool                      whether m <- m'
    g, e, x     [n]                       gradient, local error, what x_half is made from
    m, at       [S, d] or [0, ...], int   what the rule keeps, and where the chunk begins in it
    D           [CHUNK]                   the result, in its first n entries
"""

from __future__ import annotations

import numpy as np

from ....rules import adamw
from ....rules.adamw import AdamW as _AdamW
from ....rules.sgd import DECAY, FACTOR, GAIN, LR, MU, NESTEROV
from ....rules.sgd import SGD as _SGD
from .compiling import helper
from .records import WIDTH, Adam

SGD, ADAMW = _SGD.kind, _AdamW.kind
KINDS = (SGD, ADAMW)
A_FACTOR, A_DECAY = adamw.FACTOR, adamw.DECAY
BETA1, A_GAIN, BETA2, OWN, CROSS = adamw.BETA1, adamw.GAIN, adamw.BETA2, adamw.OWN, adamw.CROSS
CORRECT1, CORRECT2, EPS, BOUND = adamw.CORRECT1, adamw.CORRECT2, adamw.EPS, adamw.BOUND


@helper
def produce(update, h, store, g, m, at, e, x, D):  # type: ignore[no-untyped-def]
    """D <- e + eta u. As `saef.rules`, operation by operation."""
    if update.kind == SGD:
        kept = m[0, at : at + g.size] if len(m) > 0 and h[MU] != 0 else D[:0]
        _sgd(h, update.step_ahead, update.feedback, store, g, kept, e, x, D)
    elif update.kind == ADAMW:
        first, second = m[0, at : at + g.size], m[1, at : at + g.size]
        _adamw(h, update.step_ahead, update.feedback, store, g, first, second, e, x, D)


@helper
def fuses_signs(update, h, m):  # type: ignore[no-untyped-def]
    """Whether `produce_signs` can do it."""
    if update.kind == SGD:
        return update.feedback and len(m) > 0 and h[MU] != 0 and h[NESTEROV] == 0
    return update.feedback and h[A_DECAY] == 0


@helper
def produce_signs(update, h, g, m, at, e, x, half, spread):  # type: ignore[no-untyped-def]
    """For a whole chunk: `produce`, the first fold of `codes.sum_abs`, and the signs of `codes.pack`.

    In one loop, so that arithmetic hides behind the three streams that are read; the same bits.
    """
    if update.kind == SGD:
        _sgd_signs(h, update.step_ahead, g, m[0, at : at + g.size], e, x, half, spread)
    else:
        _adamw_signs(h, g, m[0, at : at + g.size], m[1, at : at + g.size], e, half, spread)


@helper
def _sgd(h, s, feedback, store, g, m, e, x, D):  # type: ignore[no-untyped-def]
    """m' = mu m + gain g, u = m' or g + mu m' (Nesterov). `m`: [n], or empty: without momentum u = g."""
    n, factor, lr, mu, gain = g.size, h[FACTOR], h[LR], h[MU], h[GAIN]
    if h[DECAY] != 0:
        decay = h[DECAY]
        for i in range(n):
            D[i] = g[i] * factor + (x[i] - e[i] * s) * decay
        g, factor = D, h.dtype.type(1)  # exact
    if not m.size:
        for i in range(n):
            D[i] = g[i] * factor
    elif h[NESTEROV] != 0:
        for i in range(n):
            d = g[i] * factor
            t = m[i] * mu + d * gain
            if store:
                m[i] = t
            D[i] = d + t * mu
    elif feedback and store:  # the usual case in one loop: three streams in, two out
        for i in range(n):
            t = m[i] * mu + g[i] * factor * gain
            m[i] = t
            D[i] = e[i] + t * lr
    elif feedback:
        for i in range(n):
            D[i] = e[i] + (m[i] * mu + g[i] * factor * gain) * lr
    else:
        for i in range(n):
            t = m[i] * mu + g[i] * factor * gain
            if store:
                m[i] = t
            D[i] = t
    if feedback and (not m.size or h[NESTEROV] != 0):
        for i in range(n):
            D[i] = e[i] + D[i] * lr


@helper
def _sgd_signs(h, s, g, m, e, x, half, spread):  # type: ignore[no-untyped-def]
    """Without Nesterov; coordinate i and WIDTH + i together."""
    factor, lr, mu, gain, decay = h[FACTOR], h[LR], h[MU], h[GAIN], h[DECAY]
    g2, m2, e2, x2, spread2 = g[WIDTH:], m[WIDTH:], e[WIDTH:], x[WIDTH:], spread[WIDTH:]
    if decay != 0:
        for i in range(WIDTH):
            a = e[i] + (m[i] * mu + (g[i] * factor + (x[i] - e[i] * s) * decay) * gain) * lr
            b = e2[i] + (m2[i] * mu + (g2[i] * factor + (x2[i] - e2[i] * s) * decay) * gain) * lr
            spread[i] = a >= 0
            spread2[i] = b >= 0
            half[i] = abs(np.float64(a)) + abs(np.float64(b))
    else:
        for i in range(WIDTH):
            a = e[i] + (m[i] * mu + g[i] * factor * gain) * lr
            b = e2[i] + (m2[i] * mu + g2[i] * factor * gain) * lr
            spread[i] = a >= 0
            spread2[i] = b >= 0
            half[i] = abs(np.float64(a)) + abs(np.float64(b))


@helper
def _first(h, g, m):  # type: ignore[no-untyped-def]
    """m' of one coordinate: b1 m + (1 - b1) g."""
    return m * h.beta1 + g * h.gain


@helper
def _second(h, g, m, v):  # type: ignore[no-untyped-def]
    """v' of one coordinate, m the momentum before."""
    return v * h.beta2 + g * (g * h.own + m * h.cross)


@helper
def _direction(h, m, v):  # type: ignore[no-untyped-def]
    """u of one coordinate, from m' and v'. A NaN passes every comparison as it is."""
    v = v * h.correct2
    u = m * h.correct1 / (np.sqrt(h.zero if v < h.zero else v) + h.eps)
    return (h.bound if u > h.bound else (-h.bound if u < -h.bound else u)) + (v - v)


@helper
def _adam(h):  # type: ignore[no-untyped-def]
    """What a loop needs of h, in registers."""
    return Adam(
        h[BETA1], h[A_GAIN], h[BETA2], h[OWN], h[CROSS], h[CORRECT1], h[CORRECT2], h[EPS], h[BOUND], h.dtype.type(0)
    )


@helper
def _adamw(h, s, feedback, store, g, m, v, e, x, D):  # type: ignore[no-untyped-def]
    """As `AdamW.update`. `m`, `v`: [n]."""
    n, factor, lr, a = g.size, h[A_FACTOR], h[LR], _adam(h)
    if h[A_DECAY] != 0:
        decay = h[A_DECAY]
        for i in range(n):
            D[i] = g[i] * factor + (x[i] - e[i] * s) * decay
        g, factor = D, h.dtype.type(1)  # exact
    if feedback and store:  # the usual case in one loop: four streams in, three out
        for i in range(n):
            d = g[i] * factor
            first, second = _first(a, d, m[i]), _second(a, d, m[i], v[i])
            m[i] = first
            v[i] = second
            D[i] = e[i] + _direction(a, first, second) * lr
    elif feedback:
        for i in range(n):
            d = g[i] * factor
            D[i] = e[i] + _direction(a, _first(a, d, m[i]), _second(a, d, m[i], v[i])) * lr
    else:
        for i in range(n):
            d = g[i] * factor
            first, second = _first(a, d, m[i]), _second(a, d, m[i], v[i])
            if store:
                m[i] = first
                v[i] = second
            D[i] = _direction(a, first, second)


@helper
def _adamw_signs(h, g, m, v, e, half, spread):  # type: ignore[no-untyped-def]
    """Without coupled decay; coordinate i and WIDTH + i together."""
    factor, lr, a = h[A_FACTOR], h[LR], _adam(h)
    g2, m2, v2, e2, spread2 = g[WIDTH:], m[WIDTH:], v[WIDTH:], e[WIDTH:], spread[WIDTH:]
    for i in range(WIDTH):
        b, c = g[i] * factor, g2[i] * factor
        b = e[i] + _direction(a, _first(a, b, m[i]), _second(a, b, m[i], v[i])) * lr
        c = e2[i] + _direction(a, _first(a, c, m2[i]), _second(a, c, m2[i], v2[i])) * lr
        spread[i] = b >= 0
        spread2[i] = c >= 0
        half[i] = abs(np.float64(b)) + abs(np.float64(c))
