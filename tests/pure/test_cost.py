"""The formulas of `saef.comm.cost`."""

import math
from dataclasses import replace

import pytest

from saef.comm.cost import (
    AT_ONCE,
    BACKWARD,
    Curve,
    Method,
    Network,
    alpha_beta,
    break_even_bits_per_s,
    bucket_seconds,
    buckets_of,
    step_bytes,
    step_seconds,
)
from saef.comm.exchange import Strategy, sent_bytes

D = 10_000_000
PLAIN = Method("plain", dense_bytes=4.0 * D, buckets=2)
SIGN = Method("sign", message_bytes=D / 8, reply_bytes=D / 8, strategy="sharded", buckets=2, kernels_s=0.03)
LOCAL = replace(SIGN, every=16)


def at(bits_per_s: float, latency_s: float = 1e-4, workers: int = 4, *, tree: bool = False) -> Network:
    return alpha_beta(workers, latency_s, bits_per_s / 8, tree=tree)


def test_a_curve_goes_through_its_points_and_on() -> None:
    curve = Curve((0.0, 10.0, 20.0), (1.0, 2.0, 4.0))
    assert [curve(n) for n in (0, 5, 10, 15, 20, 30)] == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert curve.slower(3.0).seconds == (1.0, 4.0, 10.0)
    assert curve.seconds_per_byte == 3.0 / 20.0


def test_a_curve_is_never_below_zero() -> None:
    assert Curve((10.0, 20.0), (1.0, 3.0))(0.0) == 0.0


@pytest.mark.parametrize(("sizes", "seconds"), [((1.0,), (1.0,)), ((1.0, 2.0), (1.0,)), ((2.0, 1.0), (1.0, 1.0))])
def test_a_curve_of_other_points_is_refused(sizes: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"a curve needs two points|must ascend"):
        Curve(sizes, seconds)


def test_alpha_beta_is_what_its_docstring_says() -> None:
    latency, rate, n, K = 1e-3, 1e6, 4e5, 8
    ring, tree = (alpha_beta(K, latency, rate, message_s=1e-5, tree=yes) for yes in (False, True))
    close = pytest.approx  # sums of a few float64 numbers
    assert ring.all_reduce(n) == close(2 * 7 * latency + 2 * 7 / 8 * n / rate)
    assert ring.all_gather(n) == close(7 * latency + 7 * n / rate)
    assert ring.all_to_all(n) == tree.all_to_all(n) == close(latency + 7e-5 + 7 / 8 * n / rate)
    assert tree.all_reduce(n) == close(2 * 3 * latency + 2 * 7 / 8 * n / rate)
    assert tree.all_gather(n) == close(3 * latency + 7 * n / rate)
    assert ring.bits_per_s == close(8 * rate)
    assert ring.latency_s == close(14 * latency)


def test_one_worker_has_nobody_to_wait_for() -> None:
    assert bucket_seconds(PLAIN, at(1e6, workers=1)) == bucket_seconds(SIGN, at(1e6, workers=1)) == 0.0


