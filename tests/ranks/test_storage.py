"""Checkpoints in a folder: complete or not there, loaded by as many ranks as there are."""

import enum
import logging
import os
import re
import resource
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
import saef.storage
from saef.hooks import saef_hook
from support.checkpoint_runs import SIGN, TOPK, Run
from support.equal import assert_equal
from support.ranks import RankPool
from support.training import batch

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
    torch.save({"saef": {"lr": np.float64(1)}}, file)  # as an older version wrote it
    for said in pool.run(attempt, str(tmp_path), SETTINGS, ranks=2):
        assert f"{file} cannot be read" in said and "If it is damaged" not in said
        assert "objects that weights_only=True does not load" in said and "move its folder away" in said
    file.unlink()
    for said in pool.run(attempt, str(tmp_path), SETTINGS, ranks=2):
        assert "start as many ranks as wrote it" in said
        assert f"{file} is missing, while other ranks' files are there" in said and "its consolidated form" not in said


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


@contextmanager
def logged() -> Iterator[list[str]]:
    """What this rank logs of saef, from warnings on."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("saef").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("saef").removeHandler(handler)


def warned(group: dist.ProcessGroup, folder: str, settings: dict[str, Any]) -> list[str]:
    run = Run(group, settings)
    with logged() as said:
        assert saef.load_checkpoint(folder, run.state) is not None
    return said


def test_the_consolidated_form_is_not_taken_in_silence(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(write_on, str(tmp_path), "", ranks=2) == [""] * 2
    (path,) = tmp_path.iterdir()
    assert pool.run(warned, str(tmp_path), SETTINGS, ranks=2) == [[], []]
    taken = f"loaded the consolidated form of {path}, as it "
    (line,), *others = pool.run(warned, str(tmp_path), SETTINGS, ranks=3)
    assert line.startswith(f"{taken}has no files of 3 ranks (another number wrote it") and others == [[], []]
    (line,), other = pool.run(warned, str(tmp_path), {**SETTINGS, "exchange": "replicated"}, ranks=2)
    assert line.startswith(f"{taken}was written with exchange='sharded', and here it is exchange='replicated'")
    assert other == []

    file = path / "rank-1-of-2.pt"  # not copied, say
    file.unlink()
    for rank, said in enumerate(pool.run(attempt, str(tmp_path), SETTINGS, ranks=2)):
        here = f"{file} is missing, while other ranks' files are there: copy it"
        assert said.startswith(here if rank == 1 else f"rank 1: FileNotFoundError: {here}")
        assert "delete all rank-*-of-2.pt there, to load its consolidated form" in said
    (path / "rank-0-of-2.pt").unlink()
    (line,), other = pool.run(warned, str(tmp_path), SETTINGS, ranks=2)
    assert line.startswith(f"{taken}has no files of 2 ranks") and "or they were deleted" in line and other == []


def save_beside(group: dist.ProcessGroup, folder: str, keep: int) -> list[str]:
    run = Run(group, SETTINGS)
    with logged() as said:
        path = saef.save_checkpoint(folder, run.state, keep=keep, consolidate=False)
    assert (path / "complete").exists()
    return said


def test_folders_of_the_users_stay(pool: RankPool, tmp_path: Path) -> None:
    stay = ["3-step-baseline", "000001-step-3-best", "00001-step-3", "runs-step-7", "000009-step-x"]
    for name in stay:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text("precious")
    for _ in range(2):
        assert pool.run(save_beside, str(tmp_path), 1, ranks=1) == [[]]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stay, "000002-step-0"])
    assert all((tmp_path / name / "results.csv").exists() for name in stay)


def test_what_is_newer_is_not_deleted(tmp_path: Path) -> None:
    """Another job of the same folder may be writing it."""
    for name in ("000001-step-1", "000002-step-2", "000004-step-4"):
        (tmp_path / name).mkdir()
    saef.storage._end(tmp_path, tmp_path / "000002-step-2", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002-step-2", "000004-step-4"]


def test_what_cannot_be_completed_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "000001-step-1"
    path.mkdir()
    broken = mock.patch.object(saef.storage, "_sync", side_effect=[None, None, OSError(5, "Input/output error")])
    with broken, pytest.raises(OSError, match="Input/output error"):
        saef.storage._end(tmp_path, path, keep=2)
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_seen_is_neither_kept_nor_fatal(tmp_path: Path) -> None:
    """An old checkpoint in a folder that only another user may enter."""
    for name in ("000001-step-1", "000002-step-2", "000003-step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete").touch()
    stat = Path.stat

    def closed(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "000002-step-2":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    with mock.patch.object(Path, "stat", closed), logged() as said:
        saef.storage._end(tmp_path, tmp_path / "000003-step-3", keep=2)
    assert len([*tmp_path.iterdir()]) == 3 and len(said) == 1 and "Permission denied" in said[0]


def save_where_nothing_can_be_deleted(group: dist.ProcessGroup, folder: str) -> list[str]:
    with mock.patch.object(saef.storage.shutil, "rmtree", side_effect=OSError(39, "Directory not empty")):
        return save_beside(group, folder, 1)


def test_an_old_checkpoint_that_cannot_be_deleted_fails_no_save(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert pool.run(save_beside, str(folder), 1, ranks=2) == [[], []]
    (line,), other = pool.run(save_where_nothing_can_be_deleted, str(folder), ranks=2)
    assert f"cannot delete the old checkpoint {folder / '000001-step-0'}" in line and "Directory not empty" in line
    assert other == [] and (folder / "000002-step-0" / "complete").exists()

    far = tmp_path / "another disk"
    (folder / "000002-step-0").rename(far)
    (folder / "000002-step-0").symlink_to(far)
    assert pool.run(newest_steps, str(folder), ranks=2) == [0, 0]
    assert pool.run(save_beside, str(folder), 1, ranks=2) == [[], []]
    assert [p.name for p in folder.iterdir()] == ["000003-step-0"]
    assert (far / "complete").exists() and (far / "rank-1-of-2.pt").exists()  # the link alone is gone


def without_a_list(group: dist.ProcessGroup, folder: str, at: int) -> list[str]:
    """Rank 0 may list the folder `at` times; what this rank is told when it saves, and when it loads."""
    run, scan, said = Run(group, SETTINGS), os.scandir, []
    for action in (saef.save_checkpoint, saef.load_checkpoint):
        left = at if action is saef.save_checkpoint else 0

        def closed(path: Any = ".") -> Any:
            nonlocal left
            if path == Path(folder):
                left -= 1
                if left < 0:
                    raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        try:
            with mock.patch.object(os, "scandir", closed):
                action(folder, run.state)
            said.append("nothing was raised")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize("at", [0, 1])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(pool: RankPool, tmp_path: Path, at: int) -> None:
    assert pool.run(write_on, str(tmp_path), "", ranks=2) == [""] * 2
    denied = re.escape(f"PermissionError: [Errno 13] Permission denied: '{tmp_path}'")
    for rank, said in enumerate(pool.run(without_a_list, str(tmp_path), at, ranks=2)):
        assert all(re.match(f"RuntimeError: rank 0: {denied}" if rank else denied, line) for line in said), said
    assert [p.parent.name for p in tmp_path.glob("*/complete")] == ["000001-step-2"]  # none of the save that raised


def test_a_file_is_no_folder(pool: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for said in pool.run(attempt, str(file), SETTINGS, ranks=2):
        assert f"Not a directory: '{file}'" in said


class Mode(enum.Enum):
    A = 1


class Own(torch.optim.Optimizer):
    """Steps by itself, and keeps something in its groups' "mode" and in its state."""

    def __init__(self, parameters: Any, mode: Any, entry: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "mode": mode})
        self.entry = entry

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["entry"] = self.entry
                p.sub_(p.grad, alpha=float(group["lr"]))


