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
