"""Payloads of sparse states: `docs/wire-format.md` has the bytes."""

from sparsekit.codec.info import PayloadInfo, RecordInfo, inspect
from sparsekit.codec.tensors import base_digest, decode, decode_masks, encode

__all__ = [
    "PayloadInfo",
    "RecordInfo",
    "base_digest",
    "decode",
    "decode_masks",
    "encode",
    "inspect",
]
