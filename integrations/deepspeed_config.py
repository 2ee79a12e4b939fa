"""A DeepSpeed config as saef understands it: `optimizer.params`, and what else in it cannot be honoured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from typing import Any, ClassVar, Literal, TypedDict, cast, final

import torch

import saef
from saef.step.arguments import Agreed, BadRound, Exchange, ServerStepAhead, WeightDecayMode, check_known, nearest
from saef.step.outer import is_number
from saef.step.settings import Settings


@final
@dataclass(frozen=True)
class SGDRule:
    """torch.optim.SGD, whose momentum and nesterov are keys beside lr."""

    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD
    keys: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay", "nesterov", "maximize")


@dataclass(frozen=True)
class AdamWRule:
    """torch.optim.AdamW. Raises TypeError unless betas are two numbers and eps is one."""

    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW
    keys: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "maximize")

    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        numbers = isinstance(self.betas, list | tuple) and len(self.betas) == 2 and all(map(is_number, self.betas))
        if not numbers or not is_number(self.eps):
            raise TypeError(f"betas must be two numbers and eps a number, got {self.betas!r} and {self.eps!r}")


@final
@dataclass(frozen=True)
class AdamRule(AdamWRule):
    """torch.optim.Adam."""

    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam


RULES: dict[str, type[Any]] = {"sgd": SGDRule, "adamw": AdamWRule, "adam": AdamRule}
COMPRESSORS: dict[str, type[Any]] = {
    "sign": saef.ScaledSign,
    "topk": saef.TopK,
    "identity": saef.Identity,
    "majority_vote": saef.MajorityVote,
    "min_size": saef.MinSize,
    "exempt": saef.Exempt,
}
AVERAGING: dict[str, type[Any]] = {
    "allreduce": saef.AllReduce,
    "local_step": saef.LocalStep,
    "rotating": saef.Rotating,
    "slack": saef.Slack,
    "ring": saef.Ring,
    "async_ring": saef.AsyncRing,
    "gossip": saef.Gossip,
}
OUTER: dict[str, type[Any]] = {"nesterov": saef.Nesterov}
# Settings that are objects in JSON, of which types, and what else they can be.
OBJECTS: list[tuple[str, dict[str, type[Any]], tuple[Any, ...]]] = [
    ("compressor", COMPRESSORS, ()),
    ("server_compressor", COMPRESSORS, ("same", None)),
    ("averaging", AVERAGING, (None,)),
    ("v_averaging", AVERAGING, (None,)),
    ("outer", OUTER, (None,)),
]


class Params(TypedDict, total=False):
    """The keys of `optimizer.params`, in JSON's form."""

    rule: Mapping[str, Any]
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    betas: Sequence[float]
    eps: float
    compressor: Mapping[str, Any]
    server_compressor: Mapping[str, Any] | Literal["same"] | None
    step_ahead: float
    averaging: Mapping[str, Any] | None
    weight_decay_mode: WeightDecayMode
    exchange: Exchange
    max_grad_norm: float | None
    max_consecutive_skips: int | None
    audit_every: int | None
    noise_correction: bool
    server_step_ahead: ServerStepAhead
    error_decay: float
    v_averaging: Mapping[str, Any] | None
    local_steps: int
    outer: Mapping[str, Any] | None
    on_bad_round: BadRound
    overlap: bool
    node_size: int | Literal["auto"]


RULE = {"type": "sgd"}
OF_RULE = ("betas", "eps")  # fields of the rule that may also stand beside lr, as DeepSpeed's own optimizers have them
FILLED = ("lr", "weight_decay", *OF_RULE)  # where Hugging Face's Trainer fills in "auto"
HYPER = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
NOT_IN_JSON = ("model", "optimizer", "grad_scaler", "mesh", "process_group", "transport")  # what the engine knows
NODE_SIZE = 1  # ranks that are one worker
SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(saef.SAEFState).parameters.items()
    if name not in NOT_IN_JSON
}

WORDS = ("exchange", "server_step_ahead", "node_size")  # settings that can be "auto"

