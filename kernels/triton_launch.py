"""What every launch of a Triton kernel needs: the device of its tensors, and blocks to cover them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparsekit.kernels.triton_device import GPU

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: what kernels see instead of floats, so that bits stay as they are."""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.device.type == GPU else nullcontext()


def flat_bits(x: Tensor) -> Tensor:
    """Elements in C order as integers of their width; a copy where `x` is not contiguous."""
    return x.detach().contiguous().reshape(-1).view(INTEGERS[x.element_size()])
