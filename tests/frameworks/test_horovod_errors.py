"""What Horovod jobs are told, at once, when something cannot work: settings, options, lost ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if find_spec("horovod") is None:
    pytest.skip("needs Horovod: `make horovod` builds it", allow_module_level=True)

import horovod.torch as hvd

import saef
from saef.integrations.horovod import CompressionSettings, SAEFCompression
from saef.step.arguments import Carried, StateSettings
from support.horovod_jobs import backward, make, steps
from support.horovod_ranks import STALL_S, HorovodPool, command, environment
from support.training import Job, batch, make_model

JOB = Job({"compressor": saef.TopK(0.2)}, lrs=[0.1] * 10, dtype=torch.float32)
# Ours, or Horovod's own where that comes first.
LOST = "the exchange with the other ranks failed|Horovod has been shut down|Horovod background loop uncaught exception"
START_S = 60  # that starting and ending a job may take on a busy machine


@pytest.fixture(scope="module")
def horovod(horovods: dict[int, HorovodPool]) -> HorovodPool:
    return horovods[2]


# ---- refusals -----------------------------------------------------------------------------------------------


def refuse(options: dict[str, Any]) -> str:
    """What the first step says to options of DistributedOptimizer."""
    net = make_model(JOB, hvd.rank())
    optimizer, _ = make(JOB, net, **options)
    with pytest.raises(ValueError) as caught:
        steps(net, optimizer, JOB, range(1))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": hvd.Sum}, "Algorithm 1 averages; multiply lr instead"),
        ({"op": hvd.Adasum}, "op=hvd.Adasum"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor=2.0"),
        ({"sparse_as_dense": True}, r"Embedding\(sparse=False\)"),
    ],
)
def test_options_that_change_the_sum_are_refused(horovod: HorovodPool, options: dict[str, Any], message: str) -> None:
    for said in horovod.run(refuse, options):
        pytest.raises(ValueError, _raise, said).match(message)


def _raise(text: str) -> None:
    raise ValueError(text)


def sparse() -> None:
    torch.manual_seed(0)
    net = nn.Embedding(5, 3, sparse=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(
        sgd, named_parameters=net.named_parameters(), compression=SAEFCompression(net, sgd)
    )
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"Embedding\(sparse=False\)"):
        optimizer.step()


def test_sparse_gradients_are_refused(horovod: HorovodPool) -> None:
    horovod.run(sparse)


def misuse() -> None:
    """All that can go wrong while the ranks stay together."""
    net = make_model(JOB, hvd.rank())
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="takes no transport"):
        SAEFCompression(net, sgd, process_group=object())
    for word, meant in (("compresor", "compressor"), ("grad_scalar", "grad_scaler")):
        with pytest.raises(TypeError, match=rf"SAEFCompression: '{word}' is unknown \(did you mean '{meant}'\?\)"):
            SAEFCompression(net, sgd, **{word: None})
    with pytest.raises(ValueError, match=r"exchange must be .*got 'shraded' \(did you mean 'sharded'\?\)"):
        SAEFCompression(net, sgd, exchange="shraded")  # type: ignore[arg-type]
    transported = {*StateSettings.__annotations__} - {*Carried.__annotations__}
    assert {*CompressionSettings.__annotations__} == transported
    with pytest.raises(ValueError, match="compressor"):
        SAEFCompression(net, torch.optim.SGD(net.parameters(), 0.1), compressor=saef.TopK(0.1 * (hvd.rank() + 1)))
    compression = SAEFCompression(net, sgd)
    with pytest.raises(ValueError, match="give hvd.DistributedOptimizer the optimizer"):
        net(batch(0, 0, torch.float32)[0]).sum().backward()
        sgd.step()
    sgd.zero_grad()
    options = {"named_parameters": net.named_parameters(), "compression": compression}
    optimizer = hvd.DistributedOptimizer(sgd, **options)
    with pytest.raises(ValueError, match="serves a DistributedOptimizer already"):
        hvd.DistributedOptimizer(sgd, **options)
    with pytest.raises(TypeError, match="give SAEFCompression the optimizer inside"):
        saef.SAEFState(net, optimizer)
    transport: Any = compression.state.engine.transport
    transport.rank += 2
    with pytest.raises(RuntimeError, match="Horovod was started anew"):
        backward(net, optimizer, JOB, 0)
    transport.rank -= 2
    net = make_model(JOB, hvd.rank())
    optimizer, _ = make(JOB, net)
    backward(net, optimizer, JOB, 0)
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="max_grad_norm"), optimizer.skip_synchronize():
        optimizer.step()
    other = make_model(JOB, hvd.rank())
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    strange = SAEFCompression(net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=other.named_parameters(), compression=strange)
    with pytest.raises(ValueError, match="give hvd.DistributedOptimizer the optimizer"):
        F.mse_loss(other(batch(0, 0, torch.float32)[0]), torch.zeros(8, 1)).backward()


def test_misuse_is_named(horovod: HorovodPool) -> None:
    horovod.run(misuse)


def differ() -> str:
    """A learning rate that is another on each rank, met at the first step."""
    net = make_model(JOB, hvd.rank())
    sgd = torch.optim.SGD(net.parameters(), lr=0.1 * (hvd.rank() + 1))
    optimizer = hvd.DistributedOptimizer(
        sgd, named_parameters=net.named_parameters(), compression=SAEFCompression(net, sgd)
    )
    optimizer.zero_grad()
    with pytest.raises(ValueError) as caught:
        net(batch(0, 0, torch.float32)[0])
    return str(caught.value)


def test_ranks_that_differ_are_told_on_all(horovod: HorovodPool) -> None:
    for said in horovod.run(differ):
        assert "the ranks differ at step 0" in said and "lr" in said


# ---- ranks that are lost: jobs of their own ------------------------------------------------------------------


def die() -> None:
    """The last rank is killed between backward and step."""
    net = make_model(JOB, hvd.rank())
    optimizer, _ = make(JOB, net)
    steps(net, optimizer, JOB, range(3))
    backward(net, optimizer, JOB, 3)
    if hvd.rank() == hvd.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()


def silent() -> None:
    """The last rank stops taking part."""
    net = make_model(JOB, hvd.rank())
    optimizer, _ = make(JOB, net)
    steps(net, optimizer, JOB, range(2))
    if hvd.rank() == hvd.size() - 1:
        signal.pause()
    steps(net, optimizer, JOB, range(2, 4))


def alone() -> None:
    """The last rank evaluates x~, a collective call, while the others train."""
    net = make_model(JOB, hvd.rank())
    optimizer, state = make(JOB, net)
    steps(net, optimizer, JOB, range(2))
    if hvd.rank() == hvd.size() - 1:
        state.x_tilde()
    steps(net, optimizer, JOB, range(2, 4))


def join() -> None:
    """The last rank has fewer batches, and says so as Horovod has it."""
    net = make_model(JOB, hvd.rank())
    optimizer, _ = make(JOB, net)
    steps(net, optimizer, JOB, range(4 - (hvd.rank() == hvd.size() - 1)))
    hvd.join()


def process_set() -> None:
    net = make_model(JOB, hvd.rank())
    some = hvd.add_process_set([0, 1])
    optimizer, _ = make(JOB, net, process_set=some)
    steps(net, optimizer, JOB, range(1))


def nodes() -> None:
    """Without process sets."""
    make(Job({"node_size": 2}), make_model(JOB, hvd.rank()))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (die, LOST),
        (silent, LOST),
        (alone, r"saef\.0: SAEFState\.x_tilde\(\), to which all ranks must come"),
        (join, LOST),
        (process_set, "SAEF exchanges among all ranks"),
        (nodes, r'hvd\.init\(process_sets="dynamic"\)'),
    ],
)
def test_a_job_that_cannot_go_on_ends_with_an_error(job: Any, message: str) -> None:
    words = command(4 if job is nodes else 3, str(Path(__file__)), job.__name__)
    env = environment() | {"HOROVOD_DYNAMIC_PROCESS_SETS": str(int(job is process_set))}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)
    began = max(float(said) for said in re.findall(r"began at ([0-9.]+)", done.stdout))  # other tests run beside this
    assert time.monotonic() - began < START_S + 2 * STALL_S


if __name__ == "__main__":
    torch.set_num_threads(1)
    hvd.init()
    print(f"began at {time.monotonic()}", flush=True)
    globals()[sys.argv[1]]()
    hvd.shutdown()
