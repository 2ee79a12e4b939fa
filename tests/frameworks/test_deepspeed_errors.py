"""What an engine cannot honour is refused by name at once, with what to do instead."""

import logging
import subprocess
import sys
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from torch import nn

import saef.integrations.deepspeed
from support.deepspeed_ranks import Net, Setup, json_config, start, steps
from support.ranks import RankPool
from support.training import batch

SIGN = {"lr": 0.1, "compressor": {"type": "sign"}}

# The config beside the optimizer: (what is set, what the error says).
CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ZeRO 1": ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage is 1, expected 0", "Use stage 0"]),
    "ZeRO 2": ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage is 2, expected 0", "Use stage 0"]),
    "ZeRO 3": ({"zero_optimization": {"stage": 3}}, ["stage is 3", "weights of its own", "another optimizer"]),
    "offload": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        ["zero_optimization.offload_optimizer is"],
    ),
    "offload parameters": (
        {"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}},
        ["zero_optimization.offload_param is"],
    ),
    "expert parallel": ({"expert_parallel": {"enabled": True}}, ["expert_parallel.enabled is True"]),
    "fp16": ({"fp16": {"enabled": True}}, ["fp16.enabled is True", "loss scale", '"bf16"', '"torch_autocast"']),
    "clipping": ({"gradient_clipping": -1.0}, ["gradient_clipping is -1.0, expected 0", "max_grad_norm"]),
    "two clippings": (
        {"gradient_clipping": 1.0, "optimizer": {"type": "SAEF", "params": {"lr": 0.1, "max_grad_norm": 2.0}}},
        ["gradient_clipping 1.0 and optimizer.params.max_grad_norm 2.0 both clip: give one"],
    ),
    "prescale": ({"prescale_gradients": True}, ["prescale_gradients is True, expected False", "all-reduce"]),
    "predivide": ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor is 2.0, expected 1.0"]),
    "sum": ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op is sum, expected mean", "scale the loss"]),
    "communication": ({"communication_data_type": "fp16"}, ["communication_data_type is", "compressor"]),
    "accumulation": (
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
        ["data_types.grad_accum_dtype is fp32, expected bf16"],
    ),
    "tensor parallel": ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size is 2"]),
    "hybrid": ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine.enabled is True"]),
    "deepcompile": ({"compile": {"deepcompile": True}}, ["compile.deepcompile is True"]),
    "universal": ({"checkpoint": {"load_universal": True}}, ["checkpoint.load_universal is True"]),
    "node-local": ({"checkpoint": {"use_node_local_storage": True}}, ["checkpoint.use_node_local_storage is True"]),
    "params misspelt": (
        {"optimizer": {"type": "SAEF", "parms": {"lr": 0.1}}},
        ["optimizer: 'parms' is unknown (did you mean 'params'?)"],
    ),
    "type as a name": ({"optimizer": {"type": "Saef"}}, ['optimizer.type is "Saef": write "type": "SAEF"']),
    "two": (
        {"prescale_gradients": True, "fp16": {"enabled": True}},
        ["prescale_gradients is True", "fp16.enabled is True"],  # all at once
    ),
}

