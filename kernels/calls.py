"""Calls of a kind that was checked and decided before.

A convolution is called again and again with tensors of the same kind. To check them and to choose
an implementation takes longer than a small convolution itself, and what it depends on fits into
one key: that of a call which went through all of it is kept here.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekit.kernels import dispatch

_MOST = 1024


@dataclass(frozen=True, slots=True)
class Known:
    """What calls of one kind do."""

    run: Callable[..., Any]
    shape: Any
    """The implementation's `Shape`."""
    record: dispatch.Kind
    """What `dispatch.count` takes."""


_known: dict[Hashable, dict[float | None, Known]] = {}


def kind_of(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
) -> Hashable | None:
    """Key of all that checks and the choice look at, the mask's values aside.

    Parameters
    ----------
    x, weight, mask, bias
        As the caller passed them, whatever they are.
    settings : tuple
        The other arguments, with the op's name.

    Returns
    -------
    hashable or None
        None for what has to be looked at in full: anything but plain tensors on the CPU, and
        calls that torch records or transforms.
    """
    if not (
        type(x) is Tensor
        and type(mask) is Tensor
        and type(weight) in _WEIGHTS
        and (bias is None or type(bias) in _WEIGHTS)
        and x.is_cpu
        and weight.is_cpu
        and mask.is_cpu
        and (bias is None or bias.is_cpu)
    ):
        return None
    if not all(map(_is_told_apart, settings)):
        return None
    if torch.is_autocast_enabled("cpu") or not dispatch.holds_values(x):
        return None
    if weight.is_neg() or (bias is not None and bias.is_neg()):
        return None
    return (
        settings, x.shape, weight.shape, mask.shape, x.dtype, weight.dtype, mask.dtype,
        None if bias is None else (bias.shape, bias.dtype, bias.requires_grad),
        x.requires_grad, weight.requires_grad, torch.is_grad_enabled(), torch.get_num_threads(),
        bool(torch.backends.mkldnn.enabled),
    )  # fmt: skip


_WEIGHTS = (Tensor, Parameter)
_THREE = (int, int, int)


def _is_told_apart(setting: Any) -> bool:
    """Whether no setting of another type equals this one, as 1.0 and True equal 1."""
    kind = type(setting)
    return kind is int or kind is str or (kind is tuple and tuple(map(type, setting)) == _THREE)


def find(kind: Hashable | None, density: Callable[[], float | None]) -> Known | None:
    """What an earlier call of this kind, with a mask of this density, did.

    The density is asked for only if there was a call of this kind, with another mask or this one.
    """
    try:
        of_kind = _known.get(kind)
    except TypeError:
        # A list of strides, for one.
        return None
    return None if of_kind is None else of_kind.get(density())


def keep(kind: Hashable | None, density: float | None, known: Known) -> None:
    """Let the next calls of this kind do the same."""
    try:
        of_kind = None if kind is None else _known.setdefault(kind, {})
    except TypeError:
        return
    if of_kind is not None:
        of_kind[density] = known
    for kept in (_known, of_kind):
        if kept is not None and len(kept) > _MOST:
            kept.clear()


def forget() -> None:
    """Check and choose anew."""
    _known.clear()
