"""Changes of what is trained, as scripts make them, and the truth: a twin that plain momentum SGD trains.

With `Identity()` saef is that, so it must follow what the twin, which has no wrapper, does by itself.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.training import ADAMW, randn

CHANGED_AT, THAWED_AT, STEPS = 3, 5, 7


class Images(nn.Module):
    """Something with a memory format, layers of one shape, and one that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cpu"):
            torch.manual_seed(2)
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen, self.more = nn.Linear(4, 4).requires_grad_(False), nn.ModuleList()
        self.to(torch.get_default_device(), torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.frozen(self.second(torch.tanh(self.first(self.conv(x).mean((2, 3))))))
        for layer in self.more:
            h = layer(torch.tanh(h))
        return h


def make_optimizer(net: Images, kind: str = "SGD") -> torch.optim.Optimizer:
    groups = [
        {"params": [*net.first.parameters()]},
        {"params": [*net.second.parameters()], "lr": 0.2, "weight_decay": 0.1},
        {"params": [*net.conv.parameters(), net.frozen.weight]},
    ]
    options = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {"lr": 0.01, **ADAMW}
    return getattr(torch.optim, kind)(groups, **options)  # type: ignore[no-any-return]


def images(rank: int, t: int, parts: int = 1) -> list[Tensor]:
    """A worker's micro-batches of step t."""
    generator = torch.Generator().manual_seed(10 * t + rank)
    return [randn(generator, 2, 3, 5, 5) for _ in range(parts)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()  # type: ignore[no-any-return]


class Twin:
    """A copy of a network and its optimizer, trained on the gradients' mean over the ranks."""

    def __init__(self, net: Images, mean: Callable[[Tensor], Tensor]) -> None:
        self.net, self._mean = copy.deepcopy(net), mean
        self.optimizer = make_optimizer(self.net)

    def change(self, what: Callable[..., None], net: Images, optimizer: torch.optim.Optimizer) -> None:
        """For both."""
        what(net, optimizer)
        what(self.net, self.optimizer)

    def step(self, batches: list[Tensor], share: float = 1.0) -> None:
        """share: of a micro-batch in the loss."""
        self.optimizer.zero_grad()
        for x in batches:
            (loss_of(self.net, x) * share).backward()
        for p in self.net.parameters():
            if p.grad is not None:
                p.grad = self._mean(p.grad)
        self.optimizer.step()


def freeze_a_tensor(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.first.weight.requires_grad_(False)


def freeze_the_first_layer(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.conv.requires_grad_(False)


def freeze_and_drop(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.second.requires_grad_(False)
    del optimizer.param_groups[1]


def unfreeze(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.frozen.weight.requires_grad_(True)  # in the optimizer from the start


def unfreeze_and_add(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.frozen.requires_grad_(True)
    optimizer.add_param_group({"params": [net.frozen.bias], "lr": 0.05, "momentum": 0.5})


def grow(net: Images, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(7)
    net.more.extend(nn.Linear(4, 4).double() for _ in range(2))
    optimizer.add_param_group({"params": [*net.more.parameters()], "lr": 0.1, "momentum": 0.9})


def replace_the_head(net: Images, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(8)
    net.second = nn.Linear(4, 4).double()
    optimizer.param_groups[1]["params"] = [*net.second.parameters()]


def regroup(net: Images, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.reverse()


def swap(net: Images, optimizer: torch.optim.Optimizer) -> None:
    a, b = optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"]
    a[0], b[0] = b[0], a[0]


def channels_last(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.to(memory_format=torch.channels_last)


def transpose(net: Images, optimizer: torch.optim.Optimizer) -> None:
    net.first.weight.data = net.first.weight.data.t().contiguous().t()


def part_of_a_larger(net: Images, optimizer: torch.optim.Optimizer) -> None:
    large = torch.full((4, 9), 5.0, dtype=torch.float64)
    large[:, 2:6] = net.first.weight.data
    net.first.weight.data = large[:, 2:6]
    net.large = large


def everything(net: Images, optimizer: torch.optim.Optimizer) -> None:
    for change in (freeze_a_tensor, unfreeze_and_add, grow, regroup, channels_last):
        change(net, optimizer)


GONE = [freeze_a_tensor, freeze_the_first_layer, freeze_and_drop, replace_the_head, everything]
CHANGES = [*GONE, unfreeze, unfreeze_and_add, grow, regroup, swap, channels_last, transpose, part_of_a_larger]


def thaw(net: Images, optimizer: torch.optim.Optimizer) -> None:
    for layer in (net.conv, net.first):
        layer.requires_grad_(True)


def due(change: Callable[..., None], t: int) -> list[Callable[..., None]]:
    """What changes before step t: what is frozen thaws again, with the momentum that it had."""
    freezes = change in (freeze_a_tensor, freeze_the_first_layer)
    return [change] if t == CHANGED_AT else [thaw] if t == THAWED_AT and freezes else []
