"""The state as plain tensors and numbers, and back.

Two forms, both loadable with torch.load(weights_only=True):

    rank            what this rank holds. Loaded by the same rank of as many ranks, training goes on bit for bit.
    consolidated    mean_k e_k and mean_k m_k in place of the ranks' own, and all server errors. The same on every
                    rank; loaded by any number of ranks with any exchange strategy, x~ = x - (e + mean_k e_k) and
                    the mean momentum are kept, to rounding. So is AdamW's mean_k v_k: each v_k estimates the second
                    moment of the mean gradient among as many workers as there were, and their mean does it better.

What differs between workers lies under a key that names the worker, "rank_0" ..., because torch.distributed.checkpoint
takes equal keys for copies and writes one of them. Where a worker is a node of several ranks, what only one of these
has lies under "rank_0_place_0" ...: node, and place in it. Tensors are by parameter name and in its shape, DTensors
where the parameters are:

    format, kind, saef         int, "rank" or "consolidated", version that wrote it
    parameters, settings       {name: shape}, {field: repr}: what must be the same; a rule other than SGD is named
    world_size, strategy       of the workers that wrote it; ranks_a_node, where they are nodes of several
    steps, steps_skipped, steps_skipped_in_a_row
    momentum, outer_momentum   whether there is an m (and, of AdamW, a v), and an m~
    x                          weights, of the state's dtype (the float32 master of 16-bit parameters)
    m_decay                    m~ of the outer weight decay
    rank_K / workers           e, m (and AdamW's v) of rank K / their means
    outer                      b of an outer optimizer
    rank_K / workers           rounds, of an optimizer that makes its own steps: its state (`saef.step.rounds`)
    rank_K_place_S             of DDP's nodes: all that is named above, 1-D, this rank's part; and x_part, of x's master
    rank_K (_place_S)          also e_server: flat, the blocks this rank serves (`saef.wire.plan.partition`); strides;
                               bytes: what it has sent; random: torch's random state (and "random_cuda")
    e_server                   consolidated: the servers' errors

A state is saved as it was before the step that is under way, if one is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .rules import SGD, Difference
from .step.memory import Context, Memory, all_server_errors, own_server_errors
from .step.optimizer_state import Saved, entries_of

FORMAT = 1

COMMON = (
    "parameters",
    "settings",
    "world_size",
    "strategy",
    "steps",
    "steps_skipped",
    "steps_skipped_in_a_row",
    "momentum",
    "outer_momentum",
)
VECTORS = ("m", "v")  # what a rule keeps, in the order of its names
OWN = ("strides", "bytes", "counted_from", "random")
LOAD_CONSOLIDATED = "load the consolidated form (SAEFState.consolidated_state_dict) instead"


@torch.no_grad()
def rank_form(memory: Memory, context: Context, own: Saved | None) -> dict[str, Any]:
    """What `SAEFState.state_dict` returns, of a memory as it was before the step under way.

    Args:
        own: of an optimizer that makes its own steps: `saef.step.rounds.Rounds.saved`.
    """
    weights, transport = context.weights, context.transport
    mine: dict[str, Any] = {
        "strides": _strides(context),
        "bytes": dict(transport.sent_bytes),
        "counted_from": memory.counted_from,
        "random": torch.get_rng_state(),
    }
    if memory.e_server.numel():
        mine["e_server"] = memory.e_server.clone()
    if own is not None:
        mine["rounds"] = own
    if weights.device.type == "cuda":
        mine["random_cuda"] = torch.cuda.get_rng_state(weights.device)
    named = partial(_named, context, weights.own)
    saved = {**_common(memory, context, "rank"), "x": dict(zip(weights.names, weights.whole_x(), strict=True))}
    alike, workers = _alike(memory, named), _workers(memory, named)
    worker, own_rank = _keys(context)
    if weights.joint:
        saved |= alike
    else:  # under one key only what all ranks have alike
        mine |= {**alike, "x_part": named(weights.x())}
    saved[worker] = workers
    saved[own_rank] = {**saved.get(own_rank, {}), **mine}
    return saved


@torch.no_grad()
def consolidated_form(memory: Memory, context: Context, own: Callable[[bool], Saved | None]) -> dict[str, Any]:
    """What `SAEFState.consolidated_state_dict` returns, of the same, whose e becomes the ranks' mean. Collective.

    Args:
        own: gives the same as means over the ranks, collectively.
    """
    if context.node.in_parts:
        raise ValueError(
            "each rank has a part of its node's model, which does not say what the whole is: save the rank form, "
            "state_dict() or save_checkpoint(consolidate=False), for as many nodes of as many ranks"
        )
    transport = context.transport
    means = replace(memory, m=memory.m.clone())

    def together() -> Tensor:
        for v in (means.e, means.m.view(-1)):
            if v.numel():
                transport.mean(v, "checkpoint")
        return all_server_errors(memory, context, "checkpoint")

    context.node.everyone.meet("SAEFState.consolidated_state_dict()")
    server = transport.call(together)
    named = partial(_named, context, context.weights.gathered)
    saved = {**_common(memory, context, "consolidated"), "x": named(context.weights.x()), **_alike(memory, named)}
    saved["workers"] = _workers(means, named)
    if (rounds := own(True)) is not None:
        saved["workers"]["rounds"] = rounds
    if server.numel():
        saved["e_server"] = named(server)
    return saved


def _keys(context: Context) -> tuple[str, str]:
    """Of what the ranks of a worker save together, and of what this one saves alone."""
    worker, node = f"rank_{context.transport.rank}", context.node
    own = worker if node.size == 1 else f"{worker}_place_{node.place}"
    return worker if context.weights.joint else own, own


def is_joint(saved: Mapping[str, Any]) -> bool:
    """Whether, in a rank form, the ranks of a worker have saved something together, as FSDP2's DTensors."""
    return any(re.fullmatch(r"rank_\d+", key) for key in saved)


