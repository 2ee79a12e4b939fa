"""`saef.probe`: the ranks' collectives and kernels measured, without a word on how long they take."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import saef
from saef import probe
from saef.comm.exchange import sent_bytes
from saef.hooks import saef_hook
from support.ranks import RankPool

CPU = torch.device("cpu")
NUMELS = [3000, 17, 500]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)


def measure(group: Any) -> tuple[probe.Measured, int]:
    steps = []
    found = probe.measure(CPU, sgd, NUMELS, step=lambda: steps.append(1))
    return found, len(steps)


def test_all_is_measured_and_the_same_on_all_ranks(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool.run(measure)
    for measured, steps in found:
        assert steps == 1 + probe.REPETITIONS
        assert [*measured.kernels] == [*probe.NAMES]
        assert measured.network.workers == 4 and measured.device == "CPU, 1 threads"
        network = measured.network
        for curve in (network.all_reduce, network.all_gather, network.all_to_all, network.together):
            assert curve.sizes[:2] == (0, 1024) and len(curve.sizes) > 2
            assert [*curve.seconds] == sorted(curve.seconds) and curve.seconds[0] > 0
        assert measured == found[0][0]


def step_with_echo(group: Any, workers: int, settings: dict[str, Any]) -> tuple[dict[str, float], bool]:
    """Two steps of the first rank of `workers`, which are not there."""
    model = nn.parallel.DistributedDataParallel(probe.Tensors(NUMELS, CPU), process_group=group)
    optimizer = sgd(model)
    state = saef.SAEFState(model, optimizer, transport=probe.Echo(0, workers, CPU), **settings)
    model.register_comm_hook(state, saef_hook)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2 * state.settings.local_steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, max(NUMELS))).backward()
        optimizer.step()
    moved = all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return state.metrics(), moved


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("exchange", ["replicated", "sharded"])
@pytest.mark.parametrize("name", [*probe.SETTINGS])
def test_ranks_that_echo_are_enough_for_a_step(pool: RankPool, name: str, exchange: str, workers: int) -> None:
    settings = {**probe.SETTINGS[name], "exchange": exchange}
    (metrics, moved), *_ = pool.run(step_with_echo, workers, settings, ranks=1)
    assert moved and metrics["steps"] == 2 and metrics["steps_skipped"] == 0
    a = saef.message_bytes(settings["compressor"], NUMELS)
    compressed = (metrics["bytes_sent_phase1"] + metrics["bytes_sent_phase2"]) / 2
    if exchange == "replicated":
        assert compressed == sent_bytes("replicated", workers, a, a)
    else:  # this rank's, of which one serves more than another, and sections are padded to 8 bytes
        assert 0 < compressed < (workers - 1) * (a + 8 * workers) * 2


def hashed(group: Any) -> int:
    return probe.hash_of("4c8d1b5e-9d0f-4f57-b1a5-6d1d7d8a8a52\n")


def test_a_machine_has_the_same_number_in_all_processes(pool: RankPool) -> None:
    first, *others = pool.run(hashed)
    assert 0 < first < 2**62 and others == [first] * 3
    assert probe.hash_of("a") != probe.hash_of("b")


def test_sizes_of_a_model_of_unknown_tensors() -> None:
    assert probe.sample(10) == [10]
    assert probe.sample(probe.TENSOR + 1) == [probe.TENSOR, 1]
    assert sum(probe.sample(10**11)) == probe.MOST


def test_no_default_group_is_needed_to_import_it() -> None:
    assert not dist.is_initialized()
