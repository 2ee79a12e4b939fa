"""ModelAverager in torch's own places, with every protocol: against the operators, and training real models."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from support.protocols import expected
from support.ranks import RankPool
from support.training import batch, flat, make_net

pytestmark = pytest.mark.slow

PROTOCOLS = [
    saef.LocalStep(3),
    saef.AllReduce(1),
    saef.Rotating(4),
    saef.Slack(0.2),
    saef.Ring(),
    saef.AsyncRing(6, period=2),
    saef.Gossip([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5]]),
]


def local_step(net: nn.Module, optimizer: Any, rank: int, t: int) -> None:
    x, y = batch(rank, t)
    optimizer.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()


def train(group: dist.ProcessGroup, protocol: saef.Averaging, steps: int, how: str) -> Any:
    rank, net = dist.get_rank(group), make_net()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    averager = saef.ModelAverager(protocol, process_group=group)
    if how == "PostLocalSGDOptimizer":
        optimizer = PostLocalSGDOptimizer(optimizer, averager)
    for t in range(steps):
        local_step(net, optimizer, rank, t)
        if how == "parameters":
            averager.average_parameters(net.parameters())
        elif how == "param_groups":
            averager.average_parameters(optimizer.param_groups)
    assert averager.step == steps
    return flat(net), averager.sent_bytes


def by_operators(protocol: saef.Averaging, K: int, steps: int) -> Tensor:
    """The same with all workers in one process: local steps, then the operators of step t on the rows."""
    nets = [make_net() for _ in range(K)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for t in range(steps):
        for k in range(K):
            local_step(nets[k], optimizers[k], k, t)
        X = one_step(protocol, torch.stack([flat(net) for net in nets]), t)
        for net, x in zip(nets, X, strict=True):
            nn.utils.vector_to_parameters(x, net.parameters())
    return torch.stack([flat(net) for net in nets])


def one_step(protocol: saef.Averaging, X: Tensor, t: int) -> Tensor:
    """The rows of X after the operators of step t."""
    X, due = X.clone(), protocol.due(t, X.shape[1])
    for M in protocol.step_operators(t, len(X)) if due.stop > due.start else []:
        X[:, due] = torch.from_numpy(M.matrix(len(X))) @ X[:, due]
    return X


# float64; 16 local steps, at least four of each period, on numbers of order 1, each amplifying roundings of 1e-16 by at
# most 1 / (1 - mu) = 10
@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: str(p)[:24])
def test_training_equals_the_operators(pool: RankPool, protocol: saef.Averaging) -> None:
    want = by_operators(protocol, 4, 16)
    for how in ("parameters", "param_groups", "PostLocalSGDOptimizer"):
        runs = pool.run(train, protocol, 16, how)
        torch.testing.assert_close(torch.stack([x for x, _ in runs]), want, rtol=0, atol=1e-12)
        assert all(sent > 0 for _, sent in runs)
    initial = flat(make_net())
    assert (want - initial).norm(dim=1).min() > 0.1  # it has gone somewhere


def beside_torch(group: dist.ProcessGroup, steps: int) -> tuple[Tensor, Tensor]:
    """LocalStep(4) and torch's PeriodicModelAverager(4), which averages in its first call and every fourth."""
    found = []
    for averager in (
        saef.ModelAverager(saef.LocalStep(4), process_group=group),
        PeriodicModelAverager(4, warmup_steps=3, process_group=group),
    ):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for t in range(steps):
            local_step(net, optimizer, dist.get_rank(group), t)
            averager.average_parameters(net.parameters())
        found.append(flat(net))
    return found[0], found[1]


def test_it_does_what_torchs_does(pool: RankPool) -> None:
    for ours, theirs in pool.run(beside_torch, 13):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def post_local_sgd(group: dist.ProcessGroup) -> tuple[list[Tensor], Tensor, int]:
    """Torch's whole recipe: gradients all-reduced by DDP for 5 steps, then local steps and a ring."""
    alone = [dist.new_group([k]) for k in range(4)]
    rank, net = dist.get_rank(group), make_net()
    model = DDP(net, process_group=group)
    model.register_comm_hook(PostLocalSGDState(group, alone[rank], 5), post_localSGD_hook)
    averager = saef.ModelAverager(saef.Ring(), warmup_steps=5, process_group=group)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), averager)
    for t in range(5):
        local_step(model, optimizer, rank, t)
    together = [torch.empty_like(flat(net)) for _ in range(4)]
    dist.all_gather(together, flat(net), group=group)
    local_step(model, optimizer, rank, 5)
    return together, flat(net), averager.step


def test_post_local_sgd_with_a_warm_up(pool: RankPool) -> None:
    """Equal weights until the warm-up ends; then a local step from there, and one round on the ring."""
    runs = pool.run(post_local_sgd)
    same = runs[0][0][0]
    assert all(torch.equal(same, x) for together, _, _ in runs for x in together)
    stepped = []
    for k in range(4):
        net = make_net()
        nn.utils.vector_to_parameters(same.clone(), net.parameters())
        local_step(net, torch.optim.SGD(net.parameters(), lr=0.1), k, 5)
        stepped.append(flat(net))
    for k, (_, x, step) in enumerate(runs):
        near = [stepped[(k + j) % 4] for j in (-1, 0, 1)]
        torch.testing.assert_close(x, sum(near) / 3, rtol=0, atol=1e-14)
        assert step == 6


