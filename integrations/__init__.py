"""Adapters for other frameworks: each translates a framework's interface to `saef` and does no arithmetic.

DeepSpeed: `saef.integrations.deepspeed`. Horovod: `saef.integrations.horovod`. PyTorch Lightning, Hugging Face's
Trainer, Accelerate: `saef.integrations.lightning`, `.transformers` and `.accelerate`. Each is imported when it is first
used, and says then if its framework is missing. PyTorch DDP needs none: its communication hooks are in `saef.hooks`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import accelerate as accelerate
    from . import deepspeed as deepspeed
    from . import horovod as horovod
    from . import lightning as lightning
    from . import transformers as transformers
else:

    def __getattr__(name):
        if name in ("accelerate", "deepspeed", "horovod", "lightning", "transformers"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
