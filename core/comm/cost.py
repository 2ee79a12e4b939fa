"""What a step costs on a network: the formulas behind `python -m saef advise` and `benchmarks/scaling.py`.

The bytes are those of `saef.comm.exchange.sent_bytes`. A step of K ranks takes

    step = compute + kernels + exposed / H

kernels: what the method computes beyond the optimizer's own step. exposed: the part of an exchange that the backward
does not hide; there is one every H steps. Of n equal buckets, each of c seconds on the network, that become ready one
after the other in a backward of b seconds:

    exposed = max(c, n c + b / n - b)

and n c where nothing overlaps: the exchange comes after the backward, or the ranks use all cores. Where different
buckets travel at once, n c is less by what they have in common: their latency, or what was measured of several
all-reduces.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import final

from .exchange import Strategy, sent_bytes

BACKWARD = 2 / 3  # of a step's computation
FIRST_BYTES, BUCKET_BYTES = 1 << 20, 25 * (1 << 20)  # of gradients in DDP's first bucket, and in the others
AT_ONCE = 3  # all-reduces that are measured together
PAYS = 1.05  # how much faster a method must be, to be worth it


@final
@dataclass(frozen=True)
class Curve:
    """Seconds of a collective by its bytes: straight lines between the points, and beyond them.

    Attributes:
        sizes: ascending, in bytes. seconds: at each of them.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or len(self.sizes) != len(self.seconds):
            raise ValueError(f"a curve needs two points or more, got {len(self.sizes)} and {len(self.seconds)}")
        if any(b <= a for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"the sizes of a curve must ascend, got {self.sizes}")

    def __call__(self, n: float) -> float:
        at = min(max(bisect_left(self.sizes, n), 1), len(self.sizes) - 1)
        (n0, n1), (t0, t1) = self.sizes[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return max(0.0, t0 + (t1 - t0) * (n - n0) / (n1 - n0))

    @property
    def seconds_per_byte(self) -> float:
        """Over all of it."""
        return (self.seconds[-1] - self.seconds[0]) / (self.sizes[-1] - self.sizes[0])

    def slower(self, factor: float) -> Curve:
        """The same latency, and each byte takes `factor` times as long."""
        first = self.seconds[0]
        return replace(self, seconds=tuple(first + factor * (t - first) for t in self.seconds))


@final
@dataclass(frozen=True)
class Network:
    """The collectives of K ranks.

    Attributes:
        workers: K.
        all_reduce: by the bytes of the vector, which each rank has.
        all_gather: by the bytes of one rank's message.
        all_to_all: by the bytes of all sections of one rank's message, its own included.
        pipelines: whether the phases of different buckets travel at once, so that each one's latency counts once.
        together: of AT_ONCE all-reduces that are begun at once, by the bytes of each; None if each waits for the last.
    """

    workers: int
    all_reduce: Curve
    all_gather: Curve
    all_to_all: Curve
    pipelines: bool = False
    together: Curve | None = None

    @property
    def bits_per_s(self) -> float:
        """What a rank sends in a second of a long all-reduce."""
        each = max(self.all_reduce.seconds_per_byte, 1e-15)
        return 8 * 2 * (self.workers - 1) / self.workers / each

    @property
    def latency_s(self) -> float:
        """Of an all-reduce of nothing."""
        return self.all_reduce.seconds[0]

    def slower(self, factor: float) -> Network:
        """Links of the same latency and 1 / factor of the rate."""
        reduce, gather, exchange = (c.slower(factor) for c in (self.all_reduce, self.all_gather, self.all_to_all))
        together = None if self.together is None else self.together.slower(factor)
        return Network(self.workers, reduce, gather, exchange, self.pipelines, together)


def alpha_beta(
    workers: int, latency_s: float, bytes_per_s: float, *, message_s: float = 0.0, tree: bool = False
) -> Network:
    """The network whose message of n bytes takes latency_s + n / bytes_per_s.

    All-reduce and all-gather go around a ring, in 2 (K - 1) and K - 1 hops (gloo), or in ceil(log2 K) of them with the
    same bytes (tree: recursive doubling, much as NCCL does for short messages). All messages of an all-to-all are on
    their way at once, and each costs `message_s` to send.
    """
    K = workers
    hops = math.ceil(math.log2(K)) if tree else K - 1
    one = 1.0 / bytes_per_s

    def line(at_once: float, each: float) -> Curve:
        return Curve((0.0, 1e9), (at_once, at_once + 1e9 * each))

    return Network(
        K,
        all_reduce=line(2 * hops * latency_s, 2 * (K - 1) / K * one),
        all_gather=line(hops * latency_s, (K - 1) * one),
        all_to_all=line((latency_s + (K - 1) * message_s) if K > 1 else 0.0, (K - 1) / K * one),
    )


@final
@dataclass(frozen=True)
class Method:
    """What a method sends and computes.

    Attributes:
        name: for tables.
        dense_bytes: all-reduced in an exchange, by the vector's length.
        message_bytes, reply_bytes: a worker's message and all replies in an exchange; 0: there is none.
        strategy: of the exchange.
        every: H, steps between two exchanges.
        buckets: how many an exchange is cut into.
        overlaps: whether they can be on their way while the backward computes.
        kernels_s: computed in a step beyond what training on one rank computes.
        memory_bytes: of a rank, beside parameters, gradients and the optimizer's own state.
    """

    name: str
    dense_bytes: float = 0.0
    message_bytes: float = 0.0
    reply_bytes: float = 0.0
    strategy: Strategy = "replicated"
    every: int = 1
    buckets: int = 1
    overlaps: bool = True
    kernels_s: float = 0.0
    memory_bytes: float = 0.0


def step_bytes(method: Method, workers: int) -> float:
    """What a rank sends in a step."""
    dense = 2 * (workers - 1) / workers * method.dense_bytes
    compressed = sent_bytes(method.strategy, workers, *_whole(method)) if method.message_bytes else 0.0
    return (dense + compressed) / method.every


def step_seconds(method: Method, network: Network, compute_s: float, *, overlap: bool = True) -> float:
    """Predicted seconds of a step.

    Args:
        compute_s: a step of one rank that exchanges nothing, its optimizer's included.
        overlap: whether the network works beside the backward; not where the ranks' computation uses all cores.
    """
    c, n = bucket_seconds(method, network), method.buckets
    exposed = every = n * c - (n - 1) * _hidden(method, network)
    if overlap and method.overlaps and method.every == 1:
        backward = BACKWARD * compute_s
        exposed = max(c, every + backward / n - backward)
    return compute_s + method.kernels_s + exposed / method.every


def bucket_seconds(method: Method, network: Network) -> float:
    """On the network, of one of the buckets."""
    n, total = method.buckets, 0.0
    if network.workers == 1:
        return 0.0
    if method.dense_bytes:
        total += network.all_reduce(method.dense_bytes / n)
    if method.message_bytes:
        total += _messages_seconds(method, network, method.message_bytes / n, method.reply_bytes / n)
    return total


def _messages_seconds(method: Method, network: Network, message_bytes: float, reply_bytes: float) -> float:
    if method.strategy == "replicated":
        return network.all_gather(message_bytes)
    return network.all_to_all(message_bytes) + network.all_gather(reply_bytes / network.workers)


def _hidden(method: Method, network: Network) -> float:
    """Of a bucket's seconds on the network those that pass while other buckets travel."""
    if network.workers == 1:
        return 0.0
    if method.message_bytes:
        return _messages_seconds(method, network, 0.0, 0.0) if network.pipelines else 0.0
    if network.together is None:
        return 0.0
    each = method.dense_bytes / method.buckets
    alone = network.all_reduce(each)
    another = (network.together(each) - alone) / (AT_ONCE - 1)
    return max(0.0, alone - another)


def break_even_bits_per_s(
    method: Method, plain: Method, network: Network, compute_s: float, *, overlap: bool = True
) -> float:
    """The links' rate below which `method` takes a shorter step than `plain`, latency and kernels as they are.

    0: at no rate above a bit a second. Infinite: at any rate up to a million times this network's.
    """

    def gain(factor: float) -> float:
        slower = network.slower(factor)
        steps = (step_seconds(m, slower, compute_s, overlap=overlap) for m in (plain, method))
        return next(steps) - next(steps)

    low, high = math.log(1e-6), math.log(network.bits_per_s)
    if high <= low or gain(math.exp(high)) <= 0:
        return 0.0
    if gain(math.exp(low)) > 0:
        return math.inf
    for _ in range(80):  # gain grows with the factor from some point on, and is not positive before it
        middle = (low + high) / 2
        low, high = (middle, high) if gain(math.exp(middle)) <= 0 else (low, middle)
    return network.bits_per_s / math.exp(high)


def buckets_of(parameters: int, itemsize: int = 4) -> int:
    """How many buckets DDP cuts so many gradients into, at least; each of `itemsize` bytes."""
    return 1 + max(0, math.ceil((itemsize * parameters - FIRST_BYTES) / BUCKET_BYTES))


def _whole(method: Method) -> tuple[int, int]:
    return math.ceil(method.message_bytes), math.ceil(method.reply_bytes)
