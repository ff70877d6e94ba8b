"""Tile sizes of the Triton kernels for each kind of GPU, kept small enough that nothing spills.

`tools/kernel_builds.py` compiles all of them and checks that: docs/results/kernels.md.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from sparsekit.errors import BackendError
from sparsekit.kernels.masked_conv3d.gpu_plan import Settings, Tile

Architecture = Literal["sm_80", "sm_90", "sm_100", "gfx942", "other"]
"""Kinds of GPU with sizes of their own; ``"other"`` takes what is small everywhere."""
Precision = Literal["ieee", "tf32", "tf32x3", "bf16x3"]

ROWS = (16, 32, 64, 128)
"""Output tiles that there are sizes for: the least is what every matrix unit can take."""
WIDTHS = (64, 32, 16, 1)
"""Runs of channels, single columns last."""
# Modes that Triton compiles on AMD's matrix units.
_AMD_MODES = ("ieee", "bf16x3")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the kernels compute with."""

    architecture: Architecture
    dtype: torch.dtype
    precision: Precision
    """``"ieee"`` for float16 and bfloat16, whose products are exact."""

    @property
    def split(self) -> bool:
        """Whether each product becomes three."""
        return self.precision in ("tf32x3", "bf16x3")


def architecture_of(device: torch.device) -> Architecture:
    """Kind of a GPU; ``"other"`` for the interpreter and whatever is not listed."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx942") else "other"
    major, _ = torch.cuda.get_device_capability(device)
    known: dict[int, Architecture] = {8: "sm_80", 9: "sm_90", 10: "sm_100"}
    return known.get(major, "other")


def precision_of(precision: str, dtype: torch.dtype, device: torch.device) -> Precision:
    """Triton's mode for the caller's; ``"auto"`` follows torch's flags for convolutions.

    Raises
    ------
    BackendError
        The device has no such mode.
    """
    if dtype != torch.float32:
        return "ieee"
    amd = torch.version.hip is not None
    if precision == "auto":
        # Not `allow_tf32`, which raises where this newer setting was used.
        cudnn: Any = torch.backends.cudnn
        wanted = cudnn.conv.fp32_precision == "tf32"
        return "tf32" if device.type == "cuda" and wanted and not amd else "ieee"
    if amd and precision not in _AMD_MODES:
        raise BackendError(
            f"precision: Triton has no {precision!r} on AMD GPUs; use 'bf16x3', 'ieee' or 'auto'"
        )
    named: dict[str, Precision] = {
        "ieee": "ieee", "tf32": "tf32", "tf32x3": "tf32x3", "bf16x3": "bf16x3",
    }  # fmt: skip
    return named[precision]


@lru_cache(maxsize=256)
def settings(
    kind: Kind, rows: int, width: int, gradient_rows: int, gradient_width: int
) -> Settings:
    """Tiles of the three passes.

    Parameters
    ----------
    kind : Kind
    rows, width : int
        Of the forward pass and the weight gradient, from `ROWS` and `WIDTHS`.
    gradient_rows, gradient_width : int
        Of the input gradient.
    """
    return Settings(
        _product(kind, rows, width),
        _product(kind, gradient_rows, gradient_width),
        _sums(kind, rows, width),
        width,
        gradient_width,
    )


def _stages(kind: Kind) -> int:
    # AMD's shared memory is 64 KiB, and its compiler's pipeline is two deep.
    return 2 if kind.architecture in ("gfx942", "other") else 3


def _product(kind: Kind, rows: int, width: int) -> Tile:
    half = kind.dtype != torch.float32
    exact = kind.precision == "ieee" and not half
    small = kind.split and (rows > 32 or width == 1)
    voxels = 64 if small or (exact and rows in (16, 128)) else 128
    entries = 64 if half and width > 1 else 32
    if (kind.split and rows > 64) or exact:
        entries = 16
    many = rows > 64 or (kind.architecture == "sm_100" and half and rows == 32)
    return Tile(rows, entries, voxels, 8 if many else 4, _stages(kind))


def _sums(kind: Kind, rows: int, width: int) -> Tile:
    half = kind.dtype != torch.float32
    exact = kind.precision == "ieee" and not half
    # On sm_90 a 32-bit operand of 64 rows would have to be transposed by 4-byte copies.
    entries = 64 if half and width > 1 else 32
    voxels = 128 if half and width > 1 else 64
    stages = _stages(kind)
    # Found by compiling with the oldest and the newest Triton: otherwise these spill.
    if kind.split or exact:
        voxels = 32
        if rows == 128 and width == 1:
            stages = 2
        if rows == 128 and width > 1 and kind.split and kind.architecture == "gfx942":
            voxels = 16
    least = 16 if exact or (kind.split and width == 1) else 32 if kind.split else 64
    many = rows > least or (kind.architecture == "sm_100" and half and rows == 64)
    return Tile(rows, entries, voxels, 8 if many else 4, stages)
