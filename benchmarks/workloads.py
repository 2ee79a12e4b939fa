"""What the benchmarks on slow networks train, and by which methods: shared by peers.py and time_to_loss.py.

Models: `linear`, ten 1024x1024 linear layers (10.5 M parameters); `resnet`, the ResNet-8 of the examples at width 64
(1.2 M) on 14x14 images; `gpt`, the GPT of the examples at width 128 with 6 layers (1.2 M). Linear and ResNet are
trained by momentum SGD, the GPT by AdamW with clipping.

PyTorch's PowerSGD hook issues collectives from callbacks of its futures, and with several buckets ranks can then issue
them in different orders, which gloo answers with a hang. So here a bucket begins when the one before it has ended;
within a bucket nothing changes.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_gpt
from resnet import ResNet

POWER_SGD_WARM_UP = 2  # steps of full precision, the least that PyTorch takes
warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)  # what came has other meanings


# -- models ------------------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)])


def resnet() -> nn.Module:
    return ResNet(width=64)


def gpt() -> nn.Module:
    return train_gpt.GPT(width=128, layers=6, heads=4, context=64)


def square(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0]).square().mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def text_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch)


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained.

    Attributes:
        net: makes it. loss: of the model and a batch. batch: of each rank.
        sample: random inputs of n examples, for measuring steps.
        adamw: by AdamW; else by momentum SGD. clip: norm of the gradient, of each rank's own with saef.
    """

    net: Callable[[], nn.Module]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    sample: Callable[[int], tuple[Tensor, ...]]
    batch: int
    lr: float
    adamw: bool = False
    clip: float | None = None
    weight_decay: float = 0.0


WORKLOADS = {
    "linear": Workload(linear, square, lambda n: (torch.randn(n, 1024),), batch=8, lr=1e-3),
    "resnet": Workload(
        resnet,
        cross_entropy,
        lambda n: (torch.randn(n, 1, 14, 14), torch.randint(10, (n,))),
        batch=16,
        lr=0.1,
        weight_decay=5e-4,
    ),
    "gpt": Workload(
        gpt,
        text_loss,
        lambda n: (torch.randint(256, (n, 64)), torch.randint(256, (n, 64))),
        batch=8,
        lr=2e-3,
        adamw=True,
        clip=1.0,
        weight_decay=0.1,
    ),
}


def optimizer_of(w: Workload, net: nn.Module, lr: float, adamw: bool = False) -> torch.optim.Optimizer:
    """The workload's own, or AdamW."""
    if not (w.adamw or adamw):
        return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=w.weight_decay)
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == yes] for yes in (True, False))
    groups = [{"params": matrices, "weight_decay": w.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr, (0.9, 0.95))


# -- methods -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """kind: plain, fp16, power, local (PyTorch's PostLocalSGD) or saef; rank of PowerSGD; steps between exchanges.

    adamw: of a workload by SGD, this method is by AdamW, to be compared with plain DDP by AdamW.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    steps: int = 1
    adamw: bool = False


PLAIN, PLAIN_ADAMW = "plain DDP", "plain DDP, AdamW"
SIGN = {"compressor": saef.ScaledSign()}
METHODS = {
    PLAIN: Method("plain"),
    "fp16 hook": Method("fp16"),
    "PowerSGD rank 1": Method("power", rank=1),
    "PowerSGD rank 2": Method("power", rank=2),
    "PowerSGD rank 4": Method("power", rank=4),
    "PostLocalSGD, H = 4": Method("local", steps=4),
    "PostLocalSGD, H = 16": Method("local", steps=16),
    "SAEF sign": Method("saef", SIGN),
    "SAEF sign, Rotating(20)": Method("saef", {**SIGN, "averaging": saef.Rotating(20)}),
    "SAEF top-1 %": Method("saef", {"compressor": saef.TopK(0.01)}),
    "SAEF sign, H = 4": Method("saef", {**SIGN, "local_steps": 4}, steps=4),
    "SAEF sign, H = 16": Method("saef", {**SIGN, "local_steps": 16}, steps=16),
    PLAIN_ADAMW: Method("plain", adamw=True),
    "SAEF-AdamW sign": Method("saef", SIGN, adamw=True),
}


def methods_for(workload: Workload) -> list[str]:
    """All methods; those by AdamW beside SGD only for a workload by SGD."""
    return [name for name, method in METHODS.items() if not (workload.adamw and method.adamw)]


def unit(name: str) -> str:
    """The method that `name` is compared with."""
    return PLAIN_ADAMW if METHODS[name].adamw else PLAIN


class PowerSGD:
    """The state of PyTorch's hook, and the future of the bucket before."""

    def __init__(self, rank: int) -> None:
        self.state = PowerSGDState(None, rank, start_powerSGD_iter=POWER_SGD_WARM_UP)
        self.before: torch.futures.Future[Tensor] | None = None


def power_hook(state: PowerSGD, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    if state.before is not None:
        state.before.wait()
    state.before = powerSGD_hook(state.state, bucket)
    if bucket.is_last():
        future, state.before = state.before, None
        return future
    return state.before


class Trainer:
    """A workload trained by one method on this rank. Batch norm's buffers stay each rank's own: nothing sends them."""

    def __init__(
        self, workload: Workload, name: str, lr: float | None = None, seed: int = 0, bucket_mb: float | None = None
    ) -> None:
        self.workload, self.method = workload, METHODS[name]
        method, rate = self.method, lr if lr is not None else 1e-4 if self.method.adamw else workload.lr
        torch.manual_seed(seed)
        self.net = workload.net()
        self.model = DDP(self.net, broadcast_buffers=False, bucket_cap_mb=bucket_mb)
        self.optimizer = optimizer_of(workload, self.net, rate, method.adamw)
        self.state: saef.SAEFState | None = None
        if method.kind == "saef":
            clip = {} if workload.clip is None else {"max_grad_norm": workload.clip}
            self.state = saef.SAEFState(self.model, self.optimizer, **clip, **method.settings)
            self.model.register_comm_hook(self.state, saef_hook)
        elif method.kind == "fp16":
            self.model.register_comm_hook(None, fp16_compress_hook)
        elif method.kind == "power":
            self.model.register_comm_hook(PowerSGD(method.rank), power_hook)
        elif method.kind == "local":
            state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
            self.model.register_comm_hook(state, post_localSGD_hook)
            # PyTorch's averager counts from 0 and averages at multiples: begin with 1, so as to end a round with it
            averager = PeriodicModelAverager(method.steps)
            averager.step = 1
            self.optimizer = PostLocalSGDOptimizer(self.optimizer, averager)

    def step(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.workload.loss(self.model, batch)
        loss.backward()
        if self.workload.clip is not None and self.state is None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.workload.clip)
        self.optimizer.step()
        return loss.detach()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())
