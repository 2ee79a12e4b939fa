"""Seconds spent in each part of a step."""

from __future__ import annotations

import time
from collections import defaultdict
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

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside of it as `name`. One thread at a time for each name."""
        start = time.perf_counter()
        with record_function(f"saef: {name}"):
            yield
        self.seconds[name] += time.perf_counter() - start
