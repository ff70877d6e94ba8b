"""Masks that keep some of the base's non-zero elements, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsekit.codec import predicted, rice
from sparsekit.codec.based_codes import SubsetCode
from sparsekit.codec.codes import choose_rice
from sparsekit.codec.elements import Elements, magnitudes, nonzero
from sparsekit.codec.pattern import pattern_positions
from sparsekit.codec.positions import CHUNK, Bools, Positions, flat_positions, taking
from sparsekit.codec.records import MaskCode
from sparsekit.errors import FormatError

# Two masks are read side by side.
_CHUNK = CHUNK // 8


@dataclass(frozen=True, slots=True)
class Relation:
    """How a mask follows from a base tensor."""

    expected: dict[MaskCode, int]
    """Bytes of a section by the code that can hold the mask."""
    kept: Bools | None = None
    """Which of the base's non-zero elements the mask keeps; None if all."""
    prediction: predicted.Prediction | None = None


def relate(keep: Bools, k: int, base: Elements, *, partly: bool) -> Relation | None:
    """Compare a flat mask that keeps `k` >= 1 elements with a base tensor of its shape.

    None if it keeps something else than non-zero elements of the base, or, unless `partly`, not
    all of them.
    """
    pattern = nonzero(base.bits, base.dtype)
    held = int(np.count_nonzero(pattern))
    if not (k == held or (partly and k < held)) or np.count_nonzero(keep & pattern) != k:
        return None
    if k == held:
        return Relation({MaskCode.SAME: 0})
    places = flat_positions(pattern)
    kept = keep[places]
    expected = {MaskCode.SUBSET: choose_rice(held, k)[1]}
    prediction = predicted.predict(magnitudes(base.bits[places], base.dtype), base.dtype, kept)
    if prediction is not None:
        expected[MaskCode.PREDICTED] = prediction.expected_bytes
    return Relation(expected, kept, prediction)


def pack(code: MaskCode, relation: Relation) -> tuple[bytes, memoryview]:
    """Parameters and section."""
    if code is MaskCode.SAME:
        return b"", memoryview(b"")
    if code is MaskCode.PREDICTED:
        assert relation.prediction is not None
        return relation.prediction.code.parameters, predicted.pack(relation.prediction)
    assert relation.kept is not None
    held = relation.kept.size
    gaps, _ = choose_rice(held, int(np.count_nonzero(relation.kept)))
    return SubsetCode(gaps, held).parameters, rice.pack(relation.kept, gaps)


def subset_positions(
    section: memoryview, code: SubsetCode, k: int, base: Elements
) -> Iterator[tuple[int, Positions]]:
    """Kept positions chunk by chunk, checked, in the form of `positions.bitmap_positions`."""
    found = rice.positions(section, code.rice, code.held, k, chunk=_CHUNK)
    take = taking(start + places for start, places in found)
    done = 0
    for start, places in pattern_positions(base, chunk=_CHUNK):
        first, done = done, done + places.size
        if done > code.held:
            break
        yield start, places[take(done) - first]
    if done != code.held:
        raise FormatError(f"its mask needs a base tensor of {code.held} non-zero elements")
