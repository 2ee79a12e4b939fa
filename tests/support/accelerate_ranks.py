"""Real Accelerators on the tests' ranks. Each function that takes a `group` is a job for a pool of two ranks."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from torch.utils.data import DataLoader

import saef
from saef.hooks import saef_hook
from saef.integrations.accelerate import attach
from support import trainers
from support.trainers import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    Samples,
    as_torchrun,
    error_of,
    flat,
    local,
    make_net,
    make_optimizer,
    of_both,
    record,
)

EXACT = Samples(dtype=torch.float64)
SHARED = Samples(of_both, torch.float64)


class Run:
    """A script with Accelerate's usual loop.

    Args:
        ours: settings of `attach`; None for plain Accelerate.
        clip: what the loop clips to.
    """

    def __init__(
        self,
        ours: dict[str, Any] | None,
        kind: str = "SGD",
        samples: Samples | None = None,
        clip: float | None = None,
        dropout: float = 0.0,
        scaler: Any = None,
        **words: Any,
    ) -> None:
        as_torchrun()
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, **words)
        if scaler is not None:  # which Accelerate makes itself on GPUs alone
            self.accelerator.scaler = scaler
        samples = samples or Samples()
        self.net, self.clip, self.state, self.norms = make_net(dropout, samples.dtype), clip, None, []
        optimizer = make_optimizer(kind, self.net)
        scheduler = schedule(optimizer)
        loader = DataLoader(samples, BATCH)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.net, optimizer, loader, scheduler
        )
        if ours is not None:
            self.state = attach(self.accelerator, self.model, self.optimizer, **ours)

    def train(self, epochs: int) -> "Run":
        for _ in range(epochs):
            for x, y in self.loader:
                self.step(x, y)
        return self

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss = F.cross_entropy(self.model(x), y)
            accelerator.backward(loss)
            if self.clip is not None and accelerator.sync_gradients:
                self.norms.append(float(accelerator.clip_grad_norm_(self.model.parameters(), self.clip)))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7)


# ---- jobs -----------------------------------------------------------------------------------


def equals_plain(group: dist.ProcessGroup, folder: Path, kind: str, alike: bool, clip: float | None) -> Any:
    """Identity, resumed in the middle, against Accelerate's own run: the largest differences of x, and of the norms."""
    samples = SHARED if alike else EXACT
    plain = Run(None, kind, samples, clip).train(EPOCHS)
    ours = {"compressor": saef.Identity(), "noise_correction": False, "max_grad_norm": clip}
    first = Run(ours, kind, samples, clip).train(1)
    first.accelerator.save_state(folder)
    resumed = Run(ours, kind, samples, clip)
    resumed.accelerator.load_state(folder)
    resumed.train(EPOCHS - 1)
    norms = zip(plain.norms, first.norms + resumed.norms, strict=True)
    return float((flat(plain.net) - flat(resumed.net)).abs().max()), max((abs(a - b) for a, b in norms), default=0.0)


def equals_the_hook(group: dist.ProcessGroup, compressor: saef.Compressor, kind: str) -> Any:
    """(DDP's own loop, the run)."""
    settings = {"compressor": compressor, "max_grad_norm": 0.5, **local(kind)}
    run = Run(settings, kind, clip=0.5)
    batches = [(x, y) for x, y in run.loader]
    expected = trainers.train_by_hand(
        partial(make_optimizer, kind), [batches] * EPOCHS, settings, schedule, every_step=2
    )
    return expected, record(run.train(EPOCHS).state)  # type: ignore[arg-type]


def scaled(group: dist.ProcessGroup, kind: str) -> Any:
    """With a GradScaler that grows until norms overflow: (DDP's own loop, the run, steps of the scheduler)."""
    settings = {"compressor": saef.ScaledSign(), "max_grad_norm": 0.5}

    def scaler() -> torch.amp.GradScaler:
        far = 2.0**20
        return torch.amp.GradScaler("cpu", 2.0**40, growth_factor=far, backoff_factor=1 / far, growth_interval=1)

    run = Run(settings, kind, clip=0.5, scaler=scaler())
    batches = [(x, y) for x, y in run.loader]

    def never(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1000)

    run.scheduler = run.accelerator.prepare(never(run.optimizer))
    make_one = partial(make_optimizer, kind)
    expected = trainers.train_by_hand(make_one, [batches] * EPOCHS, settings, never, scaler=scaler())
    found = record(run.train(EPOCHS).state)  # type: ignore[arg-type]
    return expected, found, run.scheduler.scheduler.last_epoch


