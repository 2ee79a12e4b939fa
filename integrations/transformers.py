"""Hugging Face's Trainer: `trainer.add_callback(SAEFCallback(trainer, compressor=...))`, before `trainer.train()`.

The Trainer wraps the model and makes the optimizer when it trains, by Accelerate; so the callback attaches a SAEFState
when training begins (`saef.integrations.accelerate`), and the rest is the Trainer's own loop:

    max_grad_norm                of TrainingArguments, becomes SAEFState's; grad_norm in the log is this rank's
    checkpoint-STEP/             gets saef/, a checkpoint of all ranks (`saef.storage`), beside the Trainer's files
    resume_from_checkpoint       loads it
    a step that ranks skip       the scheduler waits
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from typing_extensions import Unpack

import saef
from saef.step.arguments import CLIPS, Agreed, check_known
from saef.step.unwrap import innermost, unwrap_model
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
    """

    state: saef.SAEFState | None = None

    def __init__(self, trainer: Trainer, *, metrics: tuple[str, ...] = LOGGED, **settings: Unpack[Agreed]) -> None:
        if "max_grad_norm" in settings:
            raise TypeError("SAEFCallback takes max_grad_norm from TrainingArguments(max_grad_norm=...): set it there")
        check_known("SAEFCallback", settings, Agreed.__annotations__, TypeError)
        self._trainer, self._metrics, self._later = trainer, metrics, saef.Later(**settings)
        self._checkpoint: str | None = None  # to resume from
        self._of: Any = None  # the DDP and the optimizer of the state
        trainer._load_from_checkpoint = functools.partial(self._resume_from, trainer._load_from_checkpoint)

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

    def _attached(self, max_grad_norm: float | None) -> saef.SAEFState:
        """The state of the Trainer's model and optimizer: that of an earlier train(), or a new one."""
        trainer, ours = self._trainer, self.state
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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the Trainer's own files, on every rank."""
        if self.state is not None and self.state.engine.attached and not args.save_only_model:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            saef.save_checkpoint(folder / "saef", self.state, keep=1)
