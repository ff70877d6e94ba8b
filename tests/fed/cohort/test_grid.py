import nibabel
import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.grid import Grid, Placement, place
from sparsekit.fed.cohort.tables import Fault

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

TWO = Grid.of((91, 109, 91), 2)
FOUR = Grid.of((46, 55, 46), 4.0)


def affine_of(sizes: tuple[float, float, float], origin: tuple[float, float, float]) -> Affine:
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = origin
    return affine


def blob(shape: tuple[int, int, int], affine: Affine, at_mm: tuple[float, ...]) -> Array:
    """Return a smooth ball of 8 mm around a world point, on a faint background of 1."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    squared = ((world - np.asarray(at_mm)) ** 2).sum(-1)
    return np.asarray(1 + 100 * np.exp(-squared / (2 * 8.0**2)), np.float32)


def placed(data: Array, affine: Affine, grid: Grid, code: int = 4) -> tuple[Array, Placement]:
    result = place(data, affine, code, grid)
    assert not isinstance(result, Fault)
    assert result[0].shape == grid.shape
    assert result[0].dtype == np.float32
    assert result[0].flags.c_contiguous
    return result


def centre_of_mass_mm(volume: Array, grid: Grid) -> Affine:
    weights = np.where(volume > 40, volume, 0).astype(np.float64)
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
    mean = (index * weights[..., None]).sum((0, 1, 2)) / weights.sum()
    return np.asarray(grid.affine[:3, :3] @ mean + grid.affine[:3, 3])


def test_the_usual_grids_begin_where_mni_grids_begin() -> None:
    for grid in (TWO, FOUR):
        np.testing.assert_array_equal(grid.affine[:3, 3], [-90, -126, -72])
    assert str(FOUR) == "46x55x46@4x4x4mm"


def test_a_scan_on_the_grid_is_untouched() -> None:
    data = np.random.default_rng(0).normal(size=TWO.shape).astype(np.float32)
    volume, placement = placed(data, TWO.affine, TWO)
    np.testing.assert_array_equal(volume, data)
    assert placement == Placement("RAS", "91x109x91@2x2x2mm", "as-is", "world", 0.0, 0.0)


def test_left_and_right_are_put_right() -> None:
    data = np.random.default_rng(0).normal(size=TWO.shape).astype(np.float32)
    volume, placement = placed(data[::-1], affine_of((-2, 2, 2), (90, -126, -72)), TWO)
    np.testing.assert_array_equal(volume, data)
    assert (placement.axes, placement.action) == ("LAS", "as-is")


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPI", "PSR", "ALI", "SRP"])
def test_any_order_of_axes_gives_the_same_volume(axes: str) -> None:
    data = blob(FOUR.shape, FOUR.affine, (20, 10, 30))
    turn = nibabel.orientations.axcodes2ornt(axes)
    turned = nibabel.apply_orientation(
        data, nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), turn)
    )
    back = nibabel.orientations.inv_ornt_aff(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), turn), data.shape
    )
    volume, placement = placed(turned, FOUR.affine @ back, FOUR)
    np.testing.assert_array_equal(volume, data)
    assert placement.axes == axes


def test_the_larger_template_grid_is_cropped_at_the_right_place() -> None:
    affine = affine_of((2, 2, 2), (-96, -132, -78))
    data = blob((97, 115, 97), affine, (20, 10, 30))
    volume, placement = placed(data, affine, TWO)
    np.testing.assert_array_equal(volume, data[3:94, 3:112, 3:94])
    assert volume[55, 68, 51] == volume.max()  # (20, 10, 30) mm
    assert (placement.action, placement.anchor) == ("pad-crop", "world")


def test_a_smaller_grid_is_padded_with_zeros() -> None:
    affine = affine_of((2, 2, 2), (-74, -108, -72))
    data = blob((73, 91, 78), affine, (20, 10, 30))
    volume, placement = placed(data, affine, TWO)
    np.testing.assert_array_equal(volume[8:81, 9:100, :78], data)
    assert np.count_nonzero(volume) == data.size
    assert placement.action == "pad-crop"


def test_half_a_voxel_is_left_and_recorded() -> None:
    affine = affine_of((2, 2, 2), (-89.2, -126, -72))
    volume, placement = placed(blob(TWO.shape, affine, (0, 0, 0)), affine, TWO)
    assert placement.action == "as-is"
    assert placement.residual_mm == 0.8
    assert volume.max() > 90


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        pytest.param((182, 218, 182), affine_of((-1, 1, 1), (90, -126, -72)), id="fsl-1mm"),
        pytest.param((193, 229, 193), affine_of((1, 1, 1), (-96, -132, -78)), id="2009c-1mm"),
        pytest.param((91, 109, 91), TWO.affine, id="2mm"),
        pytest.param((121, 145, 121), affine_of((1.5, 1.5, 1.5), (-90, -126, -72)), id="1.5mm"),
        pytest.param((80, 146, 61), affine_of((2.3, 1.5, 3), (-90, -126, -72)), id="uneven"),
    ],
)
@pytest.mark.parametrize("grid", [TWO, FOUR], ids=str)
def test_a_point_of_the_world_stays_where_it_is(
    shape: tuple[int, int, int], affine: Affine, grid: Grid
) -> None:
    volume, placement = placed(blob(shape, affine, (22, 8, 30)), affine, grid)
    np.testing.assert_allclose(centre_of_mass_mm(volume, grid), (22, 8, 30), atol=0.25)
    assert placement.action == ("as-is" if shape == grid.shape else "resample")


def test_a_tilted_scan_is_resampled_upright() -> None:
    angle = np.deg2rad(12)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = tilt @ TWO.affine
    volume, placement = placed(blob(TWO.shape, affine, (22, 8, 30)), affine, TWO)
    np.testing.assert_allclose(centre_of_mass_mm(volume, TWO), (22, 8, 30), atol=0.25)
    assert placement.action == "resample"


def test_resampling_keeps_a_uniform_brain_uniform_and_the_background_zero() -> None:
    affine = affine_of((1, 1, 1), (-90, -126, -72))
    data = np.zeros((181, 217, 181), np.float32)
    data[40:140, 40:180, 40:140] = 500
    volume, _ = placed(data, affine, TWO)
    inside = volume[23:67, 23:87, 23:67]
    np.testing.assert_allclose(inside, 500, rtol=1e-5)
    expected = np.zeros(TWO.shape, bool)
    expected[20:70, 20:90, 20:70] = True
    assert np.count_nonzero((volume > 0) != expected) <= 8  # the corners are an eighth covered


def test_a_world_origin_that_says_nothing_is_not_used() -> None:
    affine = affine_of((2, 2, 2), (0, 0, 0))
    data = blob((93, 111, 93), affine, (92, 110, 92))
    volume, placement = placed(data, affine, TWO, code=1)
    np.testing.assert_array_equal(volume, data[1:92, 1:110, 1:92])
    assert placement.anchor == "centre"


def test_the_mni_code_makes_a_far_origin_count() -> None:
    affine = affine_of((2, 2, 2), (-90, -126, -10))
    data = np.zeros((91, 109, 91), np.float32)
    data[:, :, :60] = blob((91, 109, 60), affine, (0, -18, 30)) - 1
    volume, placement = placed(data, affine, TWO, code=4)
    np.testing.assert_array_equal(volume[:, :, 31:], data[:, :, :60])
    assert placement.anchor == "world"


def test_a_brain_outside_the_grid_is_refused() -> None:
    affine = affine_of((2, 2, 2), (-90, -126, 60))
    data = blob((91, 109, 91), affine, (0, -18, 150))
    fault = place(data, affine, 4, TWO)
    assert isinstance(fault, Fault)
    assert fault.kind == "wrong-grid"
    assert "lies outside the model's 91x109x91@2x2x2mm" in fault.detail


@pytest.mark.parametrize(
    ("shape", "voxel_mm", "message"),
    [
        ((91, 109), 2.0, "in_shape: expected three positive extents"),
        ((91, 109, 0), 2.0, "in_shape: expected three positive extents"),
        ((91, 109, 91), 0.0, "voxel_mm: expected one or three positive sizes"),
        ((91, 109, 91), (2.0, 2.0), "voxel_mm: expected one or three positive sizes"),
        ((91, 109, 91), float("nan"), "voxel_mm: expected one or three positive sizes"),
    ],
)
def test_a_grid_needs_three_extents_and_sizes(
    shape: tuple[int, ...], voxel_mm: float | tuple[float, ...], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        Grid.of(shape, voxel_mm)
