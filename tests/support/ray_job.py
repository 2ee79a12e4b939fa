"""Runs the script of docs/ray.md that lies in the working directory, in one Ray; `test_ray.py` looks at what is there.

    2 workers    the script as a program; worker 1 kills itself in a step between two checkpoints, once
    3 workers    its trainer again, from the last checkpoint of those 2 on; then the cases of `support.ray_ranks`

Each one's last checkpoint is copied to WORKERS/, and WORKERS-STEP.pt is x~ at the beginning and at checkpoints. What
the cases have found is in cases-RANK.pt.
"""

import os
import runpy
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ray.train.torch import TorchTrainer

KILLED_AT = 50


def watched(train: Callable[[dict[str, Any]], None], folder: Path, config: dict[str, Any]) -> None:
    """The script's `train` in a worker, which notes x~; worker 1 may die in a forward."""
    import ray.train
    import torch.distributed as dist

    from support.ray_ranks import cases

    context = ray.train.get_context()
    rank, world, script = context.get_world_rank(), context.get_world_size(), train.__globals__
    load, save = script["load"], script["save"]
    loss, calls = torch.nn.functional.cross_entropy, 0

    def note(state: Any, step: int) -> int:
        x_tilde = state.x_tilde()
        if rank == 0:
            torch.save(x_tilde, folder / f"{world}-{step}.pt")
        return step

    def saved(state: Any, optimizer: Any, report: dict[str, Any]) -> None:
        note(state, report["step"])
        save(state, optimizer, report)

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == KILLED_AT and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args)

    with (
        mock.patch.dict(script, load=lambda *args: note(args[0], load(*args)), save=saved),
        mock.patch("torch.nn.functional.cross_entropy", dying),
    ):
        train(config)
    dist.barrier()  # all have written their parts
    if rank == 0:
        with ray.train.get_checkpoint().as_directory() as newest:
            shutil.copytree(newest, folder / str(world))
    if world == 3:
        torch.save(cases(), folder / f"cases-{rank}.pt")


def watching(train: Callable[[dict[str, Any]], None], **words: Any) -> TorchTrainer:
    return TorchTrainer(partial(watched, train, Path.cwd()), **words)


def main() -> None:
    with mock.patch("ray.train.torch.TorchTrainer", watching):
        script = runpy.run_path("train_ray.py", run_name="__main__")
    script["trainer"](3, steps=120).fit()


if __name__ == "__main__":
    main()
