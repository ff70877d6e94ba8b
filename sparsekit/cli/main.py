"""Entry point: puts the command groups together and turns errors into exit codes."""

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from sparsekit._version import __version__
from sparsekit.cli import codec, cohort, doctor, fed
from sparsekit.errors import SparsekitError, UsageError

EXIT_FINE = 0
EXIT_PROBLEMS = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="sparsekit",
    help="Pruned 3D networks that pay off. A research tool, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cohort.app, name="cohort")
app.add_typer(fed.app, name="fed")
app.add_typer(codec.app, name="codec")
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
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app(args=arguments, prog_name="sparsekit", standalone_mode=True)
    except KeyboardInterrupt as error:
        text = str(error) or "interrupted"
        console.print(f"sparsekit: {text}", markup=False)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (sparsekit ... | head): not worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FINE)
    except (SparsekitError, OSError) as error:
        if debug:
            raise
        text = " ".join(str(error).split())
        console.print(f"sparsekit: error: {text}", markup=False)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_PROBLEMS)
