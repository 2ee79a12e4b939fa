"""Real DDP runs against the reference: the same numbers, for every method and setting."""

from dataclasses import replace
from itertools import combinations, product
from typing import Any
from unittest import mock

import pytest
import torch

import saef
from saef.step import joining
from support import reference
from support.cases import close, job_of, pairwise, reference_of, reference_settings, start
from support.ranks import RankPool
from support.training import (
    ADAMW,
    MOMENTUM,
    STEPS,
    Job,
    batch,
    flat,
    gradient,
    make_net,
    make_optimizer,
    train,
    way_of_keeping_x,
    wild_lrs,
    wrap,
)

VALUES: dict[str, list[Any]] = {
    "ranks": [2, 4],
    "step_ahead": [1.0, 0.0, 0.5],
    "compressor": [
        saef.ScaledSign(block="layer"),
        saef.TopK(0.1, block="layer"),
        saef.ScaledSign(block=7),
        saef.TopK(0.3, block=10),
        saef.Identity(),
    ],
    "server": ["same", None],
    "rule": ["sgd", "momentum", "nesterov", "adamw", "adam"],
    "decay": ["coupled", "outer"],
    "averaging": [None, saef.AllReduce(5), saef.AllReduce(1), saef.Rotating(4)],
    "exchange": ["replicated", "sharded"],
}


@pytest.mark.parametrize("case", pairwise(VALUES), ids=lambda c: "-".join(str(v) for v in c.values()).replace(" ", ""))
def test_ddp_equals_the_reference(pool: RankPool, case: dict[str, Any]) -> None:
    """x at every step, and e, m, server error and x~ at the end."""
    job = job_of(case)
    runs = pool.run(train, job, ranks=case["ranks"])
    expected = reference_of(case)(reference_settings(case, case["ranks"]), start(), case["ranks"])
    _, x, x_tilde = reference.drive(expected, gradient, job.lrs)
    e_server = torch.zeros(expected.d, dtype=torch.float64)
    for k, run in enumerate(runs):
        close(run["x"], x)
        close(run["e"], expected.e[k])
        m = torch.cat([expected.m[k], expected.v[k]]) if isinstance(expected, reference.AdamW) else expected.m[k]
        close(run["m"] if run["m"].numel() else m, m)
        assert run["strategy"] == case["exchange"]
        assert run["buckets"] > 2  # several buckets, and rebuilt ones
    if runs[0]["e_server"].numel() == expected.d:
        e_server = runs[0]["e_server"]
        close(e_server, expected.e_server)
    if case["exchange"] == "replicated":
        mean_e = sum(run["e"] for run in runs) / len(runs)
        close(runs[0]["x"][-1] - (e_server + mean_e), x_tilde[-1])
    else:  # the servers' parts are those of the reference, in another order
        parts = torch.cat([run["e_server"] for run in runs])
        if parts.numel():
            close(parts.sort().values, expected.e_server.sort().values)


FULL: list[dict[str, Any]] = [
    {"rule": "momentum", "compressor": saef.ScaledSign(block=7), "step_ahead": 1.0, "averaging": None},
    {"rule": "adam", "compressor": saef.ScaledSign(block=7), "step_ahead": 0.5, "averaging": saef.Rotating(4)},
    {"rule": "adamw", "compressor": saef.TopK(0.3, block=10), "step_ahead": 1.0, "averaging": saef.AllReduce(5)},
    {"rule": "nesterov", "compressor": saef.TopK(0.3, block=10), "step_ahead": 0.25, "averaging": None, "server": None},
]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 0.9])
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("case", FULL, ids=lambda c: c["rule"])
def test_full_step_ahead_and_decaying_errors_equal_the_reference(
    pool: RankPool, case: dict[str, Any], exchange: str, beta: float
) -> None:
    """Coupled decay reads all of x_half; errors decay after a step here, and before the next one there."""
    case = {"ranks": 3, "server": "same", "decay": "coupled", "exchange": exchange, **case}
    case |= {"server_step_ahead": True, "error_decay": beta}
    job, expected = job_of(case), reference_of(case)(reference_settings(case, 3), start(), 3)
    _, x, _ = reference.drive(expected, gradient, job.lrs)
    for k, run in enumerate(pool.run(train, job, ranks=3)):
        close(run["x"], x)
        close(run["e"], beta * expected.e[k])