# The optimizer's params: (what is set, what the error says).
PARAMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a list": (["lr", 0.1], ["optimizer.params must be an object", "got ['lr', 0.1]"]),  # type: ignore[dict-item]
    "unknown key": ({"beta": 0.9}, ["optimizer.params: 'beta' is unknown (did you mean 'betas'?); expected 'rule'"]),
    "betas of SGD": ({"betas": [0.9, 0.999]}, ["has ['betas'], which are of AdamW and Adam", '"type": "adamw"']),
    "betas twice": (
        {"rule": {"type": "adamw", "betas": [0.9, 0.99]}, "betas": [0.9, 0.999]},
        ["optimizer.params and its rule both have ['betas']: give them once"],
    ),
    "misspelt key": ({"momentun": 0.9}, ["'momentun' is unknown (did you mean 'momentum'?)"]),
    "dampening": ({"dampening": 0.1}, ["'dampening' is unknown"]),
    "word for lr": ({"lr": "high"}, ["optimizer.params.lr must be a number, got 'high'"]),
    "auto": (
        {"lr": "auto", "max_grad_norm": "auto"},
        ["has \"auto\" for ['lr', 'max_grad_norm'], which Hugging Face's Trainer", '"gradient_clipping" beside the'],
    ),
    "true for momentum": ({"momentum": True}, ["optimizer.params.momentum must be a number, got True"]),
    "number for nesterov": ({"nesterov": 1}, ["optimizer.params.nesterov must be true or false, got 1"]),
    "nesterov without momentum": ({"nesterov": True}, ["Nesterov momentum requires a momentum"]),
    "negative lr": ({"lr": -0.1}, ["Invalid learning rate: -0.1"]),
    "momentum 1": ({"momentum": 1.0}, ["expected finite lr >= 0, 0 <= momentum < 1"]),
    "misspelt compressor": (
        {"compressor": {"type": "topK"}},
        ["optimizer.params.compressor.type: 'topK' is unknown (did you mean 'topk'?); expected 'sign', 'topk'"],
    ),
    "compressor as a word": ({"compressor": "sign"}, ['must be an object with a type, such as {"type": "sign"}']),
    "compressor without type": ({"compressor": {"ratio": 0.1}}, ["optimizer.params.compressor must be an object with"]),
    "compressor null": ({"compressor": None}, ["optimizer.params.compressor must be an object", "got None"]),
    "field of another": ({"compressor": {"type": "sign", "ratio": 0.1}}, ["'ratio' is unknown; expected 'block'"]),
    "misspelt field": ({"compressor": {"type": "topk", "ration": 1}}, ["'ration' is unknown (did you mean 'ratio'?)"]),
    "ratio 0": ({"compressor": {"type": "topk", "ratio": 0}}, ["params.compressor: ratio must be in (0, 1], got 0"]),
    "block as a word": ({"compressor": {"type": "sign", "block": "tensor"}}, ['block must be "layer" or an integer']),
    "missing field": ({"compressor": {"type": "min_size", "numel": 9}}, ["of type 'min_size' needs ['inner']"]),
    "inner": (
        {"compressor": {"type": "min_size", "numel": 9, "inner": {"type": "sing"}}},
        ["optimizer.params.compressor.inner.type: 'sing' is unknown (did you mean 'sign'?)"],
    ),
    "server": ({"server_compressor": "different"}, ["optimizer.params.server_compressor must be an object"]),
    "blocks": (
        {"compressor": {"type": "sign", "block": 7}, "server_compressor": {"type": "topk", "block": 8}},
        ["into different blocks"],
    ),
    "averaging": ({"averaging": {"type": "all_reduce"}}, ["'all_reduce' is unknown (did you mean 'allreduce'?)"]),
    "no period": ({"averaging": {"type": "rotating"}}, ["params.averaging of type 'rotating' needs ['period']"]),
    "period 0": ({"averaging": {"type": "rotating", "period": 0}}, ["period must be at least 1"]),
    "period 2.5": ({"averaging": {"type": "allreduce", "period": 2.5}}, ["period must be an integer"]),
    "step_ahead 2": ({"step_ahead": 2}, ["step_ahead must be in [0, 1]"]),
    "decay mode": ({"weight_decay_mode": "inner"}, ["weight_decay_mode must be one of ('coupled', 'outer')"]),
    "exchange": ({"exchange": "ring"}, ["exchange must be one of ('auto', 'replicated', 'sharded')"]),
    "max_grad_norm": ({"max_grad_norm": 0}, ["max_grad_norm must be a positive number, or None, got 0"]),
    "vote": ({"compressor": {"type": "majority_vote"}}, ["MajorityVote keeps no error", 'weight_decay_mode="outer"']),
}


def attempt(group: dist.ProcessGroup, setups: dict[str, Setup]) -> dict[str, str]:
    """What initialize says to each."""
    said = {}
    for name, setup in setups.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            start(setup, Net())
        said[name] = str(caught.value)
    return said


def test_configs_that_cannot_be_honoured_are_refused(pools: dict[int, RankPool]) -> None:
    setups = {name: Setup(SIGN, config=config) for name, (config, _) in CONFIGS.items()}
    setups |= {name: Setup(params) for name, (params, _) in PARAMS.items()}
    expected = {name: parts for name, (_, parts) in (CONFIGS | PARAMS).items()}
    for said in pools[2].run(attempt, setups, ranks=2):
        for name, parts in expected.items():
            for part in parts:
                assert part in said[name], (name, part)


def refused(group: dist.ProcessGroup) -> dict[str, str]:
    """What the config alone does not show."""
    said, config = {}, json_config(Setup(SIGN))

    def attempt(name: str, error: type[Exception], call: Any) -> None:
        with pytest.raises(error) as caught:
            call()
        said[name] = str(caught.value)

    default = {key: value for key, value in config.items() if key != "gradient_clipping"}
    net, other = Net(), Net()  # DeepSpeed leaves hooks on a model that it has not taken
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    first = [next(other.parameters())]
    attempt("clipping left out", ValueError, lambda: deepspeed.initialize(model=Net(), config=default))
    attempt("optimizer", ValueError, lambda: deepspeed.initialize(model=other, optimizer=sgd, config=config))
    pipeline = PipelineModule(layers=[nn.Linear(6, 4), nn.Linear(4, 1)], num_stages=1, loss_fn=nn.functional.mse_loss)
    attempt("pipeline", ValueError, lambda: deepspeed.initialize(model=pipeline, config=config))
    attempt("part of it", ValueError, lambda: deepspeed.initialize(model=other, model_parameters=first, config=config))
    adam = config | {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}}
    ours = saef.integrations.deepspeed.initialize
    attempt("another optimizer", ValueError, lambda: ours(model=Net(), config=adam))
    attempt("case", ValueError, lambda: ours(model=Net(), config=config | {"optimizer": {"type": "saef"}}))

    alone = torch.optim.SAEF(net.parameters(), lr=0.1, compressor={"type": "sign"})  # type: ignore[attr-defined]
    net(torch.ones(2, 6)).sum().backward()
    attempt("unattached", RuntimeError, alone.step)
    net.zero_grad()

    engine = start(Setup(SIGN), net)
    steps(engine, range(2))
    x, y = batch(dist.get_rank(), 2, torch.float32)
    engine.backward(nn.functional.mse_loss(engine(x), y))
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    attempt("clipped by hand", RuntimeError, engine.step)
    engine.destroy()
    attempt("destroyed", RuntimeError, engine.optimizer.step)

    engine = start(Setup(SIGN), Net())
    with engine.no_sync():
        engine.backward(nn.functional.mse_loss(engine(x), y))
    attempt("never exchanged", RuntimeError, engine.step)

    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    embedding = start(Setup(SIGN), sparse)
    attempt("sparse", TypeError, lambda: embedding.backward(embedding(torch.tensor([1, 2])).sum()))
    return said


