"""The codec for torch: payloads of states, around `sparsekit.codec.core`."""

import mmap
from collections.abc import Iterator, Mapping
from typing import get_args

import torch
from torch import Tensor

from sparsekit.codec import core, decoding
from sparsekit.codec.core import BASED, Level, MaskEncoding, Values
from sparsekit.codec.crossing import (
    check_mapping,
    decoded,
    dtype_of,
    elements_of_state,
    flags_of,
    source_of,
)
from sparsekit.codec.elements import Elements
from sparsekit.codec.records import quote
from sparsekit.codec.wire import (
    RECORD,
    Buffer,
    Header,
    Placed,
    as_bytes_view,
    described_bytes,
    parse,
)
from sparsekit.errors import (
    ArgumentError,
    ArgumentTypeError,
    BudgetError,
    TemplateError,
)
from sparsekit.types import Masks, State

DEFAULT_MAX_BYTES = 4 * 2**30
# For records beside those of a template, which a reader skips.
_UNNAMED_BYTES = 2**16
_CPU = torch.device("cpu")


def encode(
    state: State,
    *,
    masks: Masks | None = None,
    base: State | None = None,
    level: Level = "balanced",
    values: Values = "lossless",
    mask_encoding: MaskEncoding = "auto",
    round: int = 0,
) -> bytes:
    """Write a state as a payload: masks and kept values, checked by checksums.

    The same input gives the same bytes, always. A -0.0 becomes +0.0; every other bit pattern
    comes back unchanged.

    Parameters
    ----------
    state : mapping of str to Tensor
        Tensors of any shape, of dtype float32, float64, float16, bfloat16, int8, int16, int32,
        int64, uint8 or bool. Of large tensors on a GPU with Triton, only the bits of masks and
        the kept elements are copied to the CPU, where they are coded; other tensors, and a base,
        are copied whole.
    masks : mapping of str to Tensor, optional
        Bool tensors for some of the names, of the same shapes, True where a weight is kept. A
        kept weight may be 0. A tensor without one is masked by its own non-zero pattern where
        that takes fewer bytes than storing it whole.
    base : mapping of str to Tensor, optional
        A state that the receiver holds as well, and needs for decoding. A mask equal to the
        non-zero pattern of the base tensor of the same name then takes no bytes, one that keeps a
        part of it few, and float32 values are stored as differences where that is shorter.
    level : {"fast", "balanced", "small"}
        Speed against bytes: "fast" stores bitmaps and raw values, "balanced" codes masks and
        splits the values of floats, for some 20 % fewer bytes. "small" is "balanced" with short
        headers: worth it where many tensors are small or little has changed.
    values : {"lossless", "bf16", "fp16", "int8", "int4"}
        Precision of float32 values. "bf16" and "fp16" round them to 16 bits, to the nearest.
        "int8" and "int4" round the differences to `base` (without one, the values) to 255 or 15
        levels, of equal distance within a tensor; tensors of fewer than 16 kept elements stay
        as they are. What is encoded next should have as its base what this payload decodes to:
        its differences then make up for this rounding. All decode to float32 again, to the same
        bits on every machine. Other dtypes are never rounded.
    mask_encoding : str
        "auto", "dense", "bitmap", "rice", "csr", "same", "subset", "predicted" or "ranked".
        "auto" takes the smallest. Another one is used for every tensor in `masks` (without
        `masks`: of two dimensions or more) that keeps some but not all of its elements.
    round : int
        A number that travels in the header, 0 to 2**64 - 1.

    Returns
    -------
    bytes
        A payload in the format of ``docs/wire-format.md``.

    Raises
    ------
    ArgumentTypeError
        For a name that is no string, a value that is no dense tensor of a listed dtype, a mask
        that is not bool.
    ArgumentError
        For a non-zero value outside its mask, a mask of another shape or without a tensor, and
        an option that is unknown or cannot be met.
    ValueRangeError
        For a number that `values` cannot hold: a finite one beyond its range, or for "int8" and
        "int4" one that is not finite.

    Examples
    --------
    >>> import torch
    >>> from sparsekit.codec import decode, encode
    >>> payload = encode({"w": torch.tensor([[0.0, 1.5], [0.0, 0.0]])})
    >>> decode(payload)["w"]
    tensor([[0.0000, 1.5000],
            [0.0000, 0.0000]])
    """
    chunks: list[bytes | memoryview] = [b""]
    encoding = encode_chunks(
        state, masks=masks, base=base, level=level, values=values, mask_encoding=mask_encoding,
        round=round,
    )  # fmt: skip
    for _, sections in encoding:
        chunks += sections
    # The header comes last, and stands first.
    return b"".join([chunks.pop(), *chunks])


