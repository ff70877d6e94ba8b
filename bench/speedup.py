"""The table of `sparsekit bench kernels`: how much faster than dense torch, on this machine.

The same cases as ``make bench-cpu``, with fewer rounds and layers, or layers of your own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
from sparsekit.bench.network import LAYERS, MEAN_LAYERS, SPARSITIES, Layer
from sparsekit.bench.pairs import STOCK, Case, Turns, ratio
from sparsekit.bench.steps import LEFT_DENSE, STEP, step_case
from sparsekit.errors import UsageError

QUICK_SPARSITIES = (0.8, 0.95)
_ROUNDS, _QUICK_ROUNDS = 7, 3
_LAYER = re.compile(r"(\d+),(\d+),(\d+)x(\d+)x(\d+)(?:,(\d+))?")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    sparsities: Sequence[float]
    rounds: int
    layers: Mapping[str, Layer]
    whole_steps: bool = True

    @property
    def steps(self) -> int:
        """Number of cases."""
        return len(self.sparsities) * (2 * self.whole_steps + 2 * len(self.layers))


def plan(quick: bool, own: Sequence[str] = ()) -> Plan:
    """The whole table in a few minutes, or a part of it in about one; or that of `own` layers.

    Raises
    ------
    UsageError
        A layer is not written as `layer_of` reads it.
    """
    sparsities, rounds = (QUICK_SPARSITIES, _QUICK_ROUNDS) if quick else (SPARSITIES, _ROUNDS)
    if own:
        return Plan(sparsities, rounds, {text: layer_of(text) for text in own}, False)
    names = ("conv3", "conv5") if quick else MEAN_LAYERS
    return Plan(sparsities, rounds, {name: LAYERS[name] for name in names})


def layer_of(text: str) -> Layer:
    """Read ``IN,OUT,DxHxW`` or ``IN,OUT,DxHxW,KERNEL``: channels, voxels and an odd kernel size.

    Raises
    ------
    UsageError
        It is written otherwise, or a number cannot be meant.
    """
    found = _LAYER.fullmatch(text.replace(" ", ""))
    numbers = [int(n or 3) for n in found.groups()] if found else [0] * 6
    c_in, c_out, *grid, kernel = numbers
    if not (c_in and c_out and all(grid) and kernel % 2):
        raise UsageError(
            "--layer: expected input channels, output channels, voxels and, if it is not 3, an "
            f"odd kernel size, such as 32,64,24x24x24 or 32,64,24x24x24,5; got {text!r}"
        )
    return Layer(c_in, c_out, (grid[0], grid[1], grid[2]), kernel)


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
        if wanted.whole_steps:
            yield step_case(sparsity)
            yield step_case(sparsity, first_dense=True)
        for name, layer in wanted.layers.items():
            own = None if name in LAYERS else layer
            yield conv_case(name, sparsity, "forward", own)
            yield conv_case(name, sparsity, "step", own)


def table(rows: Sequence[dict[str, Any]], wanted: Plan) -> list[list[str]]:
    """Lines of the table, the first its header: times faster by what ran and sparsity."""
    lines = [["times faster than dense torch", *map(percent, wanted.sparsities)]]
    titles = ((STEP, "whole training step"), (LEFT_DENSE, "whole step, first layer left dense"))
    for what, title in titles if wanted.whole_steps else ():
        found = [one(rows, what=what, sparsity=s) for s in wanted.sparsities]
        lines.append([title, *("-" if r is None else _times(ratio(r, STOCK)) for r in found)])
    for what, title in ((FORWARD, "forward"), (GRADIENTS, "forward + gradients")):
        for name, layer in wanted.layers.items():
            found = [one(rows, what=what, layer=name, sparsity=s) for s in wanted.sparsities]
            grid = "x".join(map(str, layer.grid))
            kernel = "" if layer.kernel == 3 else f", kernel {layer.kernel}"
            title_ = f"{layer.c_in} to {layer.c_out} channels, {grid}{kernel}, {title}"
            cells = ["-" if row is None else _marked(row) for row in found]
            lines.append([title_, *cells])
    return lines


def _times(values: tuple[float, float, float]) -> str:
    return f"{values[1]:.3g}x"


def _marked(row: Row) -> str:
    _, value = best_dense(row)
    return _times(value) + (" !" if value[1] < NEVER_SLOWER else "")


def footnote(wanted: Plan) -> str:
    """What the table's numbers mean."""
    whole = "Whole step: beside torch's modules in eager mode. " if wanted.whole_steps else ""
    threads = torch.get_num_threads()
    return (
        f"{whole}Layers: beside the faster of torch's "
        f"contiguous and channels-last convolution; ! is slower than {NEVER_SLOWER}x. Uniform "
        f"random masks, batch 1, float32, {threads} thread{'s' * (threads > 1)}."
    )
