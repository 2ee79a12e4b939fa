"""Who one worker is: the ranks that it is made of, what each has of the model, and what carries bytes to the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..comm.node import Node, check_mesh
from ..comm.torch_transport import TorchTransport, checked
from ..comm.transport import Transport
from .fsdp import check_fsdp, groups_in, is_sharded, lay_down, modules_of, uses_fsdp
from .parts import Parts
from .replicate import process_group_of
from .shards import Shards
from .watch import check_model
from .ways import create
from .weights import Weights


class Joining(NamedTuple):
    """What `saef.SAEFState` was given of it: one of these, or none."""

    mesh: DeviceMesh | None
    process_group: torch.distributed.ProcessGroup | None
    transport: Transport | Node | None

    def check(self, model: nn.Module) -> None:
        """Raise TypeError or ValueError on a model that these ranks could not train, or if they are none."""
        if self.process_group is not None:
            checked(self.process_group)
        if not (self.transport is None or isinstance(self.transport, Node) or hasattr(self.transport, "all_to_all")):
            raise TypeError(
                "transport must be a saef.comm.transport.Transport, or a saef.comm.node.Node of two, got "
                f"{self.transport!r}; leave it out for torch.distributed's process groups"
            )
        lay_down(modules_of(model))
        check_model(model, self.process_group)
        if self.mesh is not None:
            check_mesh(self.mesh)
        check_fsdp(model, self.mesh, self.process_group)
        if sum(given is not None for given in self) > 1:
            raise ValueError("give a mesh, a process_group or a transport: each says who the ranks are")

    def weights_of(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> Weights:
        """What this rank has of them. s: the step-ahead coefficient."""
        if is_sharded(model):
            return Shards(model, optimizer, s)
        place, size = self._place
        return Parts(model, optimizer, s, place, size) if size > 1 else create(model, optimizer, s)

    @property
    def _place(self) -> tuple[int, int]:
        """This rank's number among those of its worker, and how many they are, to cut parameters."""
        if self.mesh is not None:
            return self.mesh.get_local_rank(1), self.mesh.size(1)
        if isinstance(self.transport, Node) and not self.transport.in_parts:
            return self.transport.place, self.transport.size
        return 0, 1

    def group(self, model: nn.Module) -> torch.distributed.ProcessGroup | None:
        """Over which the transport goes; None for the default."""
        return self.process_group or getattr(model, "process_group", None) or process_group_of(groups_in(model))

    def node(self, model: nn.Module, device: torch.device, of_gradients: bool) -> Node:
        """The ranks that are this worker, and what carries bytes to the others. Collective.

        Args:
            device: of the weights. of_gradients: whether the rule is computed within saef.
        """
        if not of_gradients and uses_fsdp(model):
            raise ValueError(
                "FSDP2 and replicate are for SGD, AdamW and Adam with local_steps=1, whose steps are computed within "
                "saef: what other optimizers keep of a DTensor has no form in a checkpoint. Use DistributedDataParallel"
            )
        if isinstance(self.transport, Node):
            if self.transport.in_parts and not of_gradients:
                raise ValueError(
                    "where each rank has a part of its node's model, the optimizer is SGD, AdamW or Adam, with "
                    "local_steps=1: others, and local steps, need weights that are whole on each rank"
                )
            return self.transport
        if self.mesh is None:
            return Node(self.transport or TorchTransport(self.group(model), device), None, device)
        _check_nodes(model, self.mesh, device)
        between = TorchTransport(self.mesh.get_group(0), device)
        return Node(between, TorchTransport(self.mesh.get_group(1), device) if self.mesh.size(1) > 1 else None, device)


def _check_nodes(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Raise ValueError on what nodes cannot do."""
    if device.type == "meta":
        raise ValueError("the parameters are on meta: call to_empty() and load the weights before SAEFState is created")
    if mesh.device_type != device.type:
        raise ValueError(f"mesh is of {mesh.device_type} devices, and the parameters are on {device}")
    group = getattr(model, "process_group", None)
    ours = sorted(mesh.mesh.flatten().tolist())
    if group is not None and (theirs := sorted(torch.distributed.get_process_group_ranks(group))) != ours:
        raise ValueError(
            f"mesh has ranks {ours}, DistributedDataParallel's process group has {theirs}: gradients would be "
            "exchanged among other ranks than the model is. Give both the same ranks"
        )
