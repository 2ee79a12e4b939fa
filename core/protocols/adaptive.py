"""Stochastic adaptive methods, MixML eq. (11), as one torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


@final
class StochasticAdaptive(torch.optim.Optimizer):
    """x <- x - alpha v^-p m, entry by entry, with

        m <- beta_1 m + (1 - beta_1) g                        from 0
        v <- max(beta_2 v + (1 - beta_2) g^2, v)              from v_0

    which MixML's Theorem 2 covers under any communication protocol:

        method                       p             betas
        momentum SGD                 0             (beta_1, any)
        AMSGrad                      1/2           (beta_1, beta_2)
        RMSProp, corrected           1/2           (0, beta_2)
        PAdam                        (0, 1/2)      (beta_1, beta_2)

    As in eq. (11), and other than torch.optim.Adam(amsgrad=True), there is one v, which never decreases; no bias
    correction; and v_0, the constant c of Lemma 4, instead of an eps in the denominator. Momentum SGD is
    torch.optim.SGD(momentum=beta_1) with the learning rate (1 - beta_1) alpha.

    m and v of a 16-bit parameter are float32 (float16 would round v_0 = 1e-8 to 0): the step is computed there, and the
    parameter rounded once.

    Args:
        params: parameters or param groups; dense, real, floating.
        lr: alpha, finite.
        betas: (beta_1, beta_2), each in [0, 1).
        p: the power of v, in [0, 1/2].
        v0: v before the first step, positive and within float32's range: it bounds the first steps by alpha v0^-p |g|.
        weight_decay: lambda, finite; lambda x is added to g.

    Raises:
        ValueError: on settings outside of these ranges. TypeError: on sparse or complex gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        p: float = 0.5,
        v0: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "p": p, "v0": v0, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group, float32 = {**self.defaults, **param_group}, torch.finfo(torch.float32)
        betas = group["betas"]
        two = isinstance(betas, Sequence) and len(betas) == 2
        for name, good, meaning in (
            ("lr", 0 <= group["lr"] < math.inf, "at least 0, and finite"),
            ("betas", two and all(0 <= beta < 1 for beta in betas), "in [0, 1), and two of them"),
            ("p", 0 <= group["p"] <= 0.5, "in [0, 1/2]: 0 is momentum SGD, 1/2 AMSGrad"),
            ("v0", float32.tiny <= group["v0"] <= float32.max, "positive, and within float32's range"),
            ("weight_decay", 0 <= group["weight_decay"] < math.inf, "at least 0, and finite"),
        ):
            if not good:
                raise ValueError(f"{name} must be {meaning}, got {group[name]}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round m and v to the 16 bits of their parameter."""
        found: list[dict[str, Any]] = []
        last = self.register_load_state_dict_pre_hook(lambda _, given: found.append(given))  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        numbers, params = (
            chain.from_iterable(g["params"] for g in groups) for groups in (found[0]["param_groups"], self.param_groups)
        )
        for number, x in zip(numbers, params, strict=True):
            for name in {"m", "v"} & self.state.get(x, {}).keys():
                self.state[x][name] = found[0]["state"][number][name].to(x.device, _wide(x), copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of eq. (11). closure: evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta_1, beta_2), power = group["betas"], group["p"]
            for x in (x for x in group["params"] if x.grad is not None):
                g, state = x.grad, self.state[x]
                if g.layout != torch.strided or not g.is_floating_point():
                    raise TypeError(f"gradients must be dense and real, got {g.layout}, {g.dtype}")
                if not state:
                    state["m"] = torch.zeros_like(x, dtype=_wide(x))
                    state["v"] = torch.full_like(x, group["v0"], dtype=_wide(x))
                wide, g = x.to(_wide(x)), g.to(_wide(x))  # x and g themselves, but for 16 bits
                g = g.add(wide, alpha=group["weight_decay"]) if group["weight_decay"] else g
                m, v = state["m"], state["v"]
                m.lerp_(g, 1.0 - beta_1)
                torch.maximum(torch.lerp(v, g * g, 1.0 - beta_2), v, out=v)
                x.copy_(wide.addcmul_(m, v.pow(-power), value=-group["lr"]))
        return loss


def _wide(x: Tensor) -> torch.dtype:
    """Of what is computed for a parameter."""
    return torch.promote_types(x.dtype, torch.float32)
