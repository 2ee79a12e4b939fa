"""What DDP users do beside the plain loop: each works, in real multi-process runs."""

import copy
import gc
import inspect
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import ef, saef_hook
from support import reference
from support.cases import close, start
from support.ranks import RankPool
from support.training import (
    MOMENTUM,
    SETTINGS,
    STEPS,
    Job,
    batch,
    flat,
    gradient,
    make_net,
    make_optimizer,
    randn,
    train,
    wild_lrs,
    wrap,
)


def reference_x(lrs: list[float], ranks: int = 4, **settings: Any) -> Tensor:
    options = {"block": 7, "momentum": 0.9, **settings}
    return reference.run(reference.Settings(reference.scaled_sign, **options), start(), gradient, lrs, ranks)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ddp",
    [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}],
    ids=lambda d: next(iter(d)),
)
def test_ddp_options(pool: RankPool, ddp: dict[str, Any]) -> None:
    job = Job(state=SETTINGS, groups=[MOMENTUM], ddp=ddp)
    expected = reference_x(job.lrs)
    for run in pool.run(train, job):
        close(run["x"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=["copies", "views"])
def test_gradient_accumulation_equals_one_large_batch(pool: RankPool, ddp: dict[str, Any]) -> None:
    """All micro-batches are computed at the same x_half, so four quarters make the whole batch."""
    job = Job(state=SETTINGS, groups=[MOMENTUM], micro_batches=4, ddp=ddp)
    expected = reference_x(job.lrs)
    for run in pool.run(train, job):
        close(run["x"], expected)


@pytest.mark.parametrize("averaging", [None, saef.AllReduce(3)])
def test_accumulation_without_no_sync_only_costs_bytes(pool: RankPool, averaging: Any) -> None:
    """The last backward's message contains the sum of all; the state moved at none of the earlier ones."""
    job = Job(state={**SETTINGS, "averaging": averaging}, groups=[MOMENTUM], lrs=wild_lrs(20))
    expected = reference_x(job.lrs, averaging=averaging and ("allreduce", 3))
    for x in pool.run(train_in_two_backwards, job):
        close(x, expected)


def train_in_two_backwards(group: dist.ProcessGroup, job: Job) -> Tensor:
    net, model, optimizer, _ = wrap(group, job)
    trajectory = [flat(net)]
    for t, lr in enumerate(job.lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        for xs, ys in zip(*(v.chunk(2) for v in batch(dist.get_rank(group), t)), strict=True):
            (F.mse_loss(model(xs), ys) / 2).backward()
        optimizer.step()
        trajectory.append(flat(net))
    return torch.stack(trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [0.5, 1e-3, 1e6])
def test_local_clipping_equals_the_reference(pool: RankPool, max_norm: float) -> None:
    job = Job(state={**SETTINGS, "max_grad_norm": max_norm}, groups=[{**MOMENTUM, "weight_decay": 1e-2}])
    expected = reference_x(job.lrs, max_grad_norm=max_norm, weight_decay=1e-2)
    for run in pool.run(train, job):
        close(run["x"], expected)


def test_maximize_climbs_what_minimize_descends(pool: RankPool) -> None:
    job = Job(state=SETTINGS, groups=[{**MOMENTUM, "maximize": True}], lrs=[0.1 * lr for lr in wild_lrs(20)])
    down = reference.run(
        reference.Settings(reference.scaled_sign, block=7, momentum=0.9),
        start(),
        lambda k, t, p: [-g for g in gradient(k, t, p)],
        job.lrs,
        4,
    )[1]
    for run in pool.run(train, job):
        close(run["x"], down)


class Branches(nn.Module):
    """`a` is used by even ranks, `b` by odd ones, `never` by none; `tied` shares the weight of `first`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(6, 6, bias=False)
        self.a, self.b, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 1)
        for p in self.frozen.parameters():
            p.requires_grad = False

    def forward(self, x: Tensor, rank: int) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh((self.a if rank % 2 == 0 else self.b)(x))
        return self.frozen(self.tied(x))  # type: ignore[no-any-return]


def train_branches(group: dist.ProcessGroup, lrs: list[float], averaging: Any) -> tuple[Tensor, Tensor]:
    net, rank = Branches().double(), dist.get_rank(group)
    before = torch.cat([p.reshape(-1).clone() for p in net.frozen.parameters()])
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign(block=7), averaging=averaging)
    model.register_comm_hook(state, saef_hook)
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(rank, t)
        F.mse_loss(model(x, rank), y).backward()
        optimizer.step()
    assert torch.equal(before, torch.cat([p.reshape(-1) for p in net.frozen.parameters()]))
    return trainable(net), state.e


def trainable(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("averaging", [None, saef.AllReduce(4)])
def test_unused_frozen_and_tied_parameters(pool: RankPool, averaging: Any) -> None:
    """A parameter nobody used counts as one with a zero gradient; a tied weight is one parameter."""
    lrs, net = wild_lrs(STEPS), Branches().double()
    names = [p for p in net.parameters() if p.requires_grad]

    def grad(k: int, t: int, parameters: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(names, parameters, strict=True):
                p.copy_(value)
        net.zero_grad()
        x, y = batch(k, t)
        F.mse_loss(net(x, k), y).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in names]

    settings = reference.Settings(
        reference.scaled_sign,
        block=7,
        momentum=0.9,
        weight_decay=1e-2,
        averaging=averaging and ("allreduce", 4),
    )
    expected, x, _ = reference.run(
        settings, [p.detach() for p in Branches().double().parameters() if p.requires_grad], grad, lrs, 4
    )
    for k, (weights, e) in enumerate(pool.run(train_branches, lrs, averaging)):
        close(weights, x[-1])
        close(e, expected.e[k])


def make_conv() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(36, 2)).double()


def conv_batch(k: int, t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(77 * k + t)
    return (
        randn(generator, 4, 3, 6, 6),
        torch.randint(2, (4,), generator=generator, device="cpu").to(torch.get_default_device()),
    )


def train_conv(group: dist.ProcessGroup, lrs: list[float], channels_last: bool) -> list[Tensor]:
    net = make_conv()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    model = DDP(net, process_group=group, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign(block="layer"))
    model.register_comm_hook(state, saef_hook)
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = conv_batch(dist.get_rank(group), t)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    return [p.detach().contiguous() for p in net.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_weights(pool: RankPool, channels_last: bool) -> None:
    """Layer blocks of scaled sign do not depend on the order of entries, so both formats match one reference."""
    lrs, net = wild_lrs(STEPS), make_conv()

    def grad(k: int, t: int, parameters: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(net.parameters(), parameters, strict=True):
                p.copy_(value)
        net.zero_grad()
        x, y = conv_batch(k, t)
        F.cross_entropy(net(x), y).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    settings = reference.Settings(reference.scaled_sign, momentum=0.9)
    end = reference.run(settings, [p.detach() for p in make_conv().parameters()], grad, lrs, 4)[0]
    for weights in pool.run(train_conv, lrs, channels_last):
        for ours, theirs in zip(weights, end.tensors(end.x), strict=True):
            close(ours, theirs)


def train_16_bit(group: dist.ProcessGroup, kind: str) -> tuple[Tensor, Tensor, list[float]]:
    """Parameters in bfloat16, or float32 parameters under bfloat16 autocast; (parameters, kept x, losses)."""
    net = make_net(torch.bfloat16 if kind == "parameters" else torch.float32)
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign(block=16), averaging=saef.Rotating(4))
    model.register_comm_hook(state, saef_hook)
    losses = []
    for t in range(150):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t % 10, next(net.parameters()).dtype)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=kind == "autocast"):
            out = model(x)
        loss = F.mse_loss(out.float(), y.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert state.weights.x().dtype == state.e.dtype == state.m.dtype == torch.float32
    return flat(net), state.weights.x(), losses


@pytest.mark.slow
def test_bfloat16_trains_like_float32(pool: RankPool) -> None:
    """bf16 parameters get a float32 master and stay its rounding; ranks agree bit for bit; the loss falls alike."""
    ends = {}
    for kind in ("float32", "parameters", "autocast"):
        runs = pool.run(train_16_bit, kind, ranks=2)
        for weights, x, losses in runs:
            assert torch.equal(weights, runs[0][0]) and torch.equal(x, runs[0][1])
            assert torch.equal(weights, x.to(weights.dtype))
            assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
        ends[kind] = sum(sum(losses[-10:]) for _, _, losses in runs)
    # bf16 rounds activations to 2**-8 relative; averaged over 160 losses far less remains. Measured: 1 %.
    assert abs(ends["parameters"] / ends["float32"] - 1) < 0.03
    assert abs(ends["autocast"] / ends["float32"] - 1) < 0.03


def test_evaluation_and_checkpoints_see_x(pool: RankPool) -> None:
    assert pool.run(look_at_weights, ranks=2) == ["ok", "ok"]


def look_at_weights(group: dist.ProcessGroup) -> str:
    job = Job(state=SETTINGS, groups=[MOMENTUM])
    net, model, optimizer, state = wrap(group, job)
    rank = dist.get_rank(group)

    def forward_and_backward(t: int) -> None:
        x, y = batch(rank, t)
        F.mse_loss(model(x), y).backward()

    def train_step(t: int) -> None:
        optimizer.zero_grad()
        forward_and_backward(t)
        optimizer.step()

    optimizer.param_groups[0]["lr"] = 0.1
    for t in range(3):
        train_step(t)
    x = flat(net)
    assert torch.equal(x, state.weights.x())
    data = batch(rank, 9)[0]
    model(data)  # a training forward steps ahead
    assert torch.equal(flat(net), x - state.e) and state.e.abs().max() > 0
    for look in (
        lambda: torch.no_grad()(model.eval())(data),
        lambda: torch.no_grad()(net.eval())(data),
        lambda: torch.inference_mode()(model)(data),
        lambda: net.state_dict(),
        lambda: model.state_dict(),
        lambda: torch.no_grad()(model.train())(data),
    ):
        model.train()
        model(data)
        assert not torch.equal(flat(net), x)
        look()
        assert torch.equal(flat(net), x)
    model.train()
    optimizer.zero_grad()
    with model.no_sync():
        forward_and_backward(5)  # a micro-batch, an evaluation in between, and the last micro-batch
    with torch.no_grad():
        net.eval()(data)
    assert torch.equal(flat(net), x)
    model.train()
    forward_and_backward(6)
    net.eval()(data)  # and before the step; with gradients it is a part of the model like any other
    optimizer.step()
    model.train()
    assert torch.equal(flat(net), state.weights.x()) and state.steps == 4
    return "ok"


def test_copies_of_the_model_are_free_of_saef(pool: RankPool) -> None:
    """deepcopy, AveragedModel and pickling take x; the copy's forward has nothing to do with the state."""
    assert pool.run(copy_the_model, ranks=2) == ["ok", "ok"]


def copy_the_model(group: dist.ProcessGroup) -> str:
    net, model, optimizer, state = wrap(group, Job(state=SETTINGS, groups=[MOMENTUM]))
    optimizer.param_groups[0]["lr"] = 0.1
    average = torch.optim.swa_utils.AveragedModel(net)
    total = torch.zeros_like(flat(net))
    for t in range(3):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(net)
        total += flat(net)
    close(flat(average.module), total / 3)
    model(x)  # the state's parameters are at x_half; the copies do not care
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), copy.deepcopy(average), torch.load(file, weights_only=False)):
        before = flat(other)
        other.train()(x).sum().backward()
        other.eval()(x)
        other.state_dict()
        assert torch.equal(flat(other), before) and state.weights.ahead
    return "ok"


