"""Derive the template maps that the cohort generator ships, once, from ICBM 2009a.

The three sources are files of the nilearn 0.14.1 wheel (nilearn itself is not needed)::

    pip download nilearn==0.14.1 --no-deps -d WHEEL
    unzip -q WHEEL/nilearn-0.14.1-py3-none-any.whl 'nilearn/datasets/data/*' -d WHEEL
    python tools/make_template.py WHEEL/nilearn/datasets/data

Each 1 mm map is averaged over the 2 mm cubes of the 91x109x91 grid whose first voxel is
centred at (-90, -126, -72) mm and kept as uint8. The 4 mm maps are not stored: the 4 mm voxels
are unions of these cubes, so the generator averages once more when it loads them.
The file's bytes depend only on the sources (zip entries carry a fixed date).
"""

import argparse
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

PREFIX = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
FIRST_MM = (-90, -126, -72)
GRID = (91, 109, 91)
SOURCE_FIRST_MM = (-98.0, -134.0, -72.0)
SOURCE_GRID = (197, 233, 189)
SOURCE_GRID = (197, 233, 189)
OUT = Path(__file__).resolve().parent.parent / "fed" / "cohort" / "data" / "template-2mm.npz"


def cube_means(one_mm: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Average a 1 mm map over the 2 mm cubes of the target grid; rounded to uint8."""
    mean = one_mm
    for axis in range(3):
        # A 2 mm cube centred on a 1 mm voxel covers it and half of each neighbour.
        mean = correlate1d(mean, [0.25, 0.5, 0.25], axis=axis, mode="constant")
    start = [int(a - b) for a, b in zip(FIRST_MM, SOURCE_FIRST_MM, strict=True)]
    picked = mean[tuple(slice(s, s + 2 * n, 2) for s, n in zip(start, GRID, strict=True))]
    return np.rint(picked).clip(0, 255).astype(np.uint8)


def main() -> None:
    """Read the three source maps and write the shipped file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="nilearn/datasets/data of the unpacked wheel")
    sources: Path = parser.parse_args().sources
    one_mm: dict[str, NDArray[np.float32]] = {}
    for kind in ("t1", "gm", "wm"):
        image = nib.Nifti1Image.from_filename(sources / PREFIX.format(kind))
        first_mm = tuple(np.asarray(image.affine)[:3, 3])
        if first_mm != SOURCE_FIRST_MM or image.shape != SOURCE_GRID:
            raise SystemExit(f"{PREFIX.format(kind)}: not the grid of nilearn 0.14.1")
        one_mm[kind] = np.asarray(image.dataobj, dtype=np.float32)
    # The T1 is skull-stripped: where it is not 0 there is brain (or CSF inside its hull).
    brain = one_mm["t1"] > 0
    maps = {kind: cube_means(np.where(brain, volume, 0)) for kind, volume in one_mm.items()}
    maps["brain"] = cube_means(np.where(brain, np.float32(255), np.float32(0)))
    for kind, volume in maps.items():
        if volume.shape != GRID:
            raise SystemExit(f"{kind}: shape {volume.shape}, expected {GRID}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for kind, volume in maps.items():
            buffer = io.BytesIO()
            np.save(buffer, volume)
            entry = zipfile.ZipInfo(f"{kind}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
