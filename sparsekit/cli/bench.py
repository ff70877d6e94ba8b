"""``sparsekit bench``: speed-up versus sparsity, and bytes versus sparsity, on this machine."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from sparsekit.cli.consoles import notice_console, result_console
from sparsekit.errors import ArgumentError, UsageError

app = typer.Typer(no_args_is_help=True, help="Measure on this machine against what others offer.")

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write every sample as JSON.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]


@app.command("kernels")
def kernels_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds, layers and sparsities: a minute.")
    ] = False,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IN,OUT,DxHxW",
            help="A layer of your own instead, such as 32,64,24x24x24: channels and voxels; "
            "with another kernel than 3, 32,64,24x24x24,5. Can be given again.",
        ),
    ] = None,
    json_file: Json = None,
    force: Force = False,
) -> None:
    """Print how much faster masked training is than dense torch, by sparsity (a few minutes).

    The network is BrainAgeCNN at 91 x 109 x 91. Outputs and gradients are compared before anything
    is timed; both sides run in turns. Best on an otherwise idle machine.
    """
    _check_free(json_file, force)
    # After the options are known to be fine: torch takes a second to load.
    from sparsekit.bench import speedup

    wanted = speedup.plan(quick, layer or ())
    rows = _with_progress(speedup.measure(wanted), wanted.steps)
    _show(speedup.table(rows, wanted), speedup.footnote(wanted))
    _write(json_file, rows)


@app.command("codec")
def codec_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds and sparsities, no slow rivals: a minute.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A state of your own instead: its float32 tensors, zeros as masks."
        ),
    ] = None,
    json_file: Json = None,
    force: Force = False,
) -> None:
    """Print bytes and speeds of sparse states beside other formats, by sparsity (a few minutes).

    The state is BrainAgeCNN with random weights. Rivals are those that are installed
    (pip install 'sparsekit3d[bench]'); each must give back every bit before anything is timed.
    """
    _check_free(json_file, force)
    from sparsekit.bench import codecs

    wanted = codecs.codec_plan(quick, None if state is None else _float32_of(state))
    rows = _with_progress(codecs.measure(wanted), wanted.steps)
    _show(codecs.table(rows), codecs.footnote(rows))
    _write(json_file, rows)


def _check_free(json_file: Path | None, force: bool) -> None:
    if json_file is not None and json_file.exists() and not force:
        raise UsageError(f"FILE: {json_file} exists; choose another name or pass --force")


def _float32_of(path: Path) -> dict[str, Any]:
    import torch

    from sparsekit.cli.states import open_state

    found = {n: t.contiguous() for n, t in open_state(path).items() if t.dtype == torch.float32}
    if not any(tensor.numel() for tensor in found.values()):
        raise ArgumentError(f"--state: expected float32 tensors in {path}, got none")
    return found


def _with_progress(measured: Iterable[Any], steps: int) -> list[Any]:
    rows = []
    with Progress(console=notice_console(), transient=True) as progress:
        task = progress.add_task("measuring", total=steps)
        for row in measured:
            rows.append(row)
            progress.advance(task)
    return rows


def _show(lines: Sequence[Sequence[str]], footnote: str) -> None:
    console = result_console()
    header, *body = lines
    table = Table(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right", no_wrap=len(header) <= 7)
    for line in body:
        table.add_row(*line)
    console.print(table)
    console.print(footnote, markup=False)


def _write(json_file: Path | None, rows: Sequence[Any]) -> None:
    if json_file is not None:
        from sparsekit.bench import machine

        found = {"machine": machine.describe(), "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
