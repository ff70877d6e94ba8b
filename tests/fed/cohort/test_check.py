import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsekit.cli import main
from sparsekit.fed.cohort.check import check_cohort

MakeTree = Callable[..., Path]
SaveVolume = Callable[..., Path]
WriteBrain = Callable[..., Path]

PEOPLE = [f"sub-{i:02d}\t{60 + i}\tM\t{'AB'[i % 2]}" for i in range(4)]


def t1w(root: Path, name: str) -> Path:
    return root / name / "anat" / f"{name}_T1w.nii.gz"


@pytest.fixture
def broken(make_tree: MakeTree, save_volume: SaveVolume) -> tuple[Path, dict[str, str]]:
    """A tree with one good scan and one of every kind of problem, by participant."""
    kinds = {
        "sub-truncated": "truncated",
        "sub-corrupt": "corrupt",
        "sub-fourd": "4d",
        "sub-nan": "nan",
        "sub-constant": "constant",
        "sub-noaffine": "no-affine",
        "sub-faraway": "wrong-grid",
        "sub-text": "not-nifti",
        "sub-empty": "empty-file",
        "sub-copy": "duplicate-scan",
        "sub-na": "age-missing",
        "sub-censored": "age-censored",
        "sub-comma": "age-decimal-comma",
        "sub-old": "age-implausible",
        "sub-nosite": "site-missing",
        "sub-twice": "duplicate-participant",
        "sub-listed": "missing-file",
        "sub-unlisted": "unlisted-scan",
    }
    ages = {"sub-na": "n/a", "sub-censored": "89+", "sub-comma": "26,9", "sub-old": "630"}
    names = ["sub-a-good", *kinds, "sub-twice"]
    root = make_tree(
        [
            f"{name}\t{ages.get(name, '60')}\tF\t{'n/a' if name == 'sub-nosite' else 'A'}"
            for name in names
        ]
    )
    table = root / "participants.tsv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(x for x in lines if "unlisted" not in x), encoding="utf-8")
    good = t1w(root, names[0]).read_bytes()
    noise = np.random.default_rng(0).normal(500, 50, (46, 55, 46)).astype(np.float32)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 8
    t1w(root, "sub-truncated").write_bytes(good[: len(good) // 2])
    t1w(root, "sub-corrupt").write_bytes(flipped)
    save_volume(t1w(root, "sub-fourd"), np.stack([noise, noise], -1))
    save_volume(t1w(root, "sub-nan"), np.where(noise > 650, np.nan, noise))
    save_volume(t1w(root, "sub-constant"), np.zeros_like(noise))
    save_volume(t1w(root, "sub-noaffine"), noise, code=0)
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = (400, -126, -72)
    save_volume(t1w(root, "sub-faraway"), noise, affine)
    t1w(root, "sub-text").write_bytes(gzip.compress(b"not an image " * 99))
    t1w(root, "sub-empty").write_bytes(b"")
    t1w(root, "sub-copy").write_bytes(good)
    t1w(root, "sub-listed").unlink()
    return root, kinds


def test_a_clean_tree_has_no_problems(make_tree: MakeTree) -> None:
    root = make_tree(PEOPLE)
    seen: list[tuple[int, int]] = []
    report = check_cohort(root, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == ()
    assert report.ok_scans == report.scans
    assert report.n_files == len(report.scans) == 4
    assert report.bytes_read == sum(scan.path.stat().st_size for scan in report.scans)
    assert report.notes == ("4 scans: 46x55x46@4x4x4mm, axes RAS",)
    assert seen == [(i, 4) for i in range(5)]


def test_every_kind_of_problem_is_found_and_none_stops_the_check(
    broken: tuple[Path, dict[str, str]],
) -> None:
    root, kinds = broken
    report = check_cohort(root)
    assert {p.participant: p.kind for p in report.problems} == kinds
    assert len(report.problems) == len(kinds)
    assert [scan.participant for scan in report.ok_scans] == ["sub-a-good"]
    for problem in report.problems:
        assert problem.detail
        assert problem.remedy


def test_a_file_with_two_problems_is_listed_with_both(
    make_tree: MakeTree, save_volume: SaveVolume
) -> None:
    root = make_tree(PEOPLE)
    save_volume(t1w(root, "sub-00"), np.zeros((9, 9, 9), np.int16), code=0)
    assert [p.kind for p in check_cohort(root).problems] == ["no-affine", "constant"]


def test_with_in_shape_another_shape_is_a_problem(
    make_tree: MakeTree, write_brain: WriteBrain
) -> None:
    root = make_tree(PEOPLE)
    larger = {"shape": (50, 59, 50), "origin": (-98, -134, -80)}
    write_brain(t1w(root, "sub-00"), 9, **larger)
    relaxed = check_cohort(root)
    assert relaxed.problems == ()
    assert relaxed.notes == (
        "3 scans: 46x55x46@4x4x4mm, axes RAS",
        "1 scan: 50x59x50@4x4x4mm, axes RAS",
    )
    (problem,) = check_cohort(root, in_shape=(46, 55, 46)).problems
    assert (problem.kind, problem.participant) == ("wrong-grid", "sub-00")
    assert "shape 50x59x50 in R, A, S order, expected 46x55x46" in problem.detail


def test_scans_with_a_skull_or_negative_voxels_are_noted(
    make_tree: MakeTree, save_volume: SaveVolume
) -> None:
    root = make_tree(PEOPLE)
    noise = np.random.default_rng(0).normal(500, 50, (46, 55, 46)).astype(np.float32)
    save_volume(t1w(root, "sub-00"), noise)
    save_volume(t1w(root, "sub-01"), noise - 500)
    report = check_cohort(root)
    assert report.problems == ()
    assert any("not skull-stripped" in note and "sub-00_T1w" in note for note in report.notes)
    assert any("normalised before" in note and "sub-01_T1w" in note for note in report.notes)


def test_the_scan_of_a_mask_is_checked_with_it(make_tree: MakeTree) -> None:
    root = make_tree(PEOPLE)
    (root / "sub-00" / "anat" / "sub-00_desc-brain_mask.nii.gz").write_bytes(b"broken")
    (problem,) = check_cohort(root).problems
    assert (problem.kind, problem.participant) == ("not-nifti", "sub-00")
    assert problem.path.endswith("_desc-brain_mask.nii.gz")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["cohort", "check", *arguments])
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


def test_the_command_ends_with_0_for_a_clean_tree(
    make_tree: MakeTree, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, str(make_tree(PEOPLE)))
    assert code == 0
    assert "4 scans of 4 people at 2 sites: fit for training; no problems" in out


def test_the_command_prints_every_problem_in_one_table_and_ends_with_1(
    broken: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, kinds = broken
    code, out, err = run(capsys, str(root))
    assert code == 1
    assert out.count("Problems in") == 1
    for participant, kind in kinds.items():
        assert any(kind in line and participant in line for line in out.splitlines())
    assert f"1 scan of 1 person at 1 site: fit for training; {len(kinds)} problems" in out
    assert "Traceback" not in out + err


def test_the_command_takes_a_shape(make_tree: MakeTree, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(make_tree(PEOPLE))
    assert run(capsys, root, "--in-shape", "46x55x46")[0] == 0
    code, out, _ = run(capsys, root, "--in-shape", "91x109x91")
    assert code == 1
    assert "wrong-grid 4" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/nowhere"], 2, "does not exist; give a BIDS folder or a CSV"),
        (["{}", "--in-shape", "46x55"], 2, "--in-shape: expected three extents"),
        (["{}"], 1, "has no participants.tsv; give a BIDS folder that has one"),
        (["{}/a.csv"], 1, "lacks a column for the site"),
    ],
    ids=["nowhere", "shape", "empty-folder", "columns"],
)
def test_what_cannot_be_checked_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "a.csv").write_text("path,age\nx,1\n", encoding="utf-8")
    got, out, err = run(capsys, *(a.format(tmp_path) for a in arguments))
    assert got == code
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("sparsekit: error: ")
    assert message in line
