"""Folds are a person's own, keep what the template is sure of, and are the same on both grids."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekit.fed.cohort.make.fields import Floats, floats
from sparsekit.fed.cohort.make.folding import Folds, fold
from sparsekit.fed.cohort.make.template import MAPS, Template, load_template

TISSUES = ("cortex_gm", "cerebellar_gm", "other_gm", "cerebral_wm", "other_wm")


def unbent(resolution: int) -> tuple[Template, Floats, dict[str, Floats]]:
    """The template's own voxels of the box, and what it holds there."""
    template = load_template(resolution)
    places = np.meshgrid(
        *(np.arange(part.start, part.stop) for part in template.box), indexing="ij"
    )
    source = floats(np.stack([place.ravel() for place in places], axis=1))
    maps = template.maps[template.box].reshape(-1, len(MAPS))
    channel = {name: floats(maps[:, k]) for k, name in enumerate(MAPS)}
    tissue = sum((channel[name] for name in TISSUES), np.zeros_like(channel["edge_mm"]))
    channel["fluid"] = np.maximum(template.brain_fraction(channel["edge_mm"]) - tissue, 0)
    return template, source, channel


def folded(template: Template, source: Floats, channel: dict[str, Floats], seed: int) -> Folds:
    names = ("cortex_gm", "cerebral_wm", "fluid", "ventricle_mm", "edge_mm", "other_gm")
    return fold(
        template,
        np.random.default_rng(seed),
        source,
        **{name: channel[name] for name in names},
    )


@pytest.fixture(scope="module")
def coarse() -> tuple[Template, Floats, dict[str, Floats]]:
    return unbent(4)


def test_tissue_is_shared_out_anew_and_none_is_made(
    coarse: tuple[Template, Floats, dict[str, Floats]],
) -> None:
    _, _, channel = coarse
    folds = folded(*coarse, seed=1)
    before = channel["cortex_gm"] + channel["cerebral_wm"]
    after = folds.cortex_gm + folds.cerebral_wm
    assert folds.cortex_gm.min() >= 0
    assert folds.cerebral_wm.min() >= 0
    assert np.all(after <= before + channel["fluid"] + 1e-5)
    # Where the template knows the tissue, or near ventricles and nuclei, nothing changes.
    changed = np.abs(folds.cortex_gm - channel["cortex_gm"])
    three = np.stack([channel["cortex_gm"], channel["cerebral_wm"], channel["fluid"]])
    sure = (three.sum(axis=0) > 0.3) & (three.max(axis=0) == three.sum(axis=0))
    assert sure.sum() > 300
    assert changed[sure].max() < 1e-5
    assert changed[channel["ventricle_mm"] <= 4].max() < 1e-5
    assert changed.max() > 0.3


def test_folds_are_a_persons_own_and_sharper_than_the_average(
    coarse: tuple[Template, Floats, dict[str, Floats]],
) -> None:
    _, _, channel = coarse
    people = [folded(*coarse, seed=seed) for seed in range(12)]
    ribbon = (channel["cortex_gm"] > 0.3) & (channel["ventricle_mm"] > 12)
    heights = np.stack([person.height[ribbon] for person in people])
    between = np.asarray(np.corrcoef(heights))[np.triu_indices(len(people), 1)]
    assert np.abs(between.mean()) < 0.05
    assert np.abs(between).max() < 0.3

    def doubt(gm: NDArray[np.float32]) -> float:
        return float((gm * (1 - gm))[ribbon].mean())

    assert doubt(people[0].cortex_gm) < 0.97 * doubt(channel["cortex_gm"])
    # Over people, the average comes back.
    mean = np.mean([person.cortex_gm[ribbon] for person in people], axis=0)
    assert np.corrcoef(mean, channel["cortex_gm"][ribbon])[0, 1] > 0.9


def test_both_grids_show_the_same_folds(
    coarse: tuple[Template, Floats, dict[str, Floats]],
) -> None:
    fine = unbent(2)
    shape = {4: tuple(p.stop - p.start for p in coarse[0].box)}
    shape[2] = tuple(p.stop - p.start for p in fine[0].box)
    a = folded(*coarse, seed=5).height.reshape(shape[4])
    b = folded(*fine, seed=5).height.reshape(shape[2])[::2, ::2, ::2]
    assert a.shape == b.shape
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


def test_sulci_run_inwards(coarse: tuple[Template, Floats, dict[str, Floats]]) -> None:
    # From the middle of a hemisphere outwards the height changes much less than across.
    template = coarse[0]
    height = folded(*coarse, seed=2).height.reshape(
        tuple(part.stop - part.start for part in template.box)
    )
    x, y, z = template.axes_mm()
    # Along x, right of the middle of the right hemisphere, x points outwards.
    row = height[np.argmin(np.abs(x - 42)) :, :, :][:5]
    near = (np.abs(y + 20) < 20)[:, None] & (np.abs(z - 8) < 20)[None, :]
    outwards = np.abs(np.diff(row, axis=0))[:, near].mean()
    across = np.abs(np.diff(row, axis=1))[:, near[:-1]].mean()
    assert outwards < 0.75 * across
