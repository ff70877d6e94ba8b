"""From a cohort on disk to the sites of a federation: read, check, cache, split."""

import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import xxhash

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.cache import SiteData, build_site_cache
from sparsekit.fed.cohort.read import Problem, Scan, find_scans
from sparsekit.fed.cohort.split import split_participants
from sparsekit.fed.cohort.volume import ScanError, load_scan
from sparsekit.fed.config import GRIDS, RunConfig
from sparsekit.fed.seeds import derive_seed
from sparsekit.fed.site import SitePeople
from sparsekit.fed.training import Scans

POOLED_SITE = "pooled"
_MOST_LETTERS = 200  # a file name may have 255 bytes
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What a run works on.

    Attributes
    ----------
    sites : list of SitePeople
        In the order of their names.
    resolution : int
        Voxel size of the grid in mm.
    skipped : list of Problem
        What was left out, when ``on_problem`` is ``"skip"``.
    synthetic : bool
        Whether the scans come from a cohort that says it is synthetic.
    """

    sites: list[SitePeople]
    resolution: int
    skipped: list[Problem]
    synthetic: bool


def prepare_sites(
    config: RunConfig, cache_root: Path, progress: Progress | None = None
) -> Prepared:
    """Read every site's scans into its cache and split its people.

    Parameters
    ----------
    config : RunConfig
        Says where the cohort is and how to read it.
    cache_root : Path
        Folder of the caches; runs may share it.
    progress : callable, optional
        Called with (scans read, scans in all).

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
    names = sorted({scan.site for scan in scans})
    _check_names(names)
    resolution = config.resolution or _resolution_of(scans)
    skipped = list(problems)
    caches: dict[str, SiteData] = {}
    done = 0
    for name in names:
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
        caches[name] = cache
    copies = _copies(caches.values(), config)
    skipped += copies.values()
    sites = [_split_site(name, cache, config, set(copies)) for name, cache in caches.items()]
    return Prepared(sites, resolution, skipped, is_synthetic(scans[0].path))


def prepare_elsewhere(config: RunConfig) -> Prepared:
    """Return what the server knows where the sites are other machines: the grid, no scans.

    Parameters
    ----------
    config : RunConfig
        Its ``resolution`` is set.
    """
    assert config.resolution is not None
    return Prepared(sites=[], resolution=config.resolution, skipped=[], synthetic=False)


def _copies(caches: Iterable[SiteData], config: RunConfig) -> dict[str, Problem]:
    """Find scans that stand under several names: they could be trained on and tested on at once.

    Nothing says which name is right, so all of them are left out, or refused.
    """
    names: dict[str, list[tuple[str, str]]] = {}
    for cache in caches:
        for digest, person in zip(cache.digests, cache.participants, strict=True):
            names.setdefault(digest, []).append((cache.site, person))
    copies = {
        digest: Problem(
            path=digest,
            participant=owners[0][1],
            kind="duplicate-scan",
            detail="one scan stands under " + ", ".join(f"{p} of {site}" for site, p in owners),
            remedy="keep the entry that is right",
        )
        for digest, owners in names.items()
        if len(owners) > 1
    }
    if copies and config.on_problem == "refuse":
        raise CohortError(
            f"cohort: {next(iter(copies.values())).detail} ({len(copies)} such scans). See "
            "`sparsekit cohort check`, or leave them out with `--on-problem skip`"
        )
    return copies


def is_synthetic(scan: Path) -> bool:
    """Whether a scan lies in a folder whose dataset_description.json calls it synthetic."""
    for folder in scan.resolve().parents:
        try:
            text = (folder / "dataset_description.json").read_text(encoding="utf-8")
            return "SparsekitCohort" in json.loads(text)
        except (OSError, ValueError, TypeError):
            continue
    return False


