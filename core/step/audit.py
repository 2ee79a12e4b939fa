"""What all ranks must have alike: compared when a state is created, and now and then in training."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from itertools import groupby
from typing import Any, final

from ..comm.agreement import checksum, compare
from ..comm.node import Node
from .settings import Settings
from .weights import Weights

AFTER_A_CHANGE = "the first forward after SAEFState(), a load or reset_errors()"


def compare_settings(settings: Settings, weights: Weights, node: Node, scaled: bool, what: str) -> None:
    """Compare what never changes, or rarely, when a state is created or changes it. Collective.

    Args:
        node: all ranks of all nodes compare.
        scaled: whether there is a GradScaler.
        what: where the ranks meet (`Transport.meet`).
    """
    own = node.part if node.in_parts else ""  # ranks of one place compare
    fields = {field: getattr(settings, field) for field in settings.__dataclass_fields__}
    every = zip(weights.names, weights.parameters, weights.views, strict=True)
    parameters = [(n, tuple(p.shape), (view if view.shape == p.shape else p).stride(), p.dtype) for n, p, view in every]
    for way, compressor in (("to", settings.compressor), ("from", settings.reply_compressor)):
        runs = groupby(weights.codes(compressor))  # of neighbours with one code
        fields[f"codes {way} the servers{own}"] = [(len([*run]), code) for code, run in runs]
    fields.update(saef=version("saef"), world_size=node.everyone.size)
    if node.size > 1:
        fields.update({"ranks a node": node.size, f"sizes{node.part}": weights.numels})
    fields.update({f"parameters{own}": parameters, "groups": weights.groups, "grad_scaler": scaled})
    compare(fields, node.everyone, weights.device, what=what)


@final
class Audit:
    """Compares what must be equal in a step: at the first after creation or loading, and every `audit_every`.

    Args:
        every: steps between two audits; None: only at the first.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._compared_at: int | None = None  # the step of the last one

    def again(self) -> None:
        """The next step is to be compared: weights were loaded."""
        self._compared_at = None

    @property
    def new(self) -> bool:
        """Whether nothing was compared since the state was made, or weights were loaded."""
        return self._compared_at is None

    def due(self, step: int) -> bool:
        """Whether step t is to be compared: the same on all ranks."""
        if self.new:
            return True
        return self._every is not None and step % self._every == 0 and self._compared_at != step

    def run(self, step: int, settings: Mapping[str, Any], weights: Weights, node: Node) -> None:
        """Compare step, the optimizer's settings, and weights. Collective; raises ValueError on every rank."""
        fields = {
            "steps": step,
            **settings,
            f"checksum of the weights x{node.part}": checksum(weights.parts()),
        }
        heading = (
            f"the ranks differ at step {step}: all must start from the same weights or checkpoint, give the optimizer "
            "the same settings and change parameters alike; if they did, they have diverged: load the last checkpoint"
        )
        what = AFTER_A_CHANGE if self.new else f"the audit of step {step}"
        compare(fields, node.everyone, weights.device, heading, what)
        self._compared_at = step
