"""Start ranks on this machine for the examples that do not need torchrun."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(work: Callable, *args: object, ranks: int = 4) -> object:
    """Call `work(*args)` on gloo ranks, one thread each; return what rank 0 returned.

    If a rank fails, the others are ended and its error, traceback included, is raised here.
    """
    # For the ranks: set before they load torch. Loopback, so that no host name needs resolving.
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform in ("linux", "darwin"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # Ranks are forked from a process that has imported, once, the program and what an optimizer's first step imports.
    mp.set_forkserver_preload(["torch._dynamo", "__main__"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, folder, work, args), nprocs=ranks, start_method="forkserver")
        # Through a file: a queue's pipe would fill up while the parent waits for the ranks to end.
        return torch.load(Path(folder, "result"), weights_only=True)


def _rank(rank: int, ranks: int, folder: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # Ranks meet through a file of their own: two runs at a time cannot take each other's port.
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = work(*args)
    if rank == 0:
        torch.save(result, Path(folder, "result"))
    dist.barrier()  # a process that ends while gloo's threads let go of the last step's tensors may abort
    dist.destroy_process_group()
