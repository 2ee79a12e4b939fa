"""How a gradient becomes u: one file a rule, and which rule an optimizer has."""

from __future__ import annotations

import torch

from .adamw import AdamW
from .rule import AnyHyper, Rule, correct, step_ahead
from .sgd import SGD

RULES: dict[int, type[Rule]] = {rule.kind: rule for rule in (SGD, AdamW)}  # by their kind

__all__ = ["RULES", "SGD", "AdamW", "AnyHyper", "Rule", "correct", "rule_for", "step_ahead"]


def rule_for(optimizer: torch.optim.Optimizer, *, outer: bool, signum: bool, noise_correction: bool = True) -> Rule:
    """The rule with the arithmetic of the optimizer's own `step`.

    Args:
        outer: weight decay is applied outside the compressor, with SGD's momentum.
        signum: there is no error feedback; momentum is an average.
        noise_correction: of AdamW's second moment.

    Raises:
        TypeError: if there is none.
        ValueError: if the method is momentum SGD's alone.
    """
    if SGD.reads(optimizer):
        return SGD(outer, signum)
    if AdamW.reads(optimizer):
        if signum:
            raise ValueError("MajorityVote is of signSGD and signum: use torch.optim.SGD, or another compressor")
        if outer:
            raise ValueError(
                'weight_decay_mode="outer" is dist-EF\'s, for momentum SGD: torch.optim.AdamW decays at x by itself, '
                "uncompressed, and torch.optim.Adam in the gradient; leave weight_decay_mode out"
            )
        return AdamW(noise_correction)
    raise TypeError(
        f"SAEFState needs torch.optim.SGD, AdamW or Adam, whose step it knows, got {type(optimizer).__name__}"
        f"{_own_step(optimizer)}; other update rules are not supported yet"
    )


def _own_step(optimizer: torch.optim.Optimizer) -> str:
    """What to add if it derives from a known one."""
    known = [k.__name__ for k in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam) if isinstance(optimizer, k)]
    return f", which derives from {known[0]} but has a step of its own" if known else ""
