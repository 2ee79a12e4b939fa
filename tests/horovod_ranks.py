"""A pool of real Horovod ranks under horovodrun, started once and reused.

`pool.run(job, *args)` calls `job(*args)` on every rank and returns the results in rank order, as `ranks.RankPool`
does for gloo. As a program this file is one of the ranks.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from ranks import answer, receive

TIMEOUT_S = 120
STALL_S = 12  # after which Horovod ends a job with a silent rank, in these tests
TESTS = Path(__file__).resolve().parent


def command(ranks: int, *words: str) -> list[str]:
    launcher = str(Path(sys.executable).parent / "horovodrun")
    return [launcher, "--gloo", "-np", str(ranks), sys.executable, *words]


def environment() -> dict[str, str]:
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": str(STALL_S // 3)}
    return {**os.environ, **limits, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(STALL_S), "OMP_NUM_THREADS": "1"}


class HorovodPool:
    """All ranks of one horovodrun, which starts with the first job."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._launcher: subprocess.Popen[str] | None = None
        self._pipes: list[Connection] = []
        self._output: Any = None

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        if self._launcher is None:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((job, args)))
        results, failures = receive(self._pipes, TIMEOUT_S)
        if failures:
            said = self.stop()
            raise AssertionError("\n".join([*failures, "horovodrun printed:", said[-3000:]]))
        return results

    def _start(self) -> None:
        self._output = tempfile.TemporaryFile("w+")
        with tempfile.TemporaryDirectory(prefix="saef-") as folder, Listener(f"{folder}/socket") as listener:
            words = command(self.ranks, str(TESTS / "horovod_ranks.py"), f"{folder}/socket")
            self._launcher = subprocess.Popen(
                words, env=environment(), stdout=self._output, stderr=self._output, text=True
            )
            listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
            pipes: dict[int, Connection] = {}
            while len(pipes) < self.ranks:
                try:
                    pipe = listener.accept()
                    pipes[pipe.recv()] = pipe
                except TimeoutError:
                    if self._launcher.poll() is not None:
                        raise AssertionError(f"horovodrun ended at once:\n{self.stop()}") from None
        self._pipes = [pipes[rank] for rank in range(self.ranks)]

    def stop(self) -> str:
        """End all ranks; what they have printed."""
        if self._launcher is None:
            return ""
        for pipe in self._pipes:
            pipe.close()
        try:
            self._launcher.wait(30)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
        self._launcher, self._pipes = None, []
        self._output.seek(0)
        return str(self._output.read())


def main() -> None:
    import horovod.torch as hvd
    import torch

    from saef import buckets

    torch.set_num_threads(1)
    buckets.BUCKET_BYTES = 256  # so small that there are several
    hvd.init()
    pipe = Client(sys.argv[1])
    pipe.send(hvd.rank())
    while True:
        try:
            job, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the pool was stopped
            os._exit(0)
        torch.manual_seed(0)
        pipe.send_bytes(answer(job, *args))


if __name__ == "__main__":
    main()