def two_models(group: dist.ProcessGroup, folder: Path) -> Any:
    """Each with an attach(), in one loop and one checkpoint: (all of both at the end, and resumed)."""

    def make() -> tuple[Run, Any, Any, saef.SAEFState]:
        run, net = Run({"compressor": saef.TopK(0.2)}), make_net()
        model, optimizer = run.accelerator.prepare(net, make_optimizer("AdamW", net))
        ours: Any = {"compressor": saef.ScaledSign(), "max_grad_norm": 0.5}
        return run, model, optimizer, attach(run.accelerator, model, optimizer, **ours)

    def train(run: Run, model: Any, optimizer: Any, state: saef.SAEFState) -> list[dict[str, Any]]:
        for x, y in run.loader:
            run.step(x, y)
            with run.accelerator.accumulate(model):
                run.accelerator.backward(F.cross_entropy(model(x), y))
                if run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        return [record(s) for s in (run.state, state) if s is not None]

    straight = make()
    train(*straight)
    straight[0].accelerator.save_state(folder)
    expected = train(*straight)
    resumed = make()
    resumed[0].accelerator.load_state(folder)
    return expected, train(*resumed)


def resumes(group: dist.ProcessGroup, folder: Path, kind: str) -> Any:
    """(all at the end of a straight run, and of one resumed by load_state), with dropout; a model beside it, too."""
    ours = {"compressor": saef.TopK(0.2), "averaging": saef.AllReduce(2), **local(kind)}
    straight = Run(ours, kind, dropout=0.3).train(1)
    straight.accelerator.save_state(folder)
    found = [record(straight.train(2).state)]  # type: ignore[arg-type]
    resumed = Run(ours, kind, dropout=0.3)
    torch.manual_seed(50 + dist.get_rank())
    resumed.accelerator.load_state(folder)
    found.append(record(resumed.train(2).state))  # type: ignore[arg-type]
    return found


def other_checkpoints(group: dist.ProcessGroup, folder: Path) -> dict[str, str]:
    """What is loaded of a plain run, of another number of steps, and after detach()."""
    ours, said = {"compressor": saef.TopK(0.2)}, {}
    Run(None).train(1).accelerator.save_state(folder / "plain")
    run = Run(ours)
    run.accelerator.load_state(folder / "plain")
    assert float(run.optimizer.optimizer.state_dict()["state"][0]["momentum_buffer"].abs().max()) > 0
    run.train(1)
    run.accelerator.save_state(folder / "ours")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "ours" / "saef").rename(folder / "elsewhere")
    dist.barrier()
    alone = Run(ours)
    alone.accelerator.load_state(folder / "ours")
    said["alone"] = error_of(lambda: alone.train(1))
    state = run.state
    assert state is not None
    state.detach()
    run.accelerator.save_state(folder / "detached")
    assert not (folder / "detached" / "saef").exists()
    run.accelerator.clip_grad_norm_(run.model.parameters(), 3.0)
    said["again"] = error_of(lambda: attach(run.accelerator, run.model, run.optimizer, compressor=saef.TopK(0.2)))
    return said


def skips(group: dist.ProcessGroup) -> Any:
    """A step with a NaN on one rank: the scheduler waits."""
    run = Run({"compressor": saef.TopK(0.2)}).train(1)
    run.scheduler = run.accelerator.prepare(schedule(run.optimizer))  # made late, of the wrapper
    before, lr = flat(run.net), run.optimizer.param_groups[0]["lr"]
    for i, (x, y) in enumerate(run.loader):
        run.step(x * float("nan") if dist.get_rank() == 1 and i < ACCUMULATE else x, y)
        if i + 1 == ACCUMULATE:
            break
    state: Any = run.state
    return torch.equal(before, flat(run.net)), state.skipped, run.optimizer.param_groups[0]["lr"] == lr


