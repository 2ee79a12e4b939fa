"""A run's settings as a case: for DDP with `saef`, and for the reference."""

from itertools import combinations, product
from typing import Any

import torch

import saef
from saef.wire.compressors import Valued
from saef.wire.plan import partition
from support import reference
from support.training import ADAMW, STEPS, Job, make_net, wild_lrs

# float64; a run makes 20 steps of well-conditioned operations on numbers of order 1, each rounded to 1e-16 and
# amplified by at most 1/(1 - mu) = 10 per step: 20 * 10 * 1e-16 = 2e-14 is expected, 1e-10 is required. A wrong
# sign or selected coordinate would show at 1e-4 or more.
TOLERANCE = 1e-10


SGD = {"sgd": (0.0, False), "momentum": (0.9, False), "nesterov": (0.9, True)}  # mu, Nesterov
ADAM = {"adamw": ("AdamW", "decoupled"), "adam": ("Adam", "coupled")}  # whose decay is as it is


# Of torch, with settings under which no step is large, for local steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 1e-2},
    "AdamW": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 1e-2},
    "RMSprop": {"alpha": 0.9, "eps": 1e-2, "centered": True},
}


def operator(compressor: saef.Compressor) -> tuple[reference.Compressor, Any]:
    """The reference's C and block size for one of ours."""
    if isinstance(compressor, saef.ScaledSign):
        return reference.scaled_sign, compressor.block
    kept = reference.top_k(compressor.ratio) if isinstance(compressor, saef.TopK) else reference.identity
    half = isinstance(compressor, Valued) and compressor.half
    return reference.in_bfloat16(kept) if half else kept, getattr(compressor, "block", "layer")


def protocol_of(averaging: saef.Averaging | None) -> tuple[str, int] | None:
    kind = {type(None): None, saef.AllReduce: "allreduce", saef.Rotating: "rotating"}[type(averaging)]
    return None if averaging is None or kind is None else (kind, averaging.period)


def reference_settings(case: dict[str, Any], ranks: int) -> reference.Settings:
    C, block = operator(case["compressor"])
    server = case["server"]
    matrix = [True, False] * 3  # the parameters in order: weight, bias, ...
    mu, nesterov = SGD.get(case["rule"], SGD["sgd"])
    return reference.Settings(
        C,
        server=operator(server)[0] if isinstance(server, saef.Compressor) else server,
        block=block,
        step_ahead=case["step_ahead"],
        averaging=protocol_of(case["averaging"]),
        momentum=mu,
        nesterov=nesterov,
        weight_decay=[1e-2 if m else 1e-3 for m in matrix],
        weight_decay_mode=ADAM[case["rule"]][1] if case["rule"] in ADAM else case["decay"],
        server_ahead=case.get("server_step_ahead", case["rule"] in ADAM and C is reference.scaled_sign),
        servers=servers_of(case, ranks) if case["exchange"] == "sharded" else None,
        error_decay=case.get("error_decay", 1.0),
        v_averaging=protocol_of(case.get("v_averaging")),
        **ADAMW,
    )


def servers_of(case: dict[str, Any], ranks: int) -> list[int]:
    """Which rank serves each block, in order."""
    numels, up = [p.numel() for p in start()], case["compressor"]
    down = up if case["server"] == "same" else case["server"] or saef.Identity()
    return sum(partition(numels, [0] * len(numels), up, down, ranks).owner, [])


def reference_of(case: dict[str, Any]) -> type[reference.SAEF]:
    return reference.AdamW if case["rule"] in ADAM else reference.SAEF


def job_of(case: dict[str, Any]) -> Job:
    """With AdamW a tenth of the rates: each step moves x by as much."""
    adam = case["rule"] in ADAM
    common = ADAMW if adam else dict(zip(("momentum", "nesterov"), SGD[case["rule"]], strict=True))
    return Job(
        optimizer=ADAM[case["rule"]][0] if adam else "SGD",
        lrs=[lr * (0.1 if adam else 1.0) for lr in wild_lrs(STEPS)],
        state={
            "compressor": case["compressor"],
            "server_compressor": case["server"],
            "step_ahead": case["step_ahead"],
            "averaging": case["averaging"],
            "weight_decay_mode": "coupled" if adam else case["decay"],
            "exchange": case["exchange"],
            **{key: case[key] for key in ("server_step_ahead", "error_decay", "v_averaging") if key in case},
        },
        groups=[{**common, "weight_decay": 1e-2}, {**common, "weight_decay": 1e-3}],
    )


def pairwise(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few cases in which every pair of values of any two settings occurs together (greedy, deterministic)."""
    names = list(values)
    index = [range(len(v)) for v in values.values()]
    missing = {((a, i), (b, j)) for a, b in combinations(range(len(names)), 2) for i, j in product(index[a], index[b])}
    cases = []
    while missing:
        best = max(product(*index), key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        cases.append({name: values[name][i] for name, i in zip(names, best, strict=True)})
    return cases


def _pairs(case: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(case), 2))


def start() -> list[torch.Tensor]:
    return [p.detach() for p in make_net().parameters()]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
