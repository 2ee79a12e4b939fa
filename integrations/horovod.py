"""Horovod: `hvd.DistributedOptimizer(optimizer, compression=SAEFCompression(net, optimizer, ...))`.

    hvd.init()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters(),
                                         compression=SAEFCompression(net, optimizer, compressor=saef.ScaledSign()))

The path of a gradient:

    net(x)               x_half into the parameters                        SAEFState, by its hook on the model
    loss.backward()      Horovod calls compress(p.grad); a bucket that is  SAEFCompression.compress
                         complete is compressed and exchanged
    optimizer.step()     Horovod synchronizes and calls decompress: what   SAEFCompression.decompress
                         is left is exchanged; then the optimizer's own
                         step, where the state commits or skips            `_followed`, its class

Horovod reduces what `compress` returns, one tensor a parameter under the parameter's name; here that is a dummy, one
float32 that is 1 (a rank in hvd.join() counts as 0, and so is noticed). The messages travel by Horovod's all-gather,
all-to-all and all-reduce, called from one thread in one order on every rank, whatever the order in which gradients
become ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from saef import SAEFState
from saef.comm.meeting import REMEDY, NotTogether
from saef.comm.node import Node
from saef.comm.transport import Ordered, Purpose
from saef.step.arguments import Agreed, Scaled, check_known
from saef.step.buckets import SPARSE

try:
    import horovod.torch as hvd
    from horovod.torch.mpi_ops import _basics
except ImportError as error:
    raise ImportError(
        "saef.integrations.horovod needs Horovod with PyTorch support, which current versions of torch only build with "
        f"changes: run integrations/build_horovod.sh (or `make horovod`) of saef's repository. The cause: {error}"
    ) from error

POLL_S, LONGEST_POLL_S = 1e-4, 1e-2  # Horovod looks for work in cycles of a millisecond, if not told otherwise
UNEVEN = "a rank without data has no gradient at its own x_half: give all ranks the same number of batches"
_numbers = count()  # of transports; every rank makes them in one order


@final
class HorovodTransport(Ordered):
    """A `saef.comm.transport.Transport` over Horovod's collectives among some ranks, ascending, or all.

    They run on CPU tensors: on a GPU, messages (not gradients) are copied to the host and back.
    """

    silence = (
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS (without limit unless it is set), or called hvd.join(), which cannot work "
        f"with SAEF ({UNEVEN}), or is in a collective method that this one does not call: Horovod's warnings of "
        "stalled tensors on rank 0 name it"
    )
    restart = "horovodrun ends it"

    def __init__(self, device: torch.device, ranks: Sequence[int]) -> None:
        super().__init__(ranks.index(hvd.rank()), len(ranks), device, thread=True)
        self._prefix = f"saef.{next(_numbers)}"
        self._set = _process_set(ranks)

    def _meet(self, what: str) -> None:
        """Horovod waits for the other ranks by a tensor's name, and its warnings of stalled tensors print that."""
        self._count("settings", self.size - 1)
        name = f"{self._prefix}: {what}, to which all ranks must come"
        try:
            _wait(hvd.allgather_async(torch.zeros(1, dtype=torch.uint8, device="cpu"), name, self._set))
        except RuntimeError as error:
            raise NotTogether(
                f'rank {self.rank} of {self.size} is at "{what}", but not all others: one died, or does something else '
                f"for longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS. {REMEDY}. The cause: {error}"
            ) from error

    def _begin_all_gather(self, message: Tensor, sizes: Sequence[int], purpose: Purpose) -> Callable[[], Tensor]:
        handle = hvd.allgather_async(message.cpu(), f"{self._prefix}.{purpose}.{sum(sizes)}", self._set)
        return lambda: _wait(handle).to(self.device)

    def _begin_all_to_all(
        self, message: Tensor, sizes: Sequence[int], received: int, purpose: Purpose
    ) -> Callable[[], Tensor]:
        splits = torch.tensor(sizes, dtype=torch.int32, device="cpu")
        handle = hvd.alltoall_async(message.cpu(), splits, f"{self._prefix}.{purpose}.{message.numel()}", self._set)
        return lambda: _wait(handle)[0].to(self.device)

    def _sum(self, v: Tensor, purpose: Purpose) -> None:
        host, name = v.cpu(), f"{self._prefix}.{purpose}.{v.numel()}"
        _wait(hvd.allreduce_async_(host, op=hvd.Sum, name=name, process_set=self._set))
        v.copy_(host)

    def _send_receive(self, v: Tensor, to: Sequence[int], sources: Sequence[int], purpose: Purpose) -> list[Tensor]:
        """Horovod has nothing between two ranks alone: an all-to-all in which others get nothing."""
        sizes = [v.numel() if r in to else 0 for r in range(self.size)]
        splits = torch.tensor(sizes, dtype=torch.int32, device="cpu")
        host, name = v.cpu().repeat(len(to)), f"{self._prefix}.{purpose}.neighbours.{v.numel()}"
        out: Tensor = _wait(hvd.alltoall_async(host, splits, name, self._set))[0]
        return list(out.to(self.device).view(len(sources), v.numel()).unbind()) if sources else []


