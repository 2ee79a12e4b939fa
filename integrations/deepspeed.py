"""DeepSpeed: `"optimizer": {"type": "SAEF", "params": {...}}` in the JSON config.

    import saef.integrations.deepspeed  # registers the entry
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config="ds_config.json")

or, without relying on the import alone, `saef.integrations.deepspeed.initialize(...)`. The loop stays DeepSpeed's.
Every key of `params` is a setting of torch.optim's SGD, AdamW or Adam, the `rule`, or of `saef.SAEFState` under its own
name: docs/deepspeed.md.

The path of a gradient through the engine, at ZeRO stage 0, in float32 or bfloat16:

    engine(x)               x_half into the parameters                       SAEFState, by its hook on the engine
    engine.backward(loss)   p.grad accumulate; at the boundary they are      allreduce_gradients, replaced
                            compressed and exchanged
    engine.step()           commit or skip                                   SAEFState, by its hooks on the optimizer

DeepSpeed saves an optimizer's state on one rank only; so `engine.save_checkpoint` and `load_checkpoint` keep a
checkpoint of all ranks (`saef.storage`) in the folder of each tag, TAG/saef, beside DeepSpeed's files.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

import saef
from saef.comm.agreement import compare
from saef.step.arguments import CLIPS, Carried

from .deepspeed_config import NODE_SIZE, Params, check_config, parse, take_over_clipping

try:
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import groups
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"saef.integrations.deepspeed needs DeepSpeed: pip install 'saef[deepspeed]' ({error})"
    ) from error

from .deepspeed_zero import Nodes, Shards, first_node_alone, idle
from .deepspeed_zero import attach as attach_zero

logger = logging.getLogger("saef")
NAME = "SAEF"


class SAEF(torch.optim.Optimizer):
    """What `engine.optimizer` is: torch's SGD, AdamW or Adam, by the setting `rule`, whose step a SAEFState replaces.

    Args:
        params: parameters, or groups of them with lr, momentum, betas, weight_decay and the like of their own.
        settings: the keys of `optimizer.params` in the JSON config, in JSON's form.

    Attributes:
        saef: the SAEFState, for metrics(), diagnose(), flush() and the like; None without an engine.
    """

    saef: saef.SAEFState | None = None

    def __new__(cls, *_: Any, **settings: Any) -> SAEF:
        kind: Any = parse(settings)[0]
        return super().__new__(_of(kind) if cls is SAEF else cls)

    def __init__(self, params: Iterable[Any], **settings: Unpack[Params]) -> None:
        _, hyper, self._settings = parse(settings)
        self._node_size = settings.get("node_size", NODE_SIZE)
        super().__init__(params, **hyper)  # torch's optimizer, which `_of` puts next
        self.register_step_pre_hook(_refuse_unattached)

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Make the engine exchange gradients by a SAEFState. Collective."""
        who: Carried = {"process_group": engine.data_parallel_group}
        if (size := self._node_size) != 1:
            who = {"mesh": saef.node_mesh(engine.device, None if size == "auto" else size)}
        scaler = engine.torch_autocast_z0_gradscaler
        self.saef = saef.SAEFState(engine, self, grad_scaler=scaler, **who, **self._settings)
        engine.allreduce_gradients = lambda *_, **__: _exchange(engine)

    def __repr__(self) -> str:
        return super().__repr__() + ("" if self.saef is None else f"\n{self.saef!r}")

    @property
    def overflow(self) -> bool:
        """Whether all ranks skipped the last step; the engine then counts it and leaves the scheduler where it is."""
        return self.saef is not None and self.saef.skipped_in_a_row > 0

    def load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """As torch's. The engine passes the second argument under bf16, always as True."""
        super().load_state_dict(state_dict)

    def destroy(self) -> None:
        """Called by engine.destroy(): the parameters are x, and the model is free of saef."""
        if self.saef is not None:
            self.saef.detach()
            self.saef = None


