"""The tensors of a forward: in what it returned, and in what it left in the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = (str, bytes, int, float, complex, type(None), type, nn.Module, torch.optim.Optimizer, FunctionType, ModuleType)
MOST_LOOKED_AT = 10_000  # objects in an output; one that has more is no output alone
EVERY = frozenset(vars(nn.Module()))  # the attributes that all modules have
MOST_KEPT = 1000  # of a list; a longer one is data


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a forward returned: in collections and objects, as deep as they are."""
    waiting, seen = deque([output]), set[int]()
    while waiting and len(seen) < MOST_LOOKED_AT:
        one = waiting.popleft()  # the nearest first
        if isinstance(one, Tensor):
            yield one
        elif id(one) not in seen and not isinstance(one, ATOMS):
            seen.add(id(one))
            waiting.extend(value for value in _inside(one) if not isinstance(value, ATOMS))


def _inside(one: Any) -> Iterable[Any]:
    if isinstance(one, Mapping):
        return one.values()
    if isinstance(one, list | tuple | set | frozenset):
        return one
    slots = [getattr(kind, "__slots__", ()) for kind in type(one).__mro__]
    names = [name for few in slots for name in ((few,) if isinstance(few, str) else few)]
    found: list[Any] = []
    with suppress(Exception):  # here and below: whatever a __getattr__ may raise for what is not there
        found += vars(one).values()
    for name in names:
        with suppress(Exception):
            found.append(getattr(one, name))
    return found


def kept_in(model: nn.Module) -> Iterator[Tensor]:
    """The tensors with a graph in the attributes of a model's modules, lists and dictionaries of them among these."""
    for module in model.modules():
        for name in vars(module).keys() - EVERY:
            value = vars(module)[name]
            if isinstance(value, Mapping):
                value = value.values()
            elif not isinstance(value, list | tuple):
                value = (value,)
            for one in islice(value, MOST_KEPT):
                with suppress(RuntimeError):  # a view whose base was written to: it has no backward
                    if isinstance(one, Tensor) and one.grad_fn is not None:
                        yield one
