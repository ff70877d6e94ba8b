"""Configurations of the Triton kernels that are compiled ahead of time, and looked at."""

from typing import Any

import torch

from sparsekit.kernels.builds import Build, build
from sparsekit.kernels.masked_conv3d import triton_passes
from sparsekit.kernels.masked_conv3d.gpu_plan import Tile
from sparsekit.kernels.masked_conv3d.tiles import ROWS, Architecture, Kind, Precision, settings

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def kinds(architecture: Architecture) -> list[Kind]:
    """Everything that the kernels compute with on one kind of GPU."""
    modes: tuple[Precision, ...] = ("tf32", "tf32x3", "bf16x3", "ieee")
    if architecture == "gfx942":
        modes = ("bf16x3", "ieee")
    found = [Kind(architecture, torch.float32, mode) for mode in modes]
    found += [Kind(architecture, dtype, "ieee") for dtype in (torch.float16, torch.bfloat16)]
    return found


def builds(architecture: Architecture, *, whole: bool) -> list[Build]:
    """Configurations for one kind of GPU.

    Parameters
    ----------
    architecture : str
    whole : bool
        All that a plan can ask for; otherwise the smallest tiles, in bfloat16 and in float32.
    """
    every = kinds(architecture)
    chosen = every if whole else [every[-1], every[1 if architecture == "gfx942" else 0]]
    found = []
    for kind in chosen:
        for rows in ROWS if whole else (16,):
            for width in (16, 1):
                tiles = settings(kind, rows, width, rows, width)
                found.append(_product(kind, tiles.forward, width))
                found.append(_sums(kind, tiles.weight_gradient, width))
    for rows in ROWS if whole else (16,):
        for kind in every if whole else every[-1:]:
            tile = settings(kind, rows, 16, rows, 16).weight_gradient
            found += [_pack(kind, rows), _sum_splits(kind, tile)]
    return list({row.name: row for row in found}.values())


def _detail(kind: Kind, tile: Tile, width: int) -> str:
    what = kind.precision if kind.dtype == torch.float32 else _TYPES[kind.dtype]
    columns = "single columns" if width == 1 else "runs of 16 and more"
    return f"{what}, {columns}, {tile.voxels} x {tile.rows} x {tile.entries}"


def _types(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types in the kernel's order; what is neither a tensor nor a constant is an int32."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}


def _product(kind: Kind, tile: Tile, width: int) -> Build:
    element = _TYPES[kind.dtype]
    wide = width > 1
    pointers = {
        "x": element, "packed": element, "offsets": "i32", "steps": "i32", "bias": element,
        "live": "i32", "y": element, "x_places": "i32", "y_places": "i32",
    }  # fmt: skip
    constants = {
        "VOXELS": tile.voxels, "BN": tile.rows, "BK": tile.entries,
        "CONTIGUOUS": width, "HAS_BIAS": True, "HAS_LIVE": True, "PRECISION": kind.precision,
    }  # fmt: skip
    kernel = triton_passes.gather_product
    return build(
        kernel, _types(kernel, pointers, constants), constants,
        num_warps=tile.warps, num_stages=tile.stages,
        multiples=("length", *(("x_n",) if wide else ())),
        detail=_detail(kind, tile, width),
        tensor_cores=_has_tensor_cores(kind), wide_copies=wide and _has_tensor_cores(kind),
    )  # fmt: skip


def _sums(kind: Kind, tile: Tile, width: int) -> Build:
    element = _TYPES[kind.dtype]
    wide = width > 1
    pointers = {
        "x": element, "gradient": element, "offsets": "i32", "steps": "i32", "listed": "i32",
        "part_count": "i32", "partial": "fp32", "x_places": "i32", "g_places": "i32",
    }  # fmt: skip
    constants = {
        "VOXELS": tile.voxels, "BN": tile.rows, "BK": tile.entries,
        "CONTIGUOUS": width, "G_CONTIGUOUS": width, "HAS_LISTED": True,
        "PRECISION": kind.precision, **({"g_c": 1} if wide else {}),
    }  # fmt: skip
    steps = ("x_n", "g_n") if wide else ()
    kernel = triton_passes.weight_gradient
    return build(
        kernel, _types(kernel, pointers, constants), constants,
        num_warps=tile.warps, num_stages=tile.stages,
        multiples=("length", "group_step", *steps),
        detail=_detail(kind, tile, width),
        tensor_cores=_has_tensor_cores(kind), wide_copies=wide and _has_tensor_cores(kind),
    )  # fmt: skip


def _has_tensor_cores(kind: Kind) -> bool:
    """Whether the products have to run on matrix units; NVIDIA's have no mode for all bits."""
    return kind.precision != "ieee" or kind.dtype != torch.float32 or kind.architecture == "gfx942"


def _pack(kind: Kind, rows: int) -> Build:
    element = _TYPES[kind.dtype]
    pointers = {"weight": element, "mask": "u8", "sources": "i32", "packed": element}
    constants = {"BN": rows, "BLOCK": 64}
    kernel = triton_passes.pack_weights
    return build(
        kernel, _types(kernel, pointers, constants), constants, num_warps=4,
        multiples=("length",), detail=f"{element}, {rows} x 64",
    )  # fmt: skip


def _sum_splits(kind: Kind, tile: Tile) -> Build:
    element = _TYPES[kind.dtype]
    pointers = {
        "partial": "fp32", "mask": "u8", "sources": "i32", "steps": "i32", "out": element,
    }  # fmt: skip
    constants = {"BN": tile.rows, "BK": tile.entries}
    kernel = triton_passes.sum_splits
    return build(
        kernel, _types(kernel, pointers, constants), constants, num_warps=tile.warps,
        multiples=("length",), detail=f"{element}, {tile.rows} x {tile.entries}",
    )  # fmt: skip
