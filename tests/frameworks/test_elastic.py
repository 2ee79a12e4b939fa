"""torchrun restarts a job whose rank was killed, and it goes on; ranks come and go. Real torchrun, real SIGKILL."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support import EXAMPLES, elastic_job, environment
from support.forked import program, python
from support.ranks import context

EXAMPLE = EXAMPLES / "train_ddp.py"
JOB = Path(elastic_job.__file__)
ENVIRONMENT = environment(GLOO_SOCKET_IFNAME="lo")
# Else restarted ranks find the addresses of the dead ones (pytorch/pytorch issue 135712); the example has its own cure.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(folder: Path, name: str, *words: str, **variables: str) -> subprocess.Popen[bytes]:
    """torchrun in the background, in a process group of its own, printing to a file."""
    command = [python(), "-m", "torch.distributed.run", "--monitor-interval", "0.1", *words]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env={**ENVIRONMENT, **variables}, stdout=log, stderr=log, start_new_session=True
        )


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """A torchrun's ranks; they are in sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(program(process.pid))], capture_output=True, text=True).stdout
    return [program(int(pid)) for pid in found.split()]


def lose_node(agent: subprocess.Popen[bytes]) -> None:
    """What is left when a machine burns: nothing."""
    ranks = children(agent)
    for pid in (program(agent.pid), *ranks):
        with suppress(ProcessLookupError):  # one that has just ended by itself
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Any, what: str, logs: Path, timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        text = "\n".join(path.read_text(errors="replace")[-3000:] for path in logs.glob("*.log"))
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{text}"
        time.sleep(0.05)
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of `elastic_job.py` noted, in the order of time."""
    lines = [line for path in folder.glob("rank-*.jsonl") for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines if line.endswith("}")), key=lambda r: r["time"])


def newest(folder: Path, **wanted: Any) -> dict[str, Any] | None:
    return next((r for r in reversed(records(folder)) if all(r.get(k) == v for k, v in wanted.items())), None)


def undisturbed(rank: int, folder: Path, more: list[str]) -> None:
    """A rank of the same job in a process of its own, without torchrun."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", TORCHELASTIC_RESTART_COUNT="0")
    elastic_job.main([str(folder), "--steps", "40", "--store", str(folder / "store"), *more])


@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_killed_rank_is_restarted_and_training_goes_on_bit_for_bit(tmp_path: Path, local_steps: int) -> None:
    """The survivors say what happened, and wait for nobody; the end is that of a run that nobody disturbed.

    With three local steps the checkpoint is of the middle of a round, and the rank dies in that of another.
    """
    more = ["--local-steps", str(local_steps)]
    quiet, folder = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    folder.mkdir()
    words = ["--standalone", "--nproc_per_node", "3", "--max-restarts", "1", str(JOB)]
    job = start(folder, "torchrun", *words, str(folder), "--steps", "40", "--kill", "2:25", *more, **OWN_STORE)
    ranks = [context().Process(target=undisturbed, args=(rank, quiet, more)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    assert job.wait(timeout=240) == 0, (folder / "torchrun.log").read_text()[-5000:]
    found = records(folder)
    resumed = [r["resumed"] for r in found if "resumed" in r]
    assert resumed == [None] * 3 + [20] * 3
    said = [r for r in found if "error" in r]
    assert [r["rank"] for r in said] and all(r["rank"] != 2 for r in said)
    for r in said:
        assert "exchange with the other ranks failed. A rank died" in r["error"]
        assert "load the last checkpoint" in r["error"] and r["waited"] < 30  # the group's timeout
    for rank in ranks:
        rank.join(240)
    ends = [{r["rank"]: r["end"] for r in records(run) if "end" in r} for run in (quiet, folder)]
    assert ends[0] == ends[1] and len(ends[0]) == 3


def test_the_example_survives_a_killed_rank(tmp_path: Path) -> None:
    """Plain torchrun --max-restarts, nothing else to set."""
    words = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "2", str(EXAMPLE), "--steps", "300"]
    words += ["--method", "saef-topk", "--checkpoint", str(tmp_path / "c"), "--checkpoint-every", "20"]
    job = start(tmp_path, "torchrun", *words, "--out", str(tmp_path / "out.jsonl"))

    def checkpoints() -> list[int]:
        return [int(p.parent.name.split("-")[-1]) for p in (tmp_path / "c").glob("*/complete")]

    wait_for(lambda: max(checkpoints(), default=0) >= 40, "a checkpoint", tmp_path)
    os.kill(children(job)[-1], signal.SIGKILL)
    assert job.wait(timeout=240) == 0, (tmp_path / "torchrun.log").read_text()[-5000:]
    last = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 300 and last["accuracy"] > 80
    # It was restarted. (torchrun only sometimes says so: the survivor may have ended before it could be told to.)
    assert re.search(r" 0/[12][0-9]0 ", (tmp_path / "torchrun.log").read_text())
    assert max(checkpoints()) == 300


def test_from_4_to_3_to_4_ranks(tmp_path: Path) -> None:
    """Four agents of one rank each; one is killed, the others go on as three, and a new one joins."""
    script = [str(JOB), str(tmp_path), "--steps", "1000000", "--pause", "0.05"]
    port = 29500 + os.getpid() % 1000
    words = ["--nnodes", "3:4", "--nproc_per_node", "1", "--max-restarts", "9", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "saef", "--local-addr", "127.0.0.1"]
    conf = "last_call_timeout=20,keep_alive_interval=2,keep_alive_max_attempt=6,join_timeout=240,is_host="

    def agent(number: int) -> subprocess.Popen[bytes]:
        host = str(number == 0).lower()
        return start(tmp_path, f"agent-{number}", *words, "--rdzv-conf", conf + host, *script, **OWN_STORE)

    agents = [agent(i) for i in range(4)]
    try:
        wait_for(lambda: (r := newest(tmp_path, world=4)) and r.get("step", 0) >= 20, "4 ranks", tmp_path)
        lose_node(agents[3])
        killed_at = newest(tmp_path, world=4)
        three = wait_for(lambda: (r := newest(tmp_path, world=3)) and "step" in r and r, "3 ranks", tmp_path)
        assert killed_at and three["step"] >= 20
        wait_for(lambda: newest(tmp_path, world=3)["step"] >= three["step"] + 20, "progress of 3", tmp_path)  # type: ignore[index]
        before = newest(tmp_path, world=3)
        agents.append(agent(4))
        wait_for(
            lambda: (r := newest(tmp_path, world=4)) and "step" in r and r["time"] > before["time"] and r,  # type: ignore[index]
            "4 ranks again",
            tmp_path,
        )
        resumed = [(r["world"], r["resumed"], r["x_tilde_moved"]) for r in records(tmp_path) if "resumed" in r]
        assert [w for w, _, _ in resumed] == [4] * 4 + [3] * 3 + [4] * 4
        steps = [s for _, s, _ in resumed if s is not None]
        assert steps == sorted(steps) and steps[0] >= 20 and len(steps) == 7
        # x~ = x - (e + mean_k e_k) in float32: a mean over 4 ranks and two subtractions, 6 * 2^-24 of entries below 2.
        assert all(moved <= 6 * 2.0**-24 * 2 for _, s, moved in resumed if s is not None)
    finally:
        for process in agents:
            if process.poll() is None:
                lose_node(process)