ZERO = (
    "ZeRO reduces gradients into shards and keeps one copy of the weights, while here every rank takes its gradient at "
    "weights of its own, x - e_k, and keeps e_k. Use stage 0, whose nodes of S ranks have 1/S of errors, momentum and "
    'master weights on each ("node_size"), as ZeRO 1; for weights that do not fit stage 3 within the nodes '
    '("node_size", and mpu=saef.integrations.deepspeed.Nodes(size)) or FSDP2; or ZeRO with another optimizer'
)
NOT_REDUCED = "it is about DeepSpeed's own all-reduce of gradients, which SAEF replaces"
PARALLEL = "SAEF knows data parallelism only, so far"
# Attribute of DeepSpeedConfig, the values SAEF can honour, the key in the JSON, and why no other.
REFUSED: list[tuple[str, tuple[Any, ...], str, str]] = [
    ("zero_config.stage", (0,), "zero_optimization.stage", ZERO),
    ("zero_config.offload_optimizer", (None,), "zero_optimization.offload_optimizer", ZERO),
    ("zero_config.offload_param", (None,), "zero_optimization.offload_param", ZERO),
    (
        "gradient_clipping",
        (0,),
        "gradient_clipping",
        "DeepSpeed would clip by default, a gradient that has been compressed and sent already. Write "
        '"gradient_clipping": 0.0, or a number, which is taken over as max_grad_norm: each rank clips its own gradient',
    ),
    (
        "float16_config.enabled",
        (False, None),
        "fp16.enabled",
        'at stage 0 DeepSpeed divides gradients by a loss scale that the loss never got. Use "bf16": {"enabled": true} '
        'or "torch_autocast": {"enabled": true, "dtype": "float16"}, whose scaler saef knows',
    ),
    ("prescale_gradients", (False,), "prescale_gradients", NOT_REDUCED),
    ("gradient_predivide_factor", (1.0,), "gradient_predivide_factor", NOT_REDUCED),
    ("communication_data_type", (None,), "communication_data_type", NOT_REDUCED + "; give it a compressor instead"),
    ("gradient_allreduce_op", ("mean", None), "gradient_allreduce_op", "Algorithm 1 averages; scale the loss instead"),
    ("tensor_parallel_config.autotp_size", (0, 1, None), "tensor_parallel.autotp_size", PARALLEL),
    ("expert_parallel_config.enabled", (False, None), "expert_parallel.enabled", PARALLEL),
    ("hybrid_engine.enabled", (False, None), "hybrid_engine.enabled", "it would generate with weights at x - e_k"),
    ("compile_config.deepcompile", (False, None), "compile.deepcompile", "it reduces gradients in the compiled graph"),
    (
        "load_universal_checkpoint",
        (False, None),
        "checkpoint.load_universal",
        "it is ZeRO's; SAEF's own checkpoints load on any number of ranks",
    ),
    (
        "use_node_local_storage",
        (False, None),
        "checkpoint.use_node_local_storage",
        "all ranks must see each other's files, or another number of ranks could not load them",
    ),
]


# The same at ZeRO stage 3, within nodes.
WITHIN = "within nodes ZeRO 3 is for weights alone"
REFUSED_WITHIN: list[tuple[str, tuple[Any, ...], str, str]] = [
    (
        "zero_config.param_persistence_threshold",
        (0,),
        "zero_optimization.stage3_param_persistence_threshold",
        "parameters that stay gathered would not follow x_half",
    ),
    ("zero_config.zero_hpz_partition_size", (1,), "zero_optimization.zero_hpz_partition_size", WITHIN),
    ("zero_config.zero_quantized_weights", (False,), "zero_optimization.zero_quantized_weights", WITHIN),
    ("zero_config.zero_quantized_gradients", (False,), "zero_optimization.zero_quantized_gradients", WITHIN),
    ("torch_autocast_enabled", (False, None), "torch_autocast.enabled", 'use "bf16"'),
]


def take_over_clipping(config: Any) -> float | None:
    """Make gradient_clipping, if the JSON has it, the optimizer's max_grad_norm; what it was.

    Raises:
        ValueError: if that has another max_grad_norm.
    """
    theirs, params = config.gradient_clipping, config.optimizer_params or {}
    if "gradient_clipping" not in config._param_dict or not is_number(theirs) or theirs <= 0:
        return None
    ours = params.get("max_grad_norm")
    if ours not in (None, theirs):
        raise ValueError(f"gradient_clipping {theirs} and optimizer.params.max_grad_norm {ours} both clip: give one")
    config.optimizer_params, config.gradient_clipping = {**params, "max_grad_norm": theirs}, 0.0
    return float(theirs)


def check_config(config: Any) -> None:
    """Raise TypeError or ValueError naming what SAEF cannot honour in a DeepSpeedConfig."""
    check_known("optimizer", config._param_dict["optimizer"], ["type", "params"])
    parse(config.optimizer_params or {})
    problems = []
    within = (config.optimizer_params or {}).get("node_size", NODE_SIZE) != 1 and config.zero_config.stage == 3
    for path, allowed, key, why in [*REFUSED[1:], *REFUSED_WITHIN] if within else REFUSED:
        value = reduce(lambda part, name: getattr(part, name, None), path.split("."), config)
        if value not in allowed:
            problems.append(f"{key} is {value}, expected {allowed[0]}: {why}")
    low = "bf16" if config.bfloat16_config.enabled else "fp32"
    if config.grad_accum_dtype not in (None, low):
        problems.append(
            f"data_types.grad_accum_dtype is {config.grad_accum_dtype}, expected {low}: gradients accumulate in the "
            "parameters' dtype (errors, momentum and master weights are float32 in any case)"
        )
    if problems:
        raise ValueError("SAEF cannot work with this DeepSpeed config:\n  " + "\n  ".join(problems))


