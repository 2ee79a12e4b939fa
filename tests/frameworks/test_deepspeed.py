"""DeepSpeed engines whose JSON says SAEF: equal to the reference, and to DDP bit for bit."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import saef
from support import reference
from support.deepspeed_ranks import Setup, train
from support.ranks import RankPool
from support.training import SIZES, Job, gradient, make_net
from support.training import train as train_ddp

STEPS = 20
COMPRESSORS: dict[str, tuple[dict[str, Any], saef.Compressor, reference.Compressor, Any]] = {
    "sign": ({"type": "sign", "block": 7}, saef.ScaledSign(block=7), reference.scaled_sign, 7),
    "topk": ({"type": "topk", "ratio": 0.3, "block": "layer"}, saef.TopK(0.3, "layer"), reference.top_k(0.3), "layer"),
}
GROUPS = [{"weight_decay": 1e-2}, {"weight_decay": 1e-3, "nesterov": True}]
WARMUP = {"warmup_max_lr": [0.1, 0.05], "warmup_num_steps": 10, "warmup_type": "linear"}
# What WarmupLR makes of it for the first group (the second has half): it counts from its first step, the loop's second.
LRS = [0.0, *(0.1 * min(1.0, t / 10) for t in range(STEPS - 1))]

# float64: as in test_ddp.py.
TOLERANCE_64 = 1e-10
# float32: a step rounds x, of order 1, and what moves it, to 2^-24 = 6e-8 each; that is 20 * 2 * 6e-8 = 2.4e-6 if all
# roundings go one way, and training is a contraction. (Measured: 4e-7.) A wrong sign or index shows at 1e-3 or more. So
# that rounding itself cannot turn a sign, or swap two coordinates of top-k, the batches are such that in the reference
# no sign or choice is closer than MARGIN of the largest entry of its tensor.
TOLERANCE_32, MARGIN, SMALL = 2.4e-6, 1e-4, (6, 2, 1)


CASES = pytest.mark.parametrize(
    ("compressor", "period", "micro_batches", "ranks"),
    [(c, p, n, k) for c in COMPRESSORS for p in (None, 5) for n in (1, 4) for k in (2, 4)],
    ids=lambda v: str(v),
)


@CASES
def test_fp32_equals_the_reference_and_ddp(
    pools: dict[int, RankPool], compressor: str, period: int | None, micro_batches: int, ranks: int
) -> None:
    first, expected = well_separated(compressor, period, ranks)
    compare(pools[ranks], compressor, period, micro_batches, ranks, torch.float32, SMALL, first, expected, TOLERANCE_32)


@CASES
def test_fp64_equals_the_reference_and_ddp(
    pools: dict[int, RankPool], compressor: str, period: int | None, micro_batches: int, ranks: int
) -> None:
    """On a larger network: DeepSpeed leaves a float64 model as it is."""
    expected = run_reference(compressor, period, ranks, SIZES, first=0)
    compare(pools[ranks], compressor, period, micro_batches, ranks, torch.float64, SIZES, 0, expected, TOLERANCE_64)


PROTOCOLS = [
    ({"type": "local_step", "period": 3}, saef.LocalStep(3)),
    ({"type": "slack", "gamma": 0.3}, saef.Slack(0.3)),
    ({"type": "ring", "period": 2}, saef.Ring(2)),
    ({"type": "async_ring", "seed": 4}, saef.AsyncRing(4)),
    ({"type": "gossip", "weights": [[0.75, 0.25], [0.25, 0.75]]}, saef.Gossip([[0.75, 0.25], [0.25, 0.75]])),
]


@pytest.mark.parametrize("as_json, protocol", PROTOCOLS, ids=lambda v: v["type"] if isinstance(v, dict) else "")
def test_other_averaging_equals_ddp(pools: dict[int, RankPool], as_json: dict[str, Any], protocol: Any) -> None:
    params = {"lr": 0.1, "momentum": 0.9, "compressor": COMPRESSORS["topk"][0], "averaging": as_json}
    runs = pools[2].run(train, Setup(params, [{}], torch.float64, 1, {}, SIZES, 0), 20, ranks=2)
    state = {"compressor": COMPRESSORS["topk"][1], "averaging": protocol}
    job = Job(state=state, groups=[{"momentum": 0.9}], lrs=[0.1] * 20, ddp={"bucket_cap_mb": 25})
    for run, ddp in zip(runs, pools[2].run(train_ddp, job, ranks=2), strict=True):
        for name in ("x", "e", "m"):
            assert torch.equal(run[name], ddp[name]), name
        assert run["metrics"]["bytes_sent_averaging"] == ddp["metrics"]["bytes_sent_averaging"] > 0


# What the JSON says of the optimizer, and beside it: the second as for DeepSpeed's own optimizers.
RULES = [
    ({"rule": {"type": "adamw", "betas": [0.8, 0.95], "eps": 1e-3}, "max_grad_norm": 1.0}, {}, "AdamW"),
    ({"rule": {"type": "adam"}, "betas": [0.8, 0.95], "eps": 1e-3}, {"gradient_clipping": 1.0}, "Adam"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("said, beside, optimizer", RULES, ids=lambda v: v if isinstance(v, str) else "")
def test_other_rules_equal_ddp(
    pools: dict[int, RankPool], said: dict[str, Any], beside: dict[str, Any], optimizer: str, dtype: torch.dtype
) -> None:
    """AdamW's decay is at x, Adam's at x_half; groups may have betas of their own."""
    params = {"lr": 0.01, "compressor": COMPRESSORS["sign"][0], **said}
    groups = [{"weight_decay": 1e-2}, {"weight_decay": 1e-3, "betas": (0.7, 0.9)}]
    config = beside | ({"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {})
    runs = pools[2].run(train, Setup(params, groups, dtype, 1, config, SIZES, 0), 20, ranks=2)
    common = [{"eps": 1e-3, "betas": (0.8, 0.95), **group} for group in groups]
    job = Job(
        state={"compressor": COMPRESSORS["sign"][1], "max_grad_norm": 1.0},
        groups=common,
        optimizer=optimizer,
        lrs=[0.01] * 20,
        dtype=dtype,
        ddp={"bucket_cap_mb": 25},
    )
    for run, ddp in zip(runs, pools[2].run(train_ddp, job, ranks=2), strict=True):
        for name in ("x", "e", "m", "e_server"):
            assert torch.equal(run[name], ddp[name]), name
        assert run["m"].numel() == 2 * run["e"].numel()


def compare(
    pool: RankPool,
    compressor: str,
    period: int | None,
    micro_batches: int,
    ranks: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    first: int,
    expected: tuple[reference.SAEF, Tensor, float],
    tolerance: float,
) -> None:
    as_json, as_object, _, _ = COMPRESSORS[compressor]
    averaging = None if period is None else {"type": "allreduce", "period": period}
    params = {"lr": 1.0, "momentum": 0.9, "compressor": as_json, "averaging": averaging}
    config = {"scheduler": {"type": "WarmupLR", "params": WARMUP}}
    setup = Setup(params, GROUPS, dtype, micro_batches, config, sizes, first)
    runs = pool.run(train, setup, STEPS, ranks=ranks)
    assert runs[0]["lrs"] == [[lr, lr / 2] for lr in LRS]

    workers, x, _ = expected
    for k, run in enumerate(runs):
        torch.testing.assert_close(run["x"].double(), x, rtol=0, atol=tolerance)
        torch.testing.assert_close(run["e"].double(), workers.e[k], rtol=0, atol=tolerance)
        torch.testing.assert_close(run["m"].double(), workers.m[k], rtol=0, atol=10 * tolerance)  # sums 10 gradients
        torch.testing.assert_close(run["e_server"].double(), workers.e_server, rtol=0, atol=tolerance)
        assert run["steps"] == (STEPS, STEPS)
        assert torch.equal(run["x"], runs[0]["x"])

    job = Job(
        state={"compressor": as_object, "averaging": period and saef.AllReduce(period)},
        groups=[{**GROUPS[0], "momentum": 0.9}, {**GROUPS[1], "momentum": 0.9, "lr": 0.5}],
        lrs=LRS,
        dtype=dtype,
        ddp={"bucket_cap_mb": 25},  # all in one bucket, as here
        micro_batches=micro_batches,
        sizes=sizes,
        first=first,
    )
    for run, ddp in zip(runs, pool.run(train_ddp, job, ranks=ranks), strict=True):
        for name in ("x", "e", "m", "e_server"):
            assert torch.equal(run[name], ddp[name]), name
        for name in ("bytes_sent_phase1", "bytes_sent_phase2", "bytes_sent_averaging", "bytes_per_step"):
            assert run["metrics"][name] == ddp["metrics"][name], name


@cache
def well_separated(compressor: str, period: int | None, ranks: int) -> tuple[int, tuple[reference.SAEF, Tensor, float]]:
    """The first batch of a run none of whose decisions hangs on rounding, and that run by the reference."""
    for first in range(0, 3000, 100):
        expected = run_reference(compressor, period, ranks, SMALL, first)
        if expected[2] > MARGIN:
            return first, expected
    raise AssertionError("no such batches")


@cache
def run_reference(
    compressor: str, period: int | None, ranks: int, sizes: tuple[int, ...], first: int
) -> tuple[reference.SAEF, Tensor, float]:
    """(workers at the end, x at all steps, least margin of a sign or a choice)."""
    _, _, C, block = COMPRESSORS[compressor]
    parameters = [p.detach() for p in make_net(sizes=sizes).parameters()]
    matrix = [p.dim() > 1 for p in parameters]
    settings = reference.Settings(
        C,
        block=block,
        averaging=None if period is None else ("allreduce", period),
        momentum=0.9,
        nesterov=[not m for m in matrix],
        weight_decay=[1e-2 if m else 1e-3 for m in matrix],
    )
    workers = reference.SAEF(settings, parameters, ranks)
    at, x, least = partial(gradient, sizes=sizes), [workers.x], 1.0
    for t, lr in enumerate(LRS):
        workers.begin_step()
        grads = [at(k, first + t, workers.x_half(k)) for k in range(ranks)]
        workers.step(grads, [lr if m else lr / 2 for m in matrix])
        x.append(workers.x)
        for v in (*workers.D_k, workers.D):
            least = min(least, *(margin(compressor, part.reshape(-1).abs()) for part in workers.tensors(v)))
    return workers, torch.stack(x), least


def margin(compressor: str, size: Tensor) -> float:
    """How far |v| of one tensor is from another sign or choice, relative to its largest entry."""
    if size.numel() == 1 or not size.max():  # one coordinate travels as it is, and zeros stay zeros
        return 1.0
    ordered = size.sort(descending=True).values
    kept = -(-size.numel() * 3 // 10)  # k of top-30 %
    near = ordered[-1] if compressor == "sign" else ordered[kept - 1] - ordered[kept]
    return float(near / ordered[0])
