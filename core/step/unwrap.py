"""What a state is for where it was given what a framework or torch.compile has put around it."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger("saef")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The DistributedDataParallel inside a module that trains nothing beside it (torch.compile, Fabric); else `model`.

    Its hooks are there whoever calls it, and the one that exchanges gradients is registered with it.
    """
    inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if len(inside) != 1 or inside[0] is model or _trained(inside[0]) != _trained(model):
        return model
    _say(model, inside[0])
    return inside[0]


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that does the step: Accelerate's and Lightning's have it as their attribute `optimizer`."""
    inner = innermost(optimizer)
    if inner is not optimizer:
        _say(optimizer, inner)
    return inner


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As `unwrap_optimizer`, in silence."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer) and inner is not optimizer:
        optimizer = inner
    return optimizer


def is_made_of(optimizer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> bool:
    """Whether it steps by `inner`: a wrapper's, or one that holds it and adds to its step (SAM, Lookahead)."""
    return innermost(optimizer) is inner or any(value is inner for value in vars(optimizer).values())


def _trained(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


def _say(outer: object, inner: object) -> None:
    logger.info("SAEFState is for the %s inside the %s it was given", type(inner).__name__, type(outer).__name__)
