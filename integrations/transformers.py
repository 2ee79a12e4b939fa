"""Hugging Face's Trainer: `trainer.add_callback(SAEFCallback(trainer, compressor=...))`, before `trainer.train()`.

The Trainer wraps the model and makes the optimizer when it trains, by Accelerate; so the callback attaches a SAEFState
when training begins (`saef.integrations.accelerate`), and the rest is the Trainer's own loop:

    max_grad_norm                of TrainingArguments, becomes SAEFState's; grad_norm in the log is this rank's
    checkpoint-STEP/             gets saef/, a checkpoint of all ranks (`saef.storage`), beside the Trainer's files;
                                 written first, in _saef/, so that what fails in it leaves no checkpoint-STEP behind
    resume_from_checkpoint       loads it
    a step that ranks skip       the scheduler waits
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

import saef
from saef.step.arguments import CLIPS, Agreed, check_known
from saef.step.kept import STEP
from saef.step.unwrap import innermost, unwrap_model
from saef.storage import COMPLETE
from saef.telemetry import LOGGED

from .accelerate import bind, load, logger

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"saef.integrations.transformers needs transformers and accelerate: pip install 'saef[transformers]' ({error})"
    ) from error


@final
class SAEFCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer train by a SAEFState. On all ranks.

    Args:
        trainer: that the callback is added to.
        metrics: which of `SAEFState.metrics()` go into the Trainer's log, as "saef/NAME", in a record of their own
            after that with the loss.
        settings: keyword arguments of SAEFState, but for max_grad_norm, which is TrainingArguments' (1.0 unless set; 0
            for none), and for grad_scaler, process_group and transport, which are the Trainer's.

    Attributes:
        state: the SAEFState, from the first step on. It stays after train(): a further train() of the same model and
            optimizer goes on with it, and state.detach() lets go of them.

    Raises:
        TypeError, ValueError: on a keyword that is none or the Trainer's, or a value that no SAEFState takes.
        ValueError: in train(), as `saef.integrations.accelerate.attach`.
        RuntimeError: in train(), on a checkpoint of saef without its part, naming the newest one that has it.
    """

    state: saef.SAEFState | None = None

    def __init__(self, trainer: Trainer, *, metrics: tuple[str, ...] = LOGGED, **settings: Unpack[Agreed]) -> None:
        if "max_grad_norm" in settings:
            raise TypeError("SAEFCallback takes max_grad_norm from TrainingArguments(max_grad_norm=...): set it there")
        check_known("SAEFCallback", settings, Agreed.__annotations__, TypeError)
        self._trainer, self._metrics, self._later = trainer, metrics, saef.Later(**settings)
        self._checkpoint: str | None = None  # to resume from
        self._of: Any = None  # the DDP and the optimizer of the state
        self._waits: Path | None = None  # our part of a checkpoint, until the Trainer's folder for it is there
        for method, ours in (
            ("_load_from_checkpoint", self._resume_from),
            ("_save_checkpoint", self._save),
            ("_save_optimizer_and_scheduler", self._save_beside),
        ):
            setattr(trainer, method, functools.partial(ours, getattr(trainer, method)))

    def _resume_from(self, original: Callable[..., Any], checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        """Trainer._load_from_checkpoint, which loads the weights before they are wrapped. It has the path."""
        self._checkpoint = checkpoint
        return original(checkpoint, *args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimizer are wrapped, and what the Trainer itself loads of them is loaded."""
        if state.is_hyper_param_search:
            raise ValueError(
                "hyperparameter_search makes a model and an optimizer for each trial, in one Trainer: search without "
                "SAEFCallback, or in a process for each trial"
            )
        ours = self._attached(args.max_grad_norm or None)
        check_known("SAEFCallback(metrics=...)", self._metrics, ours.metrics())
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None and state.global_step > 0:  # else an earlier train() has failed before it began
            load(Path(checkpoint) / "saef", ours)
            _check_loaded(Path(checkpoint), ours, innermost(self._trainer.optimizer))

    def _attached(self, max_grad_norm: float | None) -> saef.SAEFState:
        """The state of the Trainer's model and optimizer: that of an earlier train(), or a new one."""
        trainer, ours = self._trainer, self.state
        _check_wrapped(trainer)
        of = unwrap_model(trainer.model_wrapped), innermost(trainer.optimizer)
        if ours is not None and ours.engine.attached:
            if of == self._of:
                if ours.settings.max_grad_norm != max_grad_norm:
                    raise ValueError(
                        f"max_grad_norm is {max_grad_norm}, and was {ours.settings.max_grad_norm} in the train() "
                        "before, whose SAEFState goes on: leave it, or make a new Trainer"
                    )
                return ours
            ours.detach()
        self._of, of_trainer = of, (trainer.model_wrapped, trainer.optimizer)
        self.state = ours = bind(trainer.accelerator, self._later, *of_trainer, max_grad_norm=max_grad_norm)
        if max_grad_norm is not None and trainer.is_world_process_zero():
            logger.warning(CLIPS, f"TrainingArguments(max_grad_norm={max_grad_norm})")
        return ours

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After the Trainer's own record of a logging step, which has the loss."""
        if self.state is not None and self._metrics and "loss" in (logs or {}):
            found = self.state.metrics()
            self._trainer.log({f"saef/{name}": found[name] for name in self._metrics})

    # ---- checkpoints ------------------------------------------------------------------------

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Trainer._save_checkpoint, on every rank. Ours first, in a folder that no resume_from_checkpoint looks at."""
        if self.state is not None and self.state.engine.attached and not self._trainer.args.save_only_model:
            folder = Path(self._trainer.args.output_dir) / "_saef"  # what begins so is not pushed to a hub, either
            saef.save_checkpoint(folder, self.state, keep=1)
            self._waits = folder
        original(*args, **kwargs)

    def _save_beside(self, original: Callable[..., Any], folder: str, *args: Any, **kwargs: Any) -> None:
        """Trainer._save_optimizer_and_scheduler. The model is there, and trainer_state.json comes last."""
        ours, self._waits = self._waits, None
        if ours is not None and self._trainer.is_world_process_zero():
            shutil.rmtree(Path(folder) / "saef", ignore_errors=True)
            ours.rename(Path(folder) / "saef")
        original(folder, *args, **kwargs)


def _check_wrapped(trainer: Trainer) -> None:
    """Raise ValueError if the Trainer has left the model without DDP, although it has several processes for it."""
    several = trainer.accelerator.distributed_type.value.startswith("MULTI_")
    if several and not isinstance(unwrap_model(trainer.model_wrapped), DistributedDataParallel):
        raise ValueError(
            "the Trainer has left the model without DistributedDataParallel, as it does where evaluate() or predict() "
            "ran before train(): each rank would train alone, also without saef. Make a new Trainer to train, or "
            "evaluate before the first step by TrainingArguments(eval_on_start=True)"
        )


def _check_loaded(checkpoint: Path, state: saef.SAEFState, optimizer: Any) -> None:
    """Raise RuntimeError if what the Trainer has loaded is of a run of saef, whose errors were not there."""
    marks = [int(of[STEP]) for of in (*optimizer.state.values(), *optimizer.param_groups) if STEP in of]
    if not state.engine.context.owes or all(step == state.steps for step in marks):
        return
    found = [path.parents[2] for path in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/saef/*/{COMPLETE}")]
    whole = {int(number): folder for folder in found if (number := folder.name.rpartition("-")[2]).isdigit()}
    raise RuntimeError(
        f"{checkpoint} is of step {marks[0]} of a run with saef, but its saef/ is missing or incomplete, and this "
        f"state's errors are of step {state.steps}. "
        + (
            f"Delete its folder, or give resume_from_checkpoint={str(whole[max(whole)])!r}, the newest that is whole"
            if whole
            else "No checkpoint beside it is whole"
        )
        + "; or call callback.state.reset_errors(), and train() again from this one, to go on without what they owe"
    )
