"""What the fork server of `support.ranks` has loaded before it forks: what every rank would load for seconds.

Nothing here may start a thread, which a fork would lose, or touch a GPU.
"""

import gc
import os
from pathlib import Path

import torch
import torch._dynamo.guards  # the first step of an optimizer imports it

import saef
import saef.hooks

torch.set_num_threads(1)
# After each compilation torch measures its guards, with cold caches, for a log that nobody reads: half of the time.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
for dtype in (torch.float32, torch.float64):  # numba, and its cache
    for compressor in (saef.ScaledSign(), saef.TopK(0.1), saef.Identity()):
        codec = saef.Codec(compressor, [10], dtype)
        codec.decode(codec.encode([torch.ones(10, dtype=dtype)]))
THREADS = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 1
if THREADS != 1:
    raise RuntimeError(f"{THREADS} threads run where ranks are to be forked")
gc.collect()
gc.freeze()  # no rank looks at, and so copies, what all share
