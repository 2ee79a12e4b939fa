"""x and x_half of a model that FSDP2 has sharded within a node: each rank has its shards of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from .ways import Copying


@final
class Shards(Copying):
    """`flat` is x of this rank's shards; `parameters` are DTensors over the node's ranks.

    FSDP gathers the shards before a forward and a backward, and may keep what it has gathered: that is dropped whenever
    the shards become x_half, or x.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: float) -> None:
        self._modules = _sharded_modules(model)
        super().__init__(model, optimizer, s)

    @property
    def held(self) -> list[Tensor]:
        return [p._local_tensor for p in self.parameters]  # type: ignore[attr-defined]  # FSDP may replace it

    def rest(self) -> None:
        for module in self._modules:
            module.reshard()

    def check_reduced(self) -> None:
        if any(map(_holds_back, self._modules)) or all(p.grad is None for p in self.parameters):
            raise RuntimeError(
                "there are gradients that FSDP has not reduced, or none at all: they would count as zeros. Before the "
                "backward of a step's last micro-batch call model.set_requires_gradient_sync(True), of the whole model"
            )

    def _show_half(self) -> None:
        self.rest()
        self._copy_half()

    def _show_x(self) -> None:
        self.rest()
        self._copy_x()

    def write(self, x: Sequence[Tensor]) -> None:
        super().write([self.part_of(i, value) for i, value in enumerate(x)])

    @torch.no_grad()
    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like: Any = self.parameters[i]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def part_of(self, i: int, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        like: Any = self.parameters[i]
        if isinstance(value, DTensor):
            if (value.device_mesh, value.placements) != (like.device_mesh, like.placements):
                raise ValueError(
                    f"{self.names[i]} is sharded over {value.device_mesh}, {value.placements} in the checkpoint, and "
                    f"over {like.device_mesh}, {like.placements} here: load it with torch.distributed.checkpoint into "
                    "state_dict() or consolidated_state_dict(), which shards it anew"
                )
            return value._local_tensor
        shape, start = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        if value.shape == torch.Size(shape):
            return value
        return value[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Those that `fully_shard` was called for. By name: importing FSDP takes as long as half of torch."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def _holds_back(module: Any) -> bool:
    """Whether it accumulates gradients of its own, without reducing them."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    waiting = [p for group in groups if group is not None and not group.reduce_grads for p in group.fsdp_params]
    own = (getattr(p, "_unsharded_param", None) for p in waiting)  # there is none before the first forward
    return any(p.unsharded_accumulated_grad is not None for p in waiting) or any(
        p is not None and p.grad is not None for p in own
    )


def lay_down(model: nn.Module) -> None:
    """Have its modules hold shards, not what FSDP has gathered."""
    for module in _sharded_modules(model):
        module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded it."""
    return any(type(p).__name__ == "DTensor" for p in model.parameters())


def check_sharded(model: nn.Module, mesh: Any) -> None:
    """Raise TypeError or ValueError unless every parameter is whole, or all are sharded over the inner axis of `mesh`.

    Args:
        mesh: [nodes, ranks a node], or None.
    """
    named: list[tuple[str, Any]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sharded = [(name, p) for name, p in named if type(p).__name__ == "DTensor"]  # importing it takes long
    if not sharded:
        return
    name, p = sharded[0]
    if mesh is None:
        raise TypeError(
            f"parameter {name} is a DTensor (FSDP2, tensor parallelism). With FSDP2 shard within the nodes, "
            'fully_shard(module, mesh=mesh["shard"]), and give SAEFState the whole mesh: mesh=saef.node_mesh(device). '
            "Else use DistributedDataParallel"
        )
    ranks = mesh.mesh[mesh.get_local_rank(0)].tolist()
    for name, p in sharded:
        if p.device_mesh.ndim != 1 or p.device_mesh.mesh.tolist() != ranks or not p.placements[0].is_shard():
            raise ValueError(
                f"parameter {name} is {p.placements} over ranks {p.device_mesh.mesh.tolist()}, but this rank's node in "
                f"`mesh` has ranks {ranks}: shard within the nodes alone, with the inner axis of the mesh that "
                'SAEFState gets, fully_shard(module, mesh=mesh["shard"]); saef exchanges between them. Tensor '
                "parallelism and FSDP's own replicate are not for saef"
            )
    if whole := [name for name, p in named if type(p).__name__ != "DTensor"]:
        raise ValueError(
            f"parameters {whole[:5]} are not sharded, while others are: nothing would reduce their gradients within "
            'the node. Shard the whole model too, fully_shard(model, mesh=mesh["shard"]), without ignored_params'
        )
