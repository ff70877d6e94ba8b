"""Make a whole cohort: draw the people, render them with several workers, go on where one ended."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from sparsekit.errors import CohortError, UsageError
from sparsekit.fed.cohort.environment import SitePlan, plan_sites
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.bids import read_settings, scan_path, write_scan, write_tables
from sparsekit.fed.cohort.make.people import draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import GRIDS, load_template
from sparsekit.fed.cohort.make.unfinished import difference, growing_folder, is_kept

Progress = Callable[[int, int], None]
"""Called with the number of scans written and the number in all."""

# Raised whenever the same settings give other bytes, so that an old cohort is not taken for new.
RECIPE = 2

_PEOPLE_PER_TASK = 8


@dataclass(frozen=True)
class CohortSettings:
    """What a cohort's bytes depend on, besides the release of sparsekit and its libraries.

    Attributes
    ----------
    subjects, sites : int
        How many people and sites.
    resolution : int
        Voxel size in mm, 4 or 2.
    environment : str
        One of `sparsekit.fed.cohort.environment.ENVIRONMENTS`.
    seed : int
        Non-negative.
    residual_scale : float
        Spread between people of the same age and sex, and between sites, over that of the IXI
        data set.
    recipe : int
        Version of the generator's recipe.
    """

    subjects: int
    sites: int
    resolution: int = 4
    environment: str = "uniform-iid"
    seed: int = 0
    residual_scale: float = 0.5
    recipe: int = RECIPE

    def plans(self) -> tuple[SitePlan, ...]:
        """Check the settings and lay out the sites.

        Raises
        ------
        UsageError
            If a setting cannot be met; the text says which and what to do.
        """
        if self.resolution not in GRIDS:
            raise UsageError(f"resolution: expected 2 or 4 (mm), got {self.resolution}")
        if self.seed < 0:
            raise UsageError(f"seed: expected 0 or more, got {self.seed}")
        if not 0 <= self.residual_scale <= 1.5:
            raise UsageError(
                f"residual_scale: expected 0 to 1.5 (0.5 is usual, 1 is real spread), "
                f"got {self.residual_scale}"
            )
        return plan_sites(self.environment, subjects=self.subjects, sites=self.sites)


def make_cohort(
    out: str | os.PathLike[str],
    *,
    subjects: int,
    sites: int,
    resolution: int = 4,
    environment: str = "uniform-iid",
    seed: int = 0,
    residual_scale: float = 0.5,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Make a synthetic cohort of skull-stripped T1 scans as a BIDS derivative.

    Participant i depends on the seed, i and the settings only: any number of workers writes the
    same bytes, and the same seed gives the same anatomy at both resolutions. The folder appears
    under its name when it is complete. A finished cohort of the same settings is kept as it is;
    an unfinished one, whatever ended its making, is gone on with from a hidden folder beside
    ``out``.

    Parameters
    ----------
    out : path
        Folder to create; it may exist if it is empty.
    subjects : int
        Participants in all, at least 4 per site.
    sites : int
        Number of sites, each with a scanner of its own.
    resolution : int, default 4
        Voxel size in mm: 4 (46x55x46 voxels) or 2 (91x109x91).
    environment : str, default "uniform-iid"
        One of `sparsekit.fed.cohort.environment.ENVIRONMENTS`.
    seed : int, default 0
        Any non-negative number.
    residual_scale : float, default 0.5
        0 to 1.5; 1 is the spread of volumes between real people, smaller makes age easier to see.
    workers : int, default 1
        Processes that render. With more than one, call this from a script's
        ``if __name__ == "__main__":`` part, because the workers import the script.
    progress : callable, optional
        Called as ``progress(done, total)`` in this process; scans that were there count.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    UsageError
        If a setting cannot be met, ``out`` or the unfinished folder beside it holds something
        else, or another process is making the same cohort.
    CohortError
        If the disk is full or a worker died; the scans made so far are kept for the next call.

    Examples
    --------
    >>> make_cohort("cohort", subjects=64, sites=8)  # doctest: +SKIP
    PosixPath('cohort')
    """
    settings = CohortSettings(subjects, sites, resolution, environment, seed, residual_scale)
    plans = settings.plans()
    if workers < 1:
        raise UsageError(f"workers: expected at least 1, got {workers}")
    root = Path(out)
    if is_finished(root, settings):
        if progress is not None:
            progress(subjects, subjects)
        return root
    people = [
        draw_person(plans, index, seed=seed, residual_scale=residual_scale)
        for index in range(subjects)
    ]
    with growing_folder(root, asdict(settings)) as partial:
        write_tables(partial, people, plans, asdict(settings))
        done = 0
        for count in _render_all(settings, plans, partial, workers):
            done += count
            if progress is not None:
                progress(done, subjects)
    return root


def is_finished(root: Path, settings: CohortSettings) -> bool:
    """Tell whether a folder already holds the cohort of exactly these settings.

    Parameters
    ----------
    root : Path
        The folder, which need not exist.
    settings : CohortSettings
        What is wanted.

    Returns
    -------
    bool
        False if there is nothing yet.

    Raises
    ------
    UsageError
        If the path is taken by something else.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise UsageError(f"{root}: is a file; name a folder that does not exist yet")
    if not any(root.iterdir()):
        return False
    found = read_settings(root)
    if found is None:
        raise UsageError(
            f"{root}: is not empty and holds no cohort of sparsekit; name another folder"
        )
    wanted = asdict(settings)
    if found != wanted:
        raise UsageError(
            f"{root}: holds another cohort ({difference(found, wanted)}); "
            "name another folder or remove it"
        )
    for index in range(settings.subjects):
        path = scan_path(f"sub-{index + 1:05d}", settings.resolution)
        if not (root / path).is_file():
            raise UsageError(f"{root}: lacks {path}; remove the folder and make the cohort again")
    return True


def _render_all(
    settings: CohortSettings, plans: Sequence[SitePlan], root: Path, workers: int
) -> Iterator[int]:
    """Write every scan, yielding how many more are done."""
    starts = range(0, settings.subjects, _PEOPLE_PER_TASK)
    tasks = [range(start, min(start + _PEOPLE_PER_TASK, settings.subjects)) for start in starts]
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            for index in task:
                _render(settings, plans, root, index)
                yield 1
        return
    # Fresh processes: forking one that has started torch's threads can hang.
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=_start_worker
    )
    try:
        futures = [pool.submit(_render_task, settings, plans, root, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise CohortError(
            f"{root}: a worker died, most likely for lack of memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C goes to the parent, which ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent was killed; it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _render_task(
    settings: CohortSettings, plans: Sequence[SitePlan], root: Path, task: range
) -> int:
    for index in task:
        _render(settings, plans, root, index)
    return len(task)


def _render(settings: CohortSettings, plans: Sequence[SitePlan], root: Path, index: int) -> None:
    path = root / scan_path(f"sub-{index + 1:05d}", settings.resolution)
    if is_kept(path):
        return
    seed = settings.seed
    template = load_template(settings.resolution)
    person = draw_person(plans, index, seed=seed, residual_scale=settings.residual_scale)
    anatomy = build_anatomy(template, person, shape_rng(seed, index))
    site = draw_site(site_rng(seed, person.site))
    image = scan(template, anatomy, person, site, scan_rng(seed, index))
    write_scan(path, image, settings.resolution)
