"""Render the three sites of IXI and measure every head, for tools/validation_table.py.

    python tools/measure_validation.py build/cohort-validation

writes people-4mm.npz and people-2mm.npz: of each person what was asked, what the rendered tissue
holds, and what is seen in the scan alone, with its noise, shading and contrast. One process, about
6 minutes on one core; fewer people with --coarse and --fine. Parts that are there already are kept.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.environment import plan_ixi
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.measure import achieved_fractions
from sparsekit.fed.cohort.make.people import draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import load_template
from sparsekit.fed.cohort.yardsticks import ventricle_volume

SEED = 40
# At 4 mm and at 2 mm: eight times and half the 518 of the fit.
COARSE, FINE = 4144, 259
_MEANS_ROUNDS = 25


def seen(image: NDArray[np.int16], resolution: int) -> list[float]:
    """Ventricles, fluid, grey and white matter in ml, from nothing but a scan's intensities.

    The ventricles are the dark voxels of a box fixed in space. For the rest, three intensities are
    fitted to the head by their means, and a voxel between two of them is shared between both.
    """
    head = image[image > 0].astype(np.float64)
    means = np.percentile(head, (5, 40, 85))
    for _ in range(_MEANS_ROUNDS):
        nearest = np.abs(head[:, None] - means).argmin(axis=1)
        means = np.array([head[nearest == k].mean() for k in range(3)])
    to_grey = np.clip((head - means[0]) / (means[1] - means[0]), 0, 1)
    to_white = np.clip((head - means[1]) / (means[2] - means[1]), 0, 1)
    ml = resolution**3 / 1000
    shares = [(1 - to_grey).sum() * ml, (to_grey - to_white).sum() * ml, to_white.sum() * ml]
    return [ventricle_volume(image, resolution), *(float(share) for share in shares)]


def measure(resolution: int, people: int) -> dict[str, NDArray[np.float64]]:
    """Make and measure the people of one resolution."""
    template = load_template(resolution)
    plans = plan_ixi(people)
    rows: dict[str, list[object]] = {
        name: [] for name in ("who", "asked", "rendered", "sizes", "seen")
    }
    for index in range(people):
        person = draw_person(plans, index, seed=SEED, residual_scale=1.0)
        anatomy = build_anatomy(template, person, shape_rng(SEED, index))
        site = draw_site(site_rng(SEED, person.site))
        image = scan(template, anatomy, person, site, scan_rng(SEED, index))
        rows["who"].append((person.age, person.male, person.site))
        rows["asked"].append(person.log_fractions)
        rows["rendered"].append(np.log(achieved_fractions(template, anatomy)))
        rows["sizes"].append((person.log_icv, np.log(anatomy.deformation.brain_mm3)))
        rows["seen"].append(seen(image, resolution))
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--coarse", type=int, default=COARSE, help="people at 4 mm")
    parser.add_argument("--fine", type=int, default=FINE, help="people at 2 mm")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for resolution, people in ((4, options.coarse), (2, options.fine)):
        path = out / f"people-{resolution}mm.npz"
        if not path.exists():
            np.savez(path, allow_pickle=False, **measure(resolution, people))
        print(f"{path}: {people} people")


if __name__ == "__main__":
    main()
