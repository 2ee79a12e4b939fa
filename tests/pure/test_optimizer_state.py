"""An optimizer's state is put back where its parameters are, wherever a file had it."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from saef.step.optimizer_state import copied, restore

SAVED = {"state": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "words": [1, 2]}}, "groups": [{}]}


def put_back(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights: Any = SimpleNamespace(names=["w"], parameters=[p])
    restore(optimizer, weights, SAVED, own=[])
    return optimizer.state[p]


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_go_to_the_parameters_device(capturable: bool) -> None:
    p = nn.Parameter(torch.empty(4, device="meta"))
    state = put_back(p, torch.optim.AdamW([p], capturable=capturable))
    assert state["exp_avg"].device.type == "meta" and state["words"] == [1, 2]
    assert state["step"].device.type == ("meta" if capturable else "cpu")


def test_what_is_there_is_written_to_and_nothing_is_shared() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p] = {"exp_avg": torch.zeros(4), "step": torch.tensor(1.0)}
    before = optimizer.state[p]["exp_avg"]
    state = put_back(p, optimizer)
    assert state["exp_avg"] is before and torch.equal(before, torch.ones(4)) and float(state["step"]) == 3.0
    fresh = put_back(q := nn.Parameter(torch.zeros(4)), torch.optim.AdamW([q]))
    fresh["exp_avg"].zero_()
    fresh["words"].append(3)
    assert torch.equal(SAVED["state"]["w"]["exp_avg"], torch.ones(4)) and SAVED["state"]["w"]["words"] == [1, 2]


def test_numpys_numbers_are_copied_as_pythons_and_deques_as_lists() -> None:
    found = copied({"lr": np.float64(0.1), "on": np.bool_(True), "last": deque([np.int64(1), (np.float32(0.5),)])})
    assert found == {"lr": 0.1, "on": True, "last": [1, (0.5,)]}
    assert [*map(type, found.values())] == [float, bool, list]
    assert type(found["last"][0]) is int and type(found["last"][1][0]) is float
