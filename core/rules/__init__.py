"""How a gradient becomes u: one file a rule, and which rule an optimizer has."""

from __future__ import annotations

import torch

from .rule import AnyHyper, Rule, correct, step_ahead
from .sgd import SGD

RULES: dict[int, type[Rule]] = {rule.kind: rule for rule in (SGD,)}  # by their kind

__all__ = ["RULES", "SGD", "AnyHyper", "Rule", "correct", "rule_for", "step_ahead"]


def rule_for(optimizer: torch.optim.Optimizer, *, outer: bool, signum: bool) -> Rule:
    """The rule with the arithmetic of the optimizer's own `step`.

    Args:
        outer: weight decay is applied outside the compressor.
        signum: there is no error feedback; momentum is an average.

    Raises:
        TypeError: if there is none.
    """
    if SGD.reads(optimizer):
        return SGD(outer, signum)
    raise TypeError(
        f"SAEFState needs torch.optim.SGD (momentum, nesterov, weight_decay, maximize as you like), got "
        f"{type(optimizer).__name__}; other update rules are not supported yet"
    )
