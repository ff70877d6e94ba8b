"""What bounds a masked convolution on the measured machine, and how near each layer comes.

A product needs one vector load, or half of one in the backward pass, and there are at most so many
loads a second out of the first cache. A layer moves at least its input and output through memory,
at most at the rate of a stream, unless they stay in the last cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.bench.figures import FORWARD, GRADIENTS, Row, one
from sparsekit.bench.network import LAYERS, MEAN_LAYERS
from sparsekit.bench.pairs import OURS, quartiles

SPARSITIES = (0.8, 0.95, 0.99)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of the machine with all threads."""

    forward: float
    """Multiply-adds a second out of the first cache, forward pass."""
    backward: float
    """The same in the backward pass, where a loaded vector serves twice."""
    stream: float
    """Bytes a second of the faster of reading and copying."""
    cache_bytes: int
    """Of the last cache; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Point:
    """One layer in one pass at one sparsity."""

    what: str
    layer: str
    sparsity: float
    seconds: float
    flops: int
    """2 for each multiply-add of an unpruned weight."""
    bytes: int
    """Of the layer's tensors that must be read or written at least once."""
    loads_seconds: float
    """Least time that the loads take."""
    memory_seconds: float | None
    """Least time that the bytes take; None if they stay in the last cache."""

    @property
    def bound_seconds(self) -> float:
        """The larger of the two least times."""
        return max(self.loads_seconds, self.memory_seconds or 0.0)

    @property
    def limit(self) -> str:
        """Which of them it is."""
        return "memory" if self.memory_seconds == self.bound_seconds else "loads"


def ceilings(rows: Sequence[Row], machine: Mapping[str, Any]) -> Ceilings | None:
    """Read the ceilings out of the results; None if they were not measured."""
    stream = one(rows, what="ceiling: memory")
    loads = one(rows, what="ceiling: loads from the first cache")
    if stream is None or loads is None:
        return None
    threads = f"{loads['threads']} thread{'s' if loads['threads'] > 1 else ''}"
    rates = []
    for name in ("forward", "backward"):
        side = f"{name}, {threads}"
        seconds = quartiles(loads["milliseconds"][side])[1] / 1e3
        rates.append(loads["notes"]["multiply_adds"][side] / seconds)
    bytes_a_second = max(
        stream["notes"]["bytes"][name] / quartiles(values)[1] * 1e3
        for name, values in stream["milliseconds"].items()
    )
    last = list(machine.get("caches", {}).values())[-1:]
    size = int(last[0][:-1]) * _UNITS[last[0][-1]] if last else 0
    return Ceilings(rates[0], rates[1], bytes_a_second, size)


def points(rows: Sequence[Row], limits: Ceilings) -> list[Point]:
    """Layers of the geometric means, at the sparsities of this module."""
    found = []
    for what in (FORWARD, GRADIENTS):
        for name in MEAN_LAYERS:
            for sparsity in SPARSITIES:
                row = one(rows, what=what, layer=name, sparsity=sparsity)
                if row is not None:
                    found.append(_point(row, limits))
    return found


def _point(row: Row, limits: Ceilings) -> Point:
    layer = LAYERS[row["layer"]]
    products = row["notes"]["unpruned"] * layer.voxels
    maps = layer.c_in + layer.c_out
    times = 1
    loads_seconds = products / limits.forward
    if row["what"] == GRADIENTS:
        # Gradient of the output and input in, gradient of the input out; and twice the products.
        maps += layer.c_out + 2 * layer.c_in
        times = 3
        loads_seconds += 2 * products / limits.backward
    moved = 4 * maps * layer.voxels
    in_cache = moved < limits.cache_bytes
    return Point(
        row["what"], row["layer"], row["sparsity"],
        quartiles(row["milliseconds"][OURS])[1] / 1e3,
        2 * times * products, moved, loads_seconds,
        None if in_cache else moved / limits.stream,
    )  # fmt: skip
