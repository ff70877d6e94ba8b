"""Intensity normalisation of a volume that is on the model's grid, with explicit names."""

import numpy as np

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.grid import Grid
from sparsekit.fed.cohort.tables import Fault

METHODS = ("brain-zscore", "volume-zscore", "percentile")
PREPROCESSING_VERSION = 1
"""Raised whenever the same file and options would give other voxels."""

_SMALLEST_BRAIN = 0.005  # of the grid; below it there is no brain to take statistics from
_CLIP_PERCENT = (1.0, 99.0)


def normalise(volume: np.ndarray, method: str) -> np.ndarray | Fault:
    """Normalise the intensities of one volume.

    Parameters
    ----------
    volume : ndarray, (d, h, w), float32
        Finite, on the model's grid.
    method : str
        ``"brain-zscore"``: mean 0 and standard deviation 1 over the brain, background 0.
        ``"volume-zscore"``: the same over all voxels, background included, as in the
        FedSparsify experiments. ``"percentile"``: clipped to the 1st and 99th percentile of the
        brain and scaled to 0..1, background 0. The brain is every voxel above 0, which holds
        for skull-stripped volumes.

    Returns
    -------
    ndarray, (d, h, w), float32, or Fault
        Fault kinds ``no-brain`` (fewer than 0.5 % of the voxels are above 0) and ``constant``.

    Raises
    ------
    ArgumentError
        `method` is none of the three.
    """
    check_method(method)
    brain = volume > 0
    share = np.count_nonzero(brain) / volume.size
    if share < _SMALLEST_BRAIN:
        detail = f"only {share:.2%} of the voxels on the model's grid are above 0"
        return Fault("no-brain", detail, "check its registration and intensity scaling")
    inside = volume if method == "volume-zscore" else volume[brain]
    if inside.max() == inside.min():
        return Fault("constant", "all brain voxels are equal: a mask?", "give the T1-weighted scan")
    if method == "percentile":
        low, high = np.percentile(inside, _CLIP_PERCENT)
        if high <= low:
            detail = "98 % of the brain voxels are equal: a mask?"
            return Fault("constant", detail, "give the T1-weighted scan")
        scaled = (np.clip(volume, low, high) - low) / (high - low)
    else:
        scaled = (volume - inside.mean(dtype=np.float64)) / inside.std(dtype=np.float64)
    if method != "volume-zscore":
        scaled = np.where(brain, scaled, 0)
    return np.ascontiguousarray(scaled, np.float32)


def check_method(method: str) -> None:
    """Raise ArgumentError unless `method` is one of `METHODS`."""
    if method not in METHODS:
        raise ArgumentError(f"normalisation: expected one of {', '.join(METHODS)}; got {method!r}")


def preprocessing_id(grid: Grid, method: str, dtype: np.dtype) -> str:
    """Name everything that decides the voxels of a cached scan, besides its file.

    A model records this name; scans prepared under another one must not be fed to it.

    Examples
    --------
    >>> preprocessing_id(Grid.of((91, 109, 91), 2), "brain-zscore", np.dtype("float16"))
    'v1/91x109x91@2x2x2mm/RAS/linear/brain-zscore/float16'
    """
    return f"v{PREPROCESSING_VERSION}/{grid}/RAS/linear/{method}/{dtype.name}"
