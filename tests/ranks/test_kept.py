"""The momentum lies in the optimizer's state, where frameworks save it, with a mark of the step of the errors."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from support.ranks import RankPool
from support.training import batch, flat, make_net

pytestmark = pytest.mark.slow

ERRORS = saef.TopK(0.2, block=10)


class Run:
    """One rank's training; `compressor` None: plain DDP."""

    def __init__(self, group: dist.ProcessGroup, compressor: saef.Compressor | None, **sgd: Any) -> None:
        self.net, self.rank, self.group = make_net(), dist.get_rank(group), group
        self.model = DDP(self.net, process_group=group, bucket_cap_mb=0.0005)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, **{"momentum": 0.9, **sgd})
        self.state: Any = None
        self.attach(compressor)

    def attach(self, compressor: saef.Compressor | None) -> None:
        if compressor is not None:
            self.state = saef.SAEFState(self.model, self.optimizer, compressor=compressor)
            self.model.register_comm_hook(self.state, saef_hook)

    def train(self, first: int, last: int) -> "Run":
        for t in range(first, last):
            self.optimizer.zero_grad()
            x, y = batch(self.rank, t)
            F.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def saved(self) -> bytes:
        """What most scripts save."""
        file = io.BytesIO()
        torch.save({"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, data: bytes) -> "Run":
        parts = torch.load(io.BytesIO(data), weights_only=True)
        self.net.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return self


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def momentum_of(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.cat([optimizer.state[p]["momentum_buffer"].reshape(-1) for p in optimizer.param_groups[0]["params"]])


def resume(group: dist.ProcessGroup, kind: str) -> str:
    """Identity owes nothing: model and optimizer are the whole state, and all ways of resuming are plain DDP's."""
    plain = Run(group, None).train(0, 8)
    data = Run(group, None).train(0, 4).saved() if kind == "from plain" else None
    first = Run(group, saef.Identity()).train(0, 4)
    same(momentum_of(first.optimizer), first.state.m)
    if kind == "new objects":
        second = Run(group, saef.Identity()).load(first.saved())
    elif kind == "loaded before the state is made":
        second = Run(group, None).load(first.saved())
        second.attach(saef.Identity())
    elif kind == "rollback":
        data = first.saved()
        second = first.train(4, 6).load(data)
    elif kind == "from plain":
        assert data is not None
        second = Run(group, saef.Identity()).load(data)
    elif kind == "to plain":  # every rank its own momentum, which with Identity is the plain one's share
        second = Run(group, None).load(first.saved())
        for p in second.net.parameters():
            dist.all_reduce(second.optimizer.state[p]["momentum_buffer"], group=group)
            second.optimizer.state[p]["momentum_buffer"] /= 2
    else:  # "warmed up": saef takes over in the middle
        second = Run(group, None).train(0, 4)
        second.attach(saef.Identity())
    second.train(4, 8)
    same(flat(second.net), flat(plain.net))
    if second.state is not None and kind not in ("from plain", "warmed up"):
        assert second.state.steps == 8
    return "ok"


KINDS = ["new objects", "loaded before the state is made", "rollback", "from plain", "to plain", "warmed up"]


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_optimizer_resume_what_owes_nothing(pool: RankPool, kind: str) -> None:
    assert pool.run(resume, kind, ranks=2) == ["ok"] * 2


def resume_owing(group: dist.ProcessGroup, kind: str) -> str:
    first = Run(group, ERRORS).train(0, 4)
    data, state = first.saved(), first.state.state_dict()
    if kind == "rollback":
        second = first.train(4, 6).load(data)
    elif kind == "plain into errors":
        second = first.load(Run(group, None).train(0, 2).saved())
    else:
        second = Run(group, ERRORS).load(data)
    with pytest.raises(RuntimeError, match=r"errors are of step.*reset_errors") as caught:
        second.train(4, 5)
    said = str(caught.value)
    if kind == "new objects, then its errors":
        second.state.load_state_dict(state)
        again = Run(group, ERRORS)
        again.state.load_state_dict(state)  # in the other order
        again.load(data)
        same(flat(again.train(4, 8).net), flat(first.train(4, 8).net))
        same(flat(second.train(4, 8).net), flat(first.net))
        assert second.state.steps == 8
    else:
        before = momentum_of(second.optimizer).clone()
        second.state.reset_errors()
        assert not second.state.e.any() and not second.state.e_server.any()
        same(second.state.m, before)
        assert second.state.steps == {"rollback": 4, "plain into errors": 4, "new objects": 4}[kind]
        second.train(4, 6)
    return said


@pytest.mark.parametrize("kind", ["new objects", "rollback", "plain into errors", "new objects, then its errors"])
def test_errors_of_another_step_are_not_gone_on_with_in_silence(pool: RankPool, kind: str) -> None:
    for said in pool.run(resume_owing, kind, ranks=2):
        assert ("without saef" in said) == (kind == "plain into errors")


def clear(group: dist.ProcessGroup, compressor: Any) -> str:
    """As `optimizer.state.clear()` works without saef: the momentum is 0; errors stay."""
    run = Run(group, compressor).train(0, 4)
    e = run.state.e.clone()
    run.optimizer.state.clear()
    x, y = batch(run.rank, 4)
    run.optimizer.zero_grad()
    F.mse_loss(run.model(x), y).backward()
    assert torch.equal(run.state.e, e) and not run.state.m.any()
    run.optimizer.step()
    assert run.state.m.any()
    same(momentum_of(run.optimizer), run.state.m)
    return "ok"


@pytest.mark.parametrize("compressor", [saef.Identity(), ERRORS], ids=repr)
def test_a_cleared_state_is_a_momentum_of_zero(pool: RankPool, compressor: Any) -> None:
    assert pool.run(clear, compressor, ranks=2) == ["ok"] * 2


def by_dcp(group: dist.ProcessGroup, compressor: Any) -> str:
    """torch.distributed.checkpoint's way, which also steps a new optimizer on zero gradients with lr 0."""
    first = Run(group, compressor)
    get_state_dict(first.net, first.optimizer)  # before any step
    first.train(0, 4)
    expected = flat(Run(group, compressor).train(0, 4).net)
    same(flat(first.net), expected)
    model, optimizer = copy.deepcopy(get_state_dict(first.net, first.optimizer))
    second = Run(group, compressor)
    set_state_dict(second.net, second.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    if isinstance(compressor, saef.TopK):
        second.state.load_state_dict(first.state.state_dict())
    same(flat(second.train(4, 8).net), flat(first.train(4, 8).net))
    return "ok"


@pytest.mark.parametrize("compressor", [saef.Identity(), ERRORS], ids=repr)
def test_checkpoints_by_torch_distributed(pool: RankPool, compressor: Any) -> None:
    assert pool.run(by_dcp, compressor, ranks=2) == ["ok"] * 2


def without_momentum(group: dist.ProcessGroup) -> str:
    run = Run(group, saef.Identity(), momentum=0.0).train(0, 3)
    assert [list(s) for s in run.optimizer.state_dict()["state"].values()] == [["saef_step"]]
    same(flat(Run(group, saef.Identity(), momentum=0.0).load(run.saved()).train(3, 5).net), flat(run.train(3, 5).net))
    run.state.detach()
    assert all(not s for s in run.optimizer.state_dict()["state"].values())
    return "ok"


def test_without_momentum_there_is_the_mark_alone(pool: RankPool) -> None:
    assert pool.run(without_momentum, ranks=2) == ["ok"] * 2
