"""Find the scans of a cohort: a BIDS tree with participants.tsv, or a CSV that lists files."""

from pathlib import Path

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.bids_tree import find_bids_scans
from sparsekit.fed.cohort.csv_list import find_listed_scans
from sparsekit.fed.cohort.scans import Problem, Scan

__all__ = ["Problem", "Scan", "find_scans"]


def find_scans(source: Path) -> tuple[list[Scan], list[Problem]]:
    """List the usable scans of a cohort and what is wrong with the rest.

    Only tables and file names are read; `sparsekit.fed.cohort.check.check_cohort` reads the
    volumes too.

    Parameters
    ----------
    source : Path
        A BIDS folder with ``participants.tsv`` (columns ``participant_id``, ``age`` and
        optionally ``site``, ``sex``), or a CSV or TSV with the columns ``path``, ``age``,
        ``site`` and optionally ``participant``, ``session``, ``sex``, ``mask``.

    Returns
    -------
    scans : list of Scan
        Ordered by site, participant, session and path.
    problems : list of Problem
        Every row and file that was left out, with the reason.

    Raises
    ------
    CohortError
        Nothing can be read: no such path, no table, a needed column is absent.
    """
    source = Path(source)
    if source.is_dir():
        return find_bids_scans(source)
    if source.is_file():
        return find_listed_scans(source)
    raise CohortError(f"{source} does not exist; give a BIDS folder or a CSV")
