"""One rank of a Trainer under torchrun: lightning_job.py FOLDER [RANK:EPOCH:BATCH], where that rank kills itself, once.

It checkpoints every two steps, and goes on from the last checkpoint. What each rank is at the end lies in
FOLDER/end-RANK.pt, and at which step it began in FOLDER/began-RANK.txt, a line for each life.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

import saef
from support.lightning_ranks import Lit, Positioned, fit
from support.trainers import record


class Mortal(Lit):
    """As Lit, until it dies in a forward."""

    end: list[int] | None = None

    def on_train_start(self) -> None:
        with (folder / f"began-{dist.get_rank()}.txt").open("a") as file:
            file.write(f"{self.trainer.global_step}\n")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.end == [dist.get_rank(), self.trainer.current_epoch, batch_idx]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    module = Mortal("AdamW", dropout=0.3)
    if len(sys.argv) > 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        module.end = [int(word) for word in sys.argv[2].split(":")]
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_last=True)
    ours = {"compressor": saef.TopK(0.2), "averaging": saef.Rotating(3)}
    callback, _ = fit(ours, module, Positioned(), [saving], "last")
    torch.save(record(callback.state), folder / f"end-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
