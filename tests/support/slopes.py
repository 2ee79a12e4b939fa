"""A problem whose gradients are given numbers, whatever x is."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.training import ADAMW, randn

SHAPES = [(5, 3), (1,), (0,), (33,), (), (2, 0, 3)]


class Slope(nn.Module):
    """f(x) = c . x: the gradient is c, whatever x is. With empty tensors, scalars and one-element tensors."""

    def __init__(self, dtype: torch.dtype, start: float = 1.0) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(7)
        self.p = nn.ParameterList([nn.Parameter((start * randn(gen, *s)).to(dtype)) for s in SHAPES])

    def forward(self, c: list[Tensor]) -> Tensor:
        return sum((p * v).sum() for p, v in zip(self.p, c, strict=True))  # type: ignore[return-value]


def slope(k: int, t: int, scale: float = 1.0) -> list[Tensor]:
    """Worker k's c in step t."""
    gen = torch.Generator().manual_seed(1000 * k + t)
    return [scale * randn(gen, *s) for s in SHAPES]


def setup(
    group: dist.ProcessGroup, dtype: torch.dtype, start: float, momentum: float, options: dict[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer, saef.SAEFState]:
    """`options` of the state, and "optimizer": the name of its class, with momentum if that is SGD."""
    model = DDP(Slope(dtype, start), process_group=group, bucket_cap_mb=0.0001)
    options = dict(options)
    kind = options.pop("optimizer", "SGD")
    of_rule = {"momentum": momentum} if kind == "SGD" else ADAMW
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **of_rule)
    state = saef.SAEFState(model, optimizer, **options)
    model.register_comm_hook(state, saef_hook)
    return model, optimizer, state
