"""The asynchronous parameter server (MixML: AsyncPS): rank 0 keeps x; workers pull, compute and push without a barrier.

    server = saef.ParameterServer(model.parameters())       # on every rank
    if server.is_server:
        served = server.serve(torch.optim.SGD(model.parameters(), lr=0.1))      # until all workers have left
    else:
        for images, labels in batches:
            server.pull()                                   # the parameters <- x
            model.zero_grad()
            loss(model(images), labels).backward()
            server.push()                                   # x <- the server's optimizer with this gradient
        server.leave()

Each worker has a connection of its own to the server, a process group of two, so that the death of one ends nothing
but itself. Start the ranks by something that sees it so as well: torchrun ends all when one dies;
srun --kill-on-bad-exit=0, or a container for each rank, does not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ..comm import agreement
from ..comm.torch_transport import TorchTransport, checked, gloo, private_name, timeout_of

logger = logging.getLogger("saef")

PULL, PUSH, LEAVE = range(3)
POLL_S = 0.1  # between two looks at whether a thread has failed


@final
@dataclass
class Served:
    """What a server did.

    pushes: (worker's rank, x's version that the gradient is of, version that it made), in the order applied;
        version t is x_t of MixML eq. (5), and the difference less 1 is the delay.
    skipped: pushes that were not applied because a number in them was not finite, by worker.
    lost: why the connection to a worker ended before it left, by rank.
    """

    pushes: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: dict[int, int] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    @property
    def max_delay(self) -> int:
        """tau: the largest number of steps that others made between a gradient's pull and its push."""
        return max((after - before - 1 for _, before, after in self.pushes), default=0)


@final
class _Link:
    """The connection between the server (side 0) and one worker (side 1)."""

    def __init__(self, store: Store, side: int, like: dist.ProcessGroup) -> None:
        self._group, self._peer = gloo(store, side, 2, timeout_of(like, torch.device("cpu"))), 1 - side

    def send(self, *tensors: Tensor) -> None:
        self._move(self._group.send, tensors)

    def receive(self, *tensors: Tensor) -> None:
        self._move(self._group.recv, tensors)

    def _move(self, transfer: Callable[..., Any], tensors: Iterable[Tensor]) -> None:
        try:
            for t in tensors:
                transfer([t], self._peer, 0).wait()
        except RuntimeError as error:  # gloo's, of any kind
            raise ConnectionError(str(error)) from error


