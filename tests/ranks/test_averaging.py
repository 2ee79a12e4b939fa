"""Protocols on real ranks, and SAEF's errors under them."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import saef
from saef.comm.torch_transport import TorchTransport
from support import reference
from support.cases import close, start
from support.protocols import ERRORS, PER_WORKERS, PROTOCOLS, TORUS, expected, meetings_of
from support.ranks import RankPool
from support.training import Job, gradient, train

pytestmark = pytest.mark.slow


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


# Rows of numbers of order 1 are combined with weights that sum to 1: each event rounds to 1e-16, and 8 ranks have 40.
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_ranks_do_equals_the_operators(pool: RankPool, eight: RankPool, ranks: int) -> None:
    protocols = PER_WORKERS.get(ranks, PROTOCOLS)
    X, steps = torch.randn(ranks, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 5
    runs = (eight if ranks > 4 else pool).run(execute, protocols, X, steps, ranks=ranks)
    for i, protocol in enumerate(protocols):
        after = torch.stack([run[i][0] for run in runs])
        assert not torch.equal(after, X)
        torch.testing.assert_close(after, expected(protocol, X, steps), rtol=0, atol=1e-12)
        if protocol.preserves_mean(ranks - protocol.parameter_servers):
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


def late(group: dist.ProcessGroup, seed: int) -> Tensor:
    """Rank 3 begins its step when rank 1 says that it has finished the same step."""
    transport, rank = TorchTransport(group, torch.device("cpu")), dist.get_rank(group)
    v, token = torch.full((3,), float(rank), dtype=torch.float64), torch.zeros(1)
    if rank == 3:
        dist.recv(token, 1, group=group)
    transport.call(lambda: saef.AsyncRing(seed).average(0, v, transport))
    if rank == 1:
        dist.send(token, 3, group=group)
    return v


def waits_for_3(seed: int) -> set[int]:
    """Who meets rank 3 in step 0, or somebody who has to wait for it."""
    waiting = {3}
    for pair in meetings_of(seed)(0, 4):
        if waiting & set(pair):
            waiting |= set(pair)
    return waiting


def test_async_ring_waits_for_no_one_but_partners(pool: RankPool) -> None:
    """With a barrier in it, ranks 1 and 3 would wait for each other until the timeout."""
    met = {s: {k for pair in meetings_of(s)(0, 4) for k in pair} for s in range(100)}
    seed = next(s for s in range(100) if 1 in met[s] and 3 in met[s] and 1 not in waits_for_3(s))
    X = torch.arange(4, dtype=torch.float64)[:, None].expand(4, 3).clone()
    after = torch.stack(pool.run(late, seed))
    torch.testing.assert_close(after, expected(saef.AsyncRing(seed), X, 1), rtol=0, atol=1e-15)
    assert not torch.equal(after[1], X[1])  # it has met somebody


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


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("protocol, oracle", ERRORS, ids=[str(p) for p, _ in ERRORS])
def test_saef_with_it_equals_the_reference(
    pool: RankPool, protocol: saef.Averaging, oracle: Any, exchange: str
) -> None:
    """DDP with top-k, or with sign; also the invariant: x~ moves by -eta mean_k u_k whatever averages the errors."""
    compressor = saef.TopK(0.1, block="layer") if exchange == "replicated" else saef.ScaledSign(block=7)
    C, block = (reference.top_k(0.1), "layer") if exchange == "replicated" else (reference.scaled_sign, 7)
    settings = reference.Settings(C, block=block, averaging=oracle, momentum=0.9)
    job = Job(state={"compressor": compressor, "averaging": protocol, "exchange": exchange}, groups=[{"momentum": 0.9}])
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
