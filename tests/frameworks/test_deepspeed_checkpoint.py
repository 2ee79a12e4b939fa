"""engine.save_checkpoint and load_checkpoint, with no other call: bit for bit, and x~ on other numbers of ranks."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import saef
from support.deepspeed_ranks import Net, Setup, everything, resume, save, start, steps
from support.equal import assert_equal
from support.ranks import RankPool

STOP, END = 12, 20  # in the middle of the periods below, of which each comes to its end once more
GROUPS = [{"weight_decay": 1e-3}, {"nesterov": True}]
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 40}}
SIGN = {"compressor": {"type": "sign", "block": 20}}
TOPK = {"compressor": {"type": "topk", "ratio": 0.1, "block": 30}}
METHODS: dict[str, dict[str, Any]] = {
    "sign": {**SIGN, "averaging": {"type": "allreduce", "period": 10}, "exchange": "sharded"},
    "topk": {**TOPK, "averaging": {"type": "rotating", "period": 7}, "exchange": "replicated"},
    "dist-EF": {**SIGN, "step_ahead": 0.0, "weight_decay_mode": "outer", "max_grad_norm": 0.5},
    "bf16 topk": {
        "compressor": {**TOPK["compressor"], "values": "bfloat16"},
        "averaging": {"type": "rotating", "period": 7},
    },
}


def setup(method: str, ranks: int = 4, **changed: Any) -> Setup:
    bf16 = method.startswith("bf16")
    params = {"lr": 0.1, "momentum": 0.9, **METHODS[method], **changed}
    config = {"scheduler": SCHEDULER, "bf16": {"enabled": bf16}}
    return Setup(params, GROUPS, torch.bfloat16 if bf16 else torch.float32, 2, config)


def test_resume_is_bit_for_bit_in_fresh_processes(pools: dict[int, RankPool], tmp_path: Path) -> None:
    pool = pools[4]
    undisturbed = {m: pool.run(save, setup(m), tmp_path / m, STOP, END) for m in METHODS}
    pool.stop()  # it starts anew
    for method in METHODS:
        resumed = pool.run(resume, setup(method), tmp_path / method, END)
        for k, ((expected, x_tilde, _), (found, loaded_x_tilde, (path, client))) in enumerate(
            zip(undisturbed[method], resumed, strict=True)
        ):
            assert_equal(expected, found, f"{method}/rank {k}")
            assert torch.equal(x_tilde, loaded_x_tilde)
            assert client["epoch"] == 3
            assert path.endswith("mp_rank_00_model_states.pt")
        assert not torch.equal(resumed[0][0]["e"], resumed[1][0]["e"])  # errors are the ranks' own


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_another_number_of_ranks_keeps_x_tilde(
    pools: dict[int, RankPool], tmp_path: Path, method: str, before: int, after: int
) -> None:
    _, x_tilde, _ = pools[before].run(save, setup(method), tmp_path, STOP, STOP, ranks=before)[0]
    resumed = pools[after].run(resume, setup(method), tmp_path, END, ranks=after)
    for found, loaded_x_tilde, _ in resumed:
        # Three vectors of float32 are added, each rounded to 6e-8 of its largest entry.
        torch.testing.assert_close(loaded_x_tilde, x_tilde, rtol=0, atol=1e-6 * float(x_tilde.abs().max()))
        assert found["counters"][0] == found["counters"][3] == END
        assert torch.equal(found["x"], resumed[0][0]["x"])
        assert torch.isfinite(found["x"]).all()
        assert float((found["x"] - x_tilde).abs().max()) > 1e-3  # it has trained on


def refuse(group: dist.ProcessGroup, folder: Path) -> dict[str, str]:
    """What loading says where it cannot go on, and what is left of the state then."""
    rank, net = dist.get_rank(), Net()
    engine = start(setup("sign"), net)
    said = {}

    def attempt(name: str, error: type[Exception], load: Any) -> None:
        before = everything(engine)
        with pytest.raises(error) as caught:
            load()
        said[name] = str(caught.value)
        if name != "mixed":
            assert_equal(everything(engine), before, name)

    steps(engine, range(3))
    engine.save_checkpoint(str(folder / "ours"), tag="a")
    steps(engine, range(3, 5))
    attempt("tags to save", ValueError, lambda: engine.save_checkpoint(str(folder / "ours"), tag=f"rank{rank}"))
    attempt("tags to load", ValueError, lambda: engine.load_checkpoint(str(folder / "ours"), "b" if rank else None))
    attempt("no such tag", ValueError, lambda: engine.load_checkpoint(str(folder / "ours"), "b"))
    assert engine.load_checkpoint(str(folder / "nothing")) == (None, None)

    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    config = {"train_batch_size": 16, "zero_optimization": {"stage": 0}}
    other, *_ = deepspeed.initialize(model=net, optimizer=plain, config=config)
    other.save_checkpoint(str(folder / "plain"))
    attempt("another optimizer", ValueError, lambda: engine.load_checkpoint(str(folder / "plain")))

    # An interrupted second save under the same tag: SAEF's files are of step 5, DeepSpeed's of step 3.
    saef.save_checkpoint(folder / "ours" / "a" / "saef", engine.optimizer.saef, {"global_steps": 5}, keep=1)
    attempt("mixed", RuntimeError, lambda: engine.load_checkpoint(str(folder / "ours"), "a"))
    engine.destroy()
    return said


def test_what_cannot_be_loaded_is_said_and_nothing_changes(pools: dict[int, RankPool], tmp_path: Path) -> None:
    for said in pools[2].run(refuse, tmp_path, ranks=2):
        assert "the ranks name different checkpoints" in said["tags to save"]
        assert "tag: rank 0 has 'rank0', rank 1 has 'rank1'" in said["tags to save"]
        assert "tag: rank 0 has 'a', rank 1 has 'b'" in said["tags to load"]
        assert "b/saef holds no complete checkpoint of SAEF" in said["no such tag"]
        assert "saved with another optimizer" in said["another optimizer"]
        assert "load_module_only=True" in said["another optimizer"]
        assert "DeepSpeed's files are of step 3, SAEF's of step 5" in said["mixed"]


def partly(group: dist.ProcessGroup, folder: Path) -> None:
    """Weights without errors, the same tag again, and DeepSpeed's other ways of saving."""
    engine = start(setup("bf16 topk"), Net())
    steps(engine, range(5), torch.bfloat16)
    x, state = engine.optimizer.saef.weights.x().clone(), engine.optimizer.saef
    for _ in range(2):
        engine.save_checkpoint(str(folder), tag=7)
    assert sorted(p.name for p in (folder / "7" / "saef").iterdir()) == ["000002-step-5"]
    assert (folder / "latest").read_text() == "7"
    steps(engine, range(5, 8), torch.bfloat16)
    e = state.e.clone()
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        engine.load_checkpoint(str(folder), **options)
        assert torch.equal(state.e, e)
        for p, v in zip(state.weights.parameters, state.weights.cut(x), strict=True):
            assert torch.equal(p, v.to(torch.bfloat16))
        assert state.engine._audit.due(state.steps)  # the ranks look again whether their weights are equal
        steps(engine, range(8, 10), torch.bfloat16)
        e = state.e.clone()
    engine(torch.zeros(8, 6, dtype=torch.bfloat16))  # the parameters are x_half now
    x = state.weights.x().clone()
    engine.save_16bit_model(str(folder / "weights"))
    if dist.get_rank() == 0:
        saved = torch.load(folder / "weights" / "pytorch_model.bin", weights_only=True)
        for name, v in zip(state.weights.names, state.weights.cut(x), strict=True):
            assert torch.equal(saved[name], v.to(torch.bfloat16))
    engine.destroy()


def test_parts_of_a_checkpoint(pools: dict[int, RankPool], tmp_path: Path) -> None:
    pools[2].run(partly, tmp_path, ranks=2)
