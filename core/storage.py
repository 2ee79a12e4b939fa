"""Checkpoints in a folder: complete or not there, whatever dies while they are written.

    FOLDER/000012-step-480/         the 12th checkpoint, taken at step 480
        rank-0-of-4.pt ...          {"saef": SAEFState.state_dict(), "extra": ...} of each rank
        consolidated.pt             {"saef": SAEFState.consolidated_state_dict(), "extra": rank 0's}
        complete                    written last; without it the checkpoint does not count

The folder must be the same for all ranks (a shared file system, or one machine). Files are read with
weights_only=True: what is in them cannot run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import is_joint
from .comm.agreement import gather_values
from .protocols.averaging import check_integer
from .state import SAEFState
from .step.weights import held

logger = logging.getLogger("saef")

COMPLETE = "complete"
NAME = re.compile(r"\d{6,}-step-\d+")  # of a checkpoint's folder: others are the user's own


def save_checkpoint(
    folder: str | os.PathLike[str],
    state: SAEFState,
    extra: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
    consolidate: bool = True,
) -> Path:
    """Write a checkpoint of all ranks. Collective; when it returns, the checkpoint is complete and on disk.

    Args:
        folder: made if it is missing; the same for all ranks.
        state: its weights, errors, momenta and counters are saved, so the model's parameters are.
        extra: tensors, numbers, strings and containers of them that are to come back: state_dict() of the
            model (for its buffers), optimizer, scheduler and scaler, the epoch. Each rank's own. DTensors come back as
            they are, or whole where the consolidated form is loaded.
        keep: complete checkpoints to keep; older ones are deleted, where that is possible, else a warning is logged.
        consolidate: also write the form that any number of ranks can load (two dense all-reduces).

    Returns:
        The checkpoint's own folder.

    Raises:
        ValueError: if keep < 1.
        TypeError: if keep is no int, or if `extra`, or the state of an optimizer that steps by itself, has something
            that weights_only=True would not load, naming it.
        OSError: if this rank could not write; earlier checkpoints are still there.
        RuntimeError: if another rank failed in one of these ways.
    """
    check_integer("keep", keep, 1, "")
    transport, root = state.engine.node.everyone, Path(folder)
    rank, size = transport.rank, transport.size
    extra = dict(extra or {})
    mine: dict[str, Any] = {"extra": extra}
    transport.meet("saef.save_checkpoint()")

    def gather() -> str:
        _check_plain(extra, "extra")
        mine["saef"] = _mapped(state.state_dict(), held)
        return _check_plain(mine["saef"], "the state")

    _together(state, gather)
    whole = None
    if consolidate:  # collective by itself, of values that have been checked in the ranks' own
        whole = _mapped({"saef": state.consolidated_state_dict(), "extra": extra}, partial(_whole, keep=rank == 0))

    path = root / _together(state, lambda: _begin(root, state.steps), of_rank_0=True)[0]

    def write() -> str:
        _write(path / f"rank-{rank}-of-{size}.pt", mine)
        if rank == 0 and whole is not None:
            _write(path / "consolidated.pt", whole)
        return ""

    try:
        _together(state, write)
    except Exception:
        if rank == 0:  # all have tried: the disk may be full of it
            shutil.rmtree(path, ignore_errors=True)
        raise
    _together(state, lambda: _end(root, path, keep), of_rank_0=True)
    return path


def _begin(root: Path, steps: int) -> str:
    """Make the folder of a new checkpoint; its name."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1 + max((_number(p) for p in _checkpoints(root)), default=0)
    path = root / f"{number:06d}-step-{steps}"
    path.mkdir()
    return path.name


def _end(root: Path, path: Path, keep: int) -> str:
    """Let a checkpoint count, and delete what is older than the last `keep`."""
    try:
        before = [p for p in _checkpoints(root) if _number(p) < _number(path)]
        _sync(path)
        (path / COMPLETE).touch()
        _sync(path)
        _sync(root)
    except OSError:
        with suppress(OSError):
            _delete(path)
        raise
    kept = 1
    for old in reversed(before):
        try:
            if kept < keep and _exists(old / COMPLETE):
                kept += 1
            else:
                _delete(old)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s; the new one, %s, counts: %s", old, path.name, error)
    return ""


