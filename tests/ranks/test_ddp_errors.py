"""What cannot be honoured is refused at once, on every rank, and the message says what to do."""

import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import (
    dist_ef_block_sgd,
    dist_ef_block_sgdm,
    saef_hook,
    signsgd_majority_vote,
    signum_majority_vote,
)
from support.ranks import RankPool
from support.training import Job, batch, make_net, wrap

PLAIN = Job(groups=[{"momentum": 0.9}])


def backward(group: dist.ProcessGroup, model: nn.Module, t: int = 0) -> None:
    x, y = batch(dist.get_rank(group), t)
    F.mse_loss(model(x), y).backward()


def clip_after_backward(group: dist.ProcessGroup) -> None:
    net, model, optimizer, _ = wrap(group, PLAIN)
    backward(group, model)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()


def clip_bucket_views(group: dist.ProcessGroup) -> None:
    net, model, optimizer, _ = wrap(group, Job(ddp={"gradient_as_bucket_view": True}))
    backward(group, model)
    nn.utils.clip_grad_value_(net.parameters(), 1e-3)
    optimizer.step()


def change_lr_after_backward(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, PLAIN)
    backward(group, model)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


def change_weights_during_the_step(group: dist.ProcessGroup) -> None:
    net, model, optimizer, _ = wrap(group, PLAIN)
    model(batch(dist.get_rank(group), 0)[0])
    with torch.no_grad():
        net[0].weight.clamp_(-0.1, 0.1)
    optimizer.step()


def step_twice(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, PLAIN)
    backward(group, model)
    optimizer.step()
    optimizer.step()


def forget_the_hook(group: dist.ProcessGroup) -> None:
    net = make_net()
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    saef.SAEFState(model, optimizer)
    backward(group, model)
    optimizer.step()


def only_no_sync(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, PLAIN)
    with model.no_sync():
        backward(group, model)
    optimizer.step()


def join(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, PLAIN)
    with model.join():
        for t in range(1 + dist.get_rank(group)):
            optimizer.zero_grad()
            backward(group, model, t)
            optimizer.step()


def unfreeze(group: dist.ProcessGroup) -> None:
    net, model, optimizer, _ = wrap(group, PLAIN)
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    backward(group, model)
    optimizer.step()


def grad_scaler(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, Job(dtype=torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch(dist.get_rank(group), 0, torch.float32)
    scaler.scale(F.mse_loss(model(x), y)).backward()
    scaler.step(optimizer)


def dampening_later(group: dist.ProcessGroup) -> None:
    _, model, optimizer, _ = wrap(group, PLAIN)
    optimizer.param_groups[0]["dampening"] = 0.1
    backward(group, model)


def failing_exchange(group: dist.ProcessGroup) -> None:
    _, model, optimizer, state = wrap(group, Job(state={"exchange": "replicated"}))

    def serve(*_: Any) -> None:
        raise ValueError("malformed message: as if its bytes had been damaged")

    algorithm: Any = state.engine.algorithm
    algorithm._kernels = SimpleNamespace(compress=algorithm._kernels.compress, serve=serve)
    backward(group, model)
    optimizer.step()


def sparse_gradients(group: dist.ProcessGroup) -> None:
    net = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 1))
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = saef.SAEFState(model, optimizer)
    model.register_comm_hook(state, saef_hook)
    model(torch.randint(10, (3, 2))).sum().backward()


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (clip_after_backward, RuntimeError, "max_grad_norm"),
        (clip_bucket_views, RuntimeError, "max_grad_norm"),
        (change_lr_after_backward, RuntimeError, "change them after step"),
        (change_weights_during_the_step, RuntimeError, r"'0\.weight'.*while they were x_half"),
        (step_twice, RuntimeError, "never exchanged"),
        (forget_the_hook, RuntimeError, "register_comm_hook"),
        (only_no_sync, RuntimeError, "outside no_sync"),
        (join, RuntimeError, "same number of batches"),
        (unfreeze, ValueError, "not in the model"),
        (grad_scaler, RuntimeError, r"grad_scaler=scaler"),
        (dampening_later, ValueError, "dampening"),
        (failing_exchange, RuntimeError, "Restart the job.*The cause: malformed message"),
        (sparse_gradients, TypeError, "sparse=False"),
    ],
    ids=lambda v: v.__name__ if callable(v) and not isinstance(v, type) else "",
)
def test_refused(pool: RankPool, job: Callable[..., None], error: type[Exception], message: str) -> None:
    for answer in pool.run(catch, job, ranks=2):
        assert issubclass(answer[0], error), answer
        assert re.search(message, answer[1]), answer
    if job is sparse_gradients:
        pool.stop()  # a rank may have died in the middle of a collective


