"""Real Lightning Trainers on the tests' ranks. Each function that takes a `group` is a job for a pool of two ranks."""

import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import saef
from saef.hooks import register, saef_hook
from saef.integrations.lightning import SAEFCallback, SAEFStrategy, detach
from support import trainers
from support.trainers import (
    ACCUMULATE,
    BATCH,
    BATCHES,
    EPOCHS,
    Samples,
    error_of,
    local,
    make_net,
    make_optimizer,
    record,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
EXACT = Samples(dtype=torch.float64)
SHARED = Samples(lambda i: i // 2, torch.float64)  # samples are dealt out one by one


class Lit(pl.LightningModule):
    """As a user writes one. Validation looks whether the parameters are x."""

    def __init__(self, kind: str = "SGD", manual: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.net, self.kind, self.automatic_optimization = make_net(dropout), kind, not manual
        self.callback: SAEFCallback | None = None
        self.validated = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        if batch_idx % ACCUMULATE == 0:
            optimizer.zero_grad()
        self.manual_backward(loss / ACCUMULATE)
        if (batch_idx + 1) % ACCUMULATE == 0:
            optimizer.step()
        if (batch_idx + 1) == BATCHES:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("loss", F.cross_entropy(self(x), y), sync_dist=True)
        if self.callback is not None:
            self.check_x()
            self.validated += 1

    def check_x(self) -> None:
        assert self.callback is not None and self.callback.state is not None
        x = trainers.flat(self)
        assert torch.equal(x, self.callback.state.weights.x().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.kind, self)
        return [optimizer], [schedule(optimizer)]


class Positioned:
    """A loader that resumes in the middle of an epoch. Beginning to read draws a random number, as DataLoader does."""

    def __init__(self) -> None:
        self.at, self.batches = 0, epochs(Samples(), 1)[0]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        torch.randint(10, ())
        for i in range(self.at % len(self.batches), len(self.batches)):
            self.at = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.at = saved["at"]


def loader(samples: Samples) -> DataLoader[Any]:
    """With a sampler, or Lightning would shuffle."""
    return DataLoader(samples, BATCH, sampler=DistributedSampler(samples, 2, dist.get_rank(), shuffle=False))


def epochs(samples: Samples, count: int) -> list[list[Any]]:
    """What that gives this rank."""
    return [[*loader(samples)]] * count


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)


def trainer(callbacks: Any = (), strategy: Any = None, **words: Any) -> pl.Trainer:
    settings = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATE,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "limit_val_batches": 2,
        "num_sanity_val_steps": 1,
    } | words
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy or DDPStrategy(process_group_backend="gloo"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        **settings,
    )


def fit(
    ours: dict[str, Any] | None,
    module: Lit,
    samples: Any = None,
    callbacks: Any = (),
    ckpt_path: Any = None,
    **words: Any,
) -> tuple[Any, pl.Trainer]:
    """One fit, with saef's callback unless `ours` is None: (the callback, the Trainer)."""
    callback = None if ours is None else SAEFCallback(**ours)
    t = trainer([c for c in (callback, *callbacks) if c is not None], **words)
    source = samples if isinstance(samples, Positioned | DataLoader) else loader(samples or Samples())
    if callback is not None:
        module.callback = callback
    t.fit(module, source, loader(Samples()), ckpt_path=ckpt_path)
    return callback, t


# ---- jobs -----------------------------------------------------------------------------------


def equals_plain(group: dist.ProcessGroup, folder: Path, kind: str, alike: bool, words: dict[str, Any]) -> float:
    """Identity, resumed in the middle, against Lightning's own run: the largest difference of x."""
    samples = SHARED if alike else EXACT
    words = {"precision": "64-true", **words}
    plain = Lit(kind)
    fit(None, plain, samples, **words)
    ours = {"compressor": saef.Identity(), "noise_correction": False}
    _, t = fit(ours, Lit(kind), samples, **{**words, "max_epochs": 1})
    t.save_checkpoint(folder / "a.ckpt")
    resumed = Lit(kind)
    callback, t = fit(ours, resumed, samples, ckpt_path=folder / "a.ckpt", **words)
    assert callback.state.steps == t.global_step == trainers.STEPS and resumed.validated >= 2 * (EPOCHS - 1)
    assert t.gradient_clip_val == words.get("gradient_clip_val")
    return float((trainers.flat(plain) - trainers.flat(resumed)).abs().max())


def equals_the_hook(group: dist.ProcessGroup, compressor: saef.Compressor, kind: str) -> Any:
    """Automatic and manual optimization, the callback and the strategy: (DDP's own loop, the runs)."""
    settings: Any = {"compressor": compressor, "max_grad_norm": 0.5, **local(kind)}
    expected = trainers.train_by_hand(partial(make_optimizer, kind), epochs(Samples(), EPOCHS), settings, schedule)
    runs = [record(fit({"compressor": compressor, **local(kind)}, Lit(kind), gradient_clip_val=0.5)[0].state)]
    runs.append(record(fit(settings, Lit(kind, manual=True), accumulate_grad_batches=1)[0].state))
    strategy = SAEFStrategy(process_group_backend="gloo", find_unused_parameters=True, **settings)
    fit(None, Lit(kind), strategy=strategy)
    runs.append(record(strategy.callback.state))
    return expected, runs


def resumes(group: dist.ProcessGroup, folder: Path, kind: str, in_the_middle: bool) -> Any:
    """(all at the end of a straight run, and of one resumed from the Trainer's checkpoint), with dropout."""
    ours = {"compressor": saef.TopK(0.2), "averaging": saef.AllReduce(2), **local(kind)}
    every = {"every_n_train_steps": 4} if in_the_middle else {"every_n_epochs": 1}
    found = []
    for path in (None, folder / ("epoch=1-step=4.ckpt" if in_the_middle else "epoch=0-step=3.ckpt")):
        saving = ModelCheckpoint(folder if path is None else folder / "again", save_top_k=-1, **every)  # type: ignore[arg-type]
        torch.manual_seed(5)
        module = Lit(kind, dropout=0.3)
        source: Any = Positioned() if in_the_middle else DataLoader(Samples(), BATCH)  # which Lightning shuffles
        torch.manual_seed(dist.get_rank() + (0 if path is None else 50))
        callback, _ = fit(ours, module, source, [saving], path)
        found.append(record(callback.state))
    return found


def other_checkpoints(group: dist.ProcessGroup, folder: Path) -> dict[str, str]:
    """What is kept beside Lightning's files, and what is loaded of others."""
    ours, said = {"compressor": saef.TopK(0.2)}, {}
    last = ModelCheckpoint(folder, save_top_k=1, monitor="loss", save_last="link", filename="{epoch}")
    callback, t = fit(ours, Lit(), callbacks=[last])
    kept = sorted(p.name for p in (folder / "saef").iterdir())
    assert kept == [Path(last.best_model_path).name], kept
    resumed, _ = fit(ours, Lit(), ckpt_path=folder / "last.ckpt", max_epochs=EPOCHS + 1)  # a link
    assert resumed.state.steps == (EPOCHS + 1) * BATCHES // ACCUMULATE
    t.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert not (folder / "saef" / "weights.ckpt").exists()
    # a plain run's checkpoint: momentum is taken over
    _, plain = fit(None, Lit(), max_epochs=1)
    plain.save_checkpoint(folder / "plain.ckpt")
    callback, _ = fit(ours, Lit(), ckpt_path=folder / "plain.ckpt", max_epochs=2)
    assert callback.state.steps == BATCHES // ACCUMULATE
    # one of ours without what is beside it
    callback, t = fit(ours, Lit(), max_epochs=1)
    t.save_checkpoint(folder / "alone.ckpt")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "saef" / "alone.ckpt").rename(folder / "elsewhere")
    dist.barrier()
    said["alone"] = error_of(lambda: fit(ours, Lit(), ckpt_path=folder / "alone.ckpt"))
    said["remote"] = error_of(lambda: t.save_checkpoint("s3://bucket/a.ckpt"))
    return said


