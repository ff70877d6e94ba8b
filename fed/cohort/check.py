"""Read every scan of a cohort to the end and collect all that is wrong with it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from sparsekit.fed.cohort.grid import Grid, preview, to_ras
from sparsekit.fed.cohort.read import Problem, Scan, find_scans
from sparsekit.fed.cohort.tables import Fault
from sparsekit.fed.cohort.volume import ScanError, Volume, apply_mask, read_volume, volume_faults

# Nothing is resampled here; the grid only says where a head must lie to fit a model's.
_HEAD_ROOM = Grid.of((91, 109, 91), 2.0)
_MOST_FOREGROUND = 0.6
_MOST_NEGATIVE = 0.01


@dataclass(frozen=True)
class CheckReport:
    """What a check of a cohort found.

    Attributes
    ----------
    scans : tuple of Scan
        Those whose tables and file names are in order.
    problems : tuple of Problem
        Everything that keeps a scan or a row from being used.
    ok_scans : tuple of Scan
        Those without any problem.
    n_files : int
        Volumes that were opened.
    bytes_read : int
        Their size on disk.
    notes : tuple of str
        What a user should know, though training goes on: grids to be changed, scans that do not
        look skull-stripped.
    """

    scans: tuple[Scan, ...]
    problems: tuple[Problem, ...]
    ok_scans: tuple[Scan, ...]
    n_files: int
    bytes_read: int
    notes: tuple[str, ...]


def check_cohort(
    source: Path,
    *,
    in_shape: tuple[int, int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check the tables and every volume of a cohort; a bad file never stops the check.

    Parameters
    ----------
    source : Path
        As for `sparsekit.fed.cohort.read.find_scans`.
    in_shape : tuple of int, optional
        Accept only scans of this shape once their axes are in R, A, S order. By default a scan
        is accepted when a model's grid can hold it after padding, cropping or resampling.
    progress : callable, optional
        Called with (scans done, scans in all).

    Returns
    -------
    CheckReport

    Raises
    ------
    CohortError
        There is nothing to check: no such path, no table, a needed column is absent.
    """
    scans, problems = find_scans(source)
    inspector = _Inspector(in_shape)
    ok_scans: list[Scan] = []
    for done, scan in enumerate(scans):
        if progress is not None:
            progress(done, len(scans))
        found = inspector.inspect(scan)
        problems += found
        if not found:
            ok_scans.append(scan)
    if progress is not None:
        progress(len(scans), len(scans))
    return CheckReport(
        scans=tuple(scans),
        problems=tuple(problems),
        ok_scans=tuple(ok_scans),
        n_files=len(scans),
        bytes_read=inspector.bytes_read,
        notes=inspector.notes(),
    )


class _Inspector:
    """Looks at one scan after the other and remembers what only shows across scans."""

    def __init__(self, in_shape: tuple[int, int, int] | None) -> None:
        self.bytes_read = 0
        self._in_shape = in_shape
        self._first_with: dict[str, Scan] = {}
        self._grids: Counter[str] = Counter()
        self._with_skull: list[Scan] = []
        self._negative: list[Scan] = []

    def inspect(self, scan: Scan) -> list[Problem]:
        """Return the problems of one scan; empty when it is fit."""
        try:
            volume = read_volume(scan.path)
            self.bytes_read += volume.n_bytes
            faults = volume_faults(volume)
            if scan.mask is not None and not faults:
                volume = apply_mask(volume, scan.mask)
        except ScanError as error:
            return [Problem.of(error.fault, error.path, scan.participant)]
        if not faults:
            faults = self._compare(scan, volume)
        return [Problem.of(fault, scan.path, scan.participant) for fault in faults]

    def notes(self) -> tuple[str, ...]:
        """Return a line for each thing worth knowing."""
        lines = [f"{plural(n, 'scan')}: {grid}" for grid, n in sorted(self._grids.items())]
        if self._with_skull:
            lines.append(
                f"{_scans(self._with_skull)} mostly above 0 all over the volume: not "
                "skull-stripped? The default normalisation takes all voxels above 0 for brain."
            )
        if self._negative:
            lines.append(
                f"{_scans(self._negative)} with many negative voxels: normalised before? The "
                "default normalisation takes only voxels above 0 for brain."
            )
        return tuple(lines)

    def _compare(self, scan: Scan, volume: Volume) -> list[Fault]:
        faults: list[Fault] = []
        voxels = xxhash.xxh3_128(volume.data.tobytes()).hexdigest()
        first = self._first_with.setdefault(voxels, scan)
        if first is not scan:
            faults.append(
                Fault(
                    "duplicate-scan",
                    f"the same voxels as {first.path} of {first.participant}",
                    "find out whose scan it is, and keep it there only",
                )
            )
        placement = preview(volume.data, volume.affine, volume.space_code, _HEAD_ROOM)
        shape = to_ras(volume.data, volume.affine)[0].shape
        if self._in_shape is not None and shape != self._in_shape:
            faults.append(
                Fault(
                    "wrong-grid",
                    f"shape {'x'.join(map(str, shape))} in R, A, S order, "
                    f"expected {'x'.join(map(str, self._in_shape))}",
                    "resample it, or check without --in-shape: training pads, crops or resamples",
                )
            )
        elif isinstance(placement, Fault):
            faults.append(placement)
        else:
            origin = "" if placement.anchor == "world" else ", not in MNI space: centred"
            self._grids[f"{placement.source}, axes {placement.axes}{origin}"] += 1
        if np.count_nonzero(volume.data > 0) > _MOST_FOREGROUND * volume.data.size:
            self._with_skull.append(scan)
        if np.count_nonzero(volume.data < 0) > _MOST_NEGATIVE * volume.data.size:
            self._negative.append(scan)
        return faults


def plural(count: int, singular: str, several: str = "") -> str:
    """Return ``"1 scan"`` or ``"4 scans"``."""
    return f"{count} {singular if count == 1 else several or singular + 's'}"


def _scans(scans: Sequence[Scan]) -> str:
    more = ", ..." if len(scans) > 1 else ""
    return f"{plural(len(scans), 'scan')} ({scans[0].path.name}{more})"
