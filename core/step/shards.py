"""x and x_half of a model that FSDP2 has sharded within a node: each rank has its shards of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .ways import Copying


@final
class Shards(Copying):
    """`flat` is x of this rank's shards; `parameters` are DTensors over the node's ranks, and so is what is saved."""

    def _show_half(self) -> None:
        self._copy_half()

    def _show_x(self) -> None:
        self._copy_x()

    def write(self, x: Sequence[Tensor]) -> None:
        super().write([self.part_of(i, value) for i, value in enumerate(x)])

    def own(self, flat: Tensor) -> list[Tensor]:
        return [self.like_parameter(i, part.clone()) for i, part in enumerate(self.cut(flat))]

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
