"""Write what the model of GPU kernels predicts for each granularity into docs/pruning.md.

    python tools/formats_table.py [--check]

Nothing is measured. `--check` changes nothing and exits with 1 if the page is stale.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from page_command import rewrite

from sparsekit import prune
from sparsekit.kernels.masked_conv3d import gpu_cost
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.tiles import Kind

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pruning.md"
START, END = "<!-- formats: start -->\n", "<!-- formats: end -->\n"
CHANNELS, SIZE, SAMPLES = 128, 32, 4
FORMATS = ("weight", "vector:16", "vector:32", "block:16x16", "block:32x32", "block:64x64")
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
KIND = Kind("sm_90", torch.bfloat16, "ieee")


def predicted(granularity: str, sparsity: float) -> str:
    """Speedup of a forward pass and of a training step, as the model has them."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((CHANNELS, CHANNELS, 3, 3, 3), generator=random)
    masks = prune.magnitude_masks(
        {"w": weight}, sparsity, granularity=granularity, min_per_filter=0
    )
    mask = masks["w"]
    cube, ones = (SIZE, SIZE, SIZE), (1, 1, 1)
    shape = Shape(CHANNELS, CHANNELS, cube, (3, 3, 3), ones, ones, ones, 1)
    listed = gpu_cost.count_columns(mask, 1)
    found = [gpu_cost.decide(shape, SAMPLES, KIND, listed, train=train) for train in (False, True)]
    return " / ".join(f"{d.dense_seconds / d.kernel_seconds:.1f}" for d in found)


def section() -> str:
    """The table and what it is of."""
    lines = [
        "| granularity | " + " | ".join(f"{100 * s:g} %" for s in SPARSITIES) + " |",
        "|---" * (1 + len(SPARSITIES)) + "|",
    ]
    for granularity in FORMATS:
        cells = [predicted(granularity, s) for s in SPARSITIES]
        lines.append(f"| `{granularity}` | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return (
        "Model, not measured: times faster than a dense convolution, forward pass / training\n"
        f"step, of a 3x3x3 layer with {CHANNELS} channels on {SAMPLES} grids of {SIZE}^3 in "
        "bfloat16 on an H100,\nweights random. `auto` takes the dense convolution unless the "
        f"kernels are clearly faster by this.\n\n{table}\n\n"
        "Written by `python tools/formats_table.py`.\n"
    )


def with_section(page: str) -> str:
    """Return the page with its section written anew."""
    before, rest = page.split(START)
    return before + START + section() + END + rest.split(END)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the section, or say that it is stale; return the exit code."""
    return rewrite(__doc__, PAGE, with_section, argv)


if __name__ == "__main__":
    sys.exit(main())
