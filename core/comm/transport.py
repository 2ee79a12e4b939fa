"""What carries bytes: collectives in one fixed order on every rank, beside the backward.

On CPU one ordered thread per state sends the buckets' messages, which so overlaps with the backward of the next; a
second one, in the same order, sends the replies beside the messages that follow. Issuing them from a future's callback
would hang, because ranks would issue collectives in different orders. With NCCL a side stream takes the threads' place.
"""

from __future__ import annotations

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, final, get_args

import torch
from torch import Tensor
from torch.futures import Future

from .meeting import NotTogether

T = TypeVar("T")
Context = Callable[[], AbstractContextManager[Any]]

# What bytes are counted as.
Purpose = Literal["phase1", "phase2", "averaging", "settings", "checkpoint", "telemetry"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class Gathers(Protocol):
    """Ranks that can compare what they have: a `Transport`, or all ranks of several."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def call(self, work: Callable[[], T]) -> T: ...
    def meet(self, what: str) -> None: ...
    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Tensor: ...


class Transport(Protocol):
    """Collectives on flat tensors among `size` ranks, in the order in which `submit` was called.

    `sent_bytes` counts what this rank puts on the wire, by purpose: an all-gather sends its message to
    K - 1 ranks, an all-to-all each section but its own, a ring all-reduce 2 (K - 1) / K of the vector.
    """

    rank: int
    size: int
    sent_bytes: Counter[str]
    pipelines: bool  # whether `replies` is another than this

    @property
    def failure(self) -> Exception | None:
        """The first error met in submitted work, after which nothing more is sent."""
        ...

    def future(self) -> Future[Tensor]:
        """A future that tensors of this transport's device can complete."""
        ...

    @property
    def replies(self) -> Transport:
        """Among the same ranks, a way beside this one: what is submitted to both travels at once.

        To be asked for by submitted work, on all ranks alike. It counts as this one does, fails with it, and has ended
        what was submitted to it before `call` and `meet` of this one begin. Where there is one way only: this itself.
        """
        ...

    def submit(
        self, work: Callable[[], Tensor | None], future: Future[Tensor], otherwise: Tensor | None = None
    ) -> Future[Tensor]:
        """Run `work`, which may call the collectives, after all that was submitted before; complete `future`.

        If it fails, the future gets `otherwise` (DDP would hide the error in one of its own) or, without it,
        the error; look at `failure`. Work that returns None has given the future to other work.
        """
        ...

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, run after all that was submitted before. Raises `lost(cause)` if it fails there."""
        ...

    def meet(self, what: str) -> None:
        """Return when all ranks have come here, after all that was submitted before; nothing else is sent until then.

        To be called before a collective that is not a part of every step: if a user calls it on some ranks only, it
        must not meet another of the other ranks'.

        Args:
            what: the same on every rank, for the error: "SAEFState.x_tilde()", "the parameters changed".

        Raises:
            RuntimeError: if some rank is not there. It, too, gets an error, which names `what` and this rank.
        """
        ...

    def lost(self, cause: Exception) -> RuntimeError:
        """The error for a rank that cannot reach the others any more; raise it from `cause`."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """Where compression runs: a side stream on CUDA."""
        ...

    def catch_up(self) -> None:
        """What follows comes after all that was given to `stream` so far."""
        ...

    def restore_counts(self, sent: Mapping[str, int]) -> None:
        """`sent_bytes` <- what was sent until a checkpoint that has been loaded."""
        ...

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Tensor:
        """The ranks' messages one after the other; rank r's has sizes[r] bytes."""
        ...

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose) -> Tensor:
        """Send section r (sizes[r] bytes) to rank r; [K, received] bytes, row k from rank k."""
        ...

    def begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]:
        """`all_gather`, begun: what to call for its result, also in work of `replies`.

        Where a transport pipelines, what is submitted next begins while this is on its way.
        """
        ...

    def begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]:
        """The same for `all_to_all`."""
        ...

    def mean(self, v: Tensor, purpose: Purpose) -> None:
        """v <- mean over the ranks, in place; the same bits on every rank."""
        ...

    def send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]:
        """Send v to the ranks of `to`; receive one vector like it from each of `sources`, in this order.

        Both are ascending and without this rank. A rank with nothing to send or receive calls it too.
        """
        ...


class Ordered(ABC):
    """The part of a `Transport` that keeps collectives in order, and counts; subclasses have them.

    Args:
        rank, size: of this process among those that exchange.
        device: of the tensors that will travel. On CUDA all work runs on a side stream.
        thread: whether one ordered thread runs the work, whose collectives block; else the caller's does, and the
            side stream keeps the order.
    """

    pipelines = False
    silence = "the process group's timeout"  # after which a silent rank is an error
    restart = "torchrun --max-restarts does it by itself"
    look_s = 2.0  # after which a rank that waits looks where the others are, for the first time

    def __init__(self, rank: int, size: int, device: torch.device, *, thread: bool) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sent_bytes: Counter[str] = Counter()
        self._place = 0  # how many collectives were called
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_side: Context = nullcontext if self._side is None else partial(torch.cuda.stream, self._side)
        self._worker = _OrderedWorker(self._on_side) if thread else None

    def after_failure(self, do: Callable[[], None]) -> None:
        """Have something done, once, when work fails on the thread. It must not keep this transport alive."""
        if self._worker is not None:
            self._worker.after_failure.append(do)

    def end(self) -> None:
        """This rank comes to no further collective: those in which the others wait for it shall fail now."""
        return

    @property
    def replies(self) -> Ordered:
        return self

    def stream(self) -> AbstractContextManager[Any]:
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        return self._on_side()

    def catch_up(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def future(self) -> Future[Tensor]:
        return Future(devices=[self.device]) if self._side is not None else Future()

    @property
    def failure(self) -> Exception | None:
        return self._worker.failure if self._worker is not None else None

    def submit(
        self, work: Callable[[], Tensor | None], future: Future[Tensor], otherwise: Tensor | None = None
    ) -> Future[Tensor]:
        with self.stream():
            if self._worker is not None:
                self._worker.submit(work, future, otherwise)
            elif (result := work()) is not None:
                future.set_result(result)
        return future

    def call(self, work: Callable[[], T]) -> T:
        result: list[T] = []

        def run() -> Tensor:
            self._await_replies()
            result.append(work())
            return torch.empty(0, device="cpu")

        try:
            with self.stream():
                if self._worker is not None:
                    done, future = threading.Event(), self._worker.submit(run, Future(), None)
                    future.add_done_callback(lambda _: done.set())
                    while not done.wait(self.look_s):
                        self._look_beside()
                    future.wait()
                else:
                    run()
        except Exception as error:
            cause = self.failure or error
            raise self.lost(cause) from cause
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        return result[0]

    def meet(self, what: str) -> None:
        if self.size > 1:
            self.call(partial(self._meet, what))

    def restore_counts(self, sent: Mapping[str, int]) -> None:
        self.sent_bytes.clear()
        self.sent_bytes.update(sent)

    def lost(self, cause: Exception) -> RuntimeError:
        if isinstance(cause, NotTogether):
            return NotTogether(str(cause))
        return RuntimeError(
            f"rank {self.rank} of {self.size}: the exchange with the other ranks failed. A rank died, lost its "
            f"connection, or was silent for longer than {self.silence}: look at what the others printed. The state of "
            f"this rank is as before the step. Restart the job ({self.restart}) and load the last checkpoint. The "
            f"cause: {cause}"
        )

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Tensor:
        return self.begin_all_gather(message, sizes, purpose)()

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose) -> Tensor:
        return self.begin_all_to_all(message, sizes, received, purpose)()

    def begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]:
        self._count(purpose, message.numel() * (self.size - 1))
        return partial(_here, message) if self.size == 1 else self._begin_all_gather(message, sizes, purpose)

    def begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]:
        self._count(purpose, sum(sizes) - sizes[self.rank])
        if self.size == 1:
            return partial(_here, message.view(1, received))
        begun = self._begin_all_to_all(message, sizes, received, purpose)
        return lambda: begun().view(self.size, received)

    def mean(self, v: Tensor, purpose: Purpose) -> None:
        self._count(purpose, 2 * (self.size - 1) * v.numel() * v.element_size() // self.size)
        if self.size > 1:
            self._sum(v, purpose)
            v.div_(self.size)

    def send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]:
        self._count(purpose, len(to) * v.numel() * v.element_size())
        return self._send_receive(v, to, sources, purpose) if self.size > 1 else []

    def _count(self, purpose: Purpose, sent_bytes: int) -> None:
        """A collective begins."""
        self._place += 1
        self.sent_bytes[purpose] += sent_bytes

    def _meet(self, what: str) -> None:
        """What `meet` does in its turn, among more than one rank: nothing, if the ranks have no way to wait for each
        other but the collectives; else it raises `NotTogether`."""
        return

    def _await_replies(self) -> None:
        """Until what was submitted to `replies` has ended, if that is another than this. On the thread."""
        return

    def _look_beside(self) -> None:
        """Called now and then while the thread is in work that `call` waits for: end what cannot end by itself."""
        return

    # What subclasses move, among more than one rank.

    @abstractmethod
    def _begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _sum(self, v: Tensor, purpose: Purpose) -> None: ...

    @abstractmethod
    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]: ...


def end_all(transports: Sequence[weakref.ref[Ordered]]) -> None:
    """Of a failure in one of them, whom this rank is joined to by any learns: few are joined by all."""
    for one in transports:
        if (transport := one()) is not None:
            transport.end()


def _here(message: Tensor) -> Tensor:
    """What has arrived of a collective of one rank."""
    return message


EXIT_S = 5.0  # that a process waits at its end for an exchange that is under way


@final
class _OrderedWorker:
    """One daemon thread that runs work items one at a time, in the order of submission.

    After a failure it runs nothing more: this rank has missed a collective, and the next one would meet
    another of the other ranks. Every later item fails with the first error. The thread ends with the worker,
    or when the process does, after what was submitted: a thread that comes out of a collective while Python is
    being taken down would abort the process.

    Args:
        context: makes the context that items run in.
        first: a worker whose items submit those of this one. Both fail together, and this one ends after it.
    """

    def __init__(self, context: Context = nullcontext, first: _OrderedWorker | None = None) -> None:
        self._context, self._first = context, first
        self._failures: list[Exception] = [] if first is None else first._failures
        self.after_failure: list[Callable[[], None]] = [] if first is None else first.after_failure
        self._items: _Items = queue.SimpleQueue()
        self._threads: list[tuple[_Items, threading.Thread]] = []  # to be ended in this order

    @property
    def failure(self) -> Exception | None:
        return self._failures[0] if self._failures else None

    def submit(
        self, work: Callable[[], Tensor | None], future: Future[Tensor], otherwise: Tensor | None
    ) -> Future[Tensor]:
        if not self._threads:
            self._start()
        self._items.put((work, future, otherwise))
        return future

    def _start(self) -> None:
        parts = self._items, self._failures, self.after_failure, self._context  # not self: the thread would keep it
        name = "saef-exchange" if self._first is None else "saef-replies"
        thread = threading.Thread(target=_run, args=parts, name=name, daemon=True)
        thread.start()
        self._threads.append((self._items, thread))
        if self._first is None:
            weakref.finalize(self, _stop, self._threads)  # also at exit
        else:
            self._first._threads.append((self._items, thread))


_Items = queue.SimpleQueue[tuple[Callable[[], Tensor | None], Future[Tensor], Tensor | None] | None]


def _run(items: _Items, failures: list[Exception], after_failure: list[Callable[[], None]], context: Context) -> None:
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
                    for do in after_failure:
                        do()
                if result is None:
                    future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong
            if result is not None:
                future.set_result(result)
        del item, work, future, result  # or the last bucket's tensors would live until the next step


def _stop(threads: list[tuple[_Items, threading.Thread]]) -> None:
    for items, thread in threads:
        items.put(None)
        if thread is not threading.current_thread():
            thread.join(EXIT_S)
