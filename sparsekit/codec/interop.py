"""States from and for other libraries: SciPy, binsparse, and torch's own pruning.

A sparse array there stores some elements explicitly; here these are the kept ones, zeros among
them, and they are what its mask says. No library but SciPy is imported before it is needed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.codec.records import csr_grid
from sparsekit.errors import ArgumentError, ArgumentTypeError, MissingExtraError
from sparsekit.types import Masks, State

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_ORIGINAL, _MASK = "_orig", "_mask"


def to_scipy(tensor: Tensor, mask: Tensor | None = None) -> "csr_array":
    """Return a tensor as a SciPy CSR array.

    Parameters
    ----------
    tensor : Tensor
        Of any shape and of a dtype that NumPy has; bfloat16 is not one.
    mask : Tensor, bool, optional
        Elements to store, of the tensor's shape; the non-zero ones by default.

    Returns
    -------
    scipy.sparse.csr_array
        Rows are dimension 0, columns all others flattened; a vector or a scalar is one row.

    Raises
    ------
    ArgumentTypeError
        For a dtype that SciPy's arrays cannot hold, and a mask that is not bool.
    ArgumentError
        For a mask of another shape, or a non-zero element outside of it.
    """
    from scipy.sparse import csr_array

    if tensor.dtype in (torch.bfloat16, torch.float16):
        raise ArgumentTypeError(
            f"tensor: SciPy has no sparse arrays of {tensor.dtype}; pass tensor.float()"
        )
    keep = _checked_mask(tensor, mask)
    rows, columns = csr_grid(tensor.shape)
    grid = keep.reshape(rows, columns).numpy()
    values = tensor.detach().cpu().reshape(-1).numpy()[grid.reshape(-1)]
    starts = np.concatenate([[0], np.cumsum(grid.sum(axis=1))])
    return csr_array((values, np.nonzero(grid)[1], starts), shape=(rows, columns))


def from_scipy(matrix: Any, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Return a tensor and its mask from a SciPy sparse array.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix
        Of any format; its stored elements are the kept ones, duplicates are added up.
    shape : tuple of int, optional
        Of the tensor, in C order with as many elements; the array's own by default.

    Returns
    -------
    tensor, mask : Tensor
        The mask is bool.

    Raises
    ------
    ArgumentTypeError
        If `matrix` is no SciPy sparse array.
    ArgumentError
        If the shape has another number of elements.
    """
    from scipy.sparse import issparse

    if not issparse(matrix):
        raise ArgumentTypeError(
            f"matrix: expected a SciPy sparse array, got {type(matrix).__name__}"
        )
    found = matrix.tocsr(copy=True)
    found.sum_duplicates()
    rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    return _scatter(rows * found.shape[1] + found.indices, found.data, tuple(matrix.shape), shape)


def to_binsparse(tensor: Tensor, mask: Tensor | None = None) -> Any:
    """Return a tensor as a binsparse tensor with a coordinate per kept element and dimension.

    Parameters
    ----------
    tensor, mask : Tensor
        As for `to_scipy`; a scalar becomes a vector of one element.

    Returns
    -------
    binsparse.BinsparseTensor
        For `binsparse.save_binsparse`.

    Raises
    ------
    MissingExtraError
        If the package binsparse is not installed.
    ArgumentTypeError, ArgumentError
        As `to_scipy`.
    """
    binsparse = _binsparse()
    if tensor.dtype == torch.bfloat16:
        raise ArgumentTypeError("tensor: binsparse has no bfloat16; pass tensor.float()")
    keep = _checked_mask(tensor, mask).numpy()
    values = tensor.detach().cpu().numpy()
    if not tensor.ndim:
        keep, values = keep.reshape(1), values.reshape(1)
    element = binsparse.ElementLevel(values[keep])
    level = binsparse.SparseLevel(keep.ndim, element, np.nonzero(keep))
    return binsparse.CustomTensor(keep.shape, int(keep.sum()), level=level)


