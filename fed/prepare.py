"""From a cohort on disk to the sites of a federation: read, check, cache, split."""

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import nibabel
import numpy as np

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.cache import SiteData as SiteCache
from sparsekit.fed.cohort.cache import build_site_cache
from sparsekit.fed.cohort.read import Problem, Scan, find_scans
from sparsekit.fed.cohort.split import split_participants
from sparsekit.fed.config import GRIDS, RunConfig
from sparsekit.fed.seeds import derive_seed
from sparsekit.fed.site import SiteData
from sparsekit.fed.training import SiteView

POOLED_SITE = "pooled"
Progress = Callable[[int, int], None]


def prepare_sites(
    config: RunConfig, cache_root: Path, progress: Progress | None = None
) -> tuple[list[SiteData], int, list[Problem]]:
    """Read every site's scans into its cache and split its people.

    Parameters
    ----------
    config : RunConfig
        Says where the cohort is and how to read it.
    cache_root : Path
        Folder of the caches; runs may share it.
    progress : callable, optional
        Called with (scans read, scans in all).

    Returns
    -------
    sites : list of SiteData
        In the order of their names.
    resolution : int
        Voxel size of the grid in mm.
    skipped : list of Problem
        What was left out, when ``config.on_problem`` is ``"skip"``.

    Raises
    ------
    CohortError
        If nothing usable is found, a site has fewer than 2 people, or something is wrong with a
        scan and ``config.on_problem`` is ``"refuse"``.
    """
    source = Path(config.cohort)
    scans, problems = find_scans(source)
    if problems and config.on_problem == "refuse":
        first = problems[0]
        raise CohortError(
            f"cohort: {source} has {len(problems)} problem(s), the first: {first.path}: "
            f"{first.detail}. See them all with `sparsekit cohort check {source}`, or leave the "
            "scans concerned out with --on-problem skip."
        )
    if not scans:
        raise CohortError(f"cohort: no usable scan in {source}; see `sparsekit cohort check`")
    resolution = config.resolution or _resolution_of(scans[0])
    skipped = list(problems)
    sites: list[SiteData] = []
    done = 0
    for name in sorted({scan.site for scan in scans}):
        own = [scan for scan in scans if scan.site == name]
        before = done

        def site_progress(count: int, _total: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, len(scans))

        cache = build_site_cache(
            own,
            cache_root / quote(name, safe=""),
            in_shape=GRIDS[resolution],
            voxel_mm=float(resolution),
            normalisation=config.normalisation,
            on_problem=config.on_problem,
            progress=site_progress,
        )
        done += len(own)
        skipped += cache.skipped
        sites.append(_split_site(name, cache, config))
    return sites, resolution, skipped


def _resolution_of(scan: Scan) -> int:
    """Choose the grid nearest to a scan's own voxels: 4 mm only for scans as coarse as that."""
    try:
        zooms = nibabel.load(scan.path).header.get_zooms()[:3]  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise CohortError(f"cohort: cannot read {scan.path}: {error}") from None
    return 4 if float(min(zooms)) > 3.0 else 2


def _split_site(name: str, cache: SiteCache, config: RunConfig) -> SiteData:
    if len(set(cache.participants)) < 2:
        raise CohortError(
            f"cohort: site {name!r} has {len(set(cache.participants))} usable people; at least 2 "
            "are needed, one to train on and one to hold out. Merge it with another site."
        )
    train, test = split_participants(
        cache.participants,
        seed=derive_seed(config.seed, "split", name),
        test_fraction=config.test_fraction,
    )
    return SiteData(
        name=name,
        train=SiteView(cache.images, cache.ages, train.astype(np.int64)),
        test=SiteView(cache.images, cache.ages, test.astype(np.int64)),
        test_people=tuple(cache.participants[i] for i in test),
        test_sites=(name,) * len(test),
        preprocessing_id=cache.preprocessing_id,
    )


def pool_sites(sites: Sequence[SiteData]) -> SiteData:
    """Return all sites' scans as one site; training and held-out people stay who they are."""
    images = [volume for site in sites for volume in site.train.images]  # type: ignore[attr-defined]
    ages = np.concatenate([site.train.ages for site in sites])
    offsets = np.cumsum([0] + [len(site.train.ages) for site in sites[:-1]])
    train = np.concatenate([s.train.index + o for s, o in zip(sites, offsets, strict=True)])
    test = np.concatenate([s.test.index + o for s, o in zip(sites, offsets, strict=True)])
    return SiteData(
        name=POOLED_SITE,
        train=SiteView(images, ages, train),
        test=SiteView(images, ages, test),
        test_people=tuple(person for site in sites for person in site.test_people),
        test_sites=tuple(name for site in sites for name in site.test_sites),
        preprocessing_id=sites[0].preprocessing_id,
    )