def precision(group: dist.ProcessGroup, kind: str) -> Any:
    """bfloat16, and float16 with a scaler that overflows at first: (DDP's own loop, the run) of each."""
    settings: Any = {"compressor": saef.ScaledSign(), "max_grad_norm": 0.5}

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**20)

    found = []
    for dtype, words, scale in (
        (torch.bfloat16, {"precision": "bf16-mixed"}, None),
        (torch.float16, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler())]}, scaler()),
    ):
        expected = trainers.train_by_hand(
            partial(make_optimizer, kind), epochs(Samples(), EPOCHS), settings, schedule, dtype=dtype, scaler=scale
        )
        found.append((expected, record(fit(settings, Lit(kind), **words)[0].state)))
    return found


def logs(group: dist.ProcessGroup, folder: Path) -> Any:
    """What self.log got, and a second fit and Trainer(strategy="saef")."""
    t = trainer(strategy="saef", logger=pl.loggers.CSVLogger(folder), log_every_n_steps=2, default_root_dir=folder)
    module = Lit()
    t.fit(module, loader(Samples()), loader(Samples()))
    first = t.strategy.callback.state
    metrics = dict(t.callback_metrics)
    t.fit_loop.epoch_progress.reset()
    t.fit_loop.max_epochs = 1
    t.fit(module, loader(Samples()), loader(Samples()))
    second = t.strategy.callback.state
    assert first is not second and not first.engine.attached and second.engine.attached
    assert sum(isinstance(c, SAEFCallback) for c in t.callbacks) == 1
    t.validate(module, loader(Samples()), verbose=False)
    return {name: float(v) for name, v in metrics.items()}


