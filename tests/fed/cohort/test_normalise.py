import numpy as np
import pytest

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.grid import Grid
from sparsekit.fed.cohort.normalise import METHODS, normalise, preprocessing_id
from sparsekit.fed.cohort.tables import Fault


@pytest.fixture
def brain() -> np.ndarray:
    """A volume whose brain holds 1..500 once each, in 20 % of the grid."""
    volume = np.zeros((10, 25, 10), np.float32)
    volume[2:7, 5:15, :] = np.random.default_rng(0).permutation(500).reshape(5, 10, 10) + 1
    return volume


def normal(volume: np.ndarray, method: str) -> np.ndarray:
    result = normalise(volume, method)
    assert not isinstance(result, Fault)
    assert result.dtype == np.float32
    assert result.shape == volume.shape
    return result


def test_brain_zscore_standardises_the_brain_and_leaves_the_background_zero(
    brain: np.ndarray,
) -> None:
    result = normal(brain, "brain-zscore")
    inside = brain > 0
    expected = (brain[inside] - 250.5) / np.sqrt((500**2 - 1) / 12)
    np.testing.assert_allclose(result[inside], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result[~inside], 0)


def test_volume_zscore_standardises_all_voxels(brain: np.ndarray) -> None:
    result = normal(brain, "volume-zscore")
    expected = (brain - brain.mean(dtype=np.float64)) / brain.std(dtype=np.float64)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert result[0, 0, 0] < -0.4


def test_percentile_scales_the_brain_to_0_and_1_and_clips_its_tails(brain: np.ndarray) -> None:
    result = normal(brain, "percentile")
    inside = brain > 0
    low, high = 5.99, 495.01  # 1st and 99th percentile of 1..500
    expected = np.clip((brain[inside] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(result[inside], expected, atol=1e-6)
    np.testing.assert_array_equal(result[~inside], 0)
    assert (result == 1).sum() == 5


@pytest.mark.parametrize("method", METHODS)
def test_the_intensity_scale_of_the_scanner_does_not_matter(brain: np.ndarray, method: str) -> None:
    np.testing.assert_allclose(normal(brain * 37, method), normal(brain, method), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_volumes_without_a_brain_or_contrast_are_faults(method: str) -> None:
    volume = np.zeros((10, 10, 10), np.float32)
    volume[0, 0, :4] = (1, 2, 3, 4)
    fault = normalise(volume, method)
    assert isinstance(fault, Fault)
    assert fault.kind == "no-brain"
    fault = normalise(np.full((10, 10, 10), 7, np.float32), method)
    assert isinstance(fault, Fault)
    assert fault.kind == "constant"


def test_a_mask_given_for_a_scan_is_a_fault(brain: np.ndarray) -> None:
    for method in ("brain-zscore", "percentile"):
        fault = normalise((brain > 0).astype(np.float32), method)
        assert isinstance(fault, Fault)
        assert fault.kind == "constant"


def test_an_unknown_method_raises(brain: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match=r"normalisation: expected one of .*got 'minmax'"):
        normalise(brain, "minmax")


def test_the_preprocessing_id_names_grid_method_and_type() -> None:
    name = preprocessing_id(Grid.of((46, 55, 46), 4.0), "volume-zscore", np.dtype("float32"))
    assert name == "v1/46x55x46@4x4x4mm/RAS/linear/volume-zscore/float32"
