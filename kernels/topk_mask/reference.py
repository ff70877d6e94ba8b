"""Exact selection of the largest magnitudes with NumPy: the oracle for every other backend."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError

_INFINITY_BITS = 0x7F800000
_MAGNITUDE_BITS = 0x7FFFFFFF
_EXCLUDED = -1


def magnitude_keys(tensor: Tensor) -> npt.NDArray[np.int32]:
    """Bit patterns of ``|w|`` as float32: non-negative integers in the order of the magnitudes.

    Both zeros have key 0. NaN has a key above that of infinity.
    """
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    keys = values.reshape(-1).view(torch.int32) & _MAGNITUDE_BITS
    bits: npt.NDArray[np.int32] = keys.numpy()
    return bits


def topk_mask(
    tensors: Sequence[Tensor], names: Sequence[str], keep: int, within: Sequence[Tensor] | None
) -> list[Tensor]:
    """Masks of the `keep` largest magnitudes; arguments are those that `sparsekit.ops` checked."""
    sizes = [t.numel() for t in tensors]
    ends = np.cumsum([0, *sizes])
    keys = np.empty(int(ends[-1]), np.int32)
    for i, (tensor, name) in enumerate(zip(tensors, names, strict=True)):
        part = keys[ends[i] : ends[i + 1]]
        part[:] = magnitude_keys(tensor)
        if part.size and part.max() > _INFINITY_BITS:
            raise ArgumentError(
                f"tensors: {name} holds NaN, which has no magnitude; "
                "find the step that made it before pruning"
            )
        if within is not None:
            part[~within[i].detach().cpu().reshape(-1).numpy()] = _EXCLUDED

    chosen = np.zeros(keys.size, np.bool_)
    if keep > 0:
        rank = keys.size - keep
        threshold = np.partition(keys, rank)[rank]
        np.greater(keys, threshold, out=chosen)
        ties = np.flatnonzero(keys == threshold)
        # Flat order over all tensors is the order in which ties win.
        chosen[ties[: keep - int(np.count_nonzero(chosen))]] = True
    return [
        torch.from_numpy(chosen[ends[i] : ends[i + 1]].reshape(tensor.shape).copy()).to(
            tensor.device
        )
        for i, tensor in enumerate(tensors)
    ]
