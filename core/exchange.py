"""The two-way compressed all-reduce: bytes in, bytes out. It knows nothing of the algorithm.

Two strategies, with bit-identical results:

    replicated   phase 1: all-gather of every worker's message; every rank computes the server itself.
                 One collective, one latency; a rank receives (K - 1) messages.
    sharded      phase 1: all-to-all, each server gets its section of every message;
                 phase 2: all-gather of the servers' replies. Bytes do not grow with K.

Every rank issues its collectives in one fixed order. On CPU (gloo) one ordered thread per state does
both phases, so the exchange of a bucket overlaps with the backward of the next; issuing a second
collective from a future's callback would hang, because ranks would issue them in different orders. On
CUDA a side stream takes the thread's place.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

T = TypeVar("T")

PURPOSES = ("phase1", "phase2", "averaging", "settings", "checkpoint", "telemetry")  # what bytes are counted as
LATENCY_BYTES = 1 << 16  # one more collective costs about as much as sending this: 50 us at 10 Gb/s


class Transport(Protocol):
    """Collectives on flat tensors among `size` ranks, in the order in which `submit` was called.

    `sent_bytes` counts what this rank puts on the wire, by purpose: an all-gather sends its message to
    K - 1 ranks, an all-to-all each section but its own, a ring all-reduce 2 (K - 1) / K of the vector.
    """

    rank: int
    size: int
    sent_bytes: Counter[str]

    @property
    def failure(self) -> Exception | None:
        """The first error met in submitted work, after which nothing more is sent."""
        ...

    def future(self) -> Future[Tensor]:
        """A future that tensors of this transport's device can complete."""
        ...

    def submit(
        self, work: Callable[[], Tensor], future: Future[Tensor], otherwise: Tensor | None = None
    ) -> Future[Tensor]:
        """Run `work`, which may call the collectives, after all that was submitted before; complete `future`.

        If it fails, the future gets `otherwise` (DDP would hide the error in one of its own) or, without it,
        the error; look at `failure`.
        """
        ...

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, run after all that was submitted before. Raises `lost(...)` if it fails there."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """Where compression runs: a side stream on CUDA."""
        ...

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor:
        """The ranks' messages one after the other; rank r's has sizes[r] bytes."""
        ...

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor:
        """Send section r (sizes[r] bytes) to rank r; [K, received] bytes, row k from rank k."""
        ...

    def mean(self, v: Tensor, purpose: str) -> None:
        """v <- mean over the ranks, in place; the same bits on every rank."""
        ...


def two_way(
    transport: Transport,
    sharded: bool,
    message: Tensor,
    send_bytes: Sequence[int],
    reply_bytes: Sequence[int],
    serve: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Exchange one bucket: every worker's message in, every server's reply out (Alg. 1, lines 19-23).

    Args:
        message: this worker's sections, one after the other, uint8.
        send_bytes, reply_bytes: length of each server's section and reply (one entry if replicated).
        serve: from the [K, section] messages this rank received to its reply.

    Returns:
        (the messages received, the replies of all servers one after the other).
    """
    size, rank = transport.size, transport.rank
    if not sharded:
        received = transport.all_gather(message, [send_bytes[0]] * size, "phase1").view(size, -1)
        return received, serve(received)
    received = transport.all_to_all(message, send_bytes, send_bytes[rank], "phase1")
    return received, transport.all_gather(serve(received), reply_bytes, "phase2")


def choose(workers: int, message_bytes: int, reply_bytes: int) -> str:
    """The cost rule behind exchange="auto": "replicated" unless it sends more than one latency's worth more.

    A rank sends (K - 1) a bytes replicated and (K - 1) / K (a + b) sharded, for messages of a and
    replies of b bytes (the whole model); sharding costs one more collective (`LATENCY_BYTES`).
    """
    replicated = (workers - 1) * message_bytes
    sharded = (workers - 1) * (message_bytes + reply_bytes) / workers
    return "replicated" if replicated <= sharded + LATENCY_BYTES else "sharded"


def lost(rank: int, size: int, cause: Exception) -> RuntimeError:
    """The error for a rank that cannot reach the others any more; raise it from `cause`."""
    return RuntimeError(
        f"rank {rank} of {size}: the exchange with the other ranks failed. A rank died, lost its connection, or was "
        "silent for longer than the process group's timeout: look at what the others printed. The state of this rank "
        "is as before the step. Restart the job (torchrun --max-restarts does it by itself) and load the last "
        f"checkpoint. The cause: {cause}"
    )


