"""The asynchronous parameter server on real processes: replayed exactly, and surviving the death of workers."""

import os
import pickle
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import saef
from support.ranks import RankPool, context
from support.training import batch, flat, make_net

pytestmark = pytest.mark.slow

STEPS = 40  # pushes of each worker


def work(server: saef.ParameterServer, net: nn.Module, steps: range, pause_s: float = 0.0) -> list[int]:
    """A worker's loop; the versions that it pulled."""
    versions = []
    for t in steps:
        versions.append(server.pull())
        net.zero_grad()
        x, y = batch(server.rank, t % 4)
        nn.functional.mse_loss(net(x), y).backward()
        time.sleep(pause_s)
        server.push()
    return versions


def asynchronous(group: dist.ProcessGroup, adaptive: bool, steps: int) -> Any:
    net = make_net()
    server = saef.ParameterServer(net.parameters(), group)
    if not server.is_server:
        # Unequal workers, so that delays differ
        versions = work(server, net, range(steps), pause_s=0.002 * (server.rank - 1))
        server.leave()
        return versions
    seen = [flat(net)]
    optimizer = make_optimizer(net, adaptive)
    served = server.serve(optimizer, after_step=lambda version: seen.append(flat(net)))
    assert len(seen) == len(served.pushes) + 1
    return served, torch.stack(seen)


def make_optimizer(net: nn.Module, adaptive: bool) -> torch.optim.Optimizer:
    if adaptive:
        return saef.StochasticAdaptive(net.parameters(), lr=0.01)
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)


# float64; each of 120 steps is the same operations on the same numbers
@pytest.mark.parametrize("adaptive", [False, True], ids=["SGD", "AMSGrad"])
def test_a_run_is_replayed_from_its_log(pool: RankPool, adaptive: bool) -> None:
    """x_{t+1} = x_t - alpha delta(u_t) with u_t the x that the worker had pulled: MixML eq. (5)."""
    (served, x), *versions = pool.run(asynchronous, adaptive, STEPS)
    assert len(served.pushes) == 3 * STEPS and not served.lost and not served.skipped
    assert served.max_delay >= 1  # it was asynchronous
    net = make_net()
    optimizer, counts = make_optimizer(net, adaptive), {1: 0, 2: 0, 3: 0}
    for t, (k, before, after) in enumerate(served.pushes):
        assert after == t + 1 and versions[k - 1][counts[k]] == before <= t
        nn.utils.vector_to_parameters(x[before].clone(), net.parameters())
        net.zero_grad()
        inputs, targets = batch(k, counts[k] % 4)
        nn.functional.mse_loss(net(inputs), targets).backward()
        counts[k] += 1
        nn.utils.vector_to_parameters(x[t].clone(), net.parameters())
        optimizer.step()
        torch.testing.assert_close(flat(net), x[t + 1], rtol=0, atol=1e-14)
    assert set(counts.values()) == {STEPS}
    assert loss_at(x[-1]) < 0.7 * loss_at(x[0])


def loss_at(x: Tensor) -> float:
    net = make_net()
    nn.utils.vector_to_parameters(x, net.parameters())
    batches = [batch(k, t) for k in (1, 2, 3) for t in range(4)]
    return sum(nn.functional.mse_loss(net(a), b).item() for a, b in batches)


def bad_numbers(group: dist.ProcessGroup) -> Any:
    net = make_net()
    server = saef.ParameterServer(net.parameters(), group)
    if server.is_server:
        return server.serve(torch.optim.SGD(net.parameters(), lr=0.05)), flat(net)
    server.pull()
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan") if server.rank == 1 else 1.0)
    server.push()
    server.leave()
    return None


def test_a_gradient_that_is_not_finite_is_not_applied(pool: RankPool) -> None:
    served, x = pool.run(bad_numbers, ranks=3)[0]
    assert served.skipped == {1: 1} and [k for k, _, _ in served.pushes] == [2]
    torch.testing.assert_close(x, flat(make_net()) - 0.05)


def types(group: dist.ProcessGroup) -> Any:
    """bfloat16 parameters, one of them unused, beside float32 ones."""
    params = [
        nn.Parameter(torch.arange(4.0).bfloat16()),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(2).bfloat16()),
    ]
    server = saef.ParameterServer(params, group)
    if server.is_server:
        server.serve(torch.optim.SGD(params, lr=0.5))
    else:
        server.pull()
        params[0].grad, params[1].grad = torch.ones(4).bfloat16(), torch.full((3,), 2.0)
        server.push()
        server.pull()
        server.leave()
    return [p.detach() for p in params]


def test_half_precision_and_unused_parameters(pool: RankPool) -> None:
    for a, b, c in pool.run(types, ranks=2):
        assert torch.equal(a, (torch.arange(4.0) - 0.5).bfloat16())
        assert torch.equal(b, torch.zeros(3)) and torch.equal(c, torch.ones(2).bfloat16())


