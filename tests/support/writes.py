"""Writes to the gradients of a network between backward and step: of the same values, and of others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


# ---- of the same values ---------------------------------------------------------------------


def clip_to_infinity(net: nn.Module) -> None:
    """What frameworks do to log a norm."""
    nn.utils.clip_grad_norm_(net.parameters(), float("inf"))


def clip_far_away(net: nn.Module) -> None:
    nn.utils.clip_grad_value_(net.parameters(), 1e9)


def times_one(net: nn.Module) -> None:
    for g in gradients(net):
        g.mul_(1.0)


def times_one_at_once(net: nn.Module) -> None:
    torch._foreach_div_(gradients(net), 1.0)


def there_and_back(net: nn.Module) -> None:
    for g in gradients(net):
        g.mul_(2.0).mul_(0.5)


def copied(net: nn.Module) -> None:
    """Into other memory, of one parameter alone."""
    p = next(net.parameters())
    p.grad = p.grad.clone() if p.grad is not None else None


def taken_out_and_put_back(net: nn.Module) -> None:
    saved = [(p, p.grad) for p in net.parameters()]
    for p, _ in saved:
        p.grad = None
    for p, g in saved:
        p.grad = None if g is None else g.clone()


SAME_VALUES: list[Callable[[nn.Module], None]] = [clip_to_infinity, clip_far_away, times_one, times_one_at_once]
SAME_VALUES += [there_and_back, copied, taken_out_and_put_back]

# ---- of others: what is sent, too, becomes another -------------------------------------------


def clip(net: nn.Module) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def clip_values(net: nn.Module) -> None:
    nn.utils.clip_grad_value_(net.parameters(), 1e-4)


def half_of_one(net: nn.Module) -> None:
    """Of the last parameter alone, which is in the first bucket."""
    gradients(net)[-1].mul_(0.5)


def turned(net: nn.Module) -> None:
    for g in gradients(net):
        g.neg_()


def another_tensor(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.ones_like(p)


def changed_and_copied(net: nn.Module) -> None:
    """In place, and then put into other memory: both hold the same, which is not what was sent."""
    for p in net.parameters():
        if p.grad is not None:
            p.grad.mul_(3.0)
            p.grad = p.grad.clone()


def none(net: nn.Module) -> None:
    next(net.parameters()).grad = None


def noise(net: nn.Module) -> None:
    for g in gradients(net):
        g.add_(torch.linspace(-1.0, 1.0, g.numel(), dtype=g.dtype).view_as(g))


def clamp_data(net: nn.Module) -> None:
    """What many an older loop clips with."""
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.clamp_(-1e-3, 1e-3)


def one_entry_of_data(net: nn.Module) -> None:
    gradients(net)[0].data.view(-1)[3] += 50.0


def by_numpy(net: nn.Module) -> None:
    g = gradients(net)[0]
    (g.numpy() if g.device.type == "cpu" else g.data)[1] = 50.0


OTHER_VALUES: list[Callable[[nn.Module], None]] = [clip, clip_values, half_of_one, turned, another_tensor]
OTHER_VALUES += [changed_and_copied, none, noise, clamp_data, one_entry_of_data, by_numpy]
