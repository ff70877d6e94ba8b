"""Mistakes in the convolution's kernels and lists that a named check has to notice.

Each row: a name, the file, its text, what replaces it, how the check runs (in Triton's
``interpreter`` or in ``ttsem``), and the check.
"""

_KERNELS = "kernels/masked_conv3d/triton_passes.py"
_LISTS = "kernels/masked_conv3d/columns.py"
_PLAN = "kernels/masked_conv3d/gpu_plan.py"
_TEST = "tests/triton/test_masked_conv3d.py::"

MUTANTS = [
    (
        "a bound dropped from the output's store", _KERNELS,
        "inside = (place >= 0)[:, None] & (row < rows)[None, :]",
        "inside = (place >= 0)[:, None] & (row >= 0)[None, :]",
        "ttsem", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "no bound for the last tile's voxels", _KERNELS,
        "m = tl.arange(0, VOXELS)\n    real = part * VOXELS + m < numbers",
        "m = tl.arange(0, VOXELS)\n    real = part * VOXELS + m >= 0",
        "ttsem", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "a list read from one entry further on", _KERNELS,
        "at = tl.load(own_offsets + step * BK + k)",
        "at = tl.load(own_offsets + step * BK + k + 1)",
        "interpreter", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "all splits store their sums to the same place", _KERNELS,
        "entry = (split.to(tl.int64) * tiles + tile) * length + step * BK + k",
        "entry = (split.to(tl.int64) * 0 + tile) * length + step * BK + k",
        "ttsem", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "no mask for the rows of a ragged tile", _KERNELS,
        "real = (row < rows)[:, None] & (source >= 0)[None, :]",
        "real = (row >= 0)[:, None] & (source >= 0)[None, :]",
        "ttsem", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "no mask for the tail of a list", _KERNELS,
        "source = tl.load(sources + tile.to(tl.int64) * length + k, mask=within, other=-1)",
        "source = tl.load(sources + tile.to(tl.int64) * length + k)",
        "ttsem", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "pruned weights are packed as they are", _KERNELS,
        "mask=real & kept, other=0.0)", "mask=real, other=0.0)",
        "interpreter", _TEST + "test_pruned_values_take_part_in_nothing",
    ),
    (
        "dead columns of a live union get a gradient", _KERNELS,
        "total.to(out.dtype.element_ty), mask=kept)",
        "total.to(out.dtype.element_ty), mask=real)",
        "interpreter", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "voxels beyond the output count for the weight gradient", _KERNELS,
        "a = tl.load(x_own + (x_base[None, :] + at[:, None]), mask=inside[None, :], other=0.0)",
        "a = tl.load(x_own + (x_base[None, :] + at[:, None]))",
        "interpreter", _TEST + "test_infinities_outside_the_output_reach_no_weight",
    ),
    (
        "sums in the type of the input", _KERNELS,
        "total = tl.zeros((VOXELS, BN), tl.float32)",
        "total = tl.zeros((VOXELS, BN), x.dtype.element_ty)",
        "ttsem", _TEST + "test_half_types_add_up_in_float32[runs-dtype1]",
    ),
    (
        "live voxels taken for dead ones", _KERNELS,
        "count = count * tl.load(live + part)", "count = count * (1 - tl.load(live + part))",
        "interpreter", _TEST + "test_voxel_mask_skips_tiles_and_nothing_else[some-plain-columns]",
    ),
    (
        "taps not flipped for the input gradient", _PLAN,
        "reads = [first + padding - tap * dilation for tap in range(kernel)]",
        "reads = [first + padding + (tap - kernel + 1) * dilation for tap in range(kernel)]",
        "interpreter", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "lists shifted by one when they are made", _LISTS,
        "listed.cumsum(dim=1) - 1, length)", "listed.cumsum(dim=1), length)",
        "interpreter",
        "tests/kernels/test_gpu_plan.py::test_lists_hold_the_live_columns_in_order",
    ),
    (
        "the last step of a list left out", _PLAN,
        "return -(-lists.counts // tile.entries)", "return lists.counts // tile.entries",
        "interpreter", _TEST + "test_output_and_gradients[plain-half-1-1]",
    ),
    (
        "voxels that only reach a live one taken for dead", "kernels/masked_conv3d/launches.py",
        "live_tiles(voxel_mask, launch.strips, *launch.reach)",
        "live_tiles(voxel_mask, launch.strips, (0, 0, 0), (0, 0, 0))",
        "interpreter", _TEST + "test_voxel_mask_skips_tiles_and_nothing_else[one-plain-columns]",
    ),
]  # fmt: skip