@final
class ParameterServer:
    """What both sides need: the server of rank 0, and the connections of the others to it.

    Create it on all ranks of the group (a collective call: parameters are compared). Nothing after that is collective.
    The server holds one gradient for each worker, beside x and its optimizer's state.

    Args:
        params: the parameters, real and floating, the same on every rank; the server's are x. Half precision travels
            as float32.
        process_group: None: all ranks. Its timeout is how long a worker may be silent before the server lets go of it.

    Raises:
        ValueError: if parameters differ between ranks, or there is no worker. TypeError: if one is not real and
            floating.
    """

    def __init__(self, params: Iterable[Tensor], process_group: dist.ProcessGroup | None = None) -> None:
        group, self.params = checked(process_group), list(params)
        if not self.params:
            raise ValueError("params is empty: give the model's parameters, each rank's own")
        self.rank, size = dist.get_rank(group), dist.get_world_size(group)
        if size < 2:
            raise ValueError("a parameter server needs a worker besides rank 0: start at least 2 ranks")
        what, cpu = "ParameterServer()", torch.device("cpu")
        transport = TorchTransport(group, cpu, what)
        found = [(tuple(p.shape), p.dtype) for p in self.params]
        agreement.compare({"parameters": found}, transport, transport.device)
        if wrong := [p.dtype for p in self.params if not p.is_floating_point()]:
            raise TypeError(
                f"params must be real and floating, got {wrong[0]}: keep a complex one as pairs of real numbers, with "
                "torch.view_as_complex in the model, and leave integers out"
            )
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        store = PrefixStore(private_name(group, cpu, what), _get_default_store())
        self._workers: dict[int, _Link] = {}
        self._server: _Link | None = None
        for k in range(1, size):
            meeting = PrefixStore(str(k), store)
            if self.is_server:
                self._workers[k] = _Link(meeting, 0, group)
            elif k == self.rank:
                self._server = _Link(meeting, 1, group)
        self._pulled = False

    @property
    def is_server(self) -> bool:
        return self.rank == 0

    # -- workers ------------------------------------------------------------------------------

    @torch.no_grad()
    def pull(self) -> int:
        """The parameters <- x; returns its version, the number of gradients that are in it."""
        version = torch.empty(1, dtype=torch.int64, device="cpu")
        x = torch.empty(sum(p.numel() for p in self.params), dtype=self.dtype, device="cpu")
        self._ask(PULL, [], [version, x])
        for p, new in zip(self.params, _unflatten_dense_tensors(x, self.params), strict=True):
            p.copy_(new)
        self._pulled = True
        return int(version)

    def push(self) -> None:
        """Give the server the gradients, p.grad, taken at what was pulled; where there is none, zeros."""
        if not self._pulled:
            raise RuntimeError("pull() before the gradient is computed: there is nothing yet that it is of")
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self._ask(PUSH, [_flat(grads, self.dtype)], [])

    def leave(self) -> None:
        """Say that this worker is done. Without it the server takes the end of the process for a death."""
        self._ask(LEAVE, [], [])
        self._server = None

    def _ask(self, what: int, send: list[Tensor], receive: list[Tensor]) -> None:
        if self._server is None:
            raise RuntimeError("rank 0 is the server: call serve()" if self.is_server else "this worker has left")
        try:
            self._server.send(torch.tensor([what], device="cpu"), *send)
            self._server.receive(*receive)
        except ConnectionError as error:
            raise RuntimeError(
                f"rank {self.rank}: the parameter server is gone, or let go of this worker after it was silent for "
                f"longer than the process group's timeout: look at what rank 0 printed. The cause: {error}"
            ) from error

    # -- the server ---------------------------------------------------------------------------

    def serve(self, optimizer: torch.optim.Optimizer, after_step: Callable[[int], None] | None = None) -> Served:
        """Serve until every worker has left or is lost. On rank 0.

        Gradients are applied one at a time, as they come (MixML eq. (5)): x is never between two steps when it is
        pulled. One with a number that is not finite is not applied. A worker that dies is let go of, with a warning.

        Args:
            optimizer: of the server's parameters; any.
            after_step: called with x's version after each step, before anything else is served: for schedulers,
                checkpoints, logs.

        Raises:
            ValueError: if the optimizer is for other parameters.
            RuntimeError: if every worker was lost. And what the optimizer or after_step raises: serving ends there.
        """
        if not self.is_server:
            raise RuntimeError(f"rank {self.rank} is a worker: pull, push and leave; rank 0 serves")
        if {id(p) for g in optimizer.param_groups for p in g["params"]} != {id(p) for p in self.params}:
            raise ValueError("the optimizer must have the parameters that the server was created with, and no others")
        serving = _Serving(self, optimizer, after_step)
        threads = [
            threading.Thread(target=serving.worker, args=(k, link), name=f"saef-worker-{k}", daemon=True)
            for k, link in self._workers.items()
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not serving.failures:
            for thread in threads:
                thread.join(POLL_S)
        if serving.failures:
            raise serving.failures[0]
        served = serving.served
        if len(served.lost) == len(self._workers):
            raise RuntimeError(f"all workers were lost, x is at version {len(served.pushes)}: {served.lost}")
        return served


@final
class _Serving:
    """What the server's threads share, one for each worker; the lock is over x, the optimizer and the log."""

    def __init__(
        self, server: ParameterServer, optimizer: torch.optim.Optimizer, after_step: Callable[[int], None] | None
    ) -> None:
        self._params, self._dtype = server.params, server.dtype
        self._optimizer, self._after_step = optimizer, after_step
        self._lock = threading.Lock()
        self.served, self.failures = Served(), list[BaseException]()

    def worker(self, k: int, link: _Link) -> None:
        """Serve one worker until it leaves, is lost, or a step raises."""
        try:
            self._serve(k, link)
        except ConnectionError as error:
            self.served.lost[k] = str(error)
            logger.warning("parameter server: lost worker %d, going on without it: %s", k, error)
        except BaseException as error:  # raised again by `ParameterServer.serve`
            self.failures.append(error)

    def _serve(self, k: int, link: _Link) -> None:
        what, g, version = torch.empty(1, dtype=torch.int64, device="cpu"), _flat(self._params, self._dtype), 0
        while not self.failures:
            link.receive(what)
            if what == LEAVE:
                return
            if what == PULL:
                with self._lock:
                    version, x = len(self.served.pushes), _flat(self._params, self._dtype)
                link.send(torch.tensor([version], device="cpu"), x)
            else:
                link.receive(g)
                with self._lock:
                    self._push(k, version, g)

    def _push(self, k: int, before: int, g: Tensor) -> None:
        """One step of MixML eq. (5)."""
        served = self.served
        if self.failures:
            return
        if not bool(g.isfinite().all()):
            served.skipped[k] = served.skipped.get(k, 0) + 1
            logger.warning("parameter server: a gradient of worker %d is NaN or infinite; not applied", k)
            return
        for p, part in zip(self._params, _unflatten_dense_tensors(g, self._params), strict=True):
            p.grad = part.to(p.device, p.dtype, copy=True)
        self._optimizer.step()
        self._optimizer.zero_grad()
        served.pushes.append((k, before, len(served.pushes) + 1))
        if self._after_step is not None:
            self._after_step(len(served.pushes))


def _flat(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """One vector on the host, a copy."""
    return torch.cat([t.detach().reshape(-1).to("cpu", dtype) for t in tensors])