def finds_lr(group: dist.ProcessGroup, folder: Path, kind: str) -> Any:
    """(what lr_find saw plainly, with Identity and with EF; with top-k a fit after it, and one without it)."""
    exact, found = {"compressor": saef.Identity(), "noise_correction": False}, []

    def tuned(
        ours: dict[str, Any] | None, samples: Samples, clip: float | None = None, **words: Any
    ) -> tuple[Any, Any, Lit, pl.Trainer]:
        callback, module = None if ours is None else SAEFCallback(**ours), Lit(kind)
        module.lr = 0.1  # type: ignore[assignment]
        t = trainer([c for c in [callback] if c], default_root_dir=folder, gradient_clip_val=clip, **words)
        finder: Any = Tuner(t).lr_find(module, loader(samples), min_lr=1e-4, num_training=10, update_attr=False)
        assert dist.get_rank() or not (folder / "saef").exists()  # where it had kept a checkpoint meanwhile
        return callback, finder, module, t

    ours = {"compressor": saef.TopK(0.2)}
    for settings in (None, exact, {**ours, "step_ahead": 0.0}):  # with it, of alike data, this loss is the plain one
        losses = tuned(settings, SHARED, precision="64-true")[1].results
        found.append((losses["loss"], losses["lr"]))
    callback, _, module, t = tuned(ours, Samples(), clip=0.1)
    t.fit(module, loader(Samples()))
    straight, _ = fit(ours, Lit(kind), gradient_clip_val=0.1)
    return found, record(callback.state), record(straight.state)


class AsOnGPU(DDPStrategy):
    """Registers the communication hook, which Lightning does on a GPU alone."""

    def _register_ddp_hooks(self) -> None:
        with mock.patch.object(DDPStrategy, "root_device", torch.device("cuda")):
            super()._register_ddp_hooks()


def comm_state(group: dist.ProcessGroup, compressor: saef.Compressor) -> Any:
    """DDPStrategy(ddp_comm_state=Later): (the run with the callback, that, what a CPU's own way warns of)."""
    callback, _ = fit({"compressor": compressor}, Lit("AdamW"))
    later = saef.Later(compressor=compressor)
    words: Any = {"process_group_backend": "gloo", "ddp_comm_hook": saef_hook}
    fit(None, Lit("AdamW"), strategy=AsOnGPU(ddp_comm_state=later, **words))
    ignored, said = saef.Later(compressor=compressor), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("saef").addHandler(handler)
    fit(None, Lit("AdamW"), strategy=DDPStrategy(ddp_comm_state=ignored, **words))
    logging.getLogger("saef").removeHandler(handler)
    return record(callback.state), record(later.state), said  # type: ignore[arg-type]


