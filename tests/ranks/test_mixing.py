"""Mixing time: known values, operators against live groups, and MixML's bounds against what happens."""

import copy
import math
import pickle
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import saef
from saef.comm.torch_transport import TorchTransport
from saef.protocols.bounds import corollary_1, lemma_1, theorem_1
from saef.protocols.mixing import estimate_mixing_time, mixing_time, stationary_distance
from support.protocols import PER_WORKERS, PROTOCOLS, TORUS
from support.ranks import RankPool

pytestmark = pytest.mark.slow

# -- known values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8, 32, 64])
def test_what_reaches_consensus_at_once_mixes_when_its_turn_comes(n: int) -> None:
    assert mixing_time(saef.AllReduce(1), n) == n
    assert mixing_time(saef.AllReduce(7), n) == 7 * n
    assert mixing_time(saef.LocalStep(2), n) == 2 * n
    assert mixing_time(saef.Rotating(7), n) == 7 * n
    assert mixing_time(saef.Slack(1), n) == n
    assert mixing_time(saef.Slack(1, period=4), n) == 4 * n


@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.3, 0.1, 0.017, 1e-2, 1e-3, 1e-4])
def test_slack(gamma: float) -> None:
    for n in (2, 5):
        rounds = math.ceil(math.log(2) / -math.log1p(-gamma))
        assert mixing_time(saef.Slack(gamma), n) == n * rounds
    if gamma <= 1e-2:
        assert n * rounds == pytest.approx(n * math.log(2) / gamma, rel=0.01)


def test_the_symmetric_ring() -> None:
    for n, known in [(2, 2), (3, 3), (4, 4), (8, 32), (16, 224), (32, 1728)]:
        assert mixing_time(saef.Ring(), n) == known
        assert mixing_time(saef.Ring(period=3), n) == 3 * known
    for n in (5, 7, 12, 40):
        second = max(abs(1 + 2 * math.cos(2 * math.pi * j / n)) / 3 for j in range(1, n))
        assert mixing_time(saef.Ring(), n) == n * math.ceil(math.log(2) / -math.log(second))


def test_a_graph() -> None:
    """From the second singular value, where singular vectors of powers are those of W: W is normal."""
    spectrum = np.sort(np.linalg.svd(TORUS)[1])[-2]
    assert mixing_time(saef.Gossip(TORUS), 8) == 8 * math.ceil(math.log(2) / -math.log(spectrum))
    ring = saef.Gossip([[1 / 3 if (i - j) % 6 in (0, 1, 5) else 0 for j in range(6)] for i in range(6)])
    assert mixing_time(ring, 6) == mixing_time(saef.Ring(), 6)


def test_a_hypercube() -> None:
    """2^m workers with m neighbours each and weights 1 / (m + 1): the second eigenvalue is 1 - 2 / (m + 1)."""
    for m in (2, 3, 4):
        n = 2**m
        cube = saef.Gossip.metropolis([(k, k ^ (1 << b)) for k in range(n) for b in range(m)])
        assert mixing_time(cube, n) == n * math.ceil(math.log(2) / -math.log(1 - 2 / (m + 1)) - 1e-9)


@pytest.mark.parametrize("n", [1, 4, 16, 32])
def test_the_parameter_server_collects_coupons(n: int) -> None:
    """Mixed when every worker has had its turn: on average after n H_n events, variance below n^2 pi^2 / 6."""
    time = mixing_time(saef.AsyncParameterServer(), n, seeds=400)
    mean = n * sum(1 / k for k in range(1, n + 1))
    assert abs(time - mean) <= 4 * n * math.pi / math.sqrt(6) / math.sqrt(400)
    for seed in range(20):
        met, events = set(), 0
        for M in saef.AsyncParameterServer(seed).operators(n):
            met |= set(np.flatnonzero(np.diag(M) != 1.0).tolist())
            events += 1
            if len(met) == n:
                break
        assert time.events[seed] == events


