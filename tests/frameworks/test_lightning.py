"""Lightning's Trainer with saef, on two ranks: equal to its own DDP, and to DDP with saef_hook."""

import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import saef
from saef.hooks import saef_hook
from support import environment
from support.forked import python
from support.ranks import RankPool
from support.trainers import COMPRESSORS, STEPS, TOLERANCE, Job, assert_equal

pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning")
job = partial(Job, "support.lightning_ranks")


@pytest.mark.parametrize(
    ("kind", "alike", "clip"), [("SGD", False, None), ("SGD", True, 0.1), ("AdamW", True, 0.1)], ids=str
)
def test_identity_equals_lightnings_own_ddp(
    trainers: RankPool, tmp_path: Path, kind: str, alike: bool, clip: float | None
) -> None:
    """Resumed after the first epoch. Clipping and AdamW's v are of each rank's own gradient: there, data are alike."""
    words = {} if clip is None else {"gradient_clip_val": clip}
    for difference in trainers.run(job("equals_plain"), tmp_path, kind, alike, words, ranks=2):
        assert difference < TOLERANCE


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_equals_ddp_with_the_hook(trainers: RankPool, compressor: str, kind: str) -> None:
    for expected, runs in trainers.run(job("equals_the_hook"), COMPRESSORS[compressor], kind, ranks=2):
        for run in runs:
            assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps"))


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("in_the_middle", [False, True])
def test_a_checkpoint_resumes_bit_for_bit_on_every_rank(
    trainers: RankPool, tmp_path: Path, kind: str, in_the_middle: bool
) -> None:
    ranks = trainers.run(job("resumes"), tmp_path, kind, in_the_middle, ranks=2)
    for straight, resumed in ranks:
        assert_equal(resumed, straight)
    assert not ranks[0][0]["e"].equal(ranks[1][0]["e"])


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_mixed_precision_equals_ddps(trainers: RankPool, kind: str) -> None:
    for runs in trainers.run(job("precision"), kind, ranks=2):
        for expected, run in runs:
            assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps", "skipped"))
        assert runs[0][1]["skipped"] == 0 < runs[1][1]["skipped"]


def test_what_is_kept_beside_lightnings_files(trainers: RankPool, tmp_path: Path) -> None:
    for said in trainers.run(job("other_checkpoints"), tmp_path, ranks=2):
        assert "errors are of step 0" in said["alone"] and "reset_errors()" in said["alone"]
        assert "no path of a file system" in said["remote"]


def test_metrics_are_logged_and_a_trainer_fits_again(trainers: RankPool, tmp_path: Path) -> None:
    for metrics in trainers.run(job("logs"), tmp_path, ranks=2):
        assert metrics["saef/compression_ratio"] > 5 and metrics["saef/steps_skipped"] == 0
    (written,) = tmp_path.rglob("metrics.csv")
    assert "saef/bytes_per_step" in written.read_text().splitlines()[0]


def test_the_weights_are_x_where_gradients_are_zeroed_and_after_a_failure(trainers: RankPool) -> None:
    for looked, owed, same in trainers.run(job("looks_and_fails"), ranks=2):
        assert looked > 0 and owed and same


def test_what_cannot_be_honoured_is_refused(trainers: RankPool) -> None:
    expected = {
        "misspelt": "did you mean 'compressor'",
        "bad value": "step_ahead must be in [0, 1]",
        "metrics": "did you mean 'bytes_per_step'",
        "misspelt strategy": "did you mean 'find_unused_parameters'",
        "two optimizers": "returned 2 optimizers",
        "two steps": "within the same forward of the wrapped model",
        "own clipping": "give SAEFState max_grad_norm",
        "comm hook": "Leave them out",
        "by value": 'use gradient_clip_algorithm="norm"',
        "two norms": "both clip: give one",
        "twice": "has a SAEFCallback of its own",
        "other strategy": 'needs Trainer(strategy="ddp")',
    }
    for said in trainers.run(job("refused"), ranks=2):
        assert {*said} == {*expected}
        for case, words in expected.items():
            assert words in said[case], said[case]


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
def test_overrides_of_clipping_see_the_trainers_number(trainers: RankPool, kind: str) -> None:
    """To the state's own norm they may clip: it does. With local steps gradients are the rank's own to change."""
    for expected, runs, seen, said in trainers.run(job("clips_by_itself"), kind, ranks=2):
        for run in runs:
            assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps"))
        assert seen == {0.1}
        assert "Please use only one of them" in said["another norm than the Trainer's"]  # Lightning's own
        for case in ("another norm", "by value"):
            assert said[case] == "no error" if kind == "RMSprop" else "give SAEFState max_grad_norm" in said[case]