def parse(params: Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any], Agreed]:
    """(class of torch.optim, its arguments, settings of SAEFState) from `optimizer.params`.

    Raises:
        TypeError, ValueError: on an unknown key or name, or a value that is not of its kind; with where it is, what
            was expected, and the nearest known word.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f'optimizer.params must be an object such as {{"lr": 0.1}}, got {params!r}')
    if "mesh" in params:
        raise ValueError(
            'optimizer.params: mesh is an object of Python: write "node_size": 8, so many ranks are one worker, or '
            '"auto", as many as the launcher has started on this machine'
        )
    check_known("optimizer.params", params, ["rule", *HYPER, *OF_RULE, *SETTINGS, "node_size"])
    size = params.get("node_size", NODE_SIZE)
    if size != "auto" and not (is_number(size) and isinstance(size, int) and size >= 1):
        raise ValueError(
            f'optimizer.params.node_size must be an integer >= 1 (ranks that are one worker), or "auto" (those of this '
            f"machine), got {size!r}{nearest(size, ['auto'])}"
        )
    if unfilled := [key for key, value in params.items() if value == "auto" and key not in WORDS]:
        raise ValueError(
            f'optimizer.params has "auto" for {unfilled}, which Hugging Face\'s Trainer alone fills in, for {FILLED} '
            '(and "gradient_clipping" beside the optimizer, which becomes max_grad_norm): write values'
        )
    rule = _build("optimizer.params.rule", _rule_of(params), RULES)
    hyper = {key: params.get(key, default) for key, default in HYPER.items()}
    for key, value in hyper.items():
        flag = isinstance(HYPER[key], bool)
        if not (isinstance(value, bool) if flag else is_number(value)):
            raise TypeError(f"optimizer.params.{key} must be {'true or false' if flag else 'a number'}, got {value!r}")
        if key in params and key not in rule.keys:
            advice = "give the rule betas, of which it is the first" if key == "momentum" else "take it out"
            raise ValueError(f"optimizer.params.{key} is SGD's, and the rule is {params['rule']['type']!r}: {advice}")
    of_rule = {field.name: getattr(rule, field.name) for field in fields(rule)}
    hyper = {key: hyper[key] for key in rule.keys} | of_rule
    settings = {key: params[key] for key in SETTINGS if key in params}
    for key, names, plain in OBJECTS:
        if key in settings and settings[key] not in plain:
            settings[key] = _build(f"optimizer.params.{key}", settings[key], names, plain)
    try:
        Settings(**{**SETTINGS, **settings})
    except (TypeError, ValueError) as error:
        raise type(error)(f"optimizer.params: {error}") from error
    return rule.optimizer, hyper, cast(Agreed, settings)


def _rule_of(params: Mapping[str, Any]) -> Any:
    """`rule`, with what stands beside lr for it."""
    rule, beside = params.get("rule", RULE), {key: params[key] for key in OF_RULE if key in params}
    if not beside or not isinstance(rule, Mapping):
        return rule
    if rule.get("type") == "sgd":
        raise ValueError(
            f'optimizer.params has {[*beside]}, which are of AdamW and Adam: give "rule": {{"type": "adamw"}} too, or '
            "take them out"
        )
    if twice := [key for key in beside if key in rule]:
        raise ValueError(f"optimizer.params and its rule both have {twice}: give them once")
    return {**rule, **beside}


def _build(where: str, value: object, names: Mapping[str, type[Any]], plain: tuple[Any, ...] = ()) -> Any:
    """The object that {"type": a name, field: value, ...} describes, if the value is none of the plain ones."""
    if not isinstance(value, Mapping) or "type" not in value:
        example = f'{{"type": "{next(iter(names))}"}}'
        words = [word for word in plain if isinstance(word, str)]
        raise TypeError(
            f"{where} must be an object with a type, such as {example}, got {value!r}{nearest(value, words)}"
        )
    name, given = value["type"], {key: part for key, part in value.items() if key != "type"}
    check_known(f"{where}.type", [name], names)
    kind = names[name]
    check_known(where, given, [f.name for f in fields(kind)])
    if missing := [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]:
        raise ValueError(f"{where} of type {name!r} needs {missing}")
    for part in ("inner", "other"):
        if part in given:
            given[part] = _build(f"{where}.{part}", given[part], names)
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
