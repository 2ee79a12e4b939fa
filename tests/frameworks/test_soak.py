"""A short form of `soak.py`; the long one is `make soak`."""

import subprocess

import pytest

from support import CHECKOUT
from support.forked import python

SCRIPT = CHECKOUT / "tests" / "support" / "soak.py"


@pytest.mark.parametrize(("method", "kills"), [("sign", "1"), ("top-k", "2")])
def test_a_run_under_fire(method: str, kills: str) -> None:
    """450 steps of 4 ranks, SIGKILLs, NaNs in 1 % of the steps; soak.py says what must hold."""
    command = [python(), str(SCRIPT), "--steps", "450", "--kills", kills, "--method", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    said = done.stdout
    assert done.returncode == 0 and f"{kills} SIGKILLs" in said and "OK" in said, said + done.stderr