@pytest.mark.parametrize("by_module", [True, False])
def test_a_trainer_without_saef_goes_on_with_what_was_let_go_of(trainers: RankPool, by_module: bool) -> None:
    for said, found, expected in trainers.run(job("goes_on_without"), by_module, ranks=2):
        assert "another optimizer" in said
        assert torch.equal(found, expected)


def test_fabric(trainers: RankPool, tmp_path: Path) -> None:
    ranks = trainers.run(job("with_fabric"), tmp_path, ranks=2)
    for expected, run, said in ranks:
        assert_equal(run, expected, ("x", "e", "m", "e_server", "own", "steps"))
        assert "needs a model with one DistributedDataParallel inside" in said["no ddp"] and "Net" in said["no ddp"]
        assert "comm_hook" in said["twice"]
    assert ranks[0][2]["in fabric.save"] == "no error"
    refusal = ranks[1][2]["in fabric.save"]
    assert "each rank loads its own" in refusal and "use saef.save_checkpoint and load_checkpoint" in refusal


def test_ddpstrategys_own_comm_state_is_a_later(trainers: RankPool) -> None:
    for callback, own, said in trainers.run(job("comm_state"), saef.TopK(0.2), ranks=2):
        assert_equal(own, callback, ("x", "e", "m", "e_server", "steps"))
        assert len(said) == 1 and "Lightning registers DDPStrategy(ddp_comm_hook=...) on GPUs alone" in said[0]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_lr_find_sees_what_it_sees_without_saef(trainers: RankPool, tmp_path: Path, kind: str) -> None:
    """The same losses at the same learning rates, to rounding. A fit after it is the one without it, bit for bit."""
    for (plain, ours, compressed), after, straight in trainers.run(job("finds_lr"), tmp_path, kind, ranks=2):
        assert plain[1] == ours[1] and len(plain[0]) == len(ours[0]) == 9
        assert max(abs(a - b) for a, b in zip(plain[0], ours[0], strict=True)) < TOLERANCE
        assert max(abs(a - b) for a, b in zip(plain[0], compressed[0], strict=True)) > 1e-3  # it is saef that trains
        assert_equal(after, straight, ("x", "e", "m", "e_server", "steps"))


def test_torchrun_restarts_a_killed_rank_and_the_trainer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Killed in step 5, in the middle of the second epoch; the last checkpoint is of step 4, in its middle too."""
    script = Path(__file__).parents[1] / "support" / "lightning_job.py"
    env = environment(GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    words = [python(), "-m", "torch.distributed.run", "--monitor-interval", "0.1", "--standalone"]
    words += ["--nproc_per_node", "2", "--max-restarts", "1", str(script)]
    ends = []
    for name, dies, lives in (("quiet", [], [0]), ("killed", ["1:1:3"], [0, 4])):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            [*words, str(folder), *dies], cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        assert [(folder / f"began-{k}.txt").read_text().split() for k in range(2)] == [[*map(str, lives)]] * 2
        ends.append([torch.load(folder / f"end-{k}.pt", weights_only=True) for k in range(2)])
    for quiet, killed in zip(*ends, strict=True):
        assert killed["steps"] == STEPS
        assert_equal(killed, quiet)


def test_a_state_or_a_hook_given_to_ddpstrategy_names_the_callback() -> None:
    """Before fit() there is no process group, and on a GPU Lightning registers a hook without a state."""
    net = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"saef\.integrations\.lightning"):
        saef.SAEFState(net, torch.optim.SGD(net.parameters(), lr=0.1))
    nothing: Any = None
    with pytest.raises(TypeError, match="SAEFCallback"):
        saef_hook(nothing, mock.Mock(spec=torch.distributed.GradBucket))
