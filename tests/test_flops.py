from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekit import flops
from sparsekit.errors import ArgumentError
from sparsekit.kernels import dispatch
from sparsekit.kernels.masked_conv3d import cost, selector
from sparsekit.models import BrainAgeCNN
from sparsekit.nn import MaskedConv3d, sparsify
from sparsekit.ops import explain
from sparsekit.prune import magnitude_masks


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


class Skip(nn.Module):
    """Uses one layer twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, 3, padding=1)
        self.twice = nn.Conv3d(3, 3, 3, padding=1)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = x + self.twice(self.twice(x).relu())
        return y


def frozen_start() -> nn.Module:
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 3), nn.Conv3d(2, 2, 1))
    model[0].requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "brain-age-2mm": (lambda: BrainAgeCNN(width=0.05), (1, 1, 91, 109, 91)),
    "brain-age-4mm": (lambda: BrainAgeCNN((46, 55, 46), width=0.25), (2, 1, 46, 55, 46)),
    "strided": (lambda: nn.Conv3d(2, 3, (3, 2, 3), stride=(2, 1, 3), padding=1), (2, 2, 7, 8, 9)),
    "dilated": (lambda: nn.Conv3d(2, 3, 3, dilation=(2, 1, 2), padding=2), (2, 2, 7, 8, 9)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, 3, groups=2), nn.Conv3d(6, 6, 3, groups=6)),
        (2, 4, 7, 8, 9),
    ),
    "reflect": (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5, 5)),
    "conv1d-2d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Unflatten(1, (2, 2)), nn.Conv2d(2, 3, 2)),
        (3, 2, 11),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose3d(2, 4, 3, stride=2, output_padding=1),
            nn.ConvTranspose3d(4, 2, 2, groups=2),
        ),
        (2, 2, 4, 5, 3),
    ),
    "transposed-1d-2d": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 4, 3), nn.Unflatten(1, (2, 2)), nn.ConvTranspose2d(2, 3, 2)
        ),
        (3, 2, 11),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False)),
        (3, 7, 6),
    ),
    "batch-norm": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Conv3d(2, 1, 3)),
        (2, 1, 6, 6, 6),
    ),
    "shared": (Skip, (2, 1, 5, 6, 7)),
    "frozen-start": (frozen_start, (1, 1, 7, 7, 7)),
    "empty-batch": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 1, 1)), (0, 1, 5, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_dense_counts_equal_torch(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    report = flops.count(model, shape)
    assert report.forward == report.dense_forward == forward.get_total_flops()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert report.train_step == report.dense_train_step == both
    assert both > 0 or 0 in shape


@pytest.mark.parametrize("name", ["brain-age-4mm", "grouped", "transposed", "linear", "shared"])
def test_pruned_counts_are_density_times_dense_in_each_layer(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    masks = magnitude_masks(model, 0.7)
    report = flops.count(model, shape, masks)
    for layer, row in report.by_layer.items():
        mask = masks[f"{layer}.weight"]
        kept, total = int(mask.sum()), mask.numel()
        assert (row.kept, row.weights, row.density) == (kept, total, kept / total)
        assert row.forward * total == row.dense_forward * kept
        assert row.train_step * total == row.dense_train_step * kept
    assert report.train_step == sum(row.train_step for row in report.by_layer.values())
    assert 0 < report.train_step < report.dense_train_step
    assert report.dense_train_step == flops.count(model, shape, {}).train_step


def test_positions_count_every_use_of_a_weight() -> None:
    report = flops.count(Skip(), (2, 1, 5, 6, 7))
    assert list(report.by_layer) == ["first", "twice"]
    assert report.by_layer["first"].positions == 2 * 5 * 6 * 7
    assert report.by_layer["twice"].positions == 2 * 2 * 5 * 6 * 7
    assert report.by_layer["first"].input_grad == 0
    assert report.by_layer["twice"].input_grad == report.by_layer["twice"].forward


def test_masks_that_the_model_holds_are_taken() -> None:
    model = BrainAgeCNN((16, 16, 16), width=0.1)
    masks = magnitude_masks(model, 0.8)
    expected = flops.count(model, (1, 1, 16, 16, 16), masks)
    sparsify(model, masks)
    held = flops.count(model, (1, 1, 16, 16, 16))
    assert held.train_step == expected.train_step < held.dense_train_step
    assert {row.kind for row in held.by_layer.values()} == {"MaskedConv3d"}


@pytest.fixture
def no_zeros(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels skip every pruned weight, whatever the model says."""
    monkeypatch.setattr(cost, "grouped_pays", lambda *_: False)
    selector.forget()
    yield
    selector.forget()


