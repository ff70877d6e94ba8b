"""Every rung of the ladder: from a draw's training people to ages of its held-out ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.cohort_study import network, people, simple
from tools.cohort_study.plan import FULL, SMALL, Job, Study

Doubles = npt.NDArray[np.float64]
Fit = Callable[[people.People], tuple[Doubles, str]]


def _columns(them: people.People, field: str) -> tuple[Doubles, Doubles]:
    values = them.fields[field].astype(np.float64)
    values = values.reshape(len(values), -1)
    return values[them.train], values[them.test]


def _ages(them: people.People) -> Doubles:
    return np.asarray(them.fields["age"][them.train], np.float64)


def _site_and_sex(them: people.People) -> tuple[Doubles, Doubles]:
    site = simple.one_hot(them.fields["site"])
    groups = np.concatenate([site, them.fields["male"][:, None]], axis=1)
    return groups[them.train], groups[them.test]


def _mean(them: people.People) -> tuple[Doubles, str]:
    mean = _ages(them).mean()
    return np.full(len(them.test), mean), f"{mean:.2f} years for everybody"


def _ventricles(them: people.People) -> tuple[Doubles, str]:
    x, x_test = _columns(them, "ventricle_count")
    nobody = np.empty((len(x), 0)), np.empty((len(x_test), 0))
    return simple.quadratic_fit(x, nobody[0], _ages(them), x_test, nobody[1])


def _quadratic(field: str, *, site: bool = True) -> Fit:
    def fit(them: people.People) -> tuple[Doubles, str]:
        (x, x_test), (groups, groups_test) = _columns(them, field), _site_and_sex(them)
        if not site:
            groups, groups_test = groups[:, -1:], groups_test[:, -1:]
        return simple.quadratic_fit(x, groups, _ages(them), x_test, groups_test)

    return fit


def _ridge(field: str) -> Fit:
    def fit(them: people.People) -> tuple[Doubles, str]:
        values = np.asarray(them.fields[field], np.float32)
        return simple.ridge(values[them.train], _ages(them), values[them.test])

    return fit


def _boosted(them: people.People) -> tuple[Doubles, str]:
    (x, x_test), (groups, groups_test) = _columns(them, "features"), _site_and_sex(them)
    return simple.boosted_trees(
        np.hstack([x, groups]), _ages(them), np.hstack([x_test, groups_test])
    )


SIMPLE_FITS: dict[str, tuple[tuple[str, ...], Fit]] = {
    "mean predictor": ((), _mean),
    "ventricle count": (("ventricle_count",), _ventricles),
    "nine measured volumes": (("measured",), _quadratic("measured", site=False)),
    "nine volumes, site known": (("measured",), _quadratic("measured")),
    "ridge on 8 mm voxels": (("blocks",), _ridge("blocks")),
    "ridge, pose undone": (("posed_blocks",), _ridge("posed_blocks")),
    "eight image features": (("features",), _quadratic("features")),
    "boosted trees": (("features",), _boosted),
    "eight features, pose known": (("features_flat",), _quadratic("features_flat")),
    "nine rendered volumes": (("rendered",), _quadratic("rendered")),
}
"""Fields that a predictor needs, and how it is fitted."""


def absolute_errors(
    study: Study, job: Job, root: Path, progress: network.Progress | None = None
) -> dict[str, Any]:
    """Fit one predictor and measure it on the held-out people.

    Predictions are kept within the range of the training ages.

    Returns
    -------
    dict
        ``errors`` (years, one for each held-out person in the order of the draw) and ``detail``.
    """
    if job.kind in (SMALL, FULL):
        them = people.load(study, job.draw, root, job.number, ("image",))
        recipe = study.small if job.kind == SMALL else study.full
        images, ages = them.fields["image"], them.fields["age"]
        model = network.train(images, ages, them.train, recipe, job.draw.seed, progress)
        predicted = network.predict(model, images, them.test)
        detail = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    else:
        fields, fit = SIMPLE_FITS[job.kind]
        them = people.load(study, job.draw, root, job.number, fields)
        predicted, detail = fit(them)
    known = them.fields["age"][them.train]
    errors = np.abs(np.clip(predicted, known.min(), known.max()) - them.fields["age"][them.test])
    return {"errors": [round(float(error), 5) for error in errors], "detail": detail}
