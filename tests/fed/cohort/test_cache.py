import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.errors import ArgumentError, CohortError
from sparsekit.fed.cohort import cache as cache_module
from sparsekit.fed.cohort import volume as volume_module
from sparsekit.fed.cohort.cache import SiteData, build_site_cache
from sparsekit.fed.cohort.read import Scan

WriteBrain = Callable[..., Path]
SHAPE = (46, 55, 46)


@pytest.fixture
def scans(tmp_path: Path, write_brain: WriteBrain) -> list[Scan]:
    """Three scans of site A on the 4 mm grid."""
    return [
        Scan(f"sub-{i}", None, write_brain(tmp_path / f"{i}.nii.gz", i), 60.0 + i, None, "A")
        for i in range(3)
    ]


def build(scans: list[Scan], root: Path, **options: Any) -> SiteData:
    grid: dict[str, Any] = {"in_shape": SHAPE, "voxel_mm": 4.0}
    return build_site_cache(scans, root, **(grid | options))


def arrays(root: Path) -> set[str]:
    return {path.name for path in root.glob("*.npy")}


def temporaries(root: Path) -> list[Path]:
    return list(root.glob(".*"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    read: list[Path] = []
    original = volume_module.load_scan

    def counting(scan: Scan) -> Any:
        read.append(scan.path)
        return original(scan)

    monkeypatch.setattr(cache_module, "load_scan", counting)
    return read


def test_a_site_becomes_one_memory_mapped_array(scans: list[Scan], tmp_path: Path) -> None:
    data = build(scans, tmp_path / "cache")
    assert isinstance(data.images, np.memmap)
    assert data.images.shape == (3, *SHAPE)
    assert data.images.dtype == np.float16
    assert not data.images.flags.writeable
    assert data.ages.tolist() == [60, 61, 62]
    assert data.ages.dtype == np.float32
    assert data.participants == ("sub-0", "sub-1", "sub-2")
    assert data.preprocessing_id == "v1/46x55x46@4x4x4mm/RAS/linear/brain-zscore/float16"
    assert data.voxel_mm == (4.0, 4.0, 4.0)
    assert data.skipped == ()
    for volume in data.images.astype(np.float64):
        inside = volume[volume != 0]
        assert abs(inside.mean()) < 1e-3
        assert abs(inside.std() - 1) < 1e-3
    assert temporaries(tmp_path / "cache") == []


def test_a_second_call_reads_no_scan_and_gives_the_same_bytes(
    scans: list[Scan], tmp_path: Path, reads: list[Path]
) -> None:
    first = build(scans, tmp_path / "cache")
    assert len(reads) == 3
    second = build(scans, tmp_path / "cache")
    assert len(reads) == 3
    np.testing.assert_array_equal(first.images, second.images)
    assert second.participants == first.participants


def test_ages_are_those_of_the_call_and_not_of_the_cache(
    scans: list[Scan], tmp_path: Path, reads: list[Path]
) -> None:
    build(scans, tmp_path / "cache")
    corrected = [replace(scans[0], age=71.0), *scans[1:]]
    assert build(corrected, tmp_path / "cache").ages.tolist() == [71, 61, 62]
    assert len(reads) == 3


@pytest.mark.parametrize(
    "option",
    [
        {"normalisation": "volume-zscore"},
        {"normalisation": "percentile"},
        {"dtype": "float32"},
        {"in_shape": (40, 48, 40)},
        {"in_shape": (23, 28, 23), "voxel_mm": 8.0},
        {"voxel_mm": (4.0, 4.0, 4.5)},
    ],
    ids=str,
)
def test_another_option_never_takes_the_old_array(
    scans: list[Scan], tmp_path: Path, option: dict[str, Any]
) -> None:
    root = tmp_path / "cache"
    before = build(scans, root)
    other = build(scans, root, **option)
    alone = build(scans, tmp_path / "fresh", **option)
    assert len(arrays(root)) == 2
    assert other.preprocessing_id != before.preprocessing_id
    np.testing.assert_array_equal(other.images, alone.images)


def test_a_changed_file_never_takes_the_old_array(
    scans: list[Scan], tmp_path: Path, write_brain: WriteBrain
) -> None:
    root = tmp_path / "cache"
    path = write_brain(tmp_path / "plain.nii", 5)
    scans[1] = replace(scans[1], path=path)
    before = np.array(build(scans, root).images)
    stat = path.stat()
    content = write_brain(tmp_path / "other.nii", 77).read_bytes()
    with path.open("r+b") as file:
        file.write(content)
    # Size, time and inode are as before, as some copying tools leave them.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = build(scans, root).images
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.any(after[1] != before[1])
    assert len(arrays(root)) == 2


def test_the_same_content_at_another_time_takes_the_same_array(
    scans: list[Scan], tmp_path: Path
) -> None:
    build(scans, tmp_path / "cache")
    before = arrays(tmp_path / "cache")
    os.utime(scans[0].path, ns=(1, 1))
    build(scans, tmp_path / "cache")
    assert arrays(tmp_path / "cache") == before


def test_order_and_choice_of_scans_decide_the_rows(scans: list[Scan], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    straight = build(scans, root).images
    turned = build(scans[::-1], root)
    np.testing.assert_array_equal(turned.images, straight[::-1])
    assert turned.participants == ("sub-2", "sub-1", "sub-0")
    np.testing.assert_array_equal(build(scans[:1], root).images, straight[:1])


@pytest.mark.parametrize("damage", ["gone", "cut", "manifest"])
def test_a_damaged_cache_is_built_again(scans: list[Scan], tmp_path: Path, damage: str) -> None:
    root = tmp_path / "cache"
    good = np.array(build(scans, root).images)
    (array,) = root.glob("*.npy")
    if damage == "gone":
        array.unlink()
    elif damage == "cut":
        array.write_bytes(array.read_bytes()[:-1000])
    else:
        array.with_suffix(".json").write_text("{", encoding="utf-8")
    np.testing.assert_array_equal(build(scans, root).images, good)


def test_a_build_that_fails_half_way_leaves_nothing(scans: list[Scan], tmp_path: Path) -> None:
    root = tmp_path / "cache"

    def interrupt(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(scans, root, progress=interrupt)
    assert list(root.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from sparsekit.fed.cohort.cache import build_site_cache
from sparsekit.fed.cohort.read import Scan

def die(done, total):
    if done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

scan = Scan("p", None, Path(sys.argv[1]), 60.0, None, "A")
build_site_cache([scan, scan], Path(sys.argv[2]), in_shape=(46, 55, 46), voxel_mm=4, progress=die)
"""


def test_a_killed_build_leaves_no_final_name_and_the_next_one_cleans_up(
    scans: list[Scan], tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(scans[0].path), str(root)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert arrays(root) == set()
    assert len(temporaries(root)) == 1
    build(scans, root)
    assert temporaries(root) == []


def test_the_temporary_of_a_living_build_is_left_alone(scans: list[Scan], tmp_path: Path) -> None:
    """A second build starts and ends while the first is under way; both succeed."""
    root = tmp_path / "cache"
    inner: list[SiteData] = []

    def build_inside(done: int, total: int) -> None:
        assert total == 3
        if done == 1:
            assert len(temporaries(root)) == 1
            inner.append(build(scans, root))
            assert len(temporaries(root)) == 1

    outer = build(scans, root, progress=build_inside)
    np.testing.assert_array_equal(outer.images, inner[0].images)
    assert len(arrays(root)) == 1
    assert temporaries(root) == []


@pytest.fixture
def with_bad_scans(scans: list[Scan], tmp_path: Path) -> list[Scan]:
    """The middle one of three is cut off; a fourth does not exist."""
    scans[1].path.write_bytes(scans[1].path.read_bytes()[:-10])
    return [*scans, replace(scans[0], participant="sub-3", path=tmp_path / "absent.nii.gz")]


def test_bad_scans_are_refused_with_their_names_and_the_remedy(
    with_bad_scans: list[Scan], tmp_path: Path
) -> None:
    with pytest.raises(CohortError, match="2 of 4 scans cannot be used: ") as caught:
        build(with_bad_scans, tmp_path / "cache")
    text = str(caught.value)
    assert f"{with_bad_scans[1].path} (truncated: " in text
    assert "absent.nii.gz (missing-file: " in text
    assert "sparsekit cohort check" in text
    assert "--on-problem skip" in text


def test_bad_scans_are_skipped_and_listed_at_the_first_and_every_later_call(
    with_bad_scans: list[Scan], tmp_path: Path, reads: list[Path]
) -> None:
    for _ in range(2):
        data = build(with_bad_scans, tmp_path / "cache", on_problem="skip")
        assert data.images.shape == (2, *SHAPE)
        assert data.participants == ("sub-0", "sub-2")
        assert data.ages.tolist() == [60, 62]
        assert [(p.kind, p.participant) for p in data.skipped] == [
            ("truncated", "sub-1"),
            ("missing-file", "sub-3"),
        ]
        assert len(reads) == 4
    with pytest.raises(CohortError, match="2 of 4 scans"):
        build(with_bad_scans, tmp_path / "cache")


def test_a_repaired_scan_is_taken_in(
    with_bad_scans: list[Scan], tmp_path: Path, write_brain: WriteBrain
) -> None:
    build(with_bad_scans, tmp_path / "cache", on_problem="skip")
    write_brain(with_bad_scans[1].path, 1)
    write_brain(with_bad_scans[3].path, 3)
    assert build(with_bad_scans, tmp_path / "cache").images.shape == (4, *SHAPE)


def test_a_site_of_bad_scans_only_is_refused_even_when_skipping(
    with_bad_scans: list[Scan], tmp_path: Path
) -> None:
    with pytest.raises(CohortError, match="1 of 1 scans cannot be used"):
        build(with_bad_scans[1:2], tmp_path / "cache", on_problem="skip")
    assert arrays(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("nan", "nan"), ("no-affine", "no-affine"), ("shifted", "wrong-grid"), ("dim", "no-brain")],
)
def test_volumes_unfit_for_training_are_refused(
    tmp_path: Path, save_volume: Callable[..., Path], problem: str, kind: str
) -> None:
    data = np.random.default_rng(0).normal(500, 50, SHAPE).astype(np.float32)
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = (-90, -126, 100 if problem == "shifted" else -72)
    if problem == "nan":
        data[0, 0, 0] = np.nan
    if problem == "dim":
        data = -data
    path = save_volume(tmp_path / "a.nii.gz", data, affine, code=0 if problem == "no-affine" else 4)
    with pytest.raises(CohortError, match=f"\\({kind}: "):
        build([Scan("p", None, path, 60.0, None, "A")], tmp_path / "cache")


def test_what_was_done_to_each_scan_is_recorded(tmp_path: Path, write_brain: WriteBrain) -> None:
    paths = [
        write_brain(tmp_path / "same.nii.gz"),
        write_brain(tmp_path / "larger.nii.gz", shape=(50, 59, 50), origin=(-98, -134, -80)),
        write_brain(tmp_path / "finer.nii.gz", shape=(91, 109, 91), voxel_mm=2.0),
    ]
    scans = [Scan(str(i), None, path, 60.0, None, "A") for i, path in enumerate(paths)]
    build(scans, tmp_path / "cache")
    (array,) = (tmp_path / "cache").glob("*.npy")
    manifest = json.loads(array.with_suffix(".json").read_bytes())
    assert [row["placement"]["action"] for row in manifest["rows"]] == [
        "as-is",
        "pad-crop",
        "resample",
    ]
    assert manifest["preprocessing_id"].startswith("v1/46x55x46@4x4x4mm/")


def test_sites_with_odd_names_get_files_of_their_own(scans: list[Scan], tmp_path: Path) -> None:
    for site in ("../x", "São Paulo/1", ""):
        named = [replace(scan, site=site) for scan in scans]
        assert build(named, tmp_path / "cache").site == site
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["cache"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"on_problem": "ignore"}, "on_problem: expected refuse or skip, got 'ignore'"),
        ({"dtype": "int8"}, "dtype: expected float16 or float32, got 'int8'"),
        ({"normalisation": "none"}, "normalisation: expected one of"),
        ({"in_shape": (46, 55)}, "in_shape: expected three positive extents"),
    ],
    ids=str,
)
def test_an_unknown_option_raises(
    scans: list[Scan], tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(scans, tmp_path / "cache", **option)


def test_scans_must_be_of_one_site(scans: list[Scan], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="got 2 sites"):
        build([*scans, replace(scans[0], site="B")], tmp_path / "cache")
    with pytest.raises(ArgumentError, match="got 0 sites"):
        build([], tmp_path / "cache")
