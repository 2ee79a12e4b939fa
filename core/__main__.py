"""Show what is installed, and whether it works: versions, the kernels of this machine, an exchange between two ranks.

python -m saef

The exchange is some steps of SAEF with DDP on two gloo ranks of this machine, compared with Algorithm 1 written out.
The status is 0 if it works, 1 if it does not or something is missing; then the last line says what.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, trial
from .wire import kernels


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m saef", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)  # compiling the kernels says so
    say(f"saef {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    frameworks = ("horovod", "deepspeed", "lightning", "transformers", "accelerate", "ray")
    for name in ("torch", "numba", "triton", *frameworks):
        say(f"{name}: {installed(name)}")
    if problem := prepare():
        say(f"kernels: {problem}")
        return 1
    if problem := trial.on_two_ranks(trial.train):
        say(f"exchange: {problem}")
        return 1
    say(f"exchange: works, {trial.STEPS} steps of SAEF on {trial.RANKS} gloo ranks give what they should")
    return 0


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def prepare() -> str:
    """Have the kernels of each kind of device here ready, and say which they are; what is wrong, or nothing."""
    found = [("cpu", "numba", f"the CPU, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        found.append(("cuda", "triton", torch.cuda.get_device_name()))
    for device, backend, where in found:
        try:
            kernels.select(torch.device(device))
            kernels.prepare(torch.device(device), torch.float32)
        except ImportError as error:
            return f"on {where}, they need {backend}, which cannot be imported: {error}"
        say(f"kernels: {backend} on {where}")
    return ""


if __name__ == "__main__":
    sys.exit(main())
