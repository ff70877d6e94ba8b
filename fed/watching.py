"""Who is told of a run's progress: the terminal, and the log in the run's folder."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol


class Watcher(Protocol):
    """Told of a run's progress; see the command line for one that draws it."""

    def preparing(self, done: int, total: int) -> None:
        """``done`` of ``total`` scans have been read."""

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        """Round ``number`` asks ``sites``; ``rounds + 1`` hands out the final model."""

    def site_answered(self, site: str) -> None:
        """A site finished its part of the round."""

    def round_finished(self, entry: Mapping[str, Any]) -> None:
        """A round's entry of the history is known."""

    def notice(self, text: str) -> None:
        """Something a user should read, such as skipped scans or a site's failure."""


class Silent:
    """A watcher that says nothing."""

    def preparing(self, done: int, total: int) -> None:
        """Say nothing."""

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        """Say nothing."""

    def site_answered(self, site: str) -> None:
        """Say nothing."""

    def round_finished(self, entry: Mapping[str, Any]) -> None:
        """Say nothing."""

    def notice(self, text: str) -> None:
        """Say nothing."""


class Logged:
    """Writes what happens to a run's log, and passes it on to another watcher.

    Parameters
    ----------
    log : logging.Logger
        See `open_log`.
    watcher : Watcher
        Told the same.
    """

    def __init__(self, log: logging.Logger, watcher: Watcher) -> None:
        self._log, self._watcher = log, watcher
        self._started = time.monotonic()

    def preparing(self, done: int, total: int) -> None:
        """Pass it on; the log needs no line for every scan."""
        self._watcher.preparing(done, total)

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        """Write whom the round asks."""
        what = f"round {number} of {rounds}" if number <= rounds else "final model"
        self._log.info("%s: asking %d sites: %s", what, len(sites), ", ".join(sites))
        self._started = time.monotonic()
        self._watcher.round_started(number, rounds, sites)

    def site_answered(self, site: str) -> None:
        """Write how long the site took, waiting for its turn included."""
        self._log.info("%s: done after %.3f s", site, time.monotonic() - self._started)
        self._watcher.site_answered(site)

    def round_finished(self, entry: Mapping[str, Any]) -> None:
        """Write what the sites measured of the model after that round."""
        mae = entry.get("test_mae")
        error = "no finite error" if mae is None else f"test MAE {mae:.3f} years"
        people, sparsity = entry["test_n"], entry["sparsity_prunable"]
        text = "model of round %d: %s on %d people, sparsity %.4f"
        self._log.info(text, entry["round"], error, people, sparsity)
        self._watcher.round_finished(entry)

    def notice(self, text: str) -> None:
        """Write it as a warning."""
        self._log.warning("%s", text)
        self._watcher.notice(text)


@contextmanager
def open_log(path: Path) -> Iterator[logging.Logger]:
    """Append to a log with a UTC time in every line; a full disk costs lines, not the run."""
    handler = _Handler(path, encoding="utf-8", delay=True)
    handler.setFormatter(line_format())
    # Not from the registry: two runs in one process have a log each.
    log = logging.Logger("sparsekit.fed.run", logging.INFO)
    log.addHandler(handler)
    try:
        yield log
    finally:
        handler.close()


class _Handler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: what fills the disk or takes the folder away stops the run elsewhere."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def line_format() -> logging.Formatter:
    """Return how a line of a log looks: UTC time, level, text on one line."""
    formatter = _OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return formatter


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Names of sites and texts of errors come from elsewhere: none may forge a line.
        text = super().format(record)
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
