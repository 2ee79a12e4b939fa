"""`python -m saef advise` under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

from saef import probe
from support.forked import python

TRAIN = """
import torch
def model():
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 1))
def batch():
    return torch.randn(4, 20)
def number():
    return 3
"""


def torchrun(folder: Path, *words: str, ranks: int = 2, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(TRAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable if fresh else python(), *launcher, "-m", "saef", "advise", "--device", "cpu", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_numbers_become_a_table_and_a_verdict(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--parameters", "5000", "--step-ms", "3", "--optimizer", "adamw", fresh=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "2 ranks, CPU, 1 threads; 5,000 parameters, 3.0 ms a step without exchange"
    assert all(any(line.startswith(f"{name}  ") for line in lines) for name in probe.NAMES)
    assert lines[-1].startswith(("use ", "do not compress: "))


def test_a_model_and_json(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--model", "train:model", "--batch", "train:batch", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workers"] == 2 and found["parameters"] == 20 * 30 + 30 + 31 and found["compute_s"] > 0
    assert [line["method"] for line in found["lines"]] == [*probe.NAMES]
    assert found["verdict"].startswith(("use ", "do not compress: "))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--model", "train:number", "--batch", "train:batch")
    assert done.returncode and "--model must return a torch.nn.Module, got int" in done.stderr


def test_without_torchrun_it_says_so() -> None:
    command = [sys.executable, "-m", "saef", "advise", "--parameters", "1e6", "--step-ms", "10"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "start this with torchrun: torchrun --nproc_per_node 4" in done.stderr
    assert "Traceback" not in done.stderr
