"""The two-way compressed all-reduce: bytes in, bytes out. It knows nothing of the algorithm.

Two strategies, with bit-identical results:

    replicated   phase 1: all-gather of every worker's message; every rank computes the server itself.
                 One collective, one latency; a rank receives (K - 1) messages.
    sharded      phase 1: all-to-all, each server gets its section of every message;
                 phase 2: all-gather of the servers' replies. Bytes do not grow with K.

Who carries the bytes is a `Transport`; those over torch.distributed are in `saef.transport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

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
        """The result of `work`, run after all that was submitted before. Raises `lost(cause)` if it fails there."""
        ...

    def lost(self, cause: Exception) -> RuntimeError:
        """The error for a rank that cannot reach the others any more; raise it from `cause`."""
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

    def send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: str) -> list[Tensor]:
        """Send v to the ranks of `to`; receive one vector like it from each of `sources`, in this order.

        Both are ascending and without this rank. A rank with nothing to send or receive calls it too.
        """
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
