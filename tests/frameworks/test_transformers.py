"""Hugging Face's Trainer with SAEFCallback, on two ranks: equal to its own DDP, and to DDP with saef_hook."""

import json
import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import environment
from support.forked import python
from support.ranks import RankPool
from support.trainers import COMPRESSORS, TOLERANCE, Job, assert_equal

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
job = partial(Job, "support.transformers_ranks")


@pytest.mark.parametrize(
    ("kind", "alike", "clip"), [("SGD", False, 0.0), ("SGD", True, 0.1), ("AdamW", True, 0.1)], ids=str
)
def test_identity_equals_the_trainers_own_ddp(
    trainers: RankPool, tmp_path: Path, kind: str, alike: bool, clip: float
) -> None:
    """Resumed in the second epoch. Clipping and AdamW's v are of each rank's own gradient: there, data are alike."""
    for x, norms, logged in trainers.run(job("equals_plain"), tmp_path, kind, alike, clip, ranks=2):
        assert x < TOLERANCE and min(logged) > 0.1
        assert norms < TOLERANCE or not alike  # each rank logs its own


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_equals_ddp_with_the_hook(trainers: RankPool, tmp_path: Path, compressor: str, kind: str) -> None:
    for expected, run in trainers.run(job("equals_the_hook"), tmp_path, COMPRESSORS[compressor], kind, ranks=2):
        assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps"))


@pytest.mark.parametrize(("kind", "at"), [("SGD", 3), ("AdamW", 4), ("RMSprop", 3)])
def test_resume_from_checkpoint_is_bit_for_bit_on_every_rank(
    trainers: RankPool, tmp_path: Path, kind: str, at: int
) -> None:
    """From the end of an epoch, and from the middle of one."""
    ranks = trainers.run(job("resumes"), tmp_path, kind, at, ranks=2)
    for straight, resumed in ranks:
        assert_equal(resumed, straight)
    assert not ranks[0][0]["e"].equal(ranks[1][0]["e"])


def test_the_best_model_and_a_further_train(trainers: RankPool, tmp_path: Path) -> None:
    for log in trainers.run(job("best_model"), tmp_path, ranks=2):
        ours = [r for r in log if "saef/bytes_per_step" in r]
        assert [r["step"] for r in ours] == [2, 4, 6, 8] and ours[-1]["saef/compression_ratio"] > 3


def test_other_checkpoints(trainers: RankPool, tmp_path: Path) -> None:
    for said in trainers.run(job("other_checkpoints"), tmp_path, ranks=2):
        assert "errors are of step 0" in said["alone"] and "reset_errors()" in said["alone"]
        assert f"{tmp_path}/ours/checkpoint-4 is of step 4 of a run with saef" in said["alone"]
        assert f"resume_from_checkpoint='{tmp_path}/ours/checkpoint-9', the newest that is whole" in said["alone"]


@pytest.mark.parametrize("where", ["ours", "the Trainer's"])
def test_what_fails_in_a_save_leaves_no_checkpoint_that_only_looks_whole(
    trainers: RankPool, tmp_path: Path, where: str
) -> None:
    """In ours, resume_from_checkpoint=True finds the one before; in the Trainer's, it is the Trainer that says so."""
    for said, there, again, resumed, straight in trainers.run(job("fails_in_a_save"), tmp_path, where, ranks=2):
        assert "as a full disk" in said
        assert there == (["checkpoint-3"] if where == "ours" else ["checkpoint-3", "checkpoint-6"])
        assert again == "no error" if where == "ours" else "checkpoint-6/trainer_state.json" in again
        assert_equal(resumed, straight)


def test_a_deepspeed_json_in_which_all_is_auto(tmp_path: Path) -> None:
    """By SAEF in the JSON: the Trainer's values, DDP's steps and its own resume, bit for bit."""
    script = Path(__file__).parents[1] / "support" / "transformers_deepspeed_job.py"
    words = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run([*words, str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["type"] == "DeepSpeedEngine" and found["steps"] == 9 and found["clip"] == 0.5
        assert found["group"] == {"betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.01}
        assert max(found["lrs"]) == 0.01 > found["lrs"][-1] > 0  # LR["AdamW"], and the schedule's end
        assert found["log"][-1]["loss"] < 0.9 * found["log"][0]["loss"]
        assert all(found["as by hand"].values()) and all(found["resumed"].values()), found
        taken = [line for line in found["said"] if "is taken over as SAEFState's max_grad_norm" in line]
        assert len(taken) == 2 * (rank == 0)  # once a Trainer


def test_what_cannot_be_honoured_is_refused(trainers: RankPool, tmp_path: Path) -> None:
    expected = {
        "evaluate first": "evaluate() or predict() ran before train()",
        "predict first": "TrainingArguments(eval_on_start=True)",
        "evaluate on start": "no error",
        "misspelt": "did you mean 'compressor'",
        "metrics": "did you mean 'bytes_per_step'",
        "max_grad_norm": "TrainingArguments(max_grad_norm=...)",
        "search": "hyperparameter_search",
        "another norm": "in the train() before",
    }
    for said in trainers.run(job("refused"), tmp_path, ranks=2):
        assert {*said} == {*expected}
        for case, words in expected.items():
            assert words in said[case], said[case]
