"""Whether x_half was written to where nothing else tells: through `.data`, or numpy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from ..wire import kernels

PARTS = 31  # a prime, so that with any number of micro-batches a step all parts get their turn at each of them


@final
class SpotCheck:
    """Fingerprints of one part of the parameters when a window opens and when it closes; of another part each time.

    Of all of them, at every window, they would cost more than the rest of what keeps x. A model whose forward writes to
    its weights does so every time: it is found within `PARTS` windows.

    Args:
        tensors: that are x_half in a window. Those with gaps in memory are left out, and so is all on devices without
            kernels of ours.

    Attributes:
        changed: [tensors] bool, whether they had changed in the windows since `found` was last asked.
        waits: whether `found` waits for a device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        self.waits = self._device.type != "cpu"
        known = kernels.has_fingerprints(self._device)
        self._sizes = [t.nbytes if known and kernels.is_dense(t) else 0 for t in tensors]
        ends = [*accumulate(self._sizes)]
        part_of = [PARTS * (end - 1) // max(1, ends[-1]) for end in ends]
        bounds = [sum(part < k for part in part_of) for k in range(PARTS + 1)]
        self._parts = [slice(lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False)]
        self._part, self._turn = slice(0, 0), 0
        self._places: Sequence[int] = []
        self._before: Tensor | None = None
        self.changed = torch.zeros(len(tensors), dtype=torch.bool, device=self._device)

    def opened(self, places: Sequence[int]) -> None:
        """places: where they lie."""
        self._part = self._parts[self._turn % PARTS]
        self._turn += 1
        self._places = places[self._part]
        self._before = self._prints() if self._places else None

    def _prints(self) -> Tensor:
        return kernels.fingerprints_at(self._places, self._sizes[self._part], self._device)

    def closed(self, places: Sequence[int]) -> None:
        """The same; one that lies elsewhere now may have no memory any more where it was."""
        if self._before is not None and places[self._part] == self._places:
            self.changed[self._part] |= self._prints() != self._before
        self._before = None

    def dropped(self) -> None:
        """What was written in this window counts; the next has its turn."""
        self._before = None
        self._turn -= 1

    def found(self) -> list[int]:
        """Numbers of those in `changed`."""
        numbers: list[int] = self.changed.nonzero().view(-1).tolist()
        if numbers:
            self.changed.zero_()
        return numbers
