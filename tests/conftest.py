"""The order of the tests, tests that run ahead, and fixtures that all share.

A test marked `ahead` starts processes of its own and mostly waits for them. Those of a folder run in threads, two at
a time, from the folder's first test on, and are reported after its other tests. So they may have no fixture but
`tmp_path`, change nothing of this process, and must allow for other work on the machine.
"""

import inspect
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import RankPool

torch.set_num_threads(1)  # beside other processes torch's threads wait for each other for longer than they work
FOLDERS = ("pure", "workers", "ranks", "frameworks")  # what each needs: see support/__init__.py


# ---- order ------------------------------------------------------------------------------------------------------


def folder_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def runs_ahead(item: pytest.Item) -> bool:
    return item.get_closest_marker("ahead") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (FOLDERS.index(folder_of(item)), runs_ahead(item)))


# ---- tests that run ahead ---------------------------------------------------------------------------------------


class Ahead:
    """The tests of one folder that run ahead, each one's outcome by its id."""

    def __init__(self, items: list[pytest.Item], folders: pytest.TempPathFactory) -> None:
        self.threads = ThreadPoolExecutor(2)
        self.outcomes: dict[str, Future[None]] = {}
        for item in items:
            test: Any = item
            given = {"tmp_path": folders.mktemp("ahead"), **(test.callspec.params if hasattr(test, "callspec") else {})}
            words = {name: given[name] for name in inspect.signature(test.obj).parameters}
            self.outcomes[item.nodeid] = self.threads.submit(test.obj, **words)


@pytest.fixture(scope="session")
def aheads() -> Iterator[dict[str, Ahead]]:
    """By folder."""
    found: dict[str, Ahead] = {}
    yield found
    for ahead in found.values():
        ahead.threads.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def start_ahead(
    request: pytest.FixtureRequest, aheads: dict[str, Ahead], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of(request.node)
    if folder not in aheads:
        items = [item for item in request.session.items if runs_ahead(item) and folder_of(item) == folder]
        aheads[folder] = Ahead(items, tmp_path_factory)
    request.node.stash[OUTCOMES] = aheads[folder].outcomes


OUTCOMES = pytest.StashKey[dict[str, "Future[None]"]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """In place of calling a test that runs ahead: wait for it."""
    if not runs_ahead(pyfuncitem):
        return None
    pyfuncitem.stash[OUTCOMES][pyfuncitem.nodeid].result()
    return True


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
