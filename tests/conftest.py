"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest

from ranks import RankPool


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


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """2 and 4 gloo ranks for DeepSpeed, whose engines take all the ranks of a job."""
    found = {n: RankPool(n) for n in (2, 4)}
    yield found
    for ranks in found.values():
        ranks.stop()