HALF = torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize(
    ("compressor", "server", "rule"),
    [
        (saef.TopK(0.3, block=10, values=HALF), "same", "nesterov"),
        (saef.TopK(0.3, block=10, values=HALF), saef.Identity(values=HALF), "adamw"),
        (saef.Identity(values=HALF), "same", "momentum"),
    ],
    ids=str,
)
def test_bfloat16_values_equal_the_reference(
    pool: RankPool, compressor: Any, server: Any, rule: str, exchange: str
) -> None:
    """What rounding takes away is in the errors, so x~ moves as ever; and bytes are fewer.

    Of two ranks, whose mean is exact: what was rounded once often lies half way between two bfloat16 after it, where a
    last place decides.
    """
    case = {"compressor": compressor, "server": server, "rule": rule, "exchange": exchange, "step_ahead": 1.0}
    case |= {"decay": "coupled", "averaging": saef.Rotating(4), "ranks": 2}
    job, expected = job_of(case), reference_of(case)(reference_settings(case, 2), start(), 2)
    _, x, _ = reference.drive(expected, gradient, job.lrs)
    runs = pool.run(train, job, ranks=2)
    for k, run in enumerate(runs):
        close(run["x"], x)
        close(run["e"], expected.e[k])
        assert run["e"].abs().max() > 0
    whole = replace(compressor, values=None)
    job.state |= {"compressor": whole, "server_compressor": "same" if server == "same" else saef.Identity()}
    more = pool.run(train, job, ranks=2)[0]["metrics"]
    sent, plain = (sum(m[f"bytes_sent_phase{i}"] for i in (1, 2)) for m in (runs[0]["metrics"], more))
    assert 2 < plain / sent <= 4  # of 8 bytes a value 2 are left, and of an index the one; and padding


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [saef.AllReduce(5), saef.Rotating(4)], ids=repr)
def test_averaged_second_moments_equal_the_reference(pool: RankPool, protocol: saef.Averaging) -> None:
    """Beside an averaging of the errors; the bytes of both are counted."""
    case = {"rule": "adamw", "compressor": saef.ScaledSign(block=7), "step_ahead": 1.0, "averaging": saef.Rotating(4)}
    case |= {"ranks": 3, "server": "same", "decay": "coupled", "exchange": "sharded"}
    alone = pool.run(train, job_of(case), ranks=3)[0]["metrics"]["bytes_sent_averaging"]
    case["v_averaging"] = protocol
    job, expected = job_of(case), reference.AdamW(reference_settings(case, 3), start(), 3)
    _, x, _ = reference.drive(expected, gradient, job.lrs)
    for k, run in enumerate(pool.run(train, job, ranks=3)):
        close(run["x"], x)
        close(run["m"], torch.cat([expected.m[k], expected.v[k]]))
        assert run["metrics"]["bytes_sent_averaging"] > alone


def lead(group: Any, exchange: str, optimizer: str, way: str) -> float:
    """The largest entry of mean_k x_half_k - x~ over 20 steps, at s = 1."""
    settings = {"compressor": saef.ScaledSign(block=7), "exchange": exchange, "server_step_ahead": True}
    with mock.patch.object(joining, "create", way_of_keeping_x(way)):
        net, model, chosen, state = wrap(group, Job(settings, [{"lr": 0.1}], optimizer))
    worst = 0.0
    for t in range(20):
        x_tilde, (x, y) = state.x_tilde(), batch(torch.distributed.get_rank(group), t)
        chosen.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        half = flat(net)
        torch.distributed.all_reduce(half, group=group)
        worst = max(worst, float((half / torch.distributed.get_world_size(group) - x_tilde).abs().max()))
        loss.backward()
        chosen.step()
    assert float(state.e_server.abs().max()) > 1e-3
    assert state.diagnose()["mean_gradient_mismatch"] < 1e-12 < state.diagnose()["server_error_norm"]
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("way", ["copies", "swaps"])
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_with_full_step_ahead_the_mean_x_half_is_x_tilde(
    pool: RankPool, exchange: str, way: str, optimizer: str
) -> None:
    """To 1e-12: x~ and the mean over three ranks take some ten operations on numbers of order 1."""
    assert max(pool.run(lead, exchange, optimizer, way, ranks=3)) < 1e-12