def from_binsparse(array: Any, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Return a tensor and its mask from a binsparse tensor.

    Parameters
    ----------
    array : binsparse.BinsparseTensor
        CSR, CSC, COO, a sparse vector, or what `to_binsparse` makes.
    shape : tuple of int, optional
        As for `from_scipy`.

    Returns
    -------
    tensor, mask : Tensor
        The mask is bool.

    Raises
    ------
    ArgumentTypeError
        For a format that is not listed.
    MissingExtraError, ArgumentError
        As `to_binsparse` and `from_scipy`.
    """
    binsparse = _binsparse()
    level: Any = getattr(array, "level", None)
    if isinstance(array, binsparse.CVECVector):
        places = (np.asarray(array.indices_0),)
        values = array.values
    elif isinstance(level, binsparse.SparseLevel) and level.rank == len(array.shape):
        places, values = level.indices, level.level.values
    elif isinstance(array, binsparse.CSRMatrix | binsparse.COOMatrix):
        from binsparse.conversions.scipy import to_scipy as matrix_of

        return from_scipy(matrix_of(array), shape)
    else:
        raise ArgumentTypeError(
            f"array: expected a sparse binsparse tensor, got {type(array).__name__}"
        )
    flat = np.ravel_multi_index(tuple(np.asarray(p) for p in places), tuple(array.shape))
    return _scatter(flat, np.asarray(values), tuple(array.shape), shape)


def from_torch_prune(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state and the masks of a module that `torch.nn.utils.prune` has pruned.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        With ``NAME_orig`` and ``NAME_mask`` for each pruned parameter.

    Returns
    -------
    state : dict of str to Tensor
        ``NAME`` for each of these, zero outside its mask, and all other entries as they are.
    masks : dict of str to Tensor
        Bool, by the same names.

    Raises
    ------
    ArgumentError
        If a mask has another shape than its original.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.utils import prune
    >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 1, bias=False), "weight", amount=3)
    >>> state, masks = from_torch_prune(layer.state_dict())
    >>> int(masks["weight"].sum())
    1
    """
    state, masks = {}, {}
    names = {n.removesuffix(_ORIGINAL) for n in state_dict if n.endswith(_ORIGINAL)}
    originals = {name for name in names if name + _MASK in state_dict}
    for key, tensor in state_dict.items():
        name = key.removesuffix(_ORIGINAL)
        if key.endswith(_MASK) and key.removesuffix(_MASK) in originals:
            continue
        if name not in originals or key == name:
            state[key] = tensor
            continue
        mask = state_dict[name + _MASK]
        if mask.shape != tensor.shape:
            raise ArgumentError(
                f"state_dict: expected {name + _MASK!r} of shape {tuple(tensor.shape)}, as "
                f"{key!r} has, got {tuple(mask.shape)}"
            )
        masks[name] = mask != 0
        state[name] = torch.where(masks[name], tensor, torch.zeros_like(tensor))
    return state, masks


def to_torch_prune(state: State, masks: Masks) -> dict[str, Tensor]:
    """Return a state dict that a module pruned with `torch.nn.utils.prune` can load.

    Parameters
    ----------
    state, masks : mapping of str to Tensor
        What `from_torch_prune` or a payload has.

    Returns
    -------
    dict of str to Tensor
        ``NAME_orig`` and ``NAME_mask``, of the same dtype, for each name in `masks`, and all other
        entries as they are.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in masks:
            found[name + _ORIGINAL] = tensor
            found[name + _MASK] = masks[name].to(tensor.dtype)
        else:
            found[name] = tensor
    return found


def _checked_mask(tensor: Tensor, mask: Tensor | None) -> Tensor:
    nonzero = tensor.detach().cpu() != 0
    if mask is None:
        return nonzero
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if mask.shape != tensor.shape:
        raise ArgumentError(f"mask: expected shape {tuple(tensor.shape)}, got {tuple(mask.shape)}")
    keep = mask.cpu()
    if bool((nonzero & ~keep).any()):
        raise ArgumentError("mask: the tensor has non-zero values outside of it")
    return keep


def _scatter(
    places: Any, values: Any, own: tuple[int, ...], wanted: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    shape = own if wanted is None else wanted
    n = int(np.prod(own, dtype=np.int64))
    if int(np.prod(shape, dtype=np.int64)) != n:
        raise ArgumentError(f"shape: expected {n} elements, as {own} has, got {shape}")
    flat = np.zeros(n, values.dtype)
    keep = np.zeros(n, np.bool_)
    flat[places] = values
    keep[places] = True
    return torch.from_numpy(flat).reshape(shape), torch.from_numpy(keep).reshape(shape)


def _binsparse() -> Any:
    try:
        import binsparse
    except ImportError:
        raise MissingExtraError(
            "binsparse: not installed; `pip install sparsekit3d[interop]` brings it"
        ) from None
    return binsparse
