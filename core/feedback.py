"""SAEF Algorithm 1, worker side, as pure functions on tensors.

The letters are the paper's: x weights, e local error, m local momentum, g gradient, D what is
compressed, eta learning rate. Errors are in parameter units (they contain eta), so a changing
learning rate needs no rescaling. These functions fix the arithmetic, operation by operation: the
fused kernels repeat it and are compared with it bit by bit. Products and sums are rounded
separately (no fused multiply-add).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Hyper(NamedTuple):
    """One parameter group's settings for one step, as numbers of the state's dtype.

    Attributes:
        lr: eta.
        momentum: mu.
        gain: what g is multiplied by in the momentum: 1, or 1 - mu for signum.
        nesterov: whether u = g + mu m' instead of m'.
        weight_decay: lambda of the coupled decay; 0 when the decay is outer.
        factor: multiplies g: the clipping coefficient, negative to maximize.
    """

    lr: float
    momentum: float
    gain: float
    nesterov: bool
    weight_decay: float
    factor: float


def step_ahead(x: Tensor, e: Tensor, s: float) -> Tensor:
    """x_half = x - s e (Alg. 1, line 9). s = 1: SAEF; 0: EF; between: the partial step of SA-PEF."""
    return x - (e if s == 1.0 else e * s)


def local_update(h: Hyper, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
    """m' = mu m + g, and u = m' (or g + mu m' with Nesterov) (Alg. 1, line 10; dist-EF Alg. 4, 5-6).

    Args:
        h: the settings; g is first multiplied by `factor`, then lambda x_half is added.
        g, x_half: flat, same shape.
        m: same shape, or empty where there is no momentum; then m' is empty too and u = g.

    Returns:
        (m', u).
    """
    g = g * h.factor
    if h.weight_decay != 0.0:
        g = g + x_half * h.weight_decay
    if m.numel() == 0:
        return m, g
    m_new = m * h.momentum + g * h.gain
    return m_new, (g + m_new * h.momentum if h.nesterov else m_new)


def correct(h: Hyper, e: Tensor, u: Tensor, feedback: bool = True) -> Tensor:
    """D = e + eta u (Alg. 1, lines 11 and 12 together). Without feedback D = u."""
    return e + u * h.lr if feedback else u
