"""A pool of real gloo ranks, started once and reused: seconds once, then milliseconds a test.

`pool.run(job, *args, ranks=2)` calls `job(group, *args)` in that many processes, `group` being a process group
of just them, and returns their results in rank order. Jobs are module-level functions; arguments and results
are pickled. A job that fails on any rank fails the test with every rank's traceback, and the pool is started
anew, since a rank may still be waiting for the others.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

TIMEOUT_S = 120


class RankPool:
    """`world` processes; `run` uses the first `ranks` of them."""

    def __init__(self, world: int = 4) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any, ranks: int = 4) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes[:ranks]:
            pipe.send_bytes(pickle.dumps((job, ranks, args)))
        results, failures = receive(self._pipes[:ranks], 2 * TIMEOUT_S)
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="saef-ranks-")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def receive(pipes: list[Any], timeout_s: float) -> tuple[list[Any], list[str]]:
    """The ranks' answers: (results, what went wrong on which rank)."""
    results, failures = [], []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(timeout_s):
                raise EOFError
            ok, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            ok, value = False, "died, or gave no answer in time"
        (results if ok else failures).append(value if ok else f"rank {rank}: {value}")
    return results, failures


def answer(job: Callable[..., Any], *args: Any) -> bytes:
    """What `receive` takes: the job's result, or its traceback."""
    try:
        return pickle.dumps((True, job(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LOCAL_RANK"] = str(rank)  # as launchers set it; DeepSpeed asks for it
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world + 1)}
    while True:
        try:
            job, ranks, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            os._exit(0)
        torch.manual_seed(0)
        pipe.send_bytes(answer(job, groups[ranks], *args))
