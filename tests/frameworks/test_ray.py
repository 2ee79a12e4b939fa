"""Ray Train, as docs/ray.md has it: the script, a killed worker, another number of workers, the steps of DDP.

Real Ray, real SIGKILL.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import saef
from saef.hooks import saef_hook
from support import CHECKOUT, EXAMPLES, environment
from support.equal import assert_equal
from support.ranks import context
from support.trainers import COMPRESSORS, TOLERANCE
from support.trainers import assert_equal as assert_same_steps

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
JOB = Path(__file__).parents[1] / "support" / "ray_job.py"


def run(folder: Path) -> str:
    """What the job prints. Its Ray has a folder of its own, by which whatever is left of it can be found and ended."""
    sessions = tempfile.mkdtemp(prefix="saef-ray-")  # a short path, for Ray's sockets
    env = environment(
        HOME=sessions,
        RAY_TMPDIR=sessions,
        RAY_USAGE_STATS_ENABLED="0",
        RAY_OVERRIDE_RESOURCES='{"CPU": 3}',  # a worker each, whatever the machine has
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
    )
    try:
        done = subprocess.run(
            [sys.executable, str(JOB)], cwd=folder, env=env, capture_output=True, text=True, timeout=450
        )
    finally:
        for pid in started_with(f"RAY_TMPDIR={sessions}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(sessions, ignore_errors=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def started_with(variable: str) -> list[int]:
    """Processes of this machine that have a variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def parts(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint, by name, without the bytes that checkpoints and what was looked at have cost."""
    found = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    for of_rank in (found[f"rank-{k}-of-2.pt"]["saef"][f"rank_{k}"] for k in range(2)):
        of_rank["bytes"] = {name: sent for name, sent in of_rank["bytes"].items() if "phase" in name}
    return found


def by_hand(rank: int, folder: Path) -> None:
    """The example's training by DDP alone, in a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign())
    model.register_comm_hook(state, saef_hook)
    torch.manual_seed(1 + rank)
    for _ in range(100):
        labels = torch.randint(10, (32,))
        loss = nn.functional.cross_entropy(model(centres[labels] + 2 * torch.randn(32, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    extra = {"step": 100, "optimizer": optimizer.state_dict()}
    whole = state.consolidated_state_dict()
    torch.save({"saef": state.state_dict(), **extra}, folder / f"rank-{rank}-of-2.pt")
    if rank == 0:
        torch.save({"saef": whole, **extra}, folder / "consolidated.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_script_a_killed_worker_another_number_of_workers_and_the_steps_of_ddp(tmp_path: Path) -> None:
    """The page's script, as it stands there, trains as DDP does by hand, though a worker dies in step 49."""
    page = (CHECKOUT / "docs" / "ray.md").read_text()
    (script,) = re.findall(r"^```python\n(# train_ray.py.*?)^```$", page, re.M | re.S)
    assert script == (EXAMPLES / "train_ray.py").read_text()
    (tmp_path / "train_ray.py").write_text(script)
    (metrics,) = re.findall(r"^\{'step'.*$", run(tmp_path), re.M)
    said = ast.literal_eval(metrics)
    assert said["step"] == 100 and said["loss"] < 0.2 and said["compression"] > 30  # log(10) is guessing
    assert (tmp_path / "killed").exists()

    plain = tmp_path / "by hand"
    plain.mkdir()
    ranks = [context().Process(target=by_hand, args=(rank, plain)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    expected = parts(plain)
    assert {*expected} == {"consolidated.pt", "rank-0-of-2.pt", "rank-1-of-2.pt"}
    assert_equal(parts(tmp_path / "2"), expected)

    # By three workers x~ = x - (e + mean_k e_k) is kept: in float32 means over 2 and 3 workers and two subtractions,
    # 7 * 2^-24 of entries below 1.
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("2-100.pt", "3-100.pt"))
    assert (after - before).abs().max() <= 7 * 2.0**-24
    assert torch.load(tmp_path / "3" / "rank-2-of-3.pt", weights_only=True)["step"] == 120

    for rank in range(3):
        found = torch.load(tmp_path / f"cases-{rank}.pt", weights_only=True)
        assert len(found["identity"]) == 3 and max(found["identity"].values()) < TOLERANCE, found["identity"]
        assert {*found["hook"]} == {f"{name} {kind}" for name in COMPRESSORS for kind in ("SGD", "AdamW")}
        for by_ddp, by_ray in found["hook"].values():
            assert_same_steps(by_ray, by_ddp, ("x", "e", "m", "e_server", "steps"))