def test_what_the_config_does_not_show_is_refused_too(pools: dict[int, RankPool]) -> None:
    for said in pools[2].run(refused, ranks=2):
        assert "gradient_clipping is 1.0, expected 0" in said["clipping left out"]
        assert '"gradient_clipping": 0.0' in said["clipping left out"]
        assert "got an optimizer (SGD) that would take the place of the SAEF" in said["optimizer"]
        assert "SAEF cannot work with a PipelineModule" in said["pipeline"]
        assert "Use data parallelism alone" in said["pipeline"]
        assert "are not in the optimizer" in said["part of it"]
        assert "the config has optimizer.type 'adam'" in said["another optimizer"]
        assert 'optimizer.type is "saef": write "type": "SAEF"' in said["case"]
        assert "belongs to no DeepSpeed engine" in said["unattached"]
        assert "belongs to no DeepSpeed engine" in said["destroyed"]
        assert "give SAEFState max_grad_norm" in said["clipped by hand"]
        assert "never exchanged" in said["never exchanged"]
        assert "Embedding(sparse=False)" in said["sparse"]


class Mpu:
    """Two ranks that hold one model together, as Megatron would say it."""

    def __init__(self) -> None:
        self.both = dist.new_group([0, 1])
        self.alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.both

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.alone


def parallelism(group: dist.ProcessGroup, kind: str) -> str:
    """What initialize says to ways of being parallel that are not data parallelism."""
    config, net, mpu = json_config(Setup(SIGN)), Net(), None
    if kind == "experts":
        net.b = MoE(hidden_size=20, expert=nn.Linear(20, 20), num_experts=2, ep_size=1)
    elif kind == "sequence":
        config |= {"sequence_parallel_size": 2, "data_parallel_size": 1}
    else:
        mpu = Mpu()
    with pytest.raises(ValueError) as caught:
        deepspeed.initialize(model=net, mpu=mpu, config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("experts", "mixture-of-experts layers"), ("model", "model parallelism"), ("sequence", "sequence parallelism")],
)
def test_other_kinds_of_parallelism_are_refused(kind: str, part: str) -> None:
    pool = RankPool(2)  # DeepSpeed keeps such settings for the life of the process
    try:
        for said in pool.run(parallelism, kind, ranks=2):
            assert f"SAEF cannot work with {part}" in said
            assert "Use data parallelism alone" in said
    finally:
        pool.stop()


def differ(group: dist.ProcessGroup) -> str:
    """Ranks with different settings."""
    ratio = 0.1 * (1 + dist.get_rank())
    with pytest.raises(ValueError) as caught:
        start(Setup({"compressor": {"type": "topk", "ratio": ratio}}), Net())
    return str(caught.value)


def test_ranks_with_different_configs_are_told(pools: dict[int, RankPool]) -> None:
    for said in pools[2].run(differ, ranks=2):
        assert "compressor: rank 0 has TopK(ratio=0.1, " in said
        assert "rank 1 has TopK(ratio=0.2, " in said


def quiet(group: dist.ProcessGroup) -> list[str]:
    """What DeepSpeed warns of where max_grad_norm is null, and where it is a number."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = deepspeed.utils.logger
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    for norm in (None, 1.0):
        engine = start(Setup({**SIGN, "max_grad_norm": norm}), Net())
        assert engine.optimizer_params()["max_grad_norm"] == norm
        assert engine.optimizer.saef.settings.max_grad_norm == norm
    logger.removeHandler(handler)
    logger.setLevel(level)
    return records


def test_max_grad_norm_is_not_warned_of(pools: dict[int, RankPool]) -> None:
    for records in pools[2].run(quiet, ranks=2):
        assert not [r for r in records if "max_grad_norm" in r]


def test_without_deepspeed_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['deepspeed'] = None; import saef.integrations.deepspeed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: saef.integrations.deepspeed needs DeepSpeed" in done.stderr
    assert "pip install 'saef[deepspeed]'" in done.stderr
