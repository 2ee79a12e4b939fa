"""Fixtures that the tests of frameworks share."""

from collections.abc import Iterator

import pytest

from support.horovod_ranks import HorovodPool
from support.ranks import RankPool


@pytest.fixture(scope="session")
def pools(pool: RankPool) -> Iterator[dict[int, RankPool]]:
    """2 and 4 gloo ranks for DeepSpeed, whose engines take all the ranks of a job."""
    two = RankPool(2)
    yield {2: two, 4: pool}
    two.stop()


@pytest.fixture(scope="session")
def trainers() -> Iterator[RankPool]:
    """2 gloo ranks for Lightning, Accelerate and Hugging Face's Trainer, which take all the ranks of a job."""
    two = RankPool(2)
    yield two
    two.stop()


@pytest.fixture(scope="session")
def horovods() -> Iterator[dict[int, HorovodPool]]:
    """1 to 4 Horovod ranks for the whole session: one horovodrun for each, which its first job starts."""
    found = {n: HorovodPool(n) for n in (1, 2, 3, 4)}
    yield found
    for ranks in found.values():
        ranks.stop()
