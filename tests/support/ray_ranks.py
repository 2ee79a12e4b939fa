"""Ray's own `prepare_model` and `prepare_data_loader`, in the workers of a TorchTrainer: `ray_job.py` calls `cases`."""

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import prepare_data_loader, prepare_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import saef
from saef.hooks import saef_hook
from support import trainers
from support.trainers import ACCUMULATE, BATCH, COMPRESSORS, EPOCHS, Samples, flat, make_net, make_optimizer, record

IDENTITY = (("SGD", False, None), ("SGD", True, 0.1), ("AdamW", True, 0.1))  # optimizer, data alike, clip


class Run:
    """A script with Ray's usual loop.

    Args:
        ours: settings of the state; None for Ray's plain DDP.
        clip: what a plain loop clips to.
    """

    def __init__(self, ours: dict[str, Any] | None, kind: str, samples: Samples, clip: float | None = None) -> None:
        self.net, self.clip = make_net(dtype=samples.dtype), clip
        self.model = prepare_model(self.net)
        self.loader = prepare_data_loader(DataLoader(samples, BATCH))
        self.optimizer = make_optimizer(kind, self.net)
        self.scheduler = schedule(self.optimizer)
        self.state: Any = None
        if ours is not None:
            self.state = saef.SAEFState(self.model, self.optimizer, **ours)
            self.model.register_comm_hook(self.state, saef_hook)

    def train(self, epochs: int) -> "Run":
        for _ in range(epochs):
            for i, (x, y) in enumerate(self.loader):
                last = (i + 1) % ACCUMULATE == 0
                with nullcontext() if last else self.model.no_sync():
                    (F.cross_entropy(self.model(x), y) / ACCUMULATE).backward()
                if last:
                    if self.state is None and self.clip is not None:
                        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self

    def evolves(self) -> dict[str, Any]:
        """By name, what a checkpoint has to hold; in the order in which to load it."""
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "saef": self.state}


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    """Around a resume after step 2, so that the rate counts, which the optimizer keeps, and the scheduler's count."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], 0.7)


def resumed(ours: dict[str, Any], kind: str, samples: Samples) -> Run:
    """All epochs; after the first, everything new, from Ray's newest checkpoint."""
    name = f"rank-{dist.get_rank()}.pt"
    with tempfile.TemporaryDirectory() as folder:
        first = Run(ours, kind, samples).train(1)
        torch.save({key: part.state_dict() for key, part in first.evolves().items()}, Path(folder, name))
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    run = Run(ours, kind, samples)
    with ray.train.get_checkpoint().as_directory() as folder:
        saved = torch.load(Path(folder, name), weights_only=True)
    for key, part in run.evolves().items():
        part.load_state_dict(saved[key])
    return run.train(EPOCHS - 1)


def equals_plain(kind: str, alike: bool, clip: float | None) -> float:
    """Identity, resumed, against Ray's own run: the largest difference of x."""
    world = dist.get_world_size()
    samples = Samples((lambda i: i // world) if alike else (lambda i: i), torch.float64)  # dealt out one by one
    plain = Run(None, kind, samples, clip).train(EPOCHS)
    run = resumed({"compressor": saef.Identity(), "noise_correction": False, "max_grad_norm": clip}, kind, samples)
    return float((flat(plain.net) - flat(run.net)).abs().max())


def equals_the_hook(compressor: saef.Compressor, kind: str) -> Any:
    """(DDP's own loop, the resumed run)."""
    settings = {"compressor": compressor, "max_grad_norm": 0.5}
    run = resumed(settings, kind, Samples())
    by_hand = partial(make_optimizer, kind)
    expected = trainers.train_by_hand(by_hand, [[*run.loader]] * EPOCHS, settings, schedule, every_step=1)
    return expected, record(run.state)


def cases() -> dict[str, Any]:
    """What this worker has found of all."""
    return {
        "identity": {str(case): equals_plain(*case) for case in IDENTITY},
        "hook": {
            f"{name} {kind}": equals_the_hook(compressor, kind)
            for name, compressor in COMPRESSORS.items()
            for kind in ("SGD", "AdamW")
        },
    }
