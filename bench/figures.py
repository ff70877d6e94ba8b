"""The figures that the benchmarks are for, each with its bar where it has one."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.bench.blocks import IN_BLOCK, in_block_ratios
from sparsekit.bench.network import LAYERS, MEAN_LAYERS, SPARSITIES
from sparsekit.bench.pairs import OURS, STOCK, quartiles, ratio
from sparsekit.bench.selection import PARTITION, PRUNE, READ, SIZES, TOPK
from sparsekit.bench.selection import SPARSITIES as TOPK_SPARSITIES
from sparsekit.bench.steps import LEFT_DENSE, STEP

Row = Mapping[str, Any]
Quartiles = tuple[float, float, float]

FORWARD = "masked_conv3d forward"
GRADIENTS = "masked_conv3d forward + gradients"
NEVER_SLOWER = 0.95
_ALL = SPARSITIES
_BARS: dict[str, Sequence[float]] = {
    FORWARD: (1.2, 1.4, 3.5, 6, 11, 35),
    GRADIENTS: (1, 1.2, 3, 5, 8.5, 20),
    STEP: (2.2, 3, 6.5, 10, 15, 26),
    LEFT_DENSE: (2.2, 2.8, 5.5, 8, 11, 16),
}
_TOPK_BARS = {PARTITION: 4.0, TOPK: 50.0, PRUNE: 400.0}
_MOST_READS = 4.0
_BLOCKS_BAR = 4.0
_MIDDLE_BLOCKS = (2, 3, 4)
_FIRST_BLOCK_BAR, _FIRST_BLOCK_AT = 40.0, 0.95
_MEMORY_BAR = 0.4
_COMPILE_BAR_S, _LOAD_BAR_S = 20.0, 1.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One number with its spread; `value` is None where it was not measured."""

    what: str
    case: str
    value: Quartiles | None
    unit: str
    """``x`` for a ratio of times or bytes, ``s`` for seconds."""
    bar: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the median reaches the bar; None without one or without a value."""
        if self.bar is None or self.value is None:
            return None
        return self.value[1] <= self.bar if self.at_most else self.value[1] >= self.bar

    def as_json(self) -> dict[str, Any]:
        """Return what the results file keeps."""
        sign = "at_most" if self.at_most else "at_least"
        return {
            "what": self.what,
            "case": self.case,
            "quartiles": None if self.value is None else [round(v, 4) for v in self.value],
            "unit": self.unit,
            **({} if self.bar is None else {"bar": {sign: self.bar}, "holds": self.holds}),
        }


def select(rows: Iterable[Row], **labels: Any) -> list[Row]:
    """Rows that have all these labels."""
    return [row for row in rows if all(row.get(k) == v for k, v in labels.items())]


def one(rows: Iterable[Row], **labels: Any) -> Row | None:
    """The row that has all these labels, or None."""
    found = select(rows, **labels)
    return found[-1] if found else None


def percent(sparsity: float) -> str:
    """As the tables write a sparsity."""
    return f"{100 * sparsity:.3g} %"


def geometric_mean(rows: Sequence[Row], what: str, sparsity: float) -> Quartiles | None:
    """Of the ratios of the layers in `MEAN_LAYERS`, quartile by quartile."""
    found = [one(rows, what=what, layer=name, sparsity=sparsity) for name in MEAN_LAYERS]
    ratios = [ratio(row, STOCK) for row in found if row is not None]
    if len(ratios) < len(MEAN_LAYERS):
        return None
    low, middle, high = (
        math.exp(sum(math.log(r[i]) for r in ratios) / len(ratios)) for i in range(3)
    )
    return low, middle, high


def best_dense(row: Row) -> tuple[str, Quartiles]:
    """Name of a layer's faster dense side, and how often ours fits into its time."""
    sides = [name for name in row["milliseconds"] if name != OURS]
    best = min(sides, key=lambda name: quartiles(row["milliseconds"][name])[1])
    return best, ratio(row, best)


def _maybe(row: Row | None, side: str, over: str = OURS) -> Quartiles | None:
    if row is None or not {side, over} <= row["milliseconds"].keys():
        return None
    return ratio(row, side, over)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Every figure of docs/results/cpu.md, in its order."""
    groups: tuple[Callable[[Sequence[Row]], Iterator[Figure]], ...] = (
        _convolutions, _steps, _never_slower, _memory, _topk, _blocks, _first_step,
    )  # fmt: skip
    return [figure for group in groups for figure in group(rows)]


def _convolutions(rows: Sequence[Row]) -> Iterator[Figure]:
    for what in (FORWARD, GRADIENTS):
        for sparsity, bar in zip(_ALL, _BARS[what], strict=True):
            value = geometric_mean(rows, what, sparsity)
            mean = f"{what}, geometric mean of {MEAN_LAYERS[0]} to {MEAN_LAYERS[-1]}"
            yield Figure(mean, percent(sparsity), value, "x", bar)


def _steps(rows: Sequence[Row]) -> Iterator[Figure]:
    for what in (STEP, LEFT_DENSE):
        for sparsity, bar in zip(_ALL, _BARS[what], strict=True):
            row = one(rows, what=what, sparsity=sparsity, masks="uniform random")
            yield Figure(what, percent(sparsity), _maybe(row, STOCK), "x", bar)
    for row in trained_rows(rows):
        case = percent(row["sparsity"])
        yield Figure("training step, masks of a trained network", case, ratio(row, STOCK), "x")


def trained_rows(rows: Sequence[Row]) -> list[Row]:
    """Steps with a trained network's masks, the densest first."""
    found = select(rows, what=STEP, masks="trained, global threshold")
    return sorted(found, key=lambda row: float(row["sparsity"]))


