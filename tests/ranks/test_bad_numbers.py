"""NaN, Inf and overflow skip a step on all ranks; zeros, denormals, huge and tiny numbers do not."""

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import saef
from support import reference
from support.equal import same, snapshot
from support.ranks import RankPool
from support.slopes import SHAPES, setup, slope

NAN, INF = float("nan"), float("inf")
# ---- skipped steps ------------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {"compressor": saef.ScaledSign(block=7), "averaging": saef.AllReduce(1)},
    {"compressor": saef.TopK(0.1), "averaging": saef.Rotating(3), "max_grad_norm": 1.0},
    {"compressor": saef.TopK(0.3, block=10), "server_compressor": None, "averaging": saef.AllReduce(2)},
    {"compressor": saef.MinSize(10, saef.TopK(0.2)), "step_ahead": 0.5, "weight_decay_mode": "outer"},
    {"compressor": saef.Identity()},
    {"compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"},
    {"compressor": saef.ScaledSign(block=7), "averaging": saef.AllReduce(1), "optimizer": "AdamW"},
    {"compressor": saef.TopK(0.3, block=10), "v_averaging": saef.Rotating(2), "optimizer": "AdamW"},
    {"compressor": saef.TopK(0.3, block=10), "server_compressor": None, "max_grad_norm": 1.0, "optimizer": "Adam"},
]


def train_with_poison(group: dist.ProcessGroup, options: dict[str, Any], poisons: list[float]) -> list[Tensor]:
    """12 steps; before step 3, one poisoned attempt for each of `poisons`, on rank 1 alone. The final state."""
    model, optimizer, state = setup(group, torch.float32, 1.0, 0.9, options)
    rank = dist.get_rank(group)
    for t in range(12):
        for poison in poisons if t == 3 else []:
            before, skipped = snapshot(state), state.skipped
            c = slope(rank, 100)
            if rank == 1:
                c[3][20] = poison
            optimizer.param_groups[0]["lr"] = 10.0
            optimizer.zero_grad()
            model([v.float() for v in c]).backward()
            optimizer.step()
            assert (state.steps, state.skipped, state.skipped_in_a_row) == (3, skipped + 1, skipped + 1)
            assert same(before, snapshot(state)), f"{poison} left a trace"
            assert torch.equal(torch.cat([p.detach().view(-1) for p in model.parameters()]), before[0])
        optimizer.param_groups[0]["lr"] = 0.05 + 0.01 * t
        optimizer.zero_grad()
        model([v.float() for v in slope(rank, t)]).backward()
        optimizer.step()
    assert (state.skipped, state.skipped_in_a_row) == (len(poisons), 0)
    assert state.metrics()["steps_skipped"] == len(poisons) and state.steps == 12
    return snapshot(state)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("options", METHODS, ids=lambda o: type(o["compressor"]).__name__ + o.get("optimizer", ""))
def test_a_bad_number_on_one_rank_is_a_step_that_never_was(
    pool: RankPool, options: dict[str, Any], exchange: str
) -> None:
    """Bit for bit: directly after it, and at the end of training. 3e38 is finite, and overflows in D at lr = 10.

    With AdamW it overflows in v, where u would be 0 by a division by infinity.
    """
    options = {**options, "exchange": exchange, "audit_every": 1}
    poisons = [NAN, INF, -INF] + ([3.0e38] * ("max_grad_norm" not in options) if options["compressor"].feedback else [])
    clean = pool.run(train_with_poison, options, [], ranks=3)
    for bad, good in zip(pool.run(train_with_poison, options, poisons, ranks=3), clean, strict=True):
        assert same(bad, good)


def meet_too_many(group: dist.ProcessGroup, limit: int | None) -> tuple[int, str]:
    """(steps skipped, the error) of 5 poisoned steps in a row, then a good one."""
    model, optimizer, state = setup(
        group, torch.float32, 1.0, 0.9, {"compressor": saef.TopK(0.1), "max_consecutive_skips": limit}
    )
    rank, said = dist.get_rank(group), ""
    before = snapshot(state)
    for t in range(5):
        optimizer.zero_grad()
        model([v.float() * (NAN if rank == t % 2 else 1.0) for v in slope(rank, t)]).backward()
        try:
            optimizer.step()
        except FloatingPointError as error:
            said = str(error)
            break
    skipped = state.skipped
    assert same(before, snapshot(state))
    optimizer.zero_grad()
    model([v.float() for v in slope(rank, 9)]).backward()
    optimizer.step()
    assert (state.steps, state.skipped_in_a_row) == (1, 0)
    return skipped, said


