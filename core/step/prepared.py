"""What a backward has prepared for the optimizer step, and whether the step may still take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.futures import Future

from ..rules import AnyHyper
from ..wire import kernels
from ..wire.kernels.table import Update
from ..wire.plan import Plan
from .weights import Weights, all_held, held

_GRADIENT = attrgetter("grad")


class Marks(NamedTuple):
    """What p.grad of each parameter is: places and versions are others after any change in place or replacement.

    Attributes:
        places: addresses; -1 where there is no p.grad. versions: as autograd counts writes.
        prints: [parameters] fingerprints: a write through `.data` or numpy leaves no other trace. None on devices
            without kernels of ours.
    """

    places: list[int]
    versions: list[int]
    prints: Tensor | None

    @staticmethod
    def of(parameters: Sequence[Tensor]) -> Marks:
        gradients = all_held([*map(_GRADIENT, parameters)])
        places = [-1 if g is None else g.data_ptr() for g in gradients]
        versions = [-1 if g is None else g._version for g in gradients]
        return Marks(places, versions, kernels.fingerprints(gradients, parameters[0].device))

    def differ(self, other: Marks) -> set[int]:
        """The parameters whose p.grad was written to, as far as these tell."""
        found: set[int] = set()
        for mine, theirs in (self.places, other.places), (self.versions, other.versions):
            if mine != theirs:
                found.update(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        if self.prints is not None and other.prints is not None:
            found.update((self.prints != other.prints).nonzero().view(-1).tolist())
        return found


class Bucket(NamedTuple):
    """A bucket on its way from gradient to replies.

    Attributes:
        parameters: indices into the state's parameters.
        gradient: this worker's flat gradient; stays as it is until the step is committed.
        views: the parameters' gradients, views of `gradient`.
        given, given_views: the same of this rank; others than those only where it has a part of the worker's.
        parts: of `given`, what is for each place of the node, to be averaged into `gradient`; else empty.
        done: a future of `gradient`, complete when `received` and `replies` are there.
        received, replies: what `send` and `answer` of saef.comm.exchange returned (empty lists until then).
    """

    parameters: tuple[int, ...]
    plan: Plan
    gradient: Tensor
    views: Sequence[Tensor]
    given: Tensor
    given_views: Sequence[Tensor]
    parts: Sequence[Sequence[Tensor]]
    message: Tensor
    done: Future[Tensor]
    received: list[Tensor]
    replies: list[Tensor]


@final
@dataclass
class Prepared:
    """Replaced by a new one when the step is committed, skipped or abandoned.

    Attributes:
        hyper: the optimizer's settings that the messages contain; update: the same with the clipping, once known.
        norms: of the parts of this worker's gradient that its node's ranks have, this rank's too; known to clip.
        gradients: of each p.grad after the backward; empty before its end.
        parameters: those of all buckets.
    """

    buckets: list[Bucket] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)
    hyper: list[AnyHyper] = field(default_factory=list)
    update: Update | None = None
    norms: list[float] = field(default_factory=list)
    gradients: Marks = Marks([], [], None)  # noqa: RUF009 - nobody changes that one
    met: bool = False  # whether the ranks have met about a backward that was exchanged, and that no step has taken

    def fix(self, update: Update) -> Update:
        """From now on the messages are made with this."""
        self.update = update
        return update

    def backward_ended(self, parameters: Sequence[Tensor]) -> None:
        """What p.grad are now was sent: no change of them can count."""
        self.gradients = Marks.of(parameters)

    def expect_change(self, parameter: int) -> None:
        """p.grad of this parameter will be set once more, to what it is."""
        if self.gradients.places[parameter] != -1:
            self.gradients.versions[parameter] += 1

    def add(self, bucket: Bucket) -> None:
        self.buckets.append(bucket)
        self.parameters.update(bucket.parameters)

    @property
    def messages(self) -> list[tuple[Tensor, Tensor]]:
        """(table, message) of each bucket."""
        return [(b.plan.send.table, b.message) for b in self.buckets]

    def contains(self, parameters: Sequence[int]) -> bool:
        """Whether a bucket with any of these parameters is here already."""
        return not self.parameters.isdisjoint(parameters)

    def wait(self) -> None:
        """Until all that was sent has been answered. DDP has waited already."""
        if self.update is not None:  # else none was: with clipping, all go together
            for bucket in self.buckets:
                bucket.done.wait()

    def norm(self, dtype: torch.dtype) -> float:
        """L2 norm of this worker's gradient; summed parameter by parameter, so that buckets do not matter."""
        views = sorted((i, v) for b in self.buckets for i, v in zip(b.parameters, b.views, strict=True))
        norms = [torch.linalg.vector_norm(v, dtype=dtype) for _, v in views]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def exchanged(self, weights: Weights) -> bool:
        """Whether a whole backward was, and all servers have answered."""
        whole = len(self.parameters) == len(weights.names) and bool(self.gradients.places)
        if whole:
            self.wait()
        return whole and all(b.replies for b in self.buckets)

    def check(self, weights: Weights, hyper: list[AnyHyper]) -> None:
        """Raise RuntimeError unless the exchange is complete, and still what the user wants to apply.

        Args:
            hyper: the optimizer's settings now.
        """
        if not self.exchanged(weights):
            names = [name for i, name in enumerate(weights.names) if i not in self.parameters][:5]
            raise RuntimeError(
                f"the exchange of this step is incomplete (parameters not exchanged: {names}): the backward failed, or "
                "DDP was told to ignore them. Call optimizer.zero_grad() and run forward and backward again"
            )
        if self.hyper != hyper:
            raise RuntimeError(
                "lr, momentum, weight_decay or the loss scale changed between backward() and optimizer.step(), but the "
                "messages contain them already: change them after step(), as schedulers do"
            )

    def rewritten(self, weights: Weights) -> list[Bucket]:
        """The buckets that were written to since the backward, perhaps with the values that were there.

        A p.grad with memory of its own (DDP's default) is not among what is sent: it is compared here.

        Raises:
            RuntimeError: if such a p.grad is not what was sent, or there is none any more.
        """
        found, before, now = [], self.gradients, Marks.of(weights.parameters)
        other = before.differ(now)
        for bucket in self.buckets if other else []:
            touched = [(i, view) for i, view in zip(bucket.parameters, bucket.given_views, strict=True) if i in other]
            for i, view in touched:
                grad = weights.parameters[i].grad
                if grad is None or not _holds(held(grad), view):
                    raise changed([weights.names[i]])
            inside = [i for i, view in touched if before.places[i] == view.data_ptr()]
            if inside and bucket.parts:  # what other ranks of the node have added is not here, to compare with
                if now.prints is None or before.prints is None or bool((now.prints != before.prints)[inside].any()):
                    raise changed([weights.names[i] for i in inside])
            elif inside:
                found.append(bucket)
        return found

    def finite(self, weights: Weights) -> Tensor:
        """[buckets] bool: False if a NaN or an infinity is among the replies: a rank's gradient has one, or overflowed.

        The replies are the same on every rank, and so is the answer; nothing more is sent for it.
        """
        return torch.stack([b.plan.finite(b.replies[0], weights.dtype) for b in self.buckets])

    def without(self, finite: Tensor, weights: Weights) -> list[str]:
        """Names of the parameters of the buckets that are not, as `finite` says."""
        bad = sorted(i for b, fine in zip(self.buckets, finite.tolist(), strict=True) if not fine for i in b.parameters)
        return [weights.names[i] for i in bad]


def changed(names: Sequence[str]) -> RuntimeError:
    """The error for gradients of these parameters that are not what was sent."""
    return RuntimeError(
        f"gradients of {list(names[:5])} were changed between backward() and optimizer.step(), when they had been "
        "compressed and sent already: to clip, give SAEFState max_grad_norm (or SAEFCallback, attach(), a Trainer); to "
        "mask or scale, do it before they are sent, in p.register_hook() (of FSDP2's parameters in "
        "p.register_post_accumulate_grad_hook()); to leave a parameter out, set lr=0 in its group, or "
        "requires_grad_(False); to drop the step, zero_grad() on all ranks instead of step()"
    )


def _holds(gradient: Tensor, sent: Tensor) -> bool:
    """Whether this is the memory that was sent, or has the same values."""
    if (gradient.shape, gradient.dtype) != (sent.shape, sent.dtype):
        return False
    if (gradient.data_ptr(), gradient.stride()) == (sent.data_ptr(), sent.stride()):
        return True
    return torch.equal(gradient, sent)
