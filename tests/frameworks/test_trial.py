"""`python -m saef`: what it says of an installation that works, and of those that do not."""

import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from saef import trial

# `python -m saef` where the packages of the first argument are not installed.
HIDING = """
import importlib.metadata, runpy, sys
hidden, find = sys.argv.pop(1).split(","), importlib.metadata.version
def version(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.version = version
sys.modules.update(dict.fromkeys(hidden))
runpy.run_module("saef", run_name="__main__", alter_sys=True)
"""


def run(*words: str, **variables: str) -> tuple[int, list[str]]:
    """(status, lines said). Nothing may end in a traceback."""
    env = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines()


def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def test_an_installation_that_works() -> None:
    status, said = run("-m", "saef")
    assert status == 0
    assert said[0].startswith(f"saef {version('saef')}, Python {sys.version_info.major}.{sys.version_info.minor}.")
    names = ("torch", "numba", "triton", "horovod", "deepspeed", "lightning", "transformers", "accelerate", "ray")
    assert said[1 : 1 + len(names)] == [f"{name}: {found(name)}" for name in names]
    assert any(line.startswith("kernels: numba on the CPU") for line in said)
    assert any(line.startswith("kernels: triton on ") for line in said) == torch.cuda.is_available()
    assert said[-1] == "exchange: works, 5 steps of SAEF on 2 gloo ranks give what they should"


def test_frameworks_need_not_be_there() -> None:
    status, said = run("-c", HIDING, "horovod,deepspeed,triton")
    assert status == 0
    assert {"horovod: not installed", "deepspeed: not installed", "triton: not installed"} <= {*said}
    assert said[-1].startswith("exchange: works")


def test_without_numba_it_says_so() -> None:
    status, said = run("-c", HIDING, "numba")
    assert status == 1 and "numba: not installed" in said
    assert said[-1].startswith("kernels: on the CPU, ") and "they need numba, which cannot be imported: " in said[-1]


def test_without_a_network_it_says_so() -> None:
    status, said = run("-m", "saef", GLOO_SOCKET_IFNAME="none0")
    assert status == 1
    assert said[-1].startswith("exchange: ") and "none0" in said[-1]


def test_the_command_takes_no_argument(tmp_path: Path) -> None:
    assert run("-m", "saef", "--help")[0] == 0
    assert run("-m", "saef", "--hlep")[0] == 2


# -- the trial itself -------------------------------------------------------------------------------------------------


def nothing() -> None:
    assert dist.get_world_size() == 2


def sleep() -> None:
    time.sleep(3600)


def one_is_silent() -> None:
    if dist.get_rank() == 0:
        sleep()


def fail() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a reason\nof two lines")


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)


def other_numbers() -> None:
    right = trial.expected()
    trial.expected = lambda: right + 0.5 * torch.eye(50)[3]
    trial.train()


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (nothing, ""),
        (trial.train, ""),
        (fail, "of two lines"),
        (die, "process 0 terminated with exit code 7"),
        (other_numbers, "RuntimeError: x after 5 steps differs by 0.5 from Algorithm 1's"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_trial_says_what_has_gone_wrong(work, said) -> None:  # type: ignore[no-untyped-def]
    assert trial.on_two_ranks(work) == said


@pytest.mark.parametrize("work", [sleep, one_is_silent])
def test_a_trial_comes_to_an_end(work) -> None:  # type: ignore[no-untyped-def]
    """Before the processes have imported torch, or after: they are ended either way."""
    start = time.monotonic()
    assert trial.on_two_ranks(work, timeout_s=8) == "no end within 8 s"
    assert time.monotonic() - start < 60
