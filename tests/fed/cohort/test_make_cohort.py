import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from sparsekit.errors import UsageError
from sparsekit.fed.cohort.make import cohort as cohort_module
from sparsekit.fed.cohort.make import make_cohort
from sparsekit.fed.cohort.make.people import draw_person

SMALL: dict[str, Any] = {"subjects": 10, "sites": 2, "environment": "skewed-noniid", "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("made") / "cohort", **SMALL)


def rows_of(path: Path) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_folder_is_a_bids_derivative_that_says_synthetic(made: Path) -> None:
    description = json.loads((made / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["BIDSVersion"]
    assert description["Name"].startswith("SYNTHETIC")
    assert "SYNTHETIC" in description["GeneratedBy"][0]["Description"]
    people = rows_of(made / "participants.tsv")
    assert list(people[0]) == ["participant_id", "age", "sex", "site"]
    assert [row["participant_id"] for row in people] == [f"sub-{i:05d}" for i in range(1, 11)]
    assert {row["sex"] for row in people} <= {"F", "M"}
    assert [row["site"] for row in people] == ["site-1"] * 6 + ["site-2"] * 4
    columns = json.loads((made / "participants.json").read_text())
    assert set(columns) == {"age", "sex", "site"}
    for row in people:
        assert len(list((made / row["participant_id"] / "anat").iterdir())) == 1
    sidecar = made / "space-MNI152NLin2009aSym_res-4_desc-preproc_T1w.json"
    assert json.loads(sidecar.read_text())["SkullStripped"] is True


def test_asked_volumes_lie_beside_the_participants(made: Path) -> None:
    volumes = rows_of(made / "phenotype" / "volumes.tsv")
    assert [row["participant_id"] for row in volumes] == [f"sub-{i:05d}" for i in range(1, 11)]
    assert len(volumes[0]) == 11
    for row in volumes:
        assert 900_000 < float(row["intracranial"]) < 2_300_000
        assert 2_000 < float(row["hippocampus"]) < 14_000
    assert set(json.loads((made / "phenotype" / "volumes.json").read_text())) == set(
        list(volumes[0])[1:]
    )


def check_scan(path: Path, resolution: int, shape: tuple[int, int, int]) -> None:
    image = nib.Nifti1Image.from_filename(path)
    assert image.shape == shape
    assert image.get_data_dtype() == np.int16
    assert nib.orientations.aff2axcodes(image.affine) == ("R", "A", "S")
    expected = np.diag([resolution, resolution, resolution, 1.0])
    expected[:3, 3] = (-90, -126, -72)
    assert np.array_equal(np.asarray(image.affine), expected)
    assert np.array_equal(np.asarray(image.header.get_qform()), expected)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 4
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_slope_inter() in ((1.0, 0.0), (None, None))
    voxels = np.asarray(image.dataobj)
    share = np.count_nonzero(voxels) / voxels.size
    assert 0.12 < share < 0.4
    assert voxels.min() == 0
    assert voxels.max() > 300
    for face in (voxels[[0, -1]], voxels[:, [0, -1]], voxels[:, :, -1:]):
        assert not face.any()


def test_scans_have_the_4_mm_grid(made: Path) -> None:
    paths = sorted(made.glob("sub-*/anat/*_T1w.nii.gz"))
    assert len(paths) == 10
    assert paths[0].name == "sub-00001_space-MNI152NLin2009aSym_res-4_desc-preproc_T1w.nii.gz"
    for path in paths:
        check_scan(path, 4, (46, 55, 46))


def test_scans_have_the_2_mm_grid(tmp_path: Path) -> None:
    make_cohort(tmp_path / "fine", subjects=4, sites=1, resolution=2)
    path = next(tmp_path.glob("fine/sub-00001/anat/*_res-2_*_T1w.nii.gz"))
    check_scan(path, 2, (91, 109, 91))


def test_streams_carry_neither_time_nor_name(made: Path) -> None:
    path = next(made.glob("sub-00001/anat/*_T1w.nii.gz"))
    head = path.read_bytes()[:10]
    assert head[:3] == b"\x1f\x8b\x08"
    assert head[3] == 0, "flags: a name is stored"
    assert head[4:8] == b"\0\0\0\0", "a time is stored"
    assert len(gzip.decompress(path.read_bytes())) == 352 + 46 * 55 * 46 * 2


def test_same_seed_same_bytes_with_any_number_of_workers(made: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    again = make_cohort(
        tmp_path / "again",
        **SMALL,
        workers=2,
        progress=lambda done, all_: counts.append((done, all_)),
    )
    assert files_of(again) == files_of(made)
    assert sorted(counts)[-1] == (10, 10)
    assert len(counts) == 2


def test_another_seed_gives_other_people_and_scans(made: Path, tmp_path: Path) -> None:
    other = make_cohort(tmp_path / "other", **{**SMALL, "seed": 4})
    first, second = files_of(made), files_of(other)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert len([name for name in different if name.endswith("_T1w.nii.gz")]) == 10
    assert "participants.tsv" in different


def test_a_person_does_not_depend_on_who_else_is_asked_for() -> None:
    few = cohort_module.CohortSettings(16, 2).plans()
    many = cohort_module.CohortSettings(160, 2).plans()
    a = draw_person(few, 5, seed=9, residual_scale=0.5)
    b = draw_person(many, 5, seed=9, residual_scale=0.5)
    assert (a.age, a.male, a.log_icv) == (b.age, b.male, b.log_icv)
    assert np.array_equal(a.log_fractions, b.log_fractions)


def test_ages_follow_the_environment_and_stay_in_range() -> None:
    settings = cohort_module.CohortSettings(8000, 8, environment="skewed-noniid", seed=1)
    plans = settings.plans()
    ages: dict[int, list[float]] = {site: [] for site in range(8)}
    for index in range(0, 8000, 2):
        person = draw_person(plans, index, seed=1, residual_scale=0.5)
        ages[person.site].append(person.age)
        assert 45 <= person.age <= 82
    # Where the cut takes little away, the site has the asked mean and spread.
    for site in (0, 1, 2):
        mean_error = 4 * plans[site].age_sd / len(ages[site]) ** 0.5
        assert abs(statistics.mean(ages[site]) - plans[site].age_mean) < mean_error
        assert statistics.stdev(ages[site]) == pytest.approx(plans[site].age_sd, rel=0.12)
    assert statistics.mean(ages[7]) < 54 < 68 < statistics.mean(ages[4])


def test_residual_scale_spreads_people_of_one_age() -> None:
    plans = cohort_module.CohortSettings(400, 1).plans()

    def spread(scale: float) -> float:
        people = [draw_person(plans, i, seed=0, residual_scale=scale) for i in range(400)]
        ages = np.array([p.age for p in people])
        males = np.array([p.male for p in people], dtype=float)
        logs = np.array([p.log_fractions[0] for p in people])
        design = np.stack([np.ones(400), ages, ages**2, males], axis=1)
        fit, *_ = np.linalg.lstsq(design, logs, rcond=None)
        return float((logs - design @ fit).std())

    assert spread(0.0) == pytest.approx(0, abs=1e-9)
    assert spread(1.0) == pytest.approx(0.395, rel=0.1)
    assert spread(0.5) == pytest.approx(spread(1.0) / 2, rel=1e-6)


def test_a_finished_cohort_of_the_same_settings_is_kept(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    counts: list[tuple[int, int]] = []
    assert make_cohort(made, **SMALL, progress=lambda *done: counts.append(done)) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert counts == [(10, 10)]


def test_a_finished_cohort_of_other_settings_is_refused(made: Path) -> None:
    with pytest.raises(UsageError, match=r"another cohort.*seed 3 there, 4 asked.*name another"):
        make_cohort(made, **{**SMALL, "seed": 4})


def test_a_cohort_that_lost_a_scan_is_refused(tmp_path: Path) -> None:
    made = make_cohort(tmp_path / "cohort", subjects=4, sites=1)
    next(made.glob("sub-00003/anat/*")).unlink()
    with pytest.raises(UsageError, match=r"lacks sub-00003.*make the cohort again"):
        make_cohort(made, subjects=4, sites=1)


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made = make_cohort(tmp_path / "empty", subjects=4, sites=1)
    assert len(list(made.glob("sub-*"))) == 4


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty and holds no cohort.*name another folder"):
        make_cohort(tmp_path, subjects=4, sites=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        make_cohort(tmp_path / "taken", subjects=4, sites=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"subjects": 7}, "at least 8 people", id="subjects"),
        pytest.param({"sites": 0}, "sites: expected at least 1", id="sites"),
        pytest.param({"resolution": 3}, "expected 2 or 4", id="resolution"),
        pytest.param({"seed": -1}, "seed: expected 0 or more", id="seed"),
        pytest.param({"residual_scale": float("nan")}, "residual_scale: expected 0", id="nan"),
        pytest.param({"residual_scale": 2.0}, "residual_scale: expected 0", id="scale"),
        pytest.param({"workers": 0}, "workers: expected at least 1", id="workers"),
        pytest.param({"environment": "iid"}, "unknown name 'iid'", id="environment"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        make_cohort(tmp_path / "cohort", **{**SMALL, **change})
    assert list(tmp_path.iterdir()) == []
