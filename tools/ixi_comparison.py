"""Fit measured synthetic heads as the 518 people of IXI were fitted, and set both side by side."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.make import volumes
from sparsekit.fed.cohort.make.volumes import STRUCTURES

Doubles = NDArray[np.float64]

TERMS = ("at 60", "per decade", "per decade squared", "male", "hh", "iop")
SEEN = ("ventricles", "fluid", "grey matter", "white matter")
REPEATS, LEVEL = 1000, 95


def design(who: Doubles) -> Doubles:
    """The columns of the fit to IXI: 1, a, a^2, male, HH, IOP with a = (age - 60) / 10."""
    age, male, site = who.T
    decades = (age - 60) / 10
    columns = [np.ones_like(age), decades, decades**2, male, site == 1, site == 2]
    return np.stack(columns, axis=1).astype(np.float64)


def fit(x: Doubles, y: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Coefficients (6, k), residual SDs (k,) and residual correlations (k, k)."""
    coefficients: Doubles = np.linalg.lstsq(x, y, rcond=None)[0].astype(np.float64)
    left = y - x @ coefficients
    covariance = left.T @ left / (len(x) - x.shape[1])
    spread: Doubles = np.sqrt(np.diag(covariance)).astype(np.float64)
    correlations: Doubles = (covariance / np.outer(spread, spread)).astype(np.float64)
    return coefficients, spread, correlations


def interval(values: Doubles) -> list[float]:
    """Percentile interval of the first axis, for one number."""
    low, high = np.percentile(values, ((100 - LEVEL) / 2, (100 + LEVEL) / 2))
    return [round(float(low), 4), round(float(high), 4)]


def compare(people: dict[str, Doubles]) -> dict[str, Any]:
    """Fit the measured volumes of one resolution as IXI's were and set both side by side."""
    x = design(people["who"])
    rendered = people["rendered"]
    coefficients, spread, correlations = fit(x, rendered)
    drawn = fit(x, people["asked"])
    rng = np.random.default_rng(1)
    picks = (rng.integers(0, len(x), len(x)) for _ in range(REPEATS))
    again = [fit(x[pick], rendered[pick]) for pick in picks]
    wanted = volumes.fitted_terms()
    structures = {}
    for k, name in enumerate(STRUCTURES):
        terms = {
            term: {
                "ixi": round(float(wanted.coefficients[k, row]), 4),
                "drawn": round(float(drawn[0][row, k]), 4),
                "rendered": round(float(coefficients[row, k]), 4),
                "interval": interval(np.array([repeat[0][row, k] for repeat in again])),
            }
            for row, term in enumerate(TERMS)
            if row > 0
        }
        structures[name] = {
            "terms": terms,
            "residual_sd": {
                "ixi": round(float(wanted.residual_sd[k]), 4),
                "drawn": round(float(drawn[1][k]), 4),
                "rendered": round(float(spread[k]), 4),
                "interval": interval(np.array([repeat[1][k] for repeat in again])),
            },
            "asked_r": round(float(np.corrcoef(people["asked"][:, k], rendered[:, k])[0, 1]), 4),
        }
    difference = np.abs(correlations - wanted.correlations)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    return {
        "people": len(x),
        "structures": structures,
        "correlations": [[round(float(value), 3) for value in row] for row in correlations],
        "worst_correlation": {
            "pair": [STRUCTURES[worst[0]], STRUCTURES[worst[1]]],
            "ixi": round(float(wanted.correlations[worst]), 3),
            "rendered": round(float(correlations[worst]), 3),
        },
        "worst_correlation_off_drawn": round(float(np.abs(correlations - drawn[2]).max()), 3),
        "head_size_error_sd": round(
            float(np.std(people["sizes"][:, 1] - people["sizes"][:, 0])), 5
        ),
        "seen": image_alone(people),
        "yearly": yearly(people),
    }


def image_alone(people: dict[str, Doubles]) -> dict[str, Any]:
    """How far volumes counted in the scan alone follow those rendered, and age."""
    x = design(people["who"])
    ml = np.log(people["seen"])
    brain = people["sizes"][:, 1]
    shares = np.exp(people["rendered"])
    column = {name: k for k, name in enumerate(STRUCTURES)}
    rendered = np.stack(
        [
            people["rendered"][:, column["lateral_ventricles"]],
            np.log(1 - shares[:, [column[n] for n in ("cortex_gm", "cerebral_wm")]].sum(axis=1)),
            np.log(shares[:, [column[n] for n in ("cortex_gm", "cerebellar_gm")]].sum(axis=1)),
            people["rendered"][:, column["cerebral_wm"]],
        ],
        axis=1,
    )
    counted = ml - brain[:, None]
    a, b = fit(x, rendered)[0], fit(x, counted)[0]
    sites = x[:, [0, 4, 5]]
    within = [values - sites @ fit(sites, values)[0] for values in (rendered, counted)]
    return {
        name: {
            "r_within_site": round(float(np.corrcoef(within[0][:, k], within[1][:, k])[0, 1]), 3),
            "rendered_per_decade": round(float(a[1, k]), 4),
            "counted_per_decade": round(float(b[1, k]), 4),
            "counted_sites": [round(float(b[row, k]), 3) for row in (4, 5)],
        }
        for k, name in enumerate(SEEN)
    }


def yearly(people: dict[str, Doubles]) -> dict[str, float]:
    """Change a year at 70 of some rendered volumes, in % (ventricles also in ml)."""
    coefficients = fit(design(people["who"]), people["rendered"])[0]
    slope = (coefficients[1] + 2 * coefficients[2]) / 10
    column = {name: k for k, name in enumerate(STRUCTURES)}
    k = column["lateral_ventricles"]
    expected = volumes.expected_log_fractions(70.0, male=0.5)[k] + volumes.REFERENCE_LOG_ICV
    ml = float(np.exp(expected) / 1000)
    percent = {name: round(100 * float(slope[column[name]]), 2) for name in STRUCTURES}
    return {**percent, "lateral_ventricles_ml": round(ml * float(slope[k]), 2)}
