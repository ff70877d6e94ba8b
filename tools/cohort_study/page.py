"""From the study's folder to docs/results/cohort.json, and from that to the page."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tools.cohort_study.paired import Interval, difference, mean_interval
from tools.cohort_study.plan import FULL, SIMPLE, SMALL, Study, jobs
from tools.cohort_study.running import check_folder

FLOOR = "nine rendered volumes"
HAND_MADE = (
    "eight image features",
    "boosted trees",
    "ridge, pose undone",
    "eight features, pose known",
    "nine volumes, site known",
)
PLAIN_BAR, HAND_MADE_BAR = 0.4, 0.25
_PLAIN = ("nine measured volumes", "ridge on 8 mm voxels")

NOTES = {
    "mean predictor": "everybody has the mean age of the training people",
    "ventricle count": "dark voxels in a fixed box, linear and square term",
    "nine measured volumes": "in the scan: template windows laid over it by the true pose, tissue "
    "after taking out the shading; quadratic, sex",
    "ridge on 8 mm voxels": "",
    "ridge, pose undone": "the same after the scan was moved, turned and scaled back by the pose "
    "that the generator drew",
    "eight image features": "two ventricle measures, brain, grey, white and fluid volume, two "
    "ratios of signals; quadratic, sex, true site",
    "boosted trees": "on the same eight, sex and true site",
    "eight features, pose known": "the same features from tissue that was found with the template "
    "laid over the scan by the true pose, after taking out the shading; quadratic, sex, true site",
    "nine volumes, site known": "the nine measured ones; quadratic, sex, true site",
    "nine rendered volumes": "not from the scan: what was truly rendered, without error; "
    "quadratic, sex, true site. A floor, not a rival",
    SMALL: "scan only",
    FULL: "scan only",
}


def collect(study: Study, root: Path) -> dict[str, Any]:
    """Return what the page needs of a study's folder, finished or not.

    Raises
    ------
    RunError
        The folder holds results of other settings or of another generator.
    """
    check_folder(study, root)
    found: dict[tuple[float, str, int], dict[int, dict[str, Any]]] = {}
    missing = []
    for job in jobs(study):
        if job.kind == "render":
            continue
        target = job.target(root)
        if target.exists():
            result = json.loads(target.read_text(encoding="utf-8"))
            place = found.setdefault((job.draw.scale, job.kind, job.number), {})
            place[job.draw.seed] = result
        else:
            missing.append([job.draw.scale, job.kind, job.number, job.draw.seed])
    rows = []
    for (scale, kind, number), by_seed in found.items():
        errors = {seed: np.array(result["errors"]) for seed, result in by_seed.items()}
        row: dict[str, Any] = {
            "scale": scale,
            "predictor": kind,
            "people": number,
            "mae": {str(seed): round(float(e.mean()), 4) for seed, e in errors.items()},
            "interval": _rounded(mean_interval(list(errors.values()))),
            "detail": {str(seed): result["detail"] for seed, result in by_seed.items()},
            "cpu_seconds": round(sum(result["cpu_seconds"] for result in by_seed.values())),
        }
        row["behind_small"] = _paired(found.get((scale, SMALL, study.people), {}), by_seed)
        rows.append(row)
    label = json.loads((root / "study.json").read_text(encoding="utf-8"))
    curve = [
        {
            "from": few,
            "to": many,
            "gain": _paired(
                found.get((study.scales[0], SMALL, many), {}),
                found.get((study.scales[0], SMALL, few), {}),
            ),
        }
        for few, many in zip(study.curve, study.curve[1:], strict=False)
    ]
    return {
        "machine": label["machine"],
        "fingerprint": label["fingerprint"],
        "study": asdict(study),
        "rows": rows,
        "curve": curve,
        "missing": missing,
    }


def _paired(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]
) -> dict[str, Any] | None:
    """Their error minus ours over the seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    interval = difference(
        [np.array(ours[seed]["errors"]) for seed in seeds],
        [np.array(theirs[seed]["errors"]) for seed in seeds],
    )
    return {**_rounded(interval), "seeds": len(seeds)}


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(interval).items()}


