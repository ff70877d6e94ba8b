from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsekit.errors import RunError
from sparsekit.fed.attack_features import (
    GROUPS,
    Features,
    feature_file,
    features_of,
    load_features,
    save_features,
    stack_rounds,
)
from sparsekit.fed.config import RunConfig
from sparsekit.fed.membership import Asked
from sparsekit.fed.plan import TASK_EVALUATE, TrainPlan, build_model, plan_for

SHAPE = (16, 18, 16)
CPU = torch.device("cpu")


class Noise:
    def __init__(self, people: int) -> None:
        self.participants = tuple(f"p{k}" for k in range(people))
        self.ages = np.linspace(50, 80, people, dtype=np.float32)
        self._volumes = np.random.default_rng(2).standard_normal((people, *SHAPE), np.float32)

    def __len__(self) -> int:
        return len(self.participants)

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        return np.asarray(self._volumes[index])


def plan() -> TrainPlan:
    return plan_for(
        RunConfig(cohort="unused", width=0.1, dropout=0.5),
        round_number=3,
        task=TASK_EVALUATE,
        first_voxel=(0, 0, 0),
        in_shape=SHAPE,
        mean_age=62.0,
        masked=False,
        local_sparsity=None,
    )


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: p.detach().clone() for name, p in build_model(plan()).named_parameters()}
    # As after pruning.
    found["blocks.1.conv.weight"][:, ::2] = 0.0
    return found


def asked() -> Asked:
    rows = np.array([3, 0, 2])
    return Asked("s", Noise(5), rows, np.array([True, False, False]), np.zeros(3, np.int64))


def test_they_are_those_of_plain_autograd() -> None:
    found = features_of(weights(), plan(), asked(), device=CPU)
    assert set(found) == set(GROUPS)
    model = build_model(plan()).double().eval()
    model.load_state_dict({name: w.double() for name, w in weights().items()})
    for place, row in enumerate(asked().rows):
        scan = torch.from_numpy(asked().scans.volume(int(row))).double()[None, None]
        age = float(asked().scans.ages[row])
        model.zero_grad()
        predicted = model(scan)
        (predicted - age).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == found["gradient-magnitudes"].shape[1]
        np.testing.assert_allclose(
            found["prediction"][place], [float(predicted.detach()), age], rtol=1e-4
        )
        norms = [float(g.norm()) for g in gradients.values()]
        seen = found["gradient-magnitudes"][place]
        here = np.array(norms) > 1e-4
        assert here.sum() > 4
        np.testing.assert_allclose(seen[here], np.log(np.array(norms)[here]), rtol=1e-3, atol=1e-3)
        for group, layer in (("output-gradient", "out"), ("neck-gradient", "neck")):
            parts = [gradients[f"{layer}.weight"].flatten(), gradients[f"{layer}.bias"]]
            whole = torch.cat(parts).numpy()
            np.testing.assert_allclose(
                found[group][place], whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max()
            )


def test_pruned_weights_have_gradients_too() -> None:
    # A mask would hide them; an attacker who holds the model computes what it likes.
    one = weights()
    one["neck.weight"][:, 0] = 0.0
    found = features_of(one, plan(), asked(), device=CPU)
    inputs = one["neck.weight"].shape[1]
    outputs = one["neck.weight"].shape[0]
    gradient = found["neck-gradient"][:, : outputs * inputs].reshape(3, outputs, inputs)
    assert np.abs(gradient[:, :, 0]).max() > 0


def test_a_diverged_model_is_named() -> None:
    broken = weights()
    broken["out.bias"][0] = float("inf")
    with pytest.raises(RunError, match=r"after round 3 .* people of s; the training diverged"):
        features_of(broken, plan(), asked(), device=CPU)


def small() -> Features:
    return {group: np.full((3, 2), k, np.float32) for k, group in enumerate(GROUPS)}


def test_files_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.npz"
    assert load_features(path, 3) is None
    save_features(path, small())
    back = load_features(path, 3)
    assert back is not None
    assert all(np.array_equal(back[group], small()[group]) for group in GROUPS)
    assert load_features(path, 4) is None
    data = path.read_bytes()
    for spoilt in (b"", data[:100], data[: len(data) // 2], b"PK" + bytes(50)):
        path.write_bytes(spoilt)
        assert load_features(path, 3) is None


def test_names_follow_model_people_and_scans(tmp_path: Path) -> None:
    base = feature_file(tmp_path, "m", asked(), "c")
    other = Asked("s", Noise(5), np.array([3, 0, 1]), asked().member, asked().stratum)
    turned = Asked("s", Noise(5), asked().rows, ~asked().member, asked().stratum)
    names = {
        base,
        feature_file(tmp_path, "n", asked(), "c"),
        feature_file(tmp_path, "m", asked(), "d"),
        feature_file(tmp_path, "m", other, "c"),
        feature_file(tmp_path, "m", turned, "c"),
    }
    assert len(names) == 5
    assert feature_file(tmp_path, "m", asked(), "c") == base


def test_rounds_stand_in_the_middle() -> None:
    two = small()
    two["prediction"] = two["prediction"] + 7
    stacked = stack_rounds([small(), two], ["prediction"])
    assert set(stacked) == {"prediction"}
    assert stacked["prediction"].shape == (3, 2, 2)
    assert (stacked["prediction"][:, 1] == 7).all()
