"""Forked programs are to their starters what Python's own are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.forked import program, python

pytestmark = pytest.mark.slow

SAY = "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read()); print('é', file=sys.stderr)"


def both(*words: str, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """By Python, and forked."""
    pythons = (sys.executable, python())
    return [subprocess.run([name, *words], capture_output=True, text=True, **options) for name in pythons]


def test_words_folder_variables_and_streams_reach_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SAY)
    variables = {**os.environ, "WORD": "là"}
    for words in (["-c", SAY, "a", "-b"], ["-u", str(tmp_path / "script.py"), "a b"], ["-m", "script", "c"]):
        own, forked = both(*words, cwd=tmp_path, env=variables, input="said\n")
        assert (own.returncode, own.stdout, own.stderr) == (0, forked.stdout, forked.stderr)


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(3)", "import sys; sys.exit('why')", "import os; os._exit(4)", "raise SystemExit", "1 / 0"]
    + ["import os; os.kill(os.getpid(), 9)", "import os; os.kill(os.getpid(), 15)"]
    + ["import atexit; atexit.register(print, 'last', flush=True)"],
)
def test_it_ends_alike(code: str) -> None:
    own, forked = both("-c", code)
    assert (own.returncode, own.stdout) == (forked.returncode, forked.stdout)
    assert own.stderr.splitlines()[-1:] == forked.stderr.splitlines()[-1:]


def test_it_imports_what_python_would(tmp_path: Path) -> None:
    """Its own folder, and nothing of the tests."""
    (tmp_path / "beside.py").write_text("word = 'found'")
    (tmp_path / "script.py").write_text("import beside; print(beside.word); import test_forked")
    for done in both(str(tmp_path / "script.py")):
        assert done.stdout == "found\n" and "No module named 'test_forked'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_both(number: signal.Signals) -> None:
    started = subprocess.Popen(
        [python(), "-c", "import time; print(1, flush=True); time.sleep(100)"], stdout=subprocess.PIPE
    )
    assert started.stdout is not None and started.stdout.readline() == b"1\n"
    place = Path("/proc", str(program(started.pid)))
    assert place.exists()
    started.send_signal(number)
    assert started.wait() == -number
    deadline = time.monotonic() + 60
    while place.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.stdout.close()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Python itself is taken on this system")
def test_a_program_of_its_own_is_forked_too() -> None:
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(\"torch\" in sys.modules)'])"
    )
    own, forked = both("-c", code)
    assert own.stdout == "False\n" and forked.stdout == "True\n"
