"""What is compared bit for bit."""

from typing import Any

import torch
from torch import Tensor

import saef


def snapshot(state: saef.SAEFState) -> list[Tensor]:
    return [v.clone() for v in (state.weights.x(), state.e, state.m, state.e_server, state.engine.memory.m_decay)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            assert_equal(v, w, f"{where}/{i}")
    else:
        assert a == b, where
