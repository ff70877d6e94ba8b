"""A cohort as a BIDS tree: participants.tsv and sub-*/[ses-*/]anat/*_T1w.nii[.gz]."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.csv_list import AGE_COLUMNS, SITE_COLUMNS
from sparsekit.fed.cohort.scans import Candidate, Problem, Scan, judge
from sparsekit.fed.cohort.tables import Row, Table, is_missing, read_table

LONE_SITE = "local"
"""Name of the one site of a tree whose participants.tsv has no site column."""

_ENTITY = re.compile(r"([a-z]+)-([A-Za-z0-9+]+)")


def find_bids_scans(root: Path) -> tuple[list[Scan], list[Problem]]:
    """Read the T1-weighted scans of a BIDS dataset or derivative.

    Parameters
    ----------
    root : Path
        The folder that holds ``participants.tsv``.

    Returns
    -------
    scans : list of Scan
    problems : list of Problem

    Raises
    ------
    CohortError
        There is no usable ``participants.tsv``, or it lists nobody.

    Notes
    -----
    Where a person's session has several ``_T1w`` files, those in an MNI space are preferred to
    the others, then ``desc-brain``, then ``desc-preproc``; several runs are all taken. A
    ``desc-brain_mask`` with the same entities is applied. An age in
    ``sub-X/sub-X_sessions.tsv`` comes before the age in ``participants.tsv``.
    """
    table = _participants(root)
    problems: list[Problem] = []
    listed = _unique_rows(table, problems)
    folders = {path.name: path for path in sorted(root.glob("sub-*")) if path.is_dir()}
    site_column = table.column(SITE_COLUMNS)
    age_column = table.column(AGE_COLUMNS)
    candidates: list[Candidate] = []
    for participant, row in listed.items():
        where = f"participants.tsv line {row.line}"
        folder = folders.get(participant)
        sessions = _t1w_by_session(folder) if folder else {}
        if not sessions:
            problems.append(
                Problem(
                    str(root / participant),
                    participant,
                    "missing-file",
                    f"listed in {where}, but there is no anat/*_T1w.nii or .nii.gz",
                    "add the scan, or drop the row",
                )
            )
            continue
        try:
            session_ages = _session_ages(root / participant)
        except CohortError as error:
            path = root / participant
            remedy = "repair or remove the person's sessions.tsv"
            problems.append(Problem(str(path), participant, "bad-table", str(error), remedy))
            continue
        for session, paths in sessions.items():
            chosen = _choose(paths)
            if isinstance(chosen, str):
                problems.append(
                    Problem(
                        str(paths[0]),
                        participant,
                        "ambiguous-scan",
                        chosen,
                        "list the files to use in a CSV with path, age, site, participant",
                    )
                )
                continue
            participant_age = row.cells.get(age_column) if age_column else None
            candidates += [
                Candidate(
                    where=where,
                    participant=participant,
                    session=session,
                    run=_entities(path).get("run"),
                    path=path,
                    age=session_ages.get(session or "", participant_age),
                    site=row.cells.get(site_column) if site_column else LONE_SITE,
                    sex=row.cells.get("sex"),
                    mask=_mask_beside(path),
                )
                for path in chosen
            ]
    if age_column is None and candidates and all(is_missing(c.age) for c in candidates):
        raise CohortError(
            f"{table.path} lacks an age column and no *_sessions.tsv gives ages; "
            f"it has: {', '.join(table.columns)}"
        )
    problems += _unlisted(folders, table)
    scans, found = judge(candidates)
    return scans, problems + found


def _participants(root: Path) -> Table:
    path = root / "participants.tsv"
    if not path.is_file():
        raise CohortError(
            f"{root} has no participants.tsv; give a BIDS folder that has one, "
            "or a CSV with the columns path, age, site"
        )
    table = read_table(path)
    if "participant_id" not in table.columns:
        raise CohortError(
            f"{path} lacks the column participant_id; it has: {', '.join(table.columns)}"
        )
    if not table.rows:
        raise CohortError(f"{path} has a header line but lists nobody")
    return table


def _with_prefix(text: str, prefix: str) -> str:
    return text if text.startswith(prefix) else prefix + text


def _id_of(row: Row) -> str:
    return _with_prefix(row.cells.get("participant_id", ""), "sub-")


def _unique_rows(table: Table, problems: list[Problem]) -> dict[str, Row]:
    counts = Counter(_id_of(row) for row in table.rows)
    listed: dict[str, Row] = {}
    for row in table.rows:
        participant = _id_of(row)
        if participant == "sub-":
            where = f"{table.path} line {row.line}"
            detail = "no participant_id"
            problems.append(Problem(where, None, "bad-row", detail, "fill it in, or drop the row"))
        elif counts[participant] == 1:
            listed[participant] = row
    for participant, count in counts.items():
        if count > 1 and participant != "sub-":
            lines = [row.line for row in table.rows if _id_of(row) == participant]
            problems.append(
                Problem(
                    str(table.path),
                    participant,
                    "duplicate-participant",
                    f"listed {count} times (lines {', '.join(map(str, lines))})",
                    "keep one row; ages per session belong in the person's sessions.tsv",
                )
            )
    return listed


def _t1w_by_session(folder: Path) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = defaultdict(list)
    for pattern in ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*"):
        for path in sorted(folder.glob(pattern)):
            if path.name.endswith(("_T1w.nii", "_T1w.nii.gz")):
                session = path.parent.parent.name
                found[session if session.startswith("ses-") else None].append(path)
    return found


def _entities(path: Path) -> dict[str, str]:
    return dict(_ENTITY.findall(path.name))


def _preference(path: Path) -> tuple[bool, int]:
    entities = _entities(path)
    description = entities.get("desc", "")
    order = {"brain": 2, "preproc": 1}
    return entities.get("space", "").startswith("MNI"), order.get(description, 0)


def _choose(paths: Sequence[Path]) -> list[Path] | str:
    """Return the preferred files, one per run, or a sentence saying why that is not possible."""
    best = max(_preference(path) for path in paths)
    chosen = [path for path in paths if _preference(path) == best]
    runs = [_entities(path).get("run") for path in chosen]
    if len(set(runs)) < len(runs):
        return f"{len(chosen)} T1w files match equally well: " + ", ".join(p.name for p in chosen)
    return chosen


def _mask_beside(path: Path) -> Path | None:
    """Find the brain mask whose name differs from `path` only in desc and suffix."""
    entities = _entities(path)
    if entities.get("desc") == "brain":
        return None
    stem = re.sub(r"_desc-[A-Za-z0-9+]+", "", path.name.split("_T1w.nii")[0])
    for ending in (".nii.gz", ".nii"):
        mask = path.with_name(f"{stem}_desc-brain_mask{ending}")
        if mask.is_file():
            return mask
    return None


def _session_ages(folder: Path) -> Mapping[str, str]:
    path = folder / f"{folder.name}_sessions.tsv"
    if not path.is_file():
        return {}
    table = read_table(path)
    age_column = table.column(AGE_COLUMNS)
    if age_column is None or "session_id" not in table.columns:
        return {}
    return {
        _with_prefix(row.cells.get("session_id", ""), "ses-"): row.cells[age_column]
        for row in table.rows
        if not is_missing(row.cells.get(age_column))
    }


def _unlisted(folders: Mapping[str, Path], table: Table) -> list[Problem]:
    known = {_id_of(row) for row in table.rows}
    return [
        Problem(
            str(path),
            participant,
            "unlisted-scan",
            "no row in participants.tsv",
            "add a row with the age and site, or move the scan away",
        )
        for participant, folder in folders.items()
        if participant not in known
        for paths in _t1w_by_session(folder).values()
        for path in paths
    ]
