"""Real DDP runs on a GPU, which two gloo ranks share (NCCL allows one rank a device): equal to the reference."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support import reference
from support.cases import close, job_of, reference_settings, start
from support.equal import same, snapshot
from support.protocols import ERRORS
from support.ranks import RankPool
from support.training import Job, batch, flat, gradient, make_net, train, wild_lrs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RANKS = 2
COMPRESSORS = [saef.ScaledSign(block=7), saef.TopK(0.3, block=10), saef.Identity()]


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("decay", ["coupled", "outer"])
def test_ddp_on_a_gpu_equals_the_reference(
    pool: RankPool, compressor: saef.Compressor, exchange: str, decay: str
) -> None:
    case = {"compressor": compressor, "server": "same", "step_ahead": 1.0, "rule": "nesterov", "decay": decay}
    case |= {"averaging": saef.AllReduce(5), "exchange": exchange}
    job = job_of(case)
    job.device = "cuda"
    expected, x, _ = reference.run(reference_settings(case, RANKS), start(), gradient, job.lrs, RANKS)
    for k, run in enumerate(pool.run(train, job, ranks=RANKS)):
        close(run["x"], x)
        close(run["e"], expected.e[k])
        close(run["m"], expected.m[k])


@pytest.mark.parametrize("protocol, oracle", ERRORS, ids=[str(p) for p, _ in ERRORS])
def test_other_averaging_on_a_gpu_equals_the_reference(pool: RankPool, protocol: saef.Averaging, oracle: Any) -> None:
    """gloo sends to single ranks from the host's memory only: errors are staged there."""
    job = Job(
        state={"compressor": saef.TopK(0.1, block="layer"), "averaging": protocol},
        groups=[{"momentum": 0.9}],
        device="cuda",
    )
    settings = reference.Settings(reference.top_k(0.1), averaging=oracle, momentum=0.9)
    expected, x, _ = reference.run(settings, start(), gradient, job.lrs, RANKS)
    for k, run in enumerate(pool.run(train, job, ranks=RANKS)):
        close(run["x"], x)
        close(run["e"], expected.e[k])


def average_models(group: dist.ProcessGroup) -> tuple[Tensor, float]:
    net = make_net().cuda()
    nn.utils.vector_to_parameters(torch.full_like(flat(net), dist.get_rank(group)).cuda(), net.parameters())
    averager = saef.ModelAverager(saef.Ring(), process_group=group)
    before = saef.stationary_distance(net.parameters(), group)
    averager.average_parameters(net.parameters())
    assert next(net.parameters()).is_cuda
    return flat(net), before


def test_models_are_averaged_on_a_gpu(pool: RankPool) -> None:
    for x, before in pool.run(average_models, ranks=RANKS):
        assert torch.equal(x, torch.full_like(x, 0.5)) and before == pytest.approx(x.numel() / 4)


def live(group: dist.ProcessGroup) -> tuple[float, float]:
    return tuple(saef.estimate_mixing_time(p, group, device="cuda") for p in (saef.Slack(0.3), saef.LocalStep(2)))


def test_mixing_time_is_measured_on_a_gpu(pool: RankPool) -> None:
    assert pool.run(live, ranks=RANKS) == [(4.0, 4.0)] * RANKS


def serve(group: dist.ProcessGroup) -> Tensor:
    net = make_net(torch.float32).cuda()
    server = saef.ParameterServer(net.parameters(), group)
    if server.is_server:
        server.serve(torch.optim.SGD(net.parameters(), lr=1.0))
    else:
        server.pull()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        server.push()
        server.pull()
        server.leave()
    return flat(net)


def test_a_parameter_server_with_gpus(pool: RankPool) -> None:
    for x in pool.run(serve, ranks=RANKS):
        torch.testing.assert_close(x, flat(make_net(torch.float32)) - 1.0)


def make(group: dist.ProcessGroup, **settings: Any) -> tuple[nn.Module, DDP, torch.optim.SGD, saef.SAEFState]:
    net = make_net(torch.float32).cuda()
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    state = saef.SAEFState(model, optimizer, compressor=saef.TopK(0.1, block=16), **settings)
    model.register_comm_hook(state, saef_hook)
    return net, model, optimizer, state


def step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int, t: int, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    x, y = (v.cuda() for v in batch(k, t, torch.float32))
    (nn.functional.mse_loss(model(x), y) * factor).backward()
    optimizer.step()


def skip_save_and_resume(group: dist.ProcessGroup) -> Tensor:
    """A skipped step leaves everything as it was, and a run goes on from a checkpoint bit for bit."""
    rank = dist.get_rank(group)
    net, model, optimizer, state = make(group, averaging=saef.Rotating(4), max_grad_norm=1.0)
    for t in range(150):
        step(model, optimizer, rank, t)
    before = snapshot(state)
    step(model, optimizer, rank, 150, math.nan if rank == 1 else 1.0)
    assert state.skipped == 1 and state.steps == 150
    assert same(before, snapshot(state))
    saved = state.state_dict()
    for t in range(151, 301):
        step(model, optimizer, rank, t)
    ends = snapshot(state)
    net, model, optimizer, state = make(group, averaging=saef.Rotating(4), max_grad_norm=1.0)
    state.load_state_dict(saved)
    for t in range(151, 301):
        step(model, optimizer, rank, t)
    assert same(ends, snapshot(state))
    return flat(net)


def test_skips_and_checkpoints_on_a_gpu(pool: RankPool) -> None:
    a, b = pool.run(skip_save_and_resume, ranks=RANKS)
    assert torch.equal(a, b)


def half(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[Tensor, float, float, int]:
    """float16 with a GradScaler, or bfloat16: weights, losses before and after, skipped steps."""
    rank, scaler = dist.get_rank(group), None
    if dtype is torch.float16:
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    net, model, optimizer, state = make(group, grad_scaler=scaler)
    losses = []
    for t in range(200):
        optimizer.zero_grad()
        x, y = (v.cuda() for v in batch(rank, t, torch.float32))
        with torch.autocast("cuda", dtype):
            loss = nn.functional.mse_loss(model(x).float(), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(float(loss))
    assert state.steps + state.skipped == 200
    return flat(net), sum(losses[:20]), sum(losses[-20:]), state.skipped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_a_gpu(pool: RankPool, dtype: torch.dtype) -> None:
    (x, first, last, skipped), (other, *_) = pool.run(half, dtype, ranks=RANKS)
    assert torch.equal(x, other)
    assert last < 0.5 * first
    assert (skipped > 0) == (dtype is torch.float16)  # 2^24 overflows float16 until the scaler has halved it


def test_float32_ranks_on_a_gpu_are_bit_identical(pool: RankPool) -> None:
    """Both strategies, to the end of 300 steps."""
    runs = []
    for exchange in ("replicated", "sharded"):
        case = {"compressor": saef.ScaledSign(block=16), "server": "same", "step_ahead": 1.0, "rule": "momentum"}
        job = job_of(case | {"decay": "coupled", "averaging": saef.Rotating(7), "exchange": exchange})
        job.device, job.dtype, job.lrs = "cuda", torch.float32, wild_lrs(300)
        runs += pool.run(train, job, ranks=RANKS)
    assert all(torch.equal(run["x"], runs[0]["x"]) for run in runs[1:])
    assert not torch.equal(runs[0]["e"], runs[1]["e"])
