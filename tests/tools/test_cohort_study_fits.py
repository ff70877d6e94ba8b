"""The study's simple regressors and its intervals."""

import numpy as np
import pytest

from tools.cohort_study import simple
from tools.cohort_study.paired import difference, mean_interval
from tools.cohort_study.simple import (
    PENALTIES,
    boosted_trees,
    one_hot,
    polynomial_terms,
    quadratic_fit,
    ridge,
)


def data(n: int, p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, p))
    return x, 60 + x @ random.normal(size=p) + random.normal(0, 1.0, n)


def test_ridge_takes_the_penalty_of_the_least_leave_one_out_error() -> None:
    x, y = data(25, 4)
    _, detail = ridge(x, y, x)
    centre, spread = x.mean(axis=0), x.std(axis=0)
    z = (x - centre) / np.maximum(spread, 0.5 * np.median(spread))
    unit = (z**2).sum() / len(z)

    def left_out(penalty: float) -> float:
        errors = []
        for out in range(len(y)):
            kept = np.arange(len(y)) != out
            # The intercept is not penalised; centred columns of the whole set, as there.
            a = np.column_stack([np.ones(kept.sum()), z[kept]])
            damping = np.diag([0.0, *[penalty * unit] * z.shape[1]])
            beta = np.linalg.solve(a.T @ a + damping, a.T @ y[kept])
            errors.append(abs(np.concatenate([[1], z[out]]) @ beta - y[out]))
        return float(np.mean(errors))

    best = PENALTIES[int(np.argmin([left_out(float(penalty)) for penalty in PENALTIES]))]
    assert detail == f"penalty {best:.3g}"


def test_ridge_is_the_same_with_few_and_with_many_columns() -> None:
    x, y = data(30, 12)
    x_test = data(9, 12, seed=1)[0]
    few, detail = ridge(x, y, x_test)
    # Every column three times: the same fit, but wider than long.
    many, wide_detail = ridge(np.hstack([x] * 3), y, np.hstack([x_test] * 3))
    assert wide_detail == detail
    np.testing.assert_allclose(many, few, rtol=1e-6)


def test_ridge_leaves_out_columns_that_do_not_vary() -> None:
    x, y = data(30, 3)
    with_constant, _ = ridge(np.column_stack([x, np.full(30, 7.0)]), y, np.column_stack([x, y]))
    np.testing.assert_allclose(with_constant, ridge(x, y, x)[0], rtol=1e-9)


def test_quadratic_terms_are_all_products_of_two() -> None:
    terms = polynomial_terms(np.array([[2.0, 3.0]]))
    assert terms.tolist() == [[2.0, 3.0, 4.0, 6.0, 9.0]]


def test_quadratic_fit_finds_curves_and_each_groups_own_line() -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=(400, 2))
    labels = random.integers(3, size=400)
    groups = one_hot(labels)
    assert groups.shape == (400, 2)
    y = 60 + 2 * x[:, 0] * x[:, 1] - x[:, 0] ** 2 + 4 * (labels == 2) + 3 * (labels == 1) * x[:, 1]
    half = slice(None, 200), slice(200, None)
    predicted, _ = quadratic_fit(
        x[half[0]], groups[half[0]], y[half[0]], x[half[1]], groups[half[1]]
    )
    assert np.abs(predicted - y[half[1]]).mean() < 0.05
    blind, _ = quadratic_fit(
        x[half[0]], groups[half[0], :0], y[half[0]], x[half[1]], groups[half[1], :0]
    )
    assert np.abs(blind - y[half[1]]).mean() > 1


def test_boosted_trees_find_steps_that_no_parabola_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple, "_TREES", simple._TREES[:2])
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (300, 2))
    y = np.where(np.floor(4 * x[:, 0]) % 2 == 0, 50.0, 70.0)
    trees, detail = boosted_trees(x[:200], y[:200], x[200:])
    assert "trees" in detail
    nobody = np.empty((300, 0))
    smooth, _ = quadratic_fit(x[:200], nobody[:200], y[:200], x[200:], nobody[200:])
    assert np.abs(trees - y[200:]).mean() < 0.5 * np.abs(smooth - y[200:]).mean()


def test_a_difference_is_paired_by_person() -> None:
    random = np.random.default_rng(0)
    ours = [random.gamma(2, 2, 300) for _ in range(3)]
    theirs = [errors + 0.5 + random.normal(0, 0.1, 300) for errors in ours]
    gap = difference(ours, theirs)
    assert gap.mean == pytest.approx(0.5, abs=0.02)
    assert 0.45 < gap.low < gap.mean < gap.high < 0.55


def test_an_interval_covers_seeds_that_disagree() -> None:
    same = [np.full(200, 0.5) + np.random.default_rng(s).normal(0, 1, 200) for s in range(3)]
    apart = [values + shift for values, shift in zip(same, (-0.6, 0.0, 0.6), strict=True)]
    narrow, wide = mean_interval(same), mean_interval(apart)
    assert narrow.mean == pytest.approx(wide.mean)
    assert narrow.high - narrow.low < 0.5 < wide.high - wide.low


def test_intervals_have_the_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    interval = mean_interval([values])
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(1 / 20, rel=0.1)
