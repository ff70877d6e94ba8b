"""The table of `sparsekit bench kernels`: how much faster than dense torch, on this machine.

The same cases as ``make bench-cpu``, with fewer rounds and layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit.bench.convolutions import conv_case
from sparsekit.bench.figures import (
    FORWARD,
    GRADIENTS,
    NEVER_SLOWER,
    Row,
    best_dense,
    one,
    percent,
)
from sparsekit.bench.network import LAYERS, MEAN_LAYERS, SPARSITIES
from sparsekit.bench.pairs import STOCK, Case, Turns, ratio
from sparsekit.bench.steps import LEFT_DENSE, STEP, step_case

QUICK_SPARSITIES = (0.8, 0.95)
_ROUNDS, _QUICK_ROUNDS = 7, 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    sparsities: Sequence[float]
    rounds: int
    layers: Sequence[str]

    @property
    def steps(self) -> int:
        """Number of cases."""
        return len(self.sparsities) * (2 + 2 * len(self.layers))


def plan(quick: bool) -> Plan:
    """The whole table in a few minutes, or a part of it in about one."""
    if quick:
        return Plan(QUICK_SPARSITIES, _QUICK_ROUNDS, ("conv3", "conv5"))
    return Plan(SPARSITIES, _ROUNDS, MEAN_LAYERS)


def measure(wanted: Plan) -> Iterator[dict[str, Any]]:
    """Yield a row for each case as it is done.

    Raises
    ------
    DisagreementError
        Outputs or gradients of the two sides differ.
    """
    for case in _cases(wanted):
        yield Turns(case).run(wanted.rounds).row()


def _cases(wanted: Plan) -> Iterator[Case]:
    for sparsity in wanted.sparsities:
        yield step_case(sparsity)
        yield step_case(sparsity, first_dense=True)
        for name in wanted.layers:
            yield conv_case(name, sparsity, "forward")
            yield conv_case(name, sparsity, "step")


def table(rows: Sequence[dict[str, Any]], wanted: Plan) -> list[list[str]]:
    """Lines of the table, the first its header: times faster by what ran and sparsity."""
    lines = [["times faster than dense torch", *map(percent, wanted.sparsities)]]
    titles = ((STEP, "whole training step"), (LEFT_DENSE, "whole step, first layer left dense"))
    for what, title in titles:
        found = [one(rows, what=what, sparsity=s) for s in wanted.sparsities]
        lines.append([title, *("-" if r is None else _times(ratio(r, STOCK)) for r in found)])
    for what, title in ((FORWARD, "forward"), (GRADIENTS, "forward + gradients")):
        for name in wanted.layers:
            found = [one(rows, what=what, layer=name, sparsity=s) for s in wanted.sparsities]
            layer = LAYERS[name]
            grid = "x".join(map(str, layer.grid))
            title_ = f"{layer.c_in} to {layer.c_out} channels, {grid}, {title}"
            cells = ["-" if row is None else _marked(row) for row in found]
            lines.append([title_, *cells])
    return lines


def _times(values: tuple[float, float, float]) -> str:
    return f"{values[1]:.3g}x"


def _marked(row: Row) -> str:
    _, value = best_dense(row)
    return _times(value) + (" !" if value[1] < NEVER_SLOWER else "")


def footnote() -> str:
    """What the table's numbers mean."""
    return (
        "Whole step: beside torch's modules in eager mode. Layers: beside the faster of torch's "
        f"contiguous and channels-last convolution; ! is slower than {NEVER_SLOWER}x. Uniform "
        f"random masks, batch 1, float32, {torch.get_num_threads()} threads."
    )