def _row(results: dict[str, Any], scale: float, kind: str) -> dict[str, Any] | None:
    people = results["study"]["curve"][-1]
    for row in results["rows"]:
        if (row["scale"], row["predictor"], row["people"]) == (scale, kind, people):
            return dict(row)
    return None


def _mae(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    seeds = row["mae"].values()
    return f"{row['interval']['mean']:.2f} ({', '.join(f'{mae:.2f}' for mae in seeds)})"


def _difference(row: dict[str, Any] | None, digits: int = 2) -> str:
    if row is None or row["behind_small"] is None:
        return ""
    return _interval(row["behind_small"], digits)


def _interval(gap: dict[str, float], digits: int = 2) -> str:
    mean, low, high = (f"{gap[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def ladder(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the main table."""
    scales = results["study"]["scales"]
    heads = [f"scale {s:g} | minus the small CNN" for s in scales]
    yield "| mean absolute error, years (each seed) | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * (2 * len(scales))
    for kind in (*SIMPLE[:-1], SMALL, FULL, FLOOR):
        rows = [_row(results, scale, kind) for scale in scales]
        cells = [f"{_mae(row)} | {'' if kind == SMALL else _difference(row)}" for row in rows]
        yield f"| {kind} | " + " | ".join(cells) + " |"


def claims(results: dict[str, Any], scale: float) -> Iterator[tuple[str, str, bool | None]]:
    """Yield what is wanted of the small CNN at a scale, what was measured, and whether it holds."""
    for kinds, bar in ((_PLAIN, PLAIN_BAR), (HAND_MADE, HAND_MADE_BAR)):
        for kind in kinds:
            row = _row(results, scale, kind)
            gap = row and row["behind_small"]
            wanted = f"better than {kind} by at least {bar:g} years"
            holds = None if not gap else gap["mean"] >= bar and gap["low"] > 0
            yield wanted, _difference(row, 3) or "not run", holds


def curve_claim(results: dict[str, Any]) -> tuple[str, str, bool | None]:
    """Say whether the last step of the learning curve still gains, its interval without 0."""
    last = results["curve"][-1]
    wanted = f"still gains from {last['from']} to {last['to']} people"
    gain = last["gain"]
    if gain is None:
        return wanted, "not run", None
    return wanted, _interval(gain, 3), gain["low"] > 0


def page(results: dict[str, Any]) -> str:
    """Return docs/results/cohort.md."""
    study = results["study"]
    first = study["scales"][0]
    checked = [*claims(results, first), curve_claim(results)]
    verdicts = {True: "holds", False: "**does not hold**", None: "not run"}
    lines = [
        "# The synthetic cohort's ladder of difficulty",
        "",
        "Written by `make cohort-study` from docs/results/cohort.json; not by hand. The people do "
        "not exist (docs/cohort.md): **nothing here says anything about real brains**, or about "
        "how well any of these would do on them. Only the order and the differences within this "
        "page mean anything.",
        "",
        *ladder(results),
        "",
        _legend(results),
        "",
        *(f"- {kind}: {note}." for kind, note in NOTES.items() if note),
        "",
        f"## What holds at scale {first:g}",
        "",
        "| the small CNN is, or does | measured [95 %, paired] | |",
        "|---|---|---|",
        *(f"| {wanted} | {value} | {verdicts[holds]} |" for wanted, value, holds in checked),
        "",
        *_second_scale(results),
        *_curve(results),
        "## Why there is a gap",
        "",
        *_reasons(results),
    ]
    if results["missing"]:
        lines += ["", f"Not run: {_missing(results)}. `make cohort-study` goes on with them."]
    return "\n".join([*lines, ""])


def _missing(results: dict[str, Any]) -> str:
    """Name what was not run: a predictor, or all of them, with its seeds."""
    seeds: dict[tuple[float, str, int], list[int]] = {}
    for scale, kind, people, seed in results["missing"]:
        seeds.setdefault((scale, kind, people), []).append(seed)
    groups: dict[tuple[float, int, tuple[int, ...]], list[str]] = {}
    for (scale, kind, people), which in seeds.items():
        groups.setdefault((scale, people, tuple(which)), []).append(kind)
    return "; ".join(
        f"scale {scale:g}, {people} people, seed {', '.join(map(str, which))}: "
        + ("everything" if set(kinds) >= {*SIMPLE, SMALL} else ", ".join(kinds))
        for (scale, people, which), kinds in groups.items()
    )


def _legend(results: dict[str, Any]) -> str:
    study, machine = results["study"], results["machine"]
    small, full = study["small"], study["full"]
    networks = "; ".join(
        f"the {name} has width {recipe['width']:g} and {recipe['updates']} updates of "
        f"{recipe['batch']} scans (learning rate {recipe['lr']:g})"
        for name, recipe in ((SMALL, small), (FULL, full))
    )
    hours = sum(row["cpu_seconds"] for row in results["rows"]) / 3600
    return (
        f"Each seed is another cohort: {study['curve'][-1]} people to train on and "
        f"{study['held_out']} held out, {study['sites']} sites with a scanner each and all with "
        "the same ages, 45 to 82, voxels of 4 mm. All sites are pooled. Intervals: 95 % "
        "bootstrap over the seeds that were run and the people of each, paired by person. "
        "Scale: spread between people of one age and sex, over that of real people. "
        f"Networks: AdamW, one cycle, mirrored scans; {networks}; predictions are the mean over a "
        "scan and its mirror image. Penalties of linear fits have the least leave-one-out error, "
        "the trees' settings the least error in five folds. Fits took "
        f"{hours:.1f} core-hours on {machine['processor']}, torch {machine['torch']}."
    )


def _second_scale(results: dict[str, Any]) -> Iterator[str]:
    for scale in results["study"]["scales"][1:]:
        outcomes = [holds for _, _, holds in claims(results, scale)]
        if None in outcomes:
            yield f"Scale {scale:g}, the spread of real people: not run in full."
            yield ""
            continue
        verdict = (
            "The same differences hold there."
            if all(outcomes)
            else f"Of the {len(outcomes)} differences wanted above, {sum(map(bool, outcomes))} "
            "are reached there: with the spread of real people, most of what "
            "the network could still gain is noise to everybody."
        )
        yield f"Scale {scale:g} is the spread of real people. {verdict}"
        yield ""


def _curve(results: dict[str, Any]) -> Iterator[str]:
    study = results["study"]
    sizes = [
        row
        for row in results["rows"]
        if row["predictor"] == SMALL and row["scale"] == study["scales"][0]
    ]
    sizes.sort(key=lambda row: int(row["people"]))
    yield "## More people"
    yield ""
    yield "| people | small CNN (each seed) | gain over the row above [95 %, paired] |"
    yield "|---|---|---|"
    gains = {step["to"]: step["gain"] for step in results["curve"]}
    for row in sizes:
        gain = gains.get(row["people"])
        text = _interval(gain) if gain else ""
        yield f"| {row['people']} | {_mae(row)} | {text} |"
    yield ""
    yield (
        f"The same number of updates ({study['small']['updates']}) for every size, on nested sets "
        "of people and the same held-out people."
    )
    yield ""


def _reasons(results: dict[str, Any]) -> Iterator[str]:
    scale = results["study"]["scales"][0]
    yield (
        "The gap is made by what the simple predictors lose, not by a signal that only a network "
        "is given. Age acts on nine volumes and on the contrast between grey and white matter, and "
        "on nothing else; a regression that knew the rendered volumes would beat every network "
        "here (last row). Between these volumes and a scan lie a pose, folds that differ, "
        "a signal curve, blur and shading that differ by person and scanner, and 4 mm voxels. A "
        "predictor with fixed places or fixed thresholds mixes them up with age; a network learns "
        "from examples what to disregard."
    )
    yield ""
    usual, known = "eight image features", "eight features, pose known"
    for plain, helped, what in (
        ("ridge on 8 mm voxels", "ridge, pose undone", "Undoing the true pose"),
        (usual, known, "Finding tissue with the template at the true pose, without shading,"),
    ):
        rows = [_row(results, scale, kind) for kind in (plain, helped)]
        if rows[0] and rows[1]:
            change = rows[1]["interval"]["mean"] - rows[0]["interval"]["mean"]
            yield f"- {what} changes {plain} by {change:+.2f} years at scale {scale:g}."
    yield ""
    yield (
        "So part of what the network gains is what a careful pipeline of registration and bias "
        "correction does before any regression. On scans that have been through one, as "
        "those of large studies have, its advantage would be smaller or gone."
    )
