"""Buckets of gradients, for frameworks whose backward has none of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .weights import cut

BUCKET_BYTES = 25 << 20  # of gradients that travel in one message, as DDP has it


def group(parameters: Sequence[Tensor]) -> list[list[int]]:
    """The parameters' numbers in buckets of one dtype and BUCKET_BYTES, or of one larger tensor.

    A function of the parameters' sizes and dtypes alone, so the same on every rank.
    """
    buckets: list[list[int]] = []
    latest: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, p in enumerate(parameters):
        size = p.numel() * p.element_size()
        bucket, filled = latest.get(p.dtype, ([], 0))
        if not bucket or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(i)
        latest[p.dtype] = bucket, filled + size
    return buckets


@torch.no_grad()
def gather(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(flat, views): the gradients in one vector in the parameters' memory order, zeros where there is none.

    p.grad become the views, so that a bucket does not cost memory for the gradients a second time.
    """
    flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
    views = cut(flat, parameters)
    for p, view in zip(parameters, views, strict=True):
        if p.grad is None:
            view.zero_()
        elif p.grad.layout != torch.strided:
            raise TypeError(SPARSE)
        else:
            p.grad = view.copy_(p.grad)
    return flat, views


SPARSE = "sparse gradients cannot be compressed here; use dense ones (Embedding(sparse=False))"
