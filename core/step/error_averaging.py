"""The averaging of the local errors as a part of a step (Alg. 1, lines 6-8); and of AdamW's v in the same way."""

from __future__ import annotations

from typing import final

from torch import Tensor

from ..comm.transport import Transport
from ..protocols.averaging import Averaging


@final
class ErrorAveraging:
    """The averaging of one rank's errors, which belongs to a step: made once in it, and unmade if it is skipped.

    What is said of e holds for any vector that is given in its place.

    Raises:
        ValueError: if the protocol is not for so many workers, or does not preserve the mean of the errors.
    """

    def __init__(self, protocol: Averaging | None, transport: Transport) -> None:
        self._protocol, self._transport = protocol, transport
        self._done_for = -1  # the step that has averaged
        self._before: tuple[slice, Tensor] | None = None  # e where that was due, as it was
        if protocol is None:
            return
        protocol.check_workers(transport.size)
        if not protocol.preserves_mean(transport.size):
            raise ValueError(
                f"{protocol} does not preserve the mean of what it averages: x~ = x - (e + mean_k e_k) would move by "
                "itself, and what the errors owe would be lost; v would be of some workers more than of others. Use "
                "AllReduce, Rotating, Slack, Ring, AsyncRing, or a Gossip whose columns sum to 1"
            )

    def make(self, step: int, e: Tensor) -> slice:
        """Average e in place if step t has not done so (Alg. 1, lines 6-8); the coordinates that changed."""
        protocol = self._protocol
        if protocol is None or self._done_for == step:
            return slice(0, 0)
        due = protocol.due(step, e.numel())
        part = e[due]
        if part.numel():
            before = part.clone()
            try:
                self._transport.call(lambda: protocol.average(step, part, self._transport))
            except RuntimeError:
                part.copy_(before)
                raise
            self._before = due, before
        self._done_for = step
        return due

    def before(self, e: Tensor) -> Tensor:
        """A copy of e as it was before the step that is under way averaged it."""
        e = e.clone()
        self._put_back(e)
        return e

    def commit(self) -> None:
        """The step has happened."""
        self._before = None

    def undo(self, e: Tensor) -> None:
        """The step has not happened: e is as before it, and the next averages anew."""
        self._put_back(e)
        self._before, self._done_for = None, -1

    def _put_back(self, e: Tensor) -> None:
        if self._before is not None:
            due, before = self._before
            e[due] = before