@pytest.mark.parametrize(("limit", "skipped"), [(0, 1), (2, 3), (5, 5), (None, 5)])
def test_too_many_skips_in_a_row_raise_on_all_ranks(pool: RankPool, limit: int | None, skipped: int) -> None:
    for found, said in pool.run(meet_too_many, limit, ranks=2):
        assert found == skipped
        if limit is not None and limit < 5:
            assert f"max_consecutive_skips={limit}" in said and "max_grad_norm" in said and "p.3" in said
        else:
            assert not said


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def log_lines(group: dist.ProcessGroup) -> list[str]:
    model, optimizer, state = setup(group, torch.float32, 1.0, 0.9, {})
    kept, logger = _Kept(), logging.getLogger("saef")
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        for t in range(3):
            optimizer.zero_grad()
            model([v.float() * (NAN if t == 1 else 1.0) for v in slope(0, t)]).backward()
            optimizer.step()
        state.log_summary()
    finally:
        logger.removeHandler(kept)
    return kept.lines


def test_a_skipped_step_and_the_summary_are_logged_by_rank_0(pool: RankPool) -> None:
    lines, other = pool.run(log_lines, ranks=2)
    assert "all ranks skip step 1" in lines[0] and "p.3" in lines[0]
    assert lines[1].startswith("saef step 2: ") and "skipped 1" in lines[1] and other == []


# ---- numbers that are odd, but numbers ------------------------------------------------------------------------

STEPS = 15  # the least common multiple of the periods below that are odd; the even ones have 12
LRS: dict[str, list[float]] = {
    "constant": [0.1] * STEPS,
    "zero": [0.0 if t % 5 < 2 else 0.1 for t in range(STEPS)],
    "by a million": [1e-6 if t % 4 < 2 else 1.0 for t in range(STEPS)],
}
SCALES: dict[str, list[float]] = {
    "one": [1.0] * STEPS,
    "zero": [0.0] * STEPS,
    "zero now and then": [float(t % 3 > 0) for t in range(STEPS)],
    "huge": [1e30] * STEPS,
    "tiny": [1e-30] * STEPS,
    "denormal": [1e-43] * STEPS,
    "huge and tiny": [1e30 if t % 2 else 1e-30 for t in range(STEPS)],
}


def drive(
    group: dist.ProcessGroup, dtype: torch.dtype, options: dict[str, Any], lrs: list[float], scales: list[float]
) -> tuple[list[Tensor], Tensor, float]:
    """(final state, x~ at the end, the largest number met); x starts at 0, so that it has the gradients' scale."""
    model, optimizer, state = setup(group, dtype, 0.0, 0.9, options)
    rank, largest = dist.get_rank(group), 0.0
    for t, (lr, scale) in enumerate(zip(lrs, scales, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        model([v.to(dtype) for v in slope(rank, t, scale)]).backward()
        optimizer.step()
        largest = max([largest] + [float(v.abs().max()) for v in snapshot(state) if v.numel()])
    assert state.steps == STEPS and state.skipped == 0
    return snapshot(state), state.x_tilde(), largest


@pytest.mark.slow
@pytest.mark.parametrize("compressor", [saef.ScaledSign(block=7), saef.TopK(0.1, block=9)], ids=["sign", "top-k"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_odd_numbers_follow_the_reference(pool: RankPool, dtype: torch.dtype, compressor: saef.Compressor) -> None:
    """Every scale of gradients with every learning rate, against the float64 reference.

    float64: x, e, m, server error as derived in test_ddp.py, 1e-10 relative to the largest number.
    float32: sign and top-k may decide differently where numbers are nearly equal, but x~ does not depend on
    what they decide: it moves by -eta mean u alone. A step rounds D, e, C(D), the server's D and e, x and the three
    terms of x~ once each, and m, which then counts in the 1/(1-mu) = 10 steps after it: less than 30 roundings a
    step, of half a unit in the last place of the largest number, or of the least denormal.
    """
    is_double = dtype == torch.float64
    sign = isinstance(compressor, saef.ScaledSign)
    C = reference.scaled_sign if sign else reference.top_k(0.1)
    settings = reference.Settings(C, block=7 if sign else 9, momentum=0.9, averaging=("rotating", 3))
    options = {"compressor": compressor, "averaging": saef.Rotating(3), "exchange": "replicated", "audit_every": 5}
    for lrs in LRS.values():
        for scales in SCALES.values():
            runs = pool.run(drive, dtype, options, lrs, scales, ranks=2)
            start = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
            steps = [[v.to(dtype).double() for v in slope(k, t, a)] for t, a in enumerate(scales) for k in range(2)]
            ours, _, x_tilde = reference.run(settings, start, lambda k, t, p, s=steps: s[2 * t + k], lrs, 2)
            for k, (found, tilde, largest) in enumerate(runs):
                ulp = 2.0**-53 if is_double else 2.0**-24
                bound = 1e-10 * largest if is_double else 30 * STEPS * max(ulp * largest, 2.0**-150)
                expected = (ours.x, ours.e[k], ours.m[k], ours.e_server) if is_double else ()
                for a, b in [*zip(found, expected, strict=False), (tilde, x_tilde[-1])]:
                    assert float((a.double() - b).abs().max()) <= bound
                assert torch.equal(found[0], runs[0][0][0])
                assert all(bool(torch.isfinite(v).all()) for v in found)
