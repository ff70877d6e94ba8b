"""Draw slices of synthetic heads for docs/cohort-gallery.md.

    python tools/cohort_gallery.py

writes docs/images/cohort-*.png (about a minute on one core). Needs matplotlib (the extra
`report`). The heads are drawn at the real spread between people, at 2 mm unless a title says more.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.environment import plan_sites
from sparsekit.fed.cohort.make import volumes
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.people import Person, draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import ORIGIN_MM, load_template

OUT = Path(__file__).resolve().parent.parent / "docs" / "images"
SEED = 7
AXIAL_MM, CORONAL_MM, SAGITTAL_MM = 16.0, -20.0, 4.0
# Cut off where no head reaches.
EDGE_MM = 12.0
BRIGHTEST_PERCENT = 99.7
# Grey levels in the file: more could not be told apart and would take more room.
GREYS, DPI = 24, 80

Image = NDArray[np.int16]


def head(person: Person, *, site: int | None = None, resolution: int = 2) -> Image:
    """Render one person, at their own site or in another site's scanner."""
    template = load_template(resolution)
    anatomy = build_anatomy(template, person, shape_rng(SEED, person.index))
    scanner = draw_site(site_rng(SEED, person.site if site is None else site))
    return scan(template, anatomy, person, scanner, scan_rng(SEED, person.index))


def aged(person: Person, age: float) -> Person:
    """The same person, with the volumes that people of another age have on average."""
    then, now = (
        volumes.expected_log_fractions(years, male=float(person.male))
        for years in (age, person.age)
    )
    return replace(person, age=age, log_fractions=person.log_fractions + then - now)


def slices(image: Image, resolution: int) -> list[NDArray[np.float64]]:
    """Axial, coronal and sagittal slice, scaled to 0..1."""
    x, y, z = (
        round((place - first) / resolution)
        for place, first in zip((SAGITTAL_MM, CORONAL_MM, AXIAL_MM), ORIGIN_MM, strict=True)
    )
    edge = round(EDGE_MM / resolution)
    top = np.percentile(image[image > 0], BRIGHTEST_PERCENT)
    return [
        np.clip(part.T / top, 0, 1)
        for part in (image[edge:-edge, :, z], image[edge:-edge, y, :-edge], image[x, :, :-edge])
    ]


def draw(name: str, columns: list[tuple[str, Image, int]], *, views: int = 2) -> None:
    """Write one picture: a column per head, a row per view."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("Agg")
    figure, axes = pyplot.subplots(
        views,
        len(columns),
        figsize=(1.45 * len(columns), 1.75 * views),
        squeeze=False,
        facecolor="black",
    )
    for column, (title, image, resolution) in enumerate(columns):
        for row, part in enumerate(slices(image, resolution)[:views]):
            axis: Any = axes[row, column]
            grey = np.rint(part * (GREYS - 1)) / (GREYS - 1)
            axis.imshow(grey, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.axis("off")
            if row == 0:
                axis.set_title(title, fontsize=7, color="white", pad=2)
    figure.subplots_adjust(0, 0, 1, 0.94, 0.02, 0.02)
    OUT.mkdir(exist_ok=True)
    path = OUT / f"cohort-{name}.png"
    figure.savefig(path, dpi=DPI, facecolor="black", metadata={"Software": None})
    pyplot.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def titled(person: Person) -> str:
    """Age, sex and site."""
    return f"{person.age:.0f} years, {'M' if person.male else 'F'}, site {person.site + 1}"


def main() -> None:
    """Draw every picture."""
    plans = plan_sites("uniform-iid", subjects=240, sites=6)
    people = [draw_person(plans, i, seed=SEED, residual_scale=1.0) for i in range(240)]
    first = people[0]
    draw(
        "one-head-ages",
        [(f"{age} years", head(aged(first, age)), 2) for age in (45, 54, 63, 72, 82)],
    )
    young, old = sorted(people, key=lambda p: p.age)[:5], sorted(people, key=lambda p: p.age)[-5:]
    draw("young", [(titled(p), head(p), 2) for p in young], views=3)
    draw("old", [(titled(p), head(p), 2) for p in old], views=3)
    draw("one-head-sites", [(f"site {s + 1}", head(first, site=s), 2) for s in range(6)])
    middle = [next(p for p in people if p.site == s and 60 < p.age < 66) for s in range(6)]
    draw("sites", [(titled(p), head(p), 2) for p in middle])
    pairs = [(p, mm) for p in middle[:3] for mm in (2, 4)]
    draw("resolutions", [(f"{titled(p)}, {mm} mm", head(p, resolution=mm), mm) for p, mm in pairs])


if __name__ == "__main__":
    main()
