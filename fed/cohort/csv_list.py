"""A cohort as a CSV that lists files: path, age, site; optionally participant, session, sex."""

import re
from pathlib import Path

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.scans import Candidate, Problem, Scan, judge
from sparsekit.fed.cohort.tables import Row, Table, is_missing, read_table

AGE_COLUMNS = ("age", "age_at_scan", "age_years")
SITE_COLUMNS = ("site", "site_id", "centre", "center")
_PATH_COLUMNS = ("path", "file", "filename", "t1", "9dof_2mm_vol")
_PARTICIPANT_COLUMNS = ("participant", "participant_id", "subject", "subject_id", "eid")
_SESSION_COLUMNS = ("session", "session_id", "visit")
_MASK_COLUMNS = ("mask", "brain_mask")
_BIDS_PARTICIPANT = re.compile(r"sub-[A-Za-z0-9+]+")


def find_listed_scans(table_path: Path) -> tuple[list[Scan], list[Problem]]:
    """Read the scans that a CSV lists.

    Parameters
    ----------
    table_path : Path
        Paths in it are relative to the table's own folder.

    Returns
    -------
    scans : list of Scan
    problems : list of Problem

    Raises
    ------
    CohortError
        The table is unreadable, lacks a column, or lists nothing.
    """
    table = read_table(table_path)
    path_column = _need(table, "path", _PATH_COLUMNS)
    age_column = _need(table, "age", AGE_COLUMNS)
    site_column = _need(table, "site", SITE_COLUMNS)
    if not table.rows:
        raise CohortError(f"{table.path} has a header line but lists no scans")
    candidates: list[Candidate] = []
    problems: list[Problem] = []
    for row in table.rows:
        where = f"{table.path.name} line {row.line}"
        text = row.cells.get(path_column, "")
        if row.n_cells > len(table.columns):
            problems.append(_too_many_cells(table, row, where, age_column))
            continue
        if is_missing(text):
            detail = "no path"
            remedy = "name the file, or drop the row"
            problems.append(Problem(where, None, "missing-file", detail, remedy))
            continue
        candidates.append(
            Candidate(
                where=where,
                participant=_participant(table, row, text),
                session=_optional(table, row, _SESSION_COLUMNS),
                run=None,
                path=_resolve(table_path, text),
                age=row.cells.get(age_column),
                site=row.cells.get(site_column),
                sex=_optional(table, row, ("sex", "gender")),
                mask=_mask(table, row),
            )
        )
    scans, found = judge(candidates)
    return scans, problems + found


def _need(table: Table, meaning: str, names: tuple[str, ...]) -> str:
    column = table.column(names)
    if column is None:
        raise CohortError(
            f"{table.path} lacks a column for the {meaning} (expected {' or '.join(names)}); "
            f"it has: {', '.join(table.columns)}"
        )
    return column


def _optional(table: Table, row: Row, names: tuple[str, ...]) -> str | None:
    column = table.column(names)
    text = None if column is None else row.cells.get(column)
    return None if is_missing(text) else text


def _resolve(table_path: Path, text: str) -> Path:
    return table_path.parent / Path(text).expanduser()


def _mask(table: Table, row: Row) -> Path | None:
    text = _optional(table, row, _MASK_COLUMNS)
    return None if text is None else _resolve(table.path, text)


def _participant(table: Table, row: Row, path_text: str) -> str:
    """Take the participant column, else the sub-... in the path, else the path itself."""
    given = _optional(table, row, _PARTICIPANT_COLUMNS)
    if given is not None:
        return given
    named = _BIDS_PARTICIPANT.search(path_text)
    return named.group() if named else path_text


def _too_many_cells(table: Table, row: Row, where: str, age_column: str) -> Problem:
    """Tell the decimal comma that split an age cell in two from any other stray delimiter."""
    index = table.columns.index(age_column)
    cells = list(row.cells.values())
    halves = cells[index : index + 2]
    if row.n_cells == len(table.columns) + 1 and [h.isdecimal() for h in halves] == [True, True]:
        detail = f"age {halves[0]},{halves[1]} is split in two cells by its decimal comma"
        return Problem(where, None, "age-decimal-comma", detail, f"write {halves[0]}.{halves[1]}")
    detail = f"{row.n_cells} cells where the header has {len(table.columns)} columns"
    remedy = "put cells that hold the delimiter in double quotes"
    return Problem(where, None, "bad-row", detail, remedy)
