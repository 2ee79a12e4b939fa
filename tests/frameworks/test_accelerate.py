"""Accelerate with attach(), on two ranks: equal to its own DDP, and to DDP with saef_hook."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.ranks import RankPool
from support.trainers import COMPRESSORS, TOLERANCE, Job, assert_equal

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
job = partial(Job, "support.accelerate_ranks")


@pytest.mark.parametrize(
    ("kind", "alike", "clip"), [("SGD", False, None), ("SGD", True, 0.1), ("AdamW", True, 0.1)], ids=str
)
def test_identity_equals_accelerates_own_ddp(
    trainers: RankPool, tmp_path: Path, kind: str, alike: bool, clip: float | None
) -> None:
    """Resumed after the first epoch. Clipping and AdamW's v are of each rank's own gradient: there, data are alike."""
    for x, norms in trainers.run(job("equals_plain"), tmp_path, kind, alike, clip, ranks=2):
        assert x < TOLERANCE and norms < TOLERANCE


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_equals_ddp_with_the_hook(trainers: RankPool, compressor: str, kind: str) -> None:
    for expected, run in trainers.run(job("equals_the_hook"), COMPRESSORS[compressor], kind, ranks=2):
        assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps"))


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_load_state_resumes_bit_for_bit_on_every_rank(trainers: RankPool, tmp_path: Path, kind: str) -> None:
    ranks = trainers.run(job("resumes"), tmp_path, kind, ranks=2)
    for straight, resumed in ranks:
        assert_equal(resumed, straight)
    assert not ranks[0][0]["e"].equal(ranks[1][0]["e"])


def test_a_gradscaler_and_who_waits_for_it(trainers: RankPool) -> None:
    for expected, run, scheduled in trainers.run(job("scaled"), "AdamW", ranks=2):
        assert_equal(run, expected, ("x", "e", "m", "e_server", "steps", "skipped"))
        assert run["skipped"] > 0 and scheduled == 2 * run["steps"]


def test_two_models_in_one_checkpoint(trainers: RankPool, tmp_path: Path) -> None:
    for expected, resumed in trainers.run(job("two_models"), tmp_path, ranks=2):
        for mine, theirs in zip(resumed, expected, strict=True):
            assert_equal(mine, theirs)
    assert {"saef", "saef_1"} <= {p.name for p in tmp_path.iterdir()}


def test_other_checkpoints(trainers: RankPool, tmp_path: Path) -> None:
    for said in trainers.run(job("other_checkpoints"), tmp_path, ranks=2):
        assert "errors are of step 0" in said["alone"] and "reset_errors()" in said["alone"]
        assert "has a communication hook already" in said["again"]


def test_a_model_that_was_let_go_of_is_neither_saved_nor_kept(trainers: RankPool, tmp_path: Path) -> None:
    for names, saved, loaded, gone in trainers.run(job("attempts"), tmp_path, ranks=2):
        assert names == ["saef"] and gone
        assert saved.equal(loaded)


def test_zero_grad_takes_what_it_took(trainers: RankPool) -> None:
    assert trainers.run(job("zeroes"), ranks=2) == [True, True]


def test_the_scheduler_waits_where_ranks_skip(trainers: RankPool) -> None:
    assert trainers.run(job("skips"), ranks=2) == [(True, 1, True)] * 2


def test_what_cannot_be_honoured_is_refused(trainers: RankPool) -> None:
    expected = {
        "misspelt": "did you mean 'compressor'",
        "no max_grad_norm": "Pass attach(..., max_grad_norm=1.0)",
        "another norm": "attach() was given max_grad_norm=1.0",
        "another type": "norm_type=inf",
        "a part": "got 1 of the 4 parameters",
        "each micro-batch": "if accelerator.sync_gradients",
        "by value": "attach(..., max_grad_norm=...)",
        "no DDP": "a single process has nothing to exchange",
        "not prepared": "needs the optimizer that accelerator.prepare(optimizer) returns",
        "register": "would keep rank 0's errors alone: leave it out",
        "register others": "no error",
        "comm hook": "Leave comm_hook out",
    }
    for said in trainers.run(job("refused"), ranks=2):
        assert {*said} == {*expected}
        for case, words in expected.items():
            assert words in said[case], said[case]
