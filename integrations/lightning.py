"""PyTorch Lightning: `Trainer(callbacks=[SAEFCallback(compressor=...)], strategy="ddp", ...)`, or strategy="saef".

Lightning makes DDP and the optimizer in `trainer.fit`, so the callback creates the SAEFState there:

    training_step, backward, step        Lightning's, through DDP with `saef_hook`; automatic or manual optimization
    gradient_clip_val                    of the Trainer, becomes SAEFState's max_grad_norm
    precision="16-mixed"                 its scaler is given to SAEFState
    FOLDER/NAME.ckpt                     gets FOLDER/saef/NAME.ckpt/, a checkpoint of all ranks (`saef.storage`)
    self.log                             "saef/bytes_per_step" and the like, where the Trainer logs
"""

from __future__ import annotations

import functools
import inspect
import logging
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as _DDP
from typing_extensions import Unpack

import saef
from saef.hooks import saef_hook
from saef.step.arguments import CLIPS, Agreed, check_known
from saef.telemetry import LOGGED

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"saef.integrations.lightning needs Lightning (as `lightning`): pip install 'saef[lightning]' ({error})"
    ) from error

logger = logging.getLogger("saef")
NAME = "saef"
_fitted: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # engines, weakly, by LightningModule


@final
class SAEFCallback(Callback):  # type: ignore[misc]
    """Makes `Trainer.fit` train by a SAEFState, under any DDPStrategy ("ddp", "ddp_spawn", ...).

    Args:
        metrics: which of `SAEFState.metrics()` are logged, as "saef/NAME".
        settings: keyword arguments of SAEFState, but for grad_scaler, process_group and transport: Lightning's.

    Attributes:
        state: the SAEFState, from the beginning of fit(). It stays after it, for `trainer.save_checkpoint`; the next
            fit() makes another, as Lightning does with the optimizer. Before one by a Trainer without saef:
            `state.detach()`, or `detach(module)`.

    Raises:
        TypeError, ValueError: on a keyword that is none, or a value that no SAEFState takes; in fit(), on what cannot
            be honoured, as SAEFState; and on another strategy, several optimizers, a `ddp_comm_hook`, and clipping by
            value or to two different norms.
    """

    state: saef.SAEFState | None = None

    def __init__(self, *, metrics: tuple[str, ...] = LOGGED, **settings: Unpack[Agreed]) -> None:
        check_known("SAEFCallback", settings, Agreed.__annotations__, TypeError)
        self._metrics, self._later = metrics, saef.Later(**settings)
        self._clipping: Any = None  # the Trainer's precision plugin, while its clip_gradients is ours
        self._random: list[Tensor] = []  # torch's random state in a checkpoint, until the first batch

    # ---- what Lightning calls ---------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before any on_fit_start: that of Tuner's callbacks trains already, with no other callback than theirs."""
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """DDP and optimizer are there; of a checkpoint, the weights are loaded, and the optimizer not yet."""
        if self.state is not None:
            self.state.detach()
        _check(trainer)
        strategy, scaler = trainer.strategy, getattr(trainer.precision_plugin, "scaler", None)
        settings: Any = {"max_grad_norm": self._max_grad_norm(trainer), "grad_scaler": scaler}
        self.state = self._later.bind(strategy.model, trainer.optimizers[0], **settings)
        check_known("SAEFCallback(metrics=...)", self._metrics, self.state.metrics())
        strategy.model.register_comm_hook(self.state, saef_hook)
        strategy.save_checkpoint = functools.partial(self._save, strategy)
        strategy.remove_checkpoint = functools.partial(self._remove, strategy)
        strategy.load_optimizer_state_dict = functools.partial(self._load, trainer)
        self._clipping = trainer.precision_plugin
        self._clipping.clip_gradients = functools.partial(self._clip, self._clipping.clip_gradients)
        _fitted[pl_module] = weakref.ref(self.state.engine)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the middle of an epoch: to resume there, Lightning made an iterator, which has drawn a random number."""
        if self._random and batch_idx > 0:
            _set_random(self._random)
        self._random = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """With manual optimization backward and step are within training_step, which is DDP's forward."""
        if not pl_module.automatic_optimization and self.state is not None and self.state.engine.attached:
            self.state.engine.before_backward(loss)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Between forward and backward: where averages of the weights are taken, say."""
        self._leave()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps, every = trainer.global_step, trainer.log_every_n_steps
        due = trainer.is_last_batch or (every and steps % every == 0)
        if self._metrics and self.state is not None and steps and due:
            found = self.state.metrics()
            pl_module.log_dict({f"saef/{name}": found[name] for name in self._metrics})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Also after Tuner's, which end a fit by an exception that no callback is told of."""
        self._give_back()
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._give_back()
        self._leave()

    def _leave(self) -> None:
        """The parameters are x."""
        if self.state is not None and self.state.engine.attached:
            self.state.engine.leave()

    # ---- clipping ---------------------------------------------------------------------------

    def _max_grad_norm(self, trainer: Any) -> float | None:
        """The Trainer's gradient_clip_val, or ours."""
        ours: float | None = self._later.settings.get("max_grad_norm")
        theirs: float | None = trainer.gradient_clip_val or None
        if theirs is None:
            return ours
        if trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"Trainer(gradient_clip_algorithm={str(trainer.gradient_clip_algorithm)!r}) clips when gradients have "
                'been sent, and saef clips by the norm only: use gradient_clip_algorithm="norm"'
            )
        if ours not in (None, theirs):
            raise ValueError(
                f"Trainer(gradient_clip_val={theirs}) and SAEFCallback(max_grad_norm={ours}) both clip: give one"
            )
        if trainer.is_global_zero:
            logger.warning(CLIPS, f"Trainer(gradient_clip_val={theirs})")
        return theirs

    def _clip(
        self, original: Any, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """`precision_plugin.clip_gradients`. To its own norm the state clips; the rest changes what has been sent."""
        state = self.state
        if (
            state is None
            or not state.engine.attached
            or gradient_clip_algorithm != "norm"
            or clip_val != state.settings.max_grad_norm
        ):
            original(optimizer, clip_val, gradient_clip_algorithm)

    def _give_back(self) -> None:
        if self._clipping is not None:
            del self._clipping.clip_gradients
            self._clipping = None

    # ---- checkpoints ------------------------------------------------------------------------

    def _save(self, strategy: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """`strategy.save_checkpoint`, on every rank. Ours first: Lightning's file is what says that all is there."""
        state = self.state
        if state is not None and state.engine.attached and "optimizer_states" in checkpoint:  # not of weights only
            if state.weights.parameters[0].device != state.weights.device:
                raise RuntimeError(
                    "fit() has ended, and Lightning has moved the model away from where SAEFState's errors are: save "
                    "in fit(), by ModelCheckpoint(save_last=True), or trainer.save_checkpoint(..., weights_only=True)"
                )
            saef.save_checkpoint(_beside(filepath), state, {"global_step": checkpoint["global_step"]}, keep=1)
        type(strategy).save_checkpoint(strategy, checkpoint, filepath, storage_options=storage_options)

    def _remove(self, strategy: Any, filepath: Any) -> None:
        """`strategy.remove_checkpoint`, on every rank."""
        type(strategy).remove_checkpoint(strategy, filepath)
        if strategy.is_global_zero and "://" not in str(filepath):
            folder = _beside(filepath)
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others are there
                folder.parent.rmdir()

    def _load(self, trainer: Any, checkpoint: Any) -> None:
        """`strategy.load_optimizer_state_dict`: ours afterwards, since Lightning has this optimizer's state of rank 0.

        Without a checkpoint of ours, that may be of a run without saef, whose momentum the state takes over. If it was
        of one with errors, the next forward raises.
        """
        type(trainer.strategy).load_optimizer_state_dict(trainer.strategy, checkpoint)
        state, folder = self.state, _beside(Path(trainer.ckpt_path).resolve())  # `last.ckpt` may be a link
        if state is None or not state.engine.attached:
            return
        extra = saef.load_checkpoint(folder, state)
        if extra is None:
            logger.info("%s holds no checkpoint of saef: weights and momentum alone are loaded", folder)
            return state.engine.recheck()
        if extra["global_step"] != checkpoint["global_step"]:
            raise RuntimeError(
                f"{trainer.ckpt_path} is of step {checkpoint['global_step']}, and {folder} of step "
                f"{extra['global_step']}: saving over a file was interrupted. Load another checkpoint"
            )
        self._random = _get_random(state)


@final
class SAEFStrategy(DDPStrategy):  # type: ignore[misc]
    """DDPStrategy that brings its SAEFCallback: `Trainer(strategy="saef")`, or `strategy=SAEFStrategy(compressor=...)`.

    Args:
        settings: of SAEFCallback, and keyword arguments of DDPStrategy and of DistributedDataParallel.

    Attributes:
        callback: the SAEFCallback.
    """

    def __init__(self, **settings: Any) -> None:
        ours, theirs = (*_words(SAEFCallback), *Agreed.__annotations__), (*_words(DDPStrategy), *_words(_DDP))
        check_known("SAEFStrategy", settings, (*ours, *theirs), TypeError)
        self.callback = SAEFCallback(**{word: settings.pop(word) for word in ours if word in settings})
        super().__init__(**settings)

    def setup(self, trainer: Any) -> None:
        if any(isinstance(c, SAEFCallback) and c is not self.callback for c in trainer.callbacks):
            raise ValueError(
                "SAEFStrategy has a SAEFCallback of its own: give the strategy its settings and leave the callback "
                'out, or use strategy="ddp"'
            )
        if self.callback not in trainer.callbacks:
            trainer.callbacks.insert(0, self.callback)
        super().setup(trainer)


def detach(module: Any) -> None:
    """What `callback.state.detach()` does, by the LightningModule: before another Trainer fits it without saef."""
    if module in _fitted and (engine := _fitted[module]()) is not None:
        engine.detach()


StrategyRegistry.register(NAME, SAEFStrategy, description="DDP with saef's compression", override=True)


def _words(kind: type[Any]) -> list[str]:
    """The keyword arguments of a class, by name."""
    return [n for n, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]


def _check(trainer: Any) -> None:
    """Raise ValueError on what no step under this Trainer could honour."""
    strategy = trainer.strategy
    if "DDPStrategy" not in [kind.__name__ for kind in type(strategy).__mro__]:  # of either package
        raise ValueError(
            f'SAEFCallback needs Trainer(strategy="ddp"), or another DDPStrategy, got {type(strategy).__name__}: saef '
            "exchanges the gradients of whole models among several ranks (DeepSpeed's engine without Lightning has an "
            "adapter of its own)"
        )
    if strategy._ddp_comm_hook is not None or strategy._ddp_comm_state is not None:
        raise ValueError(
            "the DDPStrategy has a ddp_comm_hook or ddp_comm_state: SAEFCallback makes the state and registers "
            "saef_hook, when DDP and the optimizer are there (on a CPU, Lightning ignores both). Leave them out"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers: a SAEFState is for one, of all "
            "trainable parameters. Make their param groups groups of one optimizer"
        )


def _beside(filepath: Any) -> Path:
    """Where our part of a checkpoint lies: FOLDER/saef/NAME.ckpt. Raises ValueError on an address that is no path."""
    if "://" in str(filepath):
        raise ValueError(
            f"{filepath} is no path of a file system that all ranks share, where saef could keep each rank's errors: "
            "save to one, or trainer.save_checkpoint(..., weights_only=True)"
        )
    path = Path(filepath)
    return path.parent / NAME / path.name


def _get_random(state: saef.SAEFState) -> list[Tensor]:
    """torch's random states that a checkpoint has restored."""
    device = state.weights.device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for of_gpu in states[1:]:
        torch.cuda.set_rng_state(of_gpu)