def _delete(path: Path) -> None:
    """Of a checkpoint that was moved elsewhere, and has a link in its place, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


def load_checkpoint(folder: str | os.PathLike[str], state: SAEFState) -> dict[str, Any] | None:
    """Load the newest complete checkpoint, if there is one. Collective.

    The ranks' own states where as many ranks with the same exchange strategy wrote it: training goes on bit for
    bit. Else the consolidated form: x~ and the mean momentum are kept; a warning on rank 0 says so, and why.

    Returns:
        What was given as `extra` (by this rank; by rank 0 if consolidated), or None if there is no checkpoint.

    Raises:
        ValueError: if it does not fit the state, or another number of ranks wrote it with consolidate=False; or if
            `folder` is a checkpoint itself.
        OSError: if this rank cannot read it, or its file alone is missing, naming the file; if `folder` is none.
        RuntimeError: if another rank failed in one of these ways.
    """
    root, transport = Path(folder), state.engine.node.everyone
    transport.meet("saef.load_checkpoint()")
    (name,) = _together(state, lambda: _newest(root), of_rank_0=True)
    if not name:
        return None
    path = root / name
    own, whole = path / f"rank-{transport.rank}-of-{transport.size}.pt", path / "consolidated.pt"
    why = next(filter(None, _together(state, lambda: _misfit(state, own, whole))), "")
    extra: dict[str, Any] = {}

    def load() -> str:
        if why and not _exists(whole):
            raise ValueError(
                f"{path} {why}, and has no consolidated form: start as many ranks as wrote it, with the same exchange"
            )
        saved = _read(whole if why else own, map_location=state.weights.device)
        state.load_state_dict(saved["saef"])
        extra.update(saved["extra"])
        return ""

    _together(state, load)
    if why and transport.rank == 0:
        logger.warning("loaded the consolidated form of %s, as it %s: errors and momenta are means", path, why)
    return extra


def _newest(root: Path) -> str:
    """The name of the newest complete checkpoint, or nothing."""
    found = _checkpoints(root)
    if _exists(root / COMPLETE) or (not found and _has(root, "rank-*-of-*.pt")):
        raise ValueError(
            f"{root} is a single checkpoint, as save_checkpoint() returns it: give the folder that it lies in, "
            f"{root.parent}, of which the newest complete one is loaded"
        )
    return next((p.name for p in reversed(found) if _exists(p / COMPLETE)), "")


def _misfit(state: SAEFState, own: Path, whole: Path) -> str:
    """Why this rank's own state is not to be loaded, if it is not. own, whole: files of one checkpoint."""
    path, size = own.parent, state.engine.node.everyone.size
    if not _exists(path / COMPLETE):
        raise FileNotFoundError(f"{path} is not here: the folder must be the same for all ranks")
    if not _exists(own):
        if _has(path, files := f"rank-*-of-{size}.pt"):
            instead = f"delete all {files} there, to load its consolidated form, or " if _exists(whole) else ""
            raise FileNotFoundError(
                f"{own} is missing, while other ranks' files are there: copy it, too (to go on bit for bit start "
                f"as many ranks as wrote it, with the files of all), or {instead}move {path} away, to load the "
                "checkpoint before it"
            )
        return f"has no files of {size} ranks (another number wrote it, or they were deleted)"
    saved = _read(own, mmap=True)["saef"]
    here = _way(state.strategy, state.engine.node.size, state.weights.joint)
    there = _way(saved.get("strategy"), saved.get("ranks_a_node", 1), is_joint(saved))
    if there != here:
        return f"was written with {there}, and here it is {here}"
    names, ours = [*saved.get("parameters", ())], state.weights.names
    moved = names != ours and {*names} == {*ours} and state.e_server.numel()
    return "has its server errors in another order of the parameters" if moved else ""


