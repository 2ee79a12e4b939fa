"""What the user's torch.optim.SGD says, read live: one `Hyper` per parameter group."""

from __future__ import annotations

import inspect

import torch

from .feedback import Hyper

DECAY_MODES = ("coupled", "outer")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError unless the optimizer's update is one that Algorithm 1 is stated for: SGD's own `step`."""
    step = inspect.unwrap(type(optimizer).step)  # torch wraps it for each class, for its profiler
    if not isinstance(optimizer, torch.optim.SGD) or step is not inspect.unwrap(torch.optim.SGD.step):
        raise TypeError(
            f"SAEFState needs torch.optim.SGD (momentum, nesterov, weight_decay, maximize as you like), got "
            f"{type(optimizer).__name__}; other update rules are not supported yet"
        )


def read_hyper(optimizer: torch.optim.Optimizer, *, outer: bool, signum: bool) -> list[Hyper]:
    """The groups' settings for the step at hand.

    Args:
        outer: weight decay is applied outside the compressor; the gradient gets none.
        signum: momentum is an average, m = mu m + (1 - mu) g, as signum has it.

    Raises:
        ValueError: on dampening, which would change the algorithm, or a negative or non-finite setting.
    """
    found = []
    for i, group in enumerate(optimizer.param_groups):
        lr, mu, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
        if group["dampening"] != 0:
            raise ValueError(
                f"param group {i} has dampening={group['dampening']}; Algorithm 1's momentum has none: "
                "set dampening=0 (and scale lr by 1 - dampening if you relied on it)"
            )
        if not (0.0 <= lr < float("inf") and 0.0 <= mu < 1.0 and 0.0 <= decay < float("inf")):
            raise ValueError(
                f"param group {i} has lr={lr}, momentum={mu}, weight_decay={decay}; expected finite lr >= 0, "
                "0 <= momentum < 1, finite weight_decay >= 0"
            )
        gain = 1.0 - mu if signum and mu else 1.0
        factor = -1.0 if group["maximize"] else 1.0
        found.append(Hyper(lr, mu, gain, bool(group["nesterov"]), 0.0 if outer else decay, factor))
    return found
