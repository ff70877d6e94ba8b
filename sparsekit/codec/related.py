"""Masks that keep some of the base's non-zero elements, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sparsekit.codec import compiled, predicted, rice
from sparsekit.codec.based_codes import SubsetCode
from sparsekit.codec.codes import choose_rice
from sparsekit.codec.elements import Bits, Elements, magnitudes
from sparsekit.codec.flags import Flags
from sparsekit.codec.pattern import pattern_positions
from sparsekit.codec.positions import CHUNK, Bools, Positions, positions_in, taking
from sparsekit.codec.records import MaskCode
from sparsekit.errors import FormatError

# Two masks are read side by side.
_CHUNK = CHUNK // 8
# Elements that are looked at together while a mask is written.
_MEMBERS = 4 * CHUNK


@dataclass(frozen=True, slots=True)
class Relation:
    """How a mask follows from a base tensor."""

    expected: dict[MaskCode, int]
    """Bytes of a section by the code that can hold the mask."""
    keep: Flags
    base: Elements
    pattern: Flags | None
    """The base's non-zero elements; None if the others are as good."""
    prediction: predicted.Prediction | None = None

    def members(self) -> Iterator[tuple[Bits, Bools]]:
        """Magnitudes of the base's elements and whether the mask keeps them."""
        for start in range(0, self.keep.n, _MEMBERS):
            stop = min(start + _MEMBERS, self.keep.n)
            held, kept = self.base.bits[start:stop], self.keep.between(start, stop)
            if self.pattern is not None:
                places = positions_in(self.pattern.between(start, stop))
                held, kept = held.take(places), kept[places]
            yield magnitudes(held, self.base.dtype), kept


def relate(keep: Flags, base: Elements, *, partly: bool, ranked: bool = False) -> Relation | None:
    """Compare a flat mask that keeps at least one element with a base tensor of its shape.

    None if there is none: unless `partly`, the mask then keeps something else than all non-zero
    elements of the base. If `ranked`, zeros count as candidates in any case.
    """
    pattern = Flags.of_nonzero(base.bits, base.dtype)
    k, held = keep.count, pattern.count
    outside = keep.outside(pattern)
    if k == held and not outside and not ranked:
        return Relation({MaskCode.SAME: 0}, keep, base, pattern)
    if not partly:
        return None
    # Where rounding has left zeros in the base, a mask keeps some of them.
    if outside or ranked:
        relation = Relation({}, keep, base, None)
        prediction = predicted.predict(relation.members, base.dtype, keep.n, k, ranked=True)
        if prediction is None:
            return None
        relation.expected[MaskCode.RANKED] = prediction.expected_bytes
    else:
        relation = Relation({MaskCode.SUBSET: choose_rice(held, k)[1]}, keep, base, pattern)
        prediction = predicted.predict(relation.members, base.dtype, held, k)
        if prediction is not None:
            relation.expected[MaskCode.PREDICTED] = prediction.expected_bytes
    return replace(relation, prediction=prediction)


def pack(code: MaskCode, relation: Relation) -> tuple[bytes, memoryview]:
    """Parameters and section."""
    if code is MaskCode.SAME:
        return b"", memoryview(b"")
    if code in (MaskCode.PREDICTED, MaskCode.RANKED):
        assert relation.prediction is not None
        section = predicted.pack(relation.prediction, relation.members, relation.base.dtype)
        return relation.prediction.code.parameters, section
    assert relation.pattern is not None
    held = relation.pattern.count
    gaps, _ = choose_rice(held, relation.keep.count)
    kept = np.empty(held, np.bool_)
    done = 0
    for _, some in relation.members():
        kept[done : done + some.size] = some
        done += some.size
    return SubsetCode(gaps, held).parameters, compiled.pack_rice(Flags(held, bools=kept), gaps)


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
