"""One memory-mapped array of prepared volumes per site, named by what it was made from.

The array's name carries a key over the content of every source file, in order, and over the
preprocessing id. A changed file or option therefore has another name, and an old array is never
taken for a new one. A build that is killed leaves nothing under a final name.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.errors import ArgumentError, CohortError
from sparsekit.fed.cohort.grid import Grid, Placement, place
from sparsekit.fed.cohort.normalise import check_method, normalise, preprocessing_id
from sparsekit.fed.cohort.scans import Problem, Scan
from sparsekit.fed.cohort.shelf import (
    LAYOUT,
    Shelf,
    remove_dead_temporaries,
    stamp_of,
    temporary_file,
    write_json,
)
from sparsekit.fed.cohort.tables import Fault
from sparsekit.fed.cohort.volume import ScanError, digest_file, load_scan

Progress = Callable[[int, int], None]

_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class SiteData:
    """The prepared scans of one site.

    Attributes
    ----------
    site : str
    images : ndarray, (n, d, h, w), float16 or float32
        Memory-mapped and read-only.
    ages : ndarray, (n,), float32
        Years.
    participants : tuple of str
        One per scan; a person with two scans occurs twice.
    preprocessing_id : str
        Names grid, normalisation and dtype; see `normalise.preprocessing_id`.
    skipped : tuple of Problem
        Scans that were left out, with ``on_problem="skip"``.
    digests : tuple of str
        Hash of each scan's file: equal ones are copies of one scan.
    voxel_mm : tuple of float
    """

    site: str
    images: np.ndarray
    ages: np.ndarray
    participants: tuple[str, ...]
    preprocessing_id: str
    skipped: tuple[Problem, ...]
    digests: tuple[str, ...]
    voxel_mm: tuple[float, float, float]


def build_site_cache(
    scans: Sequence[Scan],
    root: Path,
    *,
    in_shape: Sequence[int],
    voxel_mm: float | Sequence[float],
    normalisation: str = "brain-zscore",
    on_problem: str = "refuse",
    dtype: str = "float16",
    progress: Progress | None = None,
) -> SiteData:
    """Prepare the scans of one site for training, or open the array of an earlier call.

    Parameters
    ----------
    scans : sequence of Scan
        All of one site.
    root : Path
        Folder for the arrays; made where absent. It may be deleted at any time between runs.
    in_shape : sequence of int, (d, h, w)
        The model's input shape.
    voxel_mm : float or sequence of three floats
        The model's voxel size in millimetres.
    normalisation : str
        ``"brain-zscore"``, ``"volume-zscore"`` or ``"percentile"``.
    on_problem : str
        ``"refuse"`` raises when a scan is unfit; ``"skip"`` leaves it out and lists it.
    dtype : str
        ``"float16"`` or ``"float32"``.
    progress : callable, optional
        Called with (scans done, scans in all) while volumes are read.

    Returns
    -------
    SiteData
        Scans in the order given, without the skipped ones.

    Raises
    ------
    CohortError
        A scan is unfit and `on_problem` is ``"refuse"``, or no scan is fit.
    ArgumentError
        An option is unknown, no scans are given, or they belong to several sites.
    """
    grid = Grid.of(in_shape, voxel_mm)
    check_method(normalisation)
    if on_problem not in ("refuse", "skip"):
        raise ArgumentError(f"on_problem: expected refuse or skip, got {on_problem!r}")
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype: expected float16 or float32, got {dtype!r}")
    sites = sorted({scan.site for scan in scans})
    if len(sites) != 1:
        raise ArgumentError(f"scans: expected those of one site, got {len(sites)} sites: {sites}")
    recipe = _Recipe(grid, normalisation, np.dtype(dtype))
    root.mkdir(parents=True, exist_ok=True)
    remove_dead_temporaries(root)
    shelf = Shelf(root, sites[0], recipe.name)
    digests = shelf.known_digests(scans)
    manifest = shelf.find(digests) if digests is not None else None
    if manifest is None:
        manifest = _build(scans, shelf, recipe, progress)
    skipped = tuple(
        Problem.of(
            Fault(**entry["fault"]), scans[entry["row"]].path, scans[entry["row"]].participant
        )
        for entry in manifest["skipped"]
    )
    _refuse(skipped, len(scans), on_problem)
    left_out = {entry["row"] for entry in manifest["skipped"]}
    kept = [scan for row, scan in enumerate(scans) if row not in left_out]
    return SiteData(
        site=sites[0],
        images=np.load(root / manifest["array"], mmap_mode="r"),
        ages=np.array([scan.age for scan in kept], np.float32),
        participants=tuple(scan.participant for scan in kept),
        preprocessing_id=recipe.name,
        skipped=skipped,
        digests=tuple(row["digest"] for row in manifest["rows"]),
        voxel_mm=grid.voxel_mm,
    )


def _refuse(skipped: Sequence[Problem], n_scans: int, on_problem: str) -> None:
    if not skipped or (on_problem == "skip" and len(skipped) < n_scans):
        return
    shown = "; ".join(f"{p.path} ({p.kind}: {p.detail})" for p in skipped[:3])
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    raise CohortError(
        f"{len(skipped)} of {n_scans} scans cannot be used: {shown}{more}; run "
        "`sparsekit cohort check PATH` on the cohort and repair them"
        + ("" if len(skipped) == n_scans else ", or leave them out with `--on-problem skip`")
    )


@dataclass(frozen=True)
class _Recipe:
    """How a file becomes voxels on the model's grid."""

    grid: Grid
    normalisation: str
    dtype: np.dtype

    @property
    def name(self) -> str:
        return preprocessing_id(self.grid, self.normalisation, self.dtype)

    def prepare(self, scan: Scan) -> tuple[np.ndarray, Placement, str]:
        """Return the prepared voxels, what was done, and the content digest of the source."""
        volume = load_scan(scan)
        placed = place(volume.data, volume.affine, volume.space_code, self.grid)
        if isinstance(placed, Fault):
            raise ScanError(scan.path, placed)
        voxels, placement = placed
        normal = normalise(voxels, self.normalisation)
        if isinstance(normal, Fault):
            raise ScanError(scan.path, normal)
        limit = float(np.finfo(self.dtype).max)
        return np.clip(normal, -limit, limit).astype(self.dtype), placement, volume.digest


