"""What diagnose() measures, against the definitions; what counters say; and that looking changes nothing."""

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import saef
from support import reference
from support.ranks import RankPool
from support.training import Job, batch, flat, gradient, make_net, wild_lrs, wrap

STEPS, K = 12, 3


Seen = list[dict[str, float]]


def train_and_look(group: dist.ProcessGroup, options: dict[str, Any], look: bool) -> tuple[Seen, Tensor]:
    net, model, optimizer, state = wrap(group, Job(state=options, groups=[{"momentum": 0.9}]))
    seen = []
    for t, lr in enumerate(wild_lrs(STEPS)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(dist.get_rank(group), t)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        if look:
            seen.append(state.diagnose())
            assert torch.equal(flat(net), state.weights.x())
    return seen, torch.cat([flat(net), state.e, state.m, state.e_server])


def expected(options: dict[str, Any]) -> list[dict[str, float]]:
    """The same from the reference, whose e_k, e and D_k are those of the paper."""
    C = reference.scaled_sign if isinstance(options["compressor"], saef.ScaledSign) else reference.top_k(0.2)
    s, names = options["step_ahead"], [n for n, _ in make_net().named_parameters()]
    averaging = options.get("averaging") and ("rotating", 4)
    chosen = reference.Settings(
        C, block=9, momentum=0.9, step_ahead=s, averaging=averaging, server=options.get("server_compressor", "same")
    )
    run = reference.SAEF(chosen, [p.detach() for p in make_net().parameters()], K)
    seen = []
    for t, lr in enumerate(wild_lrs(STEPS)):
        run.begin_step()
        run.step([gradient(k, t, run.x_half(k)) for k in range(K)], lr)
        mean = reference.mean(run.e)

        def square(v: Tensor) -> float:
            return float((v * v).sum())

        found = {
            "error_norm_rms": (sum(map(square, run.e)) / K) ** 0.5,
            "mean_error_norm": square(mean) ** 0.5,
            "server_error_norm": square(run.e_server) ** 0.5,
            "mismatch_eq9": square(run.e_server + mean),
            "mismatch_eq10": sum(square(run.e_server + mean - s * e) for e in run.e) / K,
            "mean_gradient_mismatch": square(run.e_server + mean - s * mean) ** 0.5,
            "stationary_distance": sum(square(e - mean) for e in run.e) / K,
        }
        for i, name in enumerate(names):
            deltas = []
            for D, sent in zip(run.D_k, run.sent, strict=True):
                D_layer, sent_layer = run.tensors(D)[i], run.tensors(sent)[i]
                whole = square(D_layer)
                deltas.append(1 - square(D_layer - sent_layer) / whole if whole else 1.0)
            found[f"delta/{name}"] = sum(deltas) / K
        seen.append(found)
    return seen


@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize(
    "options",
    [
        {"compressor": saef.ScaledSign(block=9), "step_ahead": 1.0},
        {"compressor": saef.TopK(0.2, block=9), "step_ahead": 0.5, "averaging": saef.Rotating(4)},
        {"compressor": saef.TopK(0.2, block=9), "step_ahead": 0.0, "server_compressor": None},
    ],
    ids=["sign", "top-k", "single-way EF"],
)
def test_diagnose_measures_what_it_says(pool: RankPool, options: dict[str, Any], exchange: str) -> None:
    """float64; norms of vectors that agree to 1e-10 (test_ddp.py), of order 1."""
    options = {**options, "exchange": exchange}
    runs = pool.run(train_and_look, options, True, ranks=K)
    for t, wanted in enumerate(expected(options)):
        for seen, _ in runs:
            assert seen[t].keys() == wanted.keys() | {"error_norm"}
            for name, value in wanted.items():
                assert seen[t][name] == pytest.approx(value, rel=1e-8, abs=1e-10), (t, name)
        assert sum(seen[t]["error_norm"] ** 2 for seen, _ in runs) / K == pytest.approx(wanted["error_norm_rms"] ** 2)
    assert 0 < wanted["delta/0.weight"] < 1


def test_looking_changes_nothing(pool: RankPool) -> None:
    options = {"compressor": saef.TopK(0.2, block=9), "averaging": saef.Rotating(4)}
    for (_, a), (_, b) in zip(
        pool.run(train_and_look, options, True, ranks=K), pool.run(train_and_look, options, False, ranks=K), strict=True
    ):
        assert torch.equal(a, b)


def look_at_any_time(group: dist.ProcessGroup) -> bool:
    net, model, optimizer, state = wrap(group, Job(state={"compressor": saef.ScaledSign(block=9)}))
    assert state.diagnose()["mismatch_eq9"] == 0.0 and not any(k.startswith("delta") for k in state.diagnose())
    x, y = batch(dist.get_rank(group), 0)
    loss = F.mse_loss(model(x), y)
    between = state.diagnose()
    loss.backward()
    assert state.diagnose() == between  # errors as they were; no message has been committed
    optimizer.step()
    after = state.diagnose()
    assert after["mismatch_eq9"] > 0 and 0 < after["delta/0.weight"] < 1
    m = state.metrics()
    assert m["bytes_sent_telemetry"] > 0 and all(m[f"seconds_{p}"] > 0 for p in ("compress", "exchange", "apply"))
    assert m["bytes_per_step"] == m["bytes_sent_phase1"] + m["bytes_sent_phase2"]
    model(x)
    assert not any(k.startswith("delta") for k in state.diagnose())  # e is another step's now
    return True


def test_diagnose_may_be_called_at_any_time(pool: RankPool) -> None:
    assert pool.run(look_at_any_time, ranks=2) == [True, True]


def vote(group: dist.ProcessGroup) -> tuple[dict[str, float], str]:
    options = {"compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"}
    _, model, optimizer, state = wrap(group, Job(state=options))
    x, y = batch(0, 0)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    state.log_summary(logging.DEBUG)
    return state.diagnose(), state.summary()


def test_a_vote_has_no_errors_to_measure(pool: RankPool) -> None:
    for measured, line in pool.run(vote, ranks=2):
        assert measured == {} and "\n" not in line and line.startswith("saef step 1: ") and "|e_k|" not in line


SIGN, LAYER = saef.ScaledSign(block=9), saef.TopK(0.2, block="layer")
VOTE = {"compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"}
LINE = saef.Gossip([[0.75, 0.25, 0.0], [0.25, 0.5, 0.25], [0.0, 0.25, 0.75]])
# Settings, momentum, and what repr(state) says of them first.
SAID: list[tuple[dict[str, Any], float, str]] = [
    ({}, 0.9, "SAEF, ScaledSign(block=65536) both ways"),
    ({"compressor": SIGN, "server_compressor": None}, 0.9, "SAEF, ScaledSign(block=9) single-way"),
    (
        {"compressor": LAYER, "server_compressor": saef.Identity()},
        0.0,
        "SAEF, TopK(ratio=0.2, block='layer') and Identity() back",
    ),
    (
        {"compressor": SIGN, "averaging": saef.Rotating(4)},
        0.9,
        "SAEF, ScaledSign(block=9) both ways; errors averaged by Rotating(period=4)",
    ),
    (  # K rows of K weights would be too long
        {"compressor": SIGN, "averaging": LINE},
        0.9,
        "SAEF, ScaledSign(block=9) both ways; errors averaged by Gossip(weights=((0.75, 0.25, 0.0), (0...",
    ),
    ({"compressor": SIGN, "step_ahead": 0}, 0.9, "EF, ScaledSign(block=9) both ways"),
    (
        {"compressor": SIGN, "step_ahead": 0, "weight_decay_mode": "outer"},
        0.9,
        "EF, ScaledSign(block=9) both ways; weight decay at x",
    ),
    ({"compressor": SIGN, "step_ahead": 0.5}, 0.9, "SA-PEF (step_ahead=0.5), ScaledSign(block=9) both ways"),
    (VOTE, 0.0, "signSGD with majority vote, MajorityVote(block=65536) both ways"),
    (VOTE, 0.9, "signum with majority vote, MajorityVote(block=65536) both ways"),
    ({"compressor": saef.Identity()}, 0.0, "plain SGD, Identity() both ways"),
    ({"compressor": saef.Identity()}, 0.9, "plain momentum SGD, Identity() both ways"),
    (
        {"compressor": saef.MinSize(1000, SIGN)},
        0.9,
        "plain momentum SGD, MinSize(numel=1000, inner=ScaledSign(block=9)) both ways",
    ),
]


def describe(group: dist.ProcessGroup, strategy: str) -> list[tuple[str, str, float]]:
    """repr(state) before the first step and after the second, and the bytes counted in a step."""
    found = []
    for options, momentum, _ in SAID:
        options = {"exchange": strategy, **options}
        _, model, optimizer, state = wrap(group, Job(state=options, groups=[{"momentum": momentum}]))
        first = repr(state)
        for t in range(2):
            optimizer.zero_grad()
            x, y = batch(dist.get_rank(group), t)
            F.mse_loss(model(x), y).backward()
            assert repr(state).startswith(first[:30])  # also while a step is under way
            optimizer.step()
        found.append((first, repr(state), state.metrics()["bytes_per_step"]))
    return found


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_a_state_says_what_it_is(pool: RankPool, strategy: str) -> None:
    """Method, compressors, averaging, ranks, strategy, parameters (6 9 + 9 + 9 7 + 7 + 7 + 1) and bytes."""
    for rank in pool.run(describe, strategy, ranks=K):
        for (options, _, start), (first, later, measured) in zip(SAID, rank, strict=True):
            about = f"<SAEFState: {start}; {K} ranks, {strategy}; 141 parameters; "
            assert first.startswith(f"{about}about ") and later == f"{about}{measured:,.0f} bytes a step and rank>"
            assert first.endswith(", beside the averaging>" if "averaging" in options else " bytes a step and rank>")


def in_one_bucket(group: dist.ProcessGroup, compressor: saef.Compressor, strategy: Any) -> tuple[float, float]:
    """Bytes a step: what repr(state) expects before the first, and what the first one sent."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    state = saef.SAEFState(net, optimizer, compressor=compressor, exchange=strategy, process_group=group)
    expected = float(repr(state).partition("about ")[2].partition(" bytes")[0].replace(",", ""))
    x, y = batch(0, 0)
    F.mse_loss(net(x), y).backward()
    state.engine.exchange_gradients()
    optimizer.step()
    return expected, state.metrics()["bytes_per_step"]


@pytest.mark.parametrize("compressor", [SIGN, LAYER, saef.MinSize(9, SIGN)], ids=repr)
def test_the_bytes_that_it_expects_are_those_that_it_sends(pool: RankPool, compressor: saef.Compressor) -> None:
    """Whole messages replicated. Sharded in the mean, but for up to 7 bytes of padding in each of K sections."""
    (a,) = {a for a, _ in pool.run(in_one_bucket, compressor, "replicated", ranks=K)}
    numels = [p.numel() for p in make_net().parameters()]
    assert a == (K - 1) * saef.message_bytes(compressor, numels, torch.float64)
    assert [sent for _, sent in pool.run(in_one_bucket, compressor, "replicated", ranks=K)] == [a] * K
    sharded = pool.run(in_one_bucket, compressor, "sharded", ranks=K)
    mean = sum(sent for _, sent in sharded) / K
    for expected, _ in sharded:
        assert expected == round(2 / K * a)  # as much again comes back: C is the same both ways
        # Of messages and replies a rank sends K - 1 of K sections each.
        assert 0 <= mean - expected + 0.5 <= 2 * (K - 1) * 7 + 1
