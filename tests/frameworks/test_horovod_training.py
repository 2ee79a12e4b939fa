"""What a Horovod job does besides steps: evaluation, broadcasts, checkpoints, bytes, bad numbers, loss scales."""

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if find_spec("horovod") is None:
    pytest.skip("needs Horovod: `make horovod` builds it", allow_module_level=True)

import horovod.torch as hvd
from horovod.torch import mpi_ops

import saef
from saef.comm.agreement import checksum
from saef.integrations.horovod import SAEFCompression
from saef.step import buckets
from support.equal import same, snapshot
from support.following import CHANGES, STEPS, Images, Twin, due, images, loss_of, make_optimizer
from support.horovod_jobs import backward, make, steps, train
from support.horovod_ranks import HorovodPool
from support.ranks import RankPool, kill
from support.training import Job, batch, flat, make_model, make_net
from support.training import train as train_ddp
from support.writes import OTHER_VALUES, SAME_VALUES

TOPK, SIGN = saef.TopK(0.2, block=30), saef.ScaledSign(block=20)
MANY = 60
MOMENTUM: list[dict[str, Any]] = [{"momentum": 0.9, "weight_decay": 1e-3}]


def job_of(compressor: saef.Compressor = TOPK, dtype: torch.dtype = torch.float32, **settings: Any) -> Job:
    settings = {"averaging": saef.Rotating(4), **settings}
    return Job({"compressor": compressor, **settings}, MOMENTUM, lrs=[0.05] * 400, dtype=dtype)


def trained(job: Job, count: int) -> tuple[nn.Module, Any, saef.SAEFState]:
    """A network after so many steps, its DistributedOptimizer and state."""
    net = make_model(job, hvd.rank())
    optimizer, state = make(job, net)
    steps(net, optimizer, job, range(count))
    return net, optimizer, state


# ---- x is what everyone sees --------------------------------------------------------------------------------


def look() -> list[str]:
    """Many steps; what evaluation, state_dict and broadcasts see in the middle of one; checksums of x."""
    job = job_of()
    net, optimizer, state = trained(job, MANY)
    weights = flat(net)
    sums = [checksum([weights])]
    x, y = batch(hvd.rank(), MANY, torch.float32)

    def begin() -> None:
        F.mse_loss(net(x), y)
        assert not torch.equal(flat(net), weights)  # x_half

    begin()
    assert torch.equal(torch.cat([v.reshape(-1) for v in net.state_dict().values()]), weights)
    begin()
    net.eval()
    with torch.no_grad():
        net(x)
    assert torch.equal(flat(net), weights)
    net.train()
    begin()
    hvd.broadcast_parameters(net.state_dict(), root_rank=hvd.size() - 1)
    assert torch.equal(flat(net), weights)
    with torch.no_grad():  # what a broadcast brings is x from then on
        for p in net.parameters():
            p.add_(0.125 * (hvd.rank() + 1))
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    steps(net, optimizer, job, range(MANY, MANY + 10))
    assert float((flat(net) - weights).mean()) > 0.05
    assert state.steps == MANY + 10
    return [*sums, checksum([flat(net)])]


def test_ranks_are_bit_identical_after_many_steps_and_everyone_sees_x(horovods: dict[int, HorovodPool]) -> None:
    first, *others = horovods[3].run(look)
    assert all(other == first for other in others)


# ---- checkpoints --------------------------------------------------------------------------------------------

STOP, END = 11, 22


def save(job: Job, folder: Path) -> tuple[list[Tensor], Tensor]:
    """(state at the end, x~ at the checkpoint)."""
    net, optimizer, state = trained(job, STOP)
    backward(net, optimizer, job, STOP)  # of a step under way, which is dropped below
    optimizer.synchronize()
    saef.save_checkpoint(folder, state, {"optimizer": optimizer.state_dict()})
    x_tilde = state.x_tilde()
    state.engine.abandon()
    steps(net, optimizer, job, range(STOP, END))
    return snapshot(state), x_tilde


def resume(job: Job, folder: Path) -> tuple[list[Tensor], Tensor]:
    net = make_model(job, hvd.rank())
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(hvd.rank())
    optimizer, state = make(job, net)
    extra = saef.load_checkpoint(folder, state)
    assert extra is not None and state.steps == STOP
    optimizer.load_state_dict(extra["optimizer"])
    x_tilde = state.x_tilde()
    steps(net, optimizer, job, range(STOP, END))
    return snapshot(state), x_tilde


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_a_job_resumes_bit_for_bit_and_with_another_np(
    horovods: dict[int, HorovodPool], tmp_path: Path, exchange: str
) -> None:
    job = job_of(exchange=exchange)
    saved = horovods[2].run(save, job, tmp_path)
    horovods[2].stop()  # by other processes
    for (ends, x_tilde), (again, x_tilde_again) in zip(saved, horovods[2].run(resume, job, tmp_path), strict=True):
        assert same(ends, again)
        assert torch.equal(x_tilde, x_tilde_again)
    for ranks in (1, 3):
        for ends, x_tilde in (resumed := horovods[ranks].run(resume, job, tmp_path)):
            torch.testing.assert_close(x_tilde, saved[0][1], rtol=0, atol=1e-6)  # a few roundings of numbers below 4
            assert torch.equal(ends[0], resumed[0][0][0])


