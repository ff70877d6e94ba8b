"""Both sides must compute the same before they are timed."""

import torch
from torch import Tensor

from sparsekit.errors import DisagreementError


def check_close(
    name: str, got: Tensor | None, want: Tensor | None, limit: float, flips: float = 0.0
) -> float:
    """Compare two tensors and return their largest difference over the largest value.

    Parameters
    ----------
    name : str
        For the error's text.
    got, want : Tensor
        Ours and theirs.
    limit : float
        Most difference, over the largest value of `want`.
    flips : float
        Share of the entries that may differ by more: where two voxels of a pooling window are equal
        but for rounding, one side's gradient goes to the one and the other side's to the other.

    Raises
    ------
    DisagreementError
        They differ by more.
    """
    assert got is not None
    assert want is not None
    difference = (got.detach().double() - want.detach().double()).abs()
    largest = float(want.detach().abs().max())
    error = float(difference.max()) / (largest or 1.0)
    share = float((~(difference <= limit * largest)).double().mean())
    if not share <= flips:
        raise DisagreementError(
            f"{name}: {share:.2e} of the entries differ by more than {limit:g} of the largest "
            f"value, the worst by {error:.2e}; expected at most {flips:g} of them"
        )
    return error


def check_near(name: str, got: Tensor, want: Tensor, limit: float) -> float:
    """Compare two tensors by the length of their difference over that of `want`; return it.

    For gradients of a whole network, where single entries move with every flip.

    Raises
    ------
    DisagreementError
        The difference is longer than `limit`.
    """
    difference = (got.detach().double() - want.detach().double()).norm()
    error = float(difference / want.detach().double().norm().clamp_min(1e-300))
    if not error <= limit:
        raise DisagreementError(
            f"{name}: expected a difference of at most {limit:g} of the length, got {error:.2e}"
        )
    return error


def check_zero_outside(name: str, gradient: Tensor | None, mask: Tensor) -> None:
    """Check that pruned weights have no gradient.

    Raises
    ------
    DisagreementError
        One of them has.
    """
    assert gradient is not None
    if bool(torch.any(gradient[~mask] != 0)):
        raise DisagreementError(f"{name}: expected gradient 0 where pruned")
