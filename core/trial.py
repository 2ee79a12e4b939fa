"""Some steps of SAEF with DDP on two gloo ranks of this machine, compared with Algorithm 1: for `python -m saef`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from saef.hooks import saef_hook

from .state import SAEFState
from .wire.compressors import ScaledSign

TIMEOUT_S = 120.0  # for two processes that import torch, and the steps, on a busy machine
RANKS, STEPS, LR, MU = 2, 5, 0.1, 0.9
C = ScaledSign(block=16)


def on_two_ranks(work: Callable[[], None], timeout_s: float = TIMEOUT_S) -> str:
    """Run `work`, a function of a module, on two gloo ranks of this machine: what has gone wrong, or nothing."""
    end = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        ranks = spawn(_rank, (str(Path(folder, "store")), timeout_s, work), nprocs=RANKS, join=False)
        try:
            while not ranks.join(timeout=1.0):
                if time.monotonic() > end:
                    return f"no end within {timeout_s:.0f} s"
        except Exception as error:
            return str(error).strip().splitlines()[-1]
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
    return ""


def _rank(rank: int, store: str, timeout_s: float, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    if sys.platform in ("linux", "darwin"):  # loopback, so that no host name needs resolving
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    work()
    dist.barrier()  # a process that ends while gloo's threads let go of the last step's tensors may abort
    dist.destroy_process_group()


# -- the steps -----------------------------------------------------------------------------------------------------


def start() -> Tensor:
    return torch.linspace(-1, 1, 50)


def target(k: int) -> Tensor:
    return torch.sin(torch.arange(50) * (1.0 + k))


@final
class Quadratic(nn.Module):
    """The loss ||x - c||^2 / 2, whose gradient is x - c."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(start())

    def forward(self, c: Tensor) -> Tensor:
        return (self.x - c).square().sum() / 2


def train() -> None:
    """Steps of SAEF with DDP. Raises RuntimeError if they do not end where Algorithm 1 does."""
    net = Quadratic()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    model.register_comm_hook(SAEFState(model, optimizer, compressor=C), saef_hook)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(target(dist.get_rank())).backward()
        optimizer.step()
    difference = float((net.x.detach() - expected()).abs().max())
    if not difference < 1e-5:  # float32: some hundred operations on numbers of order 1 round to less
        raise RuntimeError(f"x after {STEPS} steps differs by {difference:.3g} from Algorithm 1's")


def expected() -> Tensor:
    """x after the steps: SAEF Algorithm 1 without averaging (p = infinity), an entry of each list a worker."""
    x, e_server = start().double(), torch.zeros(50, dtype=torch.float64)
    e, m = ([torch.zeros_like(x) for _ in range(RANKS)] for _ in range(2))
    for _ in range(STEPS):
        sent = []
        for k in range(RANKS):
            m[k] = MU * m[k] + (x - e[k] - target(k))  # lines 9 and 10
            D = e[k] + LR * m[k]  # lines 11 and 12
            sent.append(C(D))
            e[k] = D - sent[k]  # line 18
        D = e_server + torch.stack(sent).mean(0)  # line 21
        R = C(D)
        e_server = D - R  # line 22
        x = x - R  # line 25
    return x
