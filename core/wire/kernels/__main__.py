"""Compile the CPU kernels ahead of time, into numba's cache: a step of an installation or of a container's build.

python -m saef.wire.kernels [float32] [float64]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import torch

from . import cpu

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saef.wire.kernels", description=__doc__)
    parser.add_argument("dtypes", nargs="*", metavar="dtype", help="float32 (if none is given), float64")
    names = parser.parse_args().dtypes or ["float32"]
    if unknown := set(names) - set(DTYPES):
        parser.error(f"expected {' or '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    for name in names:
        start = time.perf_counter()
        compiled = cpu.prepare(DTYPES[name])
        if not compiled:
            sys.stdout.write(f"the CPU kernels for {name} were there; loaded in {time.perf_counter() - start:.1f} s\n")


if __name__ == "__main__":
    main()