def test_the_mean_and_the_spread_over_seeds() -> None:
    time = mixing_time(saef.AsyncRing(), 6, seeds=50)
    assert len(time.events) == 50 and time == sum(time.events) / 50
    assert min(time.events) <= time.quantile(0.1) <= time.quantile(0.5) <= time.quantile(0.9) <= max(time.events)
    assert time.quantile(0.5) in time.events
    assert mixing_time(saef.AsyncRing(seed=12345), 6, seeds=50).events == time.events  # the seeds are 0 to 49
    again = pickle.loads(pickle.dumps(copy.copy(time)))
    assert again == time and again.events == time.events
    assert mixing_time(saef.Ring(), 6).events == (mixing_time(saef.Ring(), 6),)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_half_is_reached_then_and_not_before(n: int) -> None:
    """The definition, by dense products and decompositions at every event."""
    for protocol in PER_WORKERS.get(n, PROTOCOLS):
        states = n + protocol.parameter_servers
        off = np.eye(states) - np.outer(np.ones(states), protocol.consensus(n))
        P = np.eye(states)
        norms = []
        for M in islice(protocol.operators(n), int(mixing_time(protocol, n, seeds=1))):
            P = M @ P
            norms.append(restricted(P @ off, off))
        seed = getattr(protocol, "seed", 0)
        if seed == 0 and protocol.parts == 1:  # mixing_time runs random ones from seed 0
            assert norms[-1] <= 0.5 + 1e-9 and all(norm > 0.5 for norm in norms[:-1]), protocol


def restricted(P: Any, off: Any) -> float:
    """max ||P z|| / ||z|| over z in the range of `off`."""
    vectors, sizes, _ = np.linalg.svd(off)
    return float(np.linalg.norm(P @ vectors[:, sizes > 1e-9], 2))


def test_the_worst_start_counts() -> None:
    """Right after an average a Rotating slice waits for a whole period; one that starts before it waits less."""
    assert mixing_time(saef.Rotating(3), 2) == 6
    norms = []
    for start in range(6):
        events = next(t for t, M in enumerate(islice(saef.AllReduce(3).operators(2), start, None), 1) if M[0, 1])
        norms.append(events)
    assert max(norms) == 6 and min(norms) == 1


def test_the_order_of_figure_3() -> None:
    """At n = 32. The paper draws AsyncDR above SyncDR. By events it is below from n = 16 on: docs/performance.md."""
    times = [
        mixing_time(protocol, 32, seeds=20)
        for protocol in (saef.AllReduce(1), saef.LocalStep(2), saef.AsyncParameterServer(), saef.AsyncRing())
    ]
    assert times == sorted(times) and times[-1] < mixing_time(saef.Ring(), 32)
    assert mixing_time(saef.AsyncRing(), 8, seeds=200) == pytest.approx(mixing_time(saef.Ring(), 8), rel=0.15)


# -- live -------------------------------------------------------------------------------------------------------------


def estimates(group: dist.ProcessGroup, protocols: list[saef.Averaging]) -> list[tuple[int, ...]]:
    return [estimate_mixing_time(protocol, group, seeds=5).events for protocol in protocols]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_live_estimates_equal_the_operators(pool: RankPool, eight: RankPool, ranks: int) -> None:
    protocols = [*PER_WORKERS.get(ranks, PROTOCOLS), saef.Slack(0.01)]
    for found in (eight if ranks > 4 else pool).run(estimates, protocols, ranks=ranks):
        for protocol, events in zip(protocols, found, strict=True):
            n = ranks - protocol.parameter_servers
            assert events == mixing_time(protocol, n, seeds=5).events, protocol


def alone(group: dist.ProcessGroup, protocol: saef.Averaging) -> str:
    try:
        estimate_mixing_time(protocol, group)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("protocol", [saef.AllReduce(1), saef.Ring(), saef.AsyncParameterServer()], ids=repr)
def test_a_group_of_one_is_refused(pool: RankPool, protocol: saef.Averaging) -> None:
    (said,) = pool.run(alone, protocol, ranks=1)
    assert "nobody to average with" in said or "needs a worker" in said


def distances(group: dist.ProcessGroup) -> tuple[float, float]:
    rank = dist.get_rank(group)
    mine = [torch.full((2, 3), float(rank)), torch.full((4,), -2.0 * rank, dtype=torch.float64)]
    return stationary_distance(mine, group), stationary_distance([torch.ones(3)], group)


