"""How the loops are compiled: once for a machine, by one process, and not silently.

A *kernel* is called from Python and kept in numba's cache; the *helpers* that it calls become part of it. numba looks
only at a kernel's own file to see whether the cached code is stale, so a hash of all sources is part of its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

logger = logging.getLogger("saef")

_FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
helper = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_FLAGS)
Wanted = tuple[Any, tuple[Any, ...]]


def _sources() -> str:
    """A hash of all that a kernel is made from: this package, the tables' columns and the rules'."""
    here = Path(__file__).parent
    wire = here.parent.parent
    columns = [here.parent / "table.py", wire / "compressors.py", *(wire.parent / "rules").glob("*.py")]
    files = [*here.glob("*.py"), *columns]
    text = b"".join(file.read_bytes() for file in sorted(files) if file.exists())
    return hashlib.sha256(text).hexdigest()[:12]


SOURCES = _sources()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` when it is first called, or `prepare`d, and keep the result in numba's cache, if any."""
    function.__qualname__ += f"_{SOURCES}"
    compiled = njit(**_FLAGS)(function)
    if hasattr(compiled, "enable_caching"):  # not with NUMBA_DISABLE_JIT
        with suppress(RuntimeError):  # numba finds no place for a cache: `prepare` says so
            compiled.enable_caching()
    return compiled


def prepare(wanted: Sequence[Wanted], what: str) -> bool:
    """Have kernels ready: loaded from the cache, or compiled, by one process while the others wait for it.

    Args:
        wanted: kernels, each with the types of its arguments.
        what: what they are for, to be said if they must be compiled.

    Returns:
        Whether something was compiled.
    """
    if not hasattr(wanted[0][0], "compile"):  # NUMBA_DISABLE_JIT leaves plain functions
        return False
    with _in_process:
        if _load(wanted):
            return False
        with _lock(wanted[0][0].stats.cache_path):
            if _load(wanted):  # another process has compiled meanwhile
                return False
            _compile(wanted, what)
    return True


_in_process = threading.Lock()


def _compile(wanted: Sequence[Wanted], what: str) -> None:
    place = wanted[0][0].stats.cache_path
    if place is None:
        logger.warning(
            "compiling the CPU kernels for %s (some ten seconds), in every process and each time anew: numba can "
            "write its cache neither beside saef's files nor in the home directory. Set the environment variable "
            "NUMBA_CACHE_DIR to a directory that can be written and lasts",
            what,
        )
    else:
        logger.warning(
            "compiling the CPU kernels for %s (some ten seconds), once for this machine; they are kept in %s",
            what,
            place,
        )
    start = time.perf_counter()
    for compiled, types in wanted:
        try:
            compiled.compile(types)
        except OSError as error:  # compiled it is
            logger.warning("cannot keep a compiled kernel in %s: %s", place, error)
    logger.warning("compiled the CPU kernels for %s in %.1f s", what, time.perf_counter() - start)
    if place is not None:
        _forget(Path(place))


def _forget(place: Path) -> None:
    """Remove what was compiled from other sources than these, which no process will look for again."""
    for file in place.glob("*.nb[ci]"):
        if SOURCES not in file.name:
            with suppress(OSError):
                file.unlink()


def _load(wanted: Sequence[Wanted]) -> bool:
    """Load what is not there yet from the cache; False as soon as something is not in it."""
    try:
        with event.install_listener("numba:compile", _Refusal([compiled for compiled, _ in wanted])):
            for compiled, types in wanted:
                compiled.compile(types)
    except _NotCached:
        return False
    return True


class _NotCached(Exception):
    pass


class _Refusal(event.Listener):  # type: ignore[misc]
    """numba's `compile` loads from the cache, or compiles and says so first: for these functions, it stops there."""

    def __init__(self, functions: Sequence[Any]) -> None:
        self._functions = functions

    def on_start(self, started: Any) -> None:
        if any(started.data["dispatcher"] is function for function in self._functions):
            raise _NotCached

    def on_end(self, ended: Any) -> None:
        pass


@contextmanager
def _lock(place: str | None) -> Iterator[None]:
    """One process at a time, if there is a cache. The system takes the lock from a process that dies."""
    with ExitStack() as stack:
        if place is not None:
            with suppress(OSError):  # another user's file, or a file system without locks: each compiles for itself
                file = stack.enter_context(open(os.path.join(place, "saef.lock"), "a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