class Two(Lit):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.a.parameters(), 0.1), torch.optim.SGD(self.net.b.parameters(), 0.1)]


class Twice(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            optimizer.step()


class Early(Lit):
    """Zeroes the gradients by the optimizer itself, after the forward; looks at parameters after the backward."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        loss = F.cross_entropy(self.net(x), y)
        optimizer.optimizer.zero_grad()
        self.manual_backward(loss)
        self.check_x()
        optimizer.step()


class Asks(Lit):
    """Clips by itself, as Lightning's documentation shows it, to the Trainer's number or its own."""

    def __init__(self, own: Any = None, algorithm: Any = None, kind: str = "SGD", manual: bool = False) -> None:
        super().__init__(kind, manual)
        self.own, self.algorithm, self.seen = own, algorithm, list[Any]()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(self.trainer.gradient_clip_val)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.seen.append(gradient_clip_val)
        self.clip_gradients(optimizer, self.own or gradient_clip_val, self.algorithm or gradient_clip_algorithm)


def clips_by_itself(group: dist.ProcessGroup, kind: str) -> Any:
    """(the run without an override, those with one, what these saw of the Trainer's number, what raises)."""
    ours: Any = {"compressor": saef.TopK(0.2), **local(kind)}
    limited = {**ours, "max_grad_norm": 0.1}
    expected = record(fit(ours, Lit(kind), gradient_clip_val=0.1)[0].state)
    runs, seen = [], set[Any]()
    for module, settings, words in (
        (Asks(kind=kind), ours, {"gradient_clip_val": 0.1}),
        (Asks(kind=kind), ours, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}),
        (Asks(0.1, "norm", kind), limited, {}),
    ):
        callback, t = fit(settings, module, **words)
        runs.append(record(callback.state))
        seen |= {*module.seen} if words else set()
        assert t.gradient_clip_val == words.get("gradient_clip_val") and not vars(t.precision_plugin)
    said = {
        "another norm": error_of(lambda: fit(ours, Asks(1e-3, "norm", kind))),
        "another norm than the Trainer's": error_of(lambda: fit(ours, Asks(1e-3, kind=kind), gradient_clip_val=0.1)),
        "by value": error_of(lambda: fit(ours, Asks(1e-3, "value", kind))),
    }
    return expected, runs, seen, said


def goes_on_without(group: dist.ProcessGroup, by_module: bool) -> Any:
    """(what a plain Trainer says of a module that is saef's, x of one that is let go of, x of a new one like it)."""
    module, new = Lit(), Lit()
    callback, _ = fit({"compressor": saef.TopK(0.2)}, module, max_epochs=1)
    module.callback = None
    said = error_of(lambda: fit(None, module, max_epochs=1))
    detach(module) if by_module else callback.state.detach()
    assert not callback.state.engine.attached
    detach(module)
    detach(new)
    new.load_state_dict(module.state_dict())
    for each in (module, new):
        fit(None, each, max_epochs=1)
    return said, trainers.flat(module), trainers.flat(new)


def with_fabric(group: dist.ProcessGroup, folder: Path) -> Any:
    """A loop of Fabric, resumed in its middle: (DDP's own loop, the run, what is said of its own ways)."""
    ours: Any = {"compressor": saef.TopK(0.2), "max_grad_norm": 0.5}
    expected = trainers.train_by_hand(partial(make_optimizer, "AdamW"), epochs(Samples(), 2), ours, schedule)

    def setup() -> tuple[Fabric, Any, Any, Any, saef.SAEFState]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricDDP(process_group_backend="gloo"))
        fabric.launch()
        net = make_net()
        inner = make_optimizer("AdamW", net)
        scheduler = schedule(inner)
        model, optimizer = fabric.setup(net, inner)
        state = saef.SAEFState(model, optimizer, **ours)
        register(model, state)
        return fabric, model, optimizer, scheduler, state

    def train(fabric: Fabric, model: Any, optimizer: Any, scheduler: Any, state: saef.SAEFState) -> None:
        for i, (x, y) in enumerate(loader(Samples())):
            last = (i + 1) % ACCUMULATE == 0
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(F.cross_entropy(model(x), y) / ACCUMULATE)
            if last:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()

    first = setup()
    train(*first)
    mine = {"optimizer": first[2].state_dict(), "scheduler": first[3].state_dict()}
    saef.save_checkpoint(folder / "saef", first[-1], mine)
    first[0].save(folder / "mine.ckpt", {"saef": first[-1]})
    second = setup()
    said = {
        "in fabric.save": error_of(lambda: second[-1].load_state_dict(second[0].load(folder / "mine.ckpt")["saef"])),
        "no ddp": error_of(lambda: register(make_net(), second[-1])),
        "twice": error_of(lambda: register(second[1], second[-1])),
    }
    extra = saef.load_checkpoint(folder / "saef", second[-1])
    assert extra is not None
    second[2].load_state_dict(extra["optimizer"])
    second[3].load_state_dict(extra["scheduler"])
    train(*second)
    return expected, record(second[-1]), said