def refused(group: dist.ProcessGroup) -> dict[str, str]:
    """What raises, by what was done."""
    ours = {"compressor": saef.TopK(0.2), "max_grad_norm": 1.0}

    def clipped(call: Callable[[Run], Any], settings: dict[str, Any] = ours) -> Callable[[], Any]:
        def go() -> None:
            run = Run(settings)
            for x, y in run.loader:
                with run.accelerator.accumulate(run.model):
                    run.accelerator.backward(F.cross_entropy(run.model(x), y))
                    call(run)
                    run.optimizer.step()

        return go

    def norm(run: Run, **words: Any) -> Any:
        arguments = {"parameters": run.model.parameters(), "max_norm": 1.0} | words
        return run.accelerator.sync_gradients and run.accelerator.clip_grad_norm_(**arguments)

    def unprepared() -> None:
        run = Run(None)
        attach(run.accelerator, run.model, run.optimizer.optimizer)

    handler = DistributedDataParallelKwargs(comm_hook=saef_hook)  # type: ignore[arg-type]
    cases: dict[str, Callable[[], Any]] = {
        "misspelt": lambda: Run({"compresor": saef.TopK(0.2)}),
        "no max_grad_norm": clipped(norm, {"compressor": saef.TopK(0.2)}),
        "another norm": clipped(partial(norm, max_norm=0.5)),
        "another type": clipped(partial(norm, norm_type=float("inf"))),
        "a part": clipped(lambda run: norm(run, parameters=[run.net.a.weight])),
        "each micro-batch": clipped(lambda run: run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)),
        "by value": clipped(lambda run: run.accelerator.clip_grad_value_(run.model.parameters(), 1.0)),
        "no DDP": lambda: attach(Run(None).accelerator, make_net(), torch.optim.SGD(make_net().parameters(), 0.1)),
        "not prepared": unprepared,
        "register": lambda: (run := Run(ours)).accelerator.register_for_checkpointing(run.scheduler, run.state),
        "register others": lambda: (run := Run(ours)).accelerator.register_for_checkpointing(run.scheduler),
        "comm hook": lambda: Run(ours, kwargs_handlers=[handler]),
    }
    return {name: error_of(case) for name, case in cases.items()}


def attempts(group: dist.ProcessGroup, folder: Path) -> Any:
    """free_memory() between two models of one Accelerator: one whose forward was given up, and one that is saved.

    Returns:
        (names of ours in the folder, x when it was saved, x as a new run loads it, whether the first one is gone)
    """
    ours = {"compressor": saef.TopK(0.2)}
    run = Run(ours).train(1)
    gone, accelerator = weakref.ref(run.net), run.accelerator
    x = flat(run.net)
    for batch, _ in run.loader:
        run.model(batch)  # and no backward
        break
    state: Any = run.state
    assert state.engine.ahead
    accelerator.free_memory()
    assert torch.equal(flat(run.net), x)
    net = make_net(0.0, Samples().dtype)
    run.net = net
    run.model, run.optimizer = accelerator.prepare(net, make_optimizer("SGD", net))
    run.scheduler = accelerator.prepare(schedule(run.optimizer))
    run.state = attach(accelerator, run.model, run.optimizer, **ours)
    del state
    gc.collect()
    run.train(1)
    accelerator.save_state(folder)
    saved = flat(net)
    again = Run(ours)
    again.accelerator.load_state(folder)
    return sorted(p.name for p in folder.glob("saef*")), saved, flat(again.net), gone() is None


def zeroes(group: dist.ProcessGroup) -> bool:
    run = Run({"compressor": saef.TopK(0.2)})
    for set_to_none in (True, False):
        for x, y in run.loader:
            run.accelerator.backward(F.cross_entropy(run.model(x), y))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=set_to_none)
            break
    return run.net.a.weight.grad is not None
