"""Weights with 0 at the pruned ones, in plain PyTorch: the oracle."""

import torch
from torch import Tensor


def kept_weights(weight: Tensor, mask: Tensor) -> Tensor:
    """Return `weight` with 0.0 where `mask` (bool, same shape and device) is False."""
    # Not a product: NaN * 0 is NaN, and the gradient of a product would let it through.
    return torch.where(mask, weight, 0.0)
