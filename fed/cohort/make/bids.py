"""The files of a synthetic cohort: a BIDS derivative whose bytes depend on its settings only."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from sparsekit._version import __version__
from sparsekit.fed.cohort.environment import SitePlan
from sparsekit.fed.cohort.make.people import Person
from sparsekit.fed.cohort.make.template import ORIGIN_MM
from sparsekit.fed.cohort.make.volumes import STRUCTURES

SPACE = "MNI152NLin2009aSym"
SETTINGS_KEY = "SparsekitCohort"
"""Entry of dataset_description.json that holds what the cohort was made from."""

# Modest: level 6 takes three times as long for 2 % fewer bytes.
_GZIP_LEVEL = 3
_MNI_CODE = 4


def scan_path(person_label: str, resolution: int) -> Path:
    """Path of a participant's scan inside the cohort."""
    name = f"{person_label}_space-{SPACE}_res-{resolution}_desc-preproc_T1w.nii.gz"
    return Path(person_label) / "anat" / name


def write_scan(path: Path, image: NDArray[np.int16], resolution: int) -> None:
    """Write one image in RAS orientation, compressed, without time or name in the stream.

    Parameters
    ----------
    path : Path
        File to create; its folder is created too.
    image : ndarray, (x, y, z), int16
        The voxels.
    resolution : int
        Voxel size in mm.
    """
    affine = np.diag([resolution, resolution, resolution, 1]).astype(np.float64)
    affine[:3, 3] = ORIGIN_MM
    nifti = nib.Nifti1Image(image, affine)
    nifti.set_sform(affine, code=_MNI_CODE)
    nifti.set_qform(affine, code=_MNI_CODE)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.header["descrip"] = b"SYNTHETIC, sparsekit"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half a file never has the scan's name, whenever the process is killed.
    unnamed = path.with_name(f"{path.name}.part")
    unnamed.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=_GZIP_LEVEL, mtime=0))
    unnamed.replace(path)


def is_whole_scan(path: Path) -> bool:
    """Read a compressed file to its end and tell whether its checksum holds."""
    try:
        gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        return False
    return True


def write_tables(
    root: Path, people: Sequence[Person], plans: Sequence[SitePlan], settings: Mapping[str, Any]
) -> None:
    """Write everything but the scans.

    Parameters
    ----------
    root : Path
        An existing folder.
    people : sequence of Person
        Rows of the tables, in order.
    plans : sequence of SitePlan
        The sites that the people refer to.
    settings : mapping
        What the cohort is made from; kept under `SETTINGS_KEY`.
    """
    resolution = int(settings["resolution"])
    _write_json(
        root / "dataset_description.json",
        {
            "Name": f"SYNTHETIC brain-age cohort, {len(people)} people, {len(plans)} sites",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [
                {
                    "Name": "sparsekit cohort make",
                    "Version": __version__,
                    "Description": "SYNTHETIC images: no scan of any person is in here.",
                }
            ],
            "HowToAcknowledge": "Say that the data are synthetic and made by sparsekit.",
            "ReferencesAndLinks": [
                "ICBM 2009a template, Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033",
                "Volumes fitted to the IXI data set, https://brain-development.org/ixi-dataset/",
            ],
            SETTINGS_KEY: dict(settings),
        },
    )
    (root / "README").write_text(
        "SYNTHETIC T1-weighted images made by `sparsekit cohort make`; no person was scanned.\n"
        "Results on them say nothing about accuracy on real people.\n"
        "phenotype/volumes.tsv holds the volumes that the generator was asked to render.\n"
    )
    _write_table(
        root / "participants.tsv",
        ("participant_id", "age", "sex", "site"),
        [(p.label, f"{p.age:.2f}", "M" if p.male else "F", plans[p.site].label) for p in people],
    )
    _write_json(
        root / "participants.json",
        {
            "age": {"Description": "Age at the (synthetic) scan", "Units": "year"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
            "site": {"Description": "Site of the federation, with a scanner of its own"},
        },
    )
    (root / "phenotype").mkdir(exist_ok=True)
    _write_table(
        root / "phenotype" / "volumes.tsv",
        ("participant_id", "intracranial", *STRUCTURES),
        [
            (p.label, *(f"{volume:.1f}" for volume in (np.exp(p.log_icv), *p.volumes_mm3())))
            for p in people
        ],
    )
    _write_json(
        root / "phenotype" / "volumes.json",
        {
            name: {
                "Description": "Volume asked of the generator (not measured); left plus right",
                "Units": "mm3",
            }
            for name in ("intracranial", *STRUCTURES)
        },
    )
    _write_json(
        root / f"space-{SPACE}_res-{resolution}_desc-preproc_T1w.json",
        {
            "Resolution": f"{resolution} mm isotropic",
            "SkullStripped": True,
            "Description": "SYNTHETIC; rigidly aligned, no bias correction",
        },
    )


def read_settings(root: Path) -> dict[str, Any] | None:
    """Settings of a finished cohort, or None if the folder holds something else."""
    try:
        description = json.loads((root / "dataset_description.json").read_text())
        settings = description[SETTINGS_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
