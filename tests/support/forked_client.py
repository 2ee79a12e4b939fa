"""What `support.forked.python` starts: ask the server for a program, and stand for it. See there."""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PASSED_ON = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def main(place: str, *words: str) -> None:
    request = {"client": os.getpid(), "words": words, "cwd": os.getcwd(), "variables": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server, server.makefile() as answers:
        server.connect(str(Path(place, "socket")))
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        program = int(answers.readline())

        def pass_on(number: int, frame: Any) -> None:
            with suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(program, number)

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        status = int(answers.readline() or 1)
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main(*sys.argv[1:])
