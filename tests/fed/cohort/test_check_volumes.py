import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from sparsekit.fed.cohort.grid import Grid, place
from sparsekit.fed.cohort.scans import Scan
from sparsekit.fed.cohort.tables import Fault
from sparsekit.fed.cohort.volume import (
    MAX_VOXELS,
    ScanError,
    digest_file,
    load_scan,
    read_volume,
    volume_faults,
)

WriteBrain = Callable[..., Path]
SaveVolume = Callable[..., Path]


def noise(shape: tuple[int, ...] = (9, 8, 7)) -> np.ndarray:
    return np.random.default_rng(5).integers(-300, 3000, shape).astype(np.int16)


def kind_of(path: Path) -> str:
    with pytest.raises(ScanError) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)
    return caught.value.fault.kind


def faults_of(path: Path) -> list[str]:
    return [fault.kind for fault in volume_faults(read_volume(path))]


def rewrite(path: Path, change: Callable[[bytearray], None]) -> Path:
    """Change the NIfTI bytes inside a .nii.gz and compress them again."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    change(content)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", ">i2", "int32", "float32", ">f4", "float64", "uint16"]
)
def test_voxels_and_affine_are_those_that_nibabel_reads(
    tmp_path: Path, save_volume: SaveVolume, name: str, dtype: str
) -> None:
    data = np.abs(noise()).astype(dtype) if dtype != "uint8" else noise().astype(np.uint8)
    path = save_volume(tmp_path / name, data)
    volume = read_volume(path)
    image = nibabel.Nifti1Image.from_filename(path)
    np.testing.assert_array_equal(volume.data, np.asarray(image.dataobj, np.float32))
    np.testing.assert_array_equal(volume.affine, image.affine)
    assert volume.data.dtype == np.float32
    assert volume.space_code == 4
    assert volume.n_bytes == path.stat().st_size
    assert volume.digest == digest_file(path)
    assert volume_faults(volume) == []


def test_scale_factors_are_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(noise() * np.float32(0.37) + 5, np.diag([4.0, 4, 4, 1]))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    expected = nibabel.Nifti1Image.from_filename(tmp_path / "a.nii.gz").get_fdata()
    # float32 is good to 1e-7 of the largest value, 1100.
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").data, expected, atol=2e-4)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_of_nifti_and_trailing_single_axes_are_read(
    tmp_path: Path, kind: type[nibabel.Nifti1Image]
) -> None:
    nibabel.save(kind(noise()[..., None, None], np.diag([2.0, 3, 4, 1])), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.data, noise())
    np.testing.assert_array_equal(np.diag(volume.affine), [2, 3, 4, 1])


def test_the_affine_may_come_from_the_qform(tmp_path: Path) -> None:
    affine = np.diag([-2.0, 3, 4, 1])
    image = nibabel.Nifti1Image(noise(), None)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.space_code == 1


def read_or_kind(path: Path) -> str:
    try:
        read_volume(path)
    except ScanError as error:
        return error.fault.kind
    return "read"


def test_every_single_flipped_bit_is_detected_or_changes_nothing(
    tmp_path: Path, write_brain: WriteBrain
) -> None:
    path = write_brain(tmp_path / "a.nii.gz", shape=(23, 28, 23), voxel_mm=8.0)
    good = path.read_bytes()
    content = gzip.decompress(good)
    n_bits = 8 * len(good)
    somewhere = np.random.default_rng(0).integers(0, n_bits, 300).tolist()
    read = []
    for position in [*range(80), *somewhere, *range(n_bits - 64, n_bits)]:
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        kind = read_or_kind(path)
        assert kind in {"read", "corrupt", "truncated", "not-nifti"}
        if kind == "read":
            read.append(position)
            assert gzip.decompress(damaged) == content
    # What may change: time, system and file name in gzip's header, padding bits, and distances
    # that point from one run of zeros into another.
    assert len([position for position in read if position >= 8 * 30]) <= 0.1 * len(somewhere)


@pytest.mark.parametrize("missing", [1, 4, 8, 9, 100, 2000])
def test_a_gzip_stream_that_ends_early_is_truncated(
    tmp_path: Path, write_brain: WriteBrain, missing: int
) -> None:
    path = write_brain(tmp_path / "a.nii.gz", shape=(23, 28, 23), voxel_mm=8.0)
    path.write_bytes(path.read_bytes()[:-missing])
    assert kind_of(path) == "truncated"


@pytest.mark.parametrize("kept", [4, 100, 347, 352, 1000])
def test_a_plain_file_that_ends_early_is_truncated(
    tmp_path: Path, save_volume: SaveVolume, kept: int
) -> None:
    path = save_volume(tmp_path / "a.nii", noise())
    path.write_bytes(path.read_bytes()[:kept])
    assert kind_of(path) == "truncated"


def test_a_whole_gzip_stream_of_half_a_volume_is_truncated(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    path = save_volume(tmp_path / "a.nii.gz", noise())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:700]))
    assert kind_of(path) == "truncated"


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("a.nii.gz", b"not an image at all", "not gzip data"),
        ("a.nii.gz", gzip.compress(b"text " * 200), "a text file"),
        ("a.nii.gz", gzip.compress(bytes(2000)), "no header"),
        ("a.nii", b"version https://git-lfs.github.com/spec/v1\n", "a pointer"),
        ("a.nii", gzip.compress(bytes(2000)), "under the name .nii"),
        ("a.nii.gz", gzip.compress(b"tiny"), "a text file"),
    ],
)
def test_what_is_not_nifti_is_named(tmp_path: Path, name: str, content: bytes, detail: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScanError) as caught:
        read_volume(tmp_path / name)
    assert caught.value.fault.kind == "not-nifti"
    assert detail in caught.value.fault.detail


def test_a_plain_nifti_under_a_gz_name_gets_the_right_remedy(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    save_volume(tmp_path / "a.nii", noise()).rename(tmp_path / "a.nii.gz")
    with pytest.raises(ScanError, match=r"rename it to \.nii$"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_an_empty_an_absent_and_an_unreadable_file_are_told_apart(
    tmp_path: Path, name: str
) -> None:
    assert kind_of(tmp_path / name) == "missing-file"
    (tmp_path / name).write_bytes(b"")
    assert kind_of(tmp_path / name) == "empty-file"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert kind_of(tmp_path / name) == "unreadable"


def test_dimensions_other_than_three_are_refused(tmp_path: Path, save_volume: SaveVolume) -> None:
    assert kind_of(save_volume(tmp_path / "a.nii.gz", noise((5, 5, 5, 2)))) == "4d"
    assert kind_of(save_volume(tmp_path / "b.nii.gz", noise((5, 5, 1)))) == "not-3d"


def test_complex_and_colour_voxels_are_refused(tmp_path: Path, save_volume: SaveVolume) -> None:
    assert kind_of(save_volume(tmp_path / "a.nii.gz", noise().astype(np.complex64))) == "not-scalar"
    colour = np.zeros((5, 5, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert kind_of(save_volume(tmp_path / "b.nii.gz", colour)) == "not-scalar"


@pytest.mark.parametrize(
    ("offset", "value", "kind"),
    [
        pytest.param(40, struct.pack("<8h", 3, 30000, 30000, 30000, 1, 1, 1, 1), "too-large"),
        pytest.param(40, struct.pack("<8h", 3, 500, 500, 500, 1, 1, 1, 1), "truncated"),
        pytest.param(40, struct.pack("<8h", 3, -9, 8, 7, 1, 1, 1, 1), "corrupt"),
        pytest.param(40, struct.pack("<8h", 99, 9, 8, 7, 1, 1, 1, 1), "corrupt"),
        pytest.param(108, struct.pack("<f", float("nan")), "corrupt"),
        pytest.param(108, struct.pack("<f", 1e30), "corrupt"),
        pytest.param(108, struct.pack("<f", 4.0), "corrupt"),
        pytest.param(70, struct.pack("<h", 12345), "not-scalar"),
        pytest.param(344, b"ni1\0", "not-nifti"),
    ],
    ids=["huge", "big", "negative", "dims", "offset-nan", "offset", "offset-4", "dtype", "pair"],
)
def test_an_absurd_header_is_refused_before_memory_is_taken(
    tmp_path: Path, save_volume: SaveVolume, offset: int, value: bytes, kind: str
) -> None:
    def change(content: bytearray) -> None:
        content[offset : offset + len(value)] = value

    assert kind_of(rewrite(save_volume(tmp_path / "a.nii.gz", noise()), change)) == kind
    assert MAX_VOXELS >= 500**3


def test_a_stream_that_goes_on_and_on_is_refused_early(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    path = save_volume(tmp_path / "a.nii.gz", noise())
    bomb = gzip.decompress(path.read_bytes()) + bytes(64 * 2**20)
    path.write_bytes(gzip.compress(bomb, compresslevel=1))
    assert kind_of(path) == "corrupt"
    path.write_bytes(gzip.compress(bomb[:3000]))
    assert read_volume(path).data.shape == (9, 8, 7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(
    tmp_path: Path, save_volume: SaveVolume, value: float
) -> None:
    data = noise().astype(np.float32)
    data[3, 3, 3:5] = value
    volume = read_volume(save_volume(tmp_path / "a.nii.gz", data))
    (fault,) = volume_faults(volume)
    assert fault.kind == "nan"
    assert fault.detail == "2 of 504 voxels are NaN or infinite"


def test_a_value_too_large_for_float32_counts_as_infinite(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    data = noise().astype(np.float64)
    data[0, 0, 0] = 1e300
    assert faults_of(save_volume(tmp_path / "a.nii.gz", data)) == ["nan"]


def test_constant_volumes_and_affines_that_say_nothing_are_faults(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    flat = np.full((5, 6, 7), 3, np.int16)
    assert faults_of(save_volume(tmp_path / "a.nii.gz", flat)) == ["constant"]
    assert faults_of(save_volume(tmp_path / "b.nii.gz", noise(), code=0)) == ["no-affine"]
    assert faults_of(save_volume(tmp_path / "c.nii.gz", flat, code=0)) == ["no-affine", "constant"]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[4, 0, 0, -90], [0, 4, 0, -126], [0, 0, 0, 0]], id="flat"),
        pytest.param([[4, 4, 0, -90], [0, 0.1, 0, -126], [0, 0, 4, 0]], id="nearly-flat"),
        pytest.param([[4, 0, 0, -90], [0, 4000, 0, -126], [0, 0, 4, -72]], id="metres"),
        pytest.param([[4, 0, 0, -90], [0, 4, 0, np.nan], [0, 0, 4, -72]], id="nan"),
        pytest.param([[4, 0, 0, 1e30], [0, 4, 0, -126], [0, 0, 4, -72]], id="far"),
    ],
)
def test_an_affine_that_cannot_be_meant_is_a_fault(
    tmp_path: Path, save_volume: SaveVolume, rows: list[list[float]]
) -> None:
    def change(content: bytearray) -> None:
        content[280:328] = struct.pack("<12f", *np.ravel(rows))

    path = rewrite(save_volume(tmp_path / "a.nii.gz", noise()), change)
    assert faults_of(path) == ["bad-affine"]


def test_a_header_of_random_bytes_never_ends_in_another_error(
    tmp_path: Path, write_brain: WriteBrain
) -> None:
    path = write_brain(tmp_path / "a.nii", shape=(23, 28, 23), voxel_mm=8.0)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    grid = Grid.of((23, 28, 23), 8.0)
    kinds = set()
    for _ in range(400):
        damaged = bytearray(good)
        for position in rng.integers(0, 352, 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            volume = load_scan(Scan("p", None, path, 60.0, None, "A"))
        except ScanError as error:
            kinds.add(error.fault.kind)
            continue
        placed = place(volume.data, volume.affine, volume.space_code, grid)
        assert isinstance(placed, Fault) or np.isfinite(placed[0]).all()
    assert {"not-nifti", "corrupt", "bad-affine"} <= kinds


def scan_with_mask(path: Path, mask: Path) -> Scan:
    return Scan("p", None, path, 60.0, None, "A", mask)


def test_a_mask_sets_the_rest_to_zero_and_counts_in_the_digest(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    path = save_volume(tmp_path / "a.nii.gz", noise())
    inside = noise() > 700
    mask = save_volume(tmp_path / "m.nii.gz", inside.astype(np.uint8))
    volume = load_scan(scan_with_mask(path, mask))
    np.testing.assert_array_equal(volume.data, np.where(inside, noise(), 0))
    assert volume.digest == f"{digest_file(path)}+{digest_file(mask)}"


def test_a_mask_of_another_grid_or_without_content_is_refused(
    tmp_path: Path, save_volume: SaveVolume
) -> None:
    path = save_volume(tmp_path / "a.nii.gz", noise())
    other = save_volume(tmp_path / "m.nii.gz", np.ones((9, 8, 6), np.uint8))
    with pytest.raises(ScanError, match="mask-grid"):
        load_scan(scan_with_mask(path, other))
    empty = save_volume(tmp_path / "e.nii.gz", np.zeros((9, 8, 7), np.uint8))
    with pytest.raises(ScanError, match="the mask is empty"):
        load_scan(scan_with_mask(path, empty))
