"""Entry point: puts the command groups together and turns errors into exit codes."""

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from sparsekit._version import __version__
from sparsekit.cli import bench, codec, cohort, doctor, fed, privacy
from sparsekit.cli.consoles import describe, notice_console, printable
from sparsekit.errors import SparsekitError, UsageError

EXIT_FINE = 0
EXIT_PROBLEMS = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class _InterruptError(Exception):
    """Ctrl-C on its way past typer, which would turn it into an exit without our words."""


class _Group(TyperGroup):
    """The commands; hands Ctrl-C on to `main`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the line names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptError(str(error) or "interrupted") from error


app = typer.Typer(
    name="sparsekit",
    cls=_Group,
    help="Pruned 3D networks that pay off. A research tool, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cohort.app, name="cohort")
app.add_typer(fed.app, name="fed")
app.add_typer(codec.app, name="codec")
app.add_typer(bench.app, name="bench")
app.add_typer(privacy.app, name="privacy")
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Take the options that stand before the command; `main` reads --debug itself."""
    del debug, version


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 1 problems found, 2 usage, 130 interrupted.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; ``sys.argv[1:]`` by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --debug is taken anywhere on the line: people add it at the end, after the error.
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks must not stop a command.
            stream.reconfigure(errors="replace")
    try:
        app(args=arguments, prog_name="sparsekit", standalone_mode=True)
    except _InterruptError as error:
        notice_console().print(f"sparsekit: {printable(str(error))}", markup=False)
        sys.exit(EXIT_INTERRUPTED)
    except (SparsekitError, OSError) as error:
        if debug:
            traceback.print_exc()
        notice_console().print(f"sparsekit: error: {describe(error)}", markup=False)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_PROBLEMS)