@cache
def _of(kind: Any) -> type[SAEF]:
    """SAEF on top of a class of torch.optim."""
    return type("SAEF", (SAEF, kind), {"__module__": __name__})


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with its arguments and result, for a config whose optimizer is SAEF.

    Raises:
        ValueError: if the config names another optimizer, or has what SAEF cannot honour.
    """
    engine, *others = deepspeed.initialize(*args, **kwargs)
    if not hasattr(engine.optimizer, "saef"):
        raise ValueError(
            f'the config has optimizer.type {engine.optimizer_name()!r}: write "optimizer": {{"type": "{NAME}", ...}}, '
            "or call deepspeed.initialize for another optimizer"
        )
    return engine, *others


# ---- what the engine calls ------------------------------------------------------------------


def _refuse_unattached(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer.saef is None:  # type: ignore[attr-defined]
        raise RuntimeError(
            "this SAEF optimizer belongs to no DeepSpeed engine, so nothing exchanges its gradients: name it in the "
            "config of deepspeed.initialize, after `import saef.integrations.deepspeed`. Without DeepSpeed use "
            "torch.optim and saef.SAEFState"
        )


def _exchange(engine: DeepSpeedEngine) -> None:
    if engine.is_gradient_accumulation_boundary():
        engine.optimizer.saef.engine.exchange_gradients()


def _wrap(engine: DeepSpeedEngine, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`original` replaced by ours(engine, original, its arguments by name)."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return ours(engine, original, bound.arguments)

    return call


def _save_checkpoint(engine: DeepSpeedEngine, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Ours first: DeepSpeed names the tag in `latest` when all is written."""
    tag = arguments["tag"]
    arguments["tag"] = f"global_step{engine.global_steps}" if tag is None else str(tag)
    state = engine.optimizer.saef
    folder = _folder(state, arguments["save_dir"], arguments["tag"], "save_checkpoint()")
    in_parts = state.engine.node.in_parts
    saef.save_checkpoint(folder, state, {"global_steps": engine.global_steps}, keep=1, consolidate=not in_parts)
    with first_node_alone(engine) if in_parts else nullcontext():
        return original(**arguments)


