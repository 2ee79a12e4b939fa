"""What the parameters were when a state was made, and whether they still are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

SHARDED = ("DTensor", "FlatParameter")
AGAIN = "wrap the model and create SAEFState again after that (load_state_dict takes over what a state_dict still fits)"


@final
class Watch:
    """Compared at the beginning of every step: what is trained, in which group, of what kind, and where it lies.

    All ranks run one script, so they raise together. Not followed in silence: a parameter that DDP, the optimizer and
    this state do not all know alike lets ranks diverge.

    Args:
        model: as the state got it.
        names, parameters: what it trains.
        optimizer: whose groups they are in.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self._model, self._names, self._parameters = model, names, parameters
        self._ids, self._kinds = [id(p) for p in parameters], [_kind(p) for p in parameters]
        self._groups = groups_of(optimizer)

    def check(self) -> None:
        """Raise RuntimeError, naming the parameters, if anything but their values has changed."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if [id(p) for p in trained] != self._ids:
            known = {*self._ids}
            frozen = [n for n, p in zip(self._names, self._parameters, strict=True) if not p.requires_grad]
            news = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in known]
            raise RuntimeError(
                f"the trainable parameters changed: {frozen[:5]} were frozen, {news[:5]} are new or were unfrozen, or "
                f"a part of the model was replaced. Gradients would be lost, and weights drift apart: {AGAIN}"
            )
        kinds = [_kind(p) for p in self._parameters]
        if kinds != self._kinds:
            both = zip(self._names, self._kinds, kinds, strict=True)
            name, before, now = next((name, a, b) for name, a, b in both if a != b)
            raise RuntimeError(
                f"parameter {name} is another tensor now, {_words(now)}, and was {_words(before)}: to(dtype), "
                f"to(memory_format=...) and other storage with gaps are not followed; {AGAIN}"
            )
        check_apart(self._names, self._parameters)

    def is_moved_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer would move one of these parameters."""
        known = {*self._ids}
        return any(id(p) in known and p.grad is not None for group in optimizer.param_groups for p in group["params"])

    def check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RuntimeError if the optimizer's groups have other parameters, or the same in other places."""
        if groups_of(optimizer) != self._groups:
            raise RuntimeError(f"the optimizer's parameters changed, or their groups: {AGAIN}")


def groups_of(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Each group's parameters, by id."""
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def check_apart(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError if two parameters begin at one place in memory."""
    places = [p.data_ptr() for p in parameters if p.numel()]
    if len({*places}) < len(places):
        found: dict[int, str] = {}
        for name, p in zip(names, parameters, strict=True):
            if p.numel() and found.setdefault(p.data_ptr(), name) != name:
                raise RuntimeError(
                    f"parameters {found[p.data_ptr()]} and {name} are tied through .data: two parameters in one memory "
                    "get two gradients and two errors, and the memory one of them. Tie them by assigning the parameter "
                    "itself (decoder.weight = encoder.weight)"
                )


def check_model(model: nn.Module, process_group: Any) -> None:
    """Raise TypeError or ValueError on what no step could honour."""
    for name, p in model.named_parameters():
        if type(p).__name__ in SHARDED:  # by name: importing them takes as long as half of torch
            raise TypeError(
                f"parameter {name} is a {type(p).__name__} (FSDP, tensor parallelism): saef needs whole parameters on "
                "every rank. Use DistributedDataParallel"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(
                f"{name or type(module).__name__} has max_norm={module.max_norm}: its forward writes to its weight, "
                "which is x_half then, and the change would be lost. Clamp the weight after optimizer.step() instead"
            )
    of_model = getattr(model, "process_group", None)
    if process_group is not None and of_model is not None and process_group is not of_model:
        ours, theirs = (torch.distributed.get_process_group_ranks(g) for g in (process_group, of_model))
        if ours != theirs:
            raise ValueError(
                f"process_group has ranks {ours}, DistributedDataParallel's has {theirs}: gradients would be exchanged "
                "among other ranks than the model is. Leave process_group out"
            )


def _kind(p: Tensor) -> tuple[Any, ...]:
    return p.dtype, p.device, p.shape, p.stride()


def _words(kind: tuple[Any, ...]) -> str:
    dtype, device, shape, stride = kind
    return f"{dtype} on {device} of shape {tuple(shape)} and strides {stride}"
