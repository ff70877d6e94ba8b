"""Between torch tensors and what the codec works on: checks, and ways in and out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.codec import decoding, on_device
from sparsekit.codec.elements import Elements
from sparsekit.codec.flags import Flags
from sparsekit.codec.layouts import MAX_DIMS, MAX_NAME_BYTES
from sparsekit.codec.records import BOOL, DTYPE_BY_NAME, DType, quote
from sparsekit.codec.sources import HostSource, Source
from sparsekit.codec.wire import Placed
from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.types import State

TORCH_BY_NAME: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BY_NAME}
_NAME_BY_TORCH = {dtype: name for name, dtype in TORCH_BY_NAME.items()}


def check_mapping(state: object, argument: str) -> None:
    """Raise unless a state is a mapping."""
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(
            f"{argument}: expected a mapping of names to tensors, got {type(state).__name__}"
        )


def dtype_of(tensor: object, name: str, argument: str) -> DType:
    """Element type of a dense tensor; anything else raises."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(
            f"{argument}: expected a tensor for {quote(name)}, got {type(tensor).__name__}"
        )
    known = _NAME_BY_TORCH.get(tensor.dtype)
    if known is None or tensor.layout is not torch.strided:
        raise ArgumentTypeError(
            f"{argument}: {quote(name)} is a {tensor.layout} tensor of {tensor.dtype}; expected "
            f"torch.strided and one of {', '.join(DTYPE_BY_NAME)}"
        )
    return DTYPE_BY_NAME[known]


def elements_of_state(state: State, argument: str) -> dict[str, Elements]:
    """Elements of all tensors, copied to the CPU."""
    check_mapping(state, argument)
    return {name: elements_of(tensor, name, argument) for name, tensor in state.items()}


def _checked(tensor: Tensor, name: str, argument: str) -> DType:
    """Element type of a tensor that can travel."""
    _check_name(name, argument)
    dtype = dtype_of(tensor, name, argument)
    if tensor.ndim > MAX_DIMS:
        raise ArgumentError(
            f"{argument}: {quote(name)} has {tensor.ndim} dimensions, at most {MAX_DIMS} can travel"
        )
    if tensor.is_meta:
        raise ArgumentError(f"{argument}: {quote(name)} is a meta tensor, which holds no values")
    return dtype


def elements_of(tensor: Tensor, name: str, argument: str) -> Elements:
    """Elements of a tensor, copied to the CPU where it is elsewhere."""
    dtype = _checked(tensor, name, argument)
    # A lazy negation lives in the tensor's flags, where reading its bits would miss it.
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    as_int = getattr(torch, f"int{8 * dtype.itemsize}")
    bits = flat.view(as_int).numpy().view(f"u{dtype.itemsize}")
    if dtype is BOOL and bits.size and bits.max() > 1:
        # From another library's memory: to torch every byte but 0 is true.
        bits = (bits != 0).view(np.uint8)
    return Elements(dtype, tuple(tensor.shape), bits)


def source_of(tensor: Tensor, name: str) -> Source:
    """Return what the encoder takes of a tensor of the state, compacted where it is."""
    dtype = _checked(tensor, name, "state")
    if on_device.takes(tensor.device, tensor.numel()):
        return on_device.DeviceSource(tensor, dtype)
    return HostSource(elements_of(tensor, name, "state"))


def _check_name(name: Any, argument: str) -> None:
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"{argument}: expected names of type str, got {type(name).__name__}"
        )
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{argument}: the name {quote(name)} cannot be UTF-8") from None
    if len(raw) > MAX_NAME_BYTES or 0 in raw:
        raise ArgumentError(
            f"{argument}: the name {quote(name)} must have at most {MAX_NAME_BYTES} bytes, "
            "none of them zero"
        )


def flags_of(mask: Tensor, name: str, shape: tuple[int, ...]) -> Flags:
    """Flags of a mask for a tensor of that shape."""
    if dtype_of(mask, name, "masks") is not BOOL:
        raise ArgumentTypeError(
            f"masks: expected a bool tensor for {quote(name)}, got {mask.dtype}"
        )
    if tuple(mask.shape) != shape:
        raise ArgumentError(
            f"masks: expected shape {shape} for {quote(name)}, got {tuple(mask.shape)}"
        )
    if on_device.takes(mask.device, mask.numel()):
        return on_device.DeviceFlags.of_mask(mask)
    return Flags(mask.numel(), bools=elements_of(mask, name, "masks").bits.view(np.bool_))


def decoded(
    payload: memoryview, placed: Placed, base: Mapping[str, Elements], device: torch.device
) -> Tensor:
    """Tensor of one record, on that device."""
    record = placed.record
    if on_device.takes(device, record.n) and decoding.is_plain_bitmap(record):
        assert record.dtype is not None
        kept, packed = decoding.bitmap_parts(payload, placed)
        dtype = TORCH_BY_NAME[record.dtype.name]
        return on_device.expanded(kept, packed, dtype, record.shape, device)
    return _to_tensor(decoding.decode_record(payload, placed, base)).to(device)


def _to_tensor(elements: Elements) -> Tensor:
    name = elements.dtype.name
    if name == "bfloat16":
        # NumPy has no bfloat16: the bits cross as int16.
        shaped = elements.bits.view(np.int16).reshape(elements.shape)
        return torch.from_numpy(shaped).view(torch.bfloat16)
    return torch.from_numpy(elements.bits.view(name).reshape(elements.shape))
