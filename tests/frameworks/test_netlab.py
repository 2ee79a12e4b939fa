"""`benchmarks/netlab`: ranks in namespaces of their own, and nothing left of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import CHECKOUT

NETLAB = CHECKOUT / "benchmarks" / "netlab"


def netlab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, NETLAB, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fast", "2", "--", "true"], "expected a rate such as 100 (Mb/s), 1gbit, or \"none\", got 'fast'"),
        (["0", "2", "--", "true"], "expected a rate such as 100"),
        (["100", "0", "--", "true"], "expected a number of at least 1, got '0'"),
        (["100", "2"], "what shall the ranks run?"),
        (["100", "3", "--ranks-per-node", "2", "--", "true"], "3 ranks cannot be nodes of 2"),
        (["100", "1", "--delay", "5", "--", "true"], "a delay needs two nodes"),
        (["100", "2", "--delay", "-5", "--", "true"], "expected milliseconds from 0 to 10000, got '-5'"),
        (["100", "65", "--", "true"], "at most 64 nodes"),
    ],
)
def test_bad_arguments(words: list[str], said: str) -> None:
    done = netlab(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def namespaces() -> bool:
    """Whether this process may make them, and has the tools."""
    if not all(map(shutil.which, ("ip", "tc", "unshare", "cc"))):
        return False
    return (
        subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


needs_root = pytest.mark.skipif(not namespaces(), reason="needs root, iproute2 and a C compiler")


@needs_root
@pytest.mark.parametrize("options", [[], ["--delay", "1"]])
def test_each_rank_has_a_namespace_and_the_words_of_torchrun(options: list[str]) -> None:
    show = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GLOO_SOCKET_IFNAME; readlink /proc/self/ns/net"
    done = netlab("100", *options, "--ranks-per-node", "2", "4", "--", "sh", "-c", f"echo `{show}`")
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[:5] for line in lines] == [[f"{r}", f"{r % 2}", "4", "2", "eth0"] for r in range(4)]
    first, second, third, fourth = (line[5] for line in lines)
    assert first == second != third == fourth and os.readlink("/proc/self/ns/net") not in {first, third}
    assert len(re.findall(r"netlab: node \d \(2 ranks\): [\d,]+ bytes sent", done.stderr)) == 2


SEND = """
import os, socket, time
if os.environ["RANK"] == "0":
    peer, _ = socket.create_server(("", 29500)).accept()
    while peer.recv(1 << 16): pass
else:
    peer = None
    while peer is None:
        try: peer = socket.create_connection((os.environ["MASTER_ADDR"], 29500))
        except ConnectionRefusedError: time.sleep(0.05)  # each attempt is counted, too
    peer.sendall(bytes(1000000))
"""


@needs_root
@pytest.mark.parametrize("options", [[], ["--delay", "2"]])
def test_what_one_sends_the_other_receives_and_the_link_counts(options: list[str]) -> None:
    done = netlab("none", *options, "2", "--", sys.executable, "-c", SEND)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"rank \d: ([\d,]+) bytes sent, ([\d,]+) received", done.stderr)
    (_, received), (sent, _) = ([int(n.replace(",", "")) for n in pair] for pair in counts)
    assert 1_000_000 < sent < 1_100_000 and 1_000_000 < received < 1_100_000  # headers are 66 of at most 1514 bytes


@needs_root
def test_a_rank_that_fails_ends_all() -> None:
    done = netlab("none", "3", "--", "sh", "-c", "test $RANK = 1 && exit 7; sleep 1000")
    assert done.returncode == 7 and "rank 1 ended with status 7" in done.stderr


@needs_root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")  # a word that no other process has in its command line
    words = [
        sys.executable,
        NETLAB,
        "none",
        "--delay",
        "1",
        "2",
        "--",
        "sh",
        "-c",
        f"touch {mark}; sleep 1000; : {mark}",
    ]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not Path(mark).exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert running(mark)
    process.send_signal(number)
    assert process.wait() != 0
    while running(mark):  # the kernel ends the namespaces' processes one after the other
        time.sleep(0.02)


def running(mark: str) -> list[str]:
    """Command lines of the ranks that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in line and "netlab\0" not in line:
            found.append(line)
    return found