def test_detach_leaves_plain_training_behind(pool: RankPool) -> None:
    assert pool.run(train_detach_train, ranks=2) == ["ok", "ok"]


def train_detach_train(group: dist.ProcessGroup) -> str:
    net, model, optimizer, state = wrap(group, Job(state=SETTINGS, groups=[{}]))
    optimizer.param_groups[0]["lr"] = 0.1
    x, y = batch(dist.get_rank(group), 0)
    with pytest.raises(ValueError, match="detach"):
        saef.SAEFState(model, optimizer)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    model(x)
    state.detach()
    before = flat(net)
    assert torch.equal(before, state.weights.x())
    optimizer.zero_grad()
    del model  # DDP's own hooks on the gradients go with it
    gc.collect()
    plain = DDP(net, process_group=group)
    F.mse_loss(plain(x), y).backward()
    optimizer.step()
    close(flat(net), before - 0.1 * torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]))
    optimizer.zero_grad()
    del plain
    gc.collect()
    again = DDP(net, process_group=group)
    state = saef.SAEFState(again, optimizer, **SETTINGS)
    again.register_comm_hook(state, saef_hook)
    F.mse_loss(again(x), y).backward()
    optimizer.step()
    return "ok" if state.steps == 1 else "steps"


def test_changing_the_parameters_between_steps_counts(pool: RankPool) -> None:
    """Loading or clamping weights between steps is not lost, whichever way they were written."""
    assert pool.run(change_weights, torch.float32, ranks=2) == ["ok", "ok"]
    assert pool.run(change_weights, torch.bfloat16, ranks=2) == ["ok", "ok"]


