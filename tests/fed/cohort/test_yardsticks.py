from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.yardsticks import Yardstick, block_means, ventricle_volume, yardsticks

Array = npt.NDArray[np.float32]
SHAPE = (46, 55, 46)
NAMES = ["mean predictor", "ventricle count", "ridge on 8 mm voxels"]


@dataclass(frozen=True)
class People:
    """Prepared scans in memory."""

    images: Array
    ages: Array

    def __len__(self) -> int:
        return len(self.ages)

    def volume(self, index: int) -> Array:
        return np.asarray(self.images[index])


def brain_with_ventricles(age: float, rng: np.random.Generator) -> Array:
    """Return a noisy uniform brain on the 4 mm grid with ventricles that grow with age."""
    x, y, z = np.meshgrid(
        np.arange(-90, 91, 4), np.arange(-126, 91, 4), np.arange(-72, 109, 4), indexing="ij"
    )
    brain = (x / 66) ** 2 + ((y + 18) / 80) ** 2 + ((z - 18) / 60) ** 2 < 1
    size = 12 + (age - 45) / 3
    ventricles = (x / size) ** 2 + ((y + 8) / (1.6 * size)) ** 2 + ((z - 14) / size) ** 2 < 1
    volume = np.where(brain, 0.5 + rng.normal(0, 0.1, SHAPE), 0)
    volume[ventricles] = -2.5
    return volume.astype(np.float32)


def people(n: int, seed: int) -> People:
    rng = np.random.default_rng(seed)
    ages = rng.uniform(45, 80, n).astype(np.float32)
    return People(np.stack([brain_with_ventricles(float(a), rng) for a in ages]), ages)


def noise_people(n: int, seed: int) -> People:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, 12, 12, 12)).astype(np.float32)
    return People(images, rng.uniform(45, 80, n).astype(np.float32))


def measured(train: list[People], test: list[People]) -> dict[str, Yardstick]:
    return yardsticks(train, test, voxel_mm=4.0)


def test_the_mean_predictor_takes_the_mean_of_all_sites() -> None:
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 8)).astype(np.float32)
    sites = [
        People(images[:2], np.array([50, 60], np.float32)),
        People(images, np.array([70, 70, 70], np.float32)),
    ]
    test = [
        People(images[:1], np.array([64], np.float32)),
        People(images[:2], np.array([80, 60], np.float32)),
    ]
    result = measured(sites, test)
    assert list(result) == NAMES
    assert result["mean predictor"].errors.tolist() == [0, 16, 4]
    assert result["mean predictor"].mae == pytest.approx(20 / 3)
    for yardstick in result.values():
        assert yardstick.errors.shape == (3,)
        assert yardstick.mae == pytest.approx(yardstick.errors.mean())


def test_growing_ventricles_are_found_by_both_regressors() -> None:
    result = yardsticks([people(40, 0), people(20, 1)], [people(30, 2)])
    mean = result["mean predictor"].mae
    assert mean > 7
    assert result["ventricle count"].mae < 0.15 * mean
    assert result["ridge on 8 mm voxels"].mae < 0.3 * mean


def test_noise_gives_nobody_an_advantage_and_ridge_shrinks_to_the_mean() -> None:
    result = measured([noise_people(120, 0)], [noise_people(120, 1)])
    mean = result["mean predictor"].mae
    for name in NAMES[1:]:
        assert 0.9 * mean < result[name].mae < 1.15 * mean


def test_ridge_finds_a_signal_spread_over_many_voxels() -> None:
    rng = np.random.default_rng(3)
    pattern = rng.normal(size=(12, 12, 12))

    def draw(n: int) -> People:
        ages = rng.uniform(45, 80, n)
        z = (ages - 62.5) / 10
        images = z[:, None, None, None] * pattern + rng.normal(size=(n, 12, 12, 12))
        return People(images.astype(np.float32), ages.astype(np.float32))

    result = measured([draw(80)], [draw(60)])
    assert result["ridge on 8 mm voxels"].mae < 0.2 * result["mean predictor"].mae


def test_errors_follow_the_order_of_the_test_people() -> None:
    first, second = people(6, 4), people(5, 5)
    train = [people(30, 6)]
    straight = measured(train, [first, second])
    turned = measured(train, [second, first])
    for name in NAMES:
        np.testing.assert_allclose(
            turned[name].errors, np.roll(straight[name].errors, 5), atol=1e-4
        )


def test_predictions_stay_within_the_training_ages() -> None:
    young = People(noise_people(20, 0).images, np.linspace(50, 55, 20, dtype=np.float32))
    old = People(100 * noise_people(20, 1).images, np.full(20, 90, np.float32))
    for yardstick in measured([young], [old]).values():
        assert yardstick.errors.min() >= 35
        assert yardstick.errors.max() <= 40


@pytest.mark.parametrize("n_train", [1, 2, 3])
def test_a_few_people_are_enough_to_run(n_train: int) -> None:
    for yardstick in measured([noise_people(n_train, 0)], [noise_people(2, 1)]).values():
        assert np.isfinite(yardstick.errors).all()


def test_volumes_that_are_all_equal_give_the_mean() -> None:
    same = People(np.ones((5, 12, 12, 12), np.float32), np.arange(50, 55, dtype=np.float32))
    for yardstick in measured([same], [same]).values():
        np.testing.assert_allclose(yardstick.errors, [2, 1, 0, 1, 2], atol=1e-9)


def test_nobody_to_train_or_test_on_raises() -> None:
    nobody = People(np.empty((0, 12, 12, 12), np.float32), np.empty(0, np.float32))
    with pytest.raises(ArgumentError, match="got 0 and 2"):
        measured([nobody], [noise_people(2, 0)])
    with pytest.raises(ArgumentError, match="got 2 and 0"):
        measured([noise_people(2, 0)], [])


@pytest.mark.parametrize(("shape", "voxel_mm"), [((46, 55, 46), 4.0), ((91, 109, 91), 2.0)])
@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (250.0, -40.0)])
def test_the_ventricle_volume_is_in_millilitres_on_any_intensity_scale(
    shape: tuple[int, int, int], voxel_mm: float, gain: float, offset: float
) -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(1.0, 0.02, shape)
    step = round(8 / voxel_mm)
    begin = [round((at - origin) / voxel_mm) for at, origin in ((-10, -90), (-26, -126), (4, -72))]
    volume[tuple(slice(b, b + 3 * step) for b in begin)] = 0.2  # 24 mm cubed
    volume[:2] = 0  # background outside the box
    found = ventricle_volume(gain * volume + offset, voxel_mm)
    assert found == pytest.approx(24**3 / 1000, rel=1e-6)


def test_block_means_repeat_the_rim() -> None:
    volume = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    means = block_means(volume, 2)
    assert means.shape == (2, 2, 1)
    assert means[0, 0, 0] == volume[:2, :2].mean()
    assert means[1, 1, 0] == volume[2, 2:].mean()
    np.testing.assert_array_equal(block_means(volume, 1), volume)
