"""Tensors on a GPU: between it and this machine cross bits of masks and kept elements only."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.codec.elements import Bits
from sparsekit.codec.flags import Bytes, Flags, wanted_bits
from sparsekit.codec.records import BOOL, DType
from sparsekit.kernels import dispatch, triton_device

LEAST_ELEMENTS = 2**13
"""Tensors of fewer elements cross whole, as launches would hardly pay; not timed."""


def takes(device: torch.device, n: int) -> bool:
    """Whether a tensor of so many elements on that device is compacted there."""
    return device.type != "cpu" and n >= LEAST_ELEMENTS and not triton_device.why_not(device.type)


def _run(function: str, x: Tensor, *arguments: Any) -> Any:
    choice = dispatch.resolve(f"bitmap_{function}", x.device.type, "triton")
    dispatch.record(choice, x.device.type, "codec")
    return choice.implementation.load()(x, *arguments)


class DeviceFlags(Flags):
    """Flags whose bits are on a device as well as here."""

    def __init__(self, n: int, there: Tensor) -> None:
        super().__init__(n, packed=there.cpu().numpy())
        self.there = there

    @classmethod
    def of_mask(cls, mask: Tensor) -> "DeviceFlags":
        """Flags of a bool tensor."""
        # From another library's memory: to torch every byte but 0 is true.
        octets = mask.detach().contiguous().reshape(-1).view(torch.uint8)
        return cls(octets.numel(), _run("nonzero", octets, 255))


class DeviceSource:
    """A tensor on a device; a `sources.Source`.

    Parameters
    ----------
    tensor : Tensor
    dtype : DType
        That of the tensor.
    """

    def __init__(self, tensor: Tensor, dtype: DType) -> None:
        self.dtype = dtype
        self.shape = tuple(tensor.shape)
        flat = tensor.detach().resolve_neg().contiguous().reshape(-1)
        self._flat = flat.view(torch.uint8) != 0 if dtype is BOOL else flat

    @property
    def n(self) -> int:
        """Number of its elements."""
        return self._flat.numel()

    def nonzero(self) -> Flags:
        """Find its elements that are not zero."""
        return DeviceFlags(self.n, _run("nonzero", self._flat, wanted_bits(self.dtype)))

    def kept(self, keep: Flags) -> Bits:
        """Collect the kept elements in order."""
        if isinstance(keep, DeviceFlags) and keep.there.device == self._flat.device:
            there = keep.there
        else:
            there = torch.from_numpy(keep.packed).to(self._flat.device)
        return self._bits(_run("compact", self._flat, there))

    def whole(self) -> Bits:
        """All elements, flat."""
        return self._bits(self._flat)

    def _bits(self, elements: Tensor) -> Bits:
        width = self.dtype.itemsize
        bits: Bits = elements.view(getattr(torch, f"int{8 * width}")).cpu().numpy()
        return bits.view(f"u{width}")


def expanded(
    kept: Bits, packed: Bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Put kept elements at the bits that are set, on the device; both were checked."""
    values = torch.from_numpy(_writable(kept).view(f"i{kept.dtype.itemsize}")).to(device)
    whole: Tensor = _run(
        "expand", values, torch.from_numpy(_writable(packed)).to(device), math.prod(shape)
    )
    return whole.view(dtype).view(shape)


def _writable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array that torch takes without a warning: sections of a payload must not be written to."""
    return array if array.flags.writeable else array.copy()
