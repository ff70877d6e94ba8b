"""Read one NIfTI file whole: every byte of its stream, no allocation on a header's word alone.

nibabel stops reading a .nii.gz once it has the voxels that the header announces and so never
gets to the checksum at the end of the stream: a flipped bit then loads as wrong voxels without
a word. Here the stream is read to its end, which makes gzip compare its CRC and length.
"""

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
import xxhash
from nibabel.spatialimages import HeaderDataError

from sparsekit.errors import CohortError
from sparsekit.fed.cohort.scans import Scan
from sparsekit.fed.cohort.tables import Fault

MAX_VOXELS = 2**27
"""512 x 512 x 512; a larger volume is refused before memory is taken for it."""

_SLACK_BYTES = 2**20  # tolerated after the last voxel: some writers pad their files
_MAX_DEFLATE_RATIO = 1032  # deflate cannot pack tighter than this
_CHUNK_BYTES = 2**20
_VOXEL_MM = (0.05, 50.0)
_MAX_ORIGIN_MM = 1e5
_MIN_DETERMINANT = 0.05  # of unit axes: 1 when they are at right angles, 0 when in one plane
_AS_FLOATS = ("f", "i", "u")


class ScanError(CohortError):
    """One file cannot be used; `fault` says why."""

    def __init__(self, path: Path, fault: Fault) -> None:
        super().__init__(f"{path}: {fault.kind}: {fault.detail}; {fault.remedy}")
        self.path = path
        self.fault = fault


@dataclass(frozen=True)
class Volume:
    """The voxels of one scan as its file stores them.

    Attributes
    ----------
    data : ndarray, (i, j, k), float32
        Scaled intensities on the file's own axes.
    affine : ndarray, (4, 4), float64
        Voxel index to world millimetres.
    space_code : int
        NIfTI code of the transform that `affine` was taken from; 0 where the file has none.
    digest : str
        Content hash of the file's bytes (and of its mask's, where there is one).
    n_bytes : int
        Bytes read from disk.
    """

    data: np.ndarray
    affine: np.ndarray
    space_code: int
    digest: str
    n_bytes: int


def load_scan(scan: Scan) -> Volume:
    """Read the volume of `scan` to the end of its stream and apply its mask.

    Parameters
    ----------
    scan : Scan

    Returns
    -------
    Volume

    Raises
    ------
    ScanError
        The file cannot be turned into a 3D volume, or `volume_faults` finds a fault in it.
    """
    volume = read_volume(scan.path)
    faults = volume_faults(volume)
    if faults:
        raise ScanError(scan.path, faults[0])
    return volume if scan.mask is None else apply_mask(volume, scan.mask)


