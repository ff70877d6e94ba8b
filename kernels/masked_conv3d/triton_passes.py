"""Masked 3D convolution in Triton: one product over lists of columns, and its weight gradient.

A column is one input channel at one tap. A program owns a stretch of voxels and the channels of an
output tile; the list of that tile holds, for each column that any of its channels keeps, where the
column's number stands relative to a voxel's own place. `columns` makes the lists, `launches` the
buffers: the input comes padded, so that no load in a loop needs a bound.
"""

import triton
import triton.language as tl


@triton.jit
def pack_weights(
    weight, mask, sources, packed,
    rows, row_step, tiles_per_group, length,
    BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gather the kept weights of each output tile, in the order of its list; the rest becomes 0.

    packed[tile, row, entry] = weight[row's first + sources[tile, entry]] where the mask keeps it.
    """
    blocks = tl.cdiv(length, BLOCK)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    within = k < length
    source = tl.load(sources + tile.to(tl.int64) * length + k, mask=within, other=-1)
    row = tile % tiles_per_group * BN + tl.arange(0, BN)
    first = (tile // tiles_per_group * rows + row).to(tl.int64) * row_step
    at = first[:, None] + source[None, :]
    real = (row < rows)[:, None] & (source >= 0)[None, :]
    kept = tl.load(mask + at, mask=real, other=0) != 0
    value = tl.load(weight + at, mask=real & kept, other=0.0)
    to = (tile.to(tl.int64) * BN + tl.arange(0, BN))[:, None] * length + k[None, :]
    tl.store(packed + to, value, mask=within[None, :])


@triton.jit
def gather_product(
    x, packed, offsets, steps, bias, live, y, x_places, y_places,
    numbers, per_sample, x_n, y_n, y_c, tiles, rows, tiles_per_group, length,
    VOXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply the columns of each output tile's list with its packed weights.

    The forward pass over the input, and the input gradient over the output's gradient.
    """
    # Output tiles of the same voxels run next to each other: they read the same input.
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    m = tl.arange(0, VOXELS)
    real = part * VOXELS + m < numbers
    # Places are counted from the tile's first sample on, so that they fit into 32 bits.
    first = part * VOXELS // per_sample
    own = part * VOXELS % per_sample + m
    base = tl.load(x_places + own, mask=real, other=0)
    if CONTIGUOUS > 1:
        base = tl.multiple_of(base, CONTIGUOUS)
    x_first = x + first.to(tl.int64) * x_n
    k = tl.arange(0, BK)
    column = tl.arange(0, BN)
    own_offsets = offsets + tile.to(tl.int64) * length
    own_weights = packed + tile.to(tl.int64) * BN * length
    count = tl.load(steps + tile)
    if HAS_LIVE:
        # Without a voxel of the mask there is nothing to add up; the zeros are stored below.
        count = count * tl.load(live + part)
    total = tl.zeros((VOXELS, BN), tl.float32)
    for step in range(count):
        at = tl.load(own_offsets + step * BK + k)
        if CONTIGUOUS > 1:
            at = tl.max_contiguous(tl.multiple_of(at, CONTIGUOUS), CONTIGUOUS)
        a = tl.load(x_first + (base[:, None] + at[None, :]))
        b = tl.load(own_weights + (column[None, :] * length + (step * BK + k)[:, None]))
        total = tl.dot(a, b, total, input_precision=PRECISION)
    row = tile % tiles_per_group * BN + column
    channel = tile // tiles_per_group * rows + row
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    # -1 for what has a number and is beyond the grid.
    place = tl.load(y_places + own, mask=real, other=-1)
    inside = (place >= 0)[:, None] & (row < rows)[None, :]
    to = place[:, None] + (channel * y_c)[None, :]
    tl.store(y + first.to(tl.int64) * y_n + to, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient(
    x, gradient, offsets, steps, listed, part_count, partial, x_places, g_places,
    numbers, per_sample, x_n, g_n, g_c,
    tiles, most_steps, tiles_per_group, group_step, length, parts_per_split,
    VOXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CONTIGUOUS: tl.constexpr, G_CONTIGUOUS: tl.constexpr,
    HAS_LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the voxels of one split, for one step of one output tile's list.

    partial[split, tile, entry, channel]. Nothing is added across splits here, so that the order of
    all sums is fixed.
    """
    step = tl.program_id(0) % most_steps
    tile = tl.program_id(0) // most_steps % tiles
    split = tl.program_id(0) // (most_steps * tiles)
    if step < tl.load(steps + tile):
        k = tl.arange(0, BK)
        at = tl.load(offsets + tile.to(tl.int64) * length + step * BK + k)
        if CONTIGUOUS > 1:
            at = tl.max_contiguous(tl.multiple_of(at, CONTIGUOUS), CONTIGUOUS)
        m = tl.arange(0, VOXELS)
        column = tl.arange(0, BN)
        first = tile // tiles_per_group * group_step + tile % tiles_per_group * BN
        g_at = (first + column) * g_c
        if G_CONTIGUOUS > 1:
            g_at = tl.max_contiguous(tl.multiple_of(g_at, G_CONTIGUOUS), G_CONTIGUOUS)
        end = tl.minimum((split + 1) * parts_per_split, tl.load(part_count))
        total = tl.zeros((BK, BN), tl.float32)
        for i in range(split * parts_per_split, end):
            part = i
            if HAS_LISTED:
                part = tl.load(listed + i)
            own = part * VOXELS % per_sample + m
            real = part * VOXELS + m < numbers
            x_base = tl.load(x_places + own, mask=real, other=0)
            g_base = tl.load(g_places + own, mask=real, other=-1)
            # Beyond the output, at -1, stand numbers of the input that are no part of these sums.
            # (With >= 0, newer compilers would make a maximum of it, and forget what divides it.)
            inside = g_base != -1
            g_base = tl.where(inside, g_base, 0)
            if CONTIGUOUS > 1:
                x_base = tl.multiple_of(x_base, CONTIGUOUS)
            if G_CONTIGUOUS > 1:
                g_base = tl.multiple_of(g_base, G_CONTIGUOUS)
            first_sample = (part * VOXELS // per_sample).to(tl.int64)
            x_own = x + first_sample * x_n
            g_own = gradient + first_sample * g_n
            # Loaded as it is multiplied: a transposed tile would not take the asynchronous path.
            a = tl.load(x_own + (x_base[None, :] + at[:, None]), mask=inside[None, :], other=0.0)
            b = tl.load(g_own + (g_base[:, None] + g_at[None, :]), mask=inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        entry = (split.to(tl.int64) * tiles + tile) * length + step * BK + k
        tl.store(partial + (entry[:, None] * BN + column[None, :]), total)


@triton.jit
def sum_splits(
    partial, mask, sources, steps, out,
    splits, tiles, rows, row_step, tiles_per_group, length,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add up the splits in order and put the sums at the kept weights; elsewhere `out` stays."""
    blocks = length // BK
    tile = tl.program_id(0) // blocks
    step = tl.program_id(0) % blocks
    if step < tl.load(steps + tile):
        k = step * BK + tl.arange(0, BK)
        column = tl.arange(0, BN)
        own = partial + (tile.to(tl.int64) * length + k)[:, None] * BN + column[None, :]
        total = tl.zeros((BK, BN), tl.float32)
        for _ in range(splits):
            total += tl.load(own)
            own += tiles * length * BN
        source = tl.load(sources + tile.to(tl.int64) * length + k)
        row = tile % tiles_per_group * BN + column
        first = (tile // tiles_per_group * rows + row).to(tl.int64) * row_step
        at = first[None, :] + source[:, None]
        real = (row < rows)[None, :] & (source >= 0)[:, None]
        kept = tl.load(mask + at, mask=real, other=0) != 0
        tl.store(out + at, total.to(out.dtype.element_ty), mask=kept)
