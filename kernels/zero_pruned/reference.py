"""Setting pruned entries to 0 in plain PyTorch: the oracle."""

from torch import Tensor


def zero_pruned(parameter: Tensor, mask: Tensor) -> None:
    """Set entries of `parameter` to 0.0 where `mask` (bool, same shape and device) is False."""
    # Not a product: NaN * 0 is NaN, and -1 * 0 is -0.0.
    parameter.masked_fill_(~mask, 0.0)