@pytest.mark.usefixtures("no_zeros")
def test_layers_on_a_dense_path_execute_densely() -> None:
    model = sparsify(BrainAgeCNN((16, 16, 16), width=0.1))
    sparsify(model, magnitude_masks(model, 0.8))
    shape = (1, 1, 16, 16, 16)
    for layer in model.modules():
        if isinstance(layer, MaskedConv3d):
            layer.backend = "reference"
    report = flops.count(model, shape)
    assert {row.path for row in report.by_layer.values()} == {"dense"}
    assert report.executed_forward == report.dense_forward
    assert report.executed_train_step == report.dense_train_step

    only_first = flops.count(model, shape, dense_layers=["blocks.0.conv"])
    first = only_first.by_layer["blocks.0.conv"]
    assert first.path == "dense"
    saved = first.dense_train_step - first.train_step
    assert only_first.executed_train_step == report.train_step + saved
    assert only_first.executed_forward == report.forward + first.dense_forward - first.forward

    for layer in model.modules():
        if isinstance(layer, MaskedConv3d):
            layer.backend = "cpu"
    kernels = flops.count(model, shape)
    assert kernels.executed_forward == report.forward
    assert kernels.executed_train_step == report.train_step


def paths_taken(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Backend of each convolution by its name, from what `explain` lists."""
    dispatch.clear_records()
    model(x)
    by_shape = {c.detail: c.backend for c in explain().calls if c.op != "norm_pool_relu"}
    return {
        name: by_shape[f"{tuple(layer.weight.shape)} float32"]
        for name, layer in model.named_modules()
        if isinstance(layer, MaskedConv3d)
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_executed_operations_follow_what_really_ran(sparsity: float) -> None:
    model = sparsify(BrainAgeCNN((46, 55, 46), width=0.25))
    sparsify(model, magnitude_masks(model, sparsity, scope="layer"))
    shape = (2, 1, 46, 55, 46)
    report = flops.count(model, shape)
    step = paths_taken(model, torch.randn(shape))
    with torch.no_grad():
        forward = paths_taken(model, torch.randn(shape))
    for name, row in report.by_layer.items():
        assert (row.path == "dense") == (step[name] == "dense"), name
        if row.path == "dense":
            assert row.executed_train_step == row.dense_train_step
        elif sparsity >= 0.9:
            assert row.executed_train_step == row.train_step
        if forward[name] == "dense":
            assert row.executed_forward == row.dense_forward
        elif sparsity >= 0.9:
            assert row.executed_forward == row.forward


def test_kernels_that_compute_pruned_weights_count_as_dense_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sparsify(nn.Sequential(nn.Conv3d(8, 16, 3, padding=1)))
    sparsify(model, magnitude_masks(model, 0.1))
    layer = model[0]
    assert isinstance(layer, MaskedConv3d)
    layer.backend = "cpu"
    selector.forget()
    monkeypatch.setattr(cost, "grouped_pays", lambda *_: True)
    row = flops.count(model, (1, 8, 12, 12, 12)).by_layer["0"]
    selector.forget()
    assert row.path == "mixed"
    assert row.executed_forward == row.dense_forward > row.forward
    assert row.executed_train_step == row.train_step + row.dense_forward - row.forward


def test_every_call_of_a_layer_counts_on_its_own_path() -> None:
    model = sparsify(Skip())
    row = flops.count(model, (2, 1, 5, 6, 7), dense_layers=["twice"]).by_layer["twice"]
    assert row.executed_train_step == row.dense_train_step
    assert flops.count(model, (0, 1, 5, 6, 7)).by_layer["twice"].path == "dense"


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Dropout(0.5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    flops.count(model, (4, 1, 5, 5, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_bad_arguments_are_refused() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3))
    with pytest.raises(ArgumentError, match=r"no convolution or linear layer \['9'\]"):
        flops.count(model, (1, 1, 5, 5, 5), dense_layers=["9"])
    with pytest.raises(ArgumentError, match="masks: the model has no parameter 'w'"):
        flops.count(model, (1, 1, 5, 5, 5), {"w": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ArgumentError, match=r"mask of 0\.weight: expected the parameter's shape"):
        flops.count(model, (1, 1, 5, 5, 5), {"0.weight": torch.ones(2, dtype=torch.bool)})