def leads(group: Any, settings: dict[str, Any], optimizer: str) -> tuple[float, str]:
    _, _, _, state = wrap(group, Job(settings, optimizer=optimizer))
    return state.engine.context.server_ahead, repr(state)


LEADS: list[tuple[dict[str, Any], str, float]] = [  # settings, optimizer, s' among two ranks
    ({"exchange": "replicated"}, "AdamW", 1.0),
    ({"exchange": "sharded"}, "Adam", 2.0),
    ({"exchange": "sharded", "step_ahead": 0.5}, "AdamW", 1.0),
    ({"compressor": saef.MinSize(10, saef.ScaledSign()), "exchange": "replicated"}, "AdamW", 1.0),
    ({"compressor": saef.TopK(0.1)}, "AdamW", 0.0),
    ({"server_compressor": None}, "AdamW", 0.0),
    ({"step_ahead": 0.0}, "AdamW", 0.0),
    ({"server_step_ahead": False}, "AdamW", 0.0),
    ({}, "SGD", 0.0),
    ({"server_step_ahead": True, "exchange": "replicated"}, "SGD", 1.0),
]


def test_when_the_servers_error_is_stepped_ahead_by(pool: RankPool) -> None:
    for settings, optimizer, expected in LEADS:
        found, said = pool.run(leads, settings, optimizer, ranks=2)[0]
        assert found == expected, settings
        assert ("full step ahead" in said) == (expected > 0), said


def test_every_named_value_and_pair_is_covered() -> None:
    cases = pairwise(VALUES)
    for (a, left), (b, right) in combinations(VALUES.items(), 2):
        for i, j in product(left, right):
            assert any(case[a] == i and case[b] == j for case in cases), (a, i, b, j)


@pytest.mark.parametrize("ranks", [1, 3])
def test_ddp_equals_the_reference_with_odd_numbers_of_ranks(pool: RankPool, ranks: int) -> None:
    job = Job(state={"compressor": saef.ScaledSign(block=5), "exchange": "sharded"}, groups=[{"momentum": 0.9}])
    settings = reference.Settings(reference.scaled_sign, block=5, momentum=0.9)
    _, x, _ = reference.run(settings, start(), gradient, job.lrs, ranks)
    for run in pool.run(train, job, ranks=ranks):
        close(run["x"], x)


@pytest.mark.parametrize("nesterov", [False, True])
def test_dist_ef_presets_equal_the_paper_in_its_own_units(pool: RankPool, nesterov: bool) -> None:
    """Algorithm 3 and 4 with appendix A, errors in gradient units; the paper cannot have eta = 0."""
    lrs = [lr + 1e-3 for lr in wild_lrs(STEPS)]
    options = {"momentum": 0.9, "nesterov": True} if nesterov else {}
    job = Job(
        preset="dist_ef_block_sgdm" if nesterov else "dist_ef_block_sgd",
        groups=[{**options, "weight_decay": 1e-2}],
        lrs=lrs,
    )
    settings = reference.Settings(
        reference.scaled_sign, step_ahead=0, weight_decay_mode="outer", weight_decay=1e-2, **options
    )
    paper = reference.DistEF(settings, start(), 4)
    _, x, _ = reference.drive(paper, gradient, lrs)
    for run in pool.run(train, job, ranks=4):
        close(run["x"], x)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
def test_majority_vote_presets_equal_the_reference(pool: RankPool, momentum: float, exchange: str) -> None:
    job = Job(
        preset="signum_majority_vote" if momentum else "signsgd_majority_vote",
        state={"exchange": exchange},
        groups=[{"momentum": momentum, "weight_decay": 1e-2}],
        lrs=[0.1 * lr for lr in wild_lrs(STEPS)],
    )
    paper = reference.MajorityVote(reference.Settings(momentum=momentum, weight_decay=1e-2), start(), 4)
    _, x, _ = reference.drive(paper, gradient, job.lrs)
    for run in pool.run(train, job, ranks=4):
        close(run["x"], x)
        assert run["e"].numel() == 0 and run["e_server"].numel() == 0  # no error feedback, and no memory for it


