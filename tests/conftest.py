"""The order of the tests, what may run beside what, and fixtures that all share.

`make test` runs them in several processes (pytest-xdist), a file in one of them: what tests wait for, other processes'
starts and messages above all, then costs little. They may not depend on one another, nor on having the machine
for themselves. A test marked `alone` has it.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import RankPool

torch.set_num_threads(1)  # beside other processes torch's threads wait for each other for longer than they work
if hasattr(os, "SCHED_BATCH"):  # and so do gloo's, if those that messages wake interrupt what has sent them
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # inherited by all that tests start
# torch asks the name server who is at either end of each connection to a store: a lost answer then costs one second.
os.environ.setdefault("RES_OPTIONS", "timeout:1")
FOLDERS = ("pure", "workers", "ranks", "frameworks")  # what each needs: see support/__init__.py
KINDS = r"test_(horovod|deepspeed)"  # files that share processes which take long to start


# ---- order ------------------------------------------------------------------------------------------------------


def folder_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDERS.index(folder_of(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process gets the next file; those of a kind go to one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            kind = re.search(KINDS, path)
            return kind.group() if kind else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


# ---- beside one another -----------------------------------------------------------------------------------------


DOOR, ROOM = Path(__file__), Path(__file__).with_name("support")  # locked, so that no files are needed for that


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test enters the room when those before it have gone through the door: one that is `alone` waits in it."""
    with opened(ROOM) as room:
        with opened(DOOR) as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)  # which unlocks it


# ---- ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four gloo ranks for the whole session."""
    ranks = RankPool()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def eight() -> Iterator[RankPool]:
    """Eight gloo ranks for the session, for what is promised of more than four."""
    ranks = RankPool(8)
    yield ranks
    ranks.stop()