def _common(memory: Memory, context: Context, kind: str) -> dict[str, Any]:
    saved: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "saef": version("saef"),
        "parameters": _shapes(context),
        "settings": _settings(context),
        "world_size": context.transport.size,
        "strategy": context.placement.strategy,
        "steps": memory.steps,
        "steps_skipped": memory.skipped,
        "steps_skipped_in_a_row": memory.skipped_in_a_row,
        "momentum": len(memory.m) > 0,
        "outer_momentum": memory.m_decay.numel() > 0,
    }
    if context.node.size > 1:
        saved["ranks_a_node"] = context.node.size
    return saved


def _shapes(context: Context) -> dict[str, list[int]]:
    return {n: list(p.shape) for n, p in zip(context.weights.names, context.weights.parameters, strict=True)}


def _strides(context: Context) -> dict[str, list[int]]:
    return {n: list(p.stride()) for n, p in zip(context.weights.names, context.weights.parameters, strict=True)}


def _settings(context: Context) -> dict[str, str]:
    """What decides the meaning of what is saved. The rest may be changed when training goes on."""
    s = context.settings
    more = {} if isinstance(context.rule, SGD) else {"rule": _name(context)}
    if s.outer is not None:
        more["outer"] = repr(s.outer)
    return more | {
        "compressor": repr(s.compressor),
        "server_compressor": repr(s.reply_compressor),
        "weight_decay_mode": s.weight_decay_mode,
        "dtype": str(context.weights.dtype),
    }


def _name(context: Context) -> str:
    """Of the rule; of whose difference."""
    rule = context.rule
    return f"Difference of {rule.optimizer}" if isinstance(rule, Difference) else type(rule).__name__


ByName = Callable[[Tensor], dict[str, Tensor]]  # a flat vector by parameter


def _workers(memory: Memory, named: ByName) -> dict[str, Any]:
    held = (("e", memory.e), *zip(VECTORS, memory.m, strict=False))
    return {name: named(v) for name, v in held if v.numel()}


def _alike(memory: Memory, named: ByName) -> dict[str, Any]:
    """What all workers have alike, besides x."""
    return {name: named(v) for name, v in (("m_decay", memory.m_decay), ("outer", memory.outer)) if v.numel()}


