"""What the rule keeps, in the optimizer's own state: momentum, moments under torch's names, and the step they are of.

Frameworks and most scripts save a model and `optimizer.state_dict()`, and nothing else. So the momentum of this rank
lies in `optimizer.state` as views of `Memory.m`, where torch saves it, and whatever is done to it there counts:
loading, clearing, a plain optimizer's momentum from before. The errors cannot lie there (other ranks have others), but
the mark of the step tells when they are of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .memory import Context, Memory
from .weights import held

STEP = "saef_step"  # in the state of the first parameter, or in the first group: the steps committed


@final
class Kept:
    """Memory.m in an optimizer's state.

    Args:
        context, memory: of the state. Errors of another step matter where there are any, `context.owes`.
    """

    def __init__(self, context: Context, memory: Memory) -> None:
        self._rule, self._weights, self._memory, self._owes = context.rule, context.weights, memory, context.owes
        self._names, self._counter = self._rule.names, self._rule.counter
        self._steps = torch.zeros(len(self._weights.parameters), device="cpu")  # as torch has them: a float32 each
        self._handles: list[RemovableHandle] = []
        self._loaded = False  # whether the optimizer has loaded a state since the last step
        self._views: list[list[Tensor]] = []
        self._of: Tensor | None = None  # the m that they are views of
        self._places: list[list[int]] = []  # and where they lie in memory
        self._counters: list[Tensor] = []

    def save_with(self, optimizer: torch.optim.Optimizer) -> None:
        """What this optimizer's state_dict() gives, torch's own optimizer can load."""
        self._save_no_more()
        self._handles.append(optimizer.register_state_dict_post_hook(self._saved))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._has_loaded))

    def _save_no_more(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _has_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self._loaded = True

    def _saved(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {n: self._whole(self._rule.saved(n, v)) if n in self._names else v for n, v in of.items()}
            for key, of in saved["state"].items()
        }
        return {**saved, "state": state}

    @staticmethod
    def _whole(v: Any) -> Any:
        """Of a DTensor a copy: torch.save and deepcopy take none that begins in the middle of a vector."""
        return v.clone() if isinstance(v, Tensor) and held(v) is not v else v

    def show(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's state is what the memory holds."""
        memory, parameters = self._memory, self._weights.parameters
        self._loaded = False
        if self._of is not memory.m:
            self._of, self._views = memory.m, [self._cut(m) for m in memory.m]
            self._places = [self._places_of(views) for views in self._views]
        for name, views in zip(self._names, self._views, strict=False):
            for p, view in zip(parameters, views, strict=True):
                optimizer.state[p][name] = view
        if self._counter is not None:
            self._counters = [*self._steps.unbind()]
            for p, steps in zip(parameters, self._counters, strict=True):
                optimizer.state[p][self._counter] = steps
        self._set_mark(optimizer)

    @staticmethod
    def _places_of(views: Sequence[Tensor]) -> list[int]:
        return [*map(Tensor.data_ptr, map(held, views))]

    def _as_shown(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether no entry was replaced, removed or put elsewhere. What is written to momentum in place is there."""
        states = [_state(optimizer, p) for p in self._weights.parameters]
        shown = [*zip(self._names, self._views, strict=False)]
        if self._counter is not None:
            shown.append((self._counter, self._counters))
        return (
            all(state.get(name) is view for name, views in shown for state, view in zip(states, views, strict=True))
            and [self._places_of(views) for views in self._views] == self._places
            and (self._counter is None or bool((self._steps == self._memory.steps).all()))
        )

    def _cut(self, m: Tensor) -> list[Tensor]:
        return [self._weights.like_parameter(i, part) for i, part in enumerate(self._weights.cut(m))]

    def committed(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: the views are there already, unless the rule keeps more than before."""
        if self._of is self._memory.m:
            self._set_mark(optimizer)
        else:
            self.show(optimizer)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: take over what was done to the optimizer's state since the last one.

        Raises:
            RuntimeError: if it is the state of another step, while the errors are not.
        """
        mark = self._mark(optimizer)
        if mark is None:
            if (self._loaded or self._of_another(optimizer)) and self._owes and self._errors():
                raise RuntimeError(
                    "the optimizer has loaded the state of a run without saef, or of before its first step, but this "
                    f"state's errors are of step {self._memory.steps}: load a checkpoint of saef, or call "
                    "state.reset_errors() to go on without what the errors owe"
                )
        elif mark != self._memory.steps and self._owes:
            raise RuntimeError(
                f"the optimizer has loaded the state of step {mark}, but this state's errors are of step "
                f"{self._memory.steps}; model.state_dict() and optimizer.state_dict() do not have them. Load them too "
                "(state.load_state_dict, saef.load_checkpoint), before the first forward, or call state.reset_errors() "
                "to go on without what the errors owe"
            )
        self.adopt(optimizer)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Memory <- the optimizer's momentum and step, unless it is the memory's own step."""
        mark, memory = self._mark(optimizer), self._memory
        shown = self._of is memory.m and mark == memory.steps
        if shown and self._as_shown(optimizer):
            self._loaded = False
            return
        if mark != memory.steps or (shown and not self._loaded):  # what is loaded of this very step is another rank's
            self._read(optimizer)
            self._of = None  # views may lie elsewhere (.data = ...)
            steps = self._counted(optimizer) if mark in (None, memory.steps) else mark
            if steps is not None and steps != memory.steps:
                memory.count_from(steps, memory.skipped, memory.skipped_in_a_row, steps)
        self.show(optimizer)

    def _counted(self, optimizer: torch.optim.Optimizer) -> int | None:
        """The steps that torch's optimizer has counted; None if it counts none. RuntimeError if parameters differ."""
        if self._counter is None:
            return None
        found = [_state(optimizer, p).get(self._counter, 0) for p in self._weights.parameters]
        every = {int(steps) for steps in found}
        if len(every) > 1:
            few = [n for n, s in zip(self._weights.names, found, strict=True) if int(s) < max(every)]
            raise RuntimeError(
                f"the optimizer's state counts between {min(every)} and {max(every)} steps of its parameters (fewer of "
                f'{few[:5]}), but here all have one number, by which m and v are corrected: set the "{self._counter}" '
                "of each to the same number, or clear the optimizer's state"
            )
        return every.pop()

    def release(self, optimizer: torch.optim.Optimizer, keep: bool) -> None:
        """For torch's own step. keep: momentum, too; where each rank has its own, weights would drift apart with it."""
        if not keep:
            self._save_no_more()
            self._clear(optimizer)
            return
        self.let_go(optimizer)
        for p in self._weights.parameters:
            state = _state(optimizer, p)
            state.update({name: self._rule.saved(name, state[name]) for name in self._names if name in state})

    def _clear(self, optimizer: torch.optim.Optimizer) -> None:
        self._marked(optimizer).pop(STEP, None)
        for p in self._weights.parameters:
            for name in (*self._names, self._counter or STEP):
                _state(optimizer, p).pop(name, None)

    def loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """The memory is a checkpoint's now: what the optimizer has beside it does not count."""
        self._clear(optimizer)
        self.show(optimizer)

    def let_go(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's state is its own, momentum with it: another `Kept` will `take` what it finds there."""
        self._save_no_more()
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._marked(optimizer).pop(STEP, None)
        for p in self._weights.parameters:
            state = _state(optimizer, p)
            state.update({name: state[name].clone() for name in (*self._names, self._counter) if name in state})
            if id(p) not in has:
                optimizer.state.pop(p, None)  # or optimizer.state_dict() would fail

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Memory <- the optimizer's momentum, which is of this step; 0 where there is none."""
        self._read(optimizer)
        self.show(optimizer)

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        memory = self._memory
        found = [[_state(optimizer, p).get(n) for p in self._weights.parameters] for n in self._names]
        if any(v is not None for vectors in found for v in vectors):
            memory.grow(len(self._names), decay=False)
        for m, vectors in zip(memory.m, found, strict=False):
            for part, v in zip(self._weights.cut(m), vectors, strict=True):
                part.zero_() if v is None else part.copy_(held(v))

    def _set_mark(self, optimizer: torch.optim.Optimizer) -> None:
        self._steps.fill_(self._memory.steps)
        if self._names:
            optimizer.state[self._weights.parameters[0]][STEP] = self._memory.steps
        else:
            optimizer.param_groups[0][STEP] = self._memory.steps

    def _mark(self, optimizer: torch.optim.Optimizer) -> int | None:
        mark: Any = self._marked(optimizer).get(STEP)
        return None if mark is None else int(mark)

    def _marked(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Where the mark is: beside the rule's vectors, or in the first group, where an optimizer keeps its own."""
        group: dict[str, Any] = optimizer.param_groups[0]
        return _state(optimizer, self._weights.parameters[0]) if self._names else group

    def _of_another(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether there is momentum of another optimizer; else the state was cleared, or there has never been one."""
        if not self._names:
            return True
        own = {id(view) for views in self._views for view in views}
        states = [_state(optimizer, p) for p in self._weights.parameters]
        return any(n in state and id(state[n]) not in own for state in states for n in self._names)

    def _errors(self) -> bool:
        return bool(self._memory.e.any()) or bool(self._memory.e_server.any())


def _state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter, without making one."""
    found: dict[str, Any] = optimizer.state.get(p, {})
    return found
