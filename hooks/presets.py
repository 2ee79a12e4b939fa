"""States with the settings of the papers' other methods. Use them with `saef_hook`, as any state.

All take the arguments of `saef.SAEFState`; what a method fixes cannot be given again.
"""

import torch
from torch import nn
from typing_extensions import Unpack

from saef import Compressor, MajorityVote, SAEFState, ScaledSign
from saef.step.arguments import Carried, Free, Scaled, WeightDecayMode


class Rest(Free, Scaled, Carried, total=False):
    """The arguments of SAEFState beside those in a preset's own signature, and those that it fixes."""


def ef(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    compressor: Compressor = ScaledSign(),  # noqa: B008 - frozen
    weight_decay_mode: WeightDecayMode = "coupled",
    **settings: Unpack[Rest],
) -> SAEFState:
    """Local error feedback, EF-SGD(M): SAEF Algorithm 1, lines 14-16. The gradient is taken at x."""
    return SAEFState(
        model,
        optimizer,
        compressor=compressor,
        step_ahead=0.0,
        weight_decay_mode=weight_decay_mode,
        **settings,
    )


def dist_ef_block_sgd(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    compressor: Compressor = ScaledSign(block="layer"),  # noqa: B008 - frozen
    **settings: Unpack[Rest],
) -> SAEFState:
    """dist-EF-blockSGD: dist-EF Algorithm 3, weight decay uncompressed (appendix A).

    Raises:
        ValueError: unless momentum is 0 in all groups.
    """
    if any(group.get("momentum") for group in optimizer.param_groups):
        raise ValueError("dist-EF-blockSGD has no momentum: use momentum=0, or the preset dist_ef_block_sgdm")
    return SAEFState(model, optimizer, compressor=compressor, step_ahead=0.0, weight_decay_mode="outer", **settings)


def dist_ef_block_sgdm(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    compressor: Compressor = ScaledSign(block="layer"),  # noqa: B008 - frozen
    **settings: Unpack[Rest],
) -> SAEFState:
    """dist-EF-blockSGDM: dist-EF Algorithm 4 (Nesterov), weight decay with a momentum of its own (appendix A).

    Raises:
        ValueError: unless all groups have momentum and nesterov=True.
    """
    if not all(group.get("momentum") and group["nesterov"] for group in optimizer.param_groups):
        raise ValueError("dist-EF-blockSGDM is Nesterov's momentum: use SGD(..., momentum=0.9, nesterov=True)")
    return SAEFState(model, optimizer, compressor=compressor, step_ahead=0.0, weight_decay_mode="outer", **settings)


def signsgd_majority_vote(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    compressor: Compressor = MajorityVote(),  # noqa: B008 - frozen
    **settings: Unpack[Rest],
) -> SAEFState:
    """signSGD with majority vote: x <- x - eta (vote of sign(g_k) + lambda x). A baseline: no error feedback.

    Raises:
        ValueError: unless momentum is 0 in all groups.
    """
    if any(group.get("momentum") for group in optimizer.param_groups):
        raise ValueError("signSGD has no momentum: use momentum=0, or the preset signum_majority_vote")
    return SAEFState(model, optimizer, compressor=compressor, step_ahead=0.0, weight_decay_mode="outer", **settings)


def signum_majority_vote(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    compressor: Compressor = MajorityVote(),  # noqa: B008 - frozen
    **settings: Unpack[Rest],
) -> SAEFState:
    """Signum with majority vote: m = beta m + (1 - beta) g, the vote of sign(m_k); beta is the momentum.

    Raises:
        ValueError: unless all groups have momentum, without Nesterov.
    """
    if any(not group.get("momentum") or group["nesterov"] for group in optimizer.param_groups):
        raise ValueError("signum needs momentum (its beta) and nesterov=False: use SGD(..., momentum=0.9)")
    return SAEFState(model, optimizer, compressor=compressor, step_ahead=0.0, weight_decay_mode="outer", **settings)