def encode_chunks(
    state: State,
    *,
    masks: Masks | None,
    base: State | None,
    level: Level,
    values: Values,
    mask_encoding: MaskEncoding,
    round: int,
) -> Iterator[tuple[str, list[bytes | memoryview]]]:
    """Give the sections of one tensor after the other, and at the end the header under ``""``."""
    _check_choice("level", level, get_args(Level))
    _check_choice("values", values, get_args(Values))
    _check_choice("mask_encoding", mask_encoding, get_args(MaskEncoding))
    if mask_encoding in BASED and base is None:
        raise ArgumentError(f"mask_encoding: {mask_encoding!r} needs a base")
    if isinstance(round, bool) or not isinstance(round, int):
        raise ArgumentTypeError(f"round: expected an int, got {type(round).__name__}")
    if not 0 <= round < 2**64:
        raise ArgumentError(f"round: expected 0 to 2**64 - 1, got {round}")
    check_mapping(state, "state")
    if masks is not None:
        check_mapping(masks, "masks")
        names = set(state)
        for name in masks:
            if name not in names:
                raise ArgumentError(f"masks: {quote(str(name))} is not in the state")
    encoder = core.Encoder(
        None if base is None else elements_of_state(base, "base"), masked=masks is not None,
        mask_encoding=mask_encoding, level=level, values=values,
    )  # fmt: skip
    for name in state:
        source = source_of(state[name], name)
        given = None
        if masks is not None and name in masks:
            given = flags_of(masks[name], name, source.shape)
        yield name, encoder.add(name, source, given)
    yield "", [encoder.header(round)]


