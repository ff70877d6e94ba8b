from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.read import find_scans

MakeTree = Callable[..., Path]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not read here")
    return path


def test_a_tree_gives_its_scans_in_order_of_site_and_participant(make_tree: MakeTree) -> None:
    root = make_tree(["sub-2\t70\tM\tB", "sub-1\t60.5\tF\tB", "sub-3\t50\tn/a\tA"])
    scans, problems = find_scans(root)
    assert problems == []
    assert [(s.participant, s.age, s.sex, s.site, s.session, s.mask) for s in scans] == [
        ("sub-3", 50.0, None, "A", None, None),
        ("sub-1", 60.5, "F", "B", None, None),
        ("sub-2", 70.0, "M", "B", None, None),
    ]
    assert scans[0].path == root / "sub-3" / "anat" / "sub-3_T1w.nii.gz"


def test_without_a_site_column_there_is_one_site(make_tree: MakeTree) -> None:
    scans, problems = find_scans(make_tree(["sub-1\t60"], header="participant_id\tage"))
    assert problems == []
    assert [s.site for s in scans] == ["local"]


def test_ids_without_the_prefix_find_their_folder(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA"])
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsite\n1\t60\tA\n", encoding="utf-8"
    )
    scans, problems = find_scans(root)
    assert problems == []
    assert [s.participant for s in scans] == ["sub-1"]


@pytest.mark.parametrize(
    ("age", "kind"),
    [("n/a", "age-missing"), ("89+", "age-censored"), ("26,9", "age-decimal-comma")],
)
def test_an_unusable_age_is_a_problem(make_tree: MakeTree, age: str, kind: str) -> None:
    scans, problems = find_scans(make_tree([f"sub-1\t{age}\tM\tA", "sub-2\t60\tM\tA"]))
    assert [s.participant for s in scans] == ["sub-2"]
    assert [(p.kind, p.participant, p.path) for p in problems] == [
        (kind, "sub-1", "participants.tsv line 2")
    ]


def test_a_listed_person_without_a_scan_and_a_scan_without_a_row(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA"])
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsite\nsub-9\t60\tA\n", encoding="utf-8"
    )
    scans, problems = find_scans(root)
    assert scans == []
    assert [(p.kind, p.participant) for p in problems] == [
        ("missing-file", "sub-9"),
        ("unlisted-scan", "sub-1"),
    ]


def test_a_person_listed_twice_is_not_used(make_tree: MakeTree) -> None:
    scans, problems = find_scans(
        make_tree(["sub-1\t60\tM\tA", "sub-1\t61\tM\tB", "sub-2\t60\tM\tA"])
    )
    assert [s.participant for s in scans] == ["sub-2"]
    assert [(p.kind, p.participant) for p in problems] == [("duplicate-participant", "sub-1")]
    assert "lines 2, 3" in problems[0].detail


def test_sessions_are_separate_scans_with_their_own_ages(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA"])
    (root / "sub-1" / "anat" / "sub-1_T1w.nii.gz").unlink()
    for session in ("ses-a", "ses-b"):
        touch(root / "sub-1" / session / "anat" / f"sub-1_{session}_T1w.nii.gz")
    (root / "sub-1" / "sub-1_sessions.tsv").write_text(
        "session_id\tage\nses-a\tn/a\nses-b\t64\n", encoding="utf-8"
    )
    scans, problems = find_scans(root)
    assert problems == []
    assert [(s.session, s.age) for s in scans] == [("ses-a", 60.0), ("ses-b", 64.0)]


def test_a_broken_sessions_table_costs_only_its_person(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA", "sub-2\t60\tM\tA"])
    (root / "sub-1" / "sub-1_sessions.tsv").write_bytes(b"\xff\xfe\x00")
    scans, problems = find_scans(root)
    assert [s.participant for s in scans] == ["sub-2"]
    assert [p.kind for p in problems] == ["bad-table"]


def test_of_several_files_the_mni_one_is_taken_with_its_mask(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA"])
    anat = root / "sub-1" / "anat"
    touch(anat / "sub-1_desc-preproc_T1w.nii.gz")
    touch(anat / "sub-1_desc-brain_mask.nii.gz")
    wanted = touch(anat / "sub-1_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz")
    mask = touch(anat / "sub-1_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz")
    scans, problems = find_scans(root)
    assert problems == []
    assert [(s.path, s.mask) for s in scans] == [(wanted, mask)]


def test_runs_are_all_taken_but_equal_candidates_are_a_problem(make_tree: MakeTree) -> None:
    root = make_tree(["sub-1\t60\tM\tA", "sub-2\t60\tM\tA"])
    for name in ("sub-1", "sub-2"):
        (root / name / "anat" / f"{name}_T1w.nii.gz").unlink()
    for run in (1, 2):
        touch(root / "sub-1" / "anat" / f"sub-1_run-{run}_T1w.nii.gz")
    for resolution in (1, 2):
        touch(root / "sub-2" / "anat" / f"sub-2_space-MNI152_res-{resolution}_T1w.nii.gz")
    scans, problems = find_scans(root)
    assert [s.path.name for s in scans] == ["sub-1_run-1_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz"]
    assert [(p.kind, p.participant) for p in problems] == [("ambiguous-scan", "sub-2")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "has no participants.tsv"),
        ("age\tsite\n60\tA\n", "lacks the column participant_id"),
        ("participant_id\tage\n", "lists nobody"),
        ("participant_id\tsite\nsub-1\tA\n", "lacks an age column"),
    ],
)
def test_a_tree_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, table: str | None, message: str
) -> None:
    touch(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    if table is not None:
        (tmp_path / "participants.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(CohortError, match=message):
        find_scans(tmp_path)
