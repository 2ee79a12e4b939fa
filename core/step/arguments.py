"""The keyword arguments of a state: their types, for functions that pass them on, and what a misspelt one raises."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, TypedDict, TypeVar, cast

import torch
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from ..comm.exchange import Strategy
from ..comm.node import Node
from ..comm.transport import Transport
from ..protocols.averaging import Averaging
from ..wire.compressors import Compressor
from .outer import Nesterov

ServerCompressor = Compressor | Literal["same"] | None
WeightDecayMode = Literal["coupled", "outer"]
Exchange = Literal["auto", Strategy]
ServerStepAhead = bool | Literal["auto"]
BadRound = Literal["restore", "keep"]
# Of adapters, in the log, of a framework's own setting.
CLIPS = "%s is taken over as SAEFState's max_grad_norm: each worker's own gradient is clipped, before it is sent"


# -- types: `**settings: Unpack[StateSettings]`, or of those parts that a function takes -------------------------------


class Free(TypedDict, total=False):
    """What no method fixes."""

    server_compressor: ServerCompressor
    averaging: Averaging | None
    exchange: Exchange
    max_grad_norm: float | None
    max_consecutive_skips: int | None
    audit_every: int | None
    noise_correction: bool
    error_decay: float
    v_averaging: Averaging | None
    local_steps: int
    outer: Nesterov | None
    on_bad_round: BadRound
    overlap: bool


class Agreed(Free, total=False):
    """What must be the same on all ranks: the fields of `saef.step.settings.Settings`."""

    compressor: Compressor
    step_ahead: float
    weight_decay_mode: WeightDecayMode
    server_step_ahead: ServerStepAhead


class Scaled(TypedDict, total=False):
    """What float16 needs."""

    grad_scaler: GradScaler | None


class Carried(TypedDict, total=False):
    """Who the ranks are, and what carries the bytes."""

    mesh: DeviceMesh | None
    process_group: torch.distributed.ProcessGroup | None
    transport: Transport | Node | None


class StateSettings(Agreed, Scaled, Carried, total=False):
    """All keyword arguments of `saef.SAEFState`."""


# -- words -------------------------------------------------------------------------------------------------------------


def nearest(word: object, known: Iterable[str]) -> str:
    """ " (did you mean 'sharded'?)", to end an error with; nothing if no known word is near."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]!r}?)" if near else ""


def check_known(
    where: str, given: Iterable[object], known: Collection[str], error: type[Exception] = ValueError
) -> None:
    """Raise `error` if a word given is not a known one, with the nearest."""
    for word in given:
        if word not in known:
            expected = ", ".join(map(repr, known))
            raise error(f"{where}: {word!r} is unknown{nearest(word, known)}; expected {expected}")


F = TypeVar("F", bound=Callable[..., Any])


def check_keywords(init: F) -> F:
    """Make an `__init__` name the nearest keyword if it gets one that it does not have. Raises TypeError, as Python."""
    where, known = init.__qualname__.partition(".")[0], [*inspect.signature(init).parameters][1:]

    @functools.wraps(init)
    def checked(*args: Any, **keywords: Any) -> None:
        check_known(where, keywords, known, TypeError)
        init(*args, **keywords)

    return cast(F, checked)
