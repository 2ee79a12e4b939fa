"""Training jobs that are saved and loaded."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.training import ADAMW, batch

END = 20  # steps
# Seconds, and the ranks' comparing each other once more after loading.
NOT_COMPARED = {"bytes_sent", "bytes_sent_settings", "seconds_compress", "seconds_exchange", "seconds_apply"}
SIGN, TOPK = saef.ScaledSign(block=20), saef.TopK(0.1, block=30)


class Net(nn.Module):
    """With dropout, so that the random state counts, and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 20), nn.Linear(20, 1)
        self.norm, self.drop = nn.BatchNorm1d(20), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))  # type: ignore[no-any-return]


class Run:
    """A training job that can be saved and loaded; `settings` of the state, and "optimizer": SGD, or another."""

    def __init__(self, group: dist.ProcessGroup, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.rank, self.dtype, self.group = dist.get_rank(group), dtype, group
        self.model = DDP(Net().to(dtype), process_group=group, bucket_cap_mb=0.0005)
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        settings = dict(settings)
        kind = settings.pop("optimizer", "SGD")
        groups = [
            {"params": weights, "weight_decay": 1e-3},
            {"params": rest, **({"nesterov": True} if kind == "SGD" else {})},
        ]
        of_rule = {"momentum": 0.9} if kind == "SGD" else ADAMW
        self.optimizer = getattr(torch.optim, kind)(groups, lr=0.1, **of_rule)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 100, cycle_momentum=True)
        self.state = saef.SAEFState(self.model, self.optimizer, **settings)
        self.model.register_comm_hook(self.state, saef_hook)
        torch.manual_seed(100 + self.rank)

    def train(self, steps: range, micro_batches: int = 1) -> None:
        for t in steps:
            self.optimizer.zero_grad()
            x, y = batch(self.rank, t, self.dtype)
            F.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()

    def others(self) -> dict[str, Any]:
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_others(self, saved: dict[str, Any]) -> None:
        self.model.module.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])

    def everything(self) -> dict[str, Any]:
        """All tensors and counters that training depends on."""
        s = self.state
        return {
            "x": s.weights.x().clone(),
            "parameters": [p.detach().clone() for p in self.model.parameters()],
            "buffers": [b.clone() for b in self.model.buffers()],
            "e": s.e.clone(),
            "m": s.m.clone(),
            "m_decay": s.engine.memory.m_decay.clone(),
            "e_server": s.e_server.clone(),
            "random": torch.get_rng_state(),
            "metrics": {k: v for k, v in s.metrics().items() if k not in NOT_COMPARED},
            "lr": [g["lr"] for g in self.optimizer.param_groups],
        }