@pytest.mark.parametrize("workers", [2, 4, 8, 4096])
def test_bytes_are_those_of_the_exchange(workers: int) -> None:
    assert step_bytes(PLAIN, workers) == 2 * (workers - 1) / workers * 4 * D
    assert step_bytes(SIGN, workers) == sent_bytes("sharded", workers, D // 8, D // 8)
    assert step_bytes(LOCAL, workers) == step_bytes(SIGN, workers) / 16
    both = replace(SIGN, strategy="replicated", dense_bytes=100.0)
    assert step_bytes(both, workers) == 200 * (workers - 1) / workers + sent_bytes("replicated", workers, D // 8, 0)


def test_traffic_sharded_is_flat_and_replicated_grows() -> None:
    sharded = [step_bytes(SIGN, K) for K in (2, 8, 4096)]
    assert sharded == sorted(sharded) and sharded[-1] < 2 * sharded[0]  # (K - 1) / K: from 1/2 to 1
    replicated = replace(SIGN, strategy="replicated")
    assert step_bytes(replicated, 8) == 7 * step_bytes(replicated, 2)


def test_a_step_without_overlap_is_a_sum() -> None:
    network = at(1e9)
    assert step_seconds(PLAIN, network, 0.2, overlap=False) == 0.2 + 2 * bucket_seconds(PLAIN, network)
    assert step_seconds(SIGN, network, 0.2, overlap=False) == 0.2 + 0.03 + 2 * bucket_seconds(SIGN, network)
    exchange = 2 * bucket_seconds(LOCAL, network)
    assert step_seconds(LOCAL, network, 0.2) == pytest.approx(0.2 + 0.03 + exchange / 16)


@pytest.mark.parametrize("strategy", ["sharded", "replicated"])
def test_what_travels_at_once_pays_latency_once(strategy: Strategy) -> None:
    method, network = replace(SIGN, strategy=strategy, buckets=5), at(1e8, 0.02)
    both = replace(network, pipelines=True)
    bare, latency = 5 * bucket_seconds(method, network), network.all_gather(0.0)
    latency += network.all_to_all(0.0) if strategy == "sharded" else 0.0
    assert step_seconds(method, network, 0.2, overlap=False) == pytest.approx(0.23 + bare)
    assert step_seconds(method, both, 0.2, overlap=False) == pytest.approx(0.23 + bare - 4 * latency)
    assert step_seconds(PLAIN, both, 0.2) == step_seconds(PLAIN, network, 0.2)  # PyTorch's all-reduce is one way
    assert both.slower(2.0).pipelines


@pytest.mark.parametrize("more", [0.0, 0.4, 1.0, 1.5])
def test_all_reduces_that_travel_together_take_what_was_measured_of_several(more: float) -> None:
    method, network = replace(PLAIN, buckets=5), at(1e8, 0.02)
    each, c = 4.0 * D / 5, bucket_seconds(method, network)
    several = c + (AT_ONCE - 1) * more * c
    together = replace(network, together=Curve((each, 2 * each), (several, 2 * several)))
    another = min(more, 1.0) * c  # never longer than one alone: that is noise
    assert step_seconds(method, together, 0.2, overlap=False) == pytest.approx(0.2 + c + 4 * another)
    assert step_seconds(method, network, 0.2, overlap=False) == pytest.approx(0.2 + 5 * c)
    late = together.slower(3.0)
    assert late.together == Curve((each, 2 * each), (several, several + 3 * several))
    assert step_seconds(SIGN, together, 0.2) == step_seconds(SIGN, network, 0.2)  # its messages are not all-reduced


def test_overlap_hides_all_but_the_last_bucket() -> None:
    fast, slow = at(1e12, 1e-6), at(1e7)
    c = bucket_seconds(PLAIN, fast)
    assert step_seconds(PLAIN, fast, 1.0) == pytest.approx(1.0 + c)  # each ends before the next is ready
    c = bucket_seconds(PLAIN, slow)
    hidden = BACKWARD * 1.0 / 2  # the network begins with the first bucket, half way through the backward
    assert step_seconds(PLAIN, slow, 1.0) == pytest.approx(1.0 + 2 * c - hidden)
    late = replace(PLAIN, overlaps=False)
    assert step_seconds(late, slow, 1.0) == 1.0 + 2 * c


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("method", [PLAIN, SIGN, LOCAL, replace(SIGN, strategy="replicated")], ids=str)
def test_a_slower_or_later_network_never_makes_a_step_shorter(method: Method, overlap: bool) -> None:
    rates, delays = [10.0**n for n in range(12, 5, -1)], [0.0, 1e-5, 1e-3, 1e-1]
    by_rate = [step_seconds(method, at(r), 0.1, overlap=overlap) for r in rates]
    by_delay = [step_seconds(method, at(1e9, t), 0.1, overlap=overlap) for t in delays]
    assert by_rate == sorted(by_rate) and by_delay == sorted(by_delay)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seen", [1e8, 1e10, 1e12])
def test_at_the_break_even_both_steps_are_equally_long(seen: float, overlap: bool) -> None:
    even = break_even_bits_per_s(SIGN, PLAIN, at(seen), 0.1, overlap=overlap)
    sign, plain = (step_seconds(m, at(even), 0.1, overlap=overlap) for m in (SIGN, PLAIN))
    assert sign == pytest.approx(plain, rel=1e-9)  # 80 halvings of the logarithm of the rate
    below, above = (
        step_seconds(PLAIN, at(r), 0.1, overlap=overlap) - step_seconds(SIGN, at(r), 0.1, overlap=overlap)
        for r in (even / 2, even * 2)
    )
    assert below > 0 > above


def test_a_break_even_at_no_rate_and_at_every_rate() -> None:
    more = replace(PLAIN, dense_bytes=8.0 * D)
    assert break_even_bits_per_s(more, PLAIN, at(1e9), 0.1) == 0.0
    free = replace(PLAIN, dense_bytes=2.0 * D, kernels_s=-0.01)
    assert math.isinf(break_even_bits_per_s(free, PLAIN, at(1e9), 0.1, overlap=False))


def test_buckets() -> None:
    first, others = (1 << 20) // 4, 25 * (1 << 20) // 4
    assert [buckets_of(n) for n in (1, first, first + 1, first + others, first + others + 1)] == [1, 1, 2, 2, 3]
    assert buckets_of(10**11) == 15260
