"""Volumes of a synthetic head as it was rendered, to hold against the asked ones."""

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.make.anatomy import Anatomy
from sparsekit.fed.cohort.make.fields import sample
from sparsekit.fed.cohort.make.template import DEEP, Template
from sparsekit.fed.cohort.make.volumes import STRUCTURES


def achieved_fractions(template: Template, anatomy: Anatomy) -> NDArray[np.float64]:
    """Measure the nine structures, as shares of the brain, free of scanner noise.

    Deep structures are the template's outlines seen through the head's deformation; the others
    are sums of the final tissue fractions.

    Parameters
    ----------
    template : Template
        That the head was bent from.
    anatomy : Anatomy
        The head.

    Returns
    -------
    ndarray, (9,), float64
        Volume over the brain's volume, in the order of
        `sparsekit.fed.cohort.make.volumes.STRUCTURES`.
    """
    voxel_mm3 = template.resolution**3
    deep = sample(template.deep, anatomy.deformation.source).sum(axis=0, dtype=np.float64)
    sums: dict[str, float] = dict(zip(DEEP, deep.tolist(), strict=True))
    sums["cortex_gm"] = float(anatomy.cortex_gm.sum(dtype=np.float64))
    sums["cerebellar_gm"] = float(anatomy.cerebellar_gm.sum(dtype=np.float64))
    sums["cerebral_wm"] = float(anatomy.cerebral_wm.sum(dtype=np.float64))
    sums["wm_hypointensities"] = float(anatomy.lesions.sum(dtype=np.float64))
    brain_mm3 = anatomy.deformation.brain_mm3
    return np.array([sums[name] * voxel_mm3 / brain_mm3 for name in STRUCTURES])


def ventricle_fluid(template: Template, anatomy: Anatomy, image: NDArray[np.int16]) -> float:
    """Count dark voxels around the lateral ventricles in an image, as a share of the brain.

    The place is known from the head's deformation, what is there from the image alone.

    Parameters
    ----------
    template : Template
        That the head was bent from.
    anatomy : Anatomy
        The head.
    image : ndarray, (x, y, z), int16
        Its scan, best without noise and shading.

    Returns
    -------
    float
        How much fluid there is: 1 for a voxel as dark as the darkest tenth, 0 for one as bright
        as the median voxel of the head.
    """
    box = image[template.box].reshape(-1)[anatomy.deformation.voxels].astype(np.float64)
    inside = sample(template.deep, anatomy.deformation.source)[:, 0] > 0
    bright, dark = np.median(box[box > 0]), np.percentile(box[inside], 1)
    darkness = np.clip((bright - box) / (bright - dark), 0, 1)
    voxel_mm3 = template.resolution**3
    return float(darkness[inside].sum() * voxel_mm3 / anatomy.deformation.brain_mm3)
