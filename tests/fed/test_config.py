import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import UsageError
from sparsekit.fed.config import (
    PAPER_PRESET,
    RunConfig,
    dump_config,
    load_config_file,
    make_config,
)


def read_back(config: RunConfig, path: Path) -> RunConfig:
    path.write_text(dump_config(config), encoding="utf-8")
    return make_config(load_config_file(path))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    cohort=NAMES,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    sparsity=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
    resolution=st.sampled_from([None, 2, 4]),
    flips=st.booleans(),
)
def test_settings_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, **settings: Any
) -> None:
    config = RunConfig(**settings)
    assert read_back(config, tmp_path_factory.getbasetemp() / "survive.toml") == config


@pytest.mark.parametrize("cohort", ["Köln/1", 'a"b\\c', "tab\there", "\x7f", "🧠", "a\nb"])
def test_awkward_cohort_names_survive_the_file(tmp_path: Path, cohort: str) -> None:
    assert read_back(RunConfig(cohort=cohort), tmp_path / "c.toml").cohort == cohort


def test_a_name_that_is_no_text_is_refused() -> None:
    # What Python makes of the byte 0xff in a file name.
    with pytest.raises(UsageError, match=r"cohort: .* is not UTF-8; rename"):
        RunConfig(cohort="a\udcff")


def test_later_layers_win() -> None:
    config = make_config({"cohort": "a", "rounds": 5, "lr": 0.1}, {"rounds": 7})
    assert (config.rounds, config.lr) == (7, 0.1)
    assert dataclasses.replace(config, rounds=20, lr=1e-3) == RunConfig(cohort="a")


def test_paper_lies_underneath_every_layer() -> None:
    config = make_config({"cohort": "a", "rounds": 5}, {"paper": True})
    assert config.rounds == 5
    for name, value in PAPER_PRESET.items():
        if name != "rounds":
            assert getattr(config, name) == value
    assert make_config({"cohort": "a", "paper": False}) == RunConfig(cohort="a")


def test_paper_settings_survive_the_file(tmp_path: Path) -> None:
    config = make_config({"cohort": "a", "paper": True, "lr": 0.5, "mean_age": 50.0})
    assert read_back(config, tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("strategy", "best", "expected one of centralized, fedavg"),
        ("rounds", 0, r"expected a number in \[1"),
        ("rounds", 10**400, r"expected a number in \[1"),
        ("rounds", 2.0, "expected int, got 2.0"),
        ("rounds", True, "expected int, got True"),
        ("epochs", -1, r"expected a number in \[1"),
        ("seed", -1, r"expected a number in \[0"),
        ("seed", 2**63, r"expected a number in \[0"),
        ("threads", 1025, r"expected a number in \[1, 1024\], got 1025"),
        ("sparsity", 1.0, r"expected a number in \[0.0, 1.0\), got 1.0"),
        ("sparsity", math.nan, "expected a number in"),
        ("lr", 0.0, r"expected a number in \(0.0, infinity\)"),
        ("lr", math.inf, "expected a number in"),
        ("lr", 10**400, "expected a smaller number"),
        ("width", 17.0, "expected a number in"),
        ("mean_age", math.nan, "expected a number in"),
        ("mean_age", "old", "expected float, got 'old'"),
        ("test_fraction", 0.0, "expected a number in"),
        ("resolution", 3, "expected 2 or 4"),
        ("flips", 1, "expected bool, got 1"),
        ("cohort", 3, "expected str, got 3"),
        ("granularity", "vector:0", "expected one of 'weight', 'vector:V'"),
        ("granularity", "2:4", "2:4 prunes half .* expected sparsity = 0.5, schedule"),
        ("speed", 3, "unknown setting; known: .*age_scale"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_wrong_settings_are_named(name: str, value: Any, text: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: {text}"):
        make_config({"cohort": "x", name: value})


def test_whole_numbers_are_fine_as_fractions() -> None:
    config = make_config({"cohort": "x", "lr": 1, "sparsity": 0})
    assert (type(config.lr), config.lr, config.sparse) == (float, 1.0, False)


def test_a_run_too_short_to_prune_is_refused() -> None:
    with pytest.raises(UsageError, match="more than prune_start = 1, got 1"):
        RunConfig(cohort="x", rounds=1)
    assert not RunConfig(cohort="x", rounds=1, strategy="fedavg").sparse


@pytest.mark.parametrize("other", [{"paper": True}, {"strategy": "fedsparsify-local"}])
def test_groups_where_weights_are_chosen_one_by_one_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"granularity: .* chooses weight by weight, got 'filter'"):
        make_config({"cohort": "x", "granularity": "filter"}, other)


def test_two_of_four_is_pruned_once() -> None:
    once = {"cohort": "x", "granularity": "2:4", "sparsity": 0.5, "rounds": 4, "prune_start": 3}
    assert make_config(once).granularity == "2:4"
    later = {"schedule": "one-shot", "prune_start": 1, "initial_sparsity": 0.5}
    assert make_config(once, later).granularity == "2:4"
    dense = make_config({"cohort": "x", "granularity": "2:4", "strategy": "fedavg"})
    assert not dense.sparse


def test_cosine_falls_from_first_to_last_round() -> None:
    config = RunConfig(cohort="x", rounds=5, lr=0.2, lr_final_fraction=0.25)
    rates = [config.learning_rate(number) for number in range(1, 6)]
    # lr * (0.25 + 0.75 * (1 + cos(pi * progress)) / 2) at progress 0, 1/4, 1/2, 3/4, 1.
    root = math.sqrt(0.5)
    fractions = [1.0, 0.25 + 0.375 * (1 + root), 0.625, 0.25 + 0.375 * (1 - root), 0.25]
    assert rates == pytest.approx([0.2 * fraction for fraction in fractions], rel=1e-12)
    constant = dataclasses.replace(config, lr_schedule="constant")
    assert {constant.learning_rate(number) for number in range(1, 6)} == {0.2}


@pytest.mark.parametrize("here", [True, False])
def test_cuda_is_taken_only_where_it_is(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: here)
    if here:
        assert make_config({"cohort": "x", "device": "cuda"}).device == "cuda"
    else:
        with pytest.raises(UsageError, match="choose --device cpu"):
            make_config({"cohort": "x", "device": "cuda"})
