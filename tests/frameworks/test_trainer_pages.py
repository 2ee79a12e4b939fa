"""The scripts of the pages on Lightning, transformers and Accelerate, exactly as they stand there, by torchrun."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import CHECKOUT
from support.forked import python


@pytest.mark.parametrize(
    ("page", "expected", "kept"),
    [
        ("lightning", r"'saef/compression_ratio': 3\d\.\d", "checkpoints/saef/last.ckpt"),
        ("transformers", r"loss \d\.\d+ at x, of the best checkpoint", "checkpoints/checkpoint-48/saef"),
        ("accelerate", r"epoch 2: loss \d\.\d+ at x_half, 1/\d+", "checkpoint/saef"),
    ],
)
def test_the_script_of_a_page_runs(page: str, expected: str, kept: str, tmp_path: Path) -> None:
    if find_spec(page) is None:  # importing it in a thread beside other tests can deadlock
        pytest.skip(f"needs {page}")
    script = re.search(r"^```python\n(.*?)^```$", (CHECKOUT / "docs" / f"{page}.md").read_text(), re.M | re.S)[1]  # type: ignore[index]
    name, command = re.match(r"# (\S+), started by: torchrun (.*)\n", script).groups()  # type: ignore[union-attr]
    assert "--nproc_per_node=2" in command and command.endswith(f" {name}")
    (tmp_path / name).write_text(script)
    words = [python(), "-m", "torch.distributed.run", *command.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(expected, done.stdout), done.stdout + done.stderr
    assert (tmp_path / kept).is_dir()
