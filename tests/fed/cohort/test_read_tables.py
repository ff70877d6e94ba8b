from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.read import find_scans
from sparsekit.fed.cohort.tables import Fault, parse_age


@pytest.fixture
def csv_with(tmp_path: Path) -> Callable[[bytes], Path]:
    for name in ("a.nii.gz", "b.nii.gz", "two words, one comma.nii.gz"):
        (tmp_path / name).write_bytes(b"not read here")

    def write(content: bytes) -> Path:
        path = tmp_path / "cohort.csv"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "years"),
    [("63", 63.0), (" 63.25 ", 63.25), ("0", 0.0), ("120", 120.0), ("6.1e1", 61.0)],
)
def test_an_age_is_read_as_years(text: str, years: float) -> None:
    assert parse_age(text) == years


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, "age-missing"),
        ("", "age-missing"),
        ("n/a", "age-missing"),
        ("NaN", "age-missing"),
        ("89+", "age-censored"),
        (">89", "age-censored"),
        ("≥ 90", "age-censored"),
        ("26,9", "age-decimal-comma"),
        ("063Y", "age-unreadable"),
        ("1_0", "age-unreadable"),
        ("٦٣", "age-unreadable"),
        ("inf", "age-unreadable"),
        ("60-65", "age-unreadable"),
        ("-1", "age-implausible"),
        ("120.5", "age-implausible"),
        ("1e99", "age-implausible"),
    ],
)
def test_what_is_not_an_age_is_named(text: str | None, kind: str) -> None:
    fault = parse_age(text)
    assert isinstance(fault, Fault)
    assert fault.kind == kind


def test_a_decimal_comma_comes_with_its_correction() -> None:
    fault = parse_age("26,9")
    assert isinstance(fault, Fault)
    assert fault.remedy == "write 26.9 with a decimal point"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"path,age,site\na.nii.gz,61.5,X\nb.nii.gz,70,Y\n", id="plain"),
        pytest.param(b"\xef\xbb\xbfpath,age,site\na.nii.gz,61.5,X\nb.nii.gz,70,Y\n", id="bom"),
        pytest.param(b"path,age,site\r\na.nii.gz,61.5,X\r\nb.nii.gz,70,Y\r\n", id="windows"),
        pytest.param(b" Path , AGE, Site\n a.nii.gz , 61.5, X\n\n b.nii.gz,70 , Y", id="spaces"),
        pytest.param(b"path;age;site\na.nii.gz;61.5;X\nb.nii.gz;70;Y\n", id="semicolon"),
        pytest.param(b"path\tage\tsite\na.nii.gz\t61.5\tX\nb.nii.gz\t70\tY\n", id="tab"),
        pytest.param(b'path,age,site\n"a.nii.gz","61.5","X"\n"b.nii.gz",70,Y\n', id="quoted"),
        pytest.param(b"site,note,path,age\nX,,a.nii.gz,61.5\nY,q,b.nii.gz,70\n", id="order"),
    ],
)
def test_dialects_of_a_csv_give_the_same_scans(
    csv_with: Callable[[bytes], Path], content: bytes
) -> None:
    path = csv_with(content)
    scans, problems = find_scans(path)
    assert problems == []
    assert [(s.path, s.age, s.site, s.participant, s.sex, s.session) for s in scans] == [
        (path.parent / "a.nii.gz", 61.5, "X", "a.nii.gz", None, None),
        (path.parent / "b.nii.gz", 70.0, "Y", "b.nii.gz", None, None),
    ]


def test_a_quoted_path_may_hold_the_delimiter_and_optional_columns_are_taken(
    csv_with: Callable[[bytes], Path],
) -> None:
    path = csv_with(
        b"path,age,site,participant_id,session,sex\n"
        b'"two words, one comma.nii.gz",61,X,p1,s1,female\na.nii.gz,63,X,p1,s2,2\n'
    )
    scans, problems = find_scans(path)
    assert problems == []
    assert [(s.participant, s.session, s.age, s.sex) for s in scans] == [
        ("p1", "s1", 61.0, "F"),
        ("p1", "s2", 63.0, "F"),
    ]


