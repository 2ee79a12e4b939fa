"""Buckets for frameworks without any: the same on all ranks, one dtype each, gradients as they were."""

import pytest
import torch
from torch import nn

from saef.step import buckets


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    half = nn.Linear(3, 2).to(torch.bfloat16)
    gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
    return [*conv.parameters(), *half.parameters(), gaps, nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0))]


def test_groups_have_one_dtype_and_at_most_bucket_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters()  # 48, 4 float32; 6, 2 bfloat16; 12, 1, 0 float32
    assert buckets.group(ps) == [[6, 5, 4, 1, 0], [3, 2]]
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 16)
    assert buckets.group(ps) == [[6, 5, 4], [3, 2], [1], [0]]
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)
    assert buckets.group(ps) == [[i] for i in range(6, -1, -1)]


def test_gradients_become_views_in_memory_order_and_keep_their_values() -> None:
    for bucket in buckets.group(parameters()):
        ps = parameters()
        mine = [ps[i] for i in bucket]
        for p in mine[1:]:  # the first has none
            p.grad = torch.randn(p.shape).to(p.dtype)
        before = [None if p.grad is None else p.grad.clone() for p in mine]
        flat, views = buckets.flatten_gradients(mine)
        assert flat.dtype == mine[0].dtype
        assert flat.numel() == sum(p.numel() for p in mine)
        assert mine[0].grad is None
        assert not views[0].any()
        for p, view, value in zip(mine[1:], views[1:], before[1:], strict=True):
            assert value is not None
            assert p.grad is not None
            assert (p.grad.data_ptr(), p.grad.stride(), p.grad.shape) == (view.data_ptr(), view.stride(), view.shape)
            assert torch.equal(p.grad, value)
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        grads = [p.grad for p in mine if p.grad is not None]
        versions = [g._version for g in grads]
        for g in grads:
            g.zero_()  # shows on this gradient only
        assert [g._version - v for g, v in zip(grads, versions, strict=True)] == [1] * len(grads)
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
        buckets.flatten_gradients([embedding.weight])


class Sent(list[tuple[list[int], bool]]):
    """Records what `Buckets` sends."""

    def __call__(self, bucket: list[int], last: bool) -> None:
        self.append((bucket, last))


def test_buckets_go_in_one_order_whatever_is_ready_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 16)
    order = [([6, 5, 4], False), ([3, 2], False), ([1], False), ([0], True)]
    sent = Sent()
    bunch = buckets.Buckets(parameters(), sent)
    for _ in range(2):  # two backwards
        sent.clear()
        for i in (0, 1, 2, 6, 5, 3):
            bunch.ready(i)
        assert not sent
        bunch.ready(4)
        assert sent == order
        bunch.finish()
        assert sent == order
    sent.clear()
    for i in (4, 2, 5, 6):  # 3 is never ready
        bunch.ready(i)
    assert sent == order[:1]
    bunch.finish()
    assert sent == order
    sent.clear()
    bunch.ready(5)
    bunch.restart()
    for i in (4, 6):
        bunch.ready(i)
    assert not sent


def test_a_failed_sending_leaves_nothing_half_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 16)
    sent: list[list[int]] = []

    def send(bucket: list[int], last: bool) -> None:
        if len(sent) == 2:
            raise RuntimeError("no")
        sent.append(bucket)

    bunch = buckets.Buckets(parameters(), send)
    with pytest.raises(RuntimeError, match="no"):
        bunch.finish()
    sent.clear()
    with pytest.raises(RuntimeError, match="no"):
        bunch.finish()
    assert sent == [[6, 5, 4], [3, 2]]  # from the first again
