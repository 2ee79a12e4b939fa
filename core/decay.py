"""Weight decay outside the compressor (dist-EF appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .feedback import Hyper
from .weights import Weights


class OuterDecay:
    """x <- x - eta lambda x, uncompressed, by everybody; with momentum a momentum of its own.

        m~ = mu m~ + lambda x;  x <- x - eta (m~, or lambda x + mu m~ with Nesterov)

    Attributes:
        m: m~, flat, of the state's dtype; the same on every rank. Empty until a group has momentum and decay.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.m = weights.flat.new_empty(0)

    def prepare(self, groups: Sequence[dict[str, Any]], hyper: Sequence[Hyper]) -> None:
        """Make room for m~ if it is needed."""
        if self.m.numel() == 0 and any(h.momentum and g["weight_decay"] for h, g in zip(hyper, groups, strict=True)):
            self.m = torch.zeros_like(self._weights.flat)

    def apply(self, groups: Sequence[dict[str, Any]], hyper: Sequence[Hyper]) -> None:
        """One step, before x moves by R."""
        w = self._weights
        for x, at, i in zip(w.parts(), w.offsets, w.groups, strict=True):
            u = x * groups[i]["weight_decay"]
            if self.m.numel():
                m = self.m[at : at + x.numel()]
                m.mul_(hyper[i].momentum).add_(u)
                u = u + m * hyper[i].momentum if hyper[i].nesterov else m
            x.sub_(u * hyper[i].lr)
