"""The two-way compressed all-reduce: bytes in, bytes out. It knows nothing of the algorithm.

Two strategies, with bit-identical results:

    replicated   phase 1: all-gather of every worker's message; every rank computes the server itself.
                 One collective, one latency; a rank receives (K - 1) messages.
    sharded      phase 1: all-to-all, each server gets its section of every message;
                 phase 2: all-gather of the servers' replies. Bytes do not grow with K.

Who carries the bytes is a `saef.comm.transport.Transport`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from .transport import Transport

Strategy = Literal["replicated", "sharded"]

LATENCY_BYTES = 1 << 16  # one more collective costs about as much as sending this: 50 us at 10 Gb/s


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


def choose(workers: int, message_bytes: int, reply_bytes: int) -> Strategy:
    """The cost rule behind exchange="auto": "replicated" unless it sends more than one latency's worth more.

    Sharding costs one more collective (`LATENCY_BYTES`). Arguments as for `sent_bytes`.
    """
    replicated = sent_bytes("replicated", workers, message_bytes, reply_bytes)
    sharded = sent_bytes("sharded", workers, message_bytes, reply_bytes)
    return "replicated" if replicated <= sharded + LATENCY_BYTES else "sharded"


def sent_bytes(strategy: Strategy, workers: int, message_bytes: int, reply_bytes: int) -> float:
    """What a rank sends in a step, in the mean over K ranks: (K - 1) a replicated, (K - 1) / K (a + b) sharded.

    Args:
        workers: K.
        message_bytes, reply_bytes: a and b, of a worker's message and of all replies, for the whole model.
    """
    if strategy == "replicated":
        return (workers - 1) * message_bytes
    return (workers - 1) * (message_bytes + reply_bytes) / workers
