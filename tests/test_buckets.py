"""Buckets for frameworks without any: the same on all ranks, one dtype each, gradients as they were."""

import pytest
import torch
from torch import nn

from saef import buckets


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    half = nn.Linear(3, 2).to(torch.bfloat16)
    gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
    return [*conv.parameters(), *half.parameters(), gaps, nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0))]


def test_groups_have_one_dtype_and_at_most_bucket_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters()  # 48, 4 float32; 6, 2 bfloat16; 12, 1, 0 float32
    assert buckets.group(ps) == [[0, 1, 4, 5, 6], [2, 3]]
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 16)
    assert buckets.group(ps) == [[0], [1, 4], [2, 3], [5, 6]]
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)
    assert buckets.group(ps) == [[i] for i in range(7)]


def test_gradients_become_views_in_memory_order_and_keep_their_values() -> None:
    for bucket in buckets.group(parameters()):
        mine = [parameters()[i] for i in bucket]
        for p in mine[1:]:  # the first has none
            p.grad = torch.randn(p.shape).to(p.dtype)
        before = [None if p.grad is None else p.grad.clone() for p in mine]
        flat, views = buckets.gather(mine)
        assert flat.dtype == mine[0].dtype
        assert flat.numel() == sum(p.numel() for p in mine)
        assert mine[0].grad is None
        assert not views[0].any()
        for p, view, value in zip(mine[1:], views[1:], before[1:], strict=True):
            assert value is not None
            assert p.grad is view
            assert torch.equal(view, value)
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        at = 0
        for p, view in zip(mine, views, strict=True):
            assert view.storage_offset() == at
            if p.is_contiguous(memory_format=torch.channels_last) and p.dim() == 4:
                assert view.stride() == p.stride()
            at += p.numel()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"Embedding\(sparse=False\)"):
        buckets.gather([embedding.weight])
