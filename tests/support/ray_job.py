"""Trains by `examples/train_ray.py` in one Ray, twice, in the working directory; `test_ray.py` looks at what is there.

    2 workers    worker 1 kills itself in a step between two checkpoints, once
    3 workers    from the last checkpoint of those 2 on

Each one's last checkpoint is copied to WORKERS/, and WORKERS-STEP.pt is x~ at the beginning and at checkpoints.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

import train_ray  # type: ignore[import-not-found]

KILLED_AT = 50


def watched(config: dict[str, Any]) -> None:
    """`train` in a worker, which notes x~; worker 1 may die in a forward."""
    import train_ray

    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), Path(config["folder"])
    train, load, save = train_ray.train, train_ray.load, train_ray.save
    loss, calls = torch.nn.functional.cross_entropy, 0

    def note(state: Any, step: int) -> int:
        x_tilde = state.x_tilde()
        if rank == 0:
            torch.save(x_tilde, folder / f"{context.get_world_size()}-{step}.pt")
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
        mock.patch.object(train_ray, "load", lambda *args: note(args[0], load(*args))),
        mock.patch.object(train_ray, "save", saved),
        mock.patch("torch.nn.functional.cross_entropy", dying),
    ):
        train(config)


def main() -> None:
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=2**27)
    for workers, steps in ((2, 100), (3, 120)):
        with mock.patch.object(train_ray, "train", watched):
            result = train_ray.trainer(workers, folder=os.getcwd(), steps=steps).fit()
        shutil.copytree(result.checkpoint.path, str(workers))
    ray.shutdown()


if __name__ == "__main__":
    main()
