"""How a gradient becomes u: one file a rule, and which rule an optimizer has."""

from __future__ import annotations

import torch

from .adamw import AdamW
from .difference import Difference
from .rule import AnyHyper, Rule, correct, step_ahead
from .sgd import SGD

RULES: dict[int, type[Rule]] = {rule.kind: rule for rule in (SGD, AdamW)}  # by their kind

__all__ = ["RULES", "SGD", "AdamW", "AnyHyper", "Difference", "Rule", "correct", "rule_for", "step_ahead"]


def rule_for(
    optimizer: torch.optim.Optimizer,
    *,
    outer: bool,
    signum: bool,
    noise_correction: bool = True,
    local_steps: int = 1,
) -> Rule:
    """The rule with the arithmetic of the optimizer's own `step`, or the difference form, which leaves that to it.

    Args:
        outer: weight decay is applied outside the compressor, with SGD's momentum.
        signum: there is no error feedback; momentum is an average.
        noise_correction: of AdamW's second moment.
        local_steps: H, steps of the optimizer between two exchanges. More than one take the difference form.

    Raises:
        ValueError: if the method is momentum SGD's alone.
    """
    name = type(optimizer).__name__
    if local_steps == 1 and SGD.reads(optimizer):
        return SGD(outer, signum)
    own = f"local_steps={local_steps}" if local_steps > 1 else f"torch.optim.{name}"
    if signum:
        raise ValueError(
            f"MajorityVote is of signSGD and signum: use torch.optim.SGD with local_steps=1 instead of {own}, or "
            "another compressor"
        )
    if outer:
        raise ValueError(
            'weight_decay_mode="outer" is for momentum SGD with local_steps=1 (dist-EF): torch.optim.AdamW decays at '
            "x by itself, uncompressed, torch.optim.Adam in the gradient, and with local steps every optimizer in its "
            "own way; leave weight_decay_mode out"
        )
    if local_steps == 1 and AdamW.reads(optimizer):
        return AdamW(noise_correction)
    return Difference(name, local_steps)