class TorchTransport:
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
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this rank is not a member of process_group; create the state on its members only")
        self.device = device
        self.sent_bytes: Counter[str] = Counter()
        self._side: torch.cuda.Stream | None = None
        self._worker: _OrderedWorker | None = None
        self.group: Any = group  # or a gloo backend, which has the same methods
        if device.type == "cpu":
            self.group = _private_gloo(group)
            self._worker = _OrderedWorker()
        elif device.type == "cuda":
            self._side = torch.cuda.Stream(device)

    def stream(self) -> AbstractContextManager[Any]:
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._side)

    def future(self) -> Future[Tensor]:
        return Future(devices=[self.device]) if self.device.type == "cuda" else Future()

    @property
    def failure(self) -> Exception | None:
        return self._worker.failure if self._worker is not None else None

    def submit(
        self, work: Callable[[], Tensor], future: Future[Tensor], otherwise: Tensor | None = None
    ) -> Future[Tensor]:
        if self._worker is not None:
            self._worker.submit(work, future, otherwise)
        else:
            with self.stream():
                future.set_result(work())
        return future

    def call(self, work: Callable[[], T]) -> T:
        result: list[T] = []

        def run() -> Tensor:
            result.append(work())
            return torch.empty(0)

        try:
            if self._worker is not None:
                self._worker.submit(run, Future(), None).wait()
            else:
                with self.stream():
                    run()
                if self._side is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self._side)
        except Exception as error:
            cause = self.failure or error
            raise lost(self.rank, self.size, cause) from cause
        return result[0]

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor:
        self.sent_bytes[purpose] += message.numel() * (self.size - 1)
        if self.size == 1:
            return message
        out = message.new_empty(sum(sizes))
        if len(set(sizes)) == 1:
            self.group._allgather_base(out, message).wait()
        else:  # unequal: gloo and NCCL gather equal parts only; an all-to-all of copies sends the same bytes
            copies = message.repeat(self.size)
            self.group.alltoall_base(out, copies, list(sizes), [message.numel()] * self.size).wait()
        return out

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor:
        self.sent_bytes[purpose] += sum(sizes) - sizes[self.rank]
        if self.size == 1:
            return message.view(1, -1)
        out = message.new_empty(self.size * received)
        self.group.alltoall_base(out, message, [received] * self.size, list(sizes)).wait()
        return out.view(self.size, received)

    def mean(self, v: Tensor, purpose: str) -> None:
        self.sent_bytes[purpose] += 2 * (self.size - 1) * v.numel() * v.element_size() // self.size
        if self.size > 1:
            self.group.allreduce([v]).wait()
            v.div_(self.size)


def _private_gloo(group: dist.ProcessGroup) -> Any:
    """A gloo group of the same ranks that nobody else uses. Collective over `group`.

    Not `dist.new_group`: it needs all ranks of the job to call it or, with use_local_synchronization, that
    its members have created equally many groups before; both can hang. Rank 0 draws the name instead.
    """
    token = torch.randint(2**62, (1,), dtype=torch.int64, generator=torch.Generator().manual_seed(_seed()))
    dist.broadcast(token, dist.get_global_rank(group, 0), group=group)
    c10d = dist.distributed_c10d
    store = c10d.PrefixStore(f"saef-{token.item()}", c10d._get_default_store())
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    return c10d.ProcessGroupGloo(store, dist.get_rank(group), dist.get_world_size(group), timeout)


def _seed() -> int:
    return int.from_bytes(os.urandom(7), "little")  # the user's random state stays as it is


EXIT_S = 5.0  # that a process waits at its end for an exchange that is under way


class _OrderedWorker:
    """One daemon thread that runs work items one at a time, in the order of submission.

    After a failure it runs nothing more: this rank has missed a collective, and the next one would meet
    another of the other ranks. Every later item fails with the first error. The thread ends with the worker,
    or when the process does, after what was submitted: a thread that comes out of a collective while Python is
    being taken down would abort the process.
    """

    def __init__(self) -> None:
        self._failures: list[Exception] = []
        self._items: _Items = queue.SimpleQueue()
        self._started = False

    @property
    def failure(self) -> Exception | None:
        return self._failures[0] if self._failures else None

    def submit(
        self, work: Callable[[], Tensor], future: Future[Tensor], otherwise: Tensor | None
    ) -> Future[Tensor]:
        if not self._started:
            self._started = True
            parts = self._items, self._failures  # not self, which the thread would keep alive
            thread = threading.Thread(target=_run, args=parts, name="saef-exchange", daemon=True)
            thread.start()
            weakref.finalize(self, _stop, self._items, thread)  # also at exit
        self._items.put((work, future, otherwise))
        return future


_Items = queue.SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor], Tensor | None] | None]


def _run(items: _Items, failures: list[Exception]) -> None:
    while (item := items.get()) is not None:
        work, future, result = item
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
