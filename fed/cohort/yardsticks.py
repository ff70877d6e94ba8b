"""Simple age predictors that a network must beat, fitted to the same scans as the network.

They pool the training scans of all sites in one place, which a federation must not do: as
yardsticks they are allowed what the network is denied.

- "mean predictor": everybody has the mean age of the training people.
- "ventricle count": volume of dark voxels in a box around the lateral ventricles; ages are
  fitted with its first and second power.
- "ridge on 8 mm voxels": the volume averaged over blocks of 8 mm, standardised over the training
  scans, ridge regression with the penalty chosen by 5-fold cross-validation on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.grid import Grid

BLOCK_MM = 8.0
VENTRICLE_BOX_MM = ((-32.0, 32.0), (-48.0, 34.0), (-4.0, 32.0))
"""Left-right, posterior-anterior, inferior-superior limits in MNI coordinates; all of it lies
inside the brain, so that dark voxels in it are cerebrospinal fluid."""

_GRID_WIDTH_MM = 182.0
_FLUID_PERCENT = 1.0  # of the box: fluid in everybody, whose ventricles fill 5 % of it and more
_N_FOLDS = 5
_PENALTIES = 10.0 ** np.arange(-4, 3.1, 0.25)  # times the mean eigenvalue of the Gram matrix

Floats = npt.NDArray[np.float64]


class Scans(Protocol):
    """Some prepared scans of one site."""

    def __len__(self) -> int:
        """Return the number of scans."""
        ...

    @property
    def ages(self) -> npt.NDArray[np.float32]:
        """Years, (n,)."""
        ...

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """Return scan `index`, (d, h, w)."""
        ...


@dataclass(frozen=True)
class Yardstick:
    """How well one simple predictor does.

    Attributes
    ----------
    mae : float
        Mean absolute error over the test scans, in years.
    errors : ndarray, (n_test,), float64
        Absolute error of each test scan, in the order of the test views and their rows.
    detail : str
        What was fitted, for a table's footnote.
    """

    mae: float
    errors: Floats
    detail: str


def yardsticks(
    train: Sequence[Scans], test: Sequence[Scans], *, voxel_mm: float | None = None
) -> dict[str, Yardstick]:
    """Fit the simple predictors to the training scans and measure them on the test scans.

    Parameters
    ----------
    train, test : sequence of Scans
        One view per site, prepared alike. All sites are pooled.
    voxel_mm : float, optional
        Voxel size; by default the one at which the grid is about 182 mm wide, as the MNI grids
        are (91 voxels of 2 mm, 46 of 4 mm).

    Returns
    -------
    dict of str to Yardstick
        "mean predictor", "ventricle count", "ridge on 8 mm voxels". Predictions are kept within
        the range of the training ages.

    Raises
    ------
    ArgumentError
        There are no training scans or no test scans.

    Notes
    -----
    The volumes are read once, one at a time; memory is that of the 8 mm averages.
    """
    y = _ages(train)
    truth = _ages(test)
    if not len(y) or not len(truth):
        raise ArgumentError(
            f"train, test: expected at least one scan in each, got {len(y)} and {len(truth)}"
        )
    fluid, blocks = _features(train, voxel_mm)
    test_fluid, test_blocks = _features(test, voxel_mm)
    folds = np.concatenate([_fold_numbers(len(view)) for view in train])
    ridge, penalty = _ridge(blocks, y, test_blocks, folds)
    predictions = {
        "mean predictor": (np.full(len(truth), y.mean()), f"{y.mean():.2f} years for everybody"),
        "ventricle count": (_parabola(fluid, y, test_fluid), "linear and square term"),
        "ridge on 8 mm voxels": (ridge, penalty),
    }
    measured: dict[str, Yardstick] = {}
    for name, (predicted, detail) in predictions.items():
        errors = np.abs(np.clip(predicted, y.min(), y.max()) - truth)
        measured[name] = Yardstick(float(errors.mean()), errors, detail)
    return measured


def ventricle_volume(volume: npt.NDArray[Any], voxel_mm: float) -> float:
    """Return the volume of dark voxels in the box around the lateral ventricles.

    Dark is below the middle between fluid (the 1st percentile of the box) and tissue (its
    median), so that the scan's own contrast decides and no intensity scale matters.

    Parameters
    ----------
    volume : ndarray, (d, h, w)
        On the model's grid, under any increasing linear normalisation.
    voxel_mm : float

    Returns
    -------
    float
        Millilitres.
    """
    grid = Grid.of(volume.shape, voxel_mm)
    first = grid.affine[:3, 3]
    cuts = []
    for (low, high), start, n in zip(VENTRICLE_BOX_MM, first, volume.shape, strict=True):
        begin = int(np.clip(np.ceil((low - start) / voxel_mm), 0, n - 1))
        cuts.append(slice(begin, max(begin + 1, int(np.floor((high - start) / voxel_mm)) + 1)))
    box = np.asarray(volume[tuple(cuts)], np.float64)
    fluid, tissue = np.percentile(box, (_FLUID_PERCENT, 50))
    return float(np.count_nonzero(box < (fluid + tissue) / 2) * voxel_mm**3 / 1000)


def block_means(volume: npt.NDArray[Any], factor: int) -> npt.NDArray[np.float32]:
    """Average a volume over blocks of ``factor``³ voxels; the rim is repeated to fill the last.

    Parameters
    ----------
    volume : ndarray, (d, h, w)
    factor : int

    Returns
    -------
    ndarray, (ceil(d/factor), ceil(h/factor), ceil(w/factor)), float32
    """
    padded = np.pad(
        np.asarray(volume, np.float32), [(0, -n % factor) for n in volume.shape], mode="edge"
    )
    d, h, w = (n // factor for n in padded.shape)
    blocks = padded.reshape(d, factor, h, factor, w, factor)
    return np.asarray(blocks.mean(axis=(1, 3, 5)), np.float32)


def _ages(views: Sequence[Scans]) -> Floats:
    return np.concatenate([np.empty(0), *(view.ages.astype(np.float64) for view in views)])


def _features(
    views: Sequence[Scans], voxel_mm: float | None
) -> tuple[Floats, npt.NDArray[np.float32]]:
    fluid: list[float] = []
    blocks: list[npt.NDArray[np.float32]] = []
    for view in views:
        for row in range(len(view)):
            volume = view.volume(row)
            size = voxel_mm or max(1.0, float(round(_GRID_WIDTH_MM / volume.shape[0])))
            fluid.append(ventricle_volume(volume, size))
            blocks.append(block_means(volume, max(1, round(BLOCK_MM / size))).ravel())
    return np.array(fluid), np.stack(blocks)


def _parabola(x: Floats, y: Floats, x_test: Floats) -> Floats:
    centre, scale = x.mean(), x.std() or 1.0

    def terms(values: Floats) -> Floats:
        z = (values - centre) / scale
        return np.stack([np.ones_like(z), z, z**2], axis=1)

    # The smallest-norm solution also serves where all values or fewer than three are equal.
    coefficients = np.linalg.lstsq(terms(x), y, rcond=None)[0]
    return np.asarray(terms(x_test) @ coefficients)


def _fold_numbers(n: int) -> npt.NDArray[np.int64]:
    """Cut a site's scans into runs, so that a person's scans, side by side, stay together."""
    return np.arange(n) * _N_FOLDS // max(n, 1)


def _ridge(
    x: npt.NDArray[np.float32],
    y: Floats,
    x_test: npt.NDArray[np.float32],
    folds: npt.NDArray[np.int64],
) -> tuple[Floats, str]:
    """Ridge regression through the n x n Gram matrix: there are far more voxels than people."""
    spread = x.std(axis=0, dtype=np.float64)
    used = spread > 1e-6
    if not used.any() or len(y) < 2:
        return np.full(len(x_test), y.mean()), "no voxel varies: the mean age"
    centre = x[:, used].mean(axis=0, dtype=np.float64)
    # Voxels that hardly vary lie at the rim of the brain; dividing by their tiny spread would
    # make them the loudest.
    scale = np.maximum(spread[used], 0.5 * np.median(spread[used]))
    z = ((x[:, used] - centre) / scale).astype(np.float32)
    z_test = ((x_test[:, used] - centre) / scale).astype(np.float32)
    gram = (z @ z.T).astype(np.float64)
    mean_eigenvalue = float(np.trace(gram)) / len(y)
    errors = np.zeros(len(_PENALTIES))
    for fold in np.unique(folds):
        held = folds == fold
        if held.all() or not held.any():
            continue
        guesses = _solve(
            gram[np.ix_(~held, ~held)], gram[np.ix_(held, ~held)], y[~held], mean_eigenvalue
        )
        errors += np.abs(guesses - y[held]).sum(axis=1)
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))  # of equals, the strongest
    guesses = _solve(gram, (z_test @ z.T).astype(np.float64), y, mean_eigenvalue)
    return guesses[best], f"penalty {_PENALTIES[best]:.3g} of the mean eigenvalue"


def _solve(gram: Floats, cross: Floats, y: Floats, unit: float) -> Floats:
    """Return predictions, (penalties, m); penalties count in `unit`, the intercept has none."""
    column_mean = gram.mean(axis=0)
    centred = gram - column_mean - column_mean[:, None] + column_mean.mean()
    cross = cross - cross.mean(axis=1, keepdims=True) - column_mean + column_mean.mean()
    values, vectors = np.linalg.eigh(centred)
    projected = vectors.T @ (y - y.mean())
    turned = cross @ vectors
    return np.stack(
        [
            y.mean() + turned @ (projected / (np.maximum(values, 0) + penalty * unit))
            for penalty in _PENALTIES
        ]
    )
