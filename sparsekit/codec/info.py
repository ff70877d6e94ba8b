"""What a payload holds, without decoding it."""

from dataclasses import dataclass
from functools import cached_property

from sparsekit.codec.records import MaskCode, ValueCode
from sparsekit.codec.wire import NO_BASE, Buffer, Placed, as_bytes_view, parse


@dataclass(frozen=True)
class RecordInfo:
    """One record of a payload.

    Attributes
    ----------
    name, dtype : str
        ``dtype`` is ``"skipped"`` for a record that this release does not know and need not.
    shape : tuple of int
    n, k : int
        Elements, and kept ones among them.
    mask_encoding, value_encoding : str
    mask_bytes, value_bytes, dense_bytes : int
        Bytes of the two sections without padding, and of the tensor when stored whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n: int
    k: int
    mask_encoding: str
    value_encoding: str
    mask_bytes: int
    value_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class PayloadInfo:
    """Header and records of a payload.

    Attributes
    ----------
    version : tuple of int
        Major and minor version of the format.
    round : int
    base_digest : bytes or None
        Digest of the state that decoding needs, None if it needs none.
    records : tuple of RecordInfo
    header_bytes, payload_bytes : int
        Bytes of the header with its records, and of the whole payload.
    """

    version: tuple[int, int]
    round: int
    base_digest: bytes | None
    records: tuple[RecordInfo, ...]
    header_bytes: int
    payload_bytes: int

    @cached_property
    def n(self) -> int:
        """Elements of all tensors."""
        return sum(record.n for record in self.records)

    @cached_property
    def k(self) -> int:
        """Kept elements of all tensors."""
        return sum(record.k for record in self.records)

    @cached_property
    def mask_bytes(self) -> int:
        """Bytes of all mask sections."""
        return sum(record.mask_bytes for record in self.records)

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of all value sections."""
        return sum(record.value_bytes for record in self.records)

    @cached_property
    def padding_bytes(self) -> int:
        """Zero bytes between the sections."""
        return self.payload_bytes - self.header_bytes - self.mask_bytes - self.value_bytes

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all tensors when stored whole."""
        return sum(record.dense_bytes for record in self.records)

    @property
    def bits_per_weight(self) -> float:
        """Payload bits per element; NaN without elements."""
        return 8 * self.payload_bytes / self.n if self.n else float("nan")

    @property
    def density(self) -> float:
        """Share of kept elements; NaN without elements."""
        return self.k / self.n if self.n else float("nan")

    @property
    def dense_ratio(self) -> float:
        """How many times smaller the payload is than the tensors stored whole."""
        return self.dense_bytes / self.payload_bytes


def inspect(payload: Buffer) -> PayloadInfo:
    """Describe a payload, which may be hostile, without decoding it; no base is needed.

    Parameters
    ----------
    payload : bytes, bytearray or memoryview
        What `sparsekit.encode` returned.

    Returns
    -------
    PayloadInfo
        Header, records and totals. Header, sizes, padding and checksums have been checked.

    Raises
    ------
    CodecError
        As `sparsekit.decode`.
    """
    header = parse(as_bytes_view(payload))
    return PayloadInfo(
        version=(header.major, header.minor),
        round=header.round,
        base_digest=None if header.base_digest == NO_BASE else header.base_digest,
        records=tuple(_describe(placed) for placed in header.records),
        header_bytes=header.header_len,
        payload_bytes=header.file_len,
    )


def _describe(placed: Placed) -> RecordInfo:
    record = placed.record
    known = record.dtype is not None
    mask, value = str(record.mask_code), str(record.value_code)
    if known:
        mask = MaskCode(record.mask_code).name.lower().replace("_", "-")
        value = ValueCode(record.value_code).name.lower()
    return RecordInfo(
        name=record.name,
        dtype="skipped" if record.dtype is None else record.dtype.name,
        shape=record.shape,
        n=record.n if known else 0,
        k=record.k if known else 0,
        mask_encoding=mask,
        value_encoding=value,
        mask_bytes=record.mask_len,
        value_bytes=record.value_len,
        dense_bytes=0 if record.dtype is None else record.n * record.dtype.itemsize,
    )
