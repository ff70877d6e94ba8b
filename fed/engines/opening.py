"""From a run's settings to the engine of another framework."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparsekit.fed.config import RunConfig
from sparsekit.fed.engines.options import FlareOptions, FlowerOptions
from sparsekit.fed.engines.relayed import RelayedEngine, site_files
from sparsekit.fed.engines.site_app import introduction
from sparsekit.fed.site import SitePeople


def open_relayed(
    config: RunConfig,
    run: Path,
    cache: Path,
    sites: Sequence[SitePeople],
    folders: Sequence[Path],
    resolution: int,
) -> RelayedEngine:
    """Start the framework that ``config.engine`` names.

    Parameters
    ----------
    config : RunConfig
    run, cache : Path
        Folder of the run and of the prepared scans.
    sites : sequence of SitePeople
        The sites of this machine; none where they are other machines.
    folders : sequence of Path
        Where each keeps its results.
    resolution : int
        Voxel size of the grid, in mm.
    """
    options: FlareOptions | FlowerOptions
    if config.engine == "flare":
        options = config.flare or FlareOptions()
    else:
        options = config.flower or FlowerOptions()
    count = len(options.sites or sites)
    # Frameworks take few of the letters that we do.
    names = [f"site-{number}" for number in range(1, count + 1)]
    if options.deployed:
        # Every site has a machine of its own.
        workers, threads, sizes, files = count, config.threads, dict.fromkeys(options.sites, 0), {}
    else:
        workers = max(1, min(config.threads, count))
        threads = max(1, config.threads // workers)
        sizes = {site.name: len(site.train) for site in sites}
        own = dict(zip(sizes, folders, strict=True))
        files = site_files(config.cohort, own, cache, names)
    return RelayedEngine(
        PROGRAMS[config.engine],
        dataclasses.asdict(options) | {"names": names},
        files,
        run=run,
        introduction=introduction(config, resolution, threads),
        sizes=sizes,
        workers=workers,
        deadline=config.deadline,
        start_seconds=options.start_seconds,
        interface=options.interface,
    )


PROGRAMS = {name: f"sparsekit.fed.engines.{name}" for name in ("flare", "flower")}
"""Modules that start a framework, by engine."""