def misuse(group: dist.ProcessGroup, case: str) -> str:
    rank, net = dist.get_rank(group), make_net()
    server = None
    try:
        if case == "different parameters":
            saef.ParameterServer(list(net.parameters())[rank:], group)
            return "nothing was raised"
        if case in ("complex64", "int64"):
            saef.ParameterServer([*net.parameters(), torch.ones(2, dtype=getattr(torch, case))], group)
            return "nothing was raised"
        server = saef.ParameterServer(net.parameters(), group)
        if case == "sides":
            if server.is_server:
                server.pull()
            else:
                server.serve(torch.optim.SGD(net.parameters(), lr=0.1))
        elif case == "push first" and rank:
            server.push()
        elif case == "left" and server.is_server:
            server.serve(torch.optim.SGD(net.parameters(), lr=0.1))
        elif case == "left":
            server.leave()
            server.pull()
        elif case == "other optimizer" and server.is_server:
            server.serve(torch.optim.SGD(make_net().parameters(), lr=0.1))
        elif case == "optimizer raises" and server.is_server:
            server.serve(torch.optim.SGD(net.parameters(), lr=0.1), after_step=lambda version: 1 / 0)
        elif case == "optimizer raises":
            work(server, net, range(1))
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize(
    "case, on_server, on_worker",
    [
        ("sides", "rank 0 is the server: call serve()", "rank 1 is a worker: pull, push and leave"),
        ("push first", "nothing was raised", "pull() before the gradient"),
        ("left", "nothing was raised", "this worker has left"),
        ("different parameters", "rank 1 has", "rank 1 has"),
        ("complex64", *["TypeError: params must be real and floating, got torch.complex64"] * 2),
        ("int64", *["TypeError: params must be real and floating, got torch.int64"] * 2),
        ("other optimizer", "the optimizer must have the parameters", "nothing was raised"),
        ("optimizer raises", "ZeroDivisionError", "nothing was raised"),
    ],
)
def test_misuse(pool: RankPool, case: str, on_server: str, on_worker: str) -> None:
    said = pool.run(misuse, case, ranks=2)
    assert on_server in said[0] and on_worker in said[1], said


def alone(group: dist.ProcessGroup) -> str:
    try:
        saef.ParameterServer(make_net().parameters(), group)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_server_needs_workers(pool: RankPool) -> None:
    assert "at least 2 ranks" in pool.run(alone, ranks=1)[0]


# -- deaths: processes of their own -----------------------------------------------------------------------------------


def process(rank: int, world: int, folder: str, killed: tuple[int, ...], silent: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder, "store")), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=4 if silent else 60),
    )
    net = make_net()
    server = saef.ParameterServer(net.parameters())
    result: Any = None
    if server.is_server:
        try:
            dies = 0 in killed
            result = server.serve(
                torch.optim.SGD(net.parameters(), lr=0.05),
                after_step=lambda version: os.kill(os.getpid(), signal.SIGKILL) if dies and version == 10 else None,
            )
        except RuntimeError as error:
            result = str(error)
    else:
        try:
            result = work(server, net, range(5))
            if rank in killed:
                server.pull()
                os.kill(os.getpid(), signal.SIGKILL)
            if rank in silent:
                time.sleep(8)
            result += work(server, net, range(5, STEPS), pause_s=0.02)
            server.leave()
        except RuntimeError as error:
            result = str(error)
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)  # without waiting for anybody


def run_processes(killed: tuple[int, ...] = (), silent: tuple[int, ...] = (), world: int = 4) -> tuple[list[Any], Any]:
    """Each rank's result, None where there is none, and the exit codes."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context().Process(target=process, args=(r, world, folder, killed, silent)) for r in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        codes = [rank.exitcode for rank in ranks]
        files = [Path(folder, str(r)) for r in range(world)]
        return [pickle.loads(f.read_bytes()) if f.exists() else None for f in files], codes


def test_a_killed_worker_does_not_stop_the_others() -> None:
    (served, *workers), codes = run_processes(killed=(2,))
    assert codes == [0, 0, -signal.SIGKILL, 0]
    assert list(served.lost) == [2] and workers[1] is None
    pushed = [k for k, _, _ in served.pushes]
    assert (pushed.count(1), pushed.count(2), pushed.count(3)) == (STEPS, 5, STEPS)
    assert len(workers[0]) == len(workers[2]) == STEPS  # the versions that they pulled


@pytest.mark.slow
def test_a_silent_worker_is_let_go_of_after_the_timeout() -> None:
    (served, *workers), codes = run_processes(silent=(1,), world=3)
    assert codes == [0, 0, 0]
    assert list(served.lost) == [1] and "Timed out" in served.lost[1]
    assert "the parameter server is gone, or let go of this worker" in workers[0]
    assert [k for k, _, _ in served.pushes].count(2) == STEPS


def test_workers_of_a_dead_server_are_told() -> None:
    (server, *workers), codes = run_processes(killed=(0,), world=3)
    assert codes == [-signal.SIGKILL, 0, 0] and server is None
    assert all("the parameter server is gone" in said for said in workers)


def test_a_server_without_workers_is_told() -> None:
    (served, *workers), codes = run_processes(killed=(1, 2), world=3)
    assert "all workers were lost, x is at version 10" in served
    assert codes[0] == 0 and workers == [None, None]
