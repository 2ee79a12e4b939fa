"""Checkpoints of format 1, written by the first version of saef and kept in `format-1.pt`, load bit for bit.

`PYTHONPATH=tests python tests/ranks/test_format_1.py FILE` writes such a file anew. Gradients are given numbers, so
that no matrix product of a library can make a difference; what comes back, and 5 more steps, must be the same bits.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import saef
from support.ranks import RankPool

RANKS, STEPS, MORE = 2, 7, 5
FILE = Path(__file__).with_name("format-1.pt")

# Arguments of SGD, and of SAEFState.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sign": ({"momentum": 0.9, "weight_decay": 1e-2}, {"compressor": saef.ScaledSign(7), "exchange": "replicated"}),
    "top-k sharded": (
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"compressor": saef.TopK(0.2, block=11), "averaging": saef.AllReduce(4), "exchange": "sharded"},
    ),
    "dist-EF": (
        {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
        {
            "compressor": saef.ScaledSign("layer"),
            "step_ahead": 0.0,
            "weight_decay_mode": "outer",
            "exchange": "sharded",
        },
    ),
    "signum": (
        {"momentum": 0.8, "weight_decay": 1e-2},
        {"compressor": saef.MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"},
    ),
    "no momentum, single-way": ({}, {"compressor": saef.MinSize(9, saef.TopK(0.3)), "server_compressor": None}),
}


class Net(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(6, 7, generator=generator))
        self.b = nn.Parameter(torch.randn(8, generator=generator))
        self.c = nn.Parameter(torch.randn(3, 5, generator=generator))

    def forward(self, given: list[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.parameters(), given, strict=True))  # type: ignore[return-value]


def build(group: dist.ProcessGroup, case: str) -> tuple[Net, torch.optim.SGD, saef.SAEFState]:
    hyper, settings = CASES[case]
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **hyper)
    return net, optimizer, saef.SAEFState(net, optimizer, process_group=group, **settings)


def train(net: Net, optimizer: torch.optim.SGD, state: saef.SAEFState, steps: range, rank: int) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 * t + rank)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        optimizer.zero_grad()
        net([torch.randn(p.shape, generator=generator) for p in net.parameters()]).backward()
        state.engine.exchange_gradients()
        optimizer.step()


def write(group: dist.ProcessGroup, case: str) -> dict[str, Any]:
    """What one rank puts into the file."""
    torch.manual_seed(3)
    net, optimizer, state = build(group, case)
    rank = dist.get_rank(group)
    train(net, optimizer, state, range(STEPS), rank)
    saved = {"rank": state.state_dict(), "consolidated": state.consolidated_state_dict()}
    train(net, optimizer, state, range(STEPS, STEPS + MORE), rank)
    return {**saved, "x": state.weights.x().clone(), "x_tilde": state.x_tilde()}


def read(group: dist.ProcessGroup, case: str, written: list[dict[str, Any]], form: str) -> dict[str, Any]:
    """What `write` put there, after loading and going on."""
    net, optimizer, state = build(group, case)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    state.load_state_dict(written[dist.get_rank(group)][form])
    again = state.state_dict() if form == "rank" else state.consolidated_state_dict()
    train(net, optimizer, state, range(STEPS, STEPS + MORE), dist.get_rank(group))
    return {form: again, "x": state.weights.x().clone(), "x_tilde": state.x_tilde()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["rank", "consolidated"])
def test_format_1_loads_bit_for_bit(pool: RankPool, case: str, form: str) -> None:
    written = torch.load(FILE, weights_only=True)[case]
    for rank, (then, now) in enumerate(zip(written, pool.run(read, case, written, form, ranks=RANKS), strict=True)):
        assert_same(now[form], then[form], f"rank {rank}")
        if form == "rank":  # the ranks' means train on otherwise
            assert_same(now["x"], then["x"], f"rank {rank}: x after {MORE} more steps")
            assert_same(now["x_tilde"], then["x_tilde"], f"rank {rank}: x~ after {MORE} more steps")


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal to the last bit, in type and structure."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}: {key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def main() -> None:
    pool = RankPool(RANKS)
    torch.save({case: pool.run(write, case, ranks=RANKS) for case in CASES}, sys.argv[1])
    pool.stop()


if __name__ == "__main__":
    write.__module__ = "test_format_1"  # as ranks import it
    main()
