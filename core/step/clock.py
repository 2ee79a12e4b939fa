"""Seconds spent in each part of a step."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch.profiler import record_function


@final
class Clock:
    """Seconds spent in each part of the work; the parts also show in a profiler's trace as "saef: NAME".

    On CUDA these are the seconds it took to launch the work, not to do it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: Counter[str] = Counter()  # spans, of all threads
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time in which a thread is inside of it as `name`; where several are, once."""
        with self._lock:
            self._open[name] += 1
            if self._open[name] == 1:
                self._since[name] = time.perf_counter()
        try:
            with record_function(f"saef: {name}"):
                yield
        finally:
            with self._lock:
                self._open[name] -= 1
                if not self._open[name]:
                    self.seconds[name] += time.perf_counter() - self._since[name]