class Clips(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        self.clip_gradients(optimizer, 1e-3, "norm")
        optimizer.step()


def refused(group: dist.ProcessGroup) -> dict[str, str]:
    """What raises, by what was done."""
    ours, once = {"compressor": saef.TopK(0.2)}, {"accumulate_grad_batches": 1, "max_epochs": 1}

    def hooked(**words: Any) -> DDPStrategy:
        return DDPStrategy(process_group_backend="gloo", **words)

    early = Early(manual=True)
    fit(ours, early, **once)
    cases: dict[str, Any] = {
        "misspelt": lambda: SAEFCallback(compresor=saef.TopK(0.2)),
        "bad value": lambda: SAEFCallback(step_ahead=2.0),
        "metrics": lambda: fit({**ours, "metrics": ("byte_per_step",)}, Lit()),
        "misspelt strategy": lambda: SAEFStrategy(find_unused_parameter=True),
        "two optimizers": lambda: fit(ours, Two(manual=True), **once),
        "two steps": lambda: fit(ours, Twice(manual=True), **once),
        "own clipping": lambda: fit(ours, Clips(manual=True), **once),
        "comm hook": lambda: fit(ours, Lit(), strategy=hooked(ddp_comm_hook=saef_hook)),
        "by value": lambda: fit(ours, Lit(), gradient_clip_val=1.0, gradient_clip_algorithm="value"),
        "two norms": lambda: fit({**ours, "max_grad_norm": 2.0}, Lit(), gradient_clip_val=1.0),
        "twice": lambda: fit(ours, Lit(), strategy=SAEFStrategy(process_group_backend="gloo")),
        "other strategy": lambda: SAEFCallback().on_fit_start(mock.Mock(strategy=mock.Mock(spec=FSDPStrategy)), None),
    }
    return {name: error_of(case) for name, case in cases.items()}


class Looks(Lit):
    """Looks before gradients are zeroed, which Lightning does between a forward and its backward; and fails once."""

    failing = False

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.check_x()
        self.validated += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.failing and batch_idx == 3:
            raise MemoryError("as on a GPU that is full")
        return loss


def looks_and_fails(group: dist.ProcessGroup) -> tuple[int, bool, bool]:
    """How often it looked; whether errors were owed when it failed, at x; whether all ranks are alike at the end."""
    callback, model = SAEFCallback(compressor=saef.TopK(0.2)), Looks()
    model.callback, model.failing = callback, True
    said = error_of(lambda: trainer([callback]).fit(model, loader(Samples())))
    assert "a GPU that is full" in said, said
    looked = model.validated
    model.check_x()
    at_x = bool(callback.state is not None and callback.state.e.any())
    model.failing = False
    trainer([callback]).fit(model, loader(Samples()))  # another Trainer wraps the same model, which DDP broadcasts
    found = [torch.empty_like(trainers.flat(model)) for _ in range(2)]
    dist.all_gather(found, trainers.flat(model))
    return looked, at_x, torch.equal(*found)
