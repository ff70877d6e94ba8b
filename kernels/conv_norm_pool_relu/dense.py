"""Torch's dense convolution with the kernels for instance norm, max pooling and ReLU behind it."""

from torch import Tensor

from sparsekit.kernels.masked_conv3d import dense
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.norm_pool_relu import autograd as norm_pool_relu


def conv_norm_pool_relu(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    eps: float,
) -> Tensor:
    """Run one after the other; arguments are those that `sparsekit.ops` checked, float32."""
    y = dense.masked_conv3d(x, weight, mask, bias, shape, voxel_mask=None, precision="auto")
    return norm_pool_relu.norm_pool_relu(y, eps=eps)
