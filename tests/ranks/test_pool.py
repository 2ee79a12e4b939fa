"""The pool of ranks itself: a rank that dies between two tests does not fail the second."""

import os

import pytest
import torch.distributed as dist

from support.ranks import RankPool, kill


def who(group: dist.ProcessGroup) -> tuple[int, int]:
    dist.barrier(group)
    return dist.get_rank(group), os.getpid()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_pool_starts_anew_when_a_rank_was_killed_since_the_last_job(pool: RankPool, victim: int) -> None:
    """Also one that the next job has no use for: the others would meet its absence later."""
    before = pool.run(who)
    assert pool.run(who) == before  # no new processes without need
    kill(before[victim][1])
    after = pool.run(who, ranks=2)
    assert [rank for rank, _ in after] == [0, 1]
    assert {pid for _, pid in after}.isdisjoint(pid for _, pid in before)


def fail(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ValueError("as a test would")


def test_a_job_that_fails_names_the_rank_and_the_next_one_works(pool: RankPool) -> None:
    before = pool.run(who)
    with pytest.raises(AssertionError, match="rank 1: Traceback(.|\n)*ValueError: as a test would"):
        pool.run(fail)
    assert {pid for _, pid in pool.run(who)}.isdisjoint(pid for _, pid in before)
