"""Tissue of one synthetic head: what is where, before any scanner sees it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.make import volumes
from sparsekit.fed.cohort.make.deform import Deformation, deform, lattice
from sparsekit.fed.cohort.make.fields import Floats, floats, sample
from sparsekit.fed.cohort.make.folding import fold
from sparsekit.fed.cohort.make.people import Person
from sparsekit.fed.cohort.make.template import DEEP, MAPS, Template

_INDEX = {name: position for position, name in enumerate(volumes.STRUCTURES)}
_REFERENCE = volumes.expected_log_fractions(volumes.REFERENCE_AGE, male=0.5)

_TISSUES = ("cortex_gm", "cerebellar_gm", "other_gm", "cerebral_wm", "other_wm")
# Cortex is lost at the banks of sulci: by this much more, in logits, per SD of height above them.
_AT_BANKS = 0.7
# Personal patterns: how unevenly cortex thins (40 mm), and sulci wider or narrower (10 mm).
_UNEVEN_THINNING_MM, _UNEVEN_THINNING_SD = 40.0, 0.25
_SULCI_MM, _SULCI_SD = 10.0, 0.16
# Lesions: two scales of noise in mm, so that both resolutions show the same ones.
_LESION_SCALES = ((16.0, 0.7), (6.0, 0.9))
_LESION_REACH_MM = 12.0
_LESION_SLOPE = 8.0
# No voxel loses more than this share of its tissue, nor gains more than it has.
_MOST_LOST, _MOST_GAINED = 0.95, 1.0
_ROUNDS = 5


@dataclass(frozen=True)
class Anatomy:
    """Tissue fractions of the voxels that show a head.

    Attributes
    ----------
    deformation : Deformation
        Which voxels these are and where they come from.
    cortex_gm, cerebellar_gm, other_gm, cerebral_wm, other_wm : ndarray, (n,), float32
        Fractions of the voxel; what is missing to 1 inside the brain is fluid.
    lesions : ndarray, (n,), float32
        The part of ``cerebral_wm`` that is hypointense.
    edge_mm : ndarray, (n,), float32
        Signed distance to the brain's surface, outside positive.
    texture : ndarray, (n,), float32
        Signal that tissue does not explain, in units of the white matter's.
    loss : ndarray, (n,), float32
        How much of the cortex's change with age falls here; mean 1 over the cortex.
    """

    deformation: Deformation
    cortex_gm: Floats
    cerebellar_gm: Floats
    other_gm: Floats
    cerebral_wm: Floats
    other_wm: Floats
    lesions: Floats
    edge_mm: Floats
    texture: Floats
    loss: Floats


def build_anatomy(template: Template, person: Person, rng: np.random.Generator) -> Anatomy:
    """Bend the template into one person.

    Parameters
    ----------
    template : Template
        From `sparsekit.fed.cohort.make.template.load_template`.
    person : Person
        Head size and asked volumes.
    rng : Generator
        The person's `sparsekit.fed.cohort.make.people.shape_rng`; used up in a fixed order.

    Returns
    -------
    Anatomy
        Whose nine volumes, as shares of the brain, relate to the template's as the asked ones
        relate to those expected at the template's age.
    """
    log_ratios = person.log_fractions - _REFERENCE
    deformation = deform(
        template,
        rng,
        log_head_size=person.log_icv - volumes.REFERENCE_LOG_ICV,
        log_ratios=log_ratios[[_INDEX[name] for name in DEEP]],
    )
    maps = sample(template.maps, deformation.source)
    channel = {name: np.ascontiguousarray(maps[:, k]) for k, name in enumerate(MAPS)}
    wanted = _template_sums(template) * np.exp(log_ratios) * deformation.growth
    tissue = sum((channel[name] for name in _TISSUES), np.zeros_like(channel["edge_mm"]))
    folds = fold(
        template,
        rng,
        deformation.source,
        cortex_gm=channel["cortex_gm"],
        cerebral_wm=channel["cerebral_wm"],
        fluid=np.maximum(template.brain_fraction(channel["edge_mm"]) - tissue, 0),
        ventricle_mm=channel["ventricle_mm"],
        edge_mm=channel["edge_mm"],
        other_gm=channel["other_gm"],
    )
    gm = folds.cortex_gm + channel["other_gm"]
    wm, moved = _shift_border(
        folds.cerebral_wm, gm, channel["ventricle_mm"], wanted[_INDEX["cerebral_wm"]]
    )

    def field(spacing_mm: float, sd: float) -> Floats:
        drawn = lattice(template.resolution, spacing_mm).draw(rng, 1, sd=sd)
        return drawn.reshape(-1)[deformation.voxels]

    sulci = channel["sulci"]
    banks = np.exp(np.float32(-_AT_BANKS) * folds.height)
    cortex = _thin(
        folds.cortex_gm + moved,
        where=sulci * banks * (1 + field(_UNEVEN_THINNING_MM, _UNEVEN_THINNING_SD)),
        pattern=np.minimum(sulci, 3) * field(_SULCI_MM, _SULCI_SD),
        room=1 - wm,
        wanted=wanted[_INDEX["cortex_gm"]],
    )
    cerebellar = _thin(
        channel["cerebellar_gm"],
        where=floats(0.5 + 0.5 * np.minimum(sulci, 3)),
        pattern=floats(0),
        room=1 - channel["other_wm"],
        wanted=wanted[_INDEX["cerebellar_gm"]],
    )
    score = channel["ventricle_mm"] * np.float32(-1 / _LESION_REACH_MM)
    for spacing_mm, weight in _LESION_SCALES:
        score += field(spacing_mm, weight)
    share = float(np.exp(person.log_fractions[_INDEX["wm_hypointensities"]]))
    lesions = _place_lesions(score, wm, share * deformation.brain_mm3 / template.resolution**3)
    return Anatomy(
        deformation=deformation,
        cortex_gm=cortex,
        cerebellar_gm=cerebellar,
        other_gm=channel["other_gm"],
        cerebral_wm=wm,
        other_wm=channel["other_wm"],
        lesions=lesions,
        edge_mm=channel["edge_mm"],
        texture=channel["texture"],
        loss=channel["loss"],
    )


def _template_sums(template: Template) -> NDArray[np.float64]:
    """Voxels' worth of each structure in the template; 0 where it is not a map of its own."""
    sums = np.zeros(len(volumes.STRUCTURES))
    for position, name in enumerate(volumes.STRUCTURES):
        if name in MAPS:
            sums[position] = template.map_sums[MAPS.index(name)]
    return sums


