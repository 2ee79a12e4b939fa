"""Ranks compare what must be the same on all of them, before any can wait for a message of another shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .transport import Gathers, Purpose

CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22  # entries of a checksum at a time: what a CPU's cache holds; on a GPU


def gather_values(value: object, transport: Gathers, device: torch.device, purpose: Purpose = "settings") -> list[Any]:
    """Every rank's value, anything that JSON can say, in rank order. Collective; nothing is unpickled.

    Args:
        transport: to be called in its order (`Transport.call`).
        device: where messages live.
        purpose: what its bytes are counted as.
    """
    mine = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8).to(device)
    own_length = torch.tensor([mine.numel()], dtype=torch.int64, device=device)
    packed = transport.all_gather(own_length.view(torch.uint8), [8] * transport.size, purpose)
    lengths = packed.view(torch.int64).tolist()
    every = transport.all_gather(mine, lengths, purpose)
    return [json.loads(bytes(part.tolist())) for part in every.cpu().split(lengths)]


def compare(
    settings: Mapping[str, object],
    transport: Gathers,
    device: torch.device,
    heading: str = "the ranks' settings differ; give every rank the same",
    what: str | None = None,
) -> None:
    """Raise the same ValueError on every rank if the ranks' settings differ, naming rank and field.

    Args:
        settings: field -> anything whose `repr` identifies it. A field is compared among the ranks that have it.
        transport: collective; every rank must call.
        device: where messages live.
        heading: first line of the error.
        what: where all ranks meet before (`Transport.meet`); None for what is due on all of them in the same step.
    """
    if what is not None:
        transport.meet(what)
    mine = {field: repr(value) for field, value in settings.items()}
    found = transport.call(lambda: gather_values(mine, transport, device))
    first: dict[str, tuple[int, str]] = {}
    for rank, theirs in enumerate(found):
        for field, value in theirs.items():
            first.setdefault(field, (rank, value))
    differences = [
        f"{field}: rank {first[field][0]} has {first[field][1]}, rank {rank} has {value}"
        for rank, theirs in enumerate(found)
        for field, value in theirs.items()
        if value != first[field][1]
    ]
    if differences:
        raise ValueError(heading + ".\n" + "\n".join(differences))


def checksum(parts: Sequence[Tensor]) -> str:
    """64 bits over the bits of flat float32 or float64 vectors, as 16 hexadecimal digits.

    Entry i counts with the weight 2 i + 1, modulo 2^64: odd, so that no change of a single entry can be lost,
    and different, so that two entries cannot be swapped.
    """
    device = parts[0].device
    total, start = torch.zeros((), dtype=torch.int64, device=device), 0
    for part in parts:
        bits = part.view(torch.int64 if part.dtype == torch.float64 else torch.int32)
        for chunk in bits.split(CHUNK if device.type == "cpu" else DEVICE_CHUNK):
            weights = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=device)
            total += (chunk.to(torch.int64) * weights).sum()
            start += chunk.numel()
    return f"{int(total) % 2**64:016x}"
