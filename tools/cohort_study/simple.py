"""Regressors that no network is needed for, with settings chosen by cross-validation."""

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

Doubles = npt.NDArray[np.float64]

PENALTIES = 10.0 ** np.arange(-4.0, 3.1, 0.25)
"""Of ridge regressions, in units of the mean eigenvalue of the Gram matrix."""

_FOLDS = 5
_MOST_TREES = 80  # over the learning rate
_TREES: tuple[dict[str, float], ...] = tuple(
    {
        "learning_rate": rate,
        "max_leaf_nodes": leaves,
        "min_samples_leaf": 20,
        "l2_regularization": l2,
    }
    for rate in (0.05,)
    for leaves in (4, 8, 16)
    for l2 in (0.0, 10.0)
)


def one_hot(labels: npt.NDArray[np.int64]) -> Doubles:
    """Columns of 0 and 1, one for each label that occurs but the smallest; (n, kinds - 1)."""
    return np.asarray(labels[:, None] == np.unique(labels)[1:], np.float64)


def polynomial_terms(x: Doubles) -> Doubles:
    """All products of at most two columns, the constant left out; (n, p) to (n, p (p + 3) / 2)."""
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], axis=1)


def standardised(x: Doubles, x_test: Doubles) -> tuple[Doubles, Doubles]:
    """Both by the mean and spread of the first; columns that do not vary become 0."""
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 1e-9 * np.maximum(np.abs(centre), 1e-300), spread, np.inf)
    return (x - centre) / spread, (x_test - centre) / spread


def quadratic_fit(
    x: Doubles, groups: Doubles, y: Doubles, x_test: Doubles, groups_test: Doubles
) -> tuple[Doubles, str]:
    """Ridge on all terms of the second degree, and on each group's own intercept and slopes.

    Parameters
    ----------
    x, x_test : ndarray, (n, p) and (m, p), float64
        Features.
    groups, groups_test : ndarray, (n, g) and (m, g), float64
        Columns of 0 and 1, such as a site's; g may be 0.
    y : ndarray, (n,), float64
        Ages in years.

    Returns
    -------
    tuple of ndarray, (m,), float64 and str
        Predicted ages, and the penalty that was chosen.
    """
    z, z_test = standardised(x, x_test)

    def terms(z: Doubles, groups: Doubles) -> Doubles:
        slopes = (z[:, :, None] * groups[:, None, :]).reshape(len(z), -1)
        return np.concatenate([polynomial_terms(z), groups, slopes], axis=1)

    return ridge(terms(z, groups), y, terms(z_test, groups_test))


def ridge(
    x: npt.NDArray[np.floating], y: Doubles, x_test: npt.NDArray[np.floating]
) -> tuple[Doubles, str]:
    """Ridge regression whose penalty has the least leave-one-out error, which is computed exactly.

    Parameters
    ----------
    x, x_test : ndarray, (n, p) and (m, p)
        Standardised here. Columns that hardly vary are not blown up.
    y : ndarray, (n,), float64

    Returns
    -------
    tuple of ndarray, (m,), float64 and str
        Predictions, and the penalty that was chosen.
    """
    centre, spread = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    used = spread > 1e-9
    floor = 0.5 * float(np.median(spread[used]))
    scale = np.maximum(spread[used], floor)
    kind = np.float64 if x.shape[1] < 1000 else np.float32
    z = ((x[:, used] - centre[used]) / scale).astype(kind)
    z_test = ((x_test[:, used] - centre[used]) / scale).astype(kind)
    mean = float(y.mean())
    if z.shape[1] < len(z):
        values, turn = np.linalg.eigh((z.T @ z).astype(np.float64))
        values = np.maximum(values, 0)
        rotated, rotated_test = z @ turn, z_test @ turn
        projected = rotated.T @ (y - mean)
        unit = values.sum() / len(y)

        def fit(penalty: float) -> tuple[Doubles, Doubles, Doubles]:
            shrunk = 1 / (values + penalty * unit)
            leverage = (rotated**2 * shrunk).sum(axis=1) + 1 / len(y)
            return rotated @ (shrunk * projected), leverage, rotated_test @ (shrunk * projected)
    else:
        values, turn = np.linalg.eigh((z @ z.T).astype(np.float64))
        values = np.maximum(values, 0)
        projected = turn.T @ (y - mean)
        cross = (z_test @ z.T).astype(np.float64) @ turn
        unit = values.sum() / len(y)

        def fit(penalty: float) -> tuple[Doubles, Doubles, Doubles]:
            kept = values / (values + penalty * unit)
            leverage = (turn**2 * kept).sum(axis=1) + 1 / len(y)
            shrunk = projected / (values + penalty * unit)
            return turn @ (kept * projected), leverage, cross @ shrunk

    def left_out(penalty: float) -> float:
        fitted, leverage, _ = fit(penalty)
        return float(np.abs((y - mean - fitted) / (1 - np.minimum(leverage, 0.999))).mean())

    errors = [left_out(float(penalty)) for penalty in PENALTIES]
    best = float(PENALTIES[int(np.argmin(errors))])
    return mean + fit(best)[2], f"penalty {best:.3g}"


def boosted_trees(x: Doubles, y: Doubles, x_test: Doubles) -> tuple[Doubles, str]:
    """Gradient-boosted trees; rate, leaves and penalty with the least error in 5 folds.

    Parameters
    ----------
    x, x_test : ndarray, (n, p) and (m, p), float64
    y : ndarray, (n,), float64

    Returns
    -------
    tuple of ndarray, (m,), float64 and str
        Predictions, and what was chosen.
    """
    # A study's processes have a core each: threads that wait for one another would share it.
    with threadpool_limits(1):
        best = min((_tried(settings, x, y) for settings in _TREES), key=lambda one: one[0])
        _, settings, rounds = best
        predicted = _trees(settings, rounds).fit(x, y).predict(x_test)
    chosen = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    return np.asarray(predicted), f"{rounds} trees, {chosen}"


def _tried(
    settings: dict[str, float], x: Doubles, y: Doubles
) -> tuple[float, dict[str, float], int]:
    """Return the least error of some settings in the folds, themselves, and the number of trees."""
    folds = np.random.default_rng(0).permutation(len(y)) % _FOLDS
    rounds = int(_MOST_TREES / settings["learning_rate"])
    steps = np.unique(np.linspace(rounds / 12, rounds, 12).astype(int))
    errors = np.zeros(len(steps))
    for fold in range(_FOLDS):
        held = folds == fold
        trees = _trees(settings, rounds).fit(x[~held], y[~held])
        for done, guess in enumerate(trees.staged_predict(x[held]), start=1):
            errors[steps == done] += np.abs(guess - y[held]).sum() / len(y)
    best = int(np.argmin(errors))
    return float(errors[best]), settings, int(steps[best])


def _trees(settings: dict[str, float], rounds: int) -> HistGradientBoostingRegressor:
    return HistGradientBoostingRegressor(
        max_iter=rounds, early_stopping=False, random_state=0, **settings
    )
