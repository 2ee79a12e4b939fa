"""The list of workers of examples/one_device.py against the reference, against torch.optim.SGD, and in a run."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import saef
from support import EXAMPLES
from support.reference import Settings, identity, run, scaled_sign, top_k

sys.path.insert(0, str(EXAMPLES))

import one_device
import table1
from data import Images
from one_device import WAYS, Workers, with_batch_statistics

K, STEPS, DECAY = 4, 7, 5e-3
LRS = [0.1, 0.1, 0.3, 0.3, 0.0, 0.1, 0.01]
COMPRESSORS = {
    "identity": (saef.Identity(), identity),
    "top-k": (saef.TopK(0.1, block="layer"), top_k(0.1)),
    "sign": (saef.ScaledSign(block="layer"), scaled_sign),
}
METHODS = [
    ("identity", 0.0, None),
    *((c, s, p) for c in ("top-k", "sign") for s, p in ((0, None), (1, None), (1, 3), (1, 1))),
]


def make_net() -> nn.Module:
    """Convolutions, batch norm and a linear layer in float64."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    """Images [K, 6, 2, 6, 6] and labels [K, 6] of step t."""
    generator = torch.Generator().manual_seed(t)
    images = torch.randn(K, 6, 2, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (K, 6), generator=generator)


def make(name: str, ahead: float, period: int | None, way: str = "streams") -> Workers:
    averaging = None if period is None else saef.AllReduce(period)
    settings = {"momentum": 0.9, "weight_decay": DECAY, "way": way}
    return Workers(make_net(), K, COMPRESSORS[name][0], ahead, averaging, **settings)


def weights(workers: Workers) -> Tensor:
    """x in the parameters' own order."""
    return torch.cat([p.reshape(-1) for p in workers.tensors(workers.x)])


def trajectory(workers: Workers) -> Tensor:
    found = [weights(workers)]
    for t, lr in enumerate(LRS):
        workers.lr.fill_(lr)
        workers.begin(t)
        workers.step(*batch(t))
        found.append(weights(workers))
    return torch.stack(found)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("way", [WAYS[0], *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])])
@pytest.mark.parametrize(("name", "ahead", "period"), METHODS)
def test_the_list_of_workers_is_the_reference(name: str, ahead: float, period: int | None, way: str) -> None:
    net = with_batch_statistics(make_net())
    names = [n for n, _ in net.named_parameters()]

    def gradient(k: int, t: int, params: list[Tensor]) -> list[Tensor]:
        params = [p.requires_grad_() for p in params]
        images, labels = batch(t)
        output = functional_call(net, dict(zip(names, params, strict=True)), (images[k],))
        return list(torch.autograd.grad(F.cross_entropy(output, labels[k]), params))

    averaging = None if period is None else ("allreduce", period)
    settings = Settings(COMPRESSORS[name][1], step_ahead=ahead, averaging=averaging, momentum=0.9, weight_decay=DECAY)
    reference, x, x_tilde = run(settings, [p.detach() for p in net.parameters()], gradient, LRS, K)
    workers = make(name, ahead, period, way)
    assert_equal(trajectory(workers), x)
    assert (x[1:] - x[:-1]).norm() > 0.1  # they have moved
    if way != "channels-last":
        assert_equal(workers.e, torch.stack(reference.e))
        assert_equal(workers.m, torch.stack(reference.m))
        assert_equal(workers.x_tilde(), x_tilde[-1])


def test_full_precision_is_torch_sgd() -> None:
    method, net = table1.METHODS["full precision"], with_batch_statistics(make_net())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=DECAY)
    workers = Workers(make_net(), K, method.compressor, method.ahead, momentum=0.9, weight_decay=DECAY)
    expected = [weights(workers)]
    for t, lr in enumerate(LRS):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        for images, labels in zip(*batch(t), strict=True):  # each worker's batch has batch norm of its own, as in DDP
            (F.cross_entropy(net(images), labels) / K).backward()
        optimizer.step()
        expected.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert_equal(trajectory(workers), torch.stack(expected))


