"""What a site's scanner makes of a head: contrast, blur, shading, noise, skull strip."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from sparsekit.fed.cohort.make.anatomy import Anatomy
from sparsekit.fed.cohort.make.deform import lattice
from sparsekit.fed.cohort.make.fields import floats
from sparsekit.fed.cohort.make.people import Person
from sparsekit.fed.cohort.make.template import Template

# The GM/WM contrast falls with age, more visibly than cortex thins (Salat et al. 2009).
_CONTRAST_LOSS_PER_YEAR, _CONTRAST_SD = 0.003, 0.05
_CONTRAST_AGE = 45.0
_LESION_DEPTH = 0.9
_SHADING_MM = 55.0
_FWHM_PER_SD = 2.3548
_MAX_SIGNAL = 32767


@dataclass(frozen=True)
class Site:
    """One scanner and its processing; signals are relative to white matter.

    Attributes
    ----------
    gm_signal, csf_signal : float
        Signal of grey matter (at 45 years) and of fluid.
    fwhm_mm : float
        Width of the point-spread function.
    noise_sd : float
        Of the complex noise that makes the magnitude image Rician.
    shading_sd : float
        Relative spread of the smooth bias field.
    gamma : float
        Exponent of the signal curve.
    gain : float
        Stored value of white matter.
    margin_mm : float
        How far outside the brain's surface the skull strip cuts.
    coil_sd, coil_seed : float, int
        Relative spread and seed of the shading that all scans of the site share.
    """

    gm_signal: float
    csf_signal: float
    fwhm_mm: float
    noise_sd: float
    shading_sd: float
    gamma: float
    gain: float
    margin_mm: float
    coil_sd: float = 0.0
    coil_seed: int = 0


def draw_site(rng: np.random.Generator) -> Site:
    """Draw a scanner from the site's stream."""
    return Site(
        gm_signal=float(rng.uniform(0.66, 0.77)),
        csf_signal=float(rng.uniform(0.22, 0.34)),
        fwhm_mm=float(rng.uniform(0.0, 1.4)),
        noise_sd=float(rng.uniform(0.02, 0.045)),
        shading_sd=float(rng.uniform(0.04, 0.09)),
        gamma=float(rng.uniform(0.95, 1.05)),
        gain=float(rng.uniform(350.0, 1200.0)),
        margin_mm=float(rng.choice((0.0, 2.0))),
        coil_sd=float(rng.uniform(0.02, 0.06)),
        coil_seed=int(rng.integers(2**32)),
    )


def scan(
    template: Template,
    anatomy: Anatomy,
    person: Person,
    site: Site,
    rng: np.random.Generator,
    *,
    noise: bool = True,
) -> NDArray[np.int16]:
    """Turn tissue into a skull-stripped T1-weighted image.

    Parameters
    ----------
    template : Template
        That the head was bent from.
    anatomy : Anatomy
        The head.
    person : Person
        Age matters for the contrast between grey and white matter.
    site : Site
        The scanner.
    rng : Generator
        The person's `sparsekit.fed.cohort.make.people.scan_rng`; used up in a fixed order.
    noise : bool, default True
        False leaves the noise out, and nothing else.

    Returns
    -------
    ndarray, (x, y, z), int16
        The whole grid; 0 outside the head.
    """
    person_contrast, person_gm, person_csf, person_gamma = rng.standard_normal(4)
    blur_mm = float(rng.uniform(0.0, 2.8))
    # The cortex loses contrast where it loses tissue; cerebellum and nuclei as it does on average.
    aged = np.float32(_CONTRAST_LOSS_PER_YEAR * (person.age - _CONTRAST_AGE))
    cortical = anatomy.cortex_gm > 0
    contrast = 1 + _CONTRAST_SD * person_contrast - aged * np.where(cortical, anatomy.loss, 1)
    gm_signal = floats(1 - (1 - site.gm_signal) * contrast + 0.015 * person_gm)
    csf_signal = site.csf_signal + 0.03 * person_csf
    gamma = site.gamma * np.exp(0.08 * person_gamma)

    gm = anatomy.cortex_gm + anatomy.cerebellar_gm + anatomy.other_gm
    wm = anatomy.cerebral_wm + anatomy.other_wm
    head = template.brain_fraction(anatomy.edge_mm - np.float32(site.margin_mm))
    signal = np.float32(csf_signal) * np.maximum(head - gm - wm, 0)
    signal += gm_signal * gm + wm
    signal -= np.float32(_LESION_DEPTH) * (1 - gm_signal) * anatomy.lesions
    signal += anatomy.texture
    np.maximum(signal, 0, out=signal)
    signal **= np.float32(gamma)

    shape = tuple(part.stop - part.start for part in template.box)
    voxels = anatomy.deformation.voxels
    box = np.zeros(shape, dtype=np.float32)
    box.reshape(-1)[voxels] = signal
    variance = (site.fwhm_mm**2 + blur_mm**2) / (_FWHM_PER_SD * template.resolution) ** 2
    # Three taps with the variance of the point-spread function, which is narrower than a voxel.
    taps = [variance / 2, 1 - variance, variance / 2]
    for axis in range(3):
        box = correlate1d(box, taps, axis=axis, mode="constant")
    splines = lattice(template.resolution, _SHADING_MM)
    shading = splines.draw(rng, 1, sd=site.shading_sd)
    shading += splines.draw(np.random.default_rng(site.coil_seed), 1, sd=site.coil_sd)
    signal = box.reshape(-1)[voxels] * np.exp(shading.reshape(-1)[voxels])
    if noise:
        real, imaginary = rng.standard_normal((2, len(voxels)), dtype=np.float32) * np.float32(
            site.noise_sd
        )
        signal = np.sqrt((signal + real) ** 2 + imaginary**2)
    signal[head < 0.5] = 0
    box[...] = 0
    box.reshape(-1)[voxels] = np.clip(np.rint(signal * np.float32(site.gain)), 0, _MAX_SIGNAL)
    image = np.zeros(template.shape, dtype=np.int16)
    image[template.box] = box.astype(np.int16)
    return image
