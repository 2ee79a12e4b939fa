"""A step that some ranks drop after its backward: p.grad is each rank's own, and so is what a script decides by it."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.equal import same, snapshot
from support.ranks import RankPool
from support.training import batch, flat, make_net

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "Rotating": {"averaging": saef.Rotating(3)},
    "AllReduce": {"averaging": saef.AllReduce(1)},
    "sharded": {"exchange": "sharded", "compressor": saef.TopK(0.3), "audit_every": 4},
    "AdamW": {"optimizer": "AdamW", "compressor": saef.ScaledSign(block=7)},
}
both = pytest.mark.parametrize("setting", SETTINGS)


class Run:
    def __init__(self, group: dist.ProcessGroup, setting: str, **more: Any) -> None:
        options = {**SETTINGS[setting], **more}
        kind = getattr(torch.optim, options.pop("optimizer", "SGD"))
        self.net, self.rank = make_net(), dist.get_rank(group)
        self.model = DDP(self.net, process_group=group, bucket_cap_mb=0.0005)
        self.optimizer: Any = kind(self.net.parameters(), lr=0.05)
        self.state = saef.SAEFState(self.model, self.optimizer, **options)
        self.model.register_comm_hook(self.state, saef_hook)

    def backward(self, t: int, factor: float = 1.0) -> None:
        x, y = batch(self.rank, t)
        (F.mse_loss(self.model(x), y) * factor).backward()

    def step(self, t: int, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        self.backward(t, factor)
        self.optimizer.step()


def no_gradients(run: Run) -> None:
    for p in run.net.parameters():
        p.grad = None


DROPS: dict[str, Callable[[Run], None]] = {
    "zero_grad": lambda run: run.optimizer.zero_grad(),
    "zeros": lambda run: run.optimizer.zero_grad(set_to_none=False),
    "the model's": lambda run: run.model.zero_grad(),
    "by hand": no_gradients,
}


def drop_alone(group: dist.ProcessGroup, setting: str, drop: str) -> str:
    """Rank 1 drops step 2; what this rank is told, and when."""
    run = Run(group, setting)
    for t in range(2):
        run.step(t)
    run.optimizer.zero_grad()
    run.backward(2)
    if run.rank != 1:
        run.optimizer.step()
    elif drop:
        DROPS[drop](run)
    began = time.monotonic()
    try:
        for t in range(3, 6):
            run.backward(t)
            run.optimizer.step()
            run.optimizer.zero_grad()
    except RuntimeError as error:
        assert time.monotonic() - began < 20  # the group's timeout is longer
        return str(error)
    return "nothing was raised"


def accumulate(group: dist.ProcessGroup, case: str, compressor: saef.Compressor | None) -> Tensor:
    """Without no_sync: gradients that are zero on a rank by themselves were not dropped; who looks, need not be all."""
    rank, net = dist.get_rank(group), make_net()
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    if compressor is not None:
        state = saef.SAEFState(model, optimizer, compressor=compressor, audit_every=2)
        model.register_comm_hook(state, saef_hook)
    for t in range(5):
        optimizer.zero_grad()
        for part in range(2):
            x, y = batch(rank, 10 * t + part)
            nothing = rank == 1 and (part == 0 or case == "all of a rank") and case != "looked at by one"
            (F.mse_loss(model(x), y) * (0.0 if nothing else 1.0)).backward()
        if case == "looked at by one" and rank == 0:
            assert float(model(x).mean()) < 100
        optimizer.step()
        if case == "looked at by one" and rank == 0:
            assert float(model(x).mean()) < 100  # with gradients enabled, which nobody uses
    return flat(net)


@pytest.mark.parametrize("case", ["first of a rank", "all of a rank", "looked at by one"])
def test_what_only_looks_like_a_drop(pool: RankPool, case: str) -> None:
    ours, plain = (pool.run(accumulate, case, c, ranks=2) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def check_told(said: list[str], where: str) -> None:
    """Each rank says where it is, and where the others are."""
    for rank, text in enumerate(said):
        own, others = (where, '(at "a training step")') if rank == 1 else ("a training step", f'rank 1 (at "{where}')
        assert text.startswith(f'rank {rank} of {len(said)} is at "{own}') and others in text, text


@both
def test_ranks_are_told_of_a_step_that_one_alone_drops(pool: RankPool, setting: str) -> None:
    check_told(pool.run(drop_alone, setting, "zero_grad", ranks=2), "a step that is dropped after its backward")


@pytest.mark.parametrize("drop", [*DROPS][1:])
def test_however_it_is_dropped(pool: RankPool, drop: str) -> None:
    check_told(pool.run(drop_alone, "as it comes", drop, ranks=3), "a step that is dropped after its backward")


@pytest.mark.parametrize("setting", ["as it comes", "AllReduce"])
def test_or_goes_on_to_accumulate(pool: RankPool, setting: str) -> None:
    check_told(pool.run(drop_alone, setting, "", ranks=2), "a second backward before step()")


def guard(group: dist.ProcessGroup, setting: str, guarded: bool, poison: float) -> list[Tensor]:
    """A number that is none on rank 1 in two steps; guarded: that rank sees it, and does not call step()."""
    run = Run(group, setting)
    for t in range(8):
        bad = run.rank == 1 and t in (3, 4)
        run.optimizer.zero_grad()
        run.backward(t, poison if bad else 1.0)
        if not (guarded and bad):
            run.optimizer.step()
    assert (run.state.steps, run.state.skipped, run.state.skipped_in_a_row) == (6, 2, 0)
    return snapshot(run.state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@both
def test_a_guard_against_bad_numbers_is_what_all_ranks_do(pool: RankPool, setting: str, poison: float) -> None:
    guarded = pool.run(guard, setting, True, poison, ranks=2)
    skipped = pool.run(guard, setting, False, poison, ranks=2)
    for a, b in zip(guarded, skipped, strict=True):
        assert same(a, b)


def together(group: dist.ProcessGroup, setting: str, dropped: bool) -> list[Tensor]:
    """All ranks drop a step; without averaging it is as if it had not been."""
    run = Run(group, setting)
    for t in range(6):
        run.optimizer.zero_grad()
        if t == 3 and dropped:
            run.backward(50)
            run.optimizer.zero_grad()
        run.backward(t)
        run.optimizer.step()
    return snapshot(run.state)


@both
def test_all_may_drop_a_step(pool: RankPool, setting: str) -> None:
    dropped, without = (pool.run(together, setting, yes, ranks=2) for yes in (True, False))
    for a, b in zip(dropped, without, strict=True):
        assert same(a, b)


def adversaries(group: dist.ProcessGroup, compressor: saef.Compressor | None) -> Tensor:
    """Each generator's backward goes through the discriminator, whose gradients of it are dropped."""
    rank, nets = dist.get_rank(group), (make_net(), make_net(sizes=(1, 5, 1)))
    models = [DDP(net, process_group=group) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    if compressor is not None:
        for model, optimizer in zip(models, optimizers, strict=True):
            model.register_comm_hook(saef.SAEFState(model, optimizer, compressor=compressor), saef_hook)
    (generate, judge), (of_generator, of_judge) = models, optimizers
    for t in range(6):
        x, y = batch(rank, t)
        fake = generate(x)
        of_judge.zero_grad()
        (judge(y) - judge(fake.detach())).mean().backward()
        of_judge.step()
        of_generator.zero_grad()
        judge(fake).mean().backward()
        of_generator.step()
    return torch.cat([flat(net) for net in nets])


def test_what_a_generator_leaves_in_its_discriminator_is_dropped_by_all(pool: RankPool) -> None:
    ours, plain = (pool.run(adversaries, c, ranks=2) for c in (saef.Identity(), None))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
