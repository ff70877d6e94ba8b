"""What a scan and a problem are, and the rules that any list of scans must pass."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.fed.cohort.tables import Fault, is_missing, parse_age

_SEXES = {"m": "M", "male": "M", "1": "M", "f": "F", "female": "F", "2": "F"}


@dataclass(frozen=True)
class Scan:
    """One T1-weighted volume on disk and what its table says about it.

    Attributes
    ----------
    participant : str
        The person; unique over all sites.
    session : str or None
    path : Path
    age : float
        Years at the scan.
    sex : str or None
        ``"M"``, ``"F"`` or None where the table does not say.
    site : str
    mask : Path or None
        A brain mask on the same grid; voxels where it is 0 count as background.
    """

    participant: str
    session: str | None
    path: Path
    age: float
    sex: str | None
    site: str
    mask: Path | None = None


@dataclass(frozen=True)
class Problem:
    """One reason why a file or a table row cannot be used as it stands.

    Attributes
    ----------
    path : str
        The file, or the table and line.
    participant : str or None
    kind : str
        Short name, such as ``"truncated"`` or ``"age-censored"``; docs/data-you-bring.md lists
        them all.
    detail : str
        What was found.
    remedy : str
        What to do about it.
    """

    path: str
    participant: str | None
    kind: str
    detail: str
    remedy: str

    @classmethod
    def of(cls, fault: Fault, path: Path | str, participant: str | None) -> "Problem":
        """Attach `fault` to a file or a table line."""
        return cls(str(path), participant, fault.kind, fault.detail, fault.remedy)


@dataclass(frozen=True)
class Candidate:
    """A scan as a table words it, before any of it is believed.

    Attributes
    ----------
    where : str
        Table and line, for messages about the row.
    participant : str
    session, run : str or None
    path : Path
    age, site, sex : str or None
        Text of the cells.
    mask : Path or None
    """

    where: str
    participant: str
    session: str | None
    run: str | None
    path: Path
    age: str | None
    site: str | None
    sex: str | None
    mask: Path | None = None


def judge(candidates: Iterable[Candidate]) -> tuple[list[Scan], list[Problem]]:
    """Keep the candidates that name one existing file, one person, one site and one age.

    Parameters
    ----------
    candidates : iterable of Candidate

    Returns
    -------
    scans : list of Scan
        Ordered by site, participant, session and path, whatever the order in the table.
    problems : list of Problem
        At least one for every candidate that was left out.
    """
    problems: list[Problem] = []
    kept = _without_duplicates(list(candidates), problems)
    scans: list[Scan] = []
    for candidate in kept:
        age = parse_age(candidate.age)
        faults = [fault for fault in (_file_fault(candidate.path),) if fault is not None]
        problems += [Problem.of(f, candidate.path, candidate.participant) for f in faults]
        about_row = [age] if isinstance(age, Fault) else []
        if is_missing(candidate.site):
            about_row.append(Fault("site-missing", "no site", "name the site, or drop the row"))
        problems += [Problem.of(f, candidate.where, candidate.participant) for f in about_row]
        if faults or about_row or isinstance(age, Fault):
            continue
        scans.append(
            Scan(
                participant=candidate.participant,
                session=candidate.session,
                path=candidate.path,
                age=age,
                sex=_SEXES.get((candidate.sex or "").lower()),
                site=candidate.site or "",
                mask=candidate.mask,
            )
        )
    scans.sort(key=lambda s: (s.site, s.participant, s.session or "", str(s.path)))
    return scans, problems


def _file_fault(path: Path) -> Fault | None:
    if path.is_file():
        return None
    if path.is_symlink():
        return Fault(
            "missing-file",
            "is a link whose target is absent",
            "fetch the content first (DataLad: datalad get), or drop the row",
        )
    if path.is_dir():
        return Fault("missing-file", "is a folder", "name the .nii or .nii.gz file itself")
    return Fault("missing-file", "no such file", "correct the path, or drop the row")


def _without_duplicates(
    candidates: Sequence[Candidate], problems: list[Problem]
) -> list[Candidate]:
    """Drop every candidate of a person, or of a file, that the table holds in two versions.

    All versions go: nothing in the table says which of them is right.
    """
    by_path: dict[Path, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_path[candidate.path].append(candidate)
    single: dict[str, list[Candidate]] = defaultdict(list)
    for path, same in by_path.items():
        if len(same) == 1:
            single[same[0].participant].append(same[0])
            continue
        people = sorted({c.participant for c in same})
        problems.append(
            Problem(
                str(path),
                people[0],
                "duplicate-file",
                f"listed {len(same)} times, for {_few(people)} ({_few(c.where for c in same)})",
                "keep the right row",
            )
        )
    kept: list[Candidate] = []
    for participant, same in single.items():
        sites = sorted({c.site or "" for c in same})
        slots = {(c.session, c.run) for c in same}
        if len(sites) > 1:
            detail = f"listed at {len(sites)} sites: {_few(sites)}"
            remedy = "keep the person at one site, so that nobody is trained on and tested on"
        elif len(slots) < len(same):
            detail = f"listed {len(same)} times ({_few(c.where for c in same)})"
            remedy = "keep one row, or tell the scans apart in a session column"
        else:
            kept += same
            continue
        problems.append(
            Problem(str(same[0].path), participant, "duplicate-participant", detail, remedy)
        )
    return kept


def _few(words: Iterable[str]) -> str:
    shown = list(words)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
