"""ZeRO 3 within the nodes, saef between them: DeepSpeed shards the weights over a node's ranks, which are one worker.

    engine, *_ = deepspeed.initialize(model=net, mpu=Nodes(8), config=...)  # "node_size": 8, "stage": 3

The path of a gradient through the engine:

    engine(x)               x_half into this rank's shards, before DeepSpeed gathers them      `Shards.before_forward`
    engine.backward(loss)   DeepSpeed averages gradients within the node, into shards
                            of theirs; then x into the shards                                  allreduce_gradients
    engine.step()           they are exchanged between the nodes; commit or skip               `Shards.step`

x is DeepSpeed's own float32 copy of the shards; what the model computes with is a rounded copy of that, or of x_half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

import saef
from saef.comm.node import Node
from saef.comm.torch_transport import TorchTransport
from saef.step.arguments import Agreed
from saef.step.outputs import tensors_in

# What of ZeRO's optimizer is used here is none of DeepSpeed's interface: 0.19.8 has it.


@final
class Nodes:
    """What DeepSpeed calls an mpu: data parallelism within a node of so many ranks, which follow each other.

    Collective, after the process group is there.

    Args:
        node_size: ranks a node, as in the JSON; None: as many as the launcher has started on this machine.
    """

    def __init__(self, node_size: int | None = None) -> None:
        self.mesh = saef.node_mesh(get_accelerator().device_name(), node_size)
        every = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._alone: dist.ProcessGroup = every[dist.get_rank()]

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.size(1)

    def get_data_parallel_rank(self) -> int:
        return self.mesh.get_local_rank(1)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.mesh.get_group(1)
        return group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.mesh.get_group(1))


@final
class Shards(nn.Module):
    """This rank's shards of an engine's parameters, as a model of its own: x of what a SAEFState trains.

    Args:
        engine: with its ZeRO 3 optimizer, whose base makes no steps.
        groups: the parameters of each param group. kind: of torch's optimizer. settings: of the state.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        groups: Sequence[Sequence[Tensor]],
        kind: type[torch.optim.Optimizer],
        settings: Agreed,
    ) -> None:
        super().__init__()
        self._zero: Any = engine.optimizer
        mesh = engine.mpu.mesh
        _check_shards(engine, dist.get_process_group_ranks(mesh.get_group(1)))
        found: dict[int, Shard] = {}
        for i, group in enumerate(self._zero.fp16_groups):
            flat, at = self._zero.fp32_partitioned_groups_flat[i].detach(), 0
            for j, p in enumerate(group):
                width = p.ds_tensor.numel()  # the same on all ranks; the last ones' may be padded
                own = min(max(p.ds_numel - mesh.get_local_rank(1) * width, 0), width)
                found[id(p)] = Shard(nn.Parameter(flat[at : at + own]), p, i, j)
                at += width
        self._shards = {name: found[id(p)] for name, p in engine.module.named_parameters() if id(p) in found}
        of = [[found[id(p)].x for p in group if id(p) in found] for group in groups]  # others are frozen
        every: Any = zip(self._zero.param_groups, of, strict=True)
        self.optimizer = kind([{**options, "params": some} for options, some in every])  # type: ignore[call-arg]
        device = self._zero.fp32_partitioned_groups_flat[0].device
        between, within = (TorchTransport(mesh.get_group(axis), device) for axis in (0, 1))
        node = Node(between, within, device, in_parts=True)
        self.state = saef.SAEFState(self, self.optimizer, transport=node, **settings)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, shard in self._shards.items():
            yield name, shard.x

    def forward(self) -> None:
        """A training forward of the engine's model begins: this one's parameters become x_half."""

    @torch.no_grad()
    def show(self) -> None:
        """What the engine's model computes with <- x_half, or x; nothing that was gathered of the other stays."""
        self._zero._partition_all_parameters()
        for shard in self._shards.values():
            shard.of.ds_tensor.view(-1)[: shard.x.numel()].copy_(shard.x)  # type: ignore[attr-defined]

    def before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self()
            self.show()
        else:
            self.rest()

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Its backward reads the weights again, whatever was looked at between: an output's gradient is its first."""
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._before_backward, self.state.weights.number))

    def _before_backward(self, number: int, gradient: Tensor) -> None:
        if not self.state.engine.ahead:
            self.state.engine.enter(number)
            self.show()

    def rest(self) -> None:
        """The weights are x."""
        if self.state.engine.ahead:
            self.state.engine.leave()
            self.show()

    def step(self) -> None:
        """In the place of ZeRO's own."""
        zero = self._zero
        if not self.state.engine.under_way:
            raise RuntimeError(
                "engine.step() without a training forward at x_half and its backward: run the forward through the "
                "engine, engine(x), not through engine.module, and engine.backward(loss) after it"
            )
        for ours, theirs in zip(self.optimizer.param_groups, zero.param_groups, strict=True):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
        for x, _, group, number in self._shards.values():
            x.grad = zero.averaged_gradients[group][number].view(-1)[: x.numel()].to(x.dtype, copy=True)
        zero.averaged_gradients = {}
        zero._pre_step()
        zero.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.show()
        zero.overflow = self.state.skipped_in_a_row > 0


def _check_shards(engine: DeepSpeedEngine, node: Sequence[int]) -> None:
    """Raise ValueError if a parameter was sharded before, over other ranks than the node's: by zero.Init."""
    for name, p in engine.module.named_parameters():
        ranks = dist.get_process_group_ranks(p.ds_process_group)
        if ranks != node:
            raise ValueError(
                f"parameter {name} was sharded over ranks {ranks}, and the node has {node}: zero.Init takes the ranks "
                "from data_parallel_group alone, so give it nodes.get_data_parallel_group() of nodes = Nodes(...), and "
                "deepspeed.initialize mpu=nodes"
            )


class Shard(NamedTuple):
    """x of this rank's shard of the engine's parameter `of`, which is number `number` in ZeRO's group `group`."""

    x: nn.Parameter
    of: Tensor
    group: int
    number: int


def idle(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer like `kind` that holds settings alone: what schedulers change, and ZeRO makes no state for."""
    return type("SAEF", (kind,), {"step": lambda self, closure=None: None})


def attach(engine: DeepSpeedEngine, shards: Shards) -> None:
    """Make the engine call it."""
    zero, reduce = engine.optimizer, engine.allreduce_gradients

    def reduced(*args: Any, **kwargs: Any) -> None:
        reduce(*args, **kwargs)
        shards.rest()

    engine.allreduce_gradients = reduced
    engine.register_forward_pre_hook(shards.before_forward, prepend=True)
    engine.register_forward_hook(shards.after_forward)
    engine.module.register_state_dict_pre_hook(lambda *_: shards.rest())
    zero.saef, zero.step = shards.state, lambda closure=None: shards.step()
    zero._global_grad_norm = None  # of a step that is not ZeRO's; it would say 0


@contextmanager
def first_node_alone(engine: DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed's files are named by a rank's place in its node: of all nodes, which have the same x, one writes."""
    files = engine.checkpoint_engine
    if engine.mpu.mesh.get_local_rank(0):
        files.save = lambda *_, **__: None
    try:
        yield
    finally:
        vars(files).pop("save", None)