def _never_slower(rows: Sequence[Row]) -> Iterator[Figure]:
    for what in (FORWARD, GRADIENTS):
        for name in LAYERS:
            found = select(rows, what=what, layer=name)
            values = [(best_dense(row)[1], percent(row["sparsity"])) for row in found]
            value, case = min(values, default=(None, "any"), key=lambda pair: pair[0][1])
            title = f"{what}, {name}, beside the best dense path, its worst sparsity"
            yield Figure(title, case, value, "x", NEVER_SLOWER)


def _memory(rows: Sequence[Row]) -> Iterator[Figure]:
    found = select(rows, what="memory of a step")
    for row in found:
        own, stock = (
            quartiles([run["peak_bytes"] - run["resident_before_bytes"] for run in runs])
            for runs in (row["processes"]["ours"], row["processes"]["stock"])
        )
        value = (own[0] / stock[1], own[1] / stock[1], own[2] / stock[1])
        case = percent(row["sparsity"])
        yield Figure("peak memory of a step, ours over stock", case, value, "x", _MEMORY_BAR, True)
    if not found:
        yield Figure("peak memory of a step, ours over stock", "any", None, "x", _MEMORY_BAR, True)


def _topk(rows: Sequence[Row]) -> Iterator[Figure]:
    for size in SIZES:
        for side, bar in _TOPK_BARS.items():
            for sparsity in TOPK_SPARSITIES:
                row = one(rows, what="topk_mask", weights=size, sparsity=sparsity)
                title = f"topk_mask of {size:,} weights, times faster than {side}"
                yield Figure(title, percent(sparsity), _maybe(row, side), "x", bar)
        for sparsity in TOPK_SPARSITIES:
            row = one(rows, what="topk_mask", weights=size, sparsity=sparsity)
            title = f"topk_mask of {size:,} weights, in reads of them"
            reads = _maybe(row, OURS, READ)
            most = _MOST_READS if size == SIZES[-1] else None
            yield Figure(title, percent(sparsity), reads, "x", most, True)


def _blocks(rows: Sequence[Row]) -> Iterator[Figure]:
    what = "norm + pool + ReLU, forward + gradients"
    for layer in ("blocks 2 to 4 together", "block 2", "block 3", "block 4"):
        row = one(rows, what=what, layer=layer)
        bar = _BLOCKS_BAR if layer.startswith("blocks") else None
        yield Figure(what, layer, _maybe(row, STOCK), "x", bar)
    found = select(rows, what=IN_BLOCK)
    value = quartiles(in_block_ratios(found)) if len(found) == len(_MIDDLE_BLOCKS) else None
    case = f"blocks 2 to 4 together, {percent(_FIRST_BLOCK_AT)}"
    yield Figure(f"{IN_BLOCK}, forward + gradients", case, value, "x", _BLOCKS_BAR)
    what = "block as a whole, forward + gradients"
    for sparsity in _ALL:
        row = one(rows, what=what, layer="block 1", sparsity=sparsity)
        bar = _FIRST_BLOCK_BAR if sparsity == _FIRST_BLOCK_AT else None
        yield Figure(what, f"block 1, {percent(sparsity)}", _maybe(row, STOCK), "x", bar)
    for row in select(rows, what=what, sparsity=_FIRST_BLOCK_AT):
        if row["layer"] != "block 1":
            case = f"{row['layer']}, {percent(row['sparsity'])}"
            yield Figure(what, case, ratio(row, STOCK), "x")


def _first_step(rows: Sequence[Row]) -> Iterator[Figure]:
    row = one(rows, what="first step")
    runs: dict[str, list[Row]] = row["processes"] if row else {}

    def seconds(kind: str, stages: Sequence[str]) -> Quartiles | None:
        found = runs.get(kind, [])
        totals = [sum(run[stage] for stage in stages) + run["steps_s"][0] for run in found]
        return quartiles(totals) if totals else None

    yield Figure(
        "first step after installation, with compilation", "95 %",
        seconds("compiles", ["sparsify_s"]), "s", _COMPILE_BAR_S, True,
    )  # fmt: skip
    yield Figure(
        "first step in the next process, importing sparsekit and Numba included", "95 %",
        seconds("loads", ["import_sparsekit_s", "import_numba_s", "sparsify_s"]), "s",
        _LOAD_BAR_S, True,
    )  # fmt: skip