def change_weights(group: dist.ProcessGroup, dtype: torch.dtype) -> str:
    net, model, optimizer, state = wrap(group, Job(state=SETTINGS, groups=[MOMENTUM], dtype=dtype))
    optimizer.param_groups[0]["lr"] = 0.1

    def step(t: int) -> None:
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t, dtype)
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    step(0)
    master = state.weights.x().clone()
    for p in net.parameters():
        p.data.clamp_(-0.1, 0.1)
    clamped = flat(net).to(state.weights.x().dtype)
    model(batch(0, 0, dtype)[0])
    kept = state.weights.x()
    untouched = master.to(dtype).to(master.dtype) == clamped
    assert torch.equal(kept, torch.where(untouched, master, clamped))  # the fp32 master survives where it can
    return "ok" if state.steps == 1 else "steps"


def test_a_sub_group_trains_while_the_others_do_something_else(pool: RankPool) -> None:
    """Two of four ranks; the process group is DDP's. (All two-rank tests run in a sub-group, too.)"""
    first, second = pool.run(train, Job(state=SETTINGS, groups=[MOMENTUM]), ranks=2)
    close(first["x"], reference_x(wild_lrs(STEPS), ranks=2))
    assert torch.equal(first["x"], second["x"])


def without_ddp(group: Any, job: Job) -> Tensor:
    """A plain module: the step exchanges; in two micro-batches, and one whose loss is dropped."""
    net = make_net(job.dtype)
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    state = saef.SAEFState(net, optimizer, process_group=group, **job.state)
    for t, lr in enumerate(job.lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t, job.dtype)
        net(x)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.mse_loss(net(xs), ys) / 2).backward()
        optimizer.step()
    assert state.steps == len(job.lrs)
    if dist.get_rank(group) == 1:
        net[0].weight.grad = None  # what this rank does not use counts as zero
    with pytest.raises(RuntimeError, match="never exchanged"):
        optimizer.step()
    return flat(net)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_without_ddp_the_step_exchanges(pool: RankPool, optimizer: str) -> None:
    job = Job({"compressor": saef.TopK(0.2)}, optimizer=optimizer, lrs=[0.01] * 12, micro_batches=2)
    expected = pool.run(train, job, ranks=2)[0]["x"][-1]
    for found in pool.run(without_ddp, job, ranks=2):
        close(found, expected)


