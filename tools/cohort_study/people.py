"""The people of a draw: who they are, their scans, and measures of the scans."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.environment import SitePlan, plan_sites
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.measure import achieved_fractions
from sparsekit.fed.cohort.make.people import draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import load_template
from sparsekit.fed.cohort.normalise import normalise
from sparsekit.fed.cohort.tables import Fault
from sparsekit.fed.cohort.yardsticks import BLOCK_MM, block_means, ventricle_volume
from tools.cohort_study.measures import image_features, nine_volumes, search_windows, undo_pose
from tools.cohort_study.plan import Draw, Study, renderings
from tools.cohort_study.tissue import segment, segment_with_template

RESOLUTION = 4
NORMALISATION = "brain-zscore"

_BLOCK = round(BLOCK_MM / RESOLUTION)


def site_plans(study: Study) -> tuple[SitePlan, ...]:
    """Equal sites with the same ages: a predictor gains nothing by knowing the site's people."""
    return plan_sites("uniform-iid", subjects=study.people + study.held_out, sites=study.sites)


def render_chunk(
    study: Study, draw: Draw, first: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Draw, render and measure people ``first`` to ``first + study.chunk``, or to the last.

    The scans are those that ``sparsekit cohort make --environment uniform-iid`` writes for the
    same seed, scale and sizes, prepared as ``sparsekit fed run`` prepares them.

    Returns
    -------
    dict of str to ndarray
        The fields of `People`, one row each.
    """
    plans = site_plans(study)
    template = load_template(RESOLUTION)
    windows = search_windows(template)
    last = min(first + study.chunk, study.people + study.held_out)
    rows: list[dict[str, Any]] = []
    for index in range(first, last):
        person = draw_person(plans, index, seed=draw.seed, residual_scale=draw.scale)
        anatomy = build_anatomy(template, person, shape_rng(draw.seed, index))
        site = draw_site(site_rng(draw.seed, person.site))
        image = scan(template, anatomy, person, site, scan_rng(draw.seed, index))
        normal = normalise(image.astype(np.float32), NORMALISATION)
        if isinstance(normal, Fault):
            raise CohortError(f"person {index}: {normal.detail}")
        box = normal[template.box]
        pose = anatomy.deformation
        flat = segment_with_template(image[template.box], template, pose)
        rows.append(
            {
                "age": person.age,
                "male": person.male,
                "site": person.site,
                "image": box.astype(np.float16),
                "blocks": block_means(box, _BLOCK).ravel().astype(np.float16),
                "posed_blocks": block_means(undo_pose(template, box, pose), _BLOCK)
                .ravel()
                .astype(np.float16),
                "ventricle_count": ventricle_volume(image, RESOLUTION),
                "features": image_features(image, segment(image[template.box]), RESOLUTION),
                "features_flat": image_features(image, flat, RESOLUTION),
                "measured": nine_volumes(template, windows, pose, flat),
                "rendered": np.log(achieved_fractions(template, anatomy)),
            }
        )
        if progress is not None:
            progress(index + 1 - first, last - first)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def save(path: Path, fields: dict[str, npt.NDArray[Any]]) -> None:
    """Write a chunk under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.npz")
    np.savez(partial, **fields)  # type: ignore[arg-type]
    os.replace(partial, path)


@dataclass(frozen=True)
class People:
    """A whole draw, in the order of its people: site by site.

    Attributes
    ----------
    train, test : ndarray, int64
        Rows of the people to train on and of those held out: the last ones of each site. The
        first ``n / sites`` of each site are the training people where only ``n`` are wanted.
    fields : dict of str to ndarray
        ``age`` (years), ``male``, ``site``, ``image``, ``blocks`` (8 mm), ``posed_blocks`` (after
        the pose was undone), ``ventricle_count``, ``features``, ``features_flat`` (with the
        template and without shading), ``measured``, ``rendered``.
    """

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    fields: dict[str, npt.NDArray[Any]]


def load(study: Study, draw: Draw, root: Path, people: int, names: tuple[str, ...]) -> People:
    """Read some fields of a rendered draw.

    Parameters
    ----------
    study : Study
    draw : Draw
    root : Path
        The study's folder.
    people : int
        How many of the training people to take.
    names : tuple of str
        Fields; ``age``, ``male`` and ``site`` are there always.
    """
    wanted = ("age", "male", "site", *names)
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in wanted}
    for job in renderings(study, draw):
        with np.load(job.target(root)) as chunk:
            for name in wanted:
                parts[name].append(chunk[name])
    fields = {name: np.concatenate(part) for name, part in parts.items()}
    train, test = split(fields["site"], study, people)
    return People(train, test, fields)


def split(
    sites: npt.NDArray[np.int64], study: Study, people: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the first training people and of the held-out people of each site."""
    train, test = [], []
    for site in range(study.sites):
        rows = np.flatnonzero(sites == site)
        train.append(rows[: people // study.sites])
        test.append(rows[len(rows) - study.held_out // study.sites :])
    return np.concatenate(train), np.concatenate(test)
