"""Compare measured synthetic heads with the table fitted to real people.

    python tools/validation_table.py collect build/cohort-validation
    python tools/validation_table.py write

The first reads what tools/measure_validation.py measured and keeps docs/results/
cohort-validation.json; the second writes docs/results/cohort-validation.md from it.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from ixi_comparison import LEVEL, REPEATS, SEEN, compare
from page_command import run

from sparsekit.fed.cohort.make import volumes
from sparsekit.fed.cohort.make.volumes import STRUCTURES

# From so many people on, slopes are certain enough to compare with the table; those of fewer only
# with what was asked of the same people.
ENOUGH = 2000
SLOPE_BOUND, SPREAD_BOUND, CORRELATION_BOUND, LEAST_R = 0.15, 0.25, 0.15, 0.95


def collect(source: Path) -> dict[str, Any]:
    """Compare every resolution that was measured."""
    results = {}
    for resolution in (4, 2):
        with np.load(source / f"people-{resolution}mm.npz") as stored:
            results[f"{resolution} mm"] = compare({name: stored[name] for name in stored.files})
    return {"repeats": REPEATS, "level": LEVEL, "resolutions": results}


def share(value: float) -> str:
    """A ratio as a percentage off 1."""
    return f"{100 * (value - 1):+.0f} %"


def slopes(result: dict[str, Any], reference: str) -> tuple[list[str], list[str]]:
    """Rows of slope, spread and r, and what misses its bound."""
    rows = [
        "| structure | slope a decade at 60: IXI | asked | rendered | off | "
        "residual SD: IXI | asked | rendered | off | r with asked |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name in STRUCTURES:
        one = result["structures"][name]
        slope, spread = one["terms"]["per decade"], one["residual_sd"]
        off = slope["rendered"] / slope[reference]
        wide = spread["rendered"] / spread[reference]
        label = name.replace("_", " ")
        rows.append(
            f"| {label} | {slope['ixi']:+.3f} | {slope['drawn']:+.3f} | "
            f"{slope['rendered']:+.4f} {span(slope)} | {share(off)} | "
            f"{spread['ixi']:.3f} | {spread['drawn']:.3f} | "
            f"{spread['rendered']:.3f} {span(spread)} | "
            f"{share(wide)} | {one['asked_r']:.3f} |"
        )
        if abs(off - 1) > SLOPE_BOUND:
            missed.append(f"slope of {label} ({share(off)})")
        if abs(wide - 1) > SPREAD_BOUND:
            missed.append(f"residual SD of {label} ({share(wide)})")
        if one["asked_r"] < LEAST_R:
            missed.append(f"r of {label} ({one['asked_r']:.3f})")
    return rows, missed


def span(value: dict[str, Any]) -> str:
    """An interval in brackets."""
    low, high = value["interval"]
    return f"[{low:.3f}, {high:.3f}]"


def effects(result: dict[str, Any]) -> list[str]:
    """Rows of curvature, sex and sites."""
    names = ("per decade squared", "male", "hh", "iop")
    rows = [
        "| structure | age squared | men over women | HH over Guy's | IOP over Guy's |",
        "|---|---|---|---|---|",
    ]
    for name in STRUCTURES:
        one = result["structures"][name]
        cells = (
            f"{one['terms'][t]['ixi']:+.3f} / {one['terms'][t]['rendered']:+.3f}" for t in names
        )
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return rows


def correlations(result: dict[str, Any]) -> list[str]:
    """Residual correlations, IXI's above the diagonal and the rendered ones below it."""
    wanted = volumes.fitted_terms().correlations
    short = ("LV", "V3", "cortex", "WM", "hipp.", "thal.", "put.", "cereb.", "lesions")
    rows = [f"| | {' | '.join(short)} |", "|---|" + "---|" * len(short)]
    for i, name in enumerate(short):
        cells = [
            "" if i == j else f"{(wanted[i][j] if j > i else result['correlations'][i][j]):.2f}"
            for j in range(len(short))
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def alone(result: dict[str, Any]) -> list[str]:
    """Rows of what is counted in the scans alone."""
    rows = [
        "| counted in the scan, over the brain's volume | r with rendered, within sites | "
        "slope a decade: rendered | counted | HH, IOP over Guy's, counted |",
        "|---|---|---|---|---|",
    ]
    for name in SEEN:
        one = result["seen"][name]
        hh, iop = one["counted_sites"]
        rows.append(
            f"| {name} | {one['r_within_site']:.2f} | {one['rendered_per_decade']:+.3f} | "
            f"{one['counted_per_decade']:+.3f} | {hh:+.2f}, {iop:+.2f} |"
        )
    return rows


def page(results: dict[str, Any]) -> str:
    """Markdown from the results file."""
    parts = [
        "# The synthetic cohort beside real people",
        "",
        "Written by `make cohort-validation` from cohort-validation.json; do not edit.",
        "",
        "Three synthetic sites with the sizes and the site terms of IXI's (Guy's, HH, IOP), ages "
        "uniform over 20 to 86 years, real spread between people (residual scale 1). The fit of "
        "`fed/cohort/make/volumes.py` to 518 people of IXI is repeated on the volumes **measured "
        "in the rendered tissue**: log share of the head, on age, age squared, sex and site. The "
        f"numbers in brackets are {results['level']} % bootstrap intervals over people "
        f"({results['repeats']} draws).",
        "",
        "The generator draws what it asks for from the same fit, so agreement shows that rendering "
        "keeps it, not that the fit is right. Brains have their site terms and ages as asked; "
        "IXI's own people are not uniform in age.",
    ]
    for name in ("4 mm", "2 mm"):
        result = results["resolutions"][name]
        whole = result["people"] >= ENOUGH
        rows, missed = slopes(result, "ixi" if whole else "drawn")
        worst = result["worst_correlation"]
        pair = " and ".join(part.replace("_", " ") for part in worst["pair"])
        off = abs(worst["ixi"] - worst["rendered"])
        if not whole:
            off = result["worst_correlation_off_drawn"]
        if off > CORRELATION_BOUND:
            missed.append(f"a residual correlation ({off:.2f} off)")
        parts += [
            "",
            f"## {name}, {result['people']} people",
            "",
            f"Off {'the table' if whole else 'what was asked of the same people, who are few'}. "
            f"Bounds: slopes within {100 * SLOPE_BOUND:.0f} %, residual SDs within "
            f"{100 * SPREAD_BOUND:.0f} %, residual correlations within {CORRELATION_BOUND}, "
            f"r of rendered with asked at least {LEAST_R}. "
            + (f"**Missed: {'; '.join(missed)}.**" if missed else "All are kept."),
            "",
            *rows,
            "",
            f"Head size follows what was asked with an SD of the error of "
            f"{100 * result['head_size_error_sd']:.2f} %.",
        ]
        if name != "4 mm":
            continue
        parts += ["", "Other terms of the fit, IXI / rendered:", "", *effects(result)]
        parts += [
            "",
            "Residual correlations, IXI above the diagonal, rendered below it. The largest "
            f"difference is {abs(worst['ixi'] - worst['rendered']):.2f}, of {pair}.",
            "",
            *correlations(result),
            "",
            "Counted in the scans alone, with their noise, shading and contrast: ventricles are "
            "the dark voxels of a box fixed in space, the rest comes from three intensities fitted "
            "to the whole head. Scanners move these counts by more than people do; that is what a "
            "model over several sites has to undo.",
            "",
            *alone(result),
            "",
            *published(result["yearly"]),
        ]
    return "\n".join(parts) + "\n"


def published(rates: dict[str, float]) -> list[str]:
    """Rows of rendered change a year beside rates from the literature."""
    rows = (
        (
            "lateral ventricles",
            f"{rates['lateral_ventricles']:+.1f} %, {rates['lateral_ventricles_ml']:+.2f} ml",
            "all ventricles +1.4 ml, very healthy +1.2 (Resnick 2003, 92 people of 59-85)",
        ),
        (
            "cortex",
            f"{rates['cortex_gm']:+.2f} %",
            "about -0.5 % (Fjell 2009, 142 of 60-91; Storsve 2014: -0.51 %, 207 of 23-87); "
            "grey matter -0.83 % (Crivello 2014, 1,172 of 65-82)",
        ),
        ("hippocampus", f"{rates['hippocampus']:+.2f} %", "-0.49 % (Smith 2020, age 70-78)"),
    )
    return [
        "Change a year at 70, over head size, beside published rates of people followed over years "
        "(IXI, which is rendered here, compares people of different age: rates need not agree):",
        "",
        "| | rendered | published |",
        "|---|---|---|",
        *(f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows),
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, "cohort-validation", collect, page))
