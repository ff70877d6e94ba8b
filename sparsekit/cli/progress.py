"""What a federation shows on a terminal: live progress, a final table, a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from sparsekit.cli.consoles import notice_console, printable, result_console
from sparsekit.fed.compare import load_result, run_names
from sparsekit.fed.tables import difference_cells, format_bytes, line_items, saving_cells
from sparsekit.fed.unfinished import read_progress, site_items, state_items, way_on

_MOST_NAMED = 3


class LiveWatcher:
    """Draws a bar of scans read, one of rounds and one of sites; prints a line per round.

    Everything goes to standard error, so that the final table alone is on standard output.
    """

    def __init__(self, title: str) -> None:
        self._console = notice_console()
        self._title = printable(title)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._scans: TaskID | None = None
        self._rounds: TaskID | None = None
        self._sites: TaskID | None = None
        self._what = "sites"
        self._waiting: list[str] = []

    def __enter__(self) -> "LiveWatcher":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def preparing(self, done: int, total: int) -> None:
        """Show how many scans have been read."""
        if self._scans is None:
            self._scans = self._progress.add_task("reading scans", total=total)
        self._progress.update(self._scans, completed=done)

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        """Show the round and an empty bar of sites."""
        if self._scans is not None:
            self._progress.remove_task(self._scans)
            self._scans = None
        if self._rounds is None or self._sites is None:
            self._rounds = self._progress.add_task(escape(f"{self._title}: rounds"), total=rounds)
            self._sites = self._progress.add_task("sites", total=len(sites))
        self._what = f"round {number}: sites" if number <= rounds else "final evaluation: sites"
        self._waiting = list(sites)
        self._progress.update(self._rounds, completed=number - 1)
        self._progress.reset(self._sites, total=len(sites), description=self._what)

    def site_answered(self, site: str) -> None:
        """Move the bar of sites on, and name the last ones that are waited for."""
        if site in self._waiting:
            self._waiting.remove(site)
        if self._sites is not None:
            what = self._what
            if 0 < len(self._waiting) <= _MOST_NAMED:
                what += f" (waiting for {_cell(', '.join(self._waiting))})"
            self._progress.update(self._sites, advance=1, description=what)

    def round_finished(self, entry: Mapping[str, Any]) -> None:
        """Print the line of a round whose model has been evaluated."""
        mae = entry.get("test_mae")
        error = f"{mae:6.2f} years" if mae is not None else "   diverged"
        self._console.print(
            f"{self._title}: after round {entry['round']:3d}  test MAE {error}  "
            f"sparsity {entry['sparsity_prunable']:6.2%}  "
            f"sent {format_bytes(entry['payload_down'] + entry['payload_up'])}",
            markup=False,
        )

    def notice(self, text: str) -> None:
        """Print something that a user should read."""
        self._console.print(printable(text), markup=False)


def print_result(run: Path, result: Mapping[str, Any]) -> None:
    """Print a finished run as a table."""
    table = Table(title=_cell(f"{run}, seed {result['config']['seed']}"))
    table.add_column("measure", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    for name, value in line_items(result).items():
        table.add_row(name, value)
    accuracy = result["accuracy"]
    for site, mae in accuracy["site_mae"].items():
        held_out = f"  {_cell(site)} ({accuracy['site_n'][site]} held out)"
        table.add_row(held_out, f"{mae:.2f} years")
    result_console().print(table)


def print_progress(run: Path) -> None:
    """Print what is known of a run that is not finished, and how its sites did."""
    progress = read_progress(run)
    table = Table(title=_cell(f"{run}, not finished"))
    table.add_column("measure", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    for name, value in state_items(progress).items():
        table.add_row(name, _cell(value))
    result_console().print(table)
    sites = Table(title="Sites")
    for name in ("site", "usable replies", "other outcomes", "seconds of a reply, median"):
        sites.add_column(name, overflow="fold")
    for row in site_items(progress):
        sites.add_row(*map(_cell, row))
    result_console().print(sites)
    result_console().print(way_on(run, progress), markup=False, soft_wrap=True)


def print_comparison(runs: list[Path]) -> None:
    """Print runs side by side, with each run's paired difference to the first."""
    columns = [line_items(load_result(run)) for run in runs]
    table = Table(title="Runs side by side")
    table.add_column("measure", overflow="fold")
    for name in run_names(runs):
        table.add_column(_cell(name), justify="right", overflow="fold")
    for name in columns[0]:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    for name, cells in saving_cells(runs).items():
        table.add_row(name, *cells)
    table.add_row("MAE minus the first's [95 %, paired]", *difference_cells(runs))
    result_console().print(table)


def _cell(text: str) -> str:
    """Return a name that users chose, so that nothing in it counts as markup."""
    return escape(printable(text))