def test_stationary_distance(pool: RankPool) -> None:
    """Ranks hold 6 times r and 4 times -2 r: the variance of r, 5/4 for 4 ranks, times 6 + 4 * 4."""
    for found in pool.run(distances, ranks=4):
        assert found == pytest.approx((22 * 1.25, 0.0))


def differing(group: dist.ProcessGroup, case: str) -> tuple[str, float]:
    """What is said if ranks differ, or hold what has no distance; and a distance after it: the group is as it was."""
    rank, said = dist.get_rank(group), "nothing was raised"
    calls: dict[str, Any] = {
        "protocol": lambda: estimate_mixing_time(saef.AllReduce(1 + rank), group),
        "seeds": lambda: estimate_mixing_time(saef.AsyncRing(), group, seeds=2 + rank),
        "one of them wrong": lambda: estimate_mixing_time(saef.AsyncRing(), group, seeds=rank),
        "class": lambda: estimate_mixing_time(saef.Ring, group),  # type: ignore[arg-type]
        "sizes": lambda: stationary_distance([torch.ones(3), torch.ones(rank)], group),
        "complex": lambda: stationary_distance([torch.ones(2), torch.ones(2) * 1j], group),
        "none": lambda: stationary_distance([], group),
    }
    try:
        calls[case]()
    except (TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, stationary_distance([torch.tensor([rank])], group)


@pytest.mark.parametrize(
    "case, message",
    [
        ("protocol", "protocol: rank 0 has AllReduce(period=1), rank 1 has AllReduce(period=2)"),
        ("seeds", "seeds: rank 0 has 2, rank 1 has 3"),
        ("one of them wrong", "seeds: rank 0 has 0, rank 1 has 1"),
        ("class", "TypeError: protocol must be e.g. saef.LocalStep(4)"),
        ("sizes", "the same number of entries on every rank, got: rank 0 has 3, rank 1 has 4, rank 2 has 5"),
        ("complex", "TypeError: tensors must be real, got torch.complex64: give torch.view_as_real(t)"),
        ("none", "tensors is empty"),
    ],
)
def test_what_differs_between_ranks_is_said_on_all_of_them(pool: RankPool, case: str, message: str) -> None:
    for said, distance in pool.run(differing, case, ranks=3):
        assert message in said and distance == pytest.approx(2 / 3)


def slack_distance(group: dist.ProcessGroup, dtype: torch.dtype, rounds: int) -> list[float]:
    transport = TorchTransport(group, torch.device("cpu"))
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    # Weights of order 1 that differ by 1e-5 between workers, as the paper saw
    x = torch.linspace(0.5, 1.0, 100, dtype=torch.float64)
    x = (x + 1e-5 * torch.randn(100, dtype=torch.float64, generator=generator)).to(dtype)
    found = [stationary_distance([x], group)]
    for _ in range(2):
        for t in range(rounds):
            transport.call(lambda t=t: saef.Slack(1e-4).average(t, x, transport))
        found.append(stationary_distance([x], group))
    return found


@pytest.mark.slow
def test_slack_loses_its_precision_in_float32(pool: RankPool) -> None:
    """MixML section 6: gamma times a distance of 1e-5 is 1e-9, and float32 resolves 3e-8 below 1: nothing moves."""
    start, half, end = pool.run(slack_distance, torch.float32, 100)[0]
    assert start == half == end > 0
    start, half, end = pool.run(slack_distance, torch.float64, 100)[0]
    shrinks = (1 - 1e-4) ** 200  # the squared distance in 100 rounds
    assert half == pytest.approx(shrinks * start, rel=1e-6) and end == pytest.approx(shrinks * half, rel=1e-6)


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8])
def test_lemma_1_holds_for_every_protocol(n: int) -> None:
    for protocol in PER_WORKERS[n]:
        if protocol.parts > 1:
            continue
        states = n + protocol.parameter_servers
        M_inf = np.outer(np.ones(states), protocol.consensus(n))
        time = mixing_time(protocol, n, seeds=20)
        t_mix, events = max(time.events), 6 * n * protocol.period
        P, norms, xi = np.eye(states), [], 1.0
        for M in islice(protocol.operators(n), events):
            P = M @ P
            xi = max(xi, float(np.linalg.norm(P, 2)), float(np.linalg.norm(M_inf, 2)))
            norms.append(float(np.linalg.norm(P - M_inf, 2)))
        if protocol.preserves_mean(n):
            assert xi <= 1 + 1e-12
        elif protocol.parameter_servers:
            assert xi <= math.sqrt(n + 1) + 1e-12
        for t, norm in enumerate(norms, 1):
            assert norm <= lemma_1(t, t_mix, norm=1.0, xi=xi) + 1e-12, (protocol, t)