def _load_checkpoint(engine: DeepSpeedEngine, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Ours first: what does not fit raises before DeepSpeed has changed anything."""
    state, root = engine.optimizer.saef, Path(arguments["load_dir"])
    if arguments["tag"] is None and (root / "latest").is_file():
        arguments["tag"] = (root / "latest").read_text().strip()
    folder = _folder(state, root, arguments["tag"], "load_checkpoint()")
    if arguments["tag"] is None:
        return original(**arguments)  # there is no checkpoint, as DeepSpeed says
    if not arguments["load_optimizer_states"] or arguments["load_module_only"]:
        if state.engine.node.in_parts:
            raise ValueError(
                "load_module_only=True, or load_optimizer_states=False, with ZeRO 3 within nodes: x is the optimizer's "
                "own copy of the weights there. Load all, and call engine.optimizer.saef.reset_errors() to owe nothing"
            )
        state.engine.recheck()
        return original(**arguments)
    extra = saef.load_checkpoint(folder, state)
    if extra is None:
        raise ValueError(
            f"{folder} holds no complete checkpoint of SAEF: this one was saved with another optimizer, or is not "
            "there. load_checkpoint(..., load_module_only=True) starts from its weights alone"
        )
    result = original(**arguments)
    if engine.global_steps != extra["global_steps"]:
        raise RuntimeError(
            f"{folder.parent} mixes two checkpoints: DeepSpeed's files are of step {engine.global_steps}, SAEF's "
            f"of step {extra['global_steps']}; saving under a tag that existed was interrupted. Load another tag"
        )
    return result


def _folder(state: saef.SAEFState, root: str | Path, tag: str | None, method: str) -> Path:
    """Where SAEF's part of a checkpoint lies. Collective: all ranks raise ValueError unless their tags are equal."""
    heading, what = "the ranks name different checkpoints", f"DeepSpeedEngine.{method}"
    compare({"tag": tag}, state.engine.node.everyone, state.weights.device, heading, what)
    return Path(root) / str(tag) / "saef"


# ---- registration ---------------------------------------------------------------------------


def _register() -> None:
    """Make DeepSpeed know the optimizer, refuse what does not go with it, and hand the engine over to it."""
    torch.optim.SAEF = SAEF  # type: ignore[attr-defined]  # where DeepSpeed looks names up
    check_others, configure_others = DeepSpeedConfig._do_sanity_check, DeepSpeedEngine._configure_optimizer

    def check(config: DeepSpeedConfig) -> None:
        if config.optimizer_name != NAME:
            if str(config.optimizer_name).upper() == NAME:
                raise ValueError(f'optimizer.type is "{config.optimizer_name}": write "type": "{NAME}"')
            return check_others(config)  # type: ignore[no-any-return]
        config._saef_clips = take_over_clipping(config)
        check_config(config)
        params = config.optimizer_params
        config.optimizer_params = None  # DeepSpeed would advise against max_grad_norm, and cannot take it as null
        try:
            check_others(config)
        finally:
            config.optimizer_params = params

    def configure(engine: DeepSpeedEngine, client_optimizer: Any, model_parameters: list[Any]) -> None:
        if engine._config.optimizer_name != NAME:  # optimizer_name() would be that of client_optimizer
            return configure_others(engine, client_optimizer, model_parameters)  # type: ignore[no-any-return]
        _check_engine(engine, client_optimizer)
        params: Any = engine.optimizer_params() or {}
        within = engine.zero_optimization_stage() > 0
        if within:
            _check_nodes(engine, params["node_size"])
        kind, hyper, settings = parse(params)
        optimizer: Any = idle(kind)(model_parameters, **hyper) if within else SAEF(model_parameters, **params)
        groups = [[*group["params"]] for group in optimizer.param_groups if group["params"]]
        # What this finds decides on a wrapper for bf16. There shall be none: saef keeps float32 master weights itself.
        engine._do_optimizer_sanity_check = lambda _: ZERO_OPTIMIZATION if within else None
        configure_others(engine, optimizer, model_parameters)
        del engine._do_optimizer_sanity_check
        if within:
            attach_zero(engine, Shards(engine, groups, kind, settings))
        else:
            optimizer.attach(engine)
        momentum = "momentum" if kind is torch.optim.SGD else "betas"
        engine.get_mom = lambda: engine._get_optimizer_param(momentum)  # for its log; it would go by the name
        engine.save_checkpoint = _wrap(engine, engine.save_checkpoint, _save_checkpoint)
        engine.load_checkpoint = _wrap(engine, engine.load_checkpoint, _load_checkpoint)
        if (clips := engine._config._saef_clips) is not None and engine.global_rank == 0:
            logger.warning(CLIPS, f'"gradient_clipping": {clips}')

    DeepSpeedConfig._do_sanity_check = check
    DeepSpeedEngine._configure_optimizer = configure


def _check_nodes(engine: DeepSpeedEngine, node_size: Any) -> None:
    """Raise ValueError unless ZeRO is to stay within the nodes."""
    mpu = engine.mpu
    if not isinstance(mpu, Nodes) or node_size not in ("auto", mpu.get_data_parallel_world_size()):
        raise ValueError(
            f"at ZeRO stage 3 DeepSpeed must know the nodes, too: deepspeed.initialize(..., mpu={Nodes.__module__}."
            f"Nodes(size)), with the node_size of the JSON, {node_size!r}"
        )
    if engine.training_dataloader is not None:
        raise ValueError(
            "within nodes DeepSpeed's loader would give every node the same data: leave training_data out, and use a "
            "DataLoader with a DistributedSampler over all ranks"
        )


def _check_engine(engine: DeepSpeedEngine, client_optimizer: Any) -> None:
    """Raise ValueError on what the config alone does not show."""
    if client_optimizer is not None:
        raise ValueError(
            f"deepspeed.initialize got an optimizer ({type(client_optimizer).__name__}) that would take the place of "
            f'the {NAME} in the config: pass model_parameters instead, or take "optimizer" out of the config'
        )
    if isinstance(engine.mpu, Nodes) and not engine.zero_optimization_stage():
        raise ValueError("at ZeRO stage 0 node_size alone says what a node is, in the JSON: leave mpu=Nodes(...) out")
    if engine.mpu is None and isinstance(groups.mpu, Nodes):
        raise ValueError(
            "DeepSpeed still holds the mpu of an engine that this process has made before, and would take that node "
            "for all ranks (in engines without saef, too): set deepspeed.utils.groups.mpu = None when that engine is "
            "destroyed"
        )
    found = {
        "a PipelineModule": engine.pipeline_parallelism,
        "mixture-of-experts layers": engine.has_moe_layers,
        "model parallelism (mpu)": engine.mp_world_size > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
    }
    for what, there in found.items():
        if there:
            raise ValueError(
                f"SAEF cannot work with {what}: it exchanges the gradients of all ranks, each of the whole model and "
                "taken at weights of its own. Use data parallelism alone, or another optimizer"
            )


_register()
