"""The tests of ranks once more, with everything that a rank makes on a GPU, which all ranks share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import environment

HERE = Path(__file__).parent
FILES = "bad_numbers ddp following kept local_steps mixed_precision rewritten watch window wrapped".split()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif("SAEF_TEST_DEVICE" in os.environ, reason="this is one of those runs")
@pytest.mark.parametrize("name", FILES)
def test_ranks_on_a_gpu(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / f"test_{name}.py")]
    done = subprocess.run(
        command, env=environment(SAEF_TEST_DEVICE="cuda"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