def _named(context: Context, cut: Callable[[Tensor], list[Tensor]], flat: Tensor) -> dict[str, Tensor]:
    return dict(zip(context.weights.names, cut(flat), strict=True))


@torch.no_grad()
def load(saved: Mapping[str, Any], memory: Memory, context: Context) -> Saved | None:
    """What `SAEFState.load_state_dict` does with what `check` has let pass, when no step is under way.

    Returns:
        What the optimizer shall load, if it makes its own steps.
    """
    weights, transport = context.weights, context.transport
    consolidated = saved["kind"] == "consolidated"
    own = saved["workers"] if consolidated else {**saved[_keys(context)[0]], **saved[_keys(context)[1]]}
    weights.absorb()
    weights.write([saved["x"][name] for name in weights.names])
    if "x_part" in own:
        _write(context, weights.flat, own["x_part"])
    memory.grow(len(_vectors(saved, context)), saved["outer_momentum"])
    kept = [(m, own.get(key)) for key, m in zip(VECTORS, memory.m, strict=False)]
    alike = [(v, own.get(k, saved.get(k))) for v, k in ((memory.m_decay, "m_decay"), (memory.outer, "outer"))]
    for flat, values in ((memory.e, own.get("e")), *kept, *alike):
        flat.zero_()
        if values is not None:
            _write(context, flat, values)
    if memory.e_server.numel():
        if consolidated:
            server = torch.empty_like(weights.flat)
            _write(context, server, saved["e_server"])
            for where, part in own_server_errors(server, context.placement):
                memory.e_server[where] = part
        else:
            memory.e_server.copy_(own["e_server"])
    if not consolidated:
        torch.set_rng_state(own["random"].cpu())
        if "random_cuda" in own and weights.device.type == "cuda":
            torch.cuda.set_rng_state(own["random_cuda"].cpu(), weights.device)
    counted_from = saved["steps"] if consolidated else own["counted_from"]
    memory.count_from(saved["steps"], saved["steps_skipped"], saved["steps_skipped_in_a_row"], counted_from)
    transport.restore_counts({} if consolidated else own["bytes"])
    rounds: Saved | None = own.get("rounds")
    return rounds


def _write(context: Context, flat: Tensor, values: Mapping[str, Tensor]) -> None:
    weights = context.weights
    for i, (name, view) in enumerate(zip(weights.names, weights.cut(flat), strict=True)):
        view.copy_(weights.part_of(i, values[name]))


def check(saved: Mapping[str, Any], memory: Memory, context: Context) -> None:
    """Raise ValueError unless `saved` fits."""
    if not isinstance(saved, Mapping) or saved.get("kind") not in ("rank", "consolidated"):
        raise ValueError("not the state of a SAEFState: expected what state_dict() or consolidated_state_dict() gave")
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint has format {saved.get('format')} and was written by saef {saved.get('saef')}; saef "
            f"{version('saef')} reads format {FORMAT}: install the version that wrote it, or a newer one"
        )
    _complete(saved, COMMON)
    shapes = _shapes(context)
    _refuse("the checkpoint is of another model", saved["parameters"], shapes)
    advice = "to go on from its weights with others, load it into a state with its own, flush() and save the model"
    theirs, ours = ({"rule": "SGD", **settings} for settings in (saved["settings"], _settings(context)))
    _refuse(f"the checkpoint is of other settings ({advice})", theirs, ours)
    workers = saved.get("workers") if saved["kind"] == "consolidated" else _rank_part(saved, memory, context)
    held = {**saved, **(workers or {})}
    expected = {key: held.get(key) for key in ("x", *_vectors(saved, context))}
    if saved["outer_momentum"]:
        expected["m_decay"] = held.get("m_decay")
    if context.settings.outer is not None:
        expected["outer"] = held.get("outer")
    if context.settings.feedback:
        expected["e"] = held.get("e")
    if context.serves_with_error and saved["kind"] == "consolidated":
        expected["e_server"] = saved.get("e_server")
    if not context.rule.of_gradients:
        _check_rounds((workers or {}).get("rounds"), context.settings.local_steps)
    for what, tensors in expected.items():
        if not _fits(tensors, context):
            raise ValueError(f"the checkpoint is damaged: its {what!r} is missing or not of the parameters' shapes")


