"""AdamW and Adam on every worker, with a second moment that is the mean gradient's and not the worker's own.

    p   = m_k / (1 - b1^t)                                    momentum before this step, corrected; at t = 0 p = g_k
    m_k = b1 m_k + (1 - b1) g_k
    v_k = b2 v_k + (1 - b2) (g_k^2 / K + (1 - 1/K) g_k p)     noise-corrected; plain: b2 v_k + (1 - b2) g_k^2
    u_k = [m_k / (1 - b1^(t+1))] / (sqrt(max(v_k / (1 - b2^(t+1)), 0)) + eps),  for K > 1 clamped to [-1, 1]

Where noise dominates, E[g_k^2] is up to K times the second moment of mean_k g_k, and steps come out sqrt(K) too short.
p is older than the noise of g_k, so E[g_k p] is the square of the expectation alone, and v_k estimates what K workers
together see, from this worker's numbers. Of one worker all of it is torch.optim.AdamW. v_k of single coordinates may be
negative for a while. Ours: no published form is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from .rule import AnyHyper, Rule

LEAST_EPS = torch.finfo(torch.float32).tiny  # less would be 0 where the state is float32


class Hyper(NamedTuple):
    """One parameter group's settings in step t; the order of the fields is that of the kernels' columns.

    Attributes:
        lr: eta.
        beta1, gain: b1, and 1 - b1.
        beta2, own, cross: b2, and what g^2 and g m are multiplied by in v: 1 - b2 and 0, or noise-corrected
            (1 - b2) / K and (1 - b2) (1 - 1/K) / (1 - b1^t).
        correct1, correct2: 1 / (1 - b1^(t+1)), 1 / (1 - b2^(t+1)).
        eps: epsilon.
        bound: of |u|: 1, or infinity for one worker.
        weight_decay: lambda of the coupled decay (Adam), in the gradient at x_half; 0 for AdamW.
        decay_at_x: lambda of the decoupled decay (AdamW); no kernel reads it.
        factor: multiplies g: the clipping coefficient over the loss scale, negative to maximize.
    """

    lr: float
    beta1: float
    gain: float
    beta2: float
    own: float
    cross: float
    correct1: float
    correct2: float
    eps: float
    bound: float
    weight_decay: float
    decay_at_x: float
    factor: float


COLUMNS = len(Hyper._fields)
LR, BETA1, GAIN, BETA2, OWN, CROSS, CORRECT1, CORRECT2, EPS, BOUND, DECAY, AT_X, FACTOR = range(COLUMNS)


@final
@dataclass(frozen=True)
class AdamW(Rule):
    """torch.optim.AdamW, or Adam, whose decay is coupled.

    Args:
        noise_correction: v as above; else plain.
    """

    kind: ClassVar[int] = 1
    hyper: ClassVar[type[Any]] = Hyper
    names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counter: ClassVar[str | None] = "step"
    second: ClassVar[int | None] = 1

    noise_correction: bool = True

    @classmethod
    def reads(cls, optimizer: torch.optim.Optimizer) -> bool:
        step = inspect.unwrap(type(optimizer).step)  # torch wraps it for each class, for its profiler
        return any(
            isinstance(optimizer, kind) and step is inspect.unwrap(kind.step)
            for kind in (torch.optim.Adam, torch.optim.AdamW)
        )

    def read(self, optimizer: torch.optim.Optimizer, step: int, workers: int) -> list[AnyHyper]:
        """The groups' settings for step t among K workers.

        Raises:
            ValueError: on amsgrad, which would keep a maximum that no rank could make of its own numbers; betas
                outside [0, 1), an eps that is not positive, or a negative or non-finite setting.
        """
        found: list[AnyHyper] = []
        for i, group in enumerate(optimizer.param_groups):
            lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
            b1, b2 = (float(b) for b in group["betas"])
            if group["amsgrad"]:
                raise ValueError(
                    f"param group {i} has amsgrad=True: a maximum over steps of one worker's noisy v never comes down "
                    "again, and is not the mean gradient's. Use amsgrad=False"
                )
            if not (0.0 <= lr < float("inf") and 0.0 <= decay < float("inf") and 0.0 <= b1 < 1.0 and 0.0 <= b2 < 1.0):
                raise ValueError(
                    f"param group {i} has lr={lr}, betas=({b1}, {b2}), weight_decay={decay}; expected finite lr >= 0, "
                    "0 <= beta < 1, finite weight_decay >= 0"
                )
            if not LEAST_EPS <= eps < float("inf"):
                raise ValueError(
                    f"param group {i} has eps={eps}: a coordinate without a gradient would be 0 / 0. Use eps=1e-8 "
                    f"(at least {LEAST_EPS:.2g}, which float32 still holds)"
                )
            noise = workers if self.noise_correction else 1
            older = (1.0 - 1.0 / noise) / (1.0 - b1**step) if step else 0.0
            at_x = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
            found.append(
                Hyper(
                    lr=lr,
                    beta1=b1,
                    gain=1.0 - b1,
                    beta2=b2,
                    own=(1.0 - b2) / (noise if step else 1),  # t = 0: p = g
                    cross=(1.0 - b2) * older,
                    correct1=1.0 / (1.0 - b1 ** (step + 1)),
                    correct2=1.0 / (1.0 - b2 ** (step + 1)),
                    eps=eps,
                    bound=1.0 if workers > 1 else float("inf"),
                    weight_decay=0.0 if at_x else decay,
                    decay_at_x=decay if at_x else 0.0,
                    factor=-1.0 if group["maximize"] else 1.0,
                )
            )
        return found

    def vectors(self, hyper: Sequence[Any]) -> int:
        return 2

    @staticmethod
    def update(h: Hyper, g: Tensor, m: Tensor, x_half: Tensor) -> tuple[Tensor, Tensor]:
        g = g * h.factor
        if h.weight_decay != 0.0:
            g = g + x_half * h.weight_decay
        first = m[0] * h.beta1 + g * h.gain
        second = m[1] * h.beta2 + g * (g * h.own + m[0] * h.cross)
        v = second * h.correct2
        u = first * h.correct1 / (_root(torch.where(v < 0, 0.0, v)) + h.eps)
        u = torch.where(u > h.bound, h.bound, torch.where(u < -h.bound, -h.bound, u))  # not clamp: a NaN stays one
        u = u + (v - v)  # and where v overflows u is one, so that all ranks skip the step
        return torch.stack([first, second]), u

    def reads_x_half(self, hyper: Sequence[Any]) -> bool:
        return any(h.weight_decay for h in hyper)

    @staticmethod
    def saved(name: str, v: Tensor) -> Tensor:
        """v as it counts, not below 0: torch's AdamW takes the root of what it loads."""
        return v.clamp(min=0) if name == "exp_avg_sq" else v

    @property
    def decays_at_x(self) -> bool:
        return True

    def keeps_decay(self, groups: Sequence[Mapping[str, Any]], hyper: Sequence[Any]) -> bool:
        return False

    def decay(self, weight_decay: float, h: Hyper, x: Tensor, m: Tensor) -> None:
        """x <- (1 - eta lambda) x, as torch.optim.AdamW does it; Adam's decay is in the gradient already."""
        if h.decay_at_x != 0.0:
            x.mul_(1.0 - h.lr * h.decay_at_x)


def _root(v: Tensor) -> Tensor:
    """sqrt(v) rounded to nearest, as processors have it and kernels use it; torch's on CPU, by MKL, is not."""
    return torch.from_numpy(np.sqrt(v.numpy())) if v.device.type == "cpu" else v.sqrt()