def _way(strategy: object, ranks_a_node: int, joint: bool) -> str:
    """What a rank's own state is for, besides the number of ranks. joint: whether a node has DTensors, say FSDP2's."""
    of = "FSDP2's shards" if joint else "a part of each parameter"
    return f"exchange={strategy!r}" + (f" among nodes of {ranks_a_node} ranks, with {of}" if ranks_a_node > 1 else "")


def _together(state: SAEFState, work: Callable[[], str], of_rank_0: bool = False) -> list[str]:
    """The results of all ranks, or of rank 0 alone. If any rank fails, all do, once all have tried."""
    transport, device = state.engine.node.everyone, state.weights.device
    rank = transport.rank
    result, failure = "", None
    if rank == 0 or not of_rank_0:
        try:
            result = work()
        except Exception as error:
            failure = error
    mine = [result, "" if failure is None else f"rank {rank}: {type(failure).__name__}: {failure}"]
    ranks = transport.call(lambda: gather_values(mine, transport, device, "checkpoint"))
    if failure is not None:
        raise failure
    if problems := [problem for _, problem in ranks if problem]:
        raise RuntimeError("; ".join(problems))
    return [result for result, _ in ranks][: 1 if of_rank_0 else None]


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(part, change) for part in value)
    return change(value) if isinstance(value, torch.Tensor) else value


def _whole(tensor: Any, keep: bool) -> torch.Tensor:
    """Of a DTensor what all ranks of a node have of it, on the CPU; of another itself. Collective within the node.

    Args:
        keep: whether this rank needs it; else it gets an empty one, one by one.
    """
    if held(tensor) is tensor:
        found: torch.Tensor = tensor
        return found
    found = tensor.full_tensor()
    return found.cpu() if keep else found.new_empty(0)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _check_plain(value: object, where: str) -> str:
    """Raise TypeError for what torch.load(weights_only=True) would refuse, when it is too late to save it otherwise."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, part in value.items():  # type: ignore[attr-defined]
            _check_plain(key, f"a key of {where}")
            _check_plain(part, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for i, part in enumerate(value):  # type: ignore[arg-type]
            _check_plain(part, f"{where}[{i}]")
    elif not _is_plain_tensor(value) and type(value) not in PLAIN:
        raise TypeError(
            f"{where} is a {type(value).__name__}, which could not be loaded again with weights_only=True: save "
            "tensors, numbers, strings, and dicts and lists of them (float(x) for a numpy number), and keep nothing "
            "else in an optimizer's state and groups"
        )
    return ""


def _is_plain_tensor(value: object) -> bool:
    """Whether it is loaded again: torch's own kinds, without attributes of the user's; and those made known to it."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return {*vars(value)} <= {"persistent", "_is_buffer"}  # of a torch.nn.Buffer
    if not isinstance(value, torch.Tensor):
        return False
    return held(value) is not value or type(value) in torch.serialization.get_safe_globals()


def _checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, the oldest first. Raises OSError if `root` cannot be listed."""
    try:
        with os.scandir(root) as entries:
            found = [root / e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=_number)


def _has(folder: Path, pattern: str) -> bool:
    """Whether it has such a file. Raises OSError if it cannot be listed."""
    return _exists(folder) and any(fnmatch(name, pattern) for name in os.listdir(folder))


def _exists(path: Path) -> bool:
    """Raises OSError if that cannot be seen, as `Path.exists` does not in all versions."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _write(path: Path, value: dict[str, Any]) -> None:
    """Raises OSError, naming the file."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's own, as it closes a file that it could not write to the end of
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _read(path: Path, **options: Any) -> dict[str, Any]:
    """Raises OSError, naming the file."""
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True, **options)
        return found
    except Exception as error:  # of many kinds, and few of them say which file
        what = "If it is damaged"
        if "unsupported global" in str(error).lower():
            what = (
                "It has objects that weights_only=True does not load, as an older version of saef or another program "
                "writes them. If you trust it, name them to torch.serialization.add_safe_globals(); else"
            )
        raise OSError(
            f"{path} cannot be read ({type(error).__name__}: {error}). {what}, move its folder away: then the "
            "checkpoint before it is loaded"
        ) from error


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