def decode(
    payload: Buffer,
    *,
    base: State | None = None,
    template: State | None = None,
    max_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Read the state out of a payload, which may be hostile.

    Parameters
    ----------
    payload : bytes, bytearray or memoryview
        What `encode` returned.
    base : mapping of str to Tensor, optional
        The state that was the sender's base; not looked at where the payload needs none.
    template : mapping of str to Tensor, optional
        A state that the payload must match in names, shapes and dtypes; their order and the
        template's values and device do not matter.
    max_bytes : int, optional
        Most bytes that the decoded tensors may take. With neither `template` nor `max_bytes`
        the limit is 4 GiB. What a header of more than 640 KiB takes is counted as well, at 1 KiB a
        tensor and 4 bytes for each of its own: some 450 tensors are free.
    device : torch.device or str
        Where the tensors are to be. Those stored as a bitmap and plain values (`encode` with
        ``level="fast"``) are put together on a GPU with Triton; others on the CPU, and copied.

    Returns
    -------
    dict of str to Tensor
        Contiguous tensors in the payload's order, which own their memory.

    Raises
    ------
    CodecError
        Whatever is wrong with the payload: `TruncatedError`, `FormatError`, `ChecksumError`,
        `VersionError`, `BudgetError`, `BaseMismatchError` or `TemplateError`. All sizes are
        checked before memory is taken for them.
    ArgumentTypeError, ArgumentError
        For an argument of a wrong type or value.
    """
    there = torch.device(device)
    return dict(
        decode_each(payload, base=base, template=template, max_bytes=max_bytes, device=there)
    )


def decode_each(
    payload: Buffer | mmap.mmap,
    *,
    base: State | None,
    template: State | None,
    max_bytes: int | None,
    device: torch.device = _CPU,
) -> Iterator[tuple[str, Tensor]]:
    """Check what can be checked at once, and return an iterator that decodes tensor by tensor."""
    view = as_bytes_view(payload)
    limit = _byte_limit(template, max_bytes)
    header = parse(view, room=_room(template, limit))
    records = [placed for placed in header.records if placed.record.dtype is not None]
    if template is not None:
        _check_template(records, template)
    needed = sum(r.n * r.dtype.itemsize for p in records if (r := p.record).dtype is not None)
    if template is None:
        needed += described_bytes(len(header.records), header.header_len)
    if limit is not None and needed > limit:
        raise BudgetError(
            f"payload: it decodes to {needed} bytes, the limit is {limit}; "
            "pass a larger max_bytes if the sender is to be trusted with them"
        )
    held = _held_base(header, base)
    return ((p.record.name, decoded(view, p, held, device)) for p in records)


def decode_masks(payload: Buffer, *, base: State | None = None) -> dict[str, Tensor]:
    """Read the masks out of a payload, which may be hostile.

    Parameters
    ----------
    payload : bytes, bytearray or memoryview
        What `encode` returned.
    base : mapping of str to Tensor, optional
        The state that was the sender's base.

    Returns
    -------
    dict of str to Tensor, bool
        One mask per tensor: the one given to `encode`; without one, the non-zero pattern, or all
        True where the tensor is stored whole.

    Raises
    ------
    CodecError
        As `decode`; masks of more than 4 GiB in all are refused.
    """
    view = as_bytes_view(payload)
    header = parse(view, room=DEFAULT_MAX_BYTES)
    records = [placed for placed in header.records if placed.record.dtype is not None]
    needed = sum(placed.record.n for placed in records)
    if needed > DEFAULT_MAX_BYTES:
        raise BudgetError(
            f"payload: its masks take {needed} bytes, the limit is {DEFAULT_MAX_BYTES}"
        )
    held = _held_base(header, base)
    return {
        p.record.name: torch.from_numpy(decoding.decode_mask(view, p, held).reshape(p.record.shape))
        for p in records
    }


def base_digest(state: State) -> bytes:
    """Digest of a state, 16 bytes, by which a payload names its base.

    It depends on names, dtypes, shapes and values, not on the order of the names, the device or
    the memory layout; -0.0 counts as +0.0, so that a state and what decodes from its payload
    have the same digest.

    Parameters
    ----------
    state : mapping of str to Tensor
        As for `encode`.

    Returns
    -------
    bytes
        xxh3_128 of the serialisation in ``docs/wire-format.md``.
    """
    return core.digest_elements(elements_of_state(state, "state"))


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ArgumentError(f"{argument}: expected one of {expected}, got {value!r}")


def _byte_limit(template: State | None, max_bytes: int | None) -> int | None:
    if max_bytes is None:
        return DEFAULT_MAX_BYTES if template is None else None
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise ArgumentTypeError(f"max_bytes: expected an int, got {type(max_bytes).__name__}")
    if max_bytes < 0:
        raise ArgumentError(f"max_bytes: expected 0 or more, got {max_bytes}")
    return max_bytes


def _room(template: State | None, limit: int | None) -> int | None:
    """Memory for a payload's records: what the limit allows, or those of the template take."""
    if template is None:
        return limit
    check_mapping(template, "template")
    headers = sum(RECORD.size + 128 + len(str(name).encode()) for name in template)
    return described_bytes(len(template), headers) + _UNNAMED_BYTES


def _check_template(records: list[Placed], template: State) -> None:
    check_mapping(template, "template")
    found = {placed.record.name: placed.record for placed in records}
    for name in template:
        if name not in found:
            raise TemplateError(f"payload: it lacks {quote(name)}, which the template has")
    for name, record in found.items():
        if name not in template:
            raise TemplateError(f"payload: it has {quote(name)}, which the template lacks")
        assert record.dtype is not None
        dtype = dtype_of(template[name], name, "template")
        shape = tuple(template[name].shape)
        if (dtype, shape) != (record.dtype, record.shape):
            raise TemplateError(
                f"payload: expected {quote(name)} as {dtype.name} {shape}, "
                f"got {record.dtype.name} {record.shape}"
            )


def _held_base(header: Header, base: State | None) -> Mapping[str, Elements]:
    needs_base = any(header.base_digest)
    given = None if base is None or not needs_base else elements_of_state(base, "base")
    return decoding.checked_base(header, given)
