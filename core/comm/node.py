"""Nodes: ranks that a fast link joins, and that are one worker of Algorithm 1 together.

Of S ranks a node each has a part of every parameter, about 1/S, and exchanges it with the ranks of the same place in
the other nodes: `between`. What cannot be decided on a part is decided by the node, or by all ranks: `within`, and
`Everyone`.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .agreement import gather_values
from .transport import Gathers, Ordered, Purpose, Transport, end_all

T = TypeVar("T")


LAUNCHERS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # how many ranks a node has, as torchrun and deepspeed tell them


def node_mesh(device: torch.device | str, node_size: int | None = None) -> DeviceMesh:
    """A mesh of the job's nodes: [nodes, ranks a node], axes "replicate" and "shard".

    Collective, as `torch.distributed.device_mesh.init_device_mesh` is. A node's ranks follow each other, as launchers
    number them.

    Args:
        device: "cuda" or "cpu", where the parameters are.
        node_size: ranks a node; None: as many as torchrun or deepspeed has started on this machine.

    Raises:
        RuntimeError: without a process group, or without node_size and a launcher that says it.
        ValueError: if the ranks are no whole number of such nodes.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group() before saef.node_mesh()")
    ranks, size = torch.distributed.get_world_size(), node_size
    if size is None:
        found = next((os.environ[name] for name in LAUNCHERS if name in os.environ), None)
        if found is None:
            raise RuntimeError(
                f"saef.node_mesh() takes the ranks of a node from {' or '.join(LAUNCHERS)}, which torchrun and "
                "deepspeed set and which are not set here: start with one of them, or say node_size"
            )
        size = int(found)
    if size < 1 or ranks % size:
        raise ValueError(
            f"{ranks} ranks are no whole number of nodes of {size}: start as many ranks on each node, or say node_size"
        )
    return init_device_mesh(torch.device(device).type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


def check_mesh(mesh: Any) -> None:
    """Raise TypeError or ValueError unless `mesh` is one of nodes."""
    if not hasattr(mesh, "get_group") or not hasattr(mesh, "ndim"):
        raise TypeError(f"mesh must be saef.node_mesh(device), or another DeviceMesh of two axes, got {mesh!r}")
    if mesh.ndim != 2:
        raise ValueError(
            f"mesh must have two axes, [nodes, ranks a node], got one of {mesh.ndim}: give the mesh whose inner axis "
            'fully_shard() got, e.g. init_device_mesh(device, (nodes, gpus), mesh_dim_names=("replicate", "shard")); '
            "for a worker on each rank leave mesh out"
        )


@final
class Node:
    """The ranks that are one worker.

    Args:
        between: to the ranks of the same place in the other nodes.
        within: to the other ranks of this node; None where each rank is a worker.
        device: where messages live.
        in_parts: whether the model that each rank has is its part of the node's.

    Attributes:
        between, within, in_parts: as given.
        place, size: this rank's number among the ranks of its node, and how many they are, S.
        everyone: all ranks of all nodes.
    """

    def __init__(
        self, between: Transport, within: Transport | None, device: torch.device, in_parts: bool = False
    ) -> None:
        self.in_parts = in_parts
        self.between, self.within, self._device = between, within, device
        self.place, self.size = (0, 1) if within is None else (within.rank, within.size)
        self.everyone: Gathers = between if within is None else Everyone(between, within)
        both = [weakref.ref(one) for one in (between, within) if isinstance(one, Ordered)]
        for one in both if within is not None else ():
            if (transport := one()) is not None:
                transport.after_failure(partial(end_all, both))

    @property
    def part(self) -> str:
        """What to add to the name of something that ranks of different places have different."""
        return "" if self.size == 1 else f", part {self.place} of {self.size}"

    def gather(self, value: float) -> list[float]:
        """The value of each rank of the node, in order. Collective within it."""
        within = self.within
        return [value] if within is None else self.between.call(lambda: self._gather(within, value))

    def for_this_place(self, parts: Sequence[Tensor]) -> Tensor:
        """[S, n] what each rank of the node has for this place. Collective, in `Transport.call` or `submit`.

        Args:
            parts: for each place a vector, 1-D; all ranks have as long a one for the same place.
        """
        sizes = [part.numel() * part.element_size() for part in parts]
        message = torch.cat([*parts]).view(torch.uint8)
        if self.within is None:
            return message.view(1, -1).view(parts[0].dtype)
        return self.within.all_to_all(message, sizes, sizes[self.place], "phase1").view(parts[0].dtype)

    def every_part(self, part: Tensor) -> Tensor:
        """The vectors of all places, of one length, one after the other. Collective in the node, between steps."""
        if self.within is None:
            return part
        within, sizes = self.within, [part.numel() * part.element_size()] * self.size
        gathered = self.between.call(lambda: within.all_gather(part.view(torch.uint8), sizes, "phase2"))
        return gathered.view(part.dtype)

    def average(self, v: Tensor) -> Tensor:
        """v <- its mean over the ranks of the node, the same bits on each. Collective within it, between steps."""
        if (within := self.within) is not None:
            self.between.call(lambda: within.mean(v, "phase1"))
        return v

    def norm(self, values: Sequence[float]) -> float:
        """L2 norm of a vector, from those of its parts."""
        return math.hypot(*values)

    def together(self, work: Callable[[], list[str]]) -> list[str]:
        """The words of all ranks of the node. If `work` fails on one, all raise, once all have tried. Collective."""
        within = self.within
        if within is None:
            return work()
        words, failure = [], None
        try:
            words = work()
        except RuntimeError as error:
            failure = error
        if not any(within.call(lambda: self._gather(within, float(bool(words) or failure is not None)))):
            return []
        mine = [words, "" if failure is None else f"rank {self.place} of this node: {failure}"]
        found = within.call(lambda: gather_values(mine, within, self._device))
        if failure is not None:
            raise failure
        if problems := [problem for _, problem in found if problem]:
            raise RuntimeError("; ".join(problems))
        return [*dict.fromkeys(word for theirs, _ in found for word in theirs)]

    def _gather(self, within: Transport, value: float) -> list[float]:
        mine = torch.tensor([value], dtype=torch.float64, device=self._device).view(torch.uint8)
        found: list[float] = within.all_gather(mine, [8] * self.size, "settings").view(torch.float64).tolist()
        return found


@final
class Everyone:
    """All ranks of all nodes, node by node, as far as they gather something."""

    def __init__(self, between: Transport, within: Transport) -> None:
        self._between, self._within = between, within
        self.rank = between.rank * within.size + within.rank
        self.size = between.size * within.size

    def call(self, work: Callable[[], T]) -> T:
        return self._between.call(work)

    def meet(self, what: str) -> None:
        self._between.meet(what)
        self._within.meet(what)

    def all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Tensor:
        places, nodes = range(self._within.size), range(self._between.size)
        of = [sizes[place :: len(places)] for place in places]
        mine = self._between.all_gather(message, of[self._within.rank], purpose)
        lengths = [sum(n) for n in of]
        every = self._within.all_gather(mine, lengths, purpose).split(lengths)
        parts = [part.split(list(n)) for part, n in zip(every, of, strict=True)]
        return torch.cat([parts[place][node] for node in nodes for place in places])
