"""Averaging models instead of gradients: local SGD and gossip with any protocol (MixML section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.distributed.algorithms.model_averaging import averagers

from ..comm import agreement
from ..comm.torch_transport import TorchTransport, checked
from .averaging import Averaging, check_protocol


@final
class ModelAverager(averagers.ModelAverager):
    """x_i <- sum_j M_ij x_j after each local step, with the operators M of a protocol. Takes the place of torch's
    `PeriodicModelAverager`, alone or in a `torch.distributed.optim.PostLocalSGDOptimizer`:

        averager = saef.ModelAverager(saef.Ring())
        for images, labels in batches:                     # no DDP around the model, or one in no_sync()
            loss(model(images), labels).backward()
            optimizer.step()
            averager.average_parameters(model.parameters())

    Workers start from the same weights, or mix from where they are. Buffers, such as batch norm's statistics, stay each
    worker's own.

    Args:
        protocol: AllReduce, LocalStep, Rotating, Slack, Ring, AsyncRing or Gossip. (The asynchronous parameter server
            has no common steps: `saef.ParameterServer`.)
        warmup_steps: calls before the protocol's step 0, in which nothing is averaged. PostLocalSGDOptimizer with
            `post_localSGD_hook` all-reduces gradients meanwhile.
        process_group: the workers; None: all ranks.

    Attributes:
        step: calls so far. The protocol is in its step `step - warmup_steps`. It is all there is to save;
            PostLocalSGDOptimizer does so.
        sent_bytes: what this rank has sent to average.

    Raises:
        TypeError, ValueError: if the protocol has servers or is not for so many workers; and from the first call of
            average_parameters, on every rank, if it differs between ranks.
    """

    def __init__(
        self,
        protocol: Averaging,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(checked(process_group))
        check_protocol(protocol)
        if protocol.parameter_servers:
            raise ValueError(f"{protocol} has no steps that workers make together: train with saef.ParameterServer")
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an integer of at least 0, got {warmup_steps!r}")
        protocol.check_workers(dist.get_world_size(process_group))
        self.protocol, self.warmup_steps = protocol, warmup_steps
        self._transport: TorchTransport | None = None  # made when the parameters' device is known

    @property
    def sent_bytes(self) -> int:
        return self._transport.sent_bytes["averaging"] if self._transport is not None else 0

    @torch.no_grad()
    def average_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Carry out the protocol's next step on parameters, or on an optimizer's param_groups; in place.

        Every rank calls it with the same parameters, in one order. They are taken as one flat vector (Rotating cuts
        that); half precision is averaged in float32 and rounded once. Those that need no gradient are left alone.

        Raises:
            TypeError: if one is complex. ValueError: if they are not on one device.
        """
        t = self.step - self.warmup_steps
        found: list[Any] = list(params)
        listed = [p for g in found for p in (g["params"] if isinstance(g, dict) else [g]) if p.requires_grad]
        if len({p.device for p in listed}) != 1:
            raise ValueError(f"the parameters must be on one device, got {sorted({str(p.device) for p in listed})}")
        if wrong := [p.dtype for p in listed if p.is_complex()]:
            raise TypeError(f"the parameters must be real, got {wrong[0]}: give torch.view_as_real(p) in its place")
        transport = self._transport or self._connect(listed[0].device)
        for doubles in (True, False):  # each a vector of its own
            parts = [p for p in listed if (p.dtype == torch.float64) == doubles]
            due = self.protocol.due(t, sum(p.numel() for p in parts)) if t >= 0 else slice(0, 0)
            if due.stop > due.start:
                x = torch.cat([p.detach().reshape(-1).to(torch.float64 if doubles else torch.float32) for p in parts])
                transport.call(partial(self.protocol.average, t, x[due], transport))
                for p, new in zip(parts, _unflatten_dense_tensors(x, parts), strict=True):
                    p.copy_(new)
        self.step += 1

    def _connect(self, device: torch.device) -> TorchTransport:
        transport = TorchTransport(self.process_group, device, "ModelAverager.average_parameters()")
        agreement.compare({"protocol": self.protocol, "warmup_steps": self.warmup_steps}, transport, device)
        self._transport = transport
        return transport
