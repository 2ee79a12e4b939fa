"""Ranks compare their settings once, before any of them can wait for a message of another shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from .exchange import Transport


def compare(settings: Mapping[str, object], transport: Transport, device: torch.device) -> None:
    """Raise the same ValueError on every rank if the ranks' settings differ, naming rank and field.

    Args:
        settings: field -> anything whose `repr` identifies it.
        transport: collective; every rank must call.
        device: where messages live.
    """
    text = json.dumps({field: repr(value) for field, value in settings.items()})
    mine = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).to(device)
    own_length = torch.tensor([mine.numel()], dtype=torch.int64, device=device)
    packed = transport.all_gather(own_length.view(torch.uint8), [8] * transport.size, "settings")
    lengths = packed.view(torch.int64).tolist()
    every = bytes(transport.all_gather(mine, lengths, "settings").cpu().tolist())
    found, start = [], 0
    for length in lengths:
        found.append(json.loads(every[start : start + length]))
        start += length
    differences = [
        f"{field}: rank 0 has {found[0].get(field)}, rank {rank} has {theirs.get(field)}"
        for rank, theirs in enumerate(found)
        for field in found[0]
        if theirs.get(field) != found[0].get(field)
    ]
    if differences:
        raise ValueError("the ranks' settings differ; give every rank the same.\n" + "\n".join(differences))