def _shift_border(
    wm: Floats, gm: Floats, ventricle_mm: Floats, wanted: float
) -> tuple[Floats, Floats]:
    """Move the border between WM and GM, away from the ventricles, until WM has its volume."""
    border = wm * np.minimum(gm, 1) * (1 - np.exp(-np.maximum(ventricle_mm, 0) / 10))
    spare = float(border.sum(dtype=np.float64))
    share = (float(wm.sum(dtype=np.float64)) - wanted) / spare
    moved = border * np.float32(np.clip(share, -_MOST_GAINED, _MOST_GAINED))
    return floats(wm - moved), floats(moved)


def _thin(gm: Floats, *, where: Floats, pattern: Floats, room: Floats, wanted: float) -> Floats:
    """Turn GM into fluid, or fluid into GM, in proportion to ``where``, up to a volume."""
    most = np.maximum(room, 0)
    # Growing cortex fills sulci: also voxels that hold little of it and much fluid.
    growing = np.sqrt(np.maximum(gm, 0) * most)
    amount = 0.0
    thinned = gm
    for _ in range(_ROUNDS):
        loss = np.clip(np.float32(amount) * where + pattern, -_MOST_GAINED, _MOST_LOST)
        base = np.where(loss > 0, gm, growing)
        thinned = floats(np.clip(gm - loss * base, 0, most))
        error = float(thinned.sum(dtype=np.float64)) - wanted
        # Voxels at their limit no longer follow: the others must make up for them.
        free = base * where
        free[(thinned >= most) if error < 0 else (loss >= _MOST_LOST)] = 0
        amount += error / max(float(free.sum(dtype=np.float64)), 1.0)
    return thinned


def _place_lesions(score: Floats, wm: Floats, wanted: float) -> Floats:
    """Turn the highest scoring white matter hypointense, with a sharp edge, up to a volume."""
    white = np.flatnonzero(wm > 0.3)
    count = min(len(white), int(8 * wanted) + 200)
    best = white[np.argpartition(score[white], len(white) - count)[-count:]]
    candidates, tissue = score[best], wm[best]
    low, high = float(candidates.min()) - 1, float(candidates.max()) + 1
    grown = np.zeros_like(tissue)
    for _ in range(18):
        threshold = (low + high) / 2
        exponent = np.clip(np.float32(_LESION_SLOPE) * (threshold - candidates), -30, 30)
        grown = tissue / (1 + np.exp(exponent))
        if float(grown.sum(dtype=np.float64)) > wanted:
            low = threshold
        else:
            high = threshold
    lesions = np.zeros_like(wm)
    lesions[best] = grown
    return lesions
