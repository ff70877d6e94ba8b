"""`sparsekit cohort make`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsekit.cli.consoles import notice_console
from sparsekit.fed.cohort.environment import ENVIRONMENTS
from sparsekit.fed.cohort.make import CohortSettings, make_cohort
from sparsekit.fed.cohort.make.cohort import is_finished
from sparsekit.fed.cohort.make.unfinished import kept_scans


def make(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    subjects: Annotated[int, typer.Option(help="Participants in all, at least 4 per site.")],
    sites: Annotated[int, typer.Option(help="Sites, each with a scanner of its own.")] = 8,
    resolution: Annotated[int, typer.Option(help="Voxel size in mm: 4 or 2.")] = 4,
    environment: Annotated[
        str, typer.Option(help=f"Who is where: {', '.join(ENVIRONMENTS)}.")
    ] = "uniform-iid",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    residual_scale: Annotated[
        float, typer.Option(help="Spread between people of one age; 1 is that of real people.")
    ] = 0.5,
    workers: Annotated[
        int | None, typer.Option(help="Processes that render; by default one per core.")
    ] = None,
) -> None:
    """Make a SYNTHETIC cohort of skull-stripped T1 scans as a BIDS derivative.

    Ages and sizes follow the 8 sites of the FedSparsify papers. No person was scanned.
    """
    settings = CohortSettings(subjects, sites, resolution, environment, seed, residual_scale)
    settings.plans()
    console = notice_console()
    if is_finished(out, settings):
        console.print(f"{out} already holds exactly this cohort; kept as it is", markup=False)
        return
    kept = kept_scans(out)
    if kept:
        console.print(f"{out}: going on with the {kept} scans that are there", markup=False)
    try:
        with _shown(console, subjects) as progress:
            make_cohort(
                out,
                subjects=subjects,
                sites=sites,
                resolution=resolution,
                environment=environment,
                seed=seed,
                residual_scale=residual_scale,
                workers=len(os.sched_getaffinity(0)) if workers is None else workers,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {kept_scans(out)} scans are kept; the same command goes on with them"
        ) from None
    console.print(
        f"{out}: {subjects} synthetic scans at {resolution} mm, {sites} sites", markup=False
    )


@contextmanager
def _shown(console: Console, subjects: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress as a bar on a terminal, elsewhere as a line for each tenth."""
    if not console.is_terminal:
        yield _Tenths(console)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("making scans", total=subjects)
        yield lambda done, _: bar.update(task, completed=done)


class _Tenths:
    """Prints how many scans are made whenever another tenth is full, but for the last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total
        if self._shown < tenths < 10:
            self._console.print(f"{done} of {total} scans", markup=False)
        self._shown = tenths