def test_ef_preset_is_step_ahead_zero(pool: RankPool) -> None:
    assert pool.run(ef_is_saef_at_zero, ranks=2) == [True, True]


def ef_is_saef_at_zero(group: dist.ProcessGroup) -> bool:
    net = make_net()
    model = DDP(net, process_group=group)
    state = ef(model, torch.optim.SGD(net.parameters(), lr=0.1), compressor=saef.TopK(0.1))
    return state.settings.step_ahead == 0.0 and state.settings.compressor == saef.TopK(0.1)


def test_schedulers_and_zero_grad_work_as_ever(pool: RankPool) -> None:
    assert pool.run(schedule, ranks=2) == [2, 2]


def schedule(group: dist.ProcessGroup) -> int:
    net, model, optimizer, state = wrap(group, Job(state=SETTINGS, groups=[MOMENTUM]))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for t in range(3):
        optimizer.zero_grad(set_to_none=t % 2 == 0)
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        local = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        if t == 1:
            continue  # a step the user drops, on all ranks: no trace
        optimizer.step()
        scheduler.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), local, strict=True))  # stays readable
    return state.steps


def hooked(group: dist.ProcessGroup, compressor: Any) -> tuple[Tensor, list[float]]:
    """A hook after the step, registered before saef's, looks at the gradients and zeroes them."""
    net, norms = make_net(), []
    model = DDP(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])))
        optimizer.zero_grad()

    optimizer.register_step_post_hook(after)
    if compressor is not None:
        state = saef.SAEFState(model, optimizer, compressor=compressor)
        model.register_comm_hook(state, saef_hook)
    x, y = batch(0, 0)  # the same on all ranks: so is the norm of its gradient
    for _ in range(5):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return flat(net), norms