def read_volume(path: Path) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` file to the end of its stream.

    Parameters
    ----------
    path : Path

    Returns
    -------
    Volume
        NaN, constant volumes and missing affines are not refused here: `volume_faults` names
        them.

    Raises
    ------
    ScanError
        Kinds ``missing-file``, ``unreadable``, ``not-nifti``, ``empty-file``, ``truncated``,
        ``corrupt``, ``4d``, ``not-3d``, ``not-scalar``, ``too-large`` and ``bad-affine``.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            hashed = _HashingFile(file)
            zipped = path.name.lower().endswith(".gz")
            stream = gzip.GzipFile("", "rb", fileobj=hashed) if zipped else hashed
            volume_or_fault = _read_stream(stream, size, zipped)
            if isinstance(volume_or_fault, Fault):
                raise ScanError(path, volume_or_fault)
            data, affine, code = volume_or_fault
            return Volume(data, affine, code, hashed.hexdigest(), size)
    except EOFError as error:
        raise ScanError(path, _truncated("the gzip stream ends before its end mark")) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(path, _gzip_fault(path, error)) from error
    except FileNotFoundError as error:
        fault = Fault("missing-file", "no such file", "correct the path, or drop the row")
        raise ScanError(path, fault) from error
    except OSError as error:
        detail = f"the system refuses to read it: {error.strerror or error}"
        raise ScanError(path, Fault("unreadable", detail, "check permissions and disk")) from error


def volume_faults(volume: Volume) -> list[Fault]:
    """List what makes a volume that was read useless for training: affine, NaN, constant.

    Parameters
    ----------
    volume : Volume

    Returns
    -------
    list of Fault
        Kinds ``no-affine``, ``bad-affine``, ``nan``, ``constant``; empty when fit.
    """
    faults: list[Fault] = []
    if volume.space_code == 0:
        # nibabel makes up an affine here, with a left-right flip.
        detail = "sform and qform codes are both 0: left and right are unknown"
        faults.append(Fault("no-affine", detail, "convert it again from DICOM, or set its sform"))
    elif not _is_usable(volume.affine):
        detail = "the affine is not finite, flattens the volume, or has absurd voxel sizes"
        faults.append(Fault("bad-affine", detail, "convert it again from DICOM, or set its sform"))
    finite = np.isfinite(volume.data)
    if not finite.all():
        n_bad = finite.size - int(np.count_nonzero(finite))
        detail = f"{n_bad} of {finite.size} voxels are NaN or infinite"
        faults.append(Fault("nan", detail, "repeat the processing step that made them"))
    elif volume.data.max() == volume.data.min():
        detail = f"all voxels are {volume.data.flat[0]:g}"
        faults.append(Fault("constant", detail, "repeat the processing step that emptied it"))
    return faults


def apply_mask(volume: Volume, mask_path: Path) -> Volume:
    """Set the voxels to 0 where the mask file holds 0.5 or less.

    Raises
    ------
    ScanError
        The mask cannot be read, is on another grid, or is empty.
    """
    mask = read_volume(mask_path)
    if mask.data.shape != volume.data.shape or not np.allclose(
        mask.affine, volume.affine, atol=1e-2
    ):
        detail = "its grid differs from the scan's"
        raise ScanError(mask_path, Fault("mask-grid", detail, "give the mask of this very scan"))
    inside = mask.data > 0.5
    if not inside.any():
        raise ScanError(mask_path, Fault("constant", "the mask is empty", "make the mask again"))
    return Volume(
        np.where(inside, volume.data, np.float32(0)),
        volume.affine,
        volume.space_code,
        f"{volume.digest}+{mask.digest}",
        volume.n_bytes + mask.n_bytes,
    )


def digest_file(path: Path) -> str:
    """Return the content hash of a file's bytes, or ``"absent"`` where it cannot be read."""
    try:
        with path.open("rb") as file:
            hashed = _HashingFile(file)
            while hashed.read(_CHUNK_BYTES):
                pass
            return hashed.hexdigest()
    except OSError:
        return "absent"


class _HashingFile(io.RawIOBase):
    """Reads on behalf of gzip and hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = xxhash.xxh3_128()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._hash.update(chunk)
        return chunk

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _read_stream(
    stream: io.RawIOBase | gzip.GzipFile, size: int, zipped: bool
) -> tuple[np.ndarray, np.ndarray, int] | Fault:
    if size == 0:
        return Fault("empty-file", "0 bytes", "copy the file again")
    block = _read_exactly(stream, 540)
    header = _header(block)
    if isinstance(header, Fault):
        return header
    layout = _layout(header)
    if isinstance(layout, Fault):
        return layout
    shape, dtype, offset = layout
    need = offset + int(np.prod(shape)) * dtype.itemsize
    if need > (size * _MAX_DEFLATE_RATIO if zipped else size):
        return _truncated(f"the header needs {need} bytes, the file has {size}")
    rest = _read_exactly(stream, need - len(block))
    if len(block) + len(rest) < need:
        return _truncated(f"{len(block) + len(rest)} of {need} bytes are there")
    slack = len(block) - need if len(block) > need else 0
    while chunk := stream.read(_CHUNK_BYTES):
        slack += len(chunk)
        if slack > _SLACK_BYTES:
            detail = "the stream goes on far beyond the voxels that the header announces"
            return Fault("corrupt", detail, "copy the file again from its source")
    raw = np.frombuffer(block + rest, dtype, count=int(np.prod(shape)), offset=offset)
    return _scaled(raw, header).reshape(shape, order="F"), *_affine(header)


def _read_exactly(stream: io.RawIOBase | gzip.GzipFile, count: int) -> bytes:
    """Read `count` bytes or up to the end; memory grows with what arrives, not with `count`."""
    parts: list[bytes] = []
    while count > 0:
        part = stream.read(min(count, _CHUNK_BYTES))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _header(block: bytes) -> nibabel.Nifti1Header | Fault:
    if not _starts_as_nifti(block):
        detail = "a text file" if block[:64].isascii() and b"\0" not in block[:64] else "no header"
        if block.startswith(b"\x1f\x8b"):
            return Fault("not-nifti", "gzip data under the name .nii", "rename it to .nii.gz")
        if block.startswith((b"version https://git-lfs", b"/annex/")):
            detail = "a pointer whose content was not fetched"
        return Fault("not-nifti", detail, "put a NIfTI file in its place")
    wide = block[:4] in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    if len(block) < (540 if wide else 348):
        return _truncated("the header is cut off")
    kind: type[nibabel.Nifti1Header] = nibabel.Nifti2Header if wide else nibabel.Nifti1Header
    header = kind(block[: 540 if wide else 348], check=False)
    if header["magic"].item()[:2] != b"n+":
        detail = "an Analyze file, or one half of a .hdr and .img pair"
        return Fault("not-nifti", detail, "convert it to one .nii.gz")
    return header


def _starts_as_nifti(block: bytes) -> bool:
    return int.from_bytes(block[:4], "little") in (348, 540) or int.from_bytes(
        block[:4], "big"
    ) in (348, 540)


def _layout(header: nibabel.Nifti1Header) -> tuple[tuple[int, int, int], np.dtype, int] | Fault:
    """Check shape, dtype and data offset against each other before any of them is used."""
    n_dims = int(header["dim"][0])
    if not 1 <= n_dims <= 7:
        return Fault("corrupt", f"the header has {n_dims} dimensions", "copy the file again")
    dims = tuple(int(n) for n in header["dim"][1 : n_dims + 1])
    if min(dims) < 1:
        return Fault("corrupt", f"the header's shape is {dims}", "copy the file again")
    if any(n > 1 for n in dims[3:]):
        remedy = "extract one 3D volume (for T1-weighted scans usually the first)"
        return Fault("4d", f"shape {'x'.join(map(str, dims))}", remedy)
    if len(dims) < 3 or min(dims[:3]) < 2:
        return Fault("not-3d", f"shape {'x'.join(map(str, dims))}", "give a 3D volume")
    shape = (dims[0], dims[1], dims[2])
    if shape[0] * shape[1] * shape[2] > MAX_VOXELS:
        remedy = "resample it, at most 512x512x512 voxels are read"
        return Fault("too-large", f"shape {'x'.join(map(str, shape))}", remedy)
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = np.dtype("V")
    if dtype.kind not in _AS_FLOATS or dtype.itemsize > 8:
        code = int(header["datatype"])
        return Fault("not-scalar", f"data type code {code}", "give real numbers, one per voxel")
    offset = float(header["vox_offset"])
    smallest = int(header["sizeof_hdr"])
    if not smallest <= offset <= 2**30:
        return Fault("corrupt", f"the voxels start at byte {offset:g}", "copy the file again")
    return shape, dtype, int(offset)


def _scaled(raw: np.ndarray, header: nibabel.Nifti1Header) -> np.ndarray:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    with np.errstate(over="ignore", invalid="ignore"):
        # Values too large for float32 become infinite, and volume_faults reports them.
        data = raw.astype(np.float32)
        if np.isfinite(slope) and slope != 0 and np.isfinite(inter) and (slope, inter) != (1, 0):
            data *= np.float32(slope)
            data += np.float32(inter)
    return data


def _affine(header: nibabel.Nifti1Header) -> tuple[np.ndarray, int]:
    try:
        if int(header["sform_code"]) > 0:
            return np.asarray(header.get_sform(), np.float64), int(header["sform_code"])
        if int(header["qform_code"]) > 0:
            return np.asarray(header.get_qform(), np.float64), int(header["qform_code"])
    except (HeaderDataError, ValueError):
        return np.full((4, 4), np.nan), 1
    return np.eye(4), 0


def _is_usable(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all() or np.abs(affine).max() > _MAX_ORIGIN_MM:
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all((sizes >= _VOXEL_MM[0]) & (sizes <= _VOXEL_MM[1])):
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / sizes)) > _MIN_DETERMINANT)


def _truncated(detail: str) -> Fault:
    return Fault("truncated", detail, "copy the file again from its source")


def _gzip_fault(path: Path, error: Exception) -> Fault:
    if "Not a gzipped file" in str(error):
        with path.open("rb") as file:
            start = file.read(4)
        if _starts_as_nifti(start):
            return Fault("not-nifti", "plain NIfTI under the name .nii.gz", "rename it to .nii")
        if start[:2] != b"\x1f\x8b":
            return Fault("not-nifti", "not gzip data", "put a NIfTI file in its place")
    detail = f"damaged in storage or transfer ({error})"
    return Fault("corrupt", detail, "copy the file again from its source")