def _build(
    scans: Sequence[Scan], shelf: Shelf, recipe: _Recipe, progress: Progress | None
) -> dict[str, Any]:
    stamps = [stamp_of(scan) for scan in scans]
    digests: list[str] = []
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with temporary_file(shelf.root, shelf.stem) as (file, temporary):
        header_bytes = file.write(_npy_header(len(scans), recipe))
        for row, scan in enumerate(scans):
            if progress is not None:
                progress(row, len(scans))
            try:
                voxels, placement, digest = recipe.prepare(scan)
            except ScanError as error:
                digest = _digest(scan)
                skipped.append({"row": row, "fault": asdict(error.fault)})
            else:
                file.write(voxels.tobytes())
                rows.append(
                    {
                        "path": str(scan.path),
                        "participant": scan.participant,
                        "session": scan.session,
                        "digest": digest,
                        "placement": placement.as_dict(),
                    }
                )
            digests.append(digest)
        if progress is not None:
            progress(len(scans), len(scans))
        key = shelf.key(digests)
        array_path = shelf.array_path(key)
        manifest = {
            "layout": LAYOUT,
            "preprocessing_id": recipe.name,
            "array": array_path.name,
            "shape": [len(rows), *recipe.grid.shape],
            "rows": rows,
            "skipped": skipped,
        }
        if rows:
            file.seek(0)
            header = _npy_header(len(rows), recipe)
            assert len(header) == header_bytes, "numpy pads headers so that the length can grow"
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, array_path)
    if rows:
        # The manifest comes last: with it present, the array is known to be whole.
        write_json(shelf.manifest_path(key), manifest)
        if [stamp_of(scan) for scan in scans] == stamps:
            shelf.remember(stamps, digests)
    return manifest


def _npy_header(n_rows: int, recipe: _Recipe) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": np.lib.format.dtype_to_descr(recipe.dtype),
            "fortran_order": False,
            "shape": (n_rows, *recipe.grid.shape),
        },
    )
    return buffer.getvalue()


def _digest(scan: Scan) -> str:
    digest = digest_file(scan.path)
    return digest if scan.mask is None else f"{digest}+{digest_file(scan.mask)}"
