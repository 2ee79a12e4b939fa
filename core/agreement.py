"""Ranks compare what must be the same on all of them, before any can wait for a message of another shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .exchange import Transport

if TYPE_CHECKING:
    from .step import Step

CHUNK = 1 << 20  # entries of a checksum at a time


def gather(value: object, transport: Transport, device: torch.device, purpose: str = "settings") -> list[Any]:
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
    transport: Transport,
    device: torch.device,
    heading: str = "the ranks' settings differ; give every rank the same",
) -> None:
    """Raise the same ValueError on every rank if the ranks' settings differ, naming rank and field.

    Args:
        settings: field -> anything whose `repr` identifies it.
        transport: collective; every rank must call.
        device: where messages live.
        heading: first line of the error.
    """
    mine = {field: repr(value) for field, value in settings.items()}
    found = transport.call(lambda: gather(mine, transport, device))
    differences = [
        f"{field}: rank 0 has {found[0].get(field)}, rank {rank} has {theirs.get(field)}"
        for rank, theirs in enumerate(found)
        for field in found[0]
        if theirs.get(field) != found[0].get(field)
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
        for chunk in bits.split(CHUNK):
            weights = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=device)
            total += (chunk.to(torch.int64) * weights).sum()
            start += chunk.numel()
    return f"{int(total) % 2**64:016x}"


def compare_settings(state: Step) -> None:
    """Compare what never changes, when a state is created. Collective."""
    w, s = state.weights, state.settings
    fields = {field: getattr(s, field) for field in s.__dataclass_fields__}
    parameters = [(n, tuple(p.shape), p.dtype) for n, p in zip(w.names, w.parameters, strict=True)]
    fields.update(saef=version("saef"), world_size=state.transport.size)
    fields.update(parameters=parameters, groups=w.groups, grad_scaler=state.loss_scale.used)
    compare(fields, state.transport, w.device)


def audit(state: Step) -> None:
    """Compare what must be equal in a step: at the first after creation or loading, and every `audit_every`."""
    every, t, last = state.settings.audit_every, state.steps, state.compared_at
    if last is not None and (every is None or t % every != 0 or last == t):
        return
    fields = {
        "steps": t,
        "optimizer": state.read_optimizer(),
        "loss scale": state.loss_scale.value(),
        "checksum of the weights x": checksum(state.weights.parts()),
    }
    heading = (
        f"the ranks differ at step {t}: all must start from the same weights or checkpoint, give the optimizer the "
        "same settings and change parameters alike; if they did, they have diverged: load the last checkpoint"
    )
    compare(fields, state.transport, state.weights.device, heading)
    state.compared_at = t
