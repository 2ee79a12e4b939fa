"""What the parameters were when a state was laid out, and what has changed since."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.nn.parallel import DistributedDataParallel

from .weights import Weights, held

_TRAINED = attrgetter("requires_grad")
_VALUES = methodcaller("values")  # of dictionaries, and of what TorchScript has in their place


@final
class Watch:
    """Compared at the beginning of every step: what is trained, in which group, of what kind, and where it lies.

    A parameter that DDP, the optimizer and this state do not all know alike would let ranks diverge without a word.

    Args:
        model: as the state got it.
        weights: of what it trains.
        optimizer: whose groups they are in.
    """

    def __init__(self, model: nn.Module, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        self._names, self._parameters = weights.names, weights.parameters
        self._model = weakref.ref(model)  # which DDP's reducer keeps the state for, unseen by the garbage collector
        self._every = [*model.parameters()]
        self._insides: list[dict[str, Any]] = []
        for module in model.modules():
            self._insides += [module._parameters, module._modules]
        self._filled = [inside for inside in self._insides if inside]
        self._frozen = [p for p in self._every if not p.requires_grad]
        self._tree, self._kinds, self._strides = self._tree_now(), self._kinds_now(), self._strides_now()
        self._groups, self._lists = _groups_of(optimizer), _lists_of(optimizer)
        self._fast, self._places = self._guards(), weights.look()
        check_apart(self._names, self._parameters)

    @property
    def model(self) -> nn.Module:
        """As given; it is there as long as it is called."""
        found = self._model()
        if found is None:
            raise RuntimeError("the model that this state was made with is gone")
        return found

    # Lists of numbers and words: ten thousand tuples would have Python collect its garbage.

    def _guards(self) -> Any:
        """What torch.compile looks at before it runs again what it has made of tensors: in C++, and in one call."""
        return TensorGuards(*self._parameters, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def _tree_now(self) -> list[Any]:
        """What is where; of the parameters that were trained, `_fast` sees whether they are."""
        inside = [*map(id, chain.from_iterable(map(_VALUES, self._filled)))]
        return [inside, [*map(len, self._insides)], [*map(_TRAINED, self._frozen)]]

    def _kinds_now(self) -> list[Any]:
        every = self._parameters
        return [[p.dtype for p in every], [p.device for p in every], [p.shape for p in every]]

    def _strides_now(self) -> list[tuple[int, ...]]:
        return [*map(Tensor.stride, self._parameters)]

    def changes(self, optimizer: torch.optim.Optimizer, places: list[int]) -> str:
        """What a state can follow, in words; empty if nothing has changed.

        Args:
            places: where the parameters lie now.

        Raises:
            RuntimeError: on what it cannot follow, naming the parameters.
        """
        same = self._fast.check(*self._parameters)
        found = self._in_and_out() if not same or self._tree_now() != self._tree else []
        self._check_kinds(same, places)
        if not same and self.relaid:
            both = zip(self._names, self._parameters, self._strides, strict=True)
            moved = [n for n, p, strides in both if p.stride() != strides]
            found.append(f"{_some(moved)} lie in memory in another way")
        self._lists = _lists_of(optimizer)
        if _groups_of(optimizer) != self._groups:
            found.append("the optimizer's groups are others")
        return ", ".join(found)

    def all_frozen(self) -> bool:
        """Whether nothing of the model is trained just now. The first parameter tells, mostly."""
        return not self._parameters[0].requires_grad and not any(map(_TRAINED, self.model.parameters()))

    def _in_and_out(self) -> list[str]:
        model = self.model
        if any(not isinstance(p, nn.Parameter) for p in model.parameters()):
            raise RuntimeError(
                "the model holds other tensors in its parameters' place during this forward, as in "
                "torch.func.functional_call: their gradients are not the parameters'. Call functional_call within the "
                "forward of the module that is wrapped, or give it a copy of the model (copy.deepcopy)"
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        if [*map(id, trained)] == [*map(id, self._parameters)]:  # modules that train nothing
            return []
        before, after = {*map(id, self._parameters)}, {*map(id, trained)}
        gone = [n for n, p in zip(self._names, self._parameters, strict=True) if id(p) not in after]
        new = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in before]
        waits = isinstance(model, DistributedDataParallel) and (model.static_graph or not model.find_unused_parameters)
        if gone and waits:
            raise RuntimeError(
                f"parameters {_some(gone)} were frozen or replaced, but DistributedDataParallel waits for their "
                "gradients in every backward: give it find_unused_parameters=True (without static_graph), or wrap the "
                "model and create SAEFState again after freezing"
            )
        words = [(gone, "are frozen or gone"), (new, "are trained from now on")]
        return [f"{_some(names)} {what}" for names, what in words if names] or ["the parameters' order is another"]

    @property
    def relaid(self) -> bool:
        """Whether some lie in memory in another way: channels_last, or with gaps."""
        return self._strides_now() != self._strides

    def check_kinds(self, places: list[int]) -> None:
        """Raise RuntimeError if x cannot be taken from the parameters, now at these places: they lie in another way."""
        self._check_kinds(self._fast.check(*self._parameters), places)
        if self.relaid:
            raise RuntimeError(
                "parameters were laid out anew in memory, as by to(memory_format=...), which the next training forward "
                "follows: save the state before the change, or after that forward"
            )

    def _check_kinds(self, same: bool, places: list[int]) -> None:
        """Raise RuntimeError if a parameter is another tensor, or lies where another does. same: as `_fast` finds."""
        if not same:
            self._compare_kinds()
            if not self.relaid:  # then it was something else, such as autocast around the forward
                self._fast = self._guards()
        if places != self._places:
            check_apart(self._names, self._parameters)
            self._places = places

    def _compare_kinds(self) -> None:
        kinds = self._kinds_now()
        if kinds != self._kinds:
            both = zip(self._names, zip(*self._kinds, strict=True), zip(*kinds, strict=True), strict=True)
            name, before, now = next((name, a, b) for name, a, b in both if a != b)
            raise RuntimeError(
                f"parameter {name} is another tensor now, {_words(*now)}, and was {_words(*before)}: dtype, device and "
                "shape must stay; convert the model, wrap it and create SAEFState again (load_state_dict takes over "
                "what a state_dict still fits)"
            )

    def is_moved_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer would move one of these parameters."""
        known = {*map(id, self._parameters)}
        return any(id(p) in known and p.grad is not None for group in optimizer.param_groups for p in group["params"])

    def check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RuntimeError if the optimizer's groups are others than `changes` found, or longer or shorter."""
        if _lists_of(optimizer) != self._lists:
            raise RuntimeError(
                "the optimizer's parameters changed between a forward and step(), or their groups: change them after "
                "step(), before the next forward"
            )


