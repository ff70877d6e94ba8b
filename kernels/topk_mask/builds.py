"""Configurations of the Triton kernels that are compiled ahead of time, and looked at."""

from sparsekit.kernels.builds import Build, build
from sparsekit.kernels.topk_mask import triton as topk

_ROW = {"row": "i32", "rows": "i32"}


def builds() -> list[Build]:
    """Every kernel in the tiles that it runs with, for each dtype, with `within` and without."""
    tiles = topk.TILES
    warps, block = tiles.warps, {"BLOCK": tiles.block}
    joint = {"state": "*i64", "bits": "*u8", "ties": "*i64"}
    rows = [
        build(
            topk.digit_kernel, {"state": "*i64", "counts": "*i64", "keep": "i32"},
            {"BITS": 11, "FIRST": True}, num_warps=4,
        ),
        build(
            topk.quota_kernel, {"state": "*i64", "ties": "*i64", "parts": "i32"}, block,
            num_warps=4,
        ),
        build(
            topk.masks_kernel, {"bits": "*u8", "table": "*i64", "masks": "*i8", "rows": "i32"},
            block, num_warps=warps,
        ),
    ]  # fmt: skip
    for kind, within in ((0, False), (0, True), (1, True), (2, True)):
        item = "*i16" if kind else "*i32"
        pointers = {"values": item, "within": "*i8" if within else item, "table": "*i64"}
        constants = {"KIND": kind, "WITHIN": within, **block}
        low = {"LOW": 10 if kind else 0}
        for shift, width in topk.DIGITS[: 2 if kind else 3]:
            rows.append(
                build(
                    topk.histogram_kernel,
                    pointers | {"state": "*i64", "counts": "*i64"} | _ROW | {"tensors": "i32"},
                    constants | {"SHIFT": shift, "BITS": width}, num_warps=warps,
                )
            )  # fmt: skip
        rows.append(
            build(topk.classify_kernel, pointers | joint | _ROW, constants | low, num_warps=warps)
        )
        quotas = {"quotas" if name == "ties" else name: kind for name, kind in joint.items()}
        rows.append(
            build(topk.ties_kernel, pointers | quotas | _ROW, constants | low, num_warps=warps)
        )
    return rows
