"""The adaptive family of MixML eq. (11): against the equation in numpy, torch's SGD, and in training."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import saef
from support.training import batch, flat, make_net


def gradients(steps: int) -> list[np.ndarray]:
    """Of sizes that rise and fall by 1000, so that v both grows and stays."""
    rng = np.random.default_rng(5)
    return [rng.standard_normal(6) * 10.0 ** rng.uniform(-2, 1) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "p, betas, v0",
    [(0.5, (0.9, 0.999), 1e-8), (0.5, (0.0, 0.9), 1e-8), (0.125, (0.9, 0.5), 0.3), (0.0, (0.9, 0.9), 1.0)],
    ids=["AMSGrad", "RMSProp", "PAdam", "momentum SGD"],
)
def test_it_is_equation_11(p: float, betas: tuple[float, float], v0: float, weight_decay: float) -> None:
    x = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = saef.StochasticAdaptive([x], lr=0.01, betas=betas, p=p, v0=v0, weight_decay=weight_decay)
    want, m, v, stayed = np.linspace(-1, 1, 6), np.zeros(6), np.full(6, v0), 0
    for t, g in enumerate(gradients(40)):
        lr = optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
        x.grad = torch.from_numpy(g.copy())
        optimizer.step()
        assert torch.equal(x.grad, torch.from_numpy(g))  # untouched
        g = g + weight_decay * want
        m = betas[0] * m + (1 - betas[0]) * g
        stayed += int((betas[1] * v + (1 - betas[1]) * g**2 < v).sum())
        v = np.maximum(betas[1] * v + (1 - betas[1]) * g**2, v)
        want = want - lr * v**-p * m
        np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-13 * max(1.0, float(np.abs(want).max())))
    assert 0 < stayed < 240  # both branches of the maximum


def test_momentum_sgd_is_torchs_with_the_learning_rate_scaled() -> None:
    nets = [make_net(), make_net()]
    optimizers: list[Any] = [
        saef.StochasticAdaptive(nets[0].parameters(), lr=0.5, betas=(0.9, 0.0), p=0.0),
        torch.optim.SGD(nets[1].parameters(), lr=0.05, momentum=0.9),
    ]
    for t in range(50):
        for net, optimizer in zip(nets, optimizers, strict=True):
            x, y = batch(0, t)
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=0, atol=1e-12)


def test_v_never_decreases_and_the_first_step_is_bounded() -> None:
    x = nn.Parameter(torch.zeros(3))
    optimizer = saef.StochasticAdaptive([x], lr=1.0, betas=(0.0, 0.9), v0=4.0)
    x.grad = torch.tensor([1.0, -1.0, 0.0])
    optimizer.step()
    assert torch.equal(x, torch.tensor([-0.5, 0.5, 0.0]))  # v stays 4: 0.9 * 4 + 0.1 < 4
    x.grad = torch.tensor([100.0, 0.0, 0.0])
    optimizer.step()
    assert optimizer.state[x]["v"].tolist() == pytest.approx([0.9 * 4 + 0.1 * 1e4, 4.0, 4.0])


def test_groups_closures_and_checkpoints() -> None:
    def make() -> tuple[nn.Sequential, saef.StochasticAdaptive]:
        net = make_net()
        groups = [
            {"params": [p for p in net.parameters() if p.dim() > 1], "p": 0.25, "lr": 0.02},
            {"params": [p for p in net.parameters() if p.dim() <= 1], "betas": (0.5, 0.9)},
        ]
        return net, saef.StochasticAdaptive(groups, lr=0.01)

    def go(net: nn.Module, optimizer: saef.StochasticAdaptive, steps: range) -> list[float]:
        losses = []
        for t in steps:

            def closure(t: int = t) -> float:
                x, y = batch(0, t % 3)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x), y)
                loss.backward()
                return loss.item()

            losses.append(optimizer.step(closure))
        return losses

    net, optimizer = make()
    losses = go(net, optimizer, range(60))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    half, first = make()
    go(half, first, range(30))
    again, second = make()
    again.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    go(again, second, range(30, 60))
    assert torch.equal(flat(net), flat(again))


SIXTEEN = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def follow(x: nn.Parameter, optimizer: saef.StochasticAdaptive, steps: range) -> None:
    """Gradients that float16 and float32 hold alike, some of them 0, and some whose squares are no float16."""
    g = torch.tensor([1.0, 0.0, 2**-10, 512.0])
    for t in steps:
        x.grad = (g * (-1) ** t).to(x.dtype)
        optimizer.step()


@SIXTEEN
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_parameters_of_16_bits_are_those_of_float32_rounded(dtype: torch.dtype, weight_decay: float) -> None:
    short = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = saef.StochasticAdaptive([short], lr=0.125, weight_decay=weight_decay)
    m, v = torch.zeros(4), torch.full((4,), 1e-8)
    for t in range(20):
        wide = nn.Parameter(short.detach().float())
        other = saef.StochasticAdaptive([wide], lr=0.125, weight_decay=weight_decay)
        other.state[wide].update(m=m, v=v)
        follow(wide, other, range(t, t + 1))
        follow(short, optimizer, range(t, t + 1))
        m, v = other.state[wide]["m"], other.state[wide]["v"]
        assert torch.equal(short, wide.to(dtype)) and short.isfinite().all()
        assert torch.equal(optimizer.state[short]["m"], m) and torch.equal(optimizer.state[short]["v"], v)


@SIXTEEN
def test_a_checkpoint_keeps_the_state_of_16_bits_in_float32(dtype: torch.dtype) -> None:
    """Beside a parameter that has no state, and with a hook of the user's that gives another checkpoint."""
    x, unused = nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(2))
    optimizer = saef.StochasticAdaptive([{"params": [unused]}, {"params": [x], "p": 0.25}], lr=0.125)
    follow(x, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    y = nn.Parameter(x.detach().clone())
    again = saef.StochasticAdaptive([{"params": [unused]}, {"params": [y]}])
    again.register_load_state_dict_pre_hook(lambda _, given: saved)
    again.load_state_dict({})
    for name in ("m", "v"):
        assert again.state[y][name].dtype == torch.float32
        assert torch.equal(again.state[y][name], optimizer.state[x][name])
    follow(x, optimizer, range(5, 10))
    follow(y, again, range(5, 10))
    assert torch.equal(x, y) and not torch.equal(again.state[y]["m"], saved["state"][1]["m"])
    again.load_state_dict(saved)  # what was saved is not what was trained on
    assert torch.equal(again.state[y]["m"], saved["state"][1]["m"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\)"),
        ({"p": 0.6}, r"p must be in \[0, 1/2\]"),
        ({"p": -0.1}, r"p must be in \[0, 1/2\]"),
        ({"v0": 0.0}, "v0 must be positive"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0, and finite, got inf"),
        ({"lr": math.inf}, "lr must be at least 0, and finite, got inf"),
        ({"v0": math.inf}, "v0 must be positive, and within float32's range, got inf"),
        ({"v0": math.nan}, "v0 must be positive"),
        ({"v0": 1e-60}, "v0 must be positive, and within float32's range"),
        ({"betas": (0.9,)}, r"betas must be in \[0, 1\), and two of them, got \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, "two of them"),
        ({"betas": 0.9}, "two of them, got 0.9"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saef.StochasticAdaptive([nn.Parameter(torch.zeros(2))], **settings)
    optimizer = saef.StochasticAdaptive([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **settings})


def test_sparse_and_complex_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    x = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    x.grad = torch.ones(2, dtype=torch.complex64)
    for parameter in (embedding.weight, x):
        with pytest.raises(TypeError, match="dense and real"):
            saef.StochasticAdaptive([parameter]).step()
