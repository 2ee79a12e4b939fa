"""Python without its start: programs forked from a process that has loaded torch and saef (`support.preload`).

`python()` is an executable that takes what `python` takes (a script, -m or -c, and words for it), and passes on the
standard streams, the exit status and signals. It spares each process four seconds of imports. A program's
`sys.executable` is that executable too, so the ranks of a launcher that was started by it are forked as well.

Only where the system can wait for a process by a file descriptor, which is on Linux; elsewhere it is Python itself.
"""

import atexit
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from support import CHECKOUT
from support.ranks import context

CLIENT = Path(__file__).with_name("forked_client.py")


@cache
def folder() -> Path:
    """Where the server listens, which ends with this process."""
    found = Path(tempfile.mkdtemp(prefix="saef-python-"))
    script = found / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(CLIENT), str(found)])} "$@"\n')
    script.chmod(0o755)
    ours, theirs = context().Pipe()
    server = context().Process(target=serve, args=(found, theirs))  # not a daemon: programs have children
    server.start()
    theirs.close()
    ours.recv()  # it listens

    @atexit.register
    def stop() -> None:
        ours.close()
        server.join()
        shutil.rmtree(found)

    return found


def python() -> str:
    return str(folder() / "python") if hasattr(os, "pidfd_open") else sys.executable


def program(pid: int) -> int:
    """The process that a running `python()`, of that pid, stands for."""
    return int((folder() / str(pid)).read_text()) if hasattr(os, "pidfd_open") else pid


# ---- the server ---------------------------------------------------------------------------------------------


class Server:
    """Forks a program for each client, and kills it when its client is gone; ends when the parent is gone."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(place / "socket"))
        self.listener.listen(64)
        self.clients: dict[int, socket.socket] = {}  # by their program's pid
        self.watched = selectors.DefaultSelector()

    def serve(self, parent: Any) -> None:
        self.watched.register(parent, selectors.EVENT_READ)
        self.watched.register(self.listener, selectors.EVENT_READ, self.accept)
        parent.send("listening")
        while True:
            for key, _ in self.watched.select():
                if key.fileobj is parent:
                    return self.end()
                key.data()

    def end(self) -> None:
        for program in self.clients:
            os.kill(program, signal.SIGKILL)

    def accept(self) -> None:
        client, _ = self.listener.accept()
        try:
            streams = socket.recv_fds(client, 1, 3)[1]
            with client.makefile() as lines:
                request = json.loads(lines.readline())
        except (OSError, ValueError):  # it was killed
            return client.close()
        if not (program := os.fork()):
            self.watched.close()
            for other in (self.listener, client, *self.clients.values()):
                other.close()
            (self.place / str(request["client"])).write_text(str(os.getpid()))  # before it can be heard of
            become(str(self.place / "python"), streams, **request)
        for stream in streams:
            os.close(stream)
        tell(client, program)
        self.clients[program] = client
        self.watched.register(client, selectors.EVENT_READ, partial(self.lost, program))
        ending = os.pidfd_open(program)
        self.watched.register(ending, selectors.EVENT_READ, partial(self.ended, program, ending))

    def lost(self, program: int) -> None:
        """The client was killed."""
        if program in self.clients:
            self.watched.unregister(self.clients.pop(program))
            os.kill(program, signal.SIGKILL)

    def ended(self, program: int, ending: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        if client := self.clients.pop(program, None):
            tell(client, status)
            self.watched.unregister(client)
            client.close()
        self.watched.unregister(ending)
        os.close(ending)


def tell(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it may have been killed
        client.sendall(f"{number}\n".encode())


def serve(place: Path, parent: Any) -> None:
    Server(place).serve(parent)


# ---- a program ----------------------------------------------------------------------------------------------


def become(
    executable: str, streams: list[int], client: int, words: list[str], cwd: str, variables: dict[str, str]
) -> None:
    """Run the program in this process, and end it: after its threads, by its exit handlers, without destructors."""
    sys.executable = executable
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "wr"[n == 0], 1, closefd=False) for n in range(3))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    status = 0
    try:
        run(words)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(words: list[str]) -> None:
    own = [path for path in map(Path, sys.path) if path != CHECKOUT and not path.is_relative_to(CHECKOUT / "tests")]
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *map(str, own)]
    words = words[1:] if words[0] == "-u" else words  # a line is written at its end anyway
    what, *rest = words
    if what == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(rest[0], main.__dict__)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(what).resolve().parent)]
        runpy.run_path(what, run_name="__main__")
