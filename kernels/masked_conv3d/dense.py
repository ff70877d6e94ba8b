"""Masked 3D convolution by torch's dense convolution, for layers where nothing is faster."""

from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.masked_conv3d import reference
from sparsekit.kernels.masked_conv3d.plan import PlanCache
from sparsekit.types import Size3


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *,
    stride: Size3,
    padding: Size3,
    dilation: Size3,
    groups: int,
    voxel_mask: Tensor | None,
    precision: str,
) -> Tensor:
    """Do as the reference; a mask that keeps all weights costs nothing."""
    if voxel_mask is None and PlanCache.of(mask).density == 1.0:
        return functional.conv3d(x, weight, bias, stride, padding, dilation, groups)
    return reference.masked_conv3d(
        x, weight, mask, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
        voxel_mask=voxel_mask, precision=precision,
    )  # fmt: skip
