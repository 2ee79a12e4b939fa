"""What FSDP2 has made of a model: `fully_shard`, or `replicate`, of which `saef.step.replicate` has more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from . import replicate


def is_dtensor(tensor: Tensor) -> bool:
    """By name: importing FSDP takes as long as half of torch."""
    return type(tensor).__name__ == "DTensor"


def modules_of(model: nn.Module) -> list[Any]:
    """Those that `fully_shard` or `replicate` was called for."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def groups_in(model: nn.Module) -> list[Any]:
    """The parameters that FSDP gathers and reduces together; none if it has nothing that is trained."""
    return _groups_of(modules_of(model)) if uses_fsdp(model) else []


def _groups_of(modules: Iterable[Any]) -> list[Any]:
    states = [module._get_fsdp_state() for module in modules]
    found = [s._fsdp_param_groups if hasattr(s, "_fsdp_param_groups") else [s._fsdp_param_group] for s in states]
    return list({id(group): group for groups in found for group in groups if group is not None}.values())


def lay_down(modules: Iterable[Any]) -> None:
    """Have them hold their parameters, not what FSDP has gathered."""
    for module in modules:
        module.reshard()


def uses_fsdp(model: nn.Module) -> bool:
    """Whether it has what is trained."""
    return any(map(is_dtensor, _trained(model)))


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank has but shards of what is trained."""
    return any(p.placements[0].is_shard() for p in _trained(model) if is_dtensor(p))


def check_reduced(modules: Iterable[Any], parameters: Sequence[Tensor]) -> None:
    """After a backward: raise RuntimeError if FSDP has not made p.grad what saef takes it for."""
    groups = _groups_of(modules)
    if any(map(_holds_back, groups)) or all(p.grad is None for p in parameters):
        raise RuntimeError(
            "there are gradients that FSDP has not reduced, or none at all: they would count as zeros. Before the "
            "backward of a step's last micro-batch call model.set_requires_gradient_sync(True), of the whole model"
        )
    if _has_factor(groups):
        raise RuntimeError(replicate.FACTOR)
    replicate.check_taken(groups)


def _has_factor(groups: Iterable[Any]) -> bool:
    """Whether gradients of sharded ones are divided by something else than the ranks of the node."""
    return any(g.mesh_info.shard_mesh_dim is not None and g.gradient_divide_factor is not None for g in groups)


def _holds_back(group: Any) -> bool:
    """Whether it accumulates gradients of its own, without reducing them."""
    waiting = [] if group.reduce_grads else group.fsdp_params
    own = (getattr(p, "_unsharded_param", None) for p in waiting)  # there is none before the first forward
    return any(p.unsharded_accumulated_grad is not None for p in waiting) or any(
        p is not None and p.grad is not None for p in own
    )


def check_fsdp(model: nn.Module, mesh: Any, process_group: Any) -> None:
    """Raise TypeError or ValueError unless each parameter is whole, or all are sharded, or all replicated, as saef can.

    Args:
        mesh: [nodes, ranks a node], or None. process_group: as the user gave it, or None.
    """
    named: list[tuple[str, Any]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    held = [(name, p) for name, p in named if is_dtensor(p)]
    if not held:
        return
    groups = groups_in(model)
    if replicated := replicate.replicated(groups):
        replicate.check(replicated, held, mesh, process_group)
    else:
        _check_sharded(held, mesh)
        if _has_factor(groups):
            raise ValueError(replicate.FACTOR)
    if whole := [name for name, p in named if not is_dtensor(p)]:
        raise ValueError(
            f"parameters {whole[:5]} are not sharded or replicated, while others are: nothing would reduce their "
            "gradients. Call fully_shard or replicate for the whole model too, without ignored_params"
        )


def _check_sharded(named: Sequence[tuple[str, Any]], mesh: Any) -> None:
    """All over the inner axis of `mesh`."""
    if mesh is None:
        raise TypeError(
            f"parameter {named[0][0]} is a DTensor (FSDP2, tensor parallelism). With FSDP2 shard within the nodes, "
            'fully_shard(module, mesh=mesh["shard"]), and give SAEFState the whole mesh: mesh=saef.node_mesh(device). '
            "Else use replicate or DistributedDataParallel"
        )
    ranks = mesh.mesh[mesh.get_local_rank(0)].tolist()
    for name, p in named:
        if p.device_mesh.ndim != 1 or p.device_mesh.mesh.tolist() != ranks or not p.placements[0].is_shard():
            raise ValueError(
                f"parameter {name} is {p.placements} over ranks {p.device_mesh.mesh.tolist()}, but this rank's node in "
                f"`mesh` has ranks {ranks}: shard within the nodes alone, with the inner axis of the mesh that "
                'SAEFState gets, fully_shard(module, mesh=mesh["shard"]); saef exchanges between them. Tensor '
                "parallelism is not for saef"
            )


def _trained(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]
