"""Where the commands print: one console for results, one for everything else."""

import os

from rich.console import Console

_PIPE_COLUMNS = 1000


def result_console() -> Console:
    """Return the console of standard output.

    Into a pipe or a file, tables keep their full width: rich would assume 80 columns there and
    cut names off.
    """
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=_PIPE_COLUMNS)


def notice_console() -> Console:
    """Return the console of standard error; long lines are left to the terminal to wrap."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return ``text`` as one line that cannot steer a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def describe(error: Exception) -> str:
    """Return an error's text as one line; one of the operating system begins with the file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "file"
        return printable(f"{name}: {error.strerror}")
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    return printable(str(error))
