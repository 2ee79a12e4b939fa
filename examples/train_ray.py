# train_ray.py, started by: python train_ray.py
import os
import tempfile
from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

import saef
from saef.hooks import saef_hook


def train(config):
    """What each worker runs; from the newest checkpoint on, if there is one."""
    torch.manual_seed(0)  # the same ten classes on every worker
    centres = torch.randn(10, 64)
    model = prepare_model(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign())
    model.register_comm_hook(state, saef_hook)
    torch.manual_seed(1 + ray.train.get_context().get_world_rank())  # other samples of them on each
    for step in range(load(state, optimizer), config["steps"]):
        labels = torch.randint(10, (32,))
        loss = nn.functional.cross_entropy(model(centres[labels] + 2 * torch.randn(32, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % config["save_every"] == 0:
            report = {"step": step + 1, "loss": loss.item(), "compression": state.metrics()["compression_ratio"]}
            save(state, optimizer, report)


def own_part():
    context = ray.train.get_context()
    return f"rank-{context.get_world_rank()}-of-{context.get_world_size()}.pt"


def save(state, optimizer, report):
    """Every worker writes what it alone has; Ray puts the parts together, wherever it keeps checkpoints."""
    extra = {"step": report["step"], "optimizer": optimizer.state_dict()}  # and schedulers, the model's buffers
    whole = state.consolidated_state_dict()  # for another number of workers; all of them take part
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"saef": state.state_dict(), **extra}, Path(folder, own_part()))
        if ray.train.get_context().get_world_rank() == 0:
            torch.save({"saef": whole, **extra}, Path(folder, "consolidated.pt"))
        ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))


def load(state, optimizer):
    """The number of steps that the newest checkpoint has seen."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        own = Path(folder, own_part())
        saved = torch.load(own if own.exists() else Path(folder, "consolidated.pt"), weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    state.load_state_dict(saved["saef"])
    return saved["step"]


def trainer(workers=2, **config):
    return TorchTrainer(
        train,
        train_loop_config={"steps": 100, "save_every": 20, **config},
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(
            name="saef",
            storage_path=os.path.abspath("checkpoints"),  # or s3://...; of several machines, one that all of them see
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


if __name__ == "__main__":
    print(trainer().fit().metrics)
