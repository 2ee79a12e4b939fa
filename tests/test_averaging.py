"""Protocols: their operators by hand, their execution on real ranks, and SAEF's errors under them."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import reference
import saef
from ranks import RankPool
from saef.operators import Links, Mean
from saef.transport import TorchTransport
from test_ddp import close, gradient, start
from training import Job, train

TORUS = np.zeros((8, 8))  # 2 x 4 workers, each linked to three others, not doubly symmetric weights
for _k in range(8):
    TORUS[_k, [_k, (_k + 1) % 4 + _k // 4 * 4, (_k - 1) % 4 + _k // 4 * 4, (_k + 4) % 8]] = [0.4, 0.3, 0.2, 0.1]

PROTOCOLS = [
    saef.AllReduce(1),
    saef.AllReduce(3),
    saef.LocalStep(2),
    saef.Rotating(3),
    saef.Slack(0.3),
    saef.Slack(1),
    saef.Slack(0.05, period=2),
    saef.Ring(),
    saef.Ring(period=2),
    saef.AsyncRing(),
    saef.AsyncRing(seed=7, period=2),
    saef.AsyncParameterServer(seed=5),
]
PER_WORKERS = {  # graphs are for one number of workers
    2: [*PROTOCOLS, saef.Gossip([[0.9, 0.1], [0.1, 0.9]]), saef.Gossip([[0.9, 0.1], [0.5, 0.5]])],
    4: [*PROTOCOLS, saef.Gossip([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5]])],
    8: [*PROTOCOLS, saef.Gossip(TORUS), saef.Gossip(TORUS, period=3)],
}
IDENTITY = np.eye(3)


def first(protocol: saef.Averaging, n: int, count: int, part: int = 0) -> list[Any]:
    return list(islice(protocol.operators(n, part), count))


# -- operators --------------------------------------------------------------------------------------------------------


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


def meetings_of(seed: int) -> Any:
    """AsyncRing's convention by hand: worker raw_i mod n of Philox(seed, t) meets its right neighbour."""

    def meetings(t: int, n: int) -> list[list[int]]:
        raw = np.random.Philox(key=np.array([seed, t], dtype=np.uint64)).random_raw(n)
        return [sorted((int(r) % n, (int(r) + 1) % n)) for r in raw.tolist()]

    return meetings


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
        M_inf = np.outer(np.ones(n + protocol.servers), protocol.consensus(n))
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


# -- on real ranks ----------------------------------------------------------------------------------------------------


def execute(group: dist.ProcessGroup, protocols: list[saef.Averaging], X: Tensor, steps: int) -> list[Any]:
    """Every protocol for some steps from row `rank` of X; the state after, and the bytes sent."""
    found = []
    for protocol in protocols:
        transport = TorchTransport(group, torch.device("cpu"))
        v = X[dist.get_rank(group)].clone()
        for t in range(steps):
            transport.call(partial(protocol.average, t, v[protocol.due(t, v.numel())], transport))
        found.append((v, dict(transport.sent_bytes)))
    return found


