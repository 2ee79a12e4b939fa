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

from ....rules.sgd import DECAY, FACTOR, GAIN, LR, MU, NESTEROV
from ....rules.sgd import SGD as _SGD
from .compiling import helper
from .records import WIDTH

SGD = _SGD.kind
KINDS = (SGD,)


@helper
def produce(update, h, store, g, m, at, e, x, D):  # type: ignore[no-untyped-def]
    """D <- e + eta u. As `saef.rules`, operation by operation."""
    if update.kind == SGD:
        kept = m[0, at : at + g.size] if len(m) else D[:0]
        _sgd(h, update.step_ahead, update.feedback, store, g, kept, e, x, D)


@helper
def fuses_signs(update, h, m):  # type: ignore[no-untyped-def]
    """Whether `produce_signs` can do it."""
    return update.kind == SGD and update.feedback and len(m) > 0 and h[NESTEROV] == 0


@helper
def produce_signs(update, h, g, m, at, e, x, half, spread):  # type: ignore[no-untyped-def]
    """For a whole chunk: `produce`, the first fold of `codes.sum_abs`, and the signs of `codes.pack`.

    In one loop, so that arithmetic hides behind the three streams that are read; the same bits.
    """
    _sgd_signs(h, update.step_ahead, g, m[0, at : at + g.size], e, x, half, spread)


@helper
def _sgd(h, s, feedback, store, g, m, e, x, D):  # type: ignore[no-untyped-def]
    """m' = mu m + gain g, u = m' or g + mu m' (Nesterov). `m`: [n], or empty."""
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
