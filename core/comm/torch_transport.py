"""The transport over a torch.distributed process group, and gloo groups of its own."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store, _get_process_group_store

from .meeting import Meetings, NotTogether
from .transport import Ordered, Purpose, _OrderedWorker, end_all

RING_BYTES = 1 << 20  # from so many on, in all, gloo's ring is faster than all ranks sending to all
LONGEST_LOOK_S = 60.0  # between two looks at where the others are
TRAINING = ("phase1", "phase2", "averaging")  # what a step's bytes are counted as
END_TAG = 0x5AEE  # of a message that nobody sends


@final
class TorchTransport(Ordered):
    """A `Transport` over a torch.distributed process group.

    On CPU it opens a gloo group of its own with the same ranks, and one for the replies: DDP and the user issue
    collectives of their own from other threads, and two threads on one group would mix up the order.

    Args:
        group: process group; None for the default one.
        device: of the tensors that will travel.
        what: who makes it, for the error if not all ranks do.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, what: str = "SAEFState()") -> None:
        group = checked(group)
        rank, cpu = dist.get_rank(group), device.type == "cpu"
        super().__init__(rank, dist.get_world_size(group), device, thread=cpu)
        name, self._timeout = private_name(group, device, what), timeout_of(group, device)
        store = PrefixStore(name, _get_default_store())
        self._private = gloo(store, rank, self.size, self._timeout) if cpu else None
        self._store, self.pipelines = store, cpu and self.size > 1
        self._replies: TorchTransport | None = None  # made when the first is sent
        self.group: Any = self._private or group  # a gloo backend has the same methods
        self._nccl = not cpu and group._get_backend(device).name() == "nccl"
        meetings = PrefixStore(name, _beside_default_store()) if self.size > 1 else store
        self._meetings = _meetings(meetings, group, device, self._private)
        self._creations = _meetings(_get_process_group_store(group), group, device, self._private)
        self._neighbours: Purpose | None = None  # for what the thread is in a receive from single ranks

    @property
    def replies(self) -> TorchTransport:
        if not self.pipelines:
            return self
        self._replies = self._replies or self._beside()
        return self._replies

    def _beside(self) -> TorchTransport:
        """The same but for a group and a thread of its own. Collective, on the thread of this one."""
        other = copy.copy(self)
        other._private = other.group = gloo(PrefixStore("replies", self._store), self.rank, self.size, self._timeout)
        other._worker = _OrderedWorker(self._on_side, self._worker)
        self.after_failure(partial(end_all, [weakref.ref(self)]))
        return other

    def _await_replies(self) -> None:
        if self._replies is not None:
            self._replies.call(lambda: None)

    def _meet(self, what: str) -> None:
        self._meetings.meet(what, self._place)

    def _look_beside(self) -> None:
        if self._neighbours is not None:
            with suppress(NotTogether):  # the receive that it has ended raises its own
                self._look(self._neighbours, self._meetings)

    def _wait(self, work: Any, purpose: Purpose, together: bool = True) -> None:
        """For the end of a collective. Where that takes long, and if it fails, look whether a rank is elsewhere.

        Args:
            together: whether all ranks are in it; a wait for a single one cannot be taken up again.
        """
        pause = min(self.look_s, self._timeout.total_seconds() / 4)
        while self._private is not None and together and not _ended(work, pause):
            self._look(purpose, self._meetings)
            pause = min(2 * pause, LONGEST_LOOK_S)
        try:
            work.wait()
        except RuntimeError:
            self._look(purpose, self._meetings, self._creations)
            raise

    def _look(self, purpose: Purpose, *meetings: Meetings) -> None:
        """Raise `NotTogether` if some rank cannot come to the collective that this one is in."""
        what = "a training step" if purpose in TRAINING else f"an exchange ({purpose})"
        try:
            for place in meetings:
                place.check(what, self._place)
        except NotTogether:
            self._end_pending()
            raise
        except RuntimeError:
            return  # the store is gone: its rank has died, or ended

    def end(self) -> None:
        self._end_pending()
        if self._replies is not None:
            self._replies._end_pending()

    def _end_pending(self) -> None:
        """What is pending in the group fails now, instead of after its timeout, for which the process's end would wait.

        gloo has no other way: a receive that times out closes all connections.
        """
        if self._private is None:
            return
        for peer in (r for r in range(self.size) if r != self.rank):
            with suppress(RuntimeError):  # its connection may be closed already
                nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
                self._private.recv([nothing], peer, END_TAG).wait(timedelta(milliseconds=1))

    def _begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]:
        out = message.new_empty(sum(sizes))
        short = self._private is not None and out.numel() < RING_BYTES  # gloo's ring would take K - 1 latencies
        if len(set(sizes)) == 1 and not short:
            return self._begun(self.group._allgather_base(out, message), out, purpose)
        copies = message.repeat(self.size)  # the same bytes, all at once; and parts may be unequal
        work = self.group.alltoall_base(out, copies, list(sizes), [message.numel()] * self.size)
        return self._begun(work, out, purpose)

    def _begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]:
        out = message.new_empty(self.size * received)
        return self._begun(self.group.alltoall_base(out, message, [received] * self.size, list(sizes)), out, purpose)

    def _begun(self, work: Any, out: Tensor, purpose: Purpose) -> Callable[[], Tensor]:
        def end() -> Tensor:
            self._wait(work, purpose)
            return out

        return end

    def _sum(self, v: Tensor, purpose: Purpose) -> None:
        self._wait(self.group.allreduce([v]), purpose)

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
        self._neighbours = purpose
        for work in works:
            self._wait(work, purpose, together=False)
        self._neighbours = None
        return [out.to(v.device) for out in received]