def _process_set(ranks: Sequence[int]) -> Any:
    """Horovod's, of these ranks alone; made if there is none yet, which all ranks must come to in one order."""
    if len(ranks) in (1, hvd.size()):  # a rank alone sends nothing
        return hvd.global_process_set
    known = {tuple(of): number for number, of in _basics._get_process_set_ids_and_ranks().items()}
    if tuple(ranks) not in known:
        try:
            return hvd.add_process_set(ranks)
        except ValueError as error:
            raise RuntimeError(
                'node_size makes process sets, which Horovod allows after hvd.init(process_sets="dynamic") only. The '
                f"cause: {error}"
            ) from error
    found = hvd.ProcessSet(ranks)
    found.process_set_id = known[tuple(ranks)]
    return found


def _node(device: torch.device, size: int) -> Node:
    """The ranks that are one worker with this one. Collective."""
    ranks = range(hvd.size())
    nodes, places = [ranks[i : i + size] for i in ranks[::size]], [ranks[i::size] for i in range(size)]
    for some in (*nodes, *places):
        _process_set(some)
    node, place = divmod(hvd.rank(), size)
    between = HorovodTransport(device, places[place])
    return Node(between, HorovodTransport(device, nodes[node]) if size > 1 else None, device)


def _wait(handle: Any) -> Any:
    """The result of a collective. Horovod's own wait keeps a core and Python's lock busy, which others need."""
    _sleep_until_done(handle)
    return hvd.synchronize(handle)


def _sleep_until_done(handle: int) -> None:
    """In ever longer naps, of a fifth of the time waited so far: each costs a core, which other ranks may need."""
    began = time.monotonic()
    while not hvd.poll(handle):
        time.sleep(min(max(POLL_S, (time.monotonic() - began) / 5), LONGEST_POLL_S))


class CompressionSettings(Agreed, Scaled, total=False):
    """The keyword arguments of SAEFState but for mesh, process_group and transport, which are Horovod's."""