def sgd(protocol: saef.Averaging, n: int, alpha: float, events: int, noise: float, seed: int) -> Tensor:
    """||grad f(x_t)||^2 at the consensus x_t of MixML eq. (1) with noisy gradients of f(x) = ||x - 1||^2, d = 3."""
    generator = torch.Generator().manual_seed(seed)
    X, squares = torch.zeros(n, 3, dtype=torch.float64), []
    operators = protocol.operators(n)
    for t in range(events):
        x = X.mean(0)
        squares.append((2 * (x - 1)).square().sum())
        k = t % n  # workers take turns
        g = 2 * (X[k] - 1) + noise / math.sqrt(3) * torch.randn(3, dtype=torch.float64, generator=generator)
        X[k] -= n * alpha * g  # the mean moves by alpha g
        X = torch.from_numpy(next(operators)) @ X
    return torch.stack(squares)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [saef.AllReduce(1), saef.AllReduce(3), saef.Ring(), saef.AsyncRing()], ids=repr)
def test_the_bounds_on_sgd_hold(protocol: saef.Averaging) -> None:
    """On a quadratic with known constants, mean of 8 runs. The state's update is n alpha, so t_mix counts with it."""
    n, noise, gap, events = 4, 1.0, 3.0, 2000
    t_mix = max(mixing_time(protocol, n).events) * n
    alpha = 0.9 / (8 * t_mix * 2)
    runs = torch.stack([sgd(protocol, n, alpha, events, noise, seed) for seed in range(8)])
    bound = theorem_1([alpha] * events, t_mix, smoothness=2.0, noise=noise, gap=gap)
    assert 0 < runs.mean() <= bound


def test_theorem_1_by_hand() -> None:
    """alpha = 0.01 twice, t_mix 3, L 2, sigma 5, gap 7, xi 1: c = 1 - 64 * 9 * 4 * 1e-4 = 0.7696."""
    found = theorem_1([0.01, 0.01], 3, smoothness=2, noise=5, gap=7)
    right = 2 * 7 + 25 * 2 * 2e-4 + 16 * 3 * 25 * 4 * 2e-6
    assert found == pytest.approx(right / (0.02 * 0.7696))
    with pytest.raises(ValueError, match=r"step sizes below .* = 0.0208, got 0.03"):
        theorem_1([0.03], 3, smoothness=2, noise=5, gap=7)


