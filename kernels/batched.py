"""Backward passes of kernels that read memory, where `torch.vmap` batches the gradients.

A tensor that stands for a batch has no memory of its own. An operator of torch that has no rule for
batches is run by `torch.vmap` once for each of its entries: such an operator stands between.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  (not in its stubs)

Found = tuple[Tensor | None, ...]
_MOST = 3

_numbers = itertools.count()
_passes: dict[int, Callable[[Tensor], Found]] = {}


@torch.library.custom_op("sparsekit::backward_of_one", mutates_args=())
def _backward_of_one(grad: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    found = _passes[number](grad)
    first, second, third = (
        # What an operator returns must not be memory of another tensor.
        grad.new_empty(0) if i >= len(found) or (one := found[i]) is None else one.clone()
        for i in range(_MOST)
    )
    return first, second, third


@_backward_of_one.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, number: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    # What `torch.func.vmap` would do itself, with a warning that it is slow.
    del info
    dim = in_dims[0]
    assert dim is not None
    runs = [torch.ops.sparsekit.backward_of_one(one, number) for one in grad.unbind(dim)]
    first, second, third = (torch.stack(of) for of in zip(*runs, strict=True))
    return (first, second, third), (0, 0, 0)


def stands_for_others(x: Tensor) -> bool:
    """Whether this is a batch of `torch.vmap` or the like, and has no memory of its own."""
    # The first is what `torch.autograd.grad` makes with `is_grads_batched`.
    return _functorch.is_legacy_batchedtensor(x) or _functorch.is_functorch_wrapped_tensor(x)


def for_each(backward: Callable[[Tensor], Found], grad: Tensor, needs: tuple[bool, ...]) -> Found:
    """Run a backward pass on a gradient, or on each one of a batch.

    Parameters
    ----------
    backward : callable
        Takes a plain tensor; returns at most 3 gradients, some of them None.
    grad : Tensor
        What autograd handed on.
    needs : tuple of bool
        Which of the gradients are wanted: the others are None.
    """
    if not stands_for_others(grad):
        found = backward(grad)
    else:
        number = next(_numbers)
        _passes[number] = backward
        try:
            found = torch.ops.sparsekit.backward_of_one(grad, number)
        finally:
            del _passes[number]
    return tuple(one if need else None for one, need in zip(found, needs, strict=False))