def test_identity_equals_plain_ddp_with_sgd(pool: RankPool) -> None:
    """SAEF without compression is torch's own momentum SGD on the mean gradient."""
    options = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    job = Job(state={"compressor": saef.Identity()}, groups=[options])
    for ours, plain in zip(pool.run(train, job), pool.run(train_plain, job), strict=True):
        close(ours["x"], plain)


@pytest.mark.parametrize("more", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("optimizer", ["AdamW", "Adam"])
def test_identity_and_one_worker_equal_torch_optim(pool: RankPool, optimizer: str, more: dict[str, Any]) -> None:
    """Whatever torch computes it with. Of several workers each has a second moment of its own."""
    options = {**ADAMW, "weight_decay": 0.1, **more}
    lrs = [0.1 * lr for lr in wild_lrs(STEPS)]
    job = Job(state={"compressor": saef.Identity()}, groups=[options], optimizer=optimizer, lrs=lrs)
    close(pool.run(train, job, ranks=1)[0]["x"], pool.run(train_plain, job, ranks=1)[0])


def train_plain(group: Any, job: Job) -> torch.Tensor:
    net = make_net(job.dtype)
    model = torch.nn.parallel.DistributedDataParallel(net, process_group=group)
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    trajectory = [flat(net)]
    for t, lr in enumerate(job.lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(torch.distributed.get_rank(group), t)
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        trajectory.append(flat(net))
    return torch.stack(trajectory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor", [saef.ScaledSign(block=16), saef.TopK(0.1, block=16), saef.MinSize(10, saef.TopK(0.2))]
)
@pytest.mark.parametrize(("optimizer", "steps"), [("SGD", 300), ("AdamW", 100)])
def test_float32_ranks_are_bit_identical_after_hundreds_of_steps(
    pool: RankPool, optimizer: str, steps: int, compressor: saef.Compressor
) -> None:
    """And so are the two strategies: x depends on who served with full step ahead alone, which has two forms.

    Of three ranks, whose mean, unlike that of four, is rounded by the division too.
    """
    runs = []
    for exchange in ("replicated", "sharded"):
        job = Job(
            state={
                "compressor": compressor,
                "exchange": exchange,
                "averaging": saef.Rotating(7),
                "server_step_ahead": False,
            },
            groups=[{**(MOMENTUM if optimizer == "SGD" else ADAMW), "weight_decay": 1e-3}],
            optimizer=optimizer,
            lrs=wild_lrs(steps),
            dtype=torch.float32,
        )
        runs += pool.run(train, job, ranks=3)
    for run in runs[1:]:
        assert torch.equal(run["x"], runs[0]["x"])
    assert not torch.equal(runs[0]["e"], runs[1]["e"])  # the workers did differ


@pytest.mark.parametrize("server", ["same", None, saef.Identity()])
def test_bytes_counted_equal_the_codecs_formula(pool: RankPool, server: Any) -> None:
    """One bucket, so one message per phase: the formula of a message applies as it is."""
    steps, K = 5, 4
    numels = [p.numel() for p in make_net().parameters()]
    for exchange in ("replicated", "sharded"):
        compressor = saef.TopK(0.1, block=9)
        job = Job(
            state={"compressor": compressor, "server_compressor": server, "exchange": exchange},
            ddp={"bucket_cap_mb": 25},
            lrs=[0.1] * steps,
            dtype=torch.float32,
        )
        runs = [run["metrics"] for run in pool.run(train, job)]
        up = saef.message_bytes(compressor, numels)
        down = saef.message_bytes(compressor if server == "same" else saef.Identity(), numels)
        total = sum(m["bytes_sent_phase1"] for m in runs)
        if exchange == "replicated":
            assert all(m["bytes_sent_phase1"] == steps * (K - 1) * up for m in runs)
            assert all(m["bytes_sent_phase2"] == 0 for m in runs)
        else:  # each of the K sections is padded to 8 bytes on its own
            assert 0 <= total - steps * (K - 1) * up <= steps * (K - 1) * 8 * K
            replies = sum(m["bytes_sent_phase2"] for m in runs)
            assert 0 <= replies - steps * (K - 1) * down <= steps * (K - 1) * 8 * K
        for m in runs:
            assert m["bytes_sent"] == sum(v for name, v in m.items() if name.startswith("bytes_sent_"))
            assert m["steps"] == steps
