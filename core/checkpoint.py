"""The state as plain tensors and numbers, and back.

Two forms, both loadable with torch.load(weights_only=True):

    rank            what this rank holds. Loaded by the same rank of as many ranks, training goes on bit for bit.
    consolidated    mean_k e_k and mean_k m_k in place of the ranks' own, and all server errors. The same on every
                    rank; loaded by any number of ranks with any exchange strategy, x~ = x - (e + mean_k e_k) and
                    the mean momentum are kept, to rounding.

What differs between ranks lies under a key that names the rank, "rank_0" ..., because torch.distributed.checkpoint
takes equal keys for copies and writes one of them. Tensors are by parameter name and in its shape:

    format, kind, saef         int, "rank" or "consolidated", version that wrote it
    parameters, settings       {name: shape}, {field: repr}: what must be the same to load it
    world_size, strategy       of the ranks that wrote it
    steps, steps_skipped, steps_skipped_in_a_row
    momentum, outer_momentum   whether there is an m and an m~
    x                          weights, of the state's dtype (the float32 master of 16-bit parameters)
    m_decay                    m~ of the outer weight decay
    rank_K / workers           e and m of rank K / their means
    rank_K                     also e_server: flat, the blocks this rank serves (`saef.plan.partition`); strides;
                               bytes: what it has sent; random: torch's random state (and "random_cuda")
    e_server                   consolidated: the servers' errors

A state is saved as it was before the step that is under way, if one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .step import Step

FORMAT = 1
COUNTERS = ("steps", "steps_skipped", "steps_skipped_in_a_row")
COMMON = ("parameters", "settings", "world_size", "strategy", *COUNTERS, "momentum", "outer_momentum")
OWN = ("strides", "bytes", "counted_from", "random")
LOAD_CONSOLIDATED = "load the consolidated form (SAEFState.consolidated_state_dict) instead"


@torch.no_grad()
def rank_form(state: Step) -> dict[str, Any]:
    """What `SAEFState.state_dict` returns."""
    state.restore()
    state.weights.absorb()
    mine: dict[str, Any] = {
        **_workers(state, state.errors_before_step(), state.m),
        "strides": _strides(state),
        "bytes": dict(state.transport.sent_bytes),
        "counted_from": state.counted_from,
        "random": torch.get_rng_state(),
    }
    if state.e_server.numel():
        mine["e_server"] = state.e_server.clone()
    if state.weights.device.type == "cuda":
        mine["random_cuda"] = torch.cuda.get_rng_state(state.weights.device)
    return {**_common(state, "rank"), f"rank_{state.transport.rank}": mine}


@torch.no_grad()
def consolidated_form(state: Step) -> dict[str, Any]:
    """What `SAEFState.consolidated_state_dict` returns. Collective."""
    state.restore()
    state.weights.absorb()
    e, m = state.errors_before_step(), state.m.clone()

    def together() -> Tensor:
        for v in (e, m):
            if v.numel():
                state.transport.mean(v, "checkpoint")
        return server_errors(state, "checkpoint")

    server = state.transport.call(together)
    saved = {**_common(state, "consolidated"), "workers": _workers(state, e, m)}
    if server.numel():
        saved["e_server"] = _by_name(state, server)
    return saved


def _common(state: Step, kind: str) -> dict[str, Any]:
    saved = {
        "format": FORMAT,
        "kind": kind,
        "saef": version("saef"),
        "parameters": _shapes(state),
        "settings": _settings(state),
        "world_size": state.transport.size,
        "strategy": state.strategy,
        "steps": state.steps,
        "steps_skipped": state.skipped,
        "steps_skipped_in_a_row": state.skipped_in_a_row,
        "momentum": state.m.numel() > 0,
        "outer_momentum": state.decay.m.numel() > 0,
        "x": _by_name(state, state.weights.x()),
    }
    if state.decay.m.numel():
        saved["m_decay"] = _by_name(state, state.decay.m)
    return saved


def _shapes(state: Step) -> dict[str, list[int]]:
    return {n: list(p.shape) for n, p in zip(state.weights.names, state.weights.parameters, strict=True)}


def _strides(state: Step) -> dict[str, list[int]]:
    return {n: list(p.stride()) for n, p in zip(state.weights.names, state.weights.parameters, strict=True)}


def _settings(state: Step) -> dict[str, str]:
    """What decides the meaning of what is saved. The rest may be changed when training goes on."""
    s = state.settings
    return {
        "compressor": repr(s.compressor),
        "server_compressor": repr(s.server),
        "weight_decay_mode": s.weight_decay_mode,
        "dtype": str(state.weights.dtype),
    }


def _workers(state: Step, e: Tensor, m: Tensor) -> dict[str, Any]:
    return {name: _by_name(state, v) for name, v in (("e", e), ("m", m)) if v.numel()}


def _by_name(state: Step, flat: Tensor) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in zip(state.weights.names, state.weights.cut(flat), strict=True)}


def server_errors(state: Step, purpose: str) -> Tensor:
    """The server errors of all blocks, flat like e; empty if there are none. Collective, in `Transport.call`."""
    if state.strategy == "replicated" or not state.serves_with_error:
        return state.e_server.clone()
    dtype, blocks = state.weights.dtype, state.blocks
    sizes = [n * dtype.itemsize for n in blocks.served]
    every = state.transport.all_gather(state.e_server.view(torch.uint8), sizes, purpose).view(dtype)
    server = torch.zeros_like(state.weights.flat)
    for owner, error in enumerate(every.split(blocks.served)):
        for block in blocks.served_by(owner):
            server[block.state : block.state + block.numel] = error[block.served : block.served + block.numel]
    return server


@torch.no_grad()
def load(state: Step, saved: Mapping[str, Any]) -> None:
    """What `SAEFState.load_state_dict` does. All is checked before anything is changed."""
    workers = _check(state, saved)
    names = state.weights.names
    state.abandon()
    state.weights.absorb()
    state.weights.write([saved["x"][name] for name in names])
    if saved["momentum"] and not state.m.numel():
        state.m = torch.zeros_like(state.weights.flat)
    if saved["outer_momentum"] and not state.decay.m.numel():
        state.decay.m = torch.zeros_like(state.weights.flat)
    found = ((state.e, workers.get("e")), (state.m, workers.get("m")), (state.decay.m, saved.get("m_decay")))
    for flat, values in found:
        flat.zero_()
        if values is not None:
            _write(state, flat, values)
    if saved["kind"] == "consolidated":
        if state.e_server.numel():
            server = torch.empty_like(state.weights.flat)
            _write(state, server, saved["e_server"])
            for block in state.blocks.served_by(state.server_rank):
                state.e_server[block.served : block.served + block.numel] = server[block.state :][: block.numel]
        counted_from, sent = saved["steps"], {}
    else:
        if state.e_server.numel():
            state.e_server.copy_(workers["e_server"])
        counted_from, sent = workers["counted_from"], workers["bytes"]
        torch.set_rng_state(workers["random"].cpu())
        if "random_cuda" in workers and state.weights.device.type == "cuda":
            torch.cuda.set_rng_state(workers["random_cuda"].cpu(), state.weights.device)
    state.steps, state.counted_from = saved["steps"], counted_from
    state.skipped, state.skipped_in_a_row = saved["steps_skipped"], saved["steps_skipped_in_a_row"]
    state.compared_at = None  # the next forward looks whether all ranks have loaded the same
    state.transport.sent_bytes.clear()
    state.transport.sent_bytes.update(sent)


def _write(state: Step, flat: Tensor, values: Mapping[str, Tensor]) -> None:
    for name, view in zip(state.weights.names, state.weights.cut(flat), strict=True):
        view.copy_(values[name])


def _check(state: Step, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raise ValueError unless `saved` fits this state; the part of it with this rank's e and m."""
    if not isinstance(saved, Mapping) or saved.get("kind") not in ("rank", "consolidated"):
        raise ValueError("not the state of a SAEFState: expected what state_dict() or consolidated_state_dict() gave")
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint has format {saved.get('format')} and was written by saef {saved.get('saef')}; saef "
            f"{version('saef')} reads format {FORMAT}: install the version that wrote it, or a newer one"
        )
    _complete(saved, COMMON)
    shapes = _shapes(state)
    _refuse("the checkpoint is of another model", saved["parameters"], shapes)
    advice = "to go on from its weights with others, load it into a state with its own, flush() and save the model"
    _refuse(f"the checkpoint is of other settings ({advice})", saved["settings"], _settings(state))
    workers = saved.get("workers") if saved["kind"] == "consolidated" else _rank_part(state, saved)
    expected = {"x": saved.get("x")}
    if saved["momentum"]:
        expected["m"] = (workers or {}).get("m")
    if saved["outer_momentum"]:
        expected["m_decay"] = saved.get("m_decay")
    if state.settings.feedback:
        expected["e"] = (workers or {}).get("e")
    if state.serves_with_error and saved["kind"] == "consolidated":
        expected["e_server"] = saved.get("e_server")
    for what, tensors in expected.items():
        found = {n: list(v.shape) for n, v in tensors.items()} if isinstance(tensors, Mapping) else None
        if found != shapes:
            raise ValueError(f"the checkpoint is damaged: its {what!r} is missing or not of the parameters' shapes")
    return workers or {}