def expected(protocol: saef.Averaging, X: Tensor, steps: int) -> Tensor:
    """The same by the operators."""
    n, d, out = len(X) - protocol.servers, X.shape[1], X.numpy().copy()
    for part in range(protocol.parts):
        columns = slice(d * part // protocol.parts, d * (part + 1) // protocol.parts)
        for M in first(protocol, n, n * steps, part):
            out[:, columns] = M @ out[:, columns]
    return torch.from_numpy(out)


# Rows of numbers of order 1 are combined with weights that sum to 1: each event rounds to 1e-16, and 8 ranks have 40.
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_ranks_do_equals_the_operators(pool: RankPool, eight: RankPool, ranks: int) -> None:
    protocols = PER_WORKERS.get(ranks, PROTOCOLS)
    X, steps = torch.randn(ranks, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 5
    runs = (eight if ranks > 4 else pool).run(execute, protocols, X, steps, ranks=ranks)
    for i, protocol in enumerate(protocols):
        after = torch.stack([run[i][0] for run in runs])
        assert not torch.equal(after, X)
        torch.testing.assert_close(after, expected(protocol, X, steps), rtol=0, atol=1e-12)
        if protocol.preserves_mean(ranks - protocol.servers):
            torch.testing.assert_close(after.mean(0), X.mean(0), rtol=0, atol=1e-14)
        for rank, run in enumerate(runs):
            assert run[i][1].get("averaging", 0) == bytes_of(protocol, ranks, 101, steps)[rank], protocol


def bytes_of(protocol: saef.Averaging, ranks: int, d: int, steps: int) -> list[int]:
    """What each rank sends of d float64, by hand."""
    ring_all_reduce = [2 * (ranks - 1) * 8 * d // ranks] * ranks
    due = sum((t + 1) % protocol.period == 0 for t in range(steps))
    if isinstance(protocol, saef.Rotating):
        sizes = [d * (t % 3 + 1) // 3 - d * (t % 3) // 3 for t in range(steps)]
        return [sum(2 * (ranks - 1) * 8 * size // ranks for size in sizes)] * ranks
    if isinstance(protocol, saef.Ring):
        return [due * min(2, ranks - 1) * 8 * d] * ranks
    if isinstance(protocol, saef.AsyncRing):
        turns = [t for t in range(steps) if (t + 1) % protocol.period == 0]
        met = Counter(k for t in turns for pair in meetings_of(protocol.seed)(t, ranks) for k in pair)
        return [met[rank] * 8 * d for rank in range(ranks)]
    if isinstance(protocol, saef.AsyncParameterServer):
        return [steps * (ranks - 1) * 8 * d] + [0] * (ranks - 1)
    if isinstance(protocol, saef.Gossip):
        heard = np.count_nonzero(np.asarray(protocol.weights), axis=0) - (np.diag(protocol.weights) != 0)
        return [due * int(h) * 8 * d for h in heard]
    return [due * b for b in ring_all_reduce]


def peers(group: dist.ProcessGroup, protocol: saef.Averaging, steps: int) -> tuple[set[int], set[int], Counter[str]]:
    """The ranks this one sends to and hears from in some steps, and the collectives it takes part in."""
    transport = TorchTransport(group, torch.device("cpu"))
    real, to, sources, collectives = transport.group, set(), set(), Counter()

    class Watched:
        """Passes everything on to gloo."""

        def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
            to.add(rank)
            return real.send(tensors, rank, tag)

        def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
            sources.add(rank)
            return real.recv(tensors, rank, tag)

        def __getattr__(self, name: str) -> Any:
            collectives[name] += 1
            return getattr(real, name)

    transport.group = Watched()
    v = torch.zeros(10)
    for t in range(steps):
        transport.call(lambda t=t: protocol.average(t, v, transport))
    return to, sources, collectives


@pytest.mark.parametrize("protocol", [saef.Ring(), saef.AsyncRing(2)], ids=repr)
def test_rings_talk_to_their_neighbours_alone(eight: RankPool, protocol: saef.Averaging) -> None:
    for rank, (to, sources, collectives) in enumerate(eight.run(peers, protocol, 20, ranks=8)):
        assert to == sources == {(rank - 1) % 8, (rank + 1) % 8}
        assert not collectives


def same_bits(group: dist.ProcessGroup) -> Tensor:
    transport = TorchTransport(group, torch.device("cpu"))
    v = torch.randn(1000, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    transport.call(lambda: saef.Ring().average(0, v, transport))
    return v


def test_equal_rows_give_equal_bits_in_float32(pool: RankPool) -> None:
    """In a ring of three everybody takes the mean of the same states."""
    a, b, c = pool.run(same_bits, ranks=3)
    assert torch.equal(a, b) and torch.equal(b, c)


# -- SAEF with it -----------------------------------------------------------------------------------------------------

ERRORS = [
    (saef.Ring(), reference.ring),
    (saef.Ring(period=3), reference.every(3, reference.ring)),
    (saef.Slack(0.3), reference.slack(0.3)),
    (saef.AsyncRing(4), reference.pairs(meetings_of(4))),
    (saef.AsyncRing(9, period=2), reference.every(2, reference.pairs(meetings_of(9)))),
    (saef.LocalStep(4), ("allreduce", 4)),
]


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("protocol, oracle", ERRORS, ids=[str(p) for p, _ in ERRORS])
def test_saef_with_it_equals_the_reference(
    pool: RankPool, protocol: saef.Averaging, oracle: Any, exchange: str
) -> None:
    """60 steps of DDP with top-k; also the invariant: x~ moves by -eta mean_k u_k whatever averages the errors."""
    compressor = saef.TopK(0.1, block="layer") if exchange == "replicated" else saef.ScaledSign(block=7)
    C, block = (reference.top_k(0.1), "layer") if exchange == "replicated" else (reference.scaled_sign, 7)
    settings = reference.Settings(C, block=block, averaging=oracle, momentum=0.9)
    job = Job(
        state={"compressor": compressor, "averaging": protocol, "exchange": exchange}, groups=[{"momentum": 0.9}]
    )
    for ranks in (1, 2, 4):
        want, x, x_tilde = reference.run(settings, start(), gradient, job.lrs, ranks)
        runs = pool.run(train, job, ranks=ranks)
        for k, run in enumerate(runs):
            close(run["x"], x)
            close(run["e"], want.e[k])
        if exchange == "replicated":
            mean_e = sum(run["e"] for run in runs) / ranks
            close(runs[0]["x"][-1] - (runs[0]["e_server"] + mean_e), x_tilde[-1])


def construct(group: dist.ProcessGroup, protocol: saef.Averaging) -> str:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        saef.SAEFState(model, optimizer, averaging=protocol, process_group=group)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


LOPSIDED = saef.Gossip([[0.9, 0.1], [0.5, 0.5]])


@pytest.mark.parametrize(
    "protocol, ranks, message",
    [
        (saef.AsyncParameterServer(), 4, "AsyncParameterServer(seed=0) does not preserve the mean"),
        (saef.AsyncParameterServer(), 1, "does not preserve the mean"),
        (LOPSIDED, 2, "columns sum to 1"),
        (saef.Gossip(TORUS), 4, "weights are for 8 workers, and there are 4"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_errors_refuse_what_does_not_preserve_their_mean(
    pool: RankPool, protocol: saef.Averaging, ranks: int, message: str
) -> None:
    for said in pool.run(construct, protocol, ranks=ranks):
        assert message in said


# -- bad input --------------------------------------------------------------------------------------------------------


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
        (lambda: saef.Gossip(TORUS, 0), ValueError, "period must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_one_worker_has_nobody_to_average_with(protocol: saef.Averaging) -> None:
    alone = 1 - protocol.servers
    with pytest.raises(ValueError, match=r"nobody to average with|needs a worker"):
        protocol.operators(alone)


def test_descriptions_are_values() -> None:
    assert saef.Gossip([[0.5, 0.5], [0.5, 0.5]]) == saef.Gossip(np.full((2, 2), 0.5))
    assert hash(saef.Gossip(TORUS)) == hash(saef.Gossip(TORUS.tolist()))
    assert replace(saef.AsyncRing(3, 5), seed=4) == saef.AsyncRing(4, 5)
    assert saef.AllReduce(2) != saef.LocalStep(2) and repr(saef.LocalStep(2)) == "LocalStep(period=2)"
    assert Mean().preserves_mean(3) and not Links({0: {1: 1.0}}).preserves_mean(3)
