"""An optimizer's state as plain tensors and numbers, whatever the optimizer, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comm.agreement import compare
from ..comm.transport import Transport
from .weights import Weights

Saved = dict[str, Any]


@torch.no_grad()
def capture(optimizer: torch.optim.Optimizer, weights: Weights) -> Saved:
    """{"state": {parameter's name: {entry: value}}, "groups": [{setting: value}]}: copies.

    And "whole": {key: value} of what is kept for none of the parameters, under a key of its own, if there is any.
    """
    every = zip(weights.names, weights.parameters, strict=True)
    state = {name: copied(optimizer.state[p]) for name, p in every if optimizer.state.get(p)}
    found: Saved = {"state": state, "groups": settings_of(optimizer)}
    if whole := {key: copied(value) for key, value in _whole(optimizer).items()}:
        found["whole"] = whole
    return found


def _whole(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    return {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, weights: Weights, saved: Saved, own: Collection[str]) -> None:
    """Make an optimizer's state what `capture` found. In place where it can be: others may hold on to the tensors.

    Tensors may come from another device, a file's. They go to their parameter's, but for "step", which torch keeps on
    the host, unless the optimizer is capturable or fused.

    Args:
        own: those of the groups' settings that the optimizer itself changes, as `changed` finds them. The others are
            the user's, or a scheduler's, and stay.
    """
    of_step = {p: p.device for group in optimizer.param_groups if _steps_there(group) for p in group["params"]}
    for name, p in zip(weights.names, weights.parameters, strict=True):
        if name in saved["state"]:
            places = {"step": of_step.get(p)}
            mine = optimizer.state[p]  # and stays: LBFGS holds on to it while its closure runs
            found = _put_back(mine, saved["state"][name], p.device, places)
            mine.clear()
            mine.update(found)
        else:
            optimizer.state.pop(p, None)
    for key in _whole(optimizer):
        del optimizer.state[key]
    optimizer.state.update(copied(saved.get("whole", {})))
    for group, before in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(copied({k: v for k, v in before.items() if k in own}))


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups' settings: copies."""
    return [copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def changed(before: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of settings that are others than `settings_of` found before."""
    pairs = zip(before, settings_of(optimizer), strict=True)
    return {k for old, new in pairs for k in {*old, *new} if not _same(old.get(k), new.get(k))}


@torch.no_grad()
def mean_of_ranks(saved: Saved, transport: Transport, device: torch.device) -> Saved:
    """The same, with each tensor of floating point now its mean over the ranks. Collective.

    Raises:
        ValueError: on all ranks, if they do not keep the same tensors.
    """
    named = _floats(saved)
    heading = "the optimizers of the ranks keep different tensors, which have no mean: save the rank form (state_dict)"
    compare({"optimizer": [(name, list(t.shape)) for name, t in named]}, transport, device, heading)
    for dtype in (torch.float32, torch.float64):  # 16-bit ones with the former
        some = [t for _, t in named if (t.dtype == torch.float64) == (dtype == torch.float64)]
        if some:
            v = torch.cat([t.reshape(-1).to(device=device, dtype=dtype) for t in some])
            transport.call(partial(transport.mean, v, "checkpoint"))
            for t, part in zip(some, v.split([t.numel() for t in some]), strict=True):
                t.copy_(part.view(t.shape))
    return saved


def entries_of(saved: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of what is kept for each parameter."""
    return {name: sorted(map(str, entries)) for name, entries in saved.get("state", {}).items()}


def _floats(saved: Saved) -> Sequence[tuple[str, Tensor]]:
    return [
        (f"{name}: {entry}", value)
        for name, entries in sorted(saved["state"].items())
        for entry, value in sorted(entries.items(), key=lambda pair: str(pair[0]))
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if type(a) is not type(b):
        return False
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same)  # of arrays, entry by entry


def copied(value: Any) -> Any:
    """A deep copy of tensors and collections of them, as a file may have them: no numpy numbers, no deques."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, deque):
        return [copied(v) for v in value]
    if isinstance(value, list | tuple):
        parts = [copied(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a namedtuple, or a plain one
    return value


def _steps_there(group: Mapping[str, Any]) -> bool:
    """Whether torch keeps the "step" of these parameters where they are."""
    return bool(group.get("capturable") or group.get("fused"))


def _put_back(
    now: Mapping[Any, Any],
    before: Mapping[Any, Any],
    device: torch.device,
    places: Mapping[Any, torch.device | None],
) -> dict[Any, Any]:
    """places: of entries that do not go to `device`; None: they stay where they are."""
    found: dict[Any, Any] = {}
    for k, v in before.items():
        there = now.get(k)
        if isinstance(there, Tensor) and isinstance(v, Tensor) and (there.shape, there.dtype) == (v.shape, v.dtype):
            found[k] = there.copy_(v)
        elif isinstance(v, Tensor):
            found[k] = v.detach().to(places.get(k, device), copy=True)
        elif isinstance(there, deque) and isinstance(v, list):
            found[k] = deque(copied(v), there.maxlen)
        else:
            found[k] = copied(v)
    return found
