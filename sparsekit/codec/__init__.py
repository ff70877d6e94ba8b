"""Payloads of sparse states: `docs/wire-format.md` has the bytes."""

from importlib.util import find_spec

# Without torch `sparsekit.codec.arrays` still reads payloads.
if find_spec("torch") is not None:
    from sparsekit.codec.info import PayloadInfo, RecordInfo, inspect
    from sparsekit.codec.rows import MaskRows, decode_rows
    from sparsekit.codec.streams import decode_from, encode_to
    from sparsekit.codec.tensors import base_digest, decode, decode_masks, encode

__all__ = [
    "MaskRows",
    "PayloadInfo",
    "RecordInfo",
    "base_digest",
    "decode",
    "decode_from",
    "decode_masks",
    "decode_rows",
    "encode",
    "encode_to",
    "inspect",
]
