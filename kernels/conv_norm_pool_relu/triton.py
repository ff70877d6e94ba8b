"""The block on a GPU: the masked convolution in Triton, then torch's norm, pooling and ReLU."""

from torch import Tensor

from sparsekit.kernels.masked_conv3d import gpu_autograd
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.norm_pool_relu import reference as norm_pool_relu


def conv_norm_pool_relu(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    eps: float,
) -> Tensor:
    """Run one after the other; arguments are those that `sparsekit.ops` checked."""
    y = gpu_autograd.masked_conv3d(x, weight, mask, bias, shape, voxel_mask=None, precision="auto")
    return norm_pool_relu.norm_pool_relu(y, eps=eps)
