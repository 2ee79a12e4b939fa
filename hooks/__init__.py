"""Communication hooks for torch.nn.parallel.DistributedDataParallel, and ready settings for them."""

from .presets import (
    dist_ef_block_sgd,
    dist_ef_block_sgdm,
    ef,
    signsgd_majority_vote,
    signum_majority_vote,
)
from .saef_hook import register, saef_hook

__all__ = [
    "dist_ef_block_sgd",
    "dist_ef_block_sgdm",
    "ef",
    "register",
    "saef_hook",
    "signsgd_majority_vote",
    "signum_majority_vote",
]
