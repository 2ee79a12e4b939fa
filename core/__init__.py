"""saef: 1-bit and top-k gradient compression with step-ahead error feedback, for data-parallel training.

model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign())
model.register_comm_hook(state, saef.hooks.saef_hook)
"""

from importlib.metadata import version

from .adaptive import StochasticAdaptive
from .averaging import AllReduce, Averaging, LocalStep, Rotating, Slack
from .codec import Codec, message_bytes
from .compressors import Compressor, Identity, MajorityVote, MinSize, ScaledSign, TopK
from .gossip import AsyncParameterServer, AsyncRing, Gossip, Ring
from .mixing import MixingTime, estimate_mixing_time, mixing_time, stationary_distance
from .model_averager import ModelAverager
from .parameter_server import ParameterServer
from .state import SAEFState
from .storage import load_checkpoint, save_checkpoint

__version__ = version("saef")
__all__ = [
    "AllReduce",
    "AsyncParameterServer",
    "AsyncRing",
    "Averaging",
    "Codec",
    "Compressor",
    "Gossip",
    "Identity",
    "LocalStep",
    "MajorityVote",
    "MinSize",
    "MixingTime",
    "ModelAverager",
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
    "save_checkpoint",
    "stationary_distance",
]
