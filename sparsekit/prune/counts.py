"""How many weights each tensor keeps, where all of them share an exact total."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.ops import check_magnitudes
from sparsekit.types import Masks, State


def erk_counts(tensors: State, keep: int, alive: Mapping[str, int]) -> dict[str, int]:
    """Split `keep` in proportion to the sum of each tensor's sizes, at most `alive` each.

    Density is sum(shape) / prod(shape) up to a factor, so the count is sum(shape) up to it. All
    in integers, so that every machine gets the same split.
    """
    # A 0-d tensor has one entry and an empty sum.
    shares = {name: max(1, sum(t.shape)) if t.numel() else 0 for name, t in tensors.items()}
    counts = dict.fromkeys(tensors, 0)
    open_names = [name for name in tensors if alive[name]]
    left = keep
    while True:
        whole = sum(shares[name] for name in open_names)
        full = [name for name in open_names if left * shares[name] >= alive[name] * whole]
        if not full:
            break
        for name in full:
            counts[name] = alive[name]
            left -= alive[name]
        open_names = [name for name in open_names if name not in full]
    for name in open_names:
        counts[name] = left * shares[name] // whole
    spare = left - sum(counts[name] for name in open_names)
    by_remainder = sorted(open_names, key=lambda name: -(left * shares[name] % whole))
    for name in by_remainder[:spare]:
        counts[name] += 1
    return counts


def check_work(tensors: State, work: Mapping[str, float] | None) -> None:
    """Raise unless each tensor has a positive, finite amount of work per weight.

    Raises
    ------
    ArgumentError
        With what to do.
    """
    if work is None:
        raise ArgumentError(
            "work: missing; scope='flops' needs the operations per weight of each tensor, which "
            "sparsekit.flops.work_per_weight(model, input_shape) counts"
        )
    missing = [name for name in tensors if name not in work]
    if missing:
        raise ArgumentError(
            f"work: expected one entry per tensor, got none for {missing}; layers that are never "
            "called have no work, prune them apart"
        )
    for name in tensors:
        if not 0.0 < work[name] < math.inf:
            raise ArgumentError(f"work: expected positive numbers, got {work[name]} for {name!r}")


def flops_counts(
    tensors: State, keep: int, within: Masks | None, work: Mapping[str, float]
) -> dict[str, int]:
    """Split `keep` so that the last weight of every tensor is worth the same for its work.

    The value of a tensor's weight is its share in the energy (sum of squares) of the weights that
    are at least as large: the score of layer-adaptive pruning (LAMP, Lee et al., arXiv
    2010.07611), which compares tensors of any scale, and is 1 for the largest weight of each, so
    that none is emptied early. It is divided by the square root of the work. Where magnitudes are
    alike the k-th weight scores ``1 / (k * sqrt(work))``: counts go as ``1 / sqrt(work)``, which
    of all splits with the same work has the smallest sum of ``1 / k``.

    Parameters
    ----------
    tensors : mapping of Tensor
    keep : int
        At most as many as `within` keeps.
    within : mapping of bool Tensor, or None
        Only these weights count.
    work : mapping of float
        Operations per weight, positive.

    Returns
    -------
    dict of int
        They add up to `keep`. Sums run one after the other in float64 on the CPU: the same counts
        on every machine. Of equal scores the tensor that comes first wins.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A tensor holds NaN, or magnitudes that backends might order differently.
    """
    scores = {
        name: _values(name, tensor, None if within is None else within[name])
        / math.sqrt(work[name])
        for name, tensor in tensors.items()
    }
    every = np.concatenate([np.zeros(0), *scores.values()])
    if keep <= 0:
        return dict.fromkeys(scores, 0)
    threshold = np.partition(every, len(every) - keep)[len(every) - keep]
    # Each array falls, so that what is above a threshold is its beginning.
    counts = {name: int(np.count_nonzero(s > threshold)) for name, s in scores.items()}
    left = keep - sum(counts.values())
    for name, one in scores.items():
        equal = min(left, int(np.count_nonzero(one == threshold)))
        counts[name] += equal
        left -= equal
    return counts


def _values(name: str, tensor: Tensor, within: Tensor | None) -> npt.NDArray[np.float64]:
    """What each weight adds to the energy of those before it, the largest weight first."""
    check_magnitudes([repr(name)], [tensor])
    kept = tensor.detach() if within is None else tensor.detach()[within.to(tensor.device)]
    squares = kept.abs().float().cpu().reshape(-1).numpy().astype(np.float64) ** 2
    if np.isnan(squares).any():
        raise ArgumentError(
            f"tensors: {name!r} holds NaN, which has no magnitude; "
            "find the step that made it before pruning"
        )
    squares = np.sort(squares)[::-1]
    if len(squares) and np.isinf(squares[0]):
        squares = np.isinf(squares).astype(np.float64)
    energy = np.cumsum(squares)
    return np.divide(squares, energy, out=np.zeros_like(squares), where=energy > 0)
