import math

import pytest
import torch
from torch import nn

from sparsekit.errors import ArgumentError
from sparsekit.models import BrainAgeCNN


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


SMALL = (16, 17, 18)


def convolutions(model: BrainAgeCNN) -> list[nn.Conv3d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv3d)]


def test_default_is_the_network_of_the_paper() -> None:
    model = BrainAgeCNN()
    assert sum(p.numel() for p in model.parameters()) == 2_948_801
    sizes = [sum(p.numel() for p in c.parameters()) for c in convolutions(model)]
    assert sizes[:5] == [896, 55_360, 221_312, 884_992, 1_769_728]
    assert sum(sizes[5:]) == 16_513
    assert not list(model.buffers())
    assert isinstance(model.neck_norm, nn.InstanceNorm3d)


def test_narrow_network_for_4_mm_scans() -> None:
    model = BrainAgeCNN((46, 55, 46), width=0.25)
    assert [c.out_channels for c in convolutions(model)] == [8, 16, 32, 64, 16, 1]
    assert sum(p.numel() for p in model.parameters()) == 73_969
    assert isinstance(model.neck_norm, nn.Identity)


@pytest.mark.parametrize(
    ("in_shape", "blocks"),
    [((4, 4, 4), 1), ((7, 9, 8), 1), ((8, 9, 8), 2), ((46, 55, 46), 4), ((64, 64, 64), 5)],
)
def test_number_of_blocks_leaves_a_map_of_two(in_shape: tuple[int, int, int], blocks: int) -> None:
    assert len(BrainAgeCNN(in_shape, width=0.05).blocks) == blocks


def test_forward_is_the_stated_sequence_of_layers() -> None:
    model = BrainAgeCNN(SMALL, width=0.1, blocks=3, last_norm=True, age_scale=7.0)
    x = torch.randn(2, 1, *SMALL, generator=torch.Generator().manual_seed(1))
    y = x
    for conv in convolutions(model)[:3]:
        y = nn.functional.conv3d(y, conv.weight, conv.bias, padding=1)
        y = (y - y.mean((2, 3, 4), keepdim=True)) / (
            y.var((2, 3, 4), keepdim=True, correction=0) + 1e-5
        ).sqrt()
        y = nn.functional.max_pool3d(y, 2).clamp(min=0)
    y = nn.functional.conv3d(y, model.neck.weight, model.neck.bias)
    y = (y - y.mean((2, 3, 4), keepdim=True)) / (
        y.var((2, 3, 4), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    y = y.clamp(min=0).mean((2, 3, 4))
    expected = 7.0 * (y @ model.out.weight.flatten()) + 62.68
    assert model(x).shape == (2,)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-4)


def test_weights_start_glorot_uniform_and_biases_zero() -> None:
    model = BrainAgeCNN((46, 55, 46), mean_age=50.0, generator=torch.Generator().manual_seed(2))
    for conv in convolutions(model):
        taps = math.prod(conv.kernel_size)
        limit = math.sqrt(6 / (taps * (conv.in_channels + conv.out_channels)))
        largest = float(conv.weight.detach().abs().max())
        assert largest <= limit
        if conv.weight.numel() > 500:
            assert largest > 0.95 * limit
        assert conv.bias is not None
        assert conv.bias.unique().tolist() == [50.0 if conv is model.out else 0.0]


def test_same_generator_gives_the_same_weights() -> None:
    first, second = (
        BrainAgeCNN(SMALL, width=0.1, generator=torch.Generator().manual_seed(5)) for _ in "ab"
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_normalises_as_training_does() -> None:
    model = BrainAgeCNN(SMALL, width=0.1)
    x = torch.randn(2, 1, *SMALL, generator=torch.Generator().manual_seed(1))
    trained = model.train()(x)
    assert torch.equal(model.eval()(x), trained)


def test_age_scale_leaves_the_bias_in_years() -> None:
    plain, scaled = (BrainAgeCNN(SMALL, width=0.1, age_scale=s) for s in (1.0, 10.0))
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, *SMALL, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scaled(x) - 62.68, 10 * (plain(x) - 62.68), rtol=1e-4, atol=1e-4)


def test_dropout_draws_from_the_given_generator() -> None:
    model = BrainAgeCNN(SMALL, width=0.5, dropout=0.5)
    x = torch.randn(2, 1, *SMALL, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    first, again = (model(x, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    other = model(x, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(9)
    first = model(x)
    torch.manual_seed(9)
    assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x, generator=torch.Generator().manual_seed(3)))


def test_dropout_keeps_the_mean() -> None:
    model = BrainAgeCNN((4, 4, 4), width=1.0, dropout=0.25)
    scan = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    x = scan.expand(4000, 1, 4, 4, 4)
    dropped = model(x, generator=torch.Generator().manual_seed(6)).detach()
    exact = model.eval()(scan).detach()
    # Standard error of the mean is about 1/63 of the spread.
    assert abs(float(dropped.mean() - exact)) < 4 * float(dropped.std()) / 63


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_shape": (3, 40, 40)}, r"in_shape: expected at least 4 voxels .* got \(3, 40, 40\)"),
        ({"in_shape": (46, 55)}, "in_shape: expected 3 sizes"),
        ({"in_shape": (16, 16, 16), "blocks": 5}, "5 blocks need at least 32 voxels"),
        ({"in_shape": (8, 8, 8), "blocks": 3, "last_norm": True}, "has one voxel"),
        ({"blocks": 6}, "blocks: expected 1 to 5, got 6"),
        ({"blocks": 0}, "blocks: expected 1 to 5, got 0"),
        ({"width": 0.0}, "width: expected a number > 0"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\)"),
        ({"age_scale": -1.0}, "age_scale: expected"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        BrainAgeCNN(**arguments)  # type: ignore[arg-type]


def test_scans_of_another_grid_are_refused() -> None:
    model = BrainAgeCNN(SMALL, width=0.1)
    with pytest.raises(ArgumentError, match=r"expected shape \(n, 1, 16, 17, 18\), got \(2, 1, 16"):
        model(torch.zeros(2, 1, 16, 17, 17))
