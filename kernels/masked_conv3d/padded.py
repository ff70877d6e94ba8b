"""Padded copies of inputs and gradients, as the Triton kernels read them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.types import Size3


@dataclass(frozen=True, slots=True)
class Padded:
    """Layout of a padded buffer; steps count elements."""

    channels: int
    """Real channels of each group."""
    stored: int
    """Channels of each group in memory; what is beyond the real ones is 0."""
    groups: int
    front: Size3
    """Zeros before the first voxel, along each axis."""
    extent: Size3
    """Voxels along each axis, zeros included."""
    channels_last: bool

    @property
    def sample(self) -> int:
        """From one sample to the next."""
        return self.groups * self.stored * math.prod(self.extent)

    @property
    def axes(self) -> Size3:
        """From one voxel to the next, along each axis."""
        _, h, w = self.extent
        across = self.groups * self.stored if self.channels_last else 1
        return h * w * across, w * across, across

    @property
    def channel(self) -> int:
        """From one channel to the next."""
        return 1 if self.channels_last else math.prod(self.extent)

    @property
    def group(self) -> int:
        """From one group to the next."""
        return self.stored * self.channel


def pack(x: Tensor, layout: Padded) -> Tensor:
    """Copy (n, groups * channels, d, h, w) into a buffer with this layout.

    Voxels behind the buffer's end are left out: nothing reads them.
    """
    n = x.shape[0]
    last = layout.channels_last
    across = (layout.groups, layout.stored)
    shape = (n, *layout.extent, *across) if last else (n, *across, *layout.extent)
    whole = torch.zeros(shape, dtype=x.dtype, device=x.device)
    grouped = x.unflatten(1, (layout.groups, layout.channels))
    view = whole.permute(0, 4, 5, 1, 2, 3) if last else whole
    view = view.narrow(2, 0, layout.channels)
    for axis in range(3):
        front, extent = layout.front[axis], layout.extent[axis]
        size = max(0, min(x.shape[2 + axis], extent - front))
        grouped = grouped.narrow(3 + axis, 0, size)
        view = view.narrow(3 + axis, min(front, extent), size)
    view.copy_(grouped)
    return whole
