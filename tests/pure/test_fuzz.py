"""Runs `fuzz.py`: 20,000 hostile messages for each codec (`make fuzz`: 100,000), and what checks every access."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import fuzz

SCRIPT = Path(fuzz.__file__)
JIT_OFF = {"NUMBA_DISABLE_JIT": "1"}  # the CPU kernels as plain Python: numpy checks every index


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_20_000_messages_for_each_codec() -> None:
    """In two processes; each codec met messages that decode and messages that do not."""
    names = list(fuzz.CODECS)
    running = [start("--messages", "20000", "--codecs", *names[i::2]) for i in range(2)]
    said = "".join(process.communicate()[0] for process in running)
    assert [process.returncode for process in running] == [0, 0], said
    for name in names:
        line = next(line for line in said.splitlines() if line.startswith(f"{name:25}"))
        count, decoded, refused = (int(word.replace(",", "")) for word in line[25:].split()[::2])
        assert count == 20_000 == decoded + refused and decoded > 1_000 and refused > 1_000


def test_no_access_leaves_its_array() -> None:
    process = start("--messages", "700", **JIT_OFF)
    said = process.communicate()[0]
    assert process.returncode == 0 and said.count("700 messages") == len(fuzz.CODECS), said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="atheris has wheels for Linux only")
def test_coverage_guided() -> None:
    process = start("--atheris", "--messages", "4000", **JIT_OFF)
    said = process.communicate()[0]
    assert process.returncode == 0 and "Done 4000" in said, said[-3000:]
