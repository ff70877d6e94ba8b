"""Write docs/results/privacy.json from the audited runs of `make privacy-study`, and its page.

    python tools/privacy_table.py collect FOLDER   # holds a folder for each seed
    python tools/privacy_table.py write            # docs/results/privacy.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page_command import run

from sparsekit.fed.compare import load_result
from sparsekit.fed.privacy_compare import compare_audits
from sparsekit.fed.privacy_files import load_audit
from sparsekit.fed.privacy_tables import (
    attack_rows,
    audit_note,
    comparison_note,
    conclusion,
    gap_rows,
    pair_rows,
    round_rows,
    training_rows,
)

SHOWN_IN_FULL = "error"


def collect(folder: Path) -> dict[str, Any]:
    """Return every audit, without the pairs of all moments but the last, and their comparison."""
    runs = sorted(path.parent for path in folder.glob("*/*/privacy.json"))
    audits: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for one in runs:
        result, audit = load_result(one), load_audit(one)
        for moment in audit["moments"][:-1]:
            for attack in moment["attacks"].values():
                attack["pairs"] = []
        settings = result["config"]
        data = result["data"]
        name = str(one.relative_to(folder))
        audits[name] = {
            key: value for key, value in audit.items() if key not in ("config", "draws")
        }
        audits[name]["seed"] = settings["seed"]
    # The same people stand behind all runs of a seed.
    by_seed: dict[str, set[float]] = {}
    for name, audit in audits.items():
        by_seed.setdefault(name.split("/")[0], set()).add(audit["sparsity"])
    most = set.union(*by_seed.values())
    whole = [one for one in runs if by_seed[one.parent.name] == most]
    return {
        "machine": result["machine"],
        "people": [data["train_n"], data["test_n"], data["sites"]],
        "settings": {
            key: value
            for key, value in settings.items()
            if key not in ("cohort", "sparsity", "seed")
        },
        "audits": audits,
        "compared": compare_audits(whole),
    }


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---|" + "---|" * (len(rows[0]) - 1), *lines[1:], ""]


def _summary(results: dict[str, Any]) -> list[str]:
    compared = results["compared"]
    lines = ["## What can be said", ""]
    for attack in compared["attacks"]:
        said = [f"- **{attack}.**", *conclusion(compared, attack)]
        lines.append(" ".join(said))
    return [*lines, "", comparison_note(compared), ""]


def page(results: dict[str, Any]) -> str:
    """Return docs/results/privacy.md."""
    train, test, sites = results["people"]
    machine = results["machine"]
    compared = results["compared"]
    lines = [
        "# Membership inference against sparsity",
        "",
        "Written by `make privacy-study` from docs/results/privacy.json; not by hand.",
        "[What is measured, and how](../privacy-audit.md).",
        "",
        f"Synthetic people, a new cohort and start for each seed: {train} trained on, {test} held "
        f"out, {sites} sites. Small on purpose, and trained without augmentation, so that there is "
        "something to find: a 4 mm grid and a quarter of the paper's width. It says nothing about "
        f"real people. Trained on {machine['processor']}, torch {machine['torch']}.",
        "",
        *_summary(results),
    ]
    for attack in compared["attacks"]:
        lines += [f"## {attack}: at the same round", "", *_table(round_rows(compared, attack))]
        at_gaps = gap_rows(compared, attack)
        if len(at_gaps) > 1:
            lines += [f"## {attack}: at the same train-test gap", "", *_table(at_gaps)]
    for name, audit in results["audits"].items():
        lines += [f"## Run {name}", "", audit_note(audit), "", *_table(attack_rows(audit))]
        lines += ["AUC along the training:", "", *_table(training_rows(audit))]
        pairs = pair_rows(audit, SHOWN_IN_FULL)
        lines += [
            f"<details><summary>All {len(pairs) - 1} pairs: {SHOWN_IN_FULL} (those of the other "
            "attacks are in privacy.json)</summary>",
            "",
            *_table(pairs),
            "</details>",
            "",
        ]
    settings = ", ".join(f"{name} = {value}" for name, value in results["settings"].items())
    return "\n".join([*lines, f"Settings: {settings}.", ""])


if __name__ == "__main__":
    sys.exit(run(__doc__, "privacy", collect, page))
