"""Checks of a convolution's arguments, made once before an implementation is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.types import Size3

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Convolution:
    """Arguments as an implementation takes them."""

    x: Tensor
    """(n, c_in, d, h, w), with what ``padding="same"`` needs at one end only already added."""
    shape: Shape
    out: Size3
    """Grid of the output, at least 1 along each axis."""


def check_convolution(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Convolution:
    """Check the arguments of `sparsekit.masked_conv3d` and bring them to one form.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Something does not fit; the text names the argument.
    """
    _check_tensors(x, weight, mask, bias)
    if not _is_integer(groups):
        raise ArgumentTypeError(f"groups: expected an int, got {groups!r}")
    if groups < 1 or weight.shape[0] % groups:
        raise ArgumentError(
            f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups}"
        )
    batch = x.unsqueeze(0) if x.ndim == 4 else x
    if batch.shape[1] != weight.shape[1] * groups:
        raise ArgumentError(
            f"x: expected {weight.shape[1] * groups} channels "
            f"(weight has {weight.shape[1]} per group, groups = {groups}), got {batch.shape[1]}"
        )
    kernel: Size3 = (weight.shape[2], weight.shape[3], weight.shape[4])
    steps = _triple("stride", stride, least=1)
    spread = _triple("dilation", dilation, least=1)
    batch, pad = _resolve_padding(batch, padding, kernel, steps, spread)
    size: Size3 = (batch.shape[2], batch.shape[3], batch.shape[4])
    shape = Shape(batch.shape[1], weight.shape[0], size, kernel, steps, pad, spread, groups)
    out = shape.out
    if min(out) < 1:
        raise ArgumentError(
            f"x: a {size} grid with padding {pad} is smaller than the "
            f"{kernel} kernel with dilation {spread}"
        )
    return Convolution(batch, shape, out)


def _check_tensors(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if x.ndim not in (4, 5):
        raise ArgumentError(
            f"x: expected (n, c, d, h, w) or (c, d, h, w), got shape {tuple(x.shape)}"
        )
    if weight.ndim != 5 or 0 in weight.shape:
        raise ArgumentError(
            "weight: expected (c_out, c_in / groups, kd, kh, kw) without empty axes, "
            f"got shape {tuple(weight.shape)}"
        )
    if mask.shape != weight.shape:
        raise ArgumentError(
            f"mask: expected the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"mask: expected dtype bool, got {mask.dtype}; use mask.bool()")
    if x.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(f"x: expected a real floating dtype, got {x.dtype}")
    # Under autocast the convolution itself brings its inputs to one dtype.
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ArgumentTypeError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ArgumentError(
                f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        if bias.dtype != weight.dtype:
            raise ArgumentTypeError(
                f"bias: expected the weight's dtype {weight.dtype}, got {bias.dtype}"
            )
    for name, other in (("weight", weight), ("mask", mask), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ArgumentError(
                f"{name}: expected the device of x, {x.device}, got {other.device}; "
                f"move it with {name}.to(x.device)"
            )


def _triple(name: str, value: int | Sequence[int], *, least: int) -> Size3:
    values = tuple(value) if isinstance(value, Sequence) else (value, value, value)
    expected = f"{name}: expected an int >= {least} or 3 of them, got {value!r}"
    if not all(_is_integer(v) for v in values):
        raise ArgumentTypeError(expected)
    if len(values) != 3 or any(v < least for v in values):
        raise ArgumentError(expected)
    return int(values[0]), int(values[1]), int(values[2])


def _is_integer(value: object) -> bool:
    # Those of NumPy count as integers too; bools would, and a float may equal one.
    return isinstance(value, Integral) and not isinstance(value, bool)


def _resolve_padding(
    x: Tensor, padding: int | Sequence[int] | str, kernel: Size3, stride: Size3, dilation: Size3
) -> tuple[Tensor, Size3]:
    """Symmetric padding as numbers; what ``"same"`` needs beyond that is added to `x`."""
    if not isinstance(padding, str):
        return x, _triple("padding", padding, least=0)
    if padding == "valid":
        return x, (0, 0, 0)
    if padding != "same":
        raise ArgumentError(f"padding: expected 'same', 'valid' or numbers, got {padding!r}")
    if stride != (1, 1, 1):
        raise ArgumentError(f"padding: 'same' needs stride 1, got stride {stride}")
    total = [s * (k - 1) for s, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        # torch puts the odd voxel at the far end; F.pad counts from the last axis.
        x = functional.pad(x, [v for t in reversed(total) for v in (0, t % 2)])
    return x, (total[0] // 2, total[1] // 2, total[2] // 2)


def check_voxel_mask(voxel_mask: Tensor, x: Tensor, out_size: tuple[int, ...]) -> Tensor:
    """Bring a mask of output voxels to (n or 1, 1, d, h, w), or raise."""
    if voxel_mask.dtype != torch.bool:
        raise ArgumentTypeError(f"voxel_mask: expected dtype bool, got {voxel_mask.dtype}")
    if voxel_mask.device != x.device:
        raise ArgumentError(
            f"voxel_mask: expected the device of x, {x.device}, got {voxel_mask.device}"
        )
    shape = tuple(voxel_mask.shape)
    if shape == out_size:
        return voxel_mask[None, None]
    if shape not in ((1, 1, *out_size), (x.shape[0], 1, *out_size)):
        raise ArgumentError(
            f"voxel_mask: expected the output's grid {out_size}, or (n or 1, 1) before it, "
            f"got {shape}"
        )
    return voxel_mask
