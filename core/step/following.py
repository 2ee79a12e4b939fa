"""Errors go over to another trainable set, another layout in memory, or other groups of parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .memory import Context, Memory, all_server_errors, own_server_errors


@torch.no_grad()
def carry(memory: Memory, old: Context, new: Context) -> Memory:
    """The memory of `old` for `new`: a parameter of both owes what it owed, by whatever servers, others nothing.

    What a parameter owed that is trained no longer is dropped: it stands still. Counters stay. The rule's vectors are
    not here, but in the optimizer's state (`Kept`). A collective call where each rank serves its own blocks.

    Args:
        old: with x as the parameters are now (`Weights.absorb`).
    """
    carried = replace(Memory.create(new), **{name: getattr(memory, name) for name in COUNTERS})
    carried.grow(len(memory.m), decay=bool(memory.m_decay.numel()))
    pairs = [(memory.e, carried.e), (memory.m_decay, carried.m_decay), (memory.outer, carried.outer)]
    if old.serves_with_error:
        before = old.transport.call(lambda: all_server_errors(memory, old, "settings"))
        server = torch.zeros_like(new.weights.flat)
        pairs.append((before, server))
    for a, b in pairs:
        if a.numel():
            _copy(a, old, b, new)
    if old.serves_with_error and new.serves_with_error:
        for where, part in own_server_errors(server, new.placement):
            carried.e_server[where] = part
    return carried


COUNTERS = ("steps", "skipped", "skipped_in_a_row", "counted_from")


def _copy(a: Tensor, old: Context, b: Tensor, new: Context) -> None:
    """b <- a, vectors flat like x, parameter by parameter; entries of parameters that are new stay."""
    parts = {id(p): part for p, part in zip(old.weights.parameters, old.weights.cut(a), strict=True)}
    for p, mine in zip(new.weights.parameters, new.weights.cut(b), strict=True):
        if id(p) in parts:
            mine.copy_(parts[id(p)])
