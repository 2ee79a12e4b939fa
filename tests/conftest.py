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
