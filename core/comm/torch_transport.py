"""The transport over a torch.distributed process group, and gloo groups of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from .transport import Ordered, Purpose


@final
class TorchTransport(Ordered):
    """A `Transport` over a torch.distributed process group.

    On CPU it opens a gloo group of its own with the same ranks: DDP and the user issue collectives of
    their own from other threads, and two threads on one group would mix up the order.

    Args:
        group: process group; None for the default one.
        device: of the tensors that will travel.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() before creating the state")
        group = group if group is not None else dist.distributed_c10d._get_default_group()
        rank, cpu = dist.get_rank(group), device.type == "cpu"
        if rank < 0:
            raise ValueError("this rank is not a member of process_group; create the state on its members only")
        super().__init__(rank, dist.get_world_size(group), device, thread=cpu)
        self.group: Any = _private_gloo(group) if cpu else group  # a gloo backend has the same methods
        self._nccl = not cpu and group._get_backend(device).name() == "nccl"

    def _all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Tensor:
        if len(set(sizes)) > 1:
            return self._gather_unequal(message, sizes)
        out = message.new_empty(sum(sizes))
        self.group._allgather_base(out, message).wait()
        return out

    def _gather_unequal(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        """gloo and NCCL gather equal parts only; an all-to-all of copies sends the same bytes."""
        out, copies = message.new_empty(sum(sizes)), message.repeat(self.size)
        self.group.alltoall_base(out, copies, list(sizes), [message.numel()] * self.size).wait()
        return out

    def _all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose) -> Tensor:
        out = message.new_empty(self.size * received)
        self.group.alltoall_base(out, message, [received] * self.size, list(sizes)).wait()
        return out

    def _sum(self, v: Tensor, purpose: Purpose) -> None:
        self.group.allreduce([v]).wait()

    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]:
        if self._nccl:
            received = [torch.empty_like(v) for _ in sources]
            peer = partial(dist.get_global_rank, self.group)
            batch = [dist.P2POp(dist.irecv, t, peer(r), self.group) for r, t in zip(sources, received, strict=True)]
            batch += [dist.P2POp(dist.isend, v, peer(r), self.group) for r in to]
            works = dist.batch_isend_irecv(batch) if batch else []
        else:  # gloo sends to single ranks from the host only
            host = v.cpu()
            received = [torch.empty_like(host) for _ in sources]
            works = [self.group.recv([out], r, 0) for r, out in zip(sources, received, strict=True)]
            works += [self.group.send([host], r, 0) for r in to]
        for work in works:
            work.wait()
        return [out.to(v.device) for out in received]


def _private_gloo(group: dist.ProcessGroup) -> Any:
    """A gloo group of the same ranks that nobody else uses. Collective over `group`."""
    return gloo(private_store(group), dist.get_rank(group), dist.get_world_size(group), group)


def private_store(group: dist.ProcessGroup) -> Store:
    """A key-value store for these ranks alone, in which new groups find their members. Collective over `group`.

    Not `dist.new_group`: it needs all ranks of the job to call it or, with use_local_synchronization, that
    its members have created equally many groups before; both can hang. Rank 0 draws the name instead.
    """
    generator = torch.Generator().manual_seed(_seed())
    token = torch.randint(2**62, (1,), dtype=torch.int64, generator=generator, device="cpu")
    dist.broadcast(token, dist.get_global_rank(group, 0), group=group)
    return PrefixStore(f"saef-{token.item()}", _get_default_store())


def gloo(store: Store, rank: int, size: int, like: dist.ProcessGroup) -> Any:
    """A gloo group of `size` ranks that meet in `store`, with the timeout of `like`."""
    timeout = like._get_backend(torch.device("cpu")).options._timeout
    return dist.distributed_c10d.ProcessGroupGloo(store, rank, size, timeout)


def _seed() -> int:
    return int.from_bytes(os.urandom(7), "little")  # the user's random state stays as it is
