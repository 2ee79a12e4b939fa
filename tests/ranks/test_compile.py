"""torch.compile, in all places where users put it: the same steps as without.

`eager` runs what dynamo has traced, `aot_eager` also what autograd has traced ahead of time; both compute with the same
operations in the same order as plain PyTorch. `inductor` makes others of them, so it is equal to rounding.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import batch, flat, make_net, way_of_keeping_x

pytestmark = pytest.mark.slow

WAYS = ["copies", "swaps"]
ERRORS = saef.TopK(0.2, block=10)


class Net(nn.Module):
    """A module of the user's own: dynamo leaves torch's own classes alone where they are outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.sin(x))


class Run:
    """One rank's DDP, compiled by `backend` (None: not at all), with saef or (`compressor` None) without."""

    def __init__(self, group: dist.ProcessGroup, way: str, backend: str | None, compressor: Any) -> None:
        self.net, self.rank, self.group = Net(), dist.get_rank(group), group
        self.way, self.backend, self.compressor, self.state = way, backend, compressor, None
        self.optimizer: Any = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.seen: list[float] = []

    def wrap(self, net: nn.Module | None = None, **ddp: Any) -> DDP:
        return DDP(self.net if net is None else net, process_group=self.group, **ddp)

    def attach(self, model: Any) -> None:
        if self.compressor is not None:
            with mock.patch("saef.step.joining.create", way_of_keeping_x(self.way)):
                self.state = saef.SAEFState(model, self.optimizer, compressor=self.compressor)
            model.register_comm_hook(self.state, saef_hook)

    def compiled(self, what: Any, **options: Any) -> Any:
        return what if self.backend is None else torch.compile(what, backend=self.backend, **options)

    def compile_in_place(self, module: nn.Module, **options: Any) -> None:
        if self.backend is not None:
            module.compile(backend=self.backend, **options)

    def train(
        self, model: Callable[..., Any], evaluated: Callable[..., Any] | None = None, between: bool = True
    ) -> None:
        """Evaluates between a forward and its backward, and after each step."""
        for t in range(5):
            x, y = batch(self.rank, t)
            self.optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            if t == 3 and between:
                self.evaluate(model if evaluated is None else evaluated, x)
            loss.backward()
            self.optimizer.step()
            self.seen.append(float(loss.detach()))
            self.evaluate(model if evaluated is None else evaluated, x)

    def evaluate(self, model: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.no_grad():
            self.seen.append(float(model(x).sum()))


def net_before_ddp(run: Run) -> None:
    model = run.wrap(run.compiled(run.net, fullgraph=True))
    run.attach(model)
    run.train(model)


def net_in_place_before(run: Run) -> None:
    run.compile_in_place(run.net, fullgraph=True)
    model = run.wrap()
    run.attach(model)
    run.train(model, run.net, between=False)


def net_in_place_after(run: Run) -> None:
    model = run.wrap()
    run.attach(model)
    run.compile_in_place(run.net)
    run.train(model, run.net)


def ddp_before(run: Run) -> None:
    model = run.wrap()
    compiled = run.compiled(model)
    run.attach(model)
    run.train(compiled)


def ddp_after(run: Run) -> None:
    model = run.wrap(gradient_as_bucket_view=True)
    run.attach(model)
    run.train(run.compiled(model), model)


def ddp_given(run: Run) -> None:
    """The state gets what torch.compile returned."""
    model = run.compiled(run.wrap())
    run.attach(model)
    run.train(model)


def ddp_in_place_before(run: Run) -> None:
    model = run.wrap()
    run.compile_in_place(model)
    run.attach(model)
    run.train(model)


def ddp_in_place_after(run: Run) -> None:
    model = run.wrap(static_graph=True)
    run.attach(model)
    run.compile_in_place(model)
    run.train(model, run.net)


def ddp_used_before(run: Run) -> None:
    """Traced without saef's hooks, which are there later."""
    model = run.wrap()
    compiled = run.compiled(model)
    x, y = batch(run.rank, 99)
    with model.no_sync():
        F.mse_loss(compiled(x), y).backward()
    run.evaluate(compiled, x)
    run.optimizer.zero_grad()
    run.attach(model)
    run.train(compiled)


def step_function(run: Run) -> None:
    model = run.wrap()
    run.attach(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        run.optimizer.step()
        return loss.detach()

    step = run.compiled(step)
    run.seen = [float(step(*batch(run.rank, t))) for t in range(5)]


def loss_function(run: Run) -> None:
    """With accumulation: two calls a step."""
    model = run.wrap()
    run.attach(model)
    loss_of = run.compiled(lambda x, y: F.mse_loss(torch.tanh(model(x)), y))
    for t in range(5):
        run.optimizer.zero_grad()
        with model.no_sync():
            loss_of(*batch(run.rank, t)).backward()
        loss = loss_of(*batch(run.rank, t + 50))
        loss.backward()
        run.optimizer.step()
        run.seen.append(float(loss.detach()))


def optimizer_step(run: Run) -> None:
    model = run.wrap()
    run.attach(model)
    step = run.compiled(lambda: run.optimizer.step())
    for t in range(5):
        run.optimizer.zero_grad()
        x, y = batch(run.rank, t)
        F.mse_loss(model(x), y).backward()
        step()


PLACES = [net_before_ddp, net_in_place_before, net_in_place_after, ddp_before, ddp_after, ddp_given]
PLACES += [ddp_in_place_before, ddp_in_place_after, ddp_used_before, step_function, loss_function, optimizer_step]


def train(
    group: dist.ProcessGroup, place: Callable[[Run], None], way: str, backend: str | None, compressor: Any
) -> tuple[Tensor, Tensor]:
    run = Run(group, way, backend, compressor)
    torch._dynamo.utils.counters.clear()
    try:
        place(run)
    finally:
        torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert backend is None or graphs > 0 or place is optimizer_step  # whose gradients are hidden
    assert run.state is None or run.state.steps == 5
    return flat(run.net), torch.tensor(run.seen, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_compiled_steps_are_those_without(pool: RankPool, place: Any, way: str) -> None:
    """Identity is plain DDP; with errors every bit is that of the run that is not compiled."""
    plain = pool.run(train, place, way, None, None, ranks=2)
    for ours, expected in zip(pool.run(train, place, way, "aot_eager", saef.Identity(), ranks=2), plain, strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    not_compiled = pool.run(train, place, way, None, ERRORS, ranks=2)
    for backend in ("eager", "aot_eager"):
        for ours, expected in zip(pool.run(train, place, way, backend, ERRORS, ranks=2), not_compiled, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), backend


@pytest.mark.parametrize("place", [net_in_place_before, ddp_after, step_function], ids=lambda place: place.__name__)
def test_inductor_is_equal_to_rounding(pool: RankPool, place: Any) -> None:
    """In float64; its C++ takes a compiler, as numba's kernels do not."""
    expected = pool.run(train, place, "swaps", None, saef.Identity(), ranks=2)
    for ours, plain in zip(
        pool.run(train, place, "swaps", "inductor", saef.Identity(), ranks=2), expected, strict=True
    ):
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def fullgraph(group: dist.ProcessGroup, what: str) -> str:
    """What cannot be one graph, and would not be right as one."""
    run = Run(group, "swaps", "eager", ERRORS)
    model = run.wrap()
    run.attach(model)
    x, y = batch(run.rank, 0)
    run.train(model)
    before = flat(run.net)
    try:
        with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
            if what == "evaluation in between":
                run.net.compile(backend="eager", fullgraph=True)
                loss = F.mse_loss(model(x), y)
                run.evaluate(run.net, x)
            elif what == "step of another optimizer":
                other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
                torch.compile(lambda: other.step(), backend="eager", fullgraph=True)()
            else:
                torch.compile(lambda: run.optimizer.step(), backend="eager", fullgraph=True)()
        if what == "evaluation in between":
            loss.backward()
            run.optimizer.step()
            run.evaluate(run.net, x)
    finally:
        torch._dynamo.reset()
    assert torch.equal(flat(run.net), before) == (what != "evaluation in between")
    return str(caught.value)


@pytest.mark.parametrize("what", ["evaluation in between", "step of another optimizer", "own step"])
def test_what_cannot_be_one_graph_says_why(pool: RankPool, what: str) -> None:
    for said in pool.run(fullgraph, what, ranks=2):
        assert "saef exchanges the parameters' values here. With fullgraph=True compile the network" in said


def another_optimizer(group: dist.ProcessGroup) -> str:
    """A compiled step does not hide that it is another optimizer's."""
    run = Run(group, "swaps", "eager", ERRORS)
    model = run.wrap()
    run.attach(model)
    other = torch.optim.SGD(run.net.parameters(), lr=0.1)
    x, y = batch(run.rank, 0)
    F.mse_loss(model(x), y).backward()
    try:
        with pytest.raises(RuntimeError, match="Create SAEFState with the optimizer that steps") as caught:
            torch.compile(lambda: other.step(), backend="eager")()
    finally:
        torch._dynamo.reset()
    return str(caught.value)


def test_a_compiled_step_of_another_optimizer_is_refused(pool: RankPool) -> None:
    pool.run(another_optimizer, ranks=2)
