"""A pool of real gloo ranks, started once and reused: seconds once, then milliseconds a test.

`pool.run(job, *args, ranks=2)` calls `job(group, *args)` in that many processes, `group` being a process group
of just them, and returns their results in rank order. Jobs are module-level functions; arguments and results
are pickled. A job that fails on any rank fails the test with every rank's traceback, and the pool is started
anew, since a rank may still be waiting for the others; so it is if a rank has died since the last job.

Ranks are forked from one server that has loaded torch and saef (`support.preload`), so starting one is cheap.

With SAEF_TEST_DEVICE=cuda in the environment tensors of a job are made on a GPU, which all ranks share, and what it
returns is brought back.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

from support import environment

TIMEOUT_S = 120


class RankPool:
    """`world` processes; `run` uses the first `ranks` of them."""

    def __init__(self, world: int = 4) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any, ranks: int = 4) -> list[Any]:
        if lost(self._pipes):
            self.stop()
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
        from torch.distributed import TCPStore  # not a file, at which ranks look every 10 ms

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world):
            ours, theirs = context().Pipe()
            process = context().Process(target=_serve, args=(rank, self.world, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


@cache
def context() -> Any:
    """Starts processes, by forking a server that has loaded what all of them need, with one thread each."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["support.preload"])
    with mock.patch.dict(os.environ, environment()):
        multiprocessing.forkserver.ensure_running()
    return found


def lost(pipes: list[Any]) -> bool:
    """Whether a rank has died while it had nothing to do: only the end of its pipe can be read then."""
    return any(pipe.poll(0) for pipe in pipes)


def kill(pid: int) -> None:
    """SIGKILL; returns when the process is gone, which takes a while on a busy machine."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        while True:
            time.sleep(0.01)
            os.kill(pid, 0)


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
    import torch
    from torch.utils._pytree import tree_map_only

    try:
        return pickle.dumps((True, tree_map_only(torch.Tensor, torch.Tensor.cpu, job(*args))))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # as launchers set it; DeepSpeed asks for it
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device := os.environ.get("SAEF_TEST_DEVICE"):  # a default device costs each call of torch a call of Python
        torch.set_default_device(device)
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
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
