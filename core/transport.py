"""Transports: collectives in one fixed order on every rank, beside the backward.

On CPU one ordered thread per state does both phases of a bucket's exchange, which so overlaps with the
backward of the next; issuing the second collective from a future's callback would hang, because ranks
would issue them in different orders. With NCCL a side stream takes the thread's place.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.futures import Future

T = TypeVar("T")
Context = Callable[[], AbstractContextManager[Any]]


class Ordered(ABC):
    """The part of a `saef.exchange.Transport` that keeps collectives in order, and counts; subclasses have them.

    Args:
        rank, size: of this process among those that exchange.
        device: of the tensors that will travel. On CUDA all work runs on a side stream.
        thread: whether one ordered thread runs the work, whose collectives block; else the caller's does, and the
            side stream keeps the order.
    """

    silence = "the process group's timeout"  # after which a silent rank is an error
    restart = "torchrun --max-restarts does it by itself"

    def __init__(self, rank: int, size: int, device: torch.device, *, thread: bool) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sent_bytes: Counter[str] = Counter()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_side: Context = nullcontext if self._side is None else partial(torch.cuda.stream, self._side)
        self._worker = _OrderedWorker(self._on_side) if thread else None

    def stream(self) -> AbstractContextManager[Any]:
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        return self._on_side()

    def future(self) -> Future[Tensor]:
        return Future(devices=[self.device]) if self._side is not None else Future()

    @property
    def failure(self) -> Exception | None:
        return self._worker.failure if self._worker is not None else None

    def submit(
        self, work: Callable[[], Tensor], future: Future[Tensor], otherwise: Tensor | None = None
    ) -> Future[Tensor]:
        with self.stream():
            if self._worker is not None:
                self._worker.submit(work, future, otherwise)
            else:
                future.set_result(work())
        return future

    def call(self, work: Callable[[], T]) -> T:
        result: list[T] = []

        def run() -> Tensor:
            result.append(work())
            return torch.empty(0)

        try:
            with self.stream():
                if self._worker is not None:
                    self._worker.submit(run, Future(), None).wait()
                else:
                    run()
        except Exception as error:
            cause = self.failure or error
            raise self.lost(cause) from cause
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        return result[0]

    def lost(self, cause: Exception) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank} of {self.size}: the exchange with the other ranks failed. A rank died, lost its "
            f"connection, or was silent for longer than {self.silence}: look at what the others printed. The state of "
            f"this rank is as before the step. Restart the job ({self.restart}) and load the last checkpoint. The "
            f"cause: {cause}"
        )

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor:
        self.sent_bytes[purpose] += message.numel() * (self.size - 1)
        return message if self.size == 1 else self._all_gather(message, sizes, purpose)

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor:
        self.sent_bytes[purpose] += sum(sizes) - sizes[self.rank]
        out = message if self.size == 1 else self._all_to_all(message, sizes, received, purpose)
        return out.view(self.size, received)

    def mean(self, v: Tensor, purpose: str) -> None:
        self.sent_bytes[purpose] += 2 * (self.size - 1) * v.numel() * v.element_size() // self.size
        if self.size > 1:
            self._sum(v, purpose)
            v.div_(self.size)

    def send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: str) -> list[Tensor]:
        self.sent_bytes[purpose] += len(to) * v.numel() * v.element_size()
        return self._send_receive(v, to, sources, purpose) if self.size > 1 else []

    # What subclasses move, among more than one rank.

    @abstractmethod
    def _all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor: ...

    @abstractmethod
    def _all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor: ...

    @abstractmethod
    def _sum(self, v: Tensor, purpose: str) -> None: ...

    @abstractmethod
    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: str) -> list[Tensor]: ...


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

    def _all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor:
        out = message.new_empty(sum(sizes))
        if len(set(sizes)) == 1:
            self.group._allgather_base(out, message).wait()
        else:  # unequal: gloo and NCCL gather equal parts only; an all-to-all of copies sends the same bytes
            copies = message.repeat(self.size)
            self.group.alltoall_base(out, copies, list(sizes), [message.numel()] * self.size).wait()
        return out

    def _all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor:
        out = message.new_empty(self.size * received)
        self.group.alltoall_base(out, message, [received] * self.size, list(sizes)).wait()
        return out

    def _sum(self, v: Tensor, purpose: str) -> None:
        self.group.allreduce([v]).wait()

    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: str) -> list[Tensor]:
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
    token = torch.randint(2**62, (1,), dtype=torch.int64, generator=torch.Generator().manual_seed(_seed()))
    dist.broadcast(token, dist.get_global_rank(group, 0), group=group)
    return PrefixStore(f"saef-{token.item()}", _get_default_store())


def gloo(store: Store, rank: int, size: int, like: dist.ProcessGroup) -> Any:
    """A gloo group of `size` ranks that meet in `store`, with the timeout of `like`."""
    timeout = like._get_backend(torch.device("cpu")).options._timeout
    return dist.distributed_c10d.ProcessGroupGloo(store, rank, size, timeout)


def _seed() -> int:
    return int.from_bytes(os.urandom(7), "little")  # the user's random state stays as it is


EXIT_S = 5.0  # that a process waits at its end for an exchange that is under way


class _OrderedWorker:
    """One daemon thread that runs work items one at a time, in the order of submission.

    After a failure it runs nothing more: this rank has missed a collective, and the next one would meet
    another of the other ranks. Every later item fails with the first error. The thread ends with the worker,
    or when the process does, after what was submitted: a thread that comes out of a collective while Python is
    being taken down would abort the process.

    Args:
        context: makes the context that items run in.
    """

    def __init__(self, context: Context = nullcontext) -> None:
        self._context = context
        self._failures: list[Exception] = []
        self._items: _Items = queue.SimpleQueue()
        self._started = False

    @property
    def failure(self) -> Exception | None:
        return self._failures[0] if self._failures else None

    def submit(self, work: Callable[[], Tensor], future: Future[Tensor], otherwise: Tensor | None) -> Future[Tensor]:
        if not self._started:
            self._started = True
            parts = self._items, self._failures, self._context  # not self, which the thread would keep alive
            thread = threading.Thread(target=_run, args=parts, name="saef-exchange", daemon=True)
            thread.start()
            weakref.finalize(self, _stop, self._items, thread)  # also at exit
        self._items.put((work, future, otherwise))
        return future


_Items = queue.SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor], Tensor | None] | None]


def _run(items: _Items, failures: list[Exception], context: Context) -> None:
    while (item := items.get()) is not None:
        work, future, result = item
        with context():
            try:
                if failures:
                    raise RuntimeError(f"an earlier exchange failed: {failures[0]}") from failures[0]
                result = work()
            except Exception as error:  # raised again in the thread that waits
                if not failures:
                    failures.append(error)
                if result is None:
                    future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong
            if result is not None:
                future.set_result(result)
        del item, work, future, result  # or the last bucket's tensors would live until the next step


def _stop(items: _Items, thread: threading.Thread) -> None:
    items.put(None)
    if thread is not threading.current_thread():
        thread.join(EXIT_S)
