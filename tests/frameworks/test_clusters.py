"""The recipes of docs/clusters.md, as they stand there, on one machine: their commands run, who starts them is made up.

Slurm's srun becomes a script that starts its command once a node, and Kubernetes's pods processes.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from support import CHECKOUT, EXAMPLES, environment
from support.forked import python

NODES = 2
# Two agents on one machine, whose name may have no address.
TORCHRUN = """#!/bin/bash
exec {python} -m torch.distributed.run --local-addr 127.0.0.1 "$@"
"""
SRUN = """#!/bin/bash
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || exit; done
"""


def recipe(language: str) -> str:
    page = (CHECKOUT / "docs" / "clusters.md").read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)
    return str(found)


def machine(folder: Path, **commands: str) -> dict[str, str]:
    """A folder with the example and commands to find there; the environment."""
    for name in ("train_ddp.py", "data.py", "resnet.py"):
        shutil.copy(EXAMPLES / name, folder)
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"torchrun": TORCHRUN.format(python=python()), **commands}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return environment(PATH=f"{programs}:{os.environ['PATH']}", GLOO_SOCKET_IFNAME="lo")


def here(text: str, port: int) -> str:
    """Another port than the recipe's, for tests that run beside this one."""
    assert ":29500" in text
    return text.replace(":29500", f":{30500 + port + os.getpid() % 1000}")


def check_end(done: str, checkpoints: Path) -> None:
    """One rank of the two reports, at the end of training; it is in the checkpoint of both."""
    (last,) = [json.loads(line) for line in done.splitlines() if line.startswith("{")]
    assert last["accuracy"] > 80 and last["method"] == "saef-sign"
    assert {p.name for p in max(checkpoints.glob("*")).glob("rank-*")} == {"rank-0-of-2.pt", "rank-1-of-2.pt"}


def test_the_recipe_for_slurm(tmp_path: Path) -> None:
    env = machine(tmp_path, srun=SRUN, scontrol='#!/bin/bash\n[ "$*" = "show hostnames a[1-2]" ] && echo localhost\n')
    script = here(recipe("sh"), 0)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.M))
    assert asked["nodes"] == str(NODES) and asked["ntasks-per-node"] == "1" and "requeue" in asked
    slurm = {"JOB_NODELIST": "a[1-2]", "JOB_NUM_NODES": str(NODES), "GPUS_ON_NODE": "1", "JOB_ID": "7"}
    env |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    (tmp_path / "job.sh").write_text(script)
    done = subprocess.run(["bash", "-eu", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    check_end(done.stdout, tmp_path / "checkpoints")


def test_the_recipe_for_kubernetes(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all(recipe("yaml"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    # A headless service of the pods' subdomain gives them names; the Job's controller labels them by its name.
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == NODES
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    command = [*container["command"], *container["args"]]
    words: dict[str, str] = {
        f"{name}-0.{pod['subdomain']}": "localhost",
        f"--checkpoint {mounts['checkpoints']}": f"--checkpoint {tmp_path / 'checkpoints'}",
        f"--nproc_per_node {container['resources']['limits']['nvidia.com/gpu']}": "--nproc_per_node 1",
    }
    assert f"--nnodes {NODES} " in command[-1]
    command[-1] = here(command[-1], 1000)
    for theirs, ours in words.items():
        assert command[-1].count(theirs) == 1
        command[-1] = command[-1].replace(theirs, ours)
    env = machine(tmp_path) | {variable["name"]: variable["value"] for variable in container["env"]}
    running: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pods = [subprocess.Popen(command, env={**env, "JOB_COMPLETION_INDEX": str(i)}, **running) for i in range(NODES)]
    try:
        said = [pod.communicate(timeout=240)[0] for pod in pods]
    finally:
        for process in pods:
            process.kill()
    assert [process.returncode for process in pods] == [0] * NODES, "\n".join(said)
    check_end("\n".join(said), tmp_path / "checkpoints")
