"""`sparsekit cohort make`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsekit.cli.consoles import notice_console
from sparsekit.fed.cohort.environment import ENVIRONMENTS
from sparsekit.fed.cohort.make import CohortSettings, make_cohort
from sparsekit.fed.cohort.make.cohort import is_finished


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
    workers: Annotated[int, typer.Option(help="Processes that render.")] = 1,
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
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task("making scans", total=subjects)
            make_cohort(
                out,
                subjects=subjects,
                sites=sites,
                resolution=resolution,
                environment=environment,
                seed=seed,
                residual_scale=residual_scale,
                workers=workers,
                progress=lambda done, _: bar.update(task, completed=done),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: nothing was kept of {out}") from None
    console.print(
        f"{out}: {subjects} synthetic scans at {resolution} mm, {sites} sites", markup=False
    )
