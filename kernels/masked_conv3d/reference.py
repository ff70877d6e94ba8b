"""Masked 3D convolution in plain PyTorch: the oracle for every other implementation."""

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.errors import BackendError
from sparsekit.kernels.masked_conv3d.geometry import Shape


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    voxel_mask: Tensor | None,
    precision: str,
) -> Tensor:
    """Convolve `x` with the unpruned weights; arguments are those that `sparsekit.ops` checked.

    Runs in the dtype of the input and costs what the dense convolution costs. Autograd through
    `torch.where` gives the gradients: exactly 0 at pruned weights, whatever values stand there.
    """
    if precision != "auto" and x.device.type not in ("cpu", "meta"):
        raise BackendError(
            f"precision: the reference backend on {x.device.type} follows torch's own settings "
            f"and cannot promise {precision!r}; use precision='auto'"
        )
    # Not weight * mask: NaN * 0 is NaN, and the gradient of a product would let it through.
    kept = torch.where(mask, weight, 0.0)
    y = functional.conv3d(x, kept, bias, shape.stride, shape.padding, shape.dilation, shape.groups)
    return y if voxel_mask is None else torch.where(voxel_mask, y, 0.0)
