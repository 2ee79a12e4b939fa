"""A pool of real Horovod ranks under horovodrun, started once and reused.

`pool.run(job, *args)` calls `job(*args)` on every rank and returns the results in rank order, as
`support.ranks.RankPool` does for gloo. As a program this file is one of the ranks.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from support import environment as own_environment
from support.forked import python
from support.ranks import answer, lost, receive

TIMEOUT_S = 120
STALL_S = 12  # after which Horovod ends a job with a silent rank, in these tests


def command(ranks: int, *words: str) -> list[str]:
    """The launcher and all ranks are forked."""
    launcher = str(Path(sys.executable).parent / "horovodrun")
    return [python(), launcher, "--gloo", "-np", str(ranks), python(), *words]


def environment() -> dict[str, str]:
    """Ranks ask each other for work every 3 ms instead of every one: there are more of them than cores."""
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": str(STALL_S // 3), "HOROVOD_CYCLE_TIME": "3"}
    return own_environment(**limits, HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=str(STALL_S))


LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """In horovodrun before it begins: SIGTERM when this process ends, however it does. Stopped ranks cannot notice."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class HorovodPool:
    """All ranks of one horovodrun, which starts with the first job.

    Between jobs the ranks are stopped (SIGSTOP): Horovod's threads ask the other ranks for work every millisecond,
    and would take half a core from whatever runs then.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._launcher: subprocess.Popen[str] | None = None
        self._pipes: list[Connection] = []
        self._pids: list[int] = []
        self._output: Any = None

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        if lost(self._pipes):
            self.stop()
        if self._launcher is None:
            self._start()
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((job, args)))
        results, failures = receive(self._pipes, TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        if failures:
            said = self.stop()
            raise AssertionError("\n".join([*failures, "horovodrun printed:", said[-3000:]]))
        return results

    def _start(self) -> None:
        self._output = tempfile.TemporaryFile("w+")
        with tempfile.TemporaryDirectory(prefix="saef-") as folder, Listener(f"{folder}/socket") as listener:
            words = command(self.ranks, __file__, f"{folder}/socket")
            # While they are stopped time goes on, and a rank may be in the middle of asking the others.
            env = {**environment(), "HOROVOD_GLOO_TIMEOUT_SECONDS": "36000", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
            self._launcher = subprocess.Popen(
                words, env=env, stdout=self._output, stderr=self._output, text=True, preexec_fn=end_with_parent
            )
            listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
            pipes: dict[int, Connection] = {}
            pids: dict[int, int] = {}
            while len(pipes) < self.ranks:
                try:
                    pipe = listener.accept()
                    rank, pid = pipe.recv()
                    pipes[rank], pids[rank] = pipe, pid
                except TimeoutError:
                    if self._launcher.poll() is not None:
                        raise AssertionError(f"horovodrun ended at once:\n{self.stop()}") from None
        self._pipes = [pipes[rank] for rank in range(self.ranks)]
        self._pids = [pids[rank] for rank in range(self.ranks)]

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> str:
        """End all ranks; what they have printed."""
        if self._launcher is None:
            return ""
        for pipe in self._pipes:
            pipe.close()
        self._signal(signal.SIGCONT)
        try:
            self._launcher.wait(30)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
        self._launcher, self._pipes, self._pids = None, [], []
        self._output.seek(0)
        return str(self._output.read())


def main() -> None:
    import horovod.torch as hvd
    import torch

    from saef.step import buckets

    torch.set_num_threads(1)
    buckets.BUCKET_BYTES = 256  # so small that there are several
    hvd.init()
    pipe = Client(sys.argv[1])
    pipe.send((hvd.rank(), os.getpid()))
    while True:
        try:
            job, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the pool was stopped
            os._exit(0)
        torch.manual_seed(0)
        pipe.send_bytes(answer(job, *args))


if __name__ == "__main__":
    main()
