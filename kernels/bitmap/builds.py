"""Configurations of the Triton kernels that are compiled ahead of time, and looked at."""

from sparsekit.kernels.bitmap import triton as bits
from sparsekit.kernels.bitmap import triton_passes as passes
from sparsekit.kernels.builds import Build, build

_ITEMS = {"8": 0xFF, "16": 0x7FFF, "32": 0x7FFFFFFF, "64": (1 << 63) - 1}


def builds() -> list[Build]:
    """Every kernel in the tiles that it runs with, for each width of element."""
    tiles = bits.TILES
    warps = tiles.warps
    block, part = {"BLOCK": tiles.block}, {"PART": tiles.part}
    rows = [
        build(
            passes.unpack_kernel,
            {"bits": "*u8", "bools": "*i8", "n": "i32"},
            block,
            num_warps=warps,
        ),
        build(
            passes.count_kernel,
            {"bits": "*u8", "counts": "*i64", "n": "i32"},
            part,
            num_warps=warps,
        ),
    ]
    for width, wanted in _ITEMS.items():
        item = f"*i{width}"
        rows += [
            build(
                passes.nonzero_kernel, {"values": item, "bits": "*u8", "n": "i32"},
                {"WANTED": -1 if width == "8" else wanted, **block}, num_warps=warps,
            ),
            build(
                passes.compact_kernel,
                {"values": item, "bits": "*u8", "ends": "*i64", "kept": item, "n": "i32"},
                part | block, num_warps=warps,
            ),
            build(
                passes.expand_kernel,
                {"kept": item, "bits": "*u8", "ends": "*i64", "values": item, "n": "i32"},
                part | block, num_warps=warps,
            ),
        ]  # fmt: skip
    return rows
