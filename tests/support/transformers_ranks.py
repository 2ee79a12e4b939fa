"""Real Trainers of transformers on the tests' ranks. Each function that takes a `group` is a job for two ranks."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, get_linear_schedule_with_warmup
from transformers.utils import logging

import saef
from saef.integrations.transformers import SAEFCallback
from support import trainers
from support.trainers import (
    ACCUMULATE,
    BATCH,
    BETAS,
    EPOCHS,
    LR,
    STEPS,
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

logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="transformers")
WARMUP = 3


class Data(Samples):
    """As transformers' Trainer takes it."""

    def __getitem__(self, i: int) -> Any:
        x, label = super().__getitem__(i)
        return {"x": x, "labels": label}


EXACT = Data(dtype=torch.float64)
SHARED = Data(of_both, torch.float64)


class Recording(Trainer):  # type: ignore[misc]
    """Keeps the batches that it has had."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        self.had = [*getattr(self, "had", []), (inputs["x"].clone(), inputs["labels"].clone())]
        return super().training_step(model, inputs, *args)  # type: ignore[no-any-return]


class InOrder(Trainer):  # type: ignore[misc]
    """Without the shuffling, so that ranks can be given the same batches."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def make(
    ours: dict[str, Any] | None,
    folder: Path,
    kind: str = "AdamW",
    data: Any = None,
    dropout: float = 0.0,
    **words: Any,
) -> tuple[SAEFCallback | None, Trainer]:
    """A Trainer, with saef's callback unless `ours` is None."""
    as_torchrun()
    AcceleratorState._reset_state()
    data = data or Data()
    net = make_net(dropout, data.dtype)
    settings = {
        "num_train_epochs": EPOCHS,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": LR[kind],
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "save_strategy": "no",
        "logging_steps": 2,
    } | words
    args = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=BATCH, report_to="none", disable_tqdm=True, **settings
    )
    # Its own AdamW where that is the kind; SGD with momentum is given.
    given = (None, None) if kind == "AdamW" else (make_optimizer(kind, net), None)
    t = (InOrder if data is SHARED else Recording)(net, args, train_dataset=data, eval_dataset=Data(), optimizers=given)
    t.remove_callback(PrinterCallback)
    callback = None
    if ours is not None:
        t.add_callback(callback := SAEFCallback(t, **ours))
    return callback, t


def state_of(callback: SAEFCallback | None) -> saef.SAEFState:
    assert callback is not None and callback.state is not None
    return callback.state


# ---- jobs -----------------------------------------------------------------------------------


def equals_plain(group: dist.ProcessGroup, folder: Path, kind: str, alike: bool, clip: float) -> Any:
    """Identity, resumed in the middle, against the Trainer's own run: the largest differences, of x and of norms."""
    data = SHARED if alike else EXACT
    _, plain = make(None, folder / "plain", kind, data, max_grad_norm=clip, adam_beta2=BETAS[1])
    plain.train()
    ours = {"compressor": saef.Identity(), "noise_correction": False}
    saving = {"max_grad_norm": clip, "save_strategy": "steps", "save_steps": 4, "adam_beta2": BETAS[1]}
    make(ours, folder / "ours", kind, data, **saving)[1].train()
    callback, resumed = make(ours, folder / "ours", kind, data, **saving)
    resumed.train(resume_from_checkpoint=str(folder / "ours" / "checkpoint-4"))
    assert state_of(callback).steps == resumed.state.global_step == STEPS

    def norms(t: Trainer) -> list[float]:
        return [r["grad_norm"] for r in t.state.log_history if "grad_norm" in r]

    apart = [abs(a - b) for a, b in zip(norms(plain), norms(resumed), strict=True)]
    return float((flat(plain.model) - flat(resumed.model)).abs().max()), max(apart), norms(plain)


def equals_the_hook(group: dist.ProcessGroup, folder: Path, compressor: saef.Compressor, kind: str) -> Any:
    """(DDP's own loop, the run), on the batches that the run had."""

    def adamw(net: Any) -> torch.optim.Optimizer:  # as the Trainer makes it, without decay of biases
        groups = [{"params": [net.a.weight, net.b.weight]}, {"params": [net.a.bias, net.b.bias], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LR["AdamW"], weight_decay=0.01)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)

    settings = {"compressor": compressor, **local(kind)}
    callback, t = make(settings, folder, kind, weight_decay=0.01)
    t.train()
    settings["max_grad_norm"] = 1.0
    make_one = adamw if kind == "AdamW" else partial(make_optimizer, kind)
    expected = trainers.train_by_hand(make_one, [t.had], settings, schedule, every_step=1)
    return expected, record(state_of(callback))


