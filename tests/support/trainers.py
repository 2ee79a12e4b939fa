"""One small task for the trainers of four frameworks, and DDP's own loop over it to compare them with.

Every rank is a process of a pool of two (`support.ranks`), or one of Ray's three workers.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import Dataset

import saef
from saef.hooks import saef_hook

FEATURES, CLASSES = 8, 4
# Of float64, compared to rounding: 9 steps on numbers of order 1, each rounded to 1e-16, some divided by a root
# of v. Measured: below 1e-14. A gradient that is lost, doubled or of another step shows at 1e-3.
TOLERANCE = 1e-12
BATCH, BATCHES = 8, 6  # samples in a batch; batches of an epoch on each rank
EPOCHS, ACCUMULATE = 3, 2
STEPS = EPOCHS * BATCHES // ACCUMULATE
LR = {"SGD": 0.2, "AdamW": 0.01, "RMSprop": 0.01}
BETAS = (0.9, 0.9)  # alike: |u| cannot be larger than 1, to which saef clamps it among several ranks

COMPRESSORS = {"sign": saef.ScaledSign(), "topk": saef.TopK(0.2)}

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """A function of a module that the ranks alone import: frameworks take seconds, which this process need not wait."""

    module: str
    name: str

    def __call__(self, group: dist.ProcessGroup, *args: Any) -> Any:
        return getattr(import_module(self.module), self.name)(group, *args)


class Net(nn.Module):
    """With dropout, so that the random state counts. Logits, or with labels the loss too, as models of transformers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES), nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.b(self.drop(torch.tanh(self.a(x))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_net(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    net = Net(dropout).to(dtype)
    torch.manual_seed(100 + dist.get_rank())
    return net


class Samples(Dataset[Batch]):
    """Made-up samples of the whole job, of classes that can be learnt.

    Args:
        source: the sample that stands at each place, so that ranks can be given the same batches.
    """

    def __init__(self, source: Callable[[int], int] = lambda i: i, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.dtype = source, dtype
        self.centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 2 * BATCH * BATCHES

    def __getitem__(self, i: int) -> Batch:
        generator = torch.Generator().manual_seed(self.source(i))
        label = torch.randint(CLASSES, (), generator=generator)
        return (self.centres[label] + torch.randn(FEATURES, generator=generator)).to(self.dtype), label


def of_both(i: int) -> int:
    """A source of batches, which are dealt out one by one to two ranks, by which both get the same."""
    return i // (2 * BATCH) * BATCH + i % BATCH


def make_optimizer(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(net.parameters(), lr=LR[kind], momentum=0.9, weight_decay=1e-3)
    if kind == "RMSprop":
        return torch.optim.RMSprop(net.parameters(), lr=LR[kind])
    return torch.optim.AdamW(net.parameters(), lr=LR[kind], betas=BETAS)


def local(kind: str) -> dict[str, Any]:
    """Settings besides: an optimizer without a rule makes its own steps, here two to an exchange."""
    return {"local_steps": 2} if kind == "RMSprop" else {}


def record(state: saef.SAEFState) -> dict[str, Any]:
    """All that a step of saef depends on, but for the optimizer's settings."""
    own = state.state_dict()[f"rank_{state.engine.transport.rank}"].get("rounds", {})
    kept = [v.flatten() for _, v in sorted(tensors(own))]
    return {
        "own": torch.cat(kept) if kept else torch.empty(0),
        "x": state.weights.x().clone(),
        "e": state.e.clone(),
        "m": state.m.clone(),
        "e_server": state.e_server.clone(),
        "steps": state.steps,
        "local_step": state.local_step,
        "skipped": state.skipped,
        "random": torch.get_rng_state(),
    }


def tensors(saved: Any, where: str = "") -> list[tuple[str, Tensor]]:
    """All in nested dicts and lists, by where they are."""
    if isinstance(saved, Tensor):
        return [(where, saved.double())]
    parts = saved.items() if isinstance(saved, dict) else enumerate(saved) if isinstance(saved, list) else ()
    return [found for key, part in parts for found in tensors(part, f"{where}/{key}")]


def assert_equal(found: dict[str, Any], expected: dict[str, Any], names: Sequence[str] = ()) -> None:
    """Bit for bit."""
    for name in names or expected:
        same = found[name] == expected[name]
        assert same if isinstance(same, bool) else bool(same.all()), name
    assert found["steps"] > 0


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).clone()


def train_by_hand(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: Sequence[Sequence[Batch]],
    settings: dict[str, Any],
    schedule: Callable[[Any], Any],
    every_step: int = 0,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
) -> dict[str, Any]:
    """DDP's own loop with `saef_hook`, as in the README.

    Args:
        optimizer_of: makes the optimizer of the network.
        epochs: this rank's batches.
        schedule: makes a scheduler of the optimizer; it is called once an epoch, or `every_step` times a step.
        dtype: of autocast. scaler: of the loss.
    """
    net = make_net()
    model, optimizer = DDP(net), optimizer_of(net)
    scheduler = schedule(optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    state = saef.SAEFState(model, optimizer, grad_scaler=scaler, **settings)
    model.register_comm_hook(state, saef_hook)
    for batches in epochs:
        for i, (x, y) in enumerate(batches):
            last = (i + 1) % ACCUMULATE == 0
            with nullcontext() if last else model.no_sync():
                with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                    loss = F.cross_entropy(model(x), y)
                scaler.scale(loss / ACCUMULATE).backward()
            if last:
                scaler.step(optimizer)
                scaler.update()
                for _ in range(every_step):
                    scheduler.step()
                optimizer.zero_grad()
        if not every_step:
            scheduler.step()
    return record(state)


def as_torchrun() -> None:
    """What Accelerate reads of its launcher, in a process of a pool of two."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, OMP_NUM_THREADS="1")


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
