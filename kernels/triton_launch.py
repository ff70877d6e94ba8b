"""How Triton kernels are launched: on the device of their tensors, which they see as integers."""

from typing import Any

import torch
from torch import Tensor

from sparsekit.kernels.triton_device import on_device_of

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: what kernels see instead of floats, so that bits stay as they are."""


def launch(
    kernel: Any,
    programs: int,
    x: Tensor,
    *arguments: Tensor | int,
    warps: int = 4,
    **constants: int,
) -> None:
    """Run programs of a one-dimensional grid; `x` is the kernel's first argument.

    Triton launches on the current GPU, wherever the tensors are: that of `x` becomes it meanwhile.
    """
    with on_device_of(x):
        kernel[(programs,)](x, *arguments, **constants, num_warps=warps)


def flat_bits(x: Tensor) -> Tensor:
    """Elements in C order as integers of their width; a copy where `x` is not contiguous."""
    return x.detach().contiguous().reshape(-1).view(INTEGERS[x.element_size()])