@final
class SAEFCompression:
    """Horovod's `compression`, and the `SAEFState` behind it.

    Create it on all ranks after hvd.init(), for one DistributedOptimizer (a collective call).

    Args:
        model: the module that is trained.
        optimizer: the one that DistributedOptimizer is given too. Its class becomes a subclass of what it was.
        node_size: ranks that are one worker, a node (docs/nodes.md), which follow each other; "auto": as many as
            Horovod has on this machine.
        settings: keyword arguments of SAEFState, but for mesh, process_group and transport.

    Attributes:
        state: the SAEFState, for metrics(), checkpoints and the like. After state.detach() gradients travel as
            without compression.

    Raises:
        TypeError, ValueError: as SAEFState; and on a DistributedOptimizer that does not average dense gradients
            over all ranks, at the first gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        node_size: int | Literal["auto"] = 1,
        **settings: Unpack[CompressionSettings],
    ) -> None:
        if "transport" in settings or "process_group" in settings:
            raise TypeError("SAEFCompression exchanges among all Horovod ranks: it takes no transport or process_group")
        if "mesh" in settings:
            raise TypeError(
                "a mesh is of torch.distributed's ranks, and here they are Horovod's: give SAEFCompression node_size, "
                'so many ranks are one worker, or "auto", as many as Horovod has on this machine'
            )
        check_known("SAEFCompression", settings, ["node_size", *CompressionSettings.__annotations__], TypeError)
        if not hvd.is_initialized():
            raise RuntimeError("call hvd.init() before creating SAEFCompression")
        size = hvd.local_size() if node_size == "auto" else node_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or hvd.size() % size:
            raise ValueError(
                f'node_size must be "auto", or an integer of which the number of ranks, {hvd.size()}, is a multiple '
                f"(ranks that are one worker), got {size!r}"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.state = SAEFState(model, optimizer, transport=_node(device, size), **settings)
        self._engine = self.state.engine
        optimizer.__class__ = _followed(self, type(optimizer))
        self._optimizer: Any = None  # the DistributedOptimizer
        self._guess = 0  # the parameter that is likely the next: one backward is like another
        self._pending = False  # whether gradients came that were not all exchanged

    def __repr__(self) -> str:
        return f"<SAEFCompression with {self.state!r}>"

    def compress(self, tensor: Tensor) -> tuple[Tensor, Tensor | int | None]:
        """Horovod calls it with a p.grad that is ready: a dummy for Horovod to reduce, and the parameter's number.

        Of a parameter that was frozen, the p.grad itself: Horovod still reduces it.
        """
        if not self._engine.attached:
            return tensor, None
        if not self._pending:
            self._check()
            self._pending = True
        i = self._number(tensor)
        if i is None:
            return torch.ones(1, device="cpu"), tensor
        self._engine.gradient_ready(i)
        return torch.ones(1, device="cpu"), i

    def decompress(self, tensor: Tensor, ctx: Tensor | int | None) -> Tensor:
        """Horovod calls it for each parameter after the last compress: this rank's own gradient, as it was."""
        if not self._engine.attached:
            return tensor
        if ctx is None:  # Horovod has gathered a sparse gradient itself, without `compress`
            raise TypeError(SPARSE)
        if isinstance(ctx, Tensor):
            self._finish(tensor)
            return ctx
        parameter = self._engine.weights.parameters[ctx]
        before = parameter.grad
        self._finish(tensor)
        if parameter.grad is None:
            raise RuntimeError("a gradient was set to None between backward() and optimizer.step()")
        if parameter.grad is before:  # else Horovod has the one of before in its hands
            self._engine.expect_change(ctx)  # it sets p.grad to what is returned
        return parameter.grad

    def _finish(self, dummy: Tensor) -> None:
        """Exchange what is left, once a step. `dummy` is the mean of the ranks'."""
        if self._pending:
            self._pending = False
            size = self._engine.node.everyone.size
            if round(float(dummy) * size) != size:
                raise RuntimeError(f"hvd.join() cannot work with SAEFCompression: {UNEVEN}")
            self._engine.exchange_gradients()

    def step(self, optimizer: torch.optim.Optimizer, closure: Any, own_step: Callable[[], Any]) -> Any:
        """The optimizer's step, after Horovod has synchronized: commit or skip around torch's own step."""
        engine = self._engine
        if closure is not None:
            raise TypeError("Horovod has synchronized before step(closure) runs it: call backward(), then step()")
        self._check()
        gradients = [p.grad for p in engine.weights.parameters if p.grad is not None]
        if not engine.under_way and not any(bool(g.any()) for g in gradients):
            optimizer.zero_grad()  # hvd.broadcast_optimizer_state fills a new optimizer by a step of zeros
            return None
        if engine.node.everyone.size == 1 and gradients:  # Horovod calls neither compress nor decompress
            engine.exchange_gradients()
        engine.before_step(optimizer, (optimizer,), {})
        loss = own_step()
        engine.after_step(optimizer, (), {})
        return loss

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take Horovod's optimizer, with the same groups, in the place of the one it was made from."""
        if self._optimizer is not None:
            raise ValueError("this SAEFCompression serves a DistributedOptimizer already: create one for each")
        self._optimizer = optimizer
        self._engine.adopt(optimizer)
        optimizer.register_step_pre_hook(self._before_synchronize)

    def _before_synchronize(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Wait for the dummies as `_wait` does, so that the exchange goes on beside it, and say if it has failed."""
        for handle, _ in optimizer._handles.values():
            if isinstance(handle, int):
                _sleep_until_done(handle)
        if (cause := self._engine.transport.failure) is not None:
            raise self._engine.transport.lost(cause) from cause

    def _number(self, tensor: Tensor) -> int | None:
        """The parameter's number; None for one that is trained no longer."""
        parameters = self._engine.weights.parameters
        for k in range(len(parameters)):
            i = (self._guess - k) % len(parameters)
            if parameters[i].grad is tensor:
                self._guess = i - 1
                return i
        if any(p.grad is tensor for p in self._engine.left_out):
            return None
        raise TypeError(
            "Horovod has the gradient of a parameter that SAEFCompression does not know: create it with the model and "
            "the optimizer that DistributedOptimizer is for"
        )

    def _check(self) -> None:
        """Raise unless the DistributedOptimizer averages dense gradients over all ranks, the same as ever."""
        found, everyone = self._optimizer, self._engine.node.everyone
        if found is None:
            raise ValueError("give hvd.DistributedOptimizer the optimizer that SAEFCompression was created with")
        if (hvd.rank(), hvd.size()) != (everyone.rank, everyone.size):
            raise RuntimeError(
                f"Horovod was started anew: rank {everyone.rank} of {everyone.size} is rank {hvd.rank()} of "
                f"{hvd.size()} now. Create SAEFCompression and DistributedOptimizer again and load a checkpoint"
            )
        if not hasattr(found, "op"):  # Horovod's other class
            raise ValueError("DistributedOptimizer has op=hvd.Adasum, SAEFCompression needs op=hvd.Average")
        for name, expected, advice in (
            ("op", hvd.Average, "Algorithm 1 averages; multiply lr instead"),
            ("gradient_predivide_factor", 1.0, "nothing is summed here that could overflow"),
            ("sparse_as_dense", False, "use dense gradients: Embedding(sparse=False)"),
            ("process_set", hvd.global_process_set, "SAEF exchanges among all ranks"),
        ):
            if (value := getattr(found, name)) != expected:
                raise ValueError(f"DistributedOptimizer has {name}={value}, SAEFCompression needs {expected}: {advice}")


def _followed(compression: SAEFCompression, kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind` that tells `compression` of its instances and steps. Horovod derives its optimizer's class from it.

    Step hooks would not do: Horovod makes a new optimizer, without them, and its step would run them twice.
    """

    class Followed(kind):  # type: ignore[valid-type, misc]
        _step_supports_amp_scaling = True  # as `saef.step.attachment` has it, for a GradScaler

        def __init__(self, params: Any) -> None:
            super().__init__(params)
            compression.adopt(self)

        def step(self, closure: Any = None) -> Any:
            if not compression.state.engine.attached:
                return super().step(closure)
            return compression.step(self, closure, super().step)

    Followed.__name__ = kind.__name__  # Horovod's class is called after it
    return Followed