def check_apart(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError if two parameters begin at one place in memory."""
    places = [p.data_ptr() for p in map(held, parameters) if p.numel()]
    if len({*places}) < len(places):
        found: dict[int, str] = {}
        for name, p in zip(names, map(held, parameters), strict=True):
            if p.numel() and found.setdefault(p.data_ptr(), name) != name:
                raise RuntimeError(
                    f"parameters {found[p.data_ptr()]} and {name} are tied through .data: two parameters in one memory "
                    "get two gradients and two errors, and the memory one of them. Tie them by assigning the parameter "
                    "itself (decoder.weight = encoder.weight)"
                )


def check_model(model: nn.Module, process_group: Any) -> None:
    """Raise TypeError or ValueError on what no step could honour."""
    for name, p in model.named_parameters():
        if type(p).__name__ == "FlatParameter":  # by name: importing it takes as long as half of torch
            raise TypeError(
                f'parameter {name} is FSDP1\'s FlatParameter: use FSDP2, fully_shard(module, mesh=mesh["shard"]) and '
                "SAEFState(..., mesh=mesh), or DistributedDataParallel"
            )
    if isinstance(model, torch.jit.ScriptModule) or isinstance(getattr(model, "module", None), torch.jit.ScriptModule):
        raise TypeError(
            "a scripted module takes no hooks: give DistributedDataParallel a module that holds it, such as "
            "nn.Sequential(scripted)"
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


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError if the optimizer makes the ranks alike by itself: saef would have nothing to exchange."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if hasattr(optimizer, "skip_synchronize"):
        raise TypeError(
            "Horovod's DistributedOptimizer averages gradients itself: give SAEFCompression the optimizer inside, and "
            "hvd.DistributedOptimizer that compression (saef.integrations.horovod)"
        )
    if found := names & {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"}:
        raise TypeError(
            f"{found.pop()} makes the ranks' parameters alike itself, as saef does: give SAEFState the optimizer that "
            "it is made of"
        )


def check_moment(device: torch.device) -> None:
    """Raise RuntimeError where a training forward cannot step ahead."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a training forward of the wrapped model is being captured into a CUDA graph, which would replay it "
            "without saef's part of the step: capture parts of the model with torch.cuda.make_graphed_callables, or "
            'use torch.compile(mode="reduce-overhead")'
        )
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the wrapped model is run again within a backward, at x_half, while its first forward was at x without "
            "gradients: that is reentrant activation checkpointing around it. Use torch.utils.checkpoint with "
            "use_reentrant=False, or checkpoint parts of the model"
        )


def _groups_of(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Each group's parameters, by id."""
    return [[*map(id, group["params"])] for group in optimizer.param_groups]


def _lists_of(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Each group's list, by id, and its length: at no cost, and another after whatever is done to groups as a whole."""
    return [(id(group["params"]), len(group["params"])) for group in optimizer.param_groups]


def _words(dtype: torch.dtype, device: torch.device, shape: torch.Size) -> str:
    return f"{dtype} on {device} of shape {tuple(shape)}"


def _some(names: Sequence[str]) -> str:
    return f"{[*names[:5]]}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
