"""``sparsekit bench``: speed-up versus sparsity on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from sparsekit.cli.consoles import notice_console, result_console
from sparsekit.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Measure on this machine against what torch offers.")


@app.callback()
def group() -> None:
    """Keep `kernels` a command of its own: typer makes a lone one the group itself."""


@app.command("kernels")
def kernels_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds, layers and sparsities: a minute.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every sample as JSON.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Print how much faster masked training is than dense torch, by sparsity (a few minutes).

    The network is BrainAgeCNN at 91 x 109 x 91. Outputs and gradients are compared before anything
    is timed; both sides run in turns. Best on an otherwise idle machine.
    """
    if json_file is not None and json_file.exists() and not force:
        raise UsageError(f"FILE: {json_file} exists; choose another name or pass --force")
    # After the options are known to be fine: torch takes a second to load.
    from sparsekit.bench import machine, speedup

    wanted = speedup.plan(quick)
    rows: list[dict[str, Any]] = []
    with Progress(console=notice_console(), transient=True) as progress:
        task = progress.add_task("measuring", total=wanted.steps)
        for row in speedup.measure(wanted):
            rows.append(row)
            progress.advance(task)
    console = result_console()
    header, *lines = speedup.table(rows, wanted)
    table = Table(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(speedup.footnote())
    if json_file is not None:
        found = {"machine": machine.describe(), "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
