"""The training job that the tests run on real ranks, and the same problem for the reference."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from saef import SAEFState, ScaledSign
from saef.hooks import saef_hook
from saef.step.ways import Copies, OnCPU, OnCUDA
from saef.step.weights import Weights

SIZES = (6, 9, 7, 1)
SETTINGS = {"compressor": ScaledSign(block=7), "exchange": "sharded"}
STEPS = 15  # three of each period in use, a jump of the rate by 10, a step in which it is 0, and two more
MOMENTUM = {"momentum": 0.9}
ADAMW = {"betas": (0.8, 0.95), "eps": 1e-3}  # an eps at which u does not amplify rounding by more than 1000


def make_net(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    """A small network with tensors of many sizes, among them one of a single entry."""
    with torch.device("cpu"):  # the same wherever it goes
        torch.manual_seed(1)
        layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return nn.Sequential(*sum(layers, [])[:-1]).to(torch.get_default_device(), dtype)


class Branches(nn.Module):
    """Parallel branches, so that gradients can be ready in another order on each rank; and an unused parameter."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.device("cpu"):
            torch.manual_seed(1)
            self.branches = nn.ModuleList(nn.Linear(6, n) for n in (5, 3, 8, 4))
            self.unused, self.head = nn.Parameter(torch.ones(3)), nn.Linear(20, 1)
        self.order = [0, 1, 2, 3] if rank % 2 else [3, 1, 0, 2]
        self.to(torch.get_default_device(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        found = {i: torch.tanh(self.branches[i](x)) for i in self.order}  # the last one's backward is the first
        return self.head(torch.cat([found[i] for i in range(4)], dim=1))  # type: ignore[no-any-return]


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Drawn on the CPU, so that they are the same on every device; on the default device."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


def batch(k: int, t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Worker k's batch in step t: the same wherever it is asked for, different for each worker."""
    generator = torch.Generator().manual_seed(1000 * k + t)
    x = randn(generator, 8, 6)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * k
    return x.to(dtype), y.to(dtype)


def wild_lrs(steps: int) -> list[float]:
    """A learning rate that warms up from 0, jumps up and down by 10, is 0 once, and decays."""
    lrs = [0.05 * min(1.0, t / 5) * (10.0 if t % 17 == 8 else 1.0) * 0.99**t for t in range(steps)]
    lrs[min(12, steps - 1)] = 0.0
    return lrs


@dataclass
class Job:
    """What one run varies. `groups`: options of two param groups (weights, biases), or of one.

    optimizer: the name of its class in torch.optim;
    sizes: of the network's layers; first: the number of its first batch; branches: train `Branches` instead;
    device: None: where the rank makes its tensors.
    """

    state: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    optimizer: str = "SGD"
    ddp: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] = field(default_factory=lambda: wild_lrs(STEPS))
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1
    preset: str | None = None
    sizes: tuple[int, ...] = SIZES
    first: int = 0
    device: str | None = None
    branches: bool = False


def make_model(job: Job, rank: int) -> nn.Module:
    return (Branches(rank, job.dtype) if job.branches else make_net(job.dtype, job.sizes)).to(device=job.device)


def param_groups(net: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All parameters in one group, or the matrices in one and the vectors in another."""
    if len(groups) == 1:
        return [{"params": list(net.parameters()), **groups[0]}]
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    return [{"params": matrices, **groups[0]}, {"params": vectors, **groups[1]}]


def make_optimizer(net: nn.Module, groups: list[dict[str, Any]], kind: str = "SGD") -> torch.optim.Optimizer:
    return getattr(torch.optim, kind)(param_groups(net, groups), lr=1.0)  # type: ignore[no-any-return]


def make_state(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> SAEFState:
    if job.preset is None:
        return SAEFState(model, optimizer, **job.state)
    import saef.hooks

    return getattr(saef.hooks, job.preset)(model, optimizer, **job.state)  # type: ignore[no-any-return]


def train(group: dist.ProcessGroup, job: Job) -> dict[str, Any]:
    """Train with DDP and saef_hook; what the tests look at afterwards."""
    net = make_model(job, dist.get_rank(group))
    options = {"bucket_cap_mb": 0.0005, "find_unused_parameters": job.branches, **job.ddp}
    model = DDP(net, process_group=group, **options)
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    state = make_state(model, optimizer, job)
    model.register_comm_hook(state, saef_hook)
    rank, trajectory = dist.get_rank(group), [flat(net)]
    for t, lr in enumerate(job.lrs):
        set_lr(optimizer, job, lr)
        optimizer.zero_grad()
        parts = micro_batches(job, rank, t)
        for xs, ys in parts[:-1]:
            with model.no_sync():
                (nn.functional.mse_loss(model(xs), ys) / len(parts)).backward()
        xs, ys = parts[-1]
        (nn.functional.mse_loss(model(xs), ys) / len(parts)).backward()
        optimizer.step()
        trajectory.append(flat(net))
    return outcome(state, trajectory)


def wrap(group: dist.ProcessGroup, job: Job) -> tuple[nn.Module, DDP, torch.optim.Optimizer, SAEFState]:
    net = make_net(job.dtype)
    model = DDP(net, process_group=group, bucket_cap_mb=0.0005, **job.ddp)
    optimizer = make_optimizer(net, job.groups, job.optimizer)
    state = SAEFState(model, optimizer, **job.state)
    model.register_comm_hook(state, saef_hook)
    return net, model, optimizer, state


def set_lr(optimizer: torch.optim.Optimizer, job: Job, lr: float) -> None:
    for g, options in zip(optimizer.param_groups, job.groups, strict=True):
        g["lr"] = lr * options.get("lr", 1.0)


def micro_batches(job: Job, rank: int, t: int) -> list[tuple[Tensor, Tensor]]:
    x, y = (v.to(job.device or v.device) for v in batch(rank, job.first + t, job.dtype))
    return list(zip(x.chunk(job.micro_batches), y.chunk(job.micro_batches), strict=True))


def outcome(state: SAEFState, trajectory: list[Tensor]) -> dict[str, Any]:
    """What the tests look at after training: x before and after every step, and the state at the end."""
    return {
        "x": torch.stack(trajectory),
        "e": state.e.cpu().clone(),
        "m": state.m.cpu().clone(),
        "e_server": state.e_server.cpu().clone(),
        "metrics": state.metrics(),
        "strategy": state.strategy,
        "buckets": len(state.engine.sending._plans),
    }


def way_of_keeping_x(name: str) -> type[Weights]:
    """By "copies" or "swaps", for `saef.step.joining.create`."""
    return {"copies": Copies, "swaps": OnCUDA if torch.get_default_device().type == "cuda" else OnCPU}[name]


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def gradient(k: int, t: int, parameters: list[Tensor], sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Worker k's gradient at `parameters`, for the reference."""
    net = _net(sizes)
    with torch.no_grad():
        for p, value in zip(net.parameters(), parameters, strict=True):
            p.copy_(value)
    x, y = batch(k, t)
    return list(torch.autograd.grad(nn.functional.mse_loss(net(x), y), list(net.parameters())))


@cache
def _net(sizes: tuple[int, ...]) -> nn.Sequential:
    """For `gradient` alone, thousands of times: making one seeds torch, which notes the whole stack of callers."""
    return make_net(sizes=sizes)
