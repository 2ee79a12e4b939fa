"""What the user chose, checked once, before anything is built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final, get_args

from ..protocols.averaging import Averaging
from ..wire.compressors import Compressor, Identity
from .arguments import BadRound, Exchange, ServerCompressor, ServerStepAhead, WeightDecayMode, nearest
from .outer import Nesterov, is_number


@final
@dataclass(frozen=True)
class Settings:
    """Everything that must be the same on all ranks, except what the optimizer holds.

    Fields as the arguments of `saef.SAEFState`. Raises TypeError or ValueError on what cannot be honoured.
    """

    compressor: Compressor
    server_compressor: ServerCompressor
    step_ahead: float
    averaging: Averaging | None
    weight_decay_mode: WeightDecayMode
    exchange: Exchange
    max_grad_norm: float | None
    max_consecutive_skips: int | None
    audit_every: int | None
    noise_correction: bool
    server_step_ahead: ServerStepAhead
    error_decay: float
    v_averaging: Averaging | None
    local_steps: int
    outer: Nesterov | None
    on_bad_round: BadRound
    overlap: bool

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise TypeError(f"compressor must be e.g. saef.ScaledSign() or saef.TopK(0.01), got {self.compressor!r}")
        server = self.server_compressor
        if server is not None and server != "same" and not isinstance(server, Compressor):
            raise TypeError(
                f'server_compressor must be "same", None (single-way) or a compressor, got {server!r}'
                f"{nearest(server, ['same'])}"
            )
        if not is_number(self.step_ahead) or not 0.0 <= self.step_ahead <= 1.0:
            raise ValueError(f"step_ahead must be in [0, 1] (0: EF, 1: SAEF), got {self.step_ahead!r}")
        for name, protocol in (("averaging", self.averaging), ("v_averaging", self.v_averaging)):
            if protocol is not None and not isinstance(protocol, Averaging):
                raise TypeError(f"{name} must be e.g. saef.AllReduce(period=20), or None, got {protocol!r}")
        words_of = {"weight_decay_mode": WeightDecayMode, "exchange": Exchange, "on_bad_round": BadRound}
        for field, words in words_of.items():
            allowed, value = get_args(words), getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {value!r}{nearest(value, allowed)}")
        if not isinstance(self.noise_correction, bool):
            raise TypeError(f"noise_correction must be True or False, got {self.noise_correction!r}")
        self._check_ahead()
        self._check_overlap()
        norm = self.max_grad_norm
        if norm is not None and (not is_number(norm) or not 0.0 < norm < float("inf")):
            raise ValueError(f"max_grad_norm must be a positive number, or None, got {self.max_grad_norm!r}")
        for field, least, meaning in (
            ("max_consecutive_skips", 0, "steps in a row that may be skipped"),
            ("audit_every", 1, "steps between two audits"),
        ):
            count = getattr(self, field)
            if count is not None and not _count(count, least):
                raise ValueError(f"{field} must be an integer >= {least} ({meaning}), or None, got {count!r}")
        if not _count(self.local_steps, 1):
            raise ValueError(
                f"local_steps must be an integer >= 1 (steps of the optimizer between two exchanges), got "
                f"{self.local_steps!r}"
            )
        if self.outer is not None and not isinstance(self.outer, Nesterov):
            raise TypeError(f"outer must be saef.Nesterov(lr=..., momentum=...), or None, got {self.outer!r}")
        self._check_feedback()

    def _check_ahead(self) -> None:
        full = self.server_step_ahead
        if not isinstance(full, bool) and full != "auto":
            raise ValueError(f'server_step_ahead must be "auto", True or False, got {full!r}{nearest(full, ["auto"])}')
        if full is True and not self.step_ahead:
            raise ValueError(
                "server_step_ahead=True steps ahead by step_ahead times the server's error too, and step_ahead is 0: "
                "leave one of the two out"
            )
        if not is_number(self.error_decay) or not 0.0 < self.error_decay <= 1.0:
            raise ValueError(f"error_decay must be in (0, 1] (1: errors stay as they are), got {self.error_decay!r}")

    def _check_overlap(self) -> None:
        if not isinstance(self.overlap, bool):
            raise TypeError(f"overlap must be True or False, got {self.overlap!r}")
        if self.overlap and (self.averaging is not None or self.error_decay != 1.0 or self.server_step_ahead is True):
            raise ValueError(
                "overlap=True begins a round before the last one's replies are there, so errors are not averaged or "
                "decayed between the two, nor is the server's stepped ahead by: leave averaging, error_decay and "
                "server_step_ahead out"
            )

    def _check_feedback(self) -> None:
        if self.feedback != self.reply_compressor.feedback:
            raise ValueError(
                f"{self.compressor} and {self.reply_compressor} do not go together: a majority vote votes both ways; "
                'use MajorityVote() with server_compressor="same"'
            )
        decays = self.error_decay != 1.0
        if not self.feedback and (self.step_ahead or self.averaging is not None or not self.outer_decay or decays):
            raise ValueError(
                "MajorityVote keeps no error, so there is nothing to step ahead, to average or to decay, and its "
                "weight decay is outside the vote: use step_ahead=0, averaging=None, error_decay=1, "
                'weight_decay_mode="outer" '
                "(as saef.hooks.signsgd_majority_vote does)"
            )

    @property
    def reply_compressor(self) -> Compressor:
        """C on the way back; single-way sends the server's D as it is."""
        if self.server_compressor is None:
            return Identity()
        return self.compressor if isinstance(self.server_compressor, str) else self.server_compressor

    @property
    def feedback(self) -> bool:
        """Whether errors are kept at all."""
        return self.compressor.feedback

    @property
    def outer_decay(self) -> bool:
        """Whether weight decay is applied outside the compressor (dist-EF appendix A)."""
        return self.weight_decay_mode == "outer"


def _count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
