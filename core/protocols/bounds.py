"""MixML's bounds in terms of the mixing time: Lemma 1, Theorem 1 and Corollary 1."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .operators import SUM_TOLERANCE

LARGEST = sys.float_info.max


def lemma_1(events: int, t_mix: float, norm: float = 1.0, xi: float = 1.0) -> float:
    """MixML Lemma 1, a bound on || M_{t-1} ... M_s X - M_inf X ||: 2^-floor((t - s) / t_mix) (1 + xi) xi ||X||.

    It assumes that consensus is preserved (Assumption 1), t_mix from every start (Assumption 2), and that no product
    of operators has a norm above xi (Assumption 3): 1 for doubly stochastic operators, which are all of this package
    but those of the parameter server, with sqrt(n + 1), and of a Gossip that is something else.

    Args:
        events: t - s.
        t_mix: in events, at least 1.
        norm: ||X||.
        xi: at least 1: M_inf is a projection.
    """
    _check_mixing(t_mix, xi)
    _check_not_negative(events=events, norm=norm)
    return 2.0 ** -math.floor(events / t_mix) * (1.0 + xi) * xi * norm


def _spread(t_mix: float, smoothness: float, noise: float, gap: float, xi: float) -> float:
    """(1 + xi)^2 xi^2, which both bounds on SGD have, after a look at their constants."""
    _check_mixing(t_mix, xi)
    _check_positive(smoothness=smoothness, gap=gap)
    _check_not_negative(noise=noise)
    return (1.0 + xi) * xi * (1.0 + xi) * xi  # `**` would raise where this is infinite


def theorem_1(
    lrs: Sequence[float], t_mix: float, *, smoothness: float, noise: float, gap: float, xi: float = 1.0
) -> float:
    """MixML Theorem 1 for SGD: a bound on the mean of E||grad f(x_t)||^2 over T events with step sizes alpha_t.

    The mean has the weights alpha_t c_t with c_t = 1 - 16 (1 + xi)^2 xi^2 t_mix^2 L^2 alpha_t^2, eq. (9); so it is a
    bound on the smallest E||grad f(x_t)||^2 as well. With S_j = sum_t alpha_t^j it is

        (2 gap + sigma^2 L S_2 + 4 (1 + xi)^2 xi^2 t_mix sigma^2 L^2 S_3) / sum_t alpha_t c_t.

    It assumes Assumptions 1 to 3 (see `lemma_1`), that the local gradients are unbiased with a variance of at most
    sigma^2 (Assumption 5), that f is smooth with constant L, not necessarily convex, and step sizes that do not grow.

    Args:
        lrs: alpha_0, ..., alpha_{T-1}, one an event: a round of n workers takes n of them.
        t_mix: in events, at least 1.
        smoothness: L.
        noise: sigma.
        gap: f(x_0) - f(x_T), or any bound on it, such as f(x_0) - min f.
        xi: at least 1.

    Raises:
        ValueError: if an alpha_t is so large that c_t is not positive, when the theorem says nothing, or they grow; or
            if a constant is not finite, or out of its range.
    """
    spread = _spread(t_mix, smoothness, noise, gap, xi)
    alpha = np.asarray(lrs, dtype=np.float64)
    if alpha.ndim != 1 or not len(alpha) or not (alpha > 0).all() or (np.diff(alpha) > 0).any():
        raise ValueError("lrs must be positive and must not grow (Lemma 2)")
    c = 1.0 - 16.0 * spread * (t_mix * smoothness * alpha) ** 2
    if c.min() <= 0:
        largest = 1.0 / (4.0 * math.sqrt(spread) * t_mix * smoothness)
        bound = f"1 / (4 (1 + xi) xi t_mix L) = {largest:.3g}"
        raise ValueError(f"Theorem 1 needs step sizes below {bound}, got {alpha.max():.3g}")
    noisy = noise * noise * smoothness * (alpha**2).sum()
    apart = 4.0 * spread * t_mix * noise * noise * smoothness * smoothness * (alpha**3).sum()
    return float((2.0 * gap + noisy + apart) / (alpha * c).sum())


def corollary_1(
    events: int, t_mix: float, *, smoothness: float, noise: float, gap: float, xi: float = 1.0
) -> tuple[float, float]:
    """MixML Corollary 1: the step size, and a bound on the mean of E||grad f(x_t)||^2 over T events with it, eq. (10).

        alpha = sqrt(2 gap) / (sigma sqrt(L T) + t_mix)
        4 sigma sqrt(2 gap L) / sqrt(T)  +  2 sqrt(2 gap) t_mix / T  +  16 (1 + xi)^2 xi^2 t_mix gap L / T

    so communication does not enter the leading term. Assumptions and arguments as `theorem_1`.

    Raises:
        ValueError: if T < 64 gap xi^2 (1 + xi)^2 t_mix^2 L / sigma^2, naming the least T; and as `theorem_1`.
    """
    spread = _spread(t_mix, smoothness, noise, gap, xi)
    _check_positive(events=events, noise=noise)
    least = 64.0 * gap * spread * smoothness * (t_mix / noise) * (t_mix / noise)
    if events < least:
        raise ValueError(f"Corollary 1 needs T of at least {np.ceil(least):.0f} events here, got {events}")
    root = math.sqrt(2.0 * gap)
    alpha = root / (noise * math.sqrt(smoothness * events) + t_mix)
    leading = 4.0 * noise * math.sqrt(smoothness / events) * root
    return alpha, leading + (2.0 * root + 16.0 * spread * gap * smoothness) * t_mix / events


def _check_mixing(t_mix: float, xi: float) -> None:
    _check_positive(t_mix=t_mix, xi=xi)
    if t_mix < 1:
        raise ValueError(f"t_mix must be at least 1, a single event, got {t_mix}")
    if xi < 1.0 - SUM_TOLERANCE:  # a measured norm is rounded
        raise ValueError(f"xi must be at least 1, as the norm of M_inf, a projection, is, got {xi}")


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not 0 < value <= LARGEST:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_not_negative(**values: Any) -> None:
    for name, value in values.items():
        if not 0 <= value <= LARGEST:
            raise ValueError(f"{name} must not be negative, and must be finite, got {value}")
