"""torch's `replicate` that is made of FSDP2: each rank has the whole model, and gradients are all-reduced.

saef takes the place of that all-reduce: while a state has the model, each rank's p.grad is its own. A group of FSDP's
whose `mesh_info` is of neither of the kinds that reduce does all else as before: precision of the gradients,
accumulation, hooks on p.grad.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor


@final
class _Own:
    """In an all-reduce's place: this rank's gradient, as it counts in the mean.

    Attributes:
        mesh_info, factor: the group's before. factor: what replicate divides the sum of gradients by; None: the ranks.
    """

    def __init__(self, group: Any) -> None:
        self.mesh_info, self.factor = group.mesh_info, group.gradient_divide_factor

    def __call__(self, gradient: Tensor) -> None:
        if gradient.is_cuda:  # or the next group would take its memory, in the stream that made it, while it is read
            gradient.record_stream(torch.cuda.current_stream())
        if self.factor is not None:
            gradient.mul_(self.mesh_info.mesh.size() / self.factor)


def replicated(groups: Iterable[Any]) -> list[Any]:
    """Those of `replicate`, whether or not their all-reduce has been taken out."""
    return [group for group in groups if group.mesh_info.shard_mesh_dim is None]


def take_out(groups: Iterable[Any]) -> None:
    """Have them leave each rank its own gradients."""
    for group in replicated(groups):
        if not isinstance(group._all_reduce_hook, _Own):
            from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo

            group._all_reduce_hook, group.gradient_divide_factor = _Own(group), None
            group.mesh_info = DataParallelMeshInfo(group.mesh_info.mesh, replicate_mesh_dim=0)


def give_back(groups: Iterable[Any]) -> None:
    """Have them all-reduce again, as if they had never stopped."""
    for group in groups:
        if isinstance(own := group._all_reduce_hook, _Own):
            group.mesh_info, group.gradient_divide_factor, group._all_reduce_hook = own.mesh_info, own.factor, None


def factor_of(group: Any) -> float | None:
    """What `set_gradient_divide_factor` was called with, if it was."""
    own = group._all_reduce_hook
    factor: float | None = own.factor if isinstance(own, _Own) else group.gradient_divide_factor
    return factor


def process_group_of(groups: Iterable[Any]) -> torch.distributed.ProcessGroup | None:
    """Of the ranks that have one model; None if it is not replicated."""
    return next((group.mesh_info.mesh.get_group() for group in replicated(groups)), None)


def check(groups: Sequence[Any], named: Sequence[tuple[str, Any]], mesh: Any, process_group: Any) -> None:
    """Raise ValueError unless saef can take out the all-reduce, among the ranks that are to be alike.

    Args:
        groups: all that are replicated. named: names and DTensors of what is trained.
        mesh, process_group: what the state is to have, or None.
    """
    theirs: list[int] = groups[0].mesh_info.mesh.mesh.flatten().tolist()
    known = {id(p.sharded_param) for group in groups for p in group.fsdp_params}
    for name, p in named:
        alone = p.device_mesh.ndim == 1 and p.placements[0].is_replicate() and id(p) in known
        if not alone or p.device_mesh.mesh.tolist() != theirs:
            raise ValueError(
                f"parameter {name} is {p.placements} over ranks {p.device_mesh.mesh.tolist()}, while others are "
                f"replicated over ranks {theirs}: call replicate for the whole model, with one mesh of one axis. "
                "Tensor parallelism is not for saef"
            )
    if any(getattr(group.mesh_info, "is_spmd_mesh", False) for group in groups):
        raise ValueError("dp_mesh_dims of replicate is not for saef: give it a mesh of one axis, and plain parameters")
    if any(group._all_reduce_hook is not None and not isinstance(group._all_reduce_hook, _Own) for group in groups):
        raise ValueError(HOOK)
    if mesh is not None:
        allowed = [mesh.mesh[mesh.get_local_rank(0)].tolist(), mesh.mesh.flatten().tolist()]
        if theirs != allowed[1] and any(factor_of(group) is not None for group in groups):
            raise ValueError(FACTOR)
        if theirs not in allowed:
            raise ValueError(
                f"the model is replicated over ranks {theirs}, but this rank's node in `mesh` has ranks {allowed[0]}: "
                'replicate within the nodes, replicate(module, mesh=mesh["shard"]), or over all ranks of the mesh'
            )
    elif process_group is not None:
        ours = torch.distributed.get_process_group_ranks(process_group)
        if sorted(ours) != sorted(theirs):
            raise ValueError(
                f"process_group has ranks {ours}, the mesh that replicate got has {theirs}: gradients would be "
                "exchanged among other ranks than the model is. Leave process_group out"
            )


def check_taken(groups: Iterable[Any]) -> None:
    """Raise RuntimeError if something was set since that would have to do with an all-reduce."""
    for group in replicated(groups):
        if not isinstance(group._all_reduce_hook, _Own):
            raise RuntimeError(HOOK)
        if group.gradient_divide_factor is not None:
            raise RuntimeError(
                "set_gradient_divide_factor() after SAEFState was created: call it before, or detach() the state first"
            )


FACTOR = (
    "set_gradient_divide_factor() is for a sum over all ranks, and here it divides the sum over one node's, while saef "
    "averages the nodes: leave it out, and multiply the loss by all ranks over that factor"
)
HOOK = (
    "set_all_reduce_hook(): saef takes the place of replicate's all-reduce, and the hook would get each rank's own "
    "gradient. Leave it out; max_grad_norm and grad_scaler of SAEFState clip and unscale"
)
