"""Adapters for other frameworks: each translates a framework's interface to `saef` and does no arithmetic.

DeepSpeed: `saef.integrations.deepspeed`. Horovod: `saef.integrations.horovod`. Each is imported when it is first used,
and says then if its framework is missing. PyTorch DDP needs no adapter: its communication hooks are in `saef.hooks`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import deepspeed as deepspeed
    from . import horovod as horovod
else:

    def __getattr__(name):
        if name in ("deepspeed", "horovod"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
