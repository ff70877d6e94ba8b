"""`sparsekit cohort`: make and check cohorts of NIfTI files."""

import re
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.check_table import print_check, reading_bar
from sparsekit.cli.cohort_make import make
from sparsekit.errors import UsageError
from sparsekit.fed.cohort.check import check_cohort

app = typer.Typer(no_args_is_help=True, help="Make and check cohorts of NIfTI files.")
app.command("make")(make)


@app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="BIDS folder, or CSV with path, age, site.")],
    in_shape: Annotated[
        str | None,
        typer.Option(help="Refuse scans of another shape, such as 91x109x91 (R, A, S order)."),
    ] = None,
) -> None:
    """Read every scan to its end and list everything that is wrong in one table.

    Exit code 0 when all is well, 1 when there are problems, 2 for a wrong path or option.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a BIDS folder or a CSV")
    shape = None if in_shape is None else _parse_shape(in_shape)
    with reading_bar() as progress:
        report = check_cohort(path, in_shape=shape, progress=progress)
    print_check(report, path)
    if report.problems:
        raise typer.Exit(1)


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = re.fullmatch(r"(\d+)[x,](\d+)[x,](\d+)", text.replace(" ", ""))
    if parts is None:
        raise UsageError(f"--in-shape: expected three extents such as 91x109x91, got {text!r}")
    return int(parts[1]), int(parts[2]), int(parts[3])
