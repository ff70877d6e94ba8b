"""What an audit shows on a terminal: bars while it works, then tables."""

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
    TimeRemainingColumn,
)
from rich.table import Table

from sparsekit.cli.consoles import notice_console, printable, result_console
from sparsekit.fed.privacy_tables import (
    attack_rows,
    audit_note,
    comparison_note,
    conclusion,
    gap_rows,
    round_rows,
    training_rows,
)


class AuditBars:
    """Draws a bar for each of an audit's three parts on standard error."""

    def __init__(self) -> None:
        self._console = notice_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "AuditBars":
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
        """Count scans that have been read."""
        self._show("reading scans", done, total)

    def asking(self, done: int, total: int) -> None:
        """Count the questions to models."""
        self._show("asking the models", done, total)

    def attacking(self, done: int, total: int) -> None:
        """Count attackers' trainings."""
        self._show("attacking", done, total)

    def notice(self, text: str) -> None:
        """Print something that a user should read."""
        self._console.print(printable(text), markup=False)

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def print_audit(run: Path, audit: Mapping[str, Any]) -> None:
    """Print an audit's means; the pairs are in its file."""
    last = audit["moments"][-1]["round"]
    name = escape(printable(str(run)))
    _print_table(f"{name}: attacks on the models up to round {last}", attack_rows(audit))
    if len(audit["moments"]) > 1:
        _print_table("Along the training: AUC of each attack", training_rows(audit))
    _say(audit_note(audit))


def print_comparison(compared: Mapping[str, Any]) -> None:
    """Print a comparison of audits, and what can be said from it."""
    for attack in compared["attacks"]:
        _print_table(f"{attack}: at the same round", round_rows(compared, attack))
        at_gaps = gap_rows(compared, attack)
        if len(at_gaps) > 1:
            _print_table(f"{attack}: at the same train-test gap", at_gaps)
        for line in conclusion(compared, attack):
            _say(f"{attack}: {line}")
    _say(comparison_note(compared))


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for place, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(escape(printable(cell)) for cell in row))
    result_console().print(table)


def _say(text: str) -> None:
    result_console().print(printable(text), markup=False, soft_wrap=True)
