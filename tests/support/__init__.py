"""What test modules share. They import from here, never from each other.

Tests lie in folders that say what they need, and run in this order, so that the first failure is the simplest:

    pure        functions, kernels and files, in this process
    workers     the algorithm and the protocols over a list of workers, without communication
    ranks       several gloo ranks on this machine (`support.ranks`)
    frameworks  Horovod, DeepSpeed, trainers, torchrun, the examples as a user starts them, building the package

What ranks run is pickled by its module's name: modules of `support` are found since this folder's parent is on
sys.path, test modules since pytest puts their folders there. Names of test files are therefore unique.
"""

import os
import re
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = CHECKOUT / "examples"


def readme_script() -> str:
    """The whole script that the README has for copying."""
    (script,) = re.findall(r"^```python\n(.*?)^```$", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return script


def environment(**variables: str) -> dict[str, str]:
    """For processes that import `support` or test modules: one thread each, `variables` on top."""
    own = [path for path in sys.path if Path(path).is_relative_to(CHECKOUT / "tests")]
    path = os.pathsep.join(dict.fromkeys([str(CHECKOUT / "tests"), *own]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
