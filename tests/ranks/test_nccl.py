"""NCCL, which wants a GPU for each rank: all collectives by one rank here, by several where there are as many GPUs."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.comm.torch_transport import TorchTransport
from saef.hooks import saef_hook
from saef.step.ways import Copies, OnCUDA
from support import reference
from support.cases import close, job_of, reference_settings, start
from support.ranks import RankPool
from support.training import Job, batch, flat, gradient, make_net, make_optimizer, set_lr, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LONG = 20_000_000  # clock cycles, some 10 ms: whoever does not wait for it reads too early


class Through(TorchTransport):  # type: ignore[misc]
    """Calls the backend even for one rank. `wait`: clock cycles that the stream is busy around each collective."""

    wait = 0

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: str) -> Tensor:
        return self._busy(super()._all_gather, message, sizes, purpose)

    def all_to_all(self, message: Tensor, sizes: Sequence[int], received: int, purpose: str) -> Tensor:
        return self._busy(super()._all_to_all, message, sizes, received, purpose).view(self.size, received)

    def mean(self, v: Tensor, purpose: str) -> None:
        self._busy(super()._sum, v, purpose)
        v.div_(self.size)

    def send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: str) -> list[Tensor]:
        return self._busy(super()._send_receive, v, to, sources, purpose)

    def _busy(self, collective: Any, *args: Any) -> Any:
        if self.wait:
            torch.cuda._sleep(self.wait)
        result = collective(*args)
        if self.wait:
            torch.cuda._sleep(self.wait)
        return result


def alone(backend: str) -> dist.ProcessGroup:
    """A group of this rank alone."""
    if backend == "nccl":
        torch.cuda.set_device(0)
    return dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)


# ---- collectives --------------------------------------------------------------------------------------------------


def collectives(group: dist.ProcessGroup, backend: str) -> list[Tensor]:
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    transport = Through(alone(backend), device)
    message, v = torch.arange(37, dtype=torch.uint8).to(device), torch.linspace(-1, 1, 41).to(device)

    def all_of_them() -> list[Tensor]:
        found = [
            transport.all_gather(message, [37], "phase1"),
            transport._gather_unequal(message, [37], "phase1"),
            transport.all_to_all(message, [37], 37, "phase1"),
        ]
        transport.mean(v, "averaging")
        if backend == "nccl":  # torch forbids a rank to send to itself, NCCL does not
            with mock.patch("torch.distributed.distributed_c10d._check_not_self_rank"):
                found += transport.send_receive(v, [0], [0], "averaging")
            assert transport.send_receive(v, [], [], "averaging") == []
        else:
            found.append(v)
        return [*found, v]

    return [t.cpu() for t in transport.call(all_of_them)]


def test_all_collectives_of_nccl_equal_those_of_gloo(pool: RankPool) -> None:
    (nccl,), (gloo,) = (pool.run(collectives, backend, ranks=1) for backend in ("nccl", "gloo"))
    assert len(nccl) == len(gloo) == 5
    assert all(torch.equal(a, b) for a, b in zip(nccl, gloo, strict=True))


# ---- steps --------------------------------------------------------------------------------------------------------


def steps(group: dist.ProcessGroup, job: Job, wait: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Train one rank by NCCL: trajectory of x, e at the end, waits of the host by part of a step, after 5 steps."""
    nccl = alone("nccl")
    net = make_net(job.dtype).cuda()
    model = DDP(net, process_group=nccl, bucket_cap_mb=0.0005)
    optimizer = make_optimizer(net, job.groups)
    transport = Through(nccl, torch.device("cuda", 0))
    transport.wait = wait
    state = saef.SAEFState(model, optimizer, transport=transport, **job.state)
    model.register_comm_hook(state, saef_hook)
    assert isinstance(state.engine.weights, OnCUDA)
    trajectory, waits = [flat(net)], {"backward": 0, "step": 0}
    for t, lr in enumerate(job.lrs):
        set_lr(optimizer, job, lr)
        optimizer.zero_grad()
        x, y = (v.cuda() for v in batch(0, t, job.dtype))
        with counted(waits, "backward", t >= 5):
            if wait:
                torch.cuda._sleep(wait)
            nn.functional.mse_loss(model(x), y).backward()
            if wait:
                torch.cuda._sleep(wait)
        with counted(waits, "step", t >= 5):
            optimizer.step()
        trajectory.append(flat(net))
    return torch.stack(trajectory), state.e.cpu(), waits