def catch(group: dist.ProcessGroup, job: Callable[..., None]) -> tuple[type[BaseException], str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            job(group)
        except Exception as error:
            return type(error), str(error)
    return type(None), "nothing was raised"


def lose_a_rank(group: dist.ProcessGroup, averaging: Any) -> str:
    """Rank 1 falls silent for longer than the timeout of this job's group; what the others are told."""
    rank, timeout_s = dist.get_rank(group), 4
    small = dist.new_group([0, 1, 2], timeout=timedelta(seconds=timeout_s))
    _, model, optimizer, state = wrap(small, Job(groups=[{"momentum": 0.9}], state={"averaging": averaging}))
    for t in range(3):  # DDP itself exchanges something in the second
        optimizer.zero_grad()
        backward(small, model, t)
        optimizer.step()
    before = [v.clone() for v in (state.weights.x(), state.e, state.m, state.e_server)]
    if rank == 1:
        time.sleep(3 * timeout_s)
        return "silent"
    began = time.monotonic()
    try:
        optimizer.zero_grad()
        backward(small, model, 3)
        optimizer.step()
    except RuntimeError as error:
        assert time.monotonic() - began < 2.5 * timeout_s  # twice: for rank 2, which in turn waits for rank 1
        after = (state.weights.x(), state.e, state.m, state.e_server)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return str(error)
    return "nothing was raised"


AVERAGING = [None, saef.AllReduce(1), saef.Ring(), saef.AsyncRing(5)]


@pytest.fixture(scope="module")
def silences() -> dict[str, list[str]]:
    """What the ranks were told, for each of `AVERAGING`: all of them wait at the same time, each in its own pool."""
    pools = [RankPool(4) for _ in AVERAGING]
    with ThreadPoolExecutor(len(pools)) as threads:
        found = list(threads.map(lambda pool, averaging: pool.run(silent, averaging), pools, AVERAGING))
    for pool in pools:
        pool.stop()
    return {repr(averaging): said for averaging, said in zip(AVERAGING, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("averaging", AVERAGING, ids=repr)
def test_a_silent_rank_is_an_error_within_the_timeout(silences: dict[str, list[str]], averaging: Any) -> None:
    said = silences[repr(averaging)]
    assert said[1] == "silent"
    for text in (said[0], said[2]):
        assert "the exchange with the other ranks failed" in text and "timeout" in text and "last checkpoint" in text


def silent(group: dist.ProcessGroup, averaging: Any) -> str:
    if dist.get_rank(group) == 3:
        dist.new_group([0, 1, 2])
        return "not a member"
    return lose_a_rank(group, averaging)


MAKERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "a state": lambda net, given: saef.SAEFState(net, SGD(net), process_group=given),
    "an averager": lambda net, given: saef.ModelAverager(saef.LocalStep(2), process_group=given),
    "a server": lambda net, given: saef.ParameterServer(net.parameters(), given),
    "a distance": lambda net, given: saef.stationary_distance(net.parameters(), given),
    "a mixing time": lambda net, given: saef.estimate_mixing_time(saef.Ring(), given),
}


def with_no_group(group: dist.ProcessGroup, maker: str) -> str:
    make, net = MAKERS[maker], make_net()
    for given in (1, "gloo", [0, 1], dist.GroupMember):
        with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup, .* got "):
            make(net, given)
    with pytest.raises(ValueError, match="not a member of process_group"):
        make(net, dist.GroupMember.NON_GROUP_MEMBER)
    return "ok"


def SGD(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_no_process_group_is_refused(pool: RankPool, maker: str) -> None:
    assert pool.run(with_no_group, maker, ranks=2) == ["ok"] * 2


def with_no_transport(group: dist.ProcessGroup) -> str:
    net = make_net()
    for given in (1, "nccl", group):
        with pytest.raises(TypeError, match=r"transport must be a saef\.comm\.transport\.Transport"):
            saef.SAEFState(net, SGD(net), transport=given)
    with pytest.raises(ValueError, match="params is empty"):
        saef.ParameterServer([], group)
    return "ok"


def test_what_is_no_transport_or_has_no_parameters_is_refused(pool: RankPool) -> None:
    assert pool.run(with_no_transport, ranks=2) == ["ok"] * 2


def build(group: dist.ProcessGroup, what: str) -> None:
    """Things that SAEFState itself refuses."""
    net = make_net(torch.float16 if what == "float16" else torch.float64)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    settings: dict[str, Any] = {}
    rank = dist.get_rank(group)
    if what == "zero":
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, process_group=group, lr=0.1)
    elif what == "second moments":
        settings["v_averaging"] = saef.AllReduce(2)
    elif what == "amsgrad":
        optimizer = torch.optim.AdamW(net.parameters(), amsgrad=True)
    elif what == "dampening":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, dampening=0.1)
    elif what == "missing":
        optimizer = torch.optim.SGD([net[0].weight], lr=0.1)
    elif what == "foreign":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    elif what == "frozen":
        net.requires_grad_(False)
    elif what == "mixed":
        net[0].float()
    elif what == "ranks":
        settings["compressor"] = saef.TopK(0.01) if rank == 1 else saef.TopK(0.02)
    elif what == "shapes":
        net = nn.Sequential(nn.Linear(3, 2 + rank))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    elif what == "blocks":
        settings = {"compressor": saef.ScaledSign(block=8), "server_compressor": saef.TopK(0.1, block=16)}
    elif what == "vote":
        settings["compressor"] = saef.MajorityVote()
    saef.SAEFState(net, optimizer, process_group=group, **settings)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("zero", TypeError, "ZeroRedundancyOptimizer makes the ranks' parameters alike itself"),
        ("amsgrad", ValueError, "amsgrad=False"),
        ("second moments", ValueError, "which SGD with local_steps=1 does not have within saef: it is for AdamW"),
        ("dampening", ValueError, "dampening=0"),
        ("missing", ValueError, "not in the optimizer"),
        ("foreign", ValueError, "not in the model"),
        ("frozen", ValueError, "no trainable parameters"),
        ("mixed", TypeError, "convert the model"),
        ("float16", TypeError, r"grad_scaler=torch\.amp\.GradScaler.*bfloat16"),
        ("ranks", ValueError, r"compressor: rank 0 has TopK\(ratio=0\.02.*rank 1 has TopK\(ratio=0\.01"),
        ("shapes", ValueError, "parameters: rank 0 has.*rank 1 has"),
        ("blocks", ValueError, "same block size"),
        ("vote", ValueError, "step_ahead=0"),
    ],
)
def test_state_refuses(pool: RankPool, what: str, error: type[Exception], message: str) -> None:
    """Also when only one rank is wrong: all of them raise, none waits."""
    for kind, text in pool.run(catch_build, what, ranks=2):
        assert issubclass(kind, error) and re.search(message, text, re.S), (kind, text)


def catch_build(group: dist.ProcessGroup, what: str) -> tuple[type[BaseException], str]:
    try:
        build(group, what)
    except Exception as error:
        return type(error), str(error)
    return type(None), "nothing was raised"


def test_presets_check_the_optimizer() -> None:
    net = make_net()
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    momentum = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    adamw = torch.optim.AdamW(net.parameters())
    for preset, optimizer in (
        (dist_ef_block_sgd, adamw),
        (dist_ef_block_sgdm, adamw),
        (signsgd_majority_vote, adamw),
        (signum_majority_vote, adamw),
        (dist_ef_block_sgd, momentum),
        (dist_ef_block_sgdm, momentum),
        (signsgd_majority_vote, momentum),
        (signum_majority_vote, plain),
    ):
        with pytest.raises(ValueError, match="use|leave weight_decay_mode out"):
            preset(net, optimizer)


def test_state_needs_a_process_group() -> None:
    net = make_net()
    with pytest.raises(RuntimeError, match="init_process_group"):
        saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_hook_refuses_what_is_no_bucket() -> None:
    with pytest.raises(TypeError, match="python_reducer"):
        saef_hook(None, (torch.zeros(1),))  # type: ignore[arg-type]
