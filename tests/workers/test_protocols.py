"""Protocols without ranks: their operators by hand, and what they refuse."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import saef
from saef.protocols.operators import Links, Mean
from support.protocols import PER_WORKERS, PROTOCOLS, TORUS, first, meetings_of

IDENTITY = np.eye(3)
# Eigenvalues 1, 1, 1/2, 1/4, with one eigenvector of 1: states grow without end. numpy finds 1 - 6e-8 and 1 + 6e-8
DEFECTIVE = np.array([[24, -5, -17, 2], [44, -10, -38, 8], [22, -5, -15, 2], [50, -14, -44, 12]]) / 4


def test_synchronous_protocols_act_in_the_last_event_of_a_round_that_is_due() -> None:
    third = np.full((3, 3), 1 / 3)
    for protocol, due, M in [
        (saef.AllReduce(2), {5, 11}, third),
        (saef.LocalStep(2), {5, 11}, third),
        (saef.Slack(0.25, period=2), {5, 11}, 0.75 * IDENTITY + 0.25 * third),
        (saef.Ring(), {2, 5, 8, 11}, third),
        (saef.Gossip([[0.8, 0.2, 0], [0.2, 0.6, 0.2], [0, 0.2, 0.8]], 4), {11}, [[4, 1, 0], [1, 3, 1], [0, 1, 4]]),
    ]:
        scale = 5 if isinstance(protocol, saef.Gossip) else 1
        for t, found in enumerate(first(protocol, 3, 12)):
            np.testing.assert_allclose(scale * found, np.asarray(M) if t in due else scale * IDENTITY, atol=1e-15)


def test_rotating_averages_each_slice_in_its_own_round() -> None:
    for part in range(3):
        for t, found in enumerate(first(saef.Rotating(3), 2, 12, part)):
            expected = np.full((2, 2), 0.5) if t % 6 == 2 * part + 1 else np.eye(2)
            np.testing.assert_allclose(found, expected)


def test_the_ring_of_five_and_of_two() -> None:
    M = first(saef.Ring(), 5, 5)[4]
    expected = [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    np.testing.assert_allclose(3 * M, expected)
    np.testing.assert_allclose(first(saef.Ring(), 2, 2)[1], np.full((2, 2), 0.5))


def test_metropolis_weights() -> None:
    """The ring's are Ring's; a star's centre hears of all; both are symmetric whatever the degrees."""
    for n in (2, 3, 7):
        ring = saef.Gossip.metropolis([(k, (k + 1) % n) for k in range(n)], period=2)
        assert ring.period == 2
        for ours, known in zip(first(ring, n, 2 * n), first(saef.Ring(2), n, 2 * n), strict=True):
            np.testing.assert_allclose(ours, known, atol=1e-15)
    star = saef.Gossip.metropolis([(0, 1), (2, 0), (0, 3), (1, 0)])
    np.testing.assert_allclose(4 * np.array(star.weights), [[1, 1, 1, 1], [1, 3, 0, 0], [1, 0, 3, 0], [1, 0, 0, 3]])
    assert star.preserves_mean(4)


def test_async_ring_averages_one_pair_of_neighbours_an_event_each_as_often_and_by_its_seed() -> None:
    met: Counter[tuple[int, ...]] = Counter()
    events = 6000
    for M in first(saef.AsyncRing(3), 6, events):
        pair = tuple(np.flatnonzero(np.diag(M) != 1.0).tolist())
        i, j = pair
        assert (j - i) % 6 in (1, 5)
        expected = np.eye(6)
        expected[np.ix_(pair, pair)] = 0.5
        np.testing.assert_array_equal(M, expected)
        met[pair] += 1
    assert len(met) == 6  # each of the ring's edges, binomially: within 5 standard deviations
    assert max(abs(c - events / 6) for c in met.values()) < 5 * math.sqrt(events * 5 / 36)
    again = first(saef.AsyncRing(3), 6, 60)
    assert all((a == b).all() for a, b in zip(again, first(saef.AsyncRing(3), 6, 60), strict=True))
    assert not all((a == b).all() for a, b in zip(again, first(saef.AsyncRing(4), 6, 60), strict=True))
    # Ranks may have other versions of numpy: what is drawn must never change.
    assert [sorted(M.rows) for M in saef.AsyncRing(3).step_operators(5, 6)] == meetings_of(3)(5, 6)


