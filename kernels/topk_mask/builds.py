"""Configurations of the Triton kernels that are compiled ahead of time, and looked at."""

from sparsekit.kernels.builds import Build, build
from sparsekit.kernels.topk_mask import triton as topk
from sparsekit.kernels.topk_mask import triton_passes as passes

_ROW = {"row": "i32", "rows": "i32"}


def builds(*, amd: bool) -> list[Build]:
    """Every kernel in the tiles that it runs with, for each dtype, with `within` and without."""
    tiles = topk.TILES
    warps, block = tiles.warps, {"BLOCK": tiles.block}
    joint = {"state": "*i64", "bits": "*u8", "ties": "*i64"}
    rows = [
        build(
            passes.digit_kernel, {"state": "*i64", "counts": "*i64", "keep": "i32"},
            {"BITS": 8, "FIRST": False}, num_warps=4,
        ),
        build(
            passes.quota_kernel, {"state": "*i64", "ties": "*i64", "parts": "i32"},
            {"BLOCK": topk.QUOTAS},
            num_warps=4,
        ),
        build(
            passes.masks_kernel, {"bits": "*u8", "table": "*i64", "masks": "*i8", "rows": "i32"},
            block, num_warps=warps,
        ),
    ]  # fmt: skip
    for kind, within in ((0, False), (0, True), (1, True), (2, True)):
        item = "*i16" if kind else "*i32"
        pointers = {"values": item, "within": "*i8" if within else item, "table": "*i64"}
        constants = {"KIND": kind, "WITHIN": within}
        digits = topk.DIGITS[topk.ZEROS[kind]]
        low = {"LOW": digits[-1][0]}
        counted = {"BLOCK": tiles.counted_of(kind, amd=amd)}
        for shift, width in digits:
            rows.append(
                build(
                    passes.histogram_kernel,
                    pointers | {"state": "*i64", "counts": "*i64"} | _ROW | {"tensors": "i32"},
                    constants | {"SHIFT": shift, "BITS": width} | counted,
                    num_warps=warps,
                )
            )  # fmt: skip
        rows.append(
            build(
                passes.classify_kernel,
                pointers | joint | _ROW,
                constants | block | low,
                num_warps=warps,
            )
        )
        quotas = {"quotas" if name == "ties" else name: kind for name, kind in joint.items()}
        rows.append(
            build(
                passes.ties_kernel,
                pointers | quotas | _ROW,
                constants | {"BLOCK": tiles.tied} | low,
                num_warps=warps,
            )
        )
    return rows
