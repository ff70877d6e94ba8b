"""Lists of live columns for the Triton kernels, built on the mask's own device.

A column is one (input channel, tap) pair of a convolution whose filter rows are cut into output
tiles of `rows_per_tile`. It is live in a tile if any of the tile's rows keeps a weight there. Where
`width` is above 1, columns are live in runs of that many neighbouring channels together, so that a
run is loaded with one wide access.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Filters:
    """Weights as rows of columns, for the forward pass or for one class of the input gradient."""

    kept: Tensor
    """(groups, rows, channels, taps), bool."""
    row_step: int
    """Elements of the weight from one row to the next."""
    channel_step: int
    """From one channel of a row to the next."""
    tap_steps: Tensor
    """(taps,), int32: from a row's first element to that of a tap."""
    group_step: int
    """From what the rows' own place says to a group's first element."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the numbers that columns name stand in a padded buffer, from a voxel's own place."""

    channel_step: int
    """Elements from one channel to the next."""
    group_step: int
    tap_offsets: Tensor
    """(taps,), int32."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The live columns of every output tile; each list is filled up to whole steps."""

    offsets: Tensor
    """(tiles, length), int32: where a column stands in the source; 0 in what fills up."""
    sources: Tensor
    """(tiles, length), int32: the weight, from the row's first element on; -1 for none."""
    steps: Tensor
    """(tiles,), int32: steps of each list."""
    counts: Tensor
    """(tiles,), int32: columns of each list before it was filled up."""
    tiles_per_group: int
    length: int
    """Entries from one list to the next, a multiple of those of a step."""


def live_runs(kept: Tensor, rows_per_tile: int, width: int) -> Tensor:
    """Which runs of channels are live in which tiles.

    Parameters
    ----------
    kept : Tensor, (groups, rows, channels, taps), bool
    rows_per_tile, width : int
        The last tile and the last run may be ragged.

    Returns
    -------
    Tensor, (groups, tiles, runs, taps), bool
    """
    groups, rows, channels, taps = kept.shape
    tiles = -(-rows // rows_per_tile)
    runs = -(-channels // width)
    short_rows, short_channels = tiles * rows_per_tile - rows, runs * width - channels
    if short_rows or short_channels:
        kept = torch.nn.functional.pad(kept, (0, 0, 0, short_channels, 0, short_rows))
    return kept.view(groups, tiles, rows_per_tile, runs, width, taps).amax(dim=(2, 4))


def build(
    filters: Filters, source: Source, rows_per_tile: int, width: int, entries_per_step: int
) -> Lists:
    """Build the lists with a fixed number of launches and no look at the mask from the host.

    Parameters
    ----------
    filters, source
        The convolution.
    rows_per_tile : int
        Rows of an output tile.
    width : int
        Channels of a run; 1 for single columns.
    entries_per_step : int
        Columns that the kernels take at a time; lists are filled up to a multiple.

    Returns
    -------
    Lists
        With room for every column in every list: how long they are is known on the device only.
    """
    kept = filters.kept
    groups, _, channels, taps = kept.shape
    device = kept.device
    live = live_runs(kept, rows_per_tile, width)
    tiles, runs = live.shape[1:3]
    columns = runs * taps * width
    # Taps of a run next to each other: they read the same lines of the source.
    listed = live.view(groups * tiles, runs * taps, 1).expand(-1, -1, width)
    listed = listed.reshape(groups * tiles, columns)
    length = max(1, -(-columns // entries_per_step)) * entries_per_step

    channel = torch.arange(runs * width, device=device, dtype=torch.int32).view(runs, 1, width)
    tap_steps = filters.tap_steps.view(1, taps, 1)
    at = channel * source.channel_step + source.tap_offsets.view(1, taps, 1)
    of = torch.where(channel < channels, channel * filters.channel_step + tap_steps, -1)
    group = torch.arange(groups, device=device, dtype=torch.int32)
    group = group.repeat_interleave(tiles).view(-1, 1)
    at = at.reshape(1, columns) + group * source.group_step
    of = of.reshape(1, columns)
    of = torch.where(of >= 0, of + group * filters.group_step, -1)

    counts = listed.sum(dim=1, dtype=torch.int32)
    # What is not live goes to a place behind the lists.
    place = torch.where(listed, listed.cumsum(dim=1) - 1, length)
    offsets = torch.zeros((groups * tiles, length + 1), dtype=torch.int32, device=device)
    sources = torch.full_like(offsets, -1)
    offsets.scatter_(1, place, at)
    sources.scatter_(1, place, of)
    return Lists(
        offsets[:, :length].contiguous(),
        sources[:, :length].contiguous(),
        -(-counts // entries_per_step),
        counts,
        tiles,
        length,
    )