def keep_in_optimizer(group: dist.ProcessGroup, folder: str, mode: Any, entry: Any) -> tuple[str, Any]:
    """What this rank is told when its optimizer has these; and what a new one has, loaded."""

    def made() -> tuple[DDP, Own, saef.SAEFState]:
        torch.manual_seed(0)
        model = DDP(torch.nn.Linear(6, 1), process_group=group)
        optimizer = Own(model.parameters(), mode, entry)
        state = saef.SAEFState(model, optimizer, compressor=SIGN)
        model.register_comm_hook(state, saef_hook)
        return model, optimizer, state

    model, optimizer, state = made()
    optimizer.param_groups[0]["lr"] = 0.1 * np.cos(np.float64(1))
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    try:
        saef.save_checkpoint(folder, state)
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", None
    _, optimizer, state = made()
    assert saef.load_checkpoint(folder, state) == {}
    return "", next(iter(optimizer.state.values()))["entry"]


def test_an_optimizers_numpy_numbers_and_deques_are_loaded_again(pool: RankPool, tmp_path: Path) -> None:
    entry = {"scale": np.float32(0.5), "last": deque([np.int64(1), torch.ones(2)], maxlen=3)}
    for said, found in pool.run(keep_in_optimizer, str(tmp_path), np.bool_(True), entry, ranks=2):
        assert said == ""
        assert_equal(found, {"scale": 0.5, "last": [1, torch.ones(2)]})


def test_what_an_optimizer_keeps_and_no_file_gives_back_is_named_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    for mode, entry, what in (
        (Mode.A, 1, r"\['groups'\]\[0\]\['mode'\] is a Mode"),
        (len, 1, r"\['groups'\]\[0\]\['mode'\] is a builtin"),
        (0, {1: np.zeros(2)}, r"\['state'\]\['weight'\]\['entry'\]\[1\] is a ndarray"),
    ):
        for rank, (said, _) in enumerate(pool.run(keep_in_optimizer, str(tmp_path), mode, entry, ranks=2)):
            here = rf"TypeError: the state\['rank_{rank}'\]\['rounds'\]\['optimizer'\]{what}"
            assert re.match(here, said) and "optimizer's state and groups" in said, said
    assert [*tmp_path.iterdir()] == []


def save_within_a_step(group: dist.ProcessGroup, folder: str) -> tuple[str, str]:
    """Rank 1 has spoilt its x_half; what this rank is told, and the name of the checkpoint that it saves then."""
    run = Run(group, SETTINGS)
    run.train(range(2))
    run.model(batch(run.rank, 2, run.dtype)[0])
    if run.rank == 1:
        with torch.no_grad():
            run.model.module.a.weight.add_(1)
    try:
        saef.save_checkpoint(folder, run.state)
    except RuntimeError as error:
        return str(error), saef.save_checkpoint(folder, run.state).name
    return "", ""


def test_a_rank_whose_state_cannot_be_saved_tells_the_others_why(pool: RankPool, tmp_path: Path) -> None:
    for rank, (said, then) in enumerate(pool.run(save_within_a_step, str(tmp_path), ranks=2)):
        here = "parameters ['a.weight'] were changed while they were x_half"
        assert said.startswith(here if rank == 1 else f"rank 1: RuntimeError: {here}"), said
        assert then == "000001-step-2"


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
    with torch.serialization.safe_globals([OwnTensor]):  # then it is loaded
        assert check({"w": torch.ones(2).as_subclass(OwnTensor)}, "extra") == ""
