"""Torch's dense convolution with the kernels for instance norm, max pooling and ReLU behind it."""

from torch import Tensor

from sparsekit.kernels.masked_conv3d import dense
from sparsekit.kernels.norm_pool_relu import autograd as norm_pool_relu
from sparsekit.types import Size3


def conv_norm_pool_relu(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *,
    stride: Size3,
    padding: Size3,
    dilation: Size3,
    groups: int,
    eps: float,
) -> Tensor:
    """Run one after the other; arguments are those that `sparsekit.ops` checked, float32."""
    y = dense.masked_conv3d(
        x, weight, mask, bias, stride=stride, padding=padding, dilation=dilation,
        groups=groups, voxel_mask=None, precision="auto",
    )  # fmt: skip
    return norm_pool_relu.norm_pool_relu(y, eps=eps)
