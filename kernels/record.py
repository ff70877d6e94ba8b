"""Job records: what a kernel is told, as numbers of eight bytes in a row."""

import struct
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np


def record(*names: str) -> np.dtype[np.void]:
    """Dtype of a job with these fields, all int64; addresses count bytes."""
    fields: list[tuple[str, type]] = [("next", np.int64), ("parts", np.int64)]
    return np.dtype([*fields, *((name, np.int64) for name in names)], align=True)


class Fields:
    """Where the fields of a record stand, and which of them are float64."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        names = dtype.names or ("",)
        # Threads take their parts by adding to the first eight bytes.
        assert names[0] == "next"
        assert dtype[0] == np.dtype(np.int64)
        assert all(dtype[i].itemsize == 8 for i in range(len(names)))
        self.places = {name: i for i, name in enumerate(names)}
        self.floats = frozenset(name for name in names if dtype[name].kind == "f")
        self.zeros = array("q", bytes(dtype.itemsize))


class Job:
    """One record in memory, whose fields are set and read by name.

    An array of plain numbers, not of NumPy's: a small convolution makes a dozen of them.
    """

    __slots__ = ("_fields", "_words", "address")

    def __init__(self, fields: Fields, words: "array[int]") -> None:
        self._fields = fields
        self._words = words
        self.address = words.buffer_info()[0]
        """Of the record; the job must stay alive while it is used."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._fields.floats:
            (value,) = struct.unpack("q", struct.pack("d", value))
        self._words[self._fields.places[name]] = value

    def __getitem__(self, name: str) -> int:
        """Return a field as its eight bytes stand there, as an int."""
        return self._words[self._fields.places[name]]

    def set(self, values: Mapping[str, Any]) -> None:
        """Set fields."""
        if self._fields.floats:
            for name, value in values.items():
                self[name] = value
            return
        words, places = self._words, self._fields.places
        for name, value in values.items():
            words[places[name]] = value

    def again(self, **fields: Any) -> "Job":
        """Return a copy with these fields changed."""
        job = Job(self._fields, self._words[:])
        job.set(fields)
        return job
