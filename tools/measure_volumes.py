"""Measure asked against rendered volumes of the synthetic cohort and write them down.

    python tools/measure_volumes.py

writes docs/results/cohort-volumes.json and the table in docs/cohort.md. It takes about 20 seconds
on one core. The same code on the same machine type writes the same files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.fed.cohort.environment import plan_sites
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.measure import achieved_fractions
from sparsekit.fed.cohort.make.people import draw_person, shape_rng
from sparsekit.fed.cohort.make.template import load_template
from sparsekit.fed.cohort.make.volumes import STRUCTURES

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- volumes: begin -->", "<!-- volumes: end -->"
SEED = 20
# Voxel size in mm, residual scale, people.
CONDITIONS = ((4, 0.5, 120), (4, 1.0, 120), (2, 0.5, 24))


def measure(resolution: int, residual_scale: float, people: int) -> dict[str, Any]:
    """Correlation, slope and scatter of log rendered on log asked share, per structure."""
    template = load_template(resolution)
    plans = plan_sites("uniform-iid", subjects=people, sites=1)
    asked, rendered, heads = [], [], []
    for index in range(people):
        person = draw_person(plans, index, seed=SEED, residual_scale=residual_scale)
        anatomy = build_anatomy(template, person, shape_rng(SEED, index))
        asked.append(person.log_fractions)
        rendered.append(np.log(achieved_fractions(template, anatomy)))
        heads.append(np.log(anatomy.deformation.brain_mm3) - person.log_icv)
    x, y = np.array(asked), np.array(rendered)
    structures = {}
    for column, name in enumerate(STRUCTURES):
        error = y[:, column] - x[:, column]
        structures[name] = {
            "r": round(float(np.corrcoef(x[:, column], y[:, column])[0, 1]), 4),
            "slope": round(float(np.polyfit(x[:, column], y[:, column], 1)[0]), 4),
            "asked_sd": round(float(x[:, column].std()), 4),
            "error_sd": round(float(error.std()), 4),
            "worst_error": round(float(np.abs(error - error.mean()).max()), 4),
        }
    return {
        "resolution_mm": resolution,
        "residual_scale": residual_scale,
        "people": people,
        "seed": SEED,
        "head_size_error_sd": round(float(np.std(heads)), 5),
        "structures": structures,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table of correlation and slope."""
    header = " | ".join(
        f"{r['resolution_mm']} mm, scale {r['residual_scale']}, n={r['people']}" for r in results
    )
    lines = [f"| r / slope | {header} |", "|---|" + "---|" * len(results)]
    for name in STRUCTURES:
        cells = (r["structures"][name] for r in results)
        values = " | ".join(f"{cell['r']:.3f} / {cell['slope']:.2f}" for cell in cells)
        lines.append(f"| {name.replace('_', ' ')} | {values} |")
    sizes = " | ".join(f"{100 * r['head_size_error_sd']:.2f} %" for r in results)
    lines.append(f"| head size, SD of the error | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every condition, then write the result and its table."""
    results = [measure(*condition) for condition in CONDITIONS]
    out = DOCS / "results" / "cohort-volumes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    page = DOCS / "cohort.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    print(table(results))


if __name__ == "__main__":
    main()