def _resolution_of(scans: Sequence[Scan]) -> int:
    """Choose the grid nearest to the first usable scan's voxels: 4 mm only for ones as coarse."""
    first: ScanError | None = None
    for scan in scans:
        try:
            affine = load_scan(scan).affine
        except ScanError as error:
            first = first or error
        else:
            zooms = np.linalg.norm(affine[:3, :3], axis=0)
            return 4 if float(zooms.min()) > 3.0 else 2
    raise CohortError(f"cohort: none of the {len(scans)} scans can be read, the first: {first}")


def _check_names(sites: Sequence[str]) -> None:
    for site in sites:
        # Each site gets folders of its name, percent-encoded; a dot alone is left as it is.
        if site in (".", ".."):
            raise CohortError(f"cohort: {site!r} cannot be a site's name; give it another")
        if len(quote(site, safe="")) > _MOST_LETTERS:
            raise CohortError(
                f"cohort: the site name {site[:40]!r}... is too long for a folder; shorten it"
            )


def _split_site(
    name: str, cache: SiteData, config: RunConfig, left_out: Container[str]
) -> SitePeople:
    rows = [row for row, digest in enumerate(cache.digests) if digest not in left_out]
    people = [cache.participants[row] for row in rows]
    if len(set(people)) < 2:
        raise CohortError(
            f"cohort: site {name!r} has {len(set(people))} usable people; at least 2 "
            "are needed, one to train on and one to hold out. Merge it with another site."
        )
    train, test = split_participants(
        people, seed=derive_seed(config.seed, "split", name), test_fraction=config.test_fraction
    )
    index = np.asarray(rows, np.int64)
    content = xxhash.xxh3_128()
    for part in (index[train], index[test]):
        for row in part:
            line = (cache.participants[row], cache.digests[row], float(cache.ages[row]))
            content.update(repr(line).encode())
        content.update(b"|")
    return SitePeople(
        name=name,
        train=SiteScans(cache, index[train]),
        test=SiteScans(cache, index[test]),
        test_sites=(name,) * len(test),
        preprocessing_id=cache.preprocessing_id,
        content=content.hexdigest(),
    )


class SiteScans:
    """Some of a site's prepared scans.

    Parameters
    ----------
    cache : SiteData
        All scans of the site.
    rows : ndarray, (n,), int64
        The ones that belong here.
    """

    def __init__(self, cache: SiteData, rows: npt.NDArray[np.int64]) -> None:
        self._images = cache.images
        self._rows = rows
        self._ages = cache.ages[rows]
        self._participants = tuple(cache.participants[row] for row in rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ages(self) -> npt.NDArray[np.float32]:
        """Years, (n,)."""
        return self._ages

    @property
    def participants(self) -> tuple[str, ...]:
        """The person of each scan."""
        return self._participants

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """Return scan ``index``, (d, h, w)."""
        return np.asarray(self._images[self._rows[index]], dtype=np.float32)


class PooledScans:
    """Several sites' scans in a row, as one.

    Parameters
    ----------
    parts : sequence of Scans
        In order; none is copied.
    """

    def __init__(self, parts: Sequence[Scans]) -> None:
        self._place = [(part, row) for part in parts for row in range(len(part))]
        self._ages = np.concatenate([part.ages for part in parts])
        self._participants = tuple(person for part in parts for person in part.participants)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ages(self) -> npt.NDArray[np.float32]:
        """Years, (n,)."""
        return self._ages

    @property
    def participants(self) -> tuple[str, ...]:
        """The person of each scan."""
        return self._participants

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """Return scan ``index``, (d, h, w)."""
        part, row = self._place[index]
        return part.volume(row)


def pool_sites(sites: Sequence[SitePeople]) -> SitePeople:
    """Return all sites' scans as one site; training and held-out people stay who they are."""
    return SitePeople(
        name=POOLED_SITE,
        train=PooledScans([site.train for site in sites]),
        test=PooledScans([site.test for site in sites]),
        test_sites=tuple(name for site in sites for name in site.test_sites),
        preprocessing_id=sites[0].preprocessing_id,
        content=xxhash.xxh3_128_hexdigest("".join(site.content for site in sites).encode()),
    )
