"""saef: 1-bit and top-k gradient compression with step-ahead error feedback, for data-parallel training.

model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign())
model.register_comm_hook(state, saef.hooks.saef_hook)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .comm.node import node_mesh
from .later import Later
from .protocols.adaptive import StochasticAdaptive
from .protocols.averaging import AllReduce, Averaging, LocalStep, Rotating, Slack
from .protocols.gossip import AsyncParameterServer, AsyncRing, Gossip, Ring
from .protocols.mixing import MixingTime, estimate_mixing_time, mixing_time, stationary_distance
from .protocols.model_averager import ModelAverager
from .protocols.parameter_server import ParameterServer
from .state import SAEFState
from .step.outer import Nesterov
from .storage import load_checkpoint, save_checkpoint
from .wire.codec import Codec, message_bytes
from .wire.compressors import Compressor, Exempt, Identity, MajorityVote, MinSize, ScaledSign, TopK

__version__ = version("saef")
__all__ = [
    "AllReduce",
    "AsyncParameterServer",
    "AsyncRing",
    "Averaging",
    "Codec",
    "Compressor",
    "Exempt",
    "Gossip",
    "Identity",
    "Later",
    "LocalStep",
    "MajorityVote",
    "MinSize",
    "MixingTime",
    "ModelAverager",
    "Nesterov",
    "ParameterServer",
    "Ring",
    "Rotating",
    "SAEFState",
    "ScaledSign",
    "Slack",
    "StochasticAdaptive",
    "TopK",
    "__version__",
    "estimate_mixing_time",
    "load_checkpoint",
    "message_bytes",
    "mixing_time",
    "node_mesh",
    "save_checkpoint",
    "stationary_distance",
]

# Attributes that are imported when they are first used. By name, since arrows point down: hooks and integrations import
# the core, and the core works without them. Type checkers get an import, which never runs.
_LATER = ("hooks", "integrations")

if TYPE_CHECKING:
    from . import hooks as hooks
    from . import integrations as integrations
else:

    def __getattr__(name):
        if name in _LATER:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_LATER})
