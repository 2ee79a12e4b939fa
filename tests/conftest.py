"""The order of the tests, tests that run ahead, and fixtures that all share.

A test marked `ahead` starts processes of its own and mostly waits for them. They run in threads, two at a time, beside
the tests of this process: from the first on, but not beside those of `ranks`, which use all cores themselves. They are
reported after the other tests of their folder. So they may have no fixture but `tmp_path`, change nothing of this
process, and must allow for other work on the machine.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Semaphore
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
    """The tests that run ahead, in the order of their folders, and each one's outcome by its id."""

    def __init__(self, items: list[pytest.Item], folders: pytest.TempPathFactory) -> None:
        self._gate, self._running = Event(), Semaphore(2)
        self.threads = ThreadPoolExecutor(2)
        self.outcomes: dict[str, Future[None]] = {}
        for item in items:
            test: Any = item
            given = {"tmp_path": folders.mktemp("ahead"), **(test.callspec.params if hasattr(test, "callspec") else {})}
            words = {name: given[name] for name in inspect.signature(test.obj).parameters}
            self.outcomes[item.nodeid] = self.threads.submit(self._run, test.obj, words)

    def _run(self, test: Callable[..., None], words: dict[str, Any]) -> None:
        self._gate.wait()
        with self._running:
            test(**words)

    def open(self, now: bool) -> None:
        """Whether further tests may start."""
        (self._gate.set if now else self._gate.clear)()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it none is running."""
        for _ in range(2):
            self._running.acquire()
        yield
        self._running.release(2)


@pytest.fixture(scope="session")
def ahead_of_others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    found = Ahead([item for item in request.session.items if runs_ahead(item)], tmp_path_factory)
    yield found
    found.open(True)
    found.threads.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def start_ahead(request: pytest.FixtureRequest, ahead_of_others: Ahead) -> None:
    ahead_of_others.open(folder_of(request.node) != "ranks")
    request.node.stash[OUTCOMES] = ahead_of_others.outcomes


@pytest.fixture
def undisturbed(ahead_of_others: Ahead) -> Iterator[None]:
    """For a test that looks at the whole machine: no test runs beside it."""
    with ahead_of_others.paused():
        yield


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