def test_the_participant_comes_from_a_bids_name_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "sub-07").mkdir()
    (tmp_path / "sub-07" / "T1.nii.gz").write_bytes(b"x")
    (tmp_path / "c.csv").write_text("path,age,site\nsub-07/T1.nii.gz,50,X\n", encoding="utf-8")
    scans, _ = find_scans(tmp_path / "c.csv")
    assert [s.participant for s in scans] == ["sub-07"]


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        (b"a.nii.gz,n/a,X", "age-missing", "'n/a'"),
        (b"a.nii.gz,89+,X", "age-censored", "'89+'"),
        (b'a.nii.gz,"26,9",X', "age-decimal-comma", "'26,9'"),
        (b"a.nii.gz,26,9,X", "age-decimal-comma", "26,9 is split in two cells"),
        (b"a.nii.gz,61,X,more", "bad-row", "4 cells where the header has 3"),
        (b"a.nii.gz,61,", "site-missing", "no site"),
        (b"a.nii.gz,61", "site-missing", "no site"),
        (b"absent.nii.gz,61,X", "missing-file", "no such file"),
        (b"./,61,X", "missing-file", "is a folder"),
        (b",61,X", "missing-file", "no path"),
    ],
)
def test_a_bad_row_is_a_problem_and_the_others_stay(
    csv_with: Callable[[bytes], Path], row: bytes, kind: str, detail: str
) -> None:
    scans, problems = find_scans(csv_with(b"path,age,site\n" + row + b"\nb.nii.gz,70,Y\n"))
    assert [s.path.name for s in scans] == ["b.nii.gz"]
    assert [p.kind for p in problems] == [kind]
    assert detail in problems[0].detail
    assert problems[0].remedy


def test_a_link_to_content_that_was_not_fetched_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "annex" / "object")
    (tmp_path / "c.csv").write_text("path,age,site\na.nii.gz,61,X\n", encoding="utf-8")
    scans, problems = find_scans(tmp_path / "c.csv")
    assert scans == []
    assert [p.kind for p in problems] == ["missing-file"]
    assert "datalad get" in problems[0].remedy


@pytest.mark.parametrize(
    ("rows", "kind", "detail"),
    [
        (b"a.nii.gz,60,X,p\nb.nii.gz,61,X,p\n", "duplicate-participant", "listed 2 times"),
        (b"a.nii.gz,60,X,p\nb.nii.gz,61,Y,p\n", "duplicate-participant", "2 sites: X, Y"),
        (b"a.nii.gz,60,X,p\na.nii.gz,60,X,q\n", "duplicate-file", "for p, q"),
        (b"a.nii.gz,60,X,p\n./a.nii.gz,60,X,q\n", "duplicate-file", "for p, q"),
    ],
)
def test_of_duplicates_none_is_used(
    csv_with: Callable[[bytes], Path], rows: bytes, kind: str, detail: str
) -> None:
    scans, problems = find_scans(csv_with(b"path,age,site,participant\n" + rows))
    assert scans == []
    assert [p.kind for p in problems] == [kind]
    assert detail in problems[0].detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\n \n", "is empty", id="blank"),
        pytest.param(b"path,age,site\n", "lists no scans", id="header-only"),
        pytest.param(b"path,site\na,b\n", "lacks a column for the age", id="no-age"),
        pytest.param(b"file,age\na,1\n", "lacks a column for the site", id="no-site"),
        pytest.param(b"age,site\n1,b\n", "for the path .*it has: age, site", id="no-path"),
        pytest.param(b"path,age,age,site\n", "'age' occurs twice", id="column-twice"),
        pytest.param("päth,age".encode("utf-16"), "is not UTF-8", id="utf-16"),
        pytest.param(b"path,age,site\n\x00", "not a text table", id="nul"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_error(
    csv_with: Callable[[bytes], Path], content: bytes, message: str
) -> None:
    with pytest.raises(CohortError, match=message):
        find_scans(csv_with(content))


def test_a_path_that_does_not_exist_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="does not exist"):
        find_scans(tmp_path / "nowhere")