def test_the_parameter_server_hands_its_state_to_one_random_worker_an_event() -> None:
    met: Counter[int] = Counter()
    for M in first(saef.AsyncParameterServer(1), 5, 5000):
        (worker,) = np.flatnonzero(np.diag(M) != 1.0)
        expected = np.eye(6)
        expected[worker] = np.eye(6)[0]
        np.testing.assert_array_equal(M, expected)
        met[worker] += 1
    assert sorted(met) == [1, 2, 3, 4, 5]
    assert max(abs(c - 1000) for c in met.values()) < 5 * math.sqrt(5000 * 4 / 25)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_assumption_1_holds_and_the_mean_is_preserved_by_all_that_say_so(n: int) -> None:
    for protocol in PER_WORKERS[n]:
        M_inf = np.outer(np.ones(n + protocol.parameter_servers), protocol.consensus(n))
        np.testing.assert_allclose(M_inf @ M_inf, M_inf, atol=1e-14)
        preserved = True
        for part in range(protocol.parts):
            for M in first(protocol, n, 6 * n, part):
                np.testing.assert_allclose(M @ M_inf, M_inf, atol=1e-14)
                np.testing.assert_allclose(M_inf @ M, M_inf, atol=1e-14)
                preserved &= bool(np.abs(M.sum(0) - 1).max() < 1e-14)
        assert protocol.preserves_mean(n) == preserved, protocol
        loses = isinstance(protocol, saef.AsyncParameterServer) or (
            isinstance(protocol, saef.Gossip) and protocol.weights[-1] == (0.5, 0.5)
        )
        assert preserved != loses, protocol


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: saef.AllReduce(0), ValueError, "period must be at least 1"),
        (lambda: saef.LocalStep(0), ValueError, "period must be at least 1"),
        (lambda: saef.LocalStep(1.5), TypeError, "must be an integer"),
        (lambda: saef.Ring(-1), ValueError, "period must be at least 1"),
        (lambda: saef.Ring(True), TypeError, "must be an integer"),
        (lambda: saef.AsyncRing(period=0), ValueError, "period must be at least 1"),
        (lambda: saef.AsyncRing(-1), ValueError, "seed must be at least 0"),
        (lambda: saef.AsyncRing(2**64), ValueError, "seed must be below"),
        (lambda: saef.AsyncRing("a"), TypeError, "seed must be an integer"),
        (lambda: saef.AsyncParameterServer(1.0), TypeError, "seed must be an integer"),
        (lambda: saef.Slack(0), ValueError, r"gamma must be in \(0, 1\]"),
        (lambda: saef.Slack(-0.1), ValueError, "gamma must be in"),
        (lambda: saef.Slack(1.01), ValueError, "past the mean"),
        (lambda: saef.Slack(math.nan), ValueError, "gamma must be in"),
        (lambda: saef.Slack("0.1"), TypeError, "gamma must be a number"),
        (lambda: saef.Slack(True), TypeError, "gamma must be a number"),
        (lambda: saef.Slack(0.5, 0), ValueError, "period must be at least 1"),
        (lambda: saef.Gossip([[1.0]]), ValueError, "K >= 2"),
        (lambda: saef.Gossip([[0.5, 0.5]]), ValueError, "K rows of K"),
        (lambda: saef.Gossip([[0.5, math.nan], [0.5, 0.5]]), ValueError, "finite"),
        (lambda: saef.Gossip([[0.5, 0.5], [0.5]]), ValueError, "K rows of K"),
        (lambda: saef.Gossip([["a", 0.5], [0.5, 0.5]]), ValueError, "K rows of K"),
        (lambda: saef.Gossip([[0.5, 0.4], [0.5, 0.5]]), ValueError, "row 0 of weights sums to 0.9"),
        (lambda: saef.Gossip(np.eye(3)), ValueError, r"not connected: workers \[1, 2\]"),
        (lambda: saef.Gossip(np.kron(np.eye(2), np.full((2, 2), 0.5))), ValueError, r"not connected: workers \[2, 3\]"),
        (lambda: saef.Gossip([[0, 1], [1, 0]]), ValueError, "second eigenvalue of weights is 1"),
        (lambda: saef.Gossip.metropolis([(0, 1), (2, 3)]), ValueError, r"not connected: workers \[2, 3\]"),
        (lambda: saef.Gossip.metropolis([(0, 1), (1, 3)]), ValueError, r"not connected: workers \[2\]"),
        (lambda: saef.Gossip.metropolis([(0, 0)]), ValueError, "pairs of different workers"),
        (lambda: saef.Gossip.metropolis([(-1, 0)]), ValueError, "numbered from 0"),
        (lambda: saef.Gossip.metropolis([]), ValueError, "pairs of different workers"),
        (lambda: saef.Gossip(TORUS, 0), ValueError, "period must be at least 1"),
        (lambda: saef.Gossip(DEFECTIVE), ValueError, "second eigenvalue of weights is 1 "),
        (lambda: saef.Gossip([["0.5", "0.5"], ["0.5", "0.5"]]), ValueError, "K rows of K numbers: got strings"),
        (lambda: saef.Gossip(np.array([[0.5 + 1j, 0.5 - 1j], [0.5, 0.5]])), TypeError, "real numbers, got complex128"),
        (lambda: saef.Gossip(torch.full((2, 2), 0.5, requires_grad=True)), ValueError, r"K rows of K .*detach\(\)"),
        (lambda: saef.Gossip.metropolis([(0, 1.5)]), TypeError, "edges must be pairs of integers.*'float'"),
        (lambda: saef.Gossip.metropolis([(0, math.nan)]), TypeError, "edges must be pairs of integers.*'float'"),
        (lambda: saef.Gossip.metropolis(["01"]), TypeError, "edges must be pairs of integers.*'str'"),
        (lambda: saef.Gossip.metropolis([(False, True)]), TypeError, "edges must be pairs of integers"),
        (lambda: saef.Gossip.metropolis([(0, 1, 1)]), ValueError, "pairs of different workers"),
        (
            lambda: saef.Gossip.metropolis([(0, 10**6)]),
            ValueError,
            r"workers \[1, 2, 3, 4, 5\] are on no edge \(999999 of 1000001 are not\)",
        ),
        (lambda: saef.Rotating(3).events(2, part=7), ValueError, "part must be below 3, .*, got 7"),
        (lambda: saef.Rotating(3).events(2, part=-1), ValueError, "part must be at least 0, got -1"),
        (lambda: saef.Rotating(3).operators(2, part=1.0), TypeError, "part must be an integer, got 1.0"),
        (lambda: saef.Ring().events(2, part=1), ValueError, "part must be below 1"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_second_eigenvalue_that_is_all_but_1_is_told_from_1() -> None:
    """Slow weights are taken, and those that never mix are not, however their eigenvalues of 1 are rounded."""
    for gap in (1e-2, 1e-6):
        saef.Gossip([[1 - gap / 2, gap / 2], [gap / 2, 1 - gap / 2]])
    rng = np.random.default_rng(0)
    for _ in range(50):
        basis = rng.normal(size=(4, 4))
        basis[:, 0] = 1.0
        jordan = np.diag([1.0, 1.0, 0.3, 0.2]) + np.eye(4, k=1) * [0, 1, 0, 0]
        W = basis @ jordan @ np.linalg.inv(basis)
        with pytest.raises(ValueError, match="never come nearer"):
            saef.Gossip(W + np.diag(1 - W.sum(1)))


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_one_worker_has_nobody_to_average_with(protocol: saef.Averaging) -> None:
    alone = 1 - protocol.parameter_servers
    with pytest.raises(ValueError, match=r"nobody to average with|needs a worker"):
        protocol.operators(alone)


def test_descriptions_are_values() -> None:
    assert saef.Gossip([[0.5, 0.5], [0.5, 0.5]]) == saef.Gossip(np.full((2, 2), 0.5))
    assert hash(saef.Gossip(TORUS)) == hash(saef.Gossip(TORUS.tolist()))
    assert replace(saef.AsyncRing(3, 5), seed=4) == saef.AsyncRing(4, 5)
    assert saef.AllReduce(2) != saef.LocalStep(2) and repr(saef.LocalStep(2)) == "LocalStep(period=2)"
    assert Mean().preserves_mean(3) and not Links({0: {1: 1.0}}).preserves_mean(3)
