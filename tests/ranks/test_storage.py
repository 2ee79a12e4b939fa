"""Checkpoints in a folder: complete or not there, loaded by as many ranks as there are."""

import os
import re
import resource
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import saef
import saef.storage
from support.checkpoint_runs import SIGN, TOPK, Run
from support.equal import assert_equal
from support.ranks import RankPool

pytestmark = pytest.mark.slow

SETTINGS = {"compressor": TOPK, "exchange": "sharded", "averaging": saef.Rotating(5)}


def train_and_save(group: dist.ProcessGroup, folder: str, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    run = Run(group, SETTINGS)
    for stop in (3, 6, 9):
        run.train(range(run.state.steps, stop))
        path = saef.save_checkpoint(folder, run.state, {**run.others(), "note": f"rank {run.rank}"}, **options)
        assert (path / "complete").exists() and path.name.endswith(f"-step-{stop}")
    end = run.everything()
    del end["metrics"]
    return end, run.state.x_tilde()


def load(group: dist.ProcessGroup, folder: str, settings: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor, str]:
    run = Run(group, settings)
    extra = saef.load_checkpoint(folder, run.state)
    assert extra is not None
    run.load_others(extra)
    end, x_tilde = run.everything(), run.state.x_tilde()
    del end["metrics"]
    run.train(range(9, 12))
    return end, x_tilde, extra["note"]


def test_the_newest_is_loaded_bit_for_bit_by_the_same_ranks_and_consolidated_by_others(
    pool: RankPool, tmp_path: Path
) -> None:
    saved = pool.run(train_and_save, str(tmp_path), ranks=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002-step-6", "000003-step-9"]  # keep=2
    for rank, (found, _, note) in enumerate(pool.run(load, str(tmp_path), SETTINGS, ranks=3)):
        assert_equal(found, saved[rank][0])
        assert note == f"rank {rank}"
    for ranks, exchange in ((3, "replicated"), (2, "sharded"), (4, "sharded"), (1, "replicated")):
        for _, x_tilde, note in pool.run(load, str(tmp_path), {**SETTINGS, "exchange": exchange}, ranks=ranks):
            # means over 3 ranks, two subtractions: below 10 roundings, as test_checkpoint.py derives
            torch.testing.assert_close(x_tilde, saved[0][1], rtol=0, atol=1e-6 * float(saved[0][1].abs().max()))
            assert note == "rank 0"


def write_on(group: dist.ProcessGroup, folder: str, fail: str) -> str:
    """Rank 1 fails to write or to load; what this rank is told."""
    run = Run(group, SETTINGS)
    run.train(range(2))
    write = saef.storage._write
    if run.rank == 1 and fail == "disk":

        def full(path: Path, value: Any) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device", str(path))

        saef.storage._write = full
    try:
        saef.save_checkpoint(folder, run.state, {"f": len} if run.rank == 1 and fail == "extra" else {"f": 1})
    except (OSError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        saef.storage._write = write
    return ""


def short_of_room(group: dist.ProcessGroup, folder: str, room: int) -> str:
    """As on a full disk: no file of rank 1 may be longer; what this rank is told."""
    run = Run(group, SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        saef.save_checkpoint(folder, run.state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_is_an_error_that_names_the_file(pool: RankPool, tmp_path: Path, room: int) -> None:
    here = r"OSError: \[Errno 27\] File too large: '.*/000001-step-0/rank-1-of-3.pt'"
    for rank, said in enumerate(pool.run(short_of_room, str(tmp_path), room, ranks=3)):
        assert re.match(here if rank == 1 else f"RuntimeError: rank 1: {here}", said), said
    assert [*tmp_path.iterdir()] == []


def newest_steps(group: dist.ProcessGroup, folder: str) -> int:
    run = Run(group, SETTINGS)
    return -1 if saef.load_checkpoint(folder, run.state) is None else run.state.steps


def test_a_checkpoint_that_one_rank_could_not_write_does_not_count(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    assert pool.run(newest_steps, folder) == [-1] * 4
    for fail, here, there in (
        ("disk", "OSError: .*No space left", "RuntimeError: rank 1: OSError: .*No space left"),
        ("extra", r"TypeError: extra\['f'\] is a builtin", r"RuntimeError: rank 1: TypeError: extra\['f'\] is a"),
    ):
        for rank, said in enumerate(pool.run(write_on, folder, fail)):
            assert re.match(here if rank == 1 else there, said), said
        assert pool.run(newest_steps, folder) == [-1] * 4
    assert pool.run(write_on, folder, "") == [""] * 4
    assert pool.run(newest_steps, folder) == [2] * 4
    assert pool.run(write_on, folder, "disk")[0].startswith("RuntimeError")
    assert pool.run(newest_steps, folder) == [2] * 4  # the one before it is still there
    assert pool.run(write_on, folder, "") == [""] * 4
    left = [p for p in (tmp_path / "new").iterdir() if not (p / "complete").exists()]
    assert left == []  # what was half written is cleared away by the next


def attempt(group: dist.ProcessGroup, folder: str, settings: dict[str, Any]) -> str:
    run = Run(group, settings)
    before = run.everything()
    try:
        saef.load_checkpoint(folder, run.state)
    except Exception as error:
        assert_equal(run.everything()["e"], before["e"])
        return str(error)
    return "nothing was raised"


def test_what_cannot_be_loaded_is_refused_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    pool.run(train_without_consolidated, str(tmp_path), ranks=2)
    newest = tmp_path / "000003-step-9"
    for said in pool.run(attempt, str(tmp_path), SETTINGS, ranks=4):
        assert "start as many ranks as wrote it" in said
    for said in pool.run(attempt, str(tmp_path), {**SETTINGS, "exchange": "replicated"}, ranks=2):
        assert "with the same exchange" in said
    for said in pool.run(attempt, str(tmp_path), {**SETTINGS, "compressor": SIGN}, ranks=2):
        assert "compressor is TopK" in said
    file = newest / "rank-1-of-2.pt"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", os.urandom(1000)):
        file.write_bytes(damaged)
        said = pool.run(attempt, str(tmp_path), SETTINGS, ranks=2)
        assert f"rank 1: OSError: {file} cannot be read" in said[0] and "move its folder away" in said[0]
        assert said[1].startswith(f"{file} cannot be read")
    file.unlink()
    for said in pool.run(attempt, str(tmp_path), SETTINGS, ranks=2):
        assert "start as many ranks as wrote it" in said


def train_without_consolidated(group: dist.ProcessGroup, folder: str) -> None:
    train_and_save(group, folder, consolidate=False)


def test_a_checkpoint_must_be_kept(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        saef.save_checkpoint(tmp_path, None, keep=0)  # type: ignore[arg-type]
    for keep in (1.5, float("nan"), True, "2", None):
        with pytest.raises(TypeError, match="keep must be an integer, got"):
            saef.save_checkpoint(tmp_path, None, keep=keep)  # type: ignore[arg-type]


def test_a_checkpoint_is_loaded_by_the_folder_that_it_lies_in(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(write_on, str(tmp_path), "") == [""] * 4
    (path,) = tmp_path.glob("*-step-*")
    for said in pool.run(attempt, str(path), SETTINGS, ranks=4):
        assert "is a single checkpoint" in said and f"{tmp_path}, of which" in said


class OwnTensor(torch.Tensor):
    pass


def test_what_would_not_load_again_is_named() -> None:
    check = saef.storage._check_plain
    marked: Any = torch.ones(2)
    marked.owner = lambda: 1
    parts = {"p": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Buffer(torch.ones(2)), "c": Counter("aab")}
    assert check(parts, "extra") == ""
    assert check({"a": [1, 2.0, None, True, torch.ones(2), ("x", {1: b"2"})], "b": torch.float32}, "extra") == ""
    for value, where in (
        ({"a": [1, {"b": np.float64(1)}]}, r"extra\['a'\]\[1\]\['b'\] is a float64"),
        ({"a": lambda: 1}, r"extra\['a'\] is a function"),
        ({("k", np.int64(1)): 1}, r"a key of extra\[1\] is a int64"),
        ({"losses": defaultdict(list)}, r"extra\['losses'\] is a defaultdict"),
        ([defaultdict(int, a=1)], r"extra\[0\] is a defaultdict"),
        ({"w": marked}, r"extra\['w'\] is a Tensor"),
        ({"w": torch.ones(2).as_subclass(OwnTensor)}, r"extra\['w'\] is a OwnTensor"),
    ):
        with pytest.raises(TypeError, match=where):
            check(value, "extra")
