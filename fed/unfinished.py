"""What is known of a run that goes on or has stopped: from its checkpoints, ledger and log."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sparsekit.errors import SparsekitError, UsageError
from sparsekit.fed import checkpoint
from sparsekit.fed.checkpoint import resume_command
from sparsekit.fed.config import RunConfig, load_config_file, make_config
from sparsekit.fed.ledger import OUTCOME_OK, Ledger, LedgerRow
from sparsekit.fed.measures import sum_bytes
from sparsekit.fed.runner import CONFIG_FILE, LEDGER_FILE, LOG_FILE, is_running
from sparsekit.fed.tables import format_bytes

_LOG_LINES = 12
_MOST_LOG_BYTES = 1 << 16


@dataclass(frozen=True)
class Progress:
    """A run that is not finished, as far as its folder tells.

    Attributes
    ----------
    running : bool
        Whether a process works on it now.
    config : dict
        Its settings as they stand in its folder; empty if they cannot be read.
    history : list of dict
        One entry for each model up to the newest checkpoint, the first model included.
    rows : list of LedgerRow
        The whole rows of its ledger.
    log : list of str
        The newest lines of its log.
    """

    running: bool
    config: Mapping[str, Any]
    history: list[dict[str, Any]]
    rows: list[LedgerRow]
    log: list[str]


def read_progress(run: Path) -> Progress:
    """Read what there is of a run, also while it is being written.

    Raises
    ------
    UsageError
        If ``run`` is not the folder of a run.
    RunError
        If its ledger or newest checkpoint is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UsageError(f"run: {run} is not the folder of a run (it has no {CONFIG_FILE})")
    running = is_running(run)
    config: dict[str, Any] = {}
    try:
        settings: RunConfig = make_config(load_config_file(run / CONFIG_FILE))
        config = {k: v for k, v in vars(settings).items() if v is not None}
    except SparsekitError:
        # Made by another release or on a machine with a GPU: the rest can be read all the same.
        pass
    state = checkpoint.newest_state(run)
    history: list[dict[str, Any]] = [] if state is None else state["history"]
    ledger = run / LEDGER_FILE
    rows = list(Ledger(ledger).whole_rows()) if ledger.exists() else []
    return Progress(running, config, history, rows, _tail(run / LOG_FILE))


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _MOST_LOG_BYTES))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-_LOG_LINES:]


def way_on(run: Path, progress: Progress) -> str:
    """Return what somebody who reads of an unfinished run may do."""
    if progress.running:
        return "It goes on: ask again later."
    return f"It has stopped: continue it with {resume_command(run)}."


def state_items(progress: Progress) -> dict[str, str]:
    """Return what a table says of an unfinished run, in order."""
    done = progress.history[-1]["round"] if progress.history else 0
    total = progress.config.get("rounds", "?")
    tested = [entry for entry in progress.history if entry.get("test_mae") is not None]
    down, up = (sum_bytes(progress.rows, d, "payload_bytes") for d in ("down", "up"))
    items = {
        "state": "running" if progress.running else "stopped",
        "strategy": str(progress.config.get("strategy", "?")),
        "engine": str(progress.config.get("engine", "?")),
        "rounds finished": f"{done} of {total}",
        "newest test MAE": (
            f"{tested[-1]['test_mae']:.2f} years, model of round {tested[-1]['round']}"
            if tested
            else "-"
        ),
        "sparsity, prunable weights": (
            f"{progress.history[-1]['sparsity_prunable']:.2%}" if progress.history else "-"
        ),
        "payload down": format_bytes(down),
        "payload up": format_bytes(up),
    }
    if not progress.running:
        items["last word"] = _last_word(progress.log)
    return items


def _last_word(log: list[str]) -> str:
    """Return why the run stopped, as far as the log knows: a killed process writes nothing."""
    if not log:
        return "-"
    _, level, text = (*log[-1].split(" ", 2), "", "")[:3]
    return text if level in ("ERROR", "WARNING") else "none: its process ended without a word"


def site_items(progress: Progress) -> list[tuple[str, str, str, str]]:
    """Return site, usable replies of those asked for, other outcomes, median seconds of a reply."""
    items = []
    for site in sorted({row.client for row in progress.rows}):
        replies = [
            row
            for row in progress.rows
            if row.client == site and row.direction == "up" and row.round
        ]
        outcomes = Counter(row.outcome for row in replies)
        good = outcomes.pop(OUTCOME_OK, 0)
        seconds = [row.seconds for row in replies if row.outcome == OUTCOME_OK]
        others = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        items.append(
            (
                site,
                f"{good} of {len(replies)}",
                others or "-",
                f"{median(seconds):.2f}" if seconds else "-",
            )
        )
    return items