class counted(warnings.catch_warnings):
    """Counts how often the host waits for the device."""

    def __init__(self, waits: dict[str, int], part: str, on: bool) -> None:
        super().__init__(record=True)
        self._waits, self._part, self._on = waits, part, on

    def __enter__(self) -> None:
        self._log = super().__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn" if self._on else "default")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._waits[self._part] += sum("called a synchronizing" in str(w.message) for w in self._log or [])
        super().__exit__(*error)


CASES = [(saef.ScaledSign(block=7), None), (saef.TopK(0.3, block=10), saef.AllReduce(5)), (saef.Identity(), None)]


@pytest.mark.parametrize("wait", [0, LONG])
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize(("compressor", "averaging"), CASES, ids=str)
def test_steps_by_nccl_equal_the_reference(
    pool: RankPool, compressor: saef.Compressor, averaging: Any, exchange: str, wait: int
) -> None:
    """Also when the streams are busy for long around every collective: nothing is read too early."""
    case = {"compressor": compressor, "server": "same", "step_ahead": 1.0, "rule": "nesterov", "decay": "coupled"}
    case |= {"averaging": averaging, "exchange": exchange}
    job = job_of(case)
    job.lrs = job.lrs[: 12 if wait else 60]
    expected, x, _ = reference.run(reference_settings(case, 1), start(), gradient, job.lrs, 1)
    ((got, e, waits),) = pool.run(steps, job, wait, ranks=1)
    close(got, x)
    close(e, expected.e[0])
    assert waits["backward"] == 0
    # Whether to skip; whether gradients, or x, were written to; whether a message was malformed
    assert 1 <= waits["step"] <= 4 * len(job.lrs[5:])


# ---- captured and compiled forwards ---------------------------------------------------------------------------------


def losses(group: dist.ProcessGroup, way: str) -> tuple[list[float], str]:
    """40 steps of a network whose forward is captured in CUDA graphs, or compiled: losses, how x is kept."""
    net = make_net(torch.float32).cuda()
    inner = net[0]
    x = batch(0, 0, torch.float32)[0].cuda()
    if way == "captured before":
        net[0] = torch.cuda.make_graphed_callables(inner, (x,))
    elif way.startswith("compiled"):
        net = torch.compile(net, mode="reduce-overhead" if way.endswith("graphs") else None)
    model = DDP(net, process_group=alone("nccl"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    transport = Through(model.process_group, torch.device("cuda", 0))
    state = saef.SAEFState(model, optimizer, compressor=saef.TopK(0.1), exchange="replicated", transport=transport)
    model.register_comm_hook(state, saef_hook)
    found = []
    for t in range(40):
        x, y = (v.cuda() for v in batch(0, t, torch.float32))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found, type(state.engine.weights).__name__


@pytest.mark.parametrize("way", ["captured before", "compiled", "compiled with graphs"])
def test_captured_and_compiled_forwards_step_ahead(pool: RankPool, way: str) -> None:
    """They compute at x_half: the losses are those of plain training, and EF's are others."""
    ((plain, kept),) = pool.run(losses, "plain", ranks=1)
    ((found, how),) = pool.run(losses, way, ranks=1)
    assert kept == OnCUDA.__name__
    assert how == (Copies.__name__ if way == "captured before" else OnCUDA.__name__)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-4, atol=1e-6)


# ---- several GPUs ---------------------------------------------------------------------------------------------------


def rank_of_several(rank: int, ranks: int, store: str, job: Job, results: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.save(train(dist.group.WORLD, job), f"{results}/{rank}")  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs or more")
@pytest.mark.parametrize("averaging", [saef.AllReduce(5), saef.Rotating(7)], ids=str)
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("compressor", [saef.ScaledSign(block=7), saef.TopK(0.3, block=10)], ids=repr)
def test_several_gpus_equal_the_reference(compressor: saef.Compressor, exchange: str, averaging: Any) -> None:
    """On a machine with N GPUs: `pytest tests/ranks/test_nccl.py`, up to 8 ranks."""
    ranks = min(8, torch.cuda.device_count())
    case = {"compressor": compressor, "server": "same", "step_ahead": 1.0, "rule": "nesterov", "decay": "coupled"}
    case |= {"averaging": averaging, "exchange": exchange}
    job = job_of(case)
    job.device = "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, os.path.join(folder, "store"), job, folder)
        mp.spawn(rank_of_several, arguments, nprocs=ranks)
        runs = [torch.load(f"{folder}/{r}", weights_only=False, map_location="cpu") for r in range(ranks)]
    expected, x, _ = reference.run(reference_settings(case, ranks), start(), gradient, job.lrs, ranks)
    for k, run in enumerate(runs):
        close(run["x"], x)
        close(run["e"], expected.e[k])