def _fits(tensors: object, context: Context) -> bool:
    """Whether there is a tensor for each parameter, of its shape, or of that of this rank's part."""
    weights = context.weights
    every = zip(weights.names, weights.parameters, weights.held, strict=True)
    allowed = {name: {p.shape, own.shape} for name, p, own in every}
    return (
        isinstance(tensors, Mapping)
        and tensors.keys() == allowed.keys()
        and all(v.shape in allowed[name] for name, v in tensors.items())
    )


def _check_rounds(rounds: Mapping[str, Any] | None, local_steps: int) -> None:
    if not isinstance(rounds, Mapping) or not {"done", "optimizer", "own"} <= {*rounds}:
        raise ValueError(
            "the checkpoint is damaged: its 'rounds', with the optimizer's state, is missing or incomplete"
        )
    there = entries_of(rounds["optimizer"])
    gone = [name for name, of in json.loads(rounds.get("entries", "{}")).items() if not {*of} <= {*there.get(name, ())}]
    if gone or (rounds["done"] and "X" not in rounds):
        raise ValueError(
            f"the optimizer's state of {gone[:5] or 'a round under way'} is missing: torch.distributed.checkpoint "
            "fills only what a state has already, and an optimizer that steps by itself has nothing before its first "
            "step. Save with saef.save_checkpoint, or torch.save(state.state_dict()), between two rounds or within one"
        )
    if rounds["done"] >= local_steps:
        raise ValueError(
            f"the checkpoint is of a round with {rounds['done']} local steps behind it, and here local_steps is "
            f"{local_steps}: load it with more of them, and change local_steps after a checkpoint between two rounds"
        )


def _vectors(saved: Mapping[str, Any], context: Context) -> Sequence[str]:
    """The names of the rule's vectors in a checkpoint."""
    return VECTORS[: len(context.rule.names)] if saved["momentum"] else ()


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


def _rank_part(saved: Mapping[str, Any], memory: Memory, context: Context) -> Mapping[str, Any]:
    """This rank's part of a rank form."""
    size, of_a_node = context.transport.size, context.node.size
    now, then = (size, context.placement.strategy), (saved["world_size"], saved["strategy"])
    if now != then or saved.get("ranks_a_node", 1) != of_a_node:
        nodes = f" of {saved.get('ranks_a_node', 1)} ranks each, and of {of_a_node} here" if of_a_node > 1 else ""
        raise ValueError(
            f"this is the state of one of {then[0]} ranks with exchange={then[1]!r}{nodes}, here are {now[0]} with "
            f"{now[1]!r}, and errors belong to ranks: {LOAD_CONSOLIDATED}"
        )
    worker, own = _keys(context)
    if is_joint(saved) != (worker != own or of_a_node == 1):
        raise ValueError(
            f"the ranks of a node had other parts of the parameters (FSDP2's shards, or ours): {LOAD_CONSOLIDATED}"
        )
    if missing := [key for key in (worker, own) if key not in saved]:
        found = [name for name in saved if name.startswith("rank_")]
        raise ValueError(
            f"this is the state of {', '.join(found)}, here is {missing[0].replace('_', ' ')}: each rank loads its own"
            ". What one rank saves for all (as fabric.save does) has the errors of that rank alone: use "
            f"saef.save_checkpoint and load_checkpoint, or {LOAD_CONSOLIDATED}"
        )
    mine: Mapping[str, Any] = {**saved[worker], **saved[own]}
    _complete(mine, OWN)
    if mine["strides"] != _strides(context):
        raise ValueError(f"the parameters had another memory format, and blocks follow memory: {LOAD_CONSOLIDATED}")
    if memory.e_server.numel() and [*saved["parameters"]] != [*_shapes(context)]:
        raise ValueError(f"the parameters have another order here, in which server errors lie: {LOAD_CONSOLIDATED}")
    server = mine.get("e_server", torch.empty(0, device="cpu"))
    if server.numel() != memory.e_server.numel():
        raise ValueError("the checkpoint is damaged: its 'e_server' is missing or not of this rank's size")
    return mine
