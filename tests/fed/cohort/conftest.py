"""Small NIfTI files and cohorts, written by nibabel and not by sparsekit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[np.float32]
SHAPE = (46, 55, 46)
ORIGIN = (-90.0, -126.0, -72.0)


def affine_of(voxel_mm: float = 4.0, origin: Sequence[float] = ORIGIN) -> npt.NDArray[np.float64]:
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = origin
    return affine


def brain_at(shape: Sequence[int], affine: npt.NDArray[np.float64], seed: int) -> Array:
    """Return an ellipsoid around the world point (0, -18, 18) with noise inside it, 0 outside."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    inside = (((world - [0, -18, 18]) / [60, 75, 55]) ** 2).sum(-1) < 1
    noise = np.random.default_rng(seed).normal(700, 90, tuple(shape))
    return np.where(inside, noise, 0).astype(np.float32)


def save(
    path: Path,
    data: npt.NDArray[np.generic],
    affine: npt.NDArray[np.float64],
    *,
    code: int = 4,
) -> Path:
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


@pytest.fixture
def write_brain() -> Callable[..., Path]:
    """Write a brain of a given seed as int16; by default on the 4 mm grid."""

    def write(
        path: Path,
        seed: int = 0,
        *,
        shape: Sequence[int] = SHAPE,
        voxel_mm: float = 4.0,
        origin: Sequence[float] = ORIGIN,
        code: int = 4,
    ) -> Path:
        affine = affine_of(voxel_mm, origin)
        return save(path, brain_at(shape, affine, seed).astype(np.int16), affine, code=code)

    return write


@pytest.fixture
def save_volume() -> Callable[..., Path]:
    """Write any array; by default with the affine of the 4 mm grid."""

    def write(
        path: Path,
        data: npt.NDArray[np.generic],
        affine: npt.NDArray[np.float64] | None = None,
        *,
        code: int = 4,
    ) -> Path:
        return save(path, data, affine_of() if affine is None else affine, code=code)

    return write


@pytest.fixture
def make_tree(tmp_path: Path, write_brain: Callable[..., Path]) -> Callable[..., Path]:
    """Write a BIDS tree from rows of participants.tsv, with a scan for each participant."""

    def make(rows: Sequence[str], *, header: str = "participant_id\tage\tsex\tsite") -> Path:
        root = tmp_path / "bids"
        root.mkdir()
        (root / "participants.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        names = dict.fromkeys(row.split("\t")[0] for row in rows)
        for seed, name in enumerate(names):
            write_brain(root / name / "anat" / f"{name}_T1w.nii.gz", seed)
        return root

    return make