def test_a_hook_after_the_step_finds_and_may_zero_the_gradients(pool: RankPool) -> None:
    for plain, ours in zip(pool.run(hooked, None, ranks=2), pool.run(hooked, saef.Identity(), ranks=2), strict=True):
        close(ours[0], plain[0])
        assert ours[1] == pytest.approx(plain[1], abs=1e-12) and min(plain[1]) > 0


def train_through_a_frozen_one(group: dist.ProcessGroup, compressor: Any, unused: bool) -> Tensor:
    """A GAN whose discriminator is frozen, all of it, while the generator is trained through it."""
    rank = dist.get_rank(group)
    torch.manual_seed(3)
    nets = [make_net(sizes=(6, 5, 6)), make_net(sizes=(6, 7, 1))]
    generator, critic = (DDP(n, process_group=group, find_unused_parameters=unused) for n in nets)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in nets]
    if compressor is not None:
        for model, optimizer in zip((generator, critic), optimizers, strict=True):
            model.register_comm_hook(saef.SAEFState(model, optimizer, compressor=compressor), saef_hook)
    for t in range(6):
        x, _ = batch(rank, t)
        critic.requires_grad_(False)
        optimizers[0].zero_grad()
        critic(generator(x)).mean().backward()
        optimizers[0].step()
        critic.requires_grad_(True)
        optimizers[1].zero_grad()
        with torch.no_grad():
            made = generator(x)
        real, fake = torch.tanh(critic(x)).mean(), torch.tanh(critic.module(made)).mean()
        (real - fake).backward()
        optimizers[1].step()
    return torch.cat([flat(n) for n in nets])


@pytest.mark.parametrize("unused", [False, True])
def test_a_model_may_be_trained_through_one_that_is_frozen(pool: RankPool, unused: bool) -> None:
    plain = pool.run(train_through_a_frozen_one, None, unused, ranks=2)
    close(pool.run(train_through_a_frozen_one, saef.Identity(), unused, ranks=2)[0], plain[0])
    a, b = pool.run(train_through_a_frozen_one, saef.TopK(0.2, block=10), unused, ranks=2)
    assert torch.equal(a, b)


def try_again(group: dist.ProcessGroup, compressor: Any) -> Tensor:
    """A forward is given up, and the same model is wrapped again, by another DDP and state."""
    net, states = make_net(), []
    before = flat(net)
    for failing in (True, False):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        model = DDP(net, process_group=group, init_sync=False)
        states.append(saef.SAEFState(model, optimizer, compressor=compressor))
        assert torch.equal(flat(net), before)
        model.register_comm_hook(states[-1], saef_hook)
        if failing:
            with torch.no_grad():
                states[-1].e.fill_(0.1)  # owed, so that x_half is not x
            model(batch(dist.get_rank(group), 0)[0])
            assert states[-1].engine.ahead
    for t in range(3):
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return flat(net)


def test_another_state_after_a_forward_that_was_given_up(pool: RankPool) -> None:
    a, b = pool.run(try_again, saef.TopK(0.2, block=10), ranks=2)
    assert torch.equal(a, b)


def zero_grad_is_as_it_was(group: dist.ProcessGroup) -> list[str]:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    model = DDP(net, process_group=group)
    before = inspect.signature(optimizer.zero_grad)
    model.register_comm_hook(saef.SAEFState(model, optimizer), saef_hook)
    return [str(before), str(inspect.signature(optimizer.zero_grad))]


def test_zero_grad_says_what_it_takes(pool: RankPool) -> None:
    for before, after in pool.run(zero_grad_is_as_it_was, ranks=2):
        assert before == after and "set_to_none" in after
