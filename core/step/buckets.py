"""Buckets of gradients, for frameworks whose backward has none of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from .weights import cut, held

BUCKET_BYTES = 25 << 20  # of gradients that travel in one message, as DDP has it


@final
class Buckets:
    """Has buckets sent in one order on every rank: each as soon as it and all before it are complete.

    Args:
        parameters: in the order of the flat state.
        send: called with the numbers of a bucket's parameters, and whether it is the last of the backward.
    """

    def __init__(self, parameters: Sequence[Tensor], send: Callable[[list[int], bool], None]) -> None:
        self._buckets, self._send = group(parameters), send
        self._place = {i: number for number, bucket in enumerate(self._buckets) for i in bucket}
        self.restart()

    def restart(self) -> None:
        """Forget what was ready."""
        self._missing = [{*bucket} for bucket in self._buckets]
        self._next = 0

    def ready(self, parameter: int) -> None:
        """A parameter's gradient is what shall be sent."""
        self._missing[self._place[parameter]].discard(parameter)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send_next()

    def finish(self) -> None:
        """The backward has ended: send all that is left, ready or not."""
        try:
            while self._next < len(self._buckets):
                self._send_next()
        finally:
            self.restart()

    def _send_next(self) -> None:
        self._send(self._buckets[self._next], self._next + 1 == len(self._buckets))
        self._next += 1


def group(parameters: Sequence[Tensor]) -> list[list[int]]:
    """The parameters' numbers in buckets of one dtype and BUCKET_BYTES, or of one larger tensor.

    The last parameters first, as a backward has them. A function of the parameters' sizes and dtypes alone, so
    the same on every rank.
    """
    buckets: list[list[int]] = []
    latest: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, p in reversed([*enumerate(map(held, parameters))]):
        size = p.numel() * p.element_size()
        bucket, filled = latest.get(p.dtype, ([], 0))
        if not bucket or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(i)
        latest[p.dtype] = bucket, filled + size
    return buckets


@torch.no_grad()
def gather_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(flat, views): a vector of the gradients in the parameters' memory order, zeros where there is none."""
    mine = [*map(held, parameters)]
    flat = mine[0].new_empty(sum(p.numel() for p in mine))
    views = cut(flat, mine)
    for p, view in zip(parameters, views, strict=True):
        if p.grad is None:
            view.zero_()
        elif p.grad.layout != torch.strided:
            raise TypeError(SPARSE)
        else:
            view.copy_(held(p.grad))
    return flat, views


def flatten_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same, and p.grad become the views, so that a bucket does not cost memory for the gradients a second time."""
    flat, views = gather_gradients(parameters)
    for p, view in zip(parameters, views, strict=True):
        if p.grad is None:
            continue
        if held(p.grad) is p.grad:
            p.grad = view.data  # with a version counter of its own
        else:
            p.grad._local_tensor = view.data  # type: ignore[attr-defined]
    return flat, views


SPARSE = "sparse gradients cannot be compressed here; use dense ones (Embedding(sparse=False))"