def test_crops_and_flips_are_those_of_the_plan() -> None:
    pixels = torch.randint(256, (20, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.rand(3, 1, 1) * 100, torch.rand(3, 1, 1) + 1
    batches = table1.Batches(Images(pixels, torch.arange(20), mean, std), 4)
    batches.draw(13, seed=1)
    assert batches.plan.shape == (13, 4, 4) and batches.per_epoch == 5
    for epoch in batches.plan[:5], batches.plan[5:10]:
        assert sorted(epoch[:, :, 0].flatten().tolist()) == list(range(20))
    assert batches.plan[..., 1:3].unique().tolist() == [0, 1, 2, 3, 4] and batches.plan[..., 3].unique().tolist() == [
        0,
        1,
    ]
    for plan in batches.plan:
        batches.now.copy_(plan)
        images, labels = batches.take()
        for image, label, (index, down, right, flipped) in zip(images, labels, plan.tolist(), strict=True):
            padded = F.pad(pixels[index], (2, 2, 2, 2))[:, down : down + 6, right : right + 6]
            assert label == index
            assert torch.equal(image, ((padded.flip(2) if flipped else padded).float() - mean) / std)


def test_a_graph_that_does_not_compute_the_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: a graph that, replayed, does what it is told to."""
    x, replay = torch.ones(3), []

    def step() -> None:
        x.mul_(2)

    graph, stream = SimpleNamespace(replay=lambda: replay[0]()), SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "synchronize": lambda: None,
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay[:] = [step]
    assert one_device.capture(step, [x], lambda: [x]) == graph.replay
    assert x.tolist() == [1, 1, 1]
    for wrong in (lambda: x.mul_(2.001), lambda: x.fill_(torch.nan)):
        replay[:] = [wrong]
        with pytest.raises(RuntimeError, match="the first step of the CUDA graph is not the step"):
            one_device.capture(step, [x], lambda: [x])


def test_the_learning_rate_falls_where_the_papers_does() -> None:
    rates = [table1.rate(t, 200, 0.1) for t in range(200)]
    assert [t for t in range(1, 200) if rates[t] != rates[t - 1]] == [100, 150]
    assert [rates[0], rates[100], rates[150]] == pytest.approx([0.1, 0.01, 0.001])


def test_bytes_are_those_of_the_training_scripts() -> None:
    """FM14's network on four ranks, of which docs/performance.md has `state.metrics()`.

    Of these each sends its message to all three others, where sharded servers would halve that.
    """
    net = table1.ResNet(1, 10, 8, 1)
    found = {name: table1.bytes_sent(method, net, 4) for name, method in table1.METHODS.items()}
    assert found["full precision"] == pytest.approx(114_444, rel=1e-4)
    assert found["EF top-1 %"] == found["SAEF top-1 %, p = inf"] == 3_696 / 2
    assert found["EF sign"] == found["SAEF sign, p = inf"] == 7_440 / 2
    for kind in ("top-1 %", "sign"):
        averaging = found[f"SAEF {kind}, p = 20"] - found[f"SAEF {kind}, p = inf"]
        assert averaging == pytest.approx(9_418 - 3_696, abs=1)


def arguments(out: Path, *more: str) -> list[str]:
    flags = [
        "--data",
        "digits",
        "--device",
        "cpu",
        "--width",
        "2",
        "--blocks",
        "1",
        "--images",
        "300",
        "--evaluations",
        "2",
    ]
    return [*flags, "--out", str(out), *more]


@pytest.mark.slow
def test_a_run_is_resumed_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "table1.json"

    def main(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["table1.py", *arguments(out, *more)])
        table1.main()
        return json.loads(out.read_text())

    first = main("--steps", "4")
    assert list(first["rows"]) == list(table1.METHODS) and first["steps"] == 4 and first["epochs"] == 2
    assert "| SAEF top-1 %, p = inf |" in capsys.readouterr().out
    for row in first["rows"].values():
        assert [e["step"] for e in row["evaluations"]] == [2, 4] and [step for step, _ in row["curve"]] == [1, 2, 3, 4]
        assert row["loss"] < 3 and row["accuracy_before_decay"] == row["evaluations"][0]["accuracy"]

    del first["rows"]["EF sign"], first["rows"]["SAEF sign, p = 1"]
    first["rows"]["EF top-1 %"]["loss"] = -1.0  # to be seen again
    out.write_text(json.dumps(first))
    again = main("--seconds-per-row", "1")  # the length is the file's
    assert again["steps"] == 4 and list(again["rows"])[-2:] == ["EF sign", "SAEF sign, p = 1"]
    assert again["rows"]["EF top-1 %"]["loss"] == -1.0
    with pytest.raises(SystemExit, match="seed 0, not 1"):
        main("--steps", "4", "--seed", "1")
    with pytest.raises(SystemExit, match="steps 4, not 5"):
        main("--steps", "5")