def _complete(saved: Mapping[str, Any], keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in saved]:
        raise ValueError(f"the checkpoint is damaged: {missing} are missing")


def _refuse(heading: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [
        f"{name} is {theirs.get(name, 'missing')} in the checkpoint, {ours.get(name, 'missing')} here"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        raise ValueError(f"{heading}: " + "; ".join(different[:5]))


def _rank_part(state: Step, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """This rank's part of a rank form."""
    rank, size = state.transport.rank, state.transport.size
    now, then = (size, state.strategy), (saved["world_size"], saved["strategy"])
    if now != then:
        raise ValueError(
            f"this is the state of one of {then[0]} ranks with exchange={then[1]!r}, here are {now[0]} with "
            f"{now[1]!r}, and errors belong to ranks: {LOAD_CONSOLIDATED}"
        )
    if f"rank_{rank}" not in saved:
        found = [name for name in saved if name.startswith("rank_")]
        raise ValueError(f"this is the state of {', '.join(found)}, here is rank {rank}: each rank loads its own")
    mine: Mapping[str, Any] = saved[f"rank_{rank}"]
    _complete(mine, OWN)
    if mine["strides"] != _strides(state):
        raise ValueError(f"the parameters had another memory format, and blocks follow memory: {LOAD_CONSOLIDATED}")
    server = mine.get("e_server", torch.empty(0))
    if server.numel() != state.e_server.numel():
        raise ValueError("the checkpoint is damaged: its 'e_server' is missing or not of this rank's size")
    return mine
