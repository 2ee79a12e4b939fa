"""The parameters and the kept x: the only place that writes to the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import feedback


class Weights:
    """x, flat, beside the parameters that are x between steps and x_half during one.

    x_half is derived from x and never the other way round: restoring x as x_half + e would round, and
    replicas would drift apart. For bf16 parameters x is their float32 master.

    Args:
        model: its trainable parameters, shared ones once, in the order of `named_parameters()`.
        optimizer: every trainable parameter must be in exactly one of its groups.

    Attributes:
        names, parameters, groups: of each trainable parameter: name, tensor, index of its param group.
        offsets: where each begins in a flat vector. Entries lie there in the parameter's memory order.
        dtype: float64 for a float64 model, else float32: of x, errors, momentum and scalars on the wire.
        x: [d], the kept x.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.groups = _groups(self.names, self.parameters, optimizer)
        self.dtype = _master_dtype(self.names, self.parameters)
        self.numels = [p.numel() for p in self.parameters]
        self.offsets = [sum(self.numels[:i]) for i in range(len(self.numels))]
        self.device = self.parameters[0].device
        self.x = torch.empty(sum(self.numels), dtype=self.dtype, device=self.device)
        self._kept = self.views(self.x)
        with torch.no_grad():
            for p, kept in zip(self.parameters, self._kept, strict=True):
                kept.copy_(p)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat vector, each in its parameter's shape and strides."""
        views = []
        for p, at, n in zip(self.parameters, self.offsets, self.numels, strict=True):
            part = flat[at : at + n]
            dense = torch.empty_like(p, device="meta").stride() == p.stride()  # no gaps, no overlaps
            views.append(part.view(p.shape) if not dense else part.as_strided(p.shape, p.stride()))
        return views

    @torch.no_grad()
    def keep(self) -> None:
        """x <- parameters: whatever was done to them since the last step (loaded, clamped) counts."""
        for p, kept in zip(self.parameters, self._kept, strict=True):
            if p.dtype == self.dtype:
                kept.copy_(p)
            else:  # a bf16 parameter is x rounded: only where it was changed does it replace the master
                kept.copy_(torch.where(kept.to(p.dtype) == p, kept, p.to(self.dtype)))

    @torch.no_grad()
    def step_ahead(self, errors: Sequence[Tensor], s: float) -> None:
        """parameters <- x_half = x - s e (Alg. 1, line 9). `errors`: views of e."""
        for p, x, e in zip(self.parameters, self._kept, errors, strict=True):
            if s == 1.0 and p.dtype == self.dtype:
                torch.sub(x, e, out=p.detach())  # as below, without a temporary
            else:
                p.copy_(feedback.step_ahead(x, e, s))

    @torch.no_grad()
    def restore(self) -> None:
        """parameters <- x."""
        for p, kept in zip(self.parameters, self._kept, strict=True):
            p.copy_(kept)


def _groups(names: list[str], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> list[int]:
    """Index of each parameter's group."""
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known = {id(p) for p in parameters}
    missing = [name for name, p in zip(names, parameters, strict=True) if id(p) not in group_of]
    if missing:
        raise ValueError(
            f"trainable parameters {missing[:5]} are not in the optimizer: their gradients would be exchanged and "
            "never applied; add them, or set requires_grad=False before wrapping the model"
        )
    foreign = [
        tuple(p.shape)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and id(p) not in known
    ]
    if foreign:
        raise ValueError(
            f"the optimizer has trainable parameters of shapes {foreign[:5]} that are not in the model: nothing would "
            "exchange their gradients; give them an optimizer of their own"
        )
    return [group_of[id(p)] for p in parameters]


def _master_dtype(names: list[str], parameters: list[Tensor]) -> torch.dtype:
    dtypes = {p.dtype for p in parameters}
    if torch.float16 in dtypes:
        raise TypeError("float16 parameters need loss scaling, which is not supported; use bfloat16 or float32")
    if not dtypes <= {torch.float32, torch.float64, torch.bfloat16} or (torch.float64 in dtypes and len(dtypes) > 1):
        raise TypeError(
            f"parameters must be float32 and bfloat16, or all float64, got {sorted(map(str, dtypes))}: convert the "
            "model"
        )
    if len({p.device for p in parameters}) > 1 or any(p.is_sparse for p in parameters):
        found = {name: str(p.device) for name, p in zip(names, parameters, strict=True)}
        raise ValueError(f"all parameters must be dense and on one device, got {found}")
    return torch.float64 if torch.float64 in dtypes else torch.float32