def resumed(group: dist.ProcessGroup, protocol: saef.Averaging, stop: int) -> Tensor:
    rank, net = dist.get_rank(group), make_net()
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), saef.ModelAverager(protocol, process_group=group)
    )
    for t in range(stop):
        local_step(net, optimizer, rank, t)
    weights, saved = {n: v.clone() for n, v in net.state_dict().items()}, optimizer.state_dict()
    again = make_net()
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9), saef.ModelAverager(protocol, process_group=group)
    )
    again.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    for t in range(stop, 16):
        local_step(again, optimizer, rank, t)
    return flat(again)


@pytest.mark.parametrize("protocol", [saef.LocalStep(4), saef.Rotating(4), saef.AsyncRing(3)], ids=repr)
def test_a_resumed_run_goes_on_bit_for_bit(pool: RankPool, protocol: saef.Averaging) -> None:
    whole = [x for x, _ in pool.run(train, protocol, 16, "PostLocalSGDOptimizer")]
    for a, b in zip(whole, pool.run(resumed, protocol, 7), strict=True):
        assert torch.equal(a, b)


def mixed(group: dist.ProcessGroup) -> list[Tensor]:
    rank = dist.get_rank(group)
    params = [
        nn.Parameter(torch.full((3,), 1.0 + rank)),
        nn.Parameter(torch.full((2, 2), float(rank), dtype=torch.float64)),
        nn.Parameter(torch.full((4,), 1.0 + rank / 64, dtype=torch.bfloat16)),
        nn.Parameter(torch.full((2,), float(rank)), requires_grad=False),
    ]
    averager = saef.ModelAverager(saef.AllReduce(1), process_group=group)
    averager.average_parameters(params)
    return [p.detach() for p in params]


def test_dtypes_are_kept_and_frozen_parameters_left_alone(pool: RankPool) -> None:
    for rank, (a, b, c, d) in enumerate(pool.run(mixed)):
        assert torch.equal(a, torch.full((3,), 2.5)) and torch.equal(b, torch.full((2, 2), 1.5, dtype=torch.float64))
        mean = torch.tensor([1 + r / 64 for r in range(4)]).to(torch.bfloat16).float().mean()
        assert torch.equal(c, mean.to(torch.bfloat16).expand(4)) and c.dtype == torch.bfloat16
        assert torch.equal(d, torch.full((2,), float(rank)))


def complex_mean(group: dist.ProcessGroup) -> Tensor:
    p = nn.Parameter(torch.full((2,), (1 + 2j) * dist.get_rank(group)))
    saef.ModelAverager(saef.AllReduce(1), process_group=group).average_parameters([torch.view_as_real(p)])
    return p.detach()


def test_complex_parameters_are_averaged_as_their_real_view(pool: RankPool) -> None:
    for found in pool.run(complex_mean):
        assert torch.equal(found, torch.full((2,), 1.5 + 3j))


def refuse(group: dist.ProcessGroup, case: str) -> str:
    rank = dist.get_rank(group)
    make = partial(saef.ModelAverager, process_group=group)
    try:
        protocol: Any = {
            "server": saef.AsyncParameterServer(),
            "workers": saef.Gossip([[0.5, 0.5], [0.5, 0.5]]),
            "class": saef.Ring,
            "differ": saef.LocalStep(2 + rank),
            "warm-up": saef.Ring(),
            "nothing": saef.Ring(),
            "complex": saef.Ring(),
        }[case]
        averager = make(protocol, warmup_steps=-1 if case == "warm-up" else 0)
        params = {"differ": [torch.zeros(3)], "complex": [torch.zeros(2), torch.zeros(3, dtype=torch.complex64)]}
        averager.average_parameters([nn.Parameter(x) for x in params.get(case, [])])
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    "case, message",
    [
        ("server", "train with saef.ParameterServer"),
        ("workers", "weights are for 2 workers, and there are 4"),
        ("class", "protocol must be e.g. saef.LocalStep(4)"),
        ("differ", "rank 0 has LocalStep(period=2), rank 1 has LocalStep(period=3)"),
        ("warm-up", "warmup_steps must be an integer of at least 0"),
        ("nothing", "must be on one device, got []"),
        ("complex", "must be real, got torch.complex64: give torch.view_as_real(p) in its place"),
    ],
)
def test_bad_input(pool: RankPool, case: str, message: str) -> None:
    for said in pool.run(refuse, case):
        assert message in said


def test_one_step_is_that_of_the_events() -> None:
    """`one_step`, which goes step by step, and `protocols.expected`, event by event, are two ways to the same."""
    X = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for protocol in PROTOCOLS:
        Y = X
        for t in range(4):
            Y = one_step(protocol, Y, t)
        torch.testing.assert_close(Y, expected(protocol, X, 4), rtol=0, atol=1e-14)
