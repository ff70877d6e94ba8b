"""Encode bit patterns; `sparsekit.codec.decoding` reads them, neither needs torch.

`sparsekit.codec.tensors` puts torch tensors in and out of them.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
import xxhash

from sparsekit.codec import related, sections
from sparsekit.codec.elements import Elements, canonical, unsigned
from sparsekit.codec.flags import Flags
from sparsekit.codec.kept import Kept
from sparsekit.codec.layouts import MAX_EXTENT
from sparsekit.codec.positions import CHUNK
from sparsekit.codec.records import (
    RELATED_MASKS,
    MaskCode,
    Record,
    ValueCode,
    mask_bytes,
    parameter_bytes,
    quote,
    value_bytes,
)
from sparsekit.codec.sources import Source
from sparsekit.codec.wire import (
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    NO_BASE,
    Buffer,
    pack_header,
    padded,
    section_checksum,
)
from sparsekit.errors import (
    ArgumentError,
    ValueRangeError,
)

Level: TypeAlias = Literal["fast", "balanced", "small"]
Values: TypeAlias = Literal["lossless", "bf16", "fp16", "int8", "int4"]
MaskEncoding: TypeAlias = Literal[
    "auto", "dense", "bitmap", "rice", "csr", "same", "subset", "predicted", "ranked"
]
BASED = ("same", "subset", "predicted", "ranked")
"""Mask encodings that need a base."""

_KINDS: dict[Values, sections.Kind] = {
    "lossless": None, "bf16": "bfloat16", "fp16": "float16", "int8": 8, "int4": 4,
}  # fmt: skip
STEPS = ("int8", "int4")
"""Values that are whole numbers of steps away from the base."""
_FORCED = {
    "dense": MaskCode.DENSE,
    "bitmap": MaskCode.BITMAP,
    "rice": MaskCode.RICE,
    "csr": MaskCode.CSR,
    "same": MaskCode.SAME,
    "subset": MaskCode.SUBSET,
    "predicted": MaskCode.PREDICTED,
    "ranked": MaskCode.RANKED,
}

# Codes whose size follows from the counts, whatever stands beside what.
_COUNTED = (MaskCode.BITMAP, MaskCode.RICE, MaskCode.CSR)


class Encoder:
    """Builds a payload tensor by tensor; names and arguments were checked by the caller.

    Parameters
    ----------
    base : mapping of str to Elements, or None
    masked : bool
        Whether the caller gives masks; then tensors without one are not forced into an encoding.
    mask_encoding, level, values : str
    """

    def __init__(
        self,
        base: Mapping[str, Elements] | None,
        *,
        masked: bool,
        mask_encoding: MaskEncoding,
        level: Level,
        values: Values,
    ) -> None:
        self._base, self._masked = base, masked
        self._mask_encoding: MaskEncoding = mask_encoding
        self._level: Level = level
        self._values: Values = values
        self._records: list[Record] = []
        self._sections = xxhash.xxh3_64()

    def add(self, name: str, source: Source, given: Flags | None) -> list[bytes | memoryview]:
        """Encode the next tensor under its mask, if it has one; return its padded sections.

        Raises
        ------
        ArgumentError
            For a non-zero element outside its mask, a mask encoding that cannot hold a mask, and a
            tensor too large for the format.
        """
        forced = given is not None if self._masked else len(source.shape) >= 2
        encoding: MaskEncoding = self._mask_encoding if forced else "auto"
        record, mask, values = _encode_one(
            name, source, given, None if self._base is None else self._base.get(name),
            encoding, self._level, self._values,
        )  # fmt: skip
        self._records.append(record)
        if len(self._records) > MAX_RECORDS:
            raise ArgumentError(f"state: expected at most {MAX_RECORDS} tensors")
        chunks: list[bytes | memoryview] = []
        if self._level == "small":
            for piece in (mask, *values):
                self._sections.update(piece)
        for pieces, size in (([mask], record.mask_len), (values, record.value_len)):
            chunks += [*pieces, bytes(padded(size) - size)]
        return chunks

    def header(self, round: int) -> bytes:
        """Header of all tensors added, which comes before their sections.

        Raises
        ------
        ArgumentError
            If it is too long for the format.
        """
        uses = any(record.mask_needs_base or record.values_need_base for record in self._records)
        digest = digest_elements(self._base) if self._base is not None and uses else NO_BASE
        whole = self._sections.intdigest() if self._level == "small" else None
        header = pack_header(self._records, round=round, base_digest=digest, sections=whole)
        if len(header) > MAX_HEADER_BYTES:
            raise ArgumentError(
                f"state: its names and shapes need a header of {len(header)} bytes, "
                f"at most {MAX_HEADER_BYTES} are allowed"
            )
        return header


def _encode_one(
    name: str,
    source: Source,
    given: Flags | None,
    base: Elements | None,
    encoding: MaskEncoding,
    level: Level,
    values: Values,
) -> tuple[Record, memoryview, list[Buffer]]:
    dtype, shape, n = source.dtype, source.shape, source.n
    if any(extent > MAX_EXTENT for extent in shape):
        raise ArgumentError(f"state: {quote(name)} has an extent above {MAX_EXTENT}")
    if base is not None and base.shape != shape:
        base = None
    keep = source.nonzero()
    if given is not None:
        outside = keep.outside(given)
        if outside:
            raise ArgumentError(
                f"masks: {quote(name)} has {outside} non-zero values outside its mask; "
                "multiply the tensor by the mask first, or pass the mask that it was pruned with"
            )
        keep = given
    k = keep.count
    relation = None
    if base is not None and 0 < k < n:
        partly = level != "fast" or encoding in BASED
        relation = related.relate(keep, base, partly=partly, ranked=encoding == "ranked")
    code = _choose(name, source, k, given is not None, relation, encoding, level)
    if code is MaskCode.DENSE and k != n:
        k, keep = n, Flags(n, bools=np.ones(n, np.bool_))
    if code in RELATED_MASKS:
        assert relation is not None
        mask_parameters, mask = related.pack(code, relation)
    else:
        mask_parameters, mask = sections.pack_mask(code, keep, shape)
    if encoding == "auto" and level != "fast" and code in _COUNTED:
        frame = sections.pack_frame(keep)
        if frame is not None and len(frame) < len(mask_parameters) + len(mask):
            code, mask_parameters, mask = MaskCode.BITMAP_ZSTD, b"", frame
    if base is not None and (
        base.dtype.name != "float32" or (level == "fast" and values not in STEPS)
    ):
        base = None
    try:
        value_code, value_parameters, pieces = sections.pack_values(
            _kept(source, code, keep, base, nonzero=given is None and k < n),
            dtype,
            level != "fast",
            _KINDS[values],
        )
    except OverflowError:
        raise ValueRangeError(
            f"values: {quote(name)} holds numbers beyond the range of {values!r}; use 'lossless'"
        ) from None
    record = Record(
        name, dtype, shape, code, value_code, k, len(mask), sum(map(len, pieces)),
        section_checksum(mask, *pieces), mask_parameters + value_parameters,
    )  # fmt: skip
    return record, mask, pieces


def _kept(
    source: Source, code: MaskCode, keep: Flags, base: Elements | None, *, nonzero: bool
) -> Kept:
    bits = source.whole() if code is MaskCode.DENSE else source.kept(keep)
    # Where only the non-zero elements are kept there is no -0.0.
    return Kept(bits if nonzero else canonical(bits, source.dtype), keep, base)


def _choose(
    name: str,
    source: Source,
    k: int,
    given: bool,
    relation: related.Relation | None,
    encoding: MaskEncoding,
    level: Level,
) -> MaskCode:
    """Pick the mask code with the fewest bytes, known in closed form from the counts."""
    n = source.n
    if k == n:
        return MaskCode.DENSE
    if encoding == "dense":
        if given:
            raise ArgumentError(
                f"mask_encoding: 'dense' would lose the mask of {quote(name)}, "
                f"which keeps {k} of {n}; use 'auto'"
            )
        return MaskCode.DENSE
    if k == 0:
        return MaskCode.ALL_ZERO
    totals = {}
    codes = [MaskCode.BITMAP]
    if level != "fast" or encoding != "auto":
        codes += [MaskCode.CSR, MaskCode.RICE]
    for code in codes:
        size = mask_bytes(code, source.shape, k)
        if size is not None:
            totals[code] = size
    if relation is not None:
        totals |= relation.expected
    totals = {
        code: size + parameter_bytes(code, ValueCode.RAW) + value_bytes(source.dtype, k)
        for code, size in totals.items()
    }
    if not given:
        totals[MaskCode.DENSE] = value_bytes(source.dtype, n)
    if encoding == "auto":
        return min(totals, key=lambda code: (totals[code], code))
    forced = _FORCED[encoding]
    if forced not in totals:
        if forced in RELATED_MASKS:
            why = "its mask does not follow from the base tensor of that name"
        else:
            why = "it has 2**32 columns or more"
        raise ArgumentError(
            f"mask_encoding: {encoding!r} cannot hold {quote(name)}, {why}; use 'auto'"
        )
    return forced


def digest_elements(state: Mapping[str, Elements]) -> bytes:
    """xxh3_128 of a state; `docs/wire-format.md` has the serialisation, `base_digest` the use."""
    hasher = xxhash.xxh3_128()
    for raw, elements in sorted((name.encode(), elements) for name, elements in state.items()):
        head = [len(raw), elements.dtype.code, len(elements.shape), *elements.shape]
        hasher.update(np.array(head, "<u8").tobytes() + raw)
        for start in range(0, elements.bits.size, CHUNK):
            chunk = elements.bits[start : start + CHUNK]
            kept = canonical(chunk, elements.dtype)
            hasher.update(kept.astype(unsigned(elements.dtype), copy=False).data)
    return hasher.digest()