def _ended(work: Any, seconds: float) -> bool:
    """Whether a collective has come to its end, one way or another, after at most so long."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        return bool(work.is_completed())
    return True


def checked(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group that was given, None for the default one.

    Raises:
        RuntimeError: if there is no default group yet.
        TypeError: if it is none.
        ValueError: if this rank is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "call torch.distributed.init_process_group() before creating the state. Frameworks that call it by "
            "themselves have adapters: saef.integrations.lightning, transformers, accelerate"
        )
    if group is None:
        return dist.distributed_c10d._get_default_group()
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER  # what new_group() gives the others
    if not isinstance(group, dist.ProcessGroup) and group is not outside:
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, as new_group() makes one, or None for all ranks, "
            f"got {group!r}"
        )
    if group is outside or dist.get_rank(group) < 0:
        raise ValueError("this rank is not a member of process_group; create the state on its members only")
    return group


def private_name(group: dist.ProcessGroup, device: torch.device, what: str) -> str:
    """What these ranks alone know, under which new groups find their members in a store. Collective over `group`.

    Not `dist.new_group`: it needs all ranks of the job to call it or, with use_local_synchronization, that
    its members have created equally many groups before; both can hang. Rank 0 draws the name instead.

    Args:
        device: where the name travels.
        what: who asks for it, for the error if not all ranks do.
    """
    meet(group, device, what)
    generator = torch.Generator().manual_seed(_seed())
    token = torch.randint(2**62, (1,), dtype=torch.int64, generator=generator, device="cpu").to(device)
    if dist.get_world_size(group) > 1:
        dist.broadcast(token, dist.get_global_rank(group, 0), group=group)
    return f"saef-{token.item()}"


def _beside_default_store() -> Store:
    """The default store over a connection that only threads of saef use, and none of them waits in.

    A call that blocks in another thread would hold up theirs. One for all states: torch looks up the names of both ends
    of each connection, for which a name server may need seconds.
    """
    default: Any = _get_default_store()
    if default not in _BESIDE:
        _BESIDE[default] = default.clone()
    return _BESIDE[default]


_BESIDE: weakref.WeakKeyDictionary[Store, Store] = weakref.WeakKeyDictionary()


def meet(group: dist.ProcessGroup | None, device: torch.device, what: str) -> None:
    """`Transport.meet` for the ranks of a process group, None for all, that have no transport."""
    group = checked(group)
    _meetings(_get_process_group_store(group), group, device, None).meet(what)


def _meetings(store: Store, group: dist.ProcessGroup, device: torch.device, own: Any) -> Meetings:
    """A place in `store` where the ranks of `group` meet. own: a gloo group of the same ranks, if there is one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if own is None and "cpu" in {d.type for d in group._device_types}:
        found = group._get_backend(torch.device("cpu"))
        own = found if isinstance(found, dist.distributed_c10d.ProcessGroupGloo) else None
    return Meetings(PrefixStore("saef-meetings", store), rank, size, timeout_of(group, device), own)


def gloo(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A gloo group of `size` ranks that meet in `store`."""
    kind: Any = dist.distributed_c10d.ProcessGroupGloo
    options = kind._Options()
    options._devices, options._timeout = _devices(os.environ.get("GLOO_SOCKET_IFNAME", "")), timeout
    options._threads = 2 * len(options._devices)
    return kind(store, rank, size, options)


@cache
def _devices(interfaces: str) -> list[Any]:
    """As torch.distributed makes them, once for all groups of saef: each has a thread, whose end takes 10 ms."""
    kind: Any = dist.distributed_c10d.ProcessGroupGloo
    names = [n for n in interfaces.split(",") if n]
    return [kind.create_device(interface=n) for n in names] or [kind.create_default_device()]


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long its collectives wait for a silent rank."""
    found: timedelta = group._get_backend(device).options._timeout
    return found


def _seed() -> int:
    return int.from_bytes(os.urandom(7), "little")  # the user's random state stays as it is