# ---- bytes --------------------------------------------------------------------------------------------------


def count_bytes(job: Job) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes handed to each of Horovod's collectives in 5 steps, and what metrics() counts meanwhile."""
    handed = dict.fromkeys(("_allreduce_async", "_allgather_async", "_alltoall_async"), 0)
    patch, size = pytest.MonkeyPatch(), buckets.BUCKET_BYTES
    buckets.BUCKET_BYTES = 25 << 20  # one message a phase
    net, optimizer, state = trained(job, 1)
    before = state.metrics()
    for name in handed:
        call = getattr(mpi_ops, name)

        def spy(tensor: Tensor, *args: Any, name: str = name, call: Any = call, **kwargs: Any) -> Any:
            handed[name] += tensor.numel() * tensor.element_size()
            return call(tensor, *args, **kwargs)

        patch.setattr(mpi_ops, name, spy)
    steps(net, optimizer, job, range(1, 6))
    patch.undo()
    buckets.BUCKET_BYTES = size
    return handed, {k: v - before[k] for k, v in state.metrics().items() if k.startswith("bytes_sent_")}


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("compressor", [TOPK, SIGN])
def test_bytes_are_the_codecs_formula_and_a_dummy(
    horovods: dict[int, HorovodPool], compressor: saef.Compressor, exchange: str
) -> None:
    numels, K, count = [p.numel() for p in make_net().parameters()], 3, 5
    size = saef.message_bytes(compressor, numels)
    runs = horovods[K].run(count_bytes, job_of(compressor, exchange=exchange, averaging=None))
    for handed, metrics in runs:
        assert handed["_allreduce_async"] == count * 4 * len(numels)  # the dummies
        if exchange == "replicated":
            assert (handed["_allgather_async"], handed["_alltoall_async"]) == (count * size, 0)
            assert metrics["bytes_sent_phase1"] == (K - 1) * count * size
        else:  # each section and reply is padded to 8 bytes
            assert 0 <= handed["_alltoall_async"] - count * size <= count * 8 * K
            assert handed["_allgather_async"] > 0
            assert metrics["bytes_sent_phase2"] == (K - 1) * handed["_allgather_async"]
    if exchange == "sharded":
        assert 0 <= sum(handed["_allgather_async"] for handed, _ in runs) - count * size <= count * 8 * K


# ---- bad numbers, loss scales, one rank, detach --------------------------------------------------------------


def skip() -> None:
    job = job_of()
    net, optimizer, state = trained(job, 20)
    before = snapshot(state)
    optimizer.zero_grad()
    x, y = batch(hvd.rank(), 20, torch.float32)
    (F.mse_loss(net(x), y) * (math.nan if hvd.rank() == 1 else 1.0)).backward()
    optimizer.step()
    assert (state.steps, state.skipped) == (20, 1)
    assert same(before, snapshot(state))
    optimizer.zero_grad()  # a backward that is given up
    F.mse_loss(net(x), y).backward()
    optimizer.synchronize()
    steps(net, optimizer, job, range(20, 25))
    assert state.steps == 25


def test_a_bad_number_on_one_rank_skips_the_step_on_all(horovods: dict[int, HorovodPool]) -> None:
    horovods[2].run(skip)


