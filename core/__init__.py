"""saef: 1-bit and top-k gradient compression with step-ahead error feedback, for data-parallel training.

model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = saef.SAEFState(model, optimizer, compressor=saef.ScaledSign())
model.register_comm_hook(state, saef.hooks.saef_hook)
"""

from importlib.metadata import version

from .averaging import AllReduce, Averaging, Rotating
from .codec import Codec, message_bytes
from .compressors import Compressor, Identity, MajorityVote, MinSize, ScaledSign, TopK
from .state import SAEFState
from .storage import load_checkpoint, save_checkpoint

__version__ = version("saef")
__all__ = [
    "AllReduce",
    "Averaging",
    "Codec",
    "Compressor",
    "Identity",
    "MajorityVote",
    "MinSize",
    "Rotating",
    "SAEFState",
    "ScaledSign",
    "TopK",
    "__version__",
    "load_checkpoint",
    "message_bytes",
    "save_checkpoint",
]
