"""Masked 3D convolution by torch's dense convolution, for layers where nothing is faster."""

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.kept_weights.cpu import kept_weights
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache


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
    """Do as the reference; a mask that keeps all weights costs nothing."""
    del precision  # torch computes in the dtype of `x`, float32
    kept = weight if PlanCache.of(mask).density == 1.0 else kept_weights(weight, mask)
    y = functional.conv3d(x, kept, bias, shape.stride, shape.padding, shape.dilation, shape.groups)
    return y if voxel_mask is None else torch.where(voxel_mask, y, 0.0)