def resumes(group: dist.ProcessGroup, folder: Path, kind: str, at: int) -> Any:
    """(all at the end of a straight run, and of one resumed from its checkpoint), with dropout."""
    ours = {"compressor": saef.TopK(0.2), "averaging": saef.AllReduce(2), **local(kind)}
    words = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    callback, t = make(ours, folder, kind, dropout=0.3, **words)
    t.train()
    found = [record(state_of(callback))]
    callback, t = make(ours, folder, kind, dropout=0.3, **words)
    torch.rand(5)
    t.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    found.append(record(state_of(callback)))
    return found


def best_model(group: dist.ProcessGroup, folder: Path) -> Any:
    """load_best_model_at_end, evaluation at x, the log, a further train(), and detach(): what the log holds."""
    words = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    at_x = []

    callback, t = make({"compressor": saef.TopK(0.2)}, folder, load_best_model_at_end=True, **words)

    def metrics(_: Any) -> dict[str, float]:
        at_x.append(torch.equal(flat(t.model), state_of(callback).weights.x()))
        return {}

    t.compute_metrics = metrics
    t.train()
    assert at_x == [True] * EPOCHS, at_x
    best = Path(t.state.best_model_checkpoint)
    saved: dict[str, Tensor] = load_file(best / "model.safetensors")
    assert all(torch.equal(p, saved[n]) for n, p in t.model.named_parameters())
    log = t.state.log_history
    first = state_of(callback)
    before = flat(t.model)
    t.train()
    assert state_of(callback) is first and first.steps == 2 * STEPS and not torch.equal(before, flat(t.model))
    first.detach()
    assert (best / "saef").is_dir()
    return log


def other_checkpoints(group: dist.ProcessGroup, folder: Path) -> dict[str, str]:
    ours, saving = {"compressor": saef.TopK(0.2)}, {"save_strategy": "steps", "save_steps": 4}
    make(None, folder / "plain", **saving)[1].train()
    callback, t = make(ours, folder / "plain", **saving)
    t.train(resume_from_checkpoint=str(folder / "plain" / "checkpoint-4"))
    assert state_of(callback).steps == STEPS
    make(ours, folder / "ours", **saving)[1].train()
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "ours" / "checkpoint-4" / "saef").rename(folder / "elsewhere")
    dist.barrier()
    callback, t = make(ours, folder / "ours", **saving)

    def resume() -> None:
        t.train(resume_from_checkpoint=str(folder / "ours" / "checkpoint-4"))

    said = {"alone": error_of(resume)}
    state_of(callback).reset_errors()
    resume()
    assert state_of(callback).steps == STEPS
    return said


def fails_in_a_save(group: dist.ProcessGroup, folder: Path, where: str) -> Any:
    """(the error in the second save, all checkpoints then, a restart's error, all at its end, and without all that)."""
    ours, saving = {"compressor": saef.TopK(0.2)}, {"save_strategy": "steps", "save_steps": 3}
    callback, t = make(ours, folder, **saving)
    of, name = {"ours": (saef, "save_checkpoint"), "the Trainer's": (t, "_save_scaler")}[where]
    original, had = getattr(of, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        had.append(t.state.global_step)
        if len(had) == 2:
            raise MemoryError("as a full disk")
        return original(*args, **kwargs)

    with mock.patch.object(of, name, dies):
        said = error_of(t.train)
    dist.barrier()
    there = sorted(p.name for p in folder.glob("checkpoint-*"))
    dist.barrier()
    callback, t = make(ours, folder, **saving)
    again = error_of(lambda: t.train(resume_from_checkpoint=True))
    if again != "no error":
        t.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed = record(state_of(callback))
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    callback, t = make(ours, folder / "straight", **saving)
    t.train()
    return said, there, again, resumed, record(state_of(callback))


def refused(group: dist.ProcessGroup, folder: Path) -> dict[str, str]:
    """What raises, by what was done."""
    ours = {"compressor": saef.TopK(0.2)}

    def searched() -> None:
        callback, t = make(ours, folder)
        t.state.is_hyper_param_search = True
        callback.on_train_begin(t.args, t.state, t.control)  # type: ignore[union-attr]

    def changed() -> None:
        _, t = make(ours, folder, num_train_epochs=1)
        t.train()
        t.args.max_grad_norm = 2.0
        t.train()

    def looked_first(method: str) -> None:
        _, t = make(ours, folder)
        getattr(t, method)(Data())
        t.train()

    cases: dict[str, Callable[[], Any]] = {
        "evaluate first": lambda: looked_first("evaluate"),
        "predict first": lambda: looked_first("predict"),
        "evaluate on start": lambda: make(ours, folder, eval_on_start=True, eval_strategy="epoch")[1].train(),
        "misspelt": lambda: make({"compresor": saef.TopK(0.2)}, folder),
        "metrics": lambda: make({**ours, "metrics": ("byte_per_step",)}, folder)[1].train(),
        "max_grad_norm": lambda: make({"max_grad_norm": 1.0}, folder),
        "search": searched,
        "another norm": changed,
    }
    return {name: error_of(case) for name, case in cases.items()}
