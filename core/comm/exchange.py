"""The two-way compressed all-reduce: bytes in, bytes out. It knows nothing of the algorithm.

Two strategies, with bit-identical results:

    replicated   phase 1: all-gather of every worker's message; every rank computes the server itself.
                 One collective, one latency; a rank receives (K - 1) messages.
    sharded      phase 1: all-to-all, each server gets its section of every message;
                 phase 2: all-gather of the servers' replies. Bytes do not grow with K.

Who carries the bytes is a `saef.comm.transport.Transport`; where that has a second way for the replies, phase 2 of one
bucket and phase 1 of the next travel at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from .transport import Transport

Strategy = Literal["replicated", "sharded"]

PIECE_BYTES = 1 << 19  # of a message: while the reply of one piece of a bucket travels, so does the next
LATENCY_BYTES = 1 << 16  # one more collective costs about as much as sending this: 50 us at 10 Gb/s


def send(transport: Transport, sharded: bool, message: Tensor, send_bytes: Sequence[int]) -> Callable[[], Tensor]:
    """Begin phase 1 of a bucket: every worker's message to the servers (Alg. 1, line 19).

    Args:
        message: this worker's sections, one after the other, uint8.
        send_bytes: length of each server's section (one entry if replicated).

    Returns:
        What waits for the messages that this rank serves, [K, section], and returns them.
    """
    if sharded:
        return transport.begin_all_to_all(message, send_bytes, send_bytes[transport.rank], "phase1")
    gathered = transport.begin_all_gather(message, [send_bytes[0]] * transport.size, "phase1")
    return lambda: gathered().view(transport.size, -1)


def answer(transport: Transport, sharded: bool, reply: Tensor, reply_bytes: Sequence[int]) -> Callable[[], Tensor]:
    """Begin phase 2: every server's reply to the workers (Alg. 1, line 23).

    Args:
        transport: of the replies.
        reply: what this rank has made of the messages that it serves, uint8.
        reply_bytes: length of each server's reply.

    Returns:
        What waits for the replies of all servers, and returns them one after the other.
    """
    return transport.begin_all_gather(reply, reply_bytes, "phase2") if sharded else lambda: reply


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
