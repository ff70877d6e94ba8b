"""Bytes and products that Triton's interpreter really executes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from triton.runtime.interpreter import interpreter_builder


@dataclass
class Counts:
    loaded: int = 0
    stored: int = 0
    products: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what runs inside: elements whose mask is set, and dots by their shapes."""
    counts = Counts()
    kind = type(interpreter_builder)
    load, store, dot = kind.create_masked_load, kind.create_masked_store, kind.create_dot

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        value = load(self, ptrs, mask, *rest)
        counts.loaded += int(np.count_nonzero(mask.data)) * value.data.dtype.itemsize
        return value

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts.stored += int(np.count_nonzero(mask.data)) * value.data.dtype.itemsize
        return store(self, ptrs, value, mask, *rest)

    def counting_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counts.products += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    changed: Any = kind
    changed.create_masked_load, changed.create_masked_store = counting_load, counting_store
    changed.create_dot = counting_dot
    try:
        yield counts
    finally:
        changed.create_masked_load, changed.create_masked_store = load, store
        changed.create_dot = dot
