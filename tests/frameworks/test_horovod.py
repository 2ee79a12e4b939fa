"""Real Horovod ranks under horovodrun: equal to the reference, and to DDP bit for bit."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("horovod") is None:
    pytest.skip("needs Horovod: `make horovod` builds it", allow_module_level=True)

import saef
from support import horovod_jobs as jobs
from support import reference
from support.cases import close, reference_of, reference_settings, start
from support.horovod_ranks import HorovodPool
from support.ranks import RankPool
from support.training import ADAMW, STEPS, Job, gradient, wild_lrs
from support.training import train as train_ddp

COMPRESSORS = {"sign": saef.ScaledSign(block=7), "topk": saef.TopK(0.3, block="layer")}
GROUPS = [{"momentum": 0.9, "weight_decay": 1e-2}, {"momentum": 0.9, "weight_decay": 1e-3}]
BRANCHES, TWICE = {"branches": True}, {"micro_batches": 2}
ADAM = {"groups": [{**ADAMW, "weight_decay": 1e-2}, {**ADAMW, "weight_decay": 1e-3}], "optimizer": "AdamW"}

# (compressor, period, exchange, options of the job, of DistributedOptimizer)
Case = tuple[str, int | None, str, dict[str, Any], dict[str, Any]]
PLAIN: list[Case] = [(c, p, e, {}, {}) for c in COMPRESSORS for p in (None, 4) for e in ("replicated", "sharded")]
SPECIAL: list[Case] = [
    ("topk", 4, "sharded", BRANCHES, {}),
    ("sign", 4, "replicated", BRANCHES | TWICE, {}),
    ("topk", None, "sharded", TWICE, {}),
    ("sign", None, "replicated", {}, {"groups": 2}),
    ("topk", None, "sharded", BRANCHES | TWICE, {"groups": 3}),
    ("sign", None, "replicated", ADAM, {}),
    ("topk", 4, "sharded", BRANCHES | TWICE | ADAM, {}),
]


def name(case: Case) -> str:
    compressor, period, *words = case
    return "-".join([compressor, f"p{period}", *(",".join(w) if isinstance(w, dict) else w for w in words)]).strip("-")


def job_of(case: Case, dtype: torch.dtype) -> Job:
    compressor, period, exchange, options, _ = case
    averaging = None if period is None else saef.AllReduce(period)
    state = {"compressor": COMPRESSORS[compressor], "averaging": averaging, "exchange": exchange}
    rate = 0.1 if "optimizer" in options else 1.0  # AdamW's, as in `cases`
    return Job(
        **{"state": state, "groups": GROUPS, "lrs": [rate * lr for lr in wild_lrs(STEPS)], "dtype": dtype, **options}
    )


@pytest.fixture(scope="module", params=[2, 3, 4])
def horovod(request: pytest.FixtureRequest, horovods: dict[int, HorovodPool]) -> HorovodPool:
    return horovods[request.param]


@pytest.mark.parametrize("case", PLAIN + SPECIAL, ids=name)
def test_horovod_is_ddp_bit_for_bit(pool: RankPool, horovod: HorovodPool, case: Case) -> None:
    """At every step; with branches, gradients become ready in another order on every other rank."""
    job = job_of(case, torch.float32)
    runs = horovod.run(jobs.train, job, case[-1])
    for run, other in zip(runs, pool.run(train_ddp, job, ranks=horovod.ranks), strict=True):
        for part in ("x", "e", "m", "e_server"):
            assert torch.equal(run[part], other[part]), part
        assert run["strategy"] == case[2]
        assert run["buckets"] > 1


@pytest.mark.parametrize("protocol", [saef.Ring(), saef.AsyncRing(4), saef.Slack(0.3, period=2)], ids=repr)
def test_protocols_between_neighbours_are_ddps_bit_for_bit(
    pool: RankPool, horovod: HorovodPool, protocol: saef.Averaging
) -> None:
    """By an all-to-all in which others get nothing; as many bytes as between two gloo ranks."""
    state = {"compressor": COMPRESSORS["topk"], "averaging": protocol}
    job = Job(state, GROUPS, lrs=wild_lrs(STEPS), dtype=torch.float32)
    runs = horovod.run(jobs.train, job, {})
    for run, other in zip(runs, pool.run(train_ddp, job, ranks=horovod.ranks), strict=True):
        for part in ("x", "e", "m", "e_server"):
            assert torch.equal(run[part], other[part]), part
        assert run["metrics"]["bytes_sent_averaging"] == other["metrics"]["bytes_sent_averaging"] > 0


def test_optimizers_own_steps_are_ddps_bit_for_bit(pool: RankPool, horovod: HorovodPool) -> None:
    """Three local steps of AdamW a round, and one of an optimizer that saef does not compute itself."""
    for optimizer, local_steps in (("AdamW", 3), ("RMSprop", 1)):
        state = {"compressor": COMPRESSORS["topk"], "local_steps": local_steps, "averaging": saef.Rotating(4)}
        job = Job(state, [{"weight_decay": 1e-2}], optimizer, lrs=[0.01] * 12, dtype=torch.float32)
        runs = horovod.run(jobs.train, job, {})
        for run, other in zip(runs, pool.run(train_ddp, job, ranks=horovod.ranks), strict=True):
            for part in ("x", "e", "e_server"):
                assert torch.equal(run[part], other[part]), part
            assert run["metrics"]["steps"] == 12 / local_steps


@pytest.mark.parametrize("case", [*PLAIN, SPECIAL[-2]], ids=name)
def test_horovod_equals_the_reference(horovod: HorovodPool, case: Case) -> None:
    compressor, period, exchange, options, _ = case
    rule = "adamw" if "optimizer" in options else "momentum"
    settings = {"compressor": COMPRESSORS[compressor], "server": "same", "step_ahead": 1.0, "rule": rule}
    settings |= {"decay": "coupled", "averaging": period and saef.AllReduce(period), "exchange": exchange}
    job = job_of(case, torch.float64)
    workers = reference_of(settings)(reference_settings(settings, horovod.ranks), start(), horovod.ranks)
    _, x, _ = reference.drive(workers, gradient, job.lrs)
    for k, run in enumerate(horovod.run(jobs.train, job, {})):
        close(run["x"], x)
        close(run["e"], workers.e[k])
        close(run["m"], torch.cat([workers.m[k], workers.v[k]]) if rule == "adamw" else workers.m[k])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in PLAIN if case[1]] + SPECIAL[:2], ids=name)
def test_horovod_on_a_gpu_is_ddp_bit_for_bit(pool: RankPool, horovod: HorovodPool, case: Case) -> None:
    """The ranks share one GPU; messages travel from host memory."""
    job = job_of(case, torch.float32)
    job.device = "cuda"
    runs = horovod.run(jobs.train, job, {})
    for run, other in zip(runs, pool.run(train_ddp, job, ranks=horovod.ranks), strict=True):
        for part in ("x", "e", "m", "e_server"):
            assert torch.equal(run[part], other[part]), part
