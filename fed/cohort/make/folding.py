"""A folding pattern of each person's own, in place of the template's average one.

The template's tissue maps are averages of 152 people: around the cortex they say how likely fluid,
grey and white matter are, not where they are. A person gets a random field whose zeros are sheets
that run from the surface inwards, a gyrus apart: sulci. Near a sheet fluid becomes likelier, far
from it white matter, and grey matter lies in between. Where the template is certain nothing
changes: large sulci, which everybody has in about the same place, stay.
"""

from dataclasses import dataclass

import numpy as np

from sparsekit.fed.cohort.make.deform import lattice
from sparsekit.fed.cohort.make.fields import Floats, floats, sample
from sparsekit.fed.cohort.make.template import ORIGIN_MM, Template, load_template

# Zeros of such a field lie 2.7 spacings apart along a line: sulci about 19 mm apart.
_SPACING_MM = 7.0
# The field is made at this resolution for every grid, so that all show the same folds.
_DRAWN_AT_MM = 4
# Folds run towards the middle of each hemisphere: along the way from it the field hardly changes.
_MIDDLE_MM = (26.0, -20.0, 8.0)
_USUAL_RADIUS_MM = 52.0
_RADIAL_SHARE = 0.25
# How strongly a fold decides what the template leaves open, in logits per SD of the field's
# height; and what the field changes by within a voxel, which blunts the sheets. Those of 4 mm bring
# its images nearest to the averages of the 2 mm ones.
_STRENGTH = {2: 1.7, 4: 1.2}
_BLUNT = {2: 0.12, 4: 0.25}
# Mean and SD of the absolute value of a standard normal.
_MEAN_HEIGHT, _SD_HEIGHT = 0.798, 0.603
_MOST_LOGITS = 5.0
_CROWN_MM = 4.0


@dataclass(frozen=True)
class Folds:
    """Tissue near the cortex after folding, and how far each voxel is from a sulcus.

    Attributes
    ----------
    cortex_gm, cerebral_wm : ndarray, (n,), float32
        Fractions of the voxel.
    height : ndarray, (n,), float32
        Below 0 near a sulcus, above 0 inside a gyrus; mean 0, SD 1.
    """

    cortex_gm: Floats
    cerebral_wm: Floats
    height: Floats


def fold(
    template: Template,
    rng: np.random.Generator,
    source: Floats,
    *,
    cortex_gm: Floats,
    cerebral_wm: Floats,
    fluid: Floats,
    ventricle_mm: Floats,
    edge_mm: Floats,
    other_gm: Floats,
) -> Folds:
    """Draw a person's folds and share the tissue out anew.

    Parameters
    ----------
    template : Template
        That the head is bent from.
    rng : Generator
        The person's stream; one field is drawn from it.
    source : ndarray, (n, 3), float32
        Where each voxel comes from in the template's maps.
    cortex_gm, cerebral_wm, fluid, other_gm : ndarray, (n,), float32
        Fractions of the voxels as sampled from the template.
    ventricle_mm, edge_mm : ndarray, (n,), float32
        Signed distances to the lateral ventricles, near which nothing is folded, and to the
        brain's surface.

    Returns
    -------
    Folds
        ``cortex_gm + cerebral_wm + fluid`` of every voxel is what it was.
    """
    drawn = lattice(_DRAWN_AT_MM, _SPACING_MM).draw(rng, 1)
    height = _height(template, drawn, source)
    strength = np.clip((ventricle_mm - 4) / 8, 0, 1) * np.clip(1 - 2 * other_gm, 0, 1)
    logits = strength * height * np.float32(_STRENGTH[template.resolution])
    np.clip(logits, -_MOST_LOGITS, _MOST_LOGITS, out=logits)
    # Crowns of gyri have cortex on them: white matter does not come up to the surface.
    crowns = np.clip((-_CROWN_MM - edge_mm) / _CROWN_MM, 0, 1)
    white = cerebral_wm * np.exp(np.where(logits > 0, logits * crowns, logits))
    wet = fluid * np.exp(-logits)
    total = cortex_gm + cerebral_wm + fluid
    factor = total / np.maximum(cortex_gm + white + wet, np.float32(1e-6))
    return Folds(floats(cortex_gm * factor), floats(white * factor), height)


def _height(template: Template, drawn: Floats, source: Floats) -> Floats:
    """Standardised distance of each point from the sheets where the drawn field is 0."""
    centres = []
    away = []
    for axis, (first, middle) in enumerate(zip(ORIGIN_MM, _MIDDLE_MM, strict=True)):
        place = source[:, axis] * np.float32(template.resolution) + np.float32(first)
        centre = np.where(place > 0, middle, -middle).astype(np.float32) if axis == 0 else middle
        centres.append(centre)
        away.append(place - centre)
    radius = np.sqrt(np.maximum(away[0] ** 2 + away[1] ** 2 + away[2] ** 2, 1))
    pull = _RADIAL_SHARE + (1 - _RADIAL_SHARE) * np.float32(_USUAL_RADIUS_MM) / radius
    corner = [axis[0] for axis in load_template(_DRAWN_AT_MM).axes_mm()]
    points = np.stack(
        [
            (centre + part * pull - np.float32(first)) / np.float32(_DRAWN_AT_MM)
            for centre, part, first in zip(centres, away, corner, strict=True)
        ],
        axis=1,
    )
    field = sample(drawn, floats(points))[:, 0]
    blunt = np.float32(_BLUNT[template.resolution])
    return floats((np.sqrt(field**2 + blunt**2) - _MEAN_HEIGHT) / _SD_HEIGHT)
