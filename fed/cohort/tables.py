"""Tables that come with scans: reading TSV and CSV files, and making sense of an age."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.errors import CohortError

MISSING_WORDS = frozenset({"", "n/a", "na", "nan", "none", "null", "-", ".", "?"})
OLDEST = 120.0

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,2})?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_CENSORED = re.compile(r"[<>]=?\s*\d+(\.\d+)?|[≤≥]\s*\d+(\.\d+)?|\d+(\.\d+)?\s*\+")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, without saying with which file.

    Attributes
    ----------
    kind : str
        Short name to sort and filter by, such as ``"truncated"``.
    detail : str
        What was found.
    remedy : str
        What to do about it.
    """

    kind: str
    detail: str
    remedy: str


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes
    ----------
    line : int
        Line number in the file, counted from 1.
    cells : Mapping of str to str
        Stripped text by lower-case column name.
    n_cells : int
        How many cells the line has; more than there are columns means a stray delimiter.
    """

    line: int
    cells: Mapping[str, str]
    n_cells: int


@dataclass(frozen=True)
class Table:
    """A table with a header line.

    Attributes
    ----------
    path : Path
    columns : tuple of str
        Lower-case, stripped.
    rows : tuple of Row
        Lines that are not blank.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def column(self, names: Sequence[str]) -> str | None:
        """Return the first of `names` that the table has, or None."""
        return next((name for name in names if name in self.columns), None)


def read_table(path: Path) -> Table:
    """Read a TSV, or a CSV delimited by comma, semicolon or tab, in UTF-8 with or without BOM.

    Parameters
    ----------
    path : Path
        A name that ends in ``.tsv`` means tabs and no quoting (as BIDS says); otherwise the
        delimiter is the one that the header line holds most often.

    Returns
    -------
    Table

    Raises
    ------
    CohortError
        The file cannot be read, is not UTF-8 text, or has no header line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CohortError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CohortError(f"{path} is not UTF-8 text; save the table as 'CSV UTF-8'") from error
    if "\0" in text:
        raise CohortError(f"{path} is not a text table; save it as 'CSV UTF-8'")
    header = next((line for line in text.splitlines() if line.strip()), "")
    if not header:
        raise CohortError(f"{path} is empty; expected a header line with column names")
    try:
        if path.suffix.lower() == ".tsv":
            reader = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            delimiter = max(",;\t", key=header.count)
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        lines = [
            (reader.line_num, [cell.strip() for cell in cells])
            for cells in reader
            if any(cell.strip() for cell in cells)
        ]
    except csv.Error as error:
        raise CohortError(f"{path}: not a readable table: {error}") from error
    columns = tuple(cell.lower() for cell in lines[0][1])
    doubled = sorted({name for name in columns if name and columns.count(name) > 1})
    if doubled:
        raise CohortError(f"{path}: column {doubled[0]!r} occurs twice; keep one")
    rows = tuple(
        Row(line, dict(zip(columns, cells, strict=False)), len(cells)) for line, cells in lines[1:]
    )
    return Table(path, columns, rows)


def is_missing(text: str | None) -> bool:
    """Say whether a cell holds nothing: absent, blank, or a word such as ``n/a``."""
    return text is None or text.strip().lower() in MISSING_WORDS


def parse_age(text: str | None) -> float | Fault:
    """Turn the text of an age cell into years.

    Parameters
    ----------
    text : str or None

    Returns
    -------
    float or Fault
        Years, or why the text is not an age: kinds ``age-missing``, ``age-censored``
        (``89+``), ``age-decimal-comma``, ``age-unreadable`` and ``age-implausible``
        (outside 0 to 120).
    """
    if text is None or is_missing(text):
        shown = "no value" if text is None or not text.strip() else repr(text.strip())
        return Fault("age-missing", f"age is {shown}", "enter the age in years, or drop the row")
    text = text.strip()
    if _CENSORED.fullmatch(text):
        return Fault(
            "age-censored",
            f"age is {text!r}, a limit and not a number",
            "enter the exact age where the data agreement allows it, or drop the row",
        )
    if _DECIMAL_COMMA.fullmatch(text):
        return Fault(
            "age-decimal-comma",
            f"age is {text!r} with a decimal comma",
            f"write {text.replace(',', '.')} with a decimal point",
        )
    if not text.isascii() or not _NUMBER.fullmatch(text):
        return Fault("age-unreadable", f"age is {text!r}", "write years as a number, such as 63.5")
    age = float(text)
    if not math.isfinite(age) or not 0 <= age <= OLDEST:
        return Fault(
            "age-implausible",
            f"age is {text}, outside 0 to {OLDEST:.0f} years",
            "write the age at the scan in years",
        )
    return age