def scaled(synchronize: bool) -> tuple[Tensor, int, list[float]]:
    """float16 autocast with a GradScaler, in Horovod's recommended way and without its synchronize()."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    job = job_of(SIGN, grad_scaler=scaler, max_grad_norm=1.0)
    net = make_model(job, hvd.rank())
    optimizer, state = make(job, net)
    optimizer.param_groups[0]["lr"] = 0.05
    losses = []
    for t in range(160):
        optimizer.zero_grad()
        x, y = batch(hvd.rank(), t, torch.float32)
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(net(x).float(), y)
        scaler.scale(loss).backward()
        if synchronize:
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert state.steps + state.skipped == 160
    return flat(net), state.skipped, losses


def test_a_grad_scaler_works_in_either_order(horovods: dict[int, HorovodPool]) -> None:
    runs = [run for synchronize in (True, False) for run in horovods[2].run(scaled, synchronize)]
    for x, skipped, losses in runs:
        assert torch.equal(x, runs[0][0])
        assert 0 < skipped < 20  # 2^24 overflows float16 until the scaler has halved it
        assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_one_rank_is_ddp_with_one_rank(pool: RankPool, horovods: dict[int, HorovodPool]) -> None:
    job = Job({"compressor": TOPK}, MOMENTUM, dtype=torch.float32)
    (run,), (other,) = horovods[1].run(train, job, {}), pool.run(train_ddp, job, ranks=1)
    assert torch.equal(run["x"], other["x"])
    assert torch.equal(run["e"], other["e"])


def let_go() -> tuple[Tensor, Tensor]:
    """After detach(): x is there, and Horovod averages plain gradients for SGD."""
    job = job_of()
    net, optimizer, state = trained(job, 10)
    backward(net, optimizer, job, 10)
    optimizer.step()
    weights = flat(net)
    state.detach()
    assert torch.equal(flat(net), weights)
    backward(net, optimizer, job, 11)
    own = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    optimizer.synchronize()
    averaged = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(averaged, hvd.allreduce(own, name="own"))
    with optimizer.skip_synchronize():
        optimizer.step()
    return flat(net), weights - 0.05 * (averaged + 1e-3 * weights)


def test_detach_leaves_plain_horovod(horovods: dict[int, HorovodPool]) -> None:
    for x, expected in horovods[2].run(let_go):
        torch.testing.assert_close(x, expected)


# ---- the pool ------------------------------------------------------------------------------------------------


def pid() -> int:
    return os.getpid()


def follow(change: Callable[..., None]) -> None:
    for exchange in ("replicated", "sharded"):
        net = Images()
        optimizer = make_optimizer(net)
        twin = Twin(net, lambda v: hvd.allreduce(v.contiguous(), op=hvd.Average))
        compression = SAEFCompression(net, optimizer, compressor=saef.Identity(), exchange=exchange)
        named = net.named_parameters()
        optimizer = hvd.DistributedOptimizer(optimizer, named, compression, backward_passes_per_step=2)
        for t in range(STEPS):
            for what in due(change, t):
                twin.change(what, net, optimizer)
            batches = images(hvd.rank(), t, 2)
            optimizer.zero_grad()
            for x in batches:
                loss_of(net, x).backward()
            optimizer.step()
            twin.step(batches)
            torch.testing.assert_close(flat(net), flat(twin.net), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_is_trained_is_followed(horovods: dict[int, HorovodPool], change: Callable[..., None]) -> None:
    horovods[2].run(follow, change)


def test_a_pool_starts_anew_when_a_rank_was_killed_since_the_last_job(horovods: dict[int, HorovodPool]) -> None:
    before = horovods[2].run(pid)
    assert horovods[2].run(pid) == before  # no new processes without need
    kill(before[1])
    assert set(horovods[2].run(pid)).isdisjoint(before)


def represent(compressor: saef.Compressor, step_ahead: float) -> str:
    net = make_net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return repr(SAEFCompression(net, optimizer, compressor=compressor, step_ahead=step_ahead))


@pytest.mark.parametrize(("compressor", "step_ahead", "method"), [(TOPK, 1.0, "SAEF"), (SIGN, 0.0, "EF")])
def test_a_compression_says_what_it_is(
    horovods: dict[int, HorovodPool], compressor: saef.Compressor, step_ahead: float, method: str
) -> None:
    for said in horovods[2].run(represent, compressor, step_ahead):
        about = f"{method}, {compressor} both ways; 2 ranks, replicated; 141 parameters; about "
        assert said.startswith(f"<SAEFCompression with <SAEFState: {about}") and "\n" not in said


# ---- writes to p.grad, and torch.compile --------------------------------------------------------------------


def write(writes: list[Any], compiled: bool) -> Tensor:
    """Six steps with each of these writes between synchronize and step; x at the end."""
    job = job_of()
    net = make_model(job, hvd.rank())
    optimizer, _ = make(job, net)
    model = torch.compile(net, backend="aot_eager") if compiled else net
    for t in range(6):
        backward(model, optimizer, job, t)
        optimizer.synchronize()
        for one in writes:
            one(net)
        with optimizer.skip_synchronize():
            optimizer.step()
    torch._dynamo.reset()
    return flat(net)


def test_writes_of_the_same_values_and_compilation_change_no_bit(horovods: dict[int, HorovodPool]) -> None:
    plain = horovods[2].run(write, [], False)
    for writes, compiled in ((SAME_VALUES, False), ([], True)):
        ours = horovods[2].run(write, writes, compiled)
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def change() -> int:
    job = job_of()
    net, optimizer, state = trained(job, 2)
    before = flat(net)
    for one in OTHER_VALUES:
        backward(net, optimizer, job, 2)
        optimizer.synchronize()
        one(net)
        with pytest.raises(RuntimeError, match="gradients of .* were changed .*max_grad_norm"):
            with optimizer.skip_synchronize():
                optimizer.step()
        assert torch.equal(flat(net), before), one.__name__
    return state.steps


def test_writes_of_other_values_are_refused(horovods: dict[int, HorovodPool]) -> None:
    assert horovods[2].run(change) == [2, 2]