def test_corollary_1_follows_from_theorem_1() -> None:
    """With its step size Theorem 1 gives less, and a bound of the same leading term."""
    constants = {"smoothness": 3.0, "noise": 2.0, "gap": 5.0}
    for t_mix in (1.0, 4.0, 10.0):
        least = math.ceil(64 * 5 * 4 * t_mix**2 * 3 / 4)
        for events in (least, 2 * least):
            alpha, bound = corollary_1(events, t_mix, **constants)
            assert alpha == pytest.approx(math.sqrt(10) / (2 * math.sqrt(3 * events) + t_mix))
            assert theorem_1([alpha] * events, t_mix, **constants) <= bound
        with pytest.raises(ValueError, match=f"at least {least} events"):
            corollary_1(least - 1, t_mix, **constants)
    # communication is not in the leading term
    assert corollary_1(10**12, 80, **constants)[1] == pytest.approx(corollary_1(10**12, 1, **constants)[1], rel=1e-2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mixing_time(saef.AllReduce(1), 1), "among 1 worker has nobody"),
        (lambda: mixing_time(saef.AsyncParameterServer(), 0), "needs a worker"),
        (lambda: mixing_time(saef.Ring(), 2.5), "must be an integer, got 2.5"),
        (lambda: mixing_time(saef.Gossip(TORUS), 4), "weights are for 8 workers"),
        (lambda: mixing_time(saef.AsyncRing(), 4, seeds=0), "seeds must be at least 1"),
        (lambda: mixing_time(saef.Ring(), True), "must be an integer, got True"),
        (lambda: mixing_time(saef.Ring(), 2.0), "must be an integer, got 2.0"),
        (lambda: mixing_time("Ring", 3), "protocol must be e.g. .* got 'Ring'"),
        (lambda: mixing_time(None, 2), "protocol must be e.g. .* got None"),
        (lambda: mixing_time(saef.Ring, 3), "protocol must be e.g. .* got <class"),
        (lambda: mixing_time(saef.Ring(), 3, seeds=True), "seeds must be an integer, got True"),
        (lambda: mixing_time(saef.Ring(), 3, seeds=1.5), "seeds must be an integer, got 1.5"),
        (lambda: mixing_time(saef.AsyncRing(), 3, seeds=math.nan), "seeds must be an integer, got nan"),
        (lambda: saef.MixingTime([]), "events must be one number for each seed, got none"),
        (lambda: saef.MixingTime([3, math.nan]), "each of events must be an integer, got nan"),
        (lambda: saef.MixingTime([0]), "each of events must be at least 1"),
        (lambda: lemma_1(-1, 4), "must not be negative"),
        (lambda: lemma_1(math.nan, 4), "events must not be negative, and must be finite, got nan"),
        (lambda: lemma_1(math.inf, 4), "events must not be negative, and must be finite, got inf"),
        (lambda: lemma_1(10**400, 4), "events must not be negative, and must be finite, got 1"),
        (lambda: lemma_1(4, 4, norm=math.nan), "norm must not be negative, and must be finite, got nan"),
        (lambda: lemma_1(10, 0.5), "t_mix must be at least 1, a single event, got 0.5"),
        (lambda: lemma_1(10, math.inf), "t_mix must be positive and finite, got inf"),
        (lambda: lemma_1(10, 4, xi=0.5), "xi must be at least 1, .* got 0.5"),
        (lambda: theorem_1([0.1], 1, smoothness=1, noise=1, gap=1, xi=0.1), "xi must be at least 1"),
        (lambda: theorem_1([0.1], 0.1, smoothness=1, noise=1, gap=1), "t_mix must be at least 1"),
        (lambda: theorem_1([0.1], 1, smoothness=1, noise=math.nan, gap=1), "noise must not be negative, .* got nan"),
        (lambda: theorem_1([0.1], 1, smoothness=1, noise=1, gap=math.inf), "gap must be positive and finite, got inf"),
        (lambda: theorem_1([0.1], 1, smoothness=1, noise=1, gap=1, xi=1e200), "Theorem 1 needs step sizes below"),
        (lambda: corollary_1(10**6, 1, smoothness=1, noise=1, gap=1, xi=0.1), "xi must be at least 1"),
        (lambda: corollary_1(math.inf, 1, smoothness=1, noise=1, gap=1), "events must be positive and finite, got inf"),
        (lambda: corollary_1(100, 1, smoothness=1, noise=math.inf, gap=1), "noise must not be negative, .* got inf"),
        (lambda: corollary_1(100, 1, smoothness=1, noise=1, gap=math.inf), "gap must be positive and finite, got inf"),
        (lambda: corollary_1(100, 1e200, smoothness=1, noise=1, gap=1), "T of at least inf events"),
        (lambda: corollary_1(100, 1, smoothness=1, noise=1e-200, gap=1), "T of at least inf events"),
        (lambda: lemma_1(1, 0), "t_mix must be positive"),
        (lambda: theorem_1([], 1, smoothness=1, noise=1, gap=1), "must be positive"),
        (lambda: theorem_1([0.1, 0.2], 1, smoothness=0.1, noise=1, gap=1), "must not grow"),
        (lambda: theorem_1([0.1], 1, smoothness=1, noise=-1, gap=1), "noise must not be negative"),
        (lambda: corollary_1(100, 1, smoothness=0, noise=1, gap=1), "smoothness must be positive"),
        (lambda: corollary_1(100, 1, smoothness=1, noise=0, gap=1), "noise must be positive"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
