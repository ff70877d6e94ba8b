"""Comparisons of audits that are written by hand, so that the answers are known."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from sparsekit.errors import RunError, UsageError
from sparsekit.fed.privacy_compare import at_level, compare_audits, verdict
from sparsekit.fed.privacy_tables import comparison_note, conclusion, gap_rows, round_rows

DRAWS = 200


def write_audit(
    run: Path,
    sparsity: float,
    gaps: Sequence[float],
    aucs: Sequence[float],
    *,
    spread: float = 0.01,
    rounds: Sequence[int] = (5, 10, 15),
    people: str = "p",
    attacks: Sequence[str] = ("error",),
    ensemble: int = 5,
    **config: object,
) -> Path:
    """Write an audit whose draws lie evenly around its values."""
    run.mkdir(parents=True)
    moves = np.linspace(-1, 1, DRAWS)
    draws = {"gap": np.array(gaps)[:, None] + 0 * moves}
    moments = []
    for number, gap, auc in zip(rounds, gaps, aucs, strict=True):
        cell = {m: [auc, auc - spread, auc + spread] for m in ("auc", "accuracy")}
        moments.append(
            {
                "round": number,
                "sparsity": sparsity / 2,
                "gap": [gap, gap - 0.1, gap + 0.1],
                "attacks": dict.fromkeys(attacks, cell),
            }
        )
    for attack in attacks:
        for measure in ("auc", "accuracy"):
            draws[f"{attack}/{measure}"] = np.array(aucs)[:, None] + spread * moves
    stream = io.BytesIO()
    np.savez(stream, **draws)  # type: ignore[arg-type]
    (run / "privacy").mkdir()
    (run / "privacy" / "draws.npz").write_bytes(stream.getvalue())
    audit = {
        "layout": 1,
        "draws": xxhash.xxh3_128_hexdigest(stream.getvalue()),
        "config": {"seed": 0, "sparsity": sparsity, "rounds": 15} | config,
        "sparsity": sparsity,
        "synthetic": True,
        "ensemble": ensemble,
        "attacks": list(attacks),
        "sites": {"a": {"members": 5, "non_members": 5, "people": people}},
        "left_out": {},
        "moments": moments,
    }
    (run / "privacy.json").write_text(json.dumps(audit))
    return run


def test_less_at_the_same_round_only_because_less_was_learned(tmp_path: Path) -> None:
    # Both leak 0.5 + gap / 10; the sparse one merely gets to a smaller gap.
    dense = write_audit(tmp_path / "dense", 0.0, [0, 2, 4], [0.5, 0.7, 0.9])
    sparse = write_audit(tmp_path / "sparse", 0.9, [0, 1, 2], [0.5, 0.6, 0.7])
    found = compare_audits([sparse, dense])
    rows = found["attacks"]["error"]["same_round"]
    assert [row["round"] for row in rows] == [5, 10, 15]
    assert [cell["sparsity"] for cell in rows[2]["sparsities"]] == [0.0, 0.9]
    last = rows[2]["sparsities"][1]
    assert last["auc_minus_first"][0] == pytest.approx(-0.2)
    assert last["gap_minus_first"][0] == pytest.approx(-2)
    assert last["verdict"] == "leaked less"
    gaps = found["attacks"]["error"]["same_gap"]
    assert [row["gap"] for row in gaps] == [0.5, 1.0, 1.5]
    for row in gaps:
        for cell in row["sparsities"]:
            assert cell["auc"][0] == pytest.approx(0.5 + row["gap"] / 10)
        assert row["sparsities"][1]["verdict"] == "cannot tell"
    at_round, at_gap = conclusion(found, "error")
    assert at_round == "Sparsity 0.9 at round 15: attacked less successfully than the least sparse."
    assert at_gap.startswith("Sparsity 0.9 at the same gap: the data cannot tell;")


def test_less_at_the_same_gap(tmp_path: Path) -> None:
    dense = write_audit(tmp_path / "dense", 0.0, [0, 2, 4], [0.5, 0.7, 0.9])
    sparse = write_audit(tmp_path / "sparse", 0.9, [0, 2, 4], [0.4, 0.6, 0.8])
    found = compare_audits([dense, sparse])
    words = [r["sparsities"][1]["verdict"] for r in found["attacks"]["error"]["same_gap"]]
    assert words == ["leaked less"] * 3
    assert "attacked less successfully" in conclusion(found, "error")[1]


def test_differences_are_paired(tmp_path: Path) -> None:
    # Each interval is 0.2 wide, but in every draw the sparse one is lower by 0.01.
    dense = write_audit(tmp_path / "dense", 0.0, [0, 2, 4], [0.5, 0.7, 0.8], spread=0.1)
    sparse = write_audit(tmp_path / "sparse", 0.9, [0, 2, 4], [0.49, 0.69, 0.79], spread=0.1)
    cell = compare_audits([dense, sparse])["attacks"]["error"]["same_round"][2]["sparsities"][1]
    assert cell["auc_minus_first"] == pytest.approx([-0.01] * 3)
    assert cell["auc"] == pytest.approx([0.79, 0.79 - 0.095, 0.79 + 0.095])


def test_seeds_of_one_sparsity_are_averaged(tmp_path: Path) -> None:
    runs = [
        write_audit(tmp_path / f"{sparsity}-{seed}", sparsity, [0, 1, 2], aucs, people=f"p{seed}")
        for sparsity, seed, aucs in (
            (0.0, 0, [0.5, 0.6, 0.7]),
            (0.0, 1, [0.5, 0.6, 0.8]),
            (0.9, 0, [0.5, 0.5, 0.6]),
            (0.9, 1, [0.5, 0.6, 0.8]),
        )
    ]
    found = compare_audits(runs)
    assert found["same_people"]
    first, second = found["attacks"]["error"]["same_round"][2]["sparsities"]
    assert first["runs"] == second["runs"] == 2
    assert first["auc_by_run"] == [0.7, 0.8]
    assert second["auc_minus_first"][0] == pytest.approx(-0.05)
    assert "2 at 0, 2 at 0.9" in comparison_note(found)
    assert "few runs cannot show it" in comparison_note(found)


def test_without_a_common_gap_that_is_said(tmp_path: Path) -> None:
    dense = write_audit(tmp_path / "dense", 0.0, [3, 4, 5], [0.5, 0.7, 0.9])
    sparse = write_audit(tmp_path / "sparse", 0.9, [0, 1, 2], [0.4, 0.6, 0.8])
    found = compare_audits([dense, sparse])
    assert found["attacks"]["error"]["same_gap"] == []
    assert len(gap_rows(found, "error")) == 1
    assert "No gap is common" in conclusion(found, "error")[-1]


def test_what_the_runs_do_not_share_is_said(tmp_path: Path) -> None:
    dense = write_audit(tmp_path / "dense", 0.0, [0, 1, 2], [0.5, 0.6, 0.7], lr=1e-3)
    sparse = write_audit(
        tmp_path / "sparse", 0.9, [0, 1, 2], [0.5, 0.6, 0.7], lr=2e-3, people="others", seed=1
    )
    found = compare_audits([dense, sparse])
    assert found["differing"] == ["lr"]
    assert not found["same_people"]
    assert "not paired" in comparison_note(found)
    assert "also differ in: lr" in comparison_note(found)


def test_tables_have_a_line_for_each_sparsity(tmp_path: Path) -> None:
    dense = write_audit(tmp_path / "dense", 0.0, [0, 1, 2], [0.5, 0.6, 0.7])
    sparse = write_audit(tmp_path / "sparse", 0.95, [0, 1, 2], [0.5, 0.6, 0.7])
    found = compare_audits([dense, sparse])
    for rows in (round_rows(found, "error"), gap_rows(found, "error")):
        assert len(rows) == 1 + 3 * 2
        assert {len(row) for row in rows} == {len(rows[0])}
        assert [row[1] for row in rows[1:]] == ["0", "0.95"] * 3


def test_levels_are_passed_for_the_first_time() -> None:
    gaps = np.array([[0.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    values = np.array([[0.0, 0.0], [10.0, 10.0], [30.0, 30.0]])
    assert at_level(gaps, values, 1.5).tolist() == [7.5, 20.0]
    assert np.isnan(at_level(gaps, values, 5.0)).all()
    assert np.isnan(at_level(gaps[:1], values[:1], 0.0)).all()


def test_verdicts() -> None:
    assert verdict([-0.1, -0.2, -0.01]) == "leaked less"
    assert verdict([0.1, 0.01, 0.2]) == "leaked more"
    assert verdict([-0.1, -0.2, 0.01]) == "cannot tell"
    assert verdict(None).startswith("cannot tell")


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    three = [0, 1, 2], [0.5, 0.6, 0.7]
    one = write_audit(tmp_path / "one", 0.9, *three)
    same = write_audit(tmp_path / "same", 0.9, *three)
    with pytest.raises(UsageError, match=r"all runs have sparsity 0\.9"):
        compare_audits([one, same])
    other = write_audit(tmp_path / "other", 0.0, *three, ensemble=3)
    with pytest.raises(UsageError, match="--ensemble 3, 5 cannot be compared"):
        compare_audits([one, other])
    blind = write_audit(tmp_path / "blind", 0.0, *three, attacks=["all"])
    with pytest.raises(UsageError, match="attack: expected some of none"):
        compare_audits([one, blind])
    late = write_audit(tmp_path / "late", 0.0, *three, rounds=[6, 7, 8])
    with pytest.raises(RunError, match="no common round"):
        compare_audits([one, late])
    fine = write_audit(tmp_path / "fine", 0.0, *three)
    with pytest.raises(UsageError, match=r"attack: expected some of error, .* got all"):
        compare_audits([one, fine], ["all"])
    with pytest.raises(RunError, match="has not been audited"):
        compare_audits([one, tmp_path])
