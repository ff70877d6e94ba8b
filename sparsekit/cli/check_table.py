"""What `sparsekit cohort check` shows on a terminal: progress, one table, a summary."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsekit.cli.consoles import notice_console
from sparsekit.fed.cohort.check import CheckReport, plural

_FILE_WIDTH = 140  # columns when the output goes to a file or pipe


@contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None]]:
    """Draw a bar of scans read on standard error; yields the progress callback."""
    console = notice_console()
    with Progress(
        TextColumn("reading scans"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_check(report: CheckReport, source: Path) -> None:
    """Print the table of problems, the notes and one summary line."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_FILE_WIDTH)
    if report.problems:
        table = Table(title=f"Problems in {escape(str(source))}", show_lines=True)
        table.add_column("kind", no_wrap=True)
        table.add_column("participant", overflow="fold")
        table.add_column("file or row", overflow="fold", ratio=2)
        table.add_column("found", overflow="fold", ratio=3)
        table.add_column("remedy", overflow="fold", ratio=3)
        root = source if source.is_dir() else source.parent
        for problem in sorted(report.problems, key=lambda p: (p.kind, p.path)):
            path = Path(problem.path)
            shown = path.relative_to(root) if path.is_relative_to(root) else path
            cells = (problem.kind, problem.participant or "", str(shown))
            table.add_row(*map(escape, (*cells, problem.detail, problem.remedy)))
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    fit = report.ok_scans
    console.print(
        f"{plural(len(fit), 'scan')} of "
        f"{plural(len({scan.participant for scan in fit}), 'person', 'people')} at "
        f"{plural(len({scan.site for scan in fit}), 'site')}: fit for training; "
        f"{_count(report)}; {plural(report.n_files, 'volume')} opened, "
        f"{report.bytes_read / 1e6:.1f} MB read",
        markup=False,
    )


def _count(report: CheckReport) -> str:
    kinds = Counter(problem.kind for problem in report.problems)
    if not kinds:
        return "no problems"
    listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{plural(len(report.problems), 'problem')} ({listed})"
