"""Full step ahead: x_half <- x_half - s' e, by the server's error too.

The paper's x_half = x - s e_k leaves e out, so that with s = 1 the mean gradient is taken at x~ + e: that is the price
of double-way compression. Where all ranks serve (replicated), each has e and steps ahead by it, s' = s. Where each
serves its own blocks (sharded), it steps ahead on those alone by K times as much, s' = s K: the mean over the ranks is
the same, and nothing is sent. With s = 1 then mean_k x_half_k = x~. Ours; no published form is known.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..wire import kernels
from ..wire.codec import Block, lay_out
from ..wire.compressors import Identity
from ..wire.plan import Placement


@final
class ServerAhead:
    """The server's part of x_half on one rank.

    Args:
        placement: which blocks this rank serves.
        e: [served] the server error; the same tensor for ever.
        rate: s'.
    """

    def __init__(self, placement: Placement, e: Tensor, rate: float) -> None:
        self._e, self._rate = e.view(torch.uint8), torch.full((1,), rate, dtype=e.dtype, device=e.device)
        self._kernels = kernels.select(e.device)
        blocks, rows, counts = placement.blocks, [], []
        for mine, owners in zip(blocks.of_parameter, blocks.owner, strict=True):
            own = [b for b, owner in zip(mine, owners, strict=True) if owner == placement.rank]
            rows += [Block(Identity(), Identity(), 0, b.state, b.served, b.numel, 0) for b in own]
            counts.append(len(own))
        # The error as a message of dense values, in the order in which the blocks are served: its offsets are theirs.
        self._whole = lay_out(rows, e.element_size(), reply=False, served=False).table.to(e.device)
        self._parts = list(self._whole.split(counts))

    def step(self, half: Tensor, parameter: int | None = None) -> None:
        """half <- half - s' e, of all parameters, or of one. half: [d]."""
        table = self._whole if parameter is None else self._parts[parameter]
        if len(table):
            self._kernels.subtract(table, self._rate, self._e, half)
