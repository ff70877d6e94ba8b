"""The ops: arguments are checked once here, then an implementation is chosen and run."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from sparsekit import choosing
from sparsekit.arguments import FLOAT_DTYPES, check_convolution, check_voxel_mask
from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.explanation import Explanation, explain
from sparsekit.kernels import calls, dispatch

__all__ = [
    "PRECISIONS",
    "Explanation",
    "conv_norm_pool_relu",
    "explain",
    "masked_conv3d",
    "norm_pool_relu",
    "topk_mask",
]

PRECISIONS = ("auto", "ieee", "tf32", "tf32x3", "bf16x3")
_CPU_NEEDS = "other kernels need non-empty float32 input, not traced, compiled or in torch.func"
_KEY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    voxel_mask: Tensor | None = None,
    precision: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """3D convolution with the unpruned weights only.

    Pruned weights take part in nothing: their values may be anything, also NaN, and their
    gradient is exactly 0.

    Parameters
    ----------
    x : Tensor, (n, c_in, d, h, w) or (c_in, d, h, w)
        Input; float16, bfloat16, float32 or float64.
    weight : Tensor, (c_out, c_in / groups, kd, kh, kw)
        Dtype and device of `x`.
    mask : Tensor, shape of `weight`, bool
        True keeps the weight.
    bias : Tensor, (c_out,), optional
        Added to every output voxel.
    stride, padding, dilation : int or 3 int
        As in `torch.nn.functional.conv3d`; `padding` may be ``"same"`` or ``"valid"``.
    groups : int
        Number of blocks of channels that do not mix.
    voxel_mask : Tensor, (d_out, h_out, w_out) or (n or 1, 1, d_out, h_out, w_out), bool, optional
        The output, bias included, is 0 where this is False, and no gradient flows from there.
    precision : {"auto", "ieee", "tf32", "tf32x3", "bf16x3"}
        Least accuracy of float32 products on a GPU. ``"auto"`` follows torch's flags, and lets
        the dense convolution run where it is faster; on a CPU nothing computes with less than the
        dtype of `x`.
    backend : {"auto", "reference", "cpu", "triton"}
        ``"auto"`` takes the best implementation for the device; on a CPU, the one that is
        predicted to be faster for this layer and density. `sparsekit.explain` says which and why.

    Returns
    -------
    Tensor, (n, c_out, d_out, h_out, w_out) or (c_out, d_out, h_out, w_out)

    Raises
    ------
    ArgumentError
        A shape, value or device does not fit; the text names the argument.
    ArgumentTypeError
        A dtype is not supported, or `mask` is not bool.
    BackendError
        The named backend cannot run here.

    Examples
    --------
    >>> x, weight = torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 3, 3, 3)
    >>> mask = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    >>> mask[0, 0, 1, 1, :] = True
    >>> masked_conv3d(x, weight, mask).item()
    3.0
    """
    if precision not in PRECISIONS:
        raise ArgumentError(
            f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}"
        )
    kind = None
    if voxel_mask is None:
        settings = "masked_conv3d", stride, padding, dilation, groups, precision, backend
        kind = calls.kind_of(x, weight, mask, bias, settings)
        known = choosing.known(kind, mask, backend)
        if known is not None:
            same: Tensor = choosing.call(
                known.run, x, weight, mask, bias, known.shape, voxel_mask=None, precision=precision
            )
            return same
    call = check_convolution(x, weight, mask, bias, stride, padding, dilation, groups)
    if precision != "auto" and x.dtype != torch.float32:
        raise ArgumentError(
            f"precision: {precision!r} is for float32, but x is {x.dtype}; use precision='auto'"
        )
    if voxel_mask is not None:
        voxel_mask = check_voxel_mask(voxel_mask, call.x, call.out)
    run = choosing.convolution(
        call, weight, mask, bias, backend, kind if call.x is x else None, precision
    )
    y: Tensor = choosing.call(
        run, call.x, weight, mask, bias, call.shape, voxel_mask=voxel_mask, precision=precision
    )
    return y.squeeze(0) if x.ndim == 4 else y


def conv_norm_pool_relu(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Masked convolution, instance norm without parameters, 2x2x2 max pooling and ReLU as one op.

    The same function as `masked_conv3d` followed by `norm_pool_relu`, without the maps between
    them where the kernels can do so.

    Parameters
    ----------
    x, weight, mask, bias, stride, padding, dilation, groups
        As in `masked_conv3d`; `x` (n, c_in, d, h, w), and the convolution's output has at least 2
        voxels along each axis.
    eps : float
        Added to the variance.
    backend : {"auto", "reference", "cpu"}
        ``"cpu"`` takes float32. Its gradient cannot be differentiated again.

    Returns
    -------
    Tensor, (n, c_out, d_out // 2, h_out // 2, w_out // 2)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A shape, value, dtype or device does not fit; the text names the argument.
    BackendError
        The named backend cannot run here.
    """
    settings = "conv_norm_pool_relu", stride, padding, dilation, groups, backend
    kind = calls.kind_of(x, weight, mask, bias, settings)
    known = choosing.known(kind, mask, backend)
    if known is not None:
        same: Tensor = choosing.call(known.run, x, weight, mask, bias, known.shape, eps=eps)
        return same
    call = check_convolution(x, weight, mask, bias, stride, padding, dilation, groups)
    if x.ndim != 5 or min(call.out) < 2:
        raise ArgumentError(
            "x: expected (n, c_in, d, h, w) with at least 2 voxels of the convolution's output "
            f"along each axis, got shape {tuple(x.shape)} and output {call.out}"
        )
    run = choosing.block(call, weight, mask, bias, backend, kind if call.x is x else None)
    y: Tensor = choosing.call(run, call.x, weight, mask, bias, call.shape, eps=eps)
    return y


def norm_pool_relu(x: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """Instance norm without parameters, 2x2x2 max pooling and ReLU as one op.

    The same function as `torch.nn.InstanceNorm3d`, `torch.nn.MaxPool3d` and `torch.nn.ReLU` in a
    row: beside a pruned convolution these are most of a training step's time.

    Parameters
    ----------
    x : Tensor, (n, c, d, h, w)
        At least 2 voxels along each axis; an odd last slice counts for the norm only.
    eps : float
        Added to the variance.
    backend : {"auto", "reference", "cpu"}
        ``"cpu"`` takes float32. It raises RuntimeError where its gradient is differentiated again
        or forward-mode derivatives are asked for; ``"reference"`` has both.

    Returns
    -------
    Tensor, (n, c, d // 2, h // 2, w // 2)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        The shape does not fit, or `x` is not a floating tensor.
    BackendError
        The named backend cannot run here.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"x: expected a Tensor, got {type(x).__name__}")
    shape = tuple(x.shape)
    if len(shape) != 5 or shape[1] < 1 or min(shape[2:]) < 2:
        raise ArgumentError(f"x: expected (n, c >= 1, d, h, w >= 2 each), got shape {shape}")
    if x.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(f"x: expected a real floating dtype, got {x.dtype}")
    suits_cpu = x.dtype == torch.float32 and shape[0] > 0 and dispatch.holds_values(x)
    choice = dispatch.resolve(
        "norm_pool_relu", x.device.type, backend, reference_only="" if suits_cpu else _CPU_NEEDS
    )
    if not (x.is_meta or torch.compiler.is_compiling()):
        dispatch.record(choice, x.device.type, str(x.dtype).removeprefix("torch."))
    y: Tensor = choice.implementation.load()(x, eps=eps)
    return y


@overload
def topk_mask(
    tensors: Mapping[str, Tensor],
    keep: int,
    *,
    within: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]: ...
@overload
def topk_mask(
    tensors: tuple[Tensor, ...],
    keep: int,
    *,
    within: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]: ...
@overload
def topk_mask(
    tensors: list[Tensor],
    keep: int,
    *,
    within: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]: ...
def topk_mask(
    tensors: Mapping[str, Tensor] | Sequence[Tensor],
    keep: int,
    *,
    within: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> dict[str, Tensor] | list[Tensor] | tuple[Tensor, ...]:
    """Select exactly the `keep` entries of largest magnitude over all tensors together.

    Of equal magnitudes those first in order win: order of the tensors, then C order inside one.
    -0.0 equals 0.0. Every backend returns the same bits.

    Parameters
    ----------
    tensors : mapping or sequence of Tensor
        float32, float16 or bfloat16, of any shapes, on any devices.
    keep : int
        Number of True entries, from 0 to what `within` leaves.
    within : mapping or sequence of Tensor, bool, optional
        Same keys (or length) and shapes as `tensors`; entries that are False are never selected.
    backend : {"auto", "reference", "cpu", "triton"}
        See `sparsekit.explain`.

    Returns
    -------
    dict, tuple or list of Tensor, bool
        A dict for a mapping, a tuple for a tuple, else a list; each mask on its tensor's device.

    Raises
    ------
    ArgumentError
        `keep` is out of range, a tensor holds NaN, or `within` does not fit.
    ArgumentTypeError
        A dtype is not supported. float64 is refused: its order would change with the rounding
        to the float32 keys that all backends share.

    Examples
    --------
    >>> topk_mask([torch.tensor([3.0, -5.0, 0.0]), torch.tensor([[4.0, 5.0]])], keep=2)
    [tensor([False,  True, False]), tensor([[False,  True]])]
    """
    names, values = _named("tensors", tensors)
    check_magnitudes(names, values)
    values = [tensor.resolve_neg() for tensor in values]
    allowed: list[Tensor] | None = None
    alive = sum(t.numel() for t in values)
    if within is not None:
        allowed = _check_within(within, tensors, names, values)
        alive = _count(allowed)
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise ArgumentTypeError(f"keep: expected an int, got {keep!r}")
    if not 0 <= keep <= alive:
        raise ArgumentError(f"keep: expected 0 to {alive} (the entries to choose from), got {keep}")

    device_type = values[0].device.type if values else "cpu"
    # The CPU's kernels copy what they need; those of a GPU read the tensors where they are.
    scattered = (device_type != "cpu" or backend == "triton") and len(
        {t.device for t in values}
    ) > 1
    choice = dispatch.resolve(
        "topk_mask", device_type, backend,
        reference_only="the tensors are on several devices" if scattered else "",
    )  # fmt: skip
    masks: list[Tensor] = choice.implementation.load()(values, names, keep, allowed)
    dispatch.record(choice, device_type, f"{len(values)} tensors")
    if isinstance(tensors, Mapping):
        return dict(zip(tensors, masks, strict=True))
    return tuple(masks) if isinstance(tensors, tuple) else masks


def check_magnitudes(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise unless each tensor has magnitudes that all backends order alike, and they can be read.

    Raises
    ------
    ArgumentTypeError
        As for `topk_mask`.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dtype not in _KEY_DTYPES or tensor.layout != torch.strided:
            raise ArgumentTypeError(
                f"tensors: expected dense float32, float16 or bfloat16, but {name} is "
                f"{tensor.dtype} ({tensor.layout}); convert it with .float() or .to_dense()"
            )
        if tensor.is_meta:
            raise ArgumentTypeError(f"tensors: {name} is a meta tensor and has no values")
        if not dispatch.holds_values(tensor.resolve_neg()):
            raise ArgumentTypeError(
                f"tensors: {name} has no values that can be read now; call this outside of "
                "torch.compile, torch.func, tracing and fake modes, with plain tensors"
            )


def _count(masks: list[Tensor]) -> int:
    """Entries that are True, waiting for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for mask in masks:
        by_device.setdefault(mask.device, []).append(mask.count_nonzero())
    return sum(int(torch.stack(counts).sum()) for counts in by_device.values())


def _named(argument: str, tensors: Any) -> tuple[list[str], list[Tensor]]:
    if isinstance(tensors, Mapping):
        names, values = [repr(key) for key in tensors], list(tensors.values())
    elif isinstance(tensors, Sequence):
        names, values = [f"number {i}" for i in range(len(tensors))], list(tensors)
    else:
        raise ArgumentTypeError(
            f"{argument}: expected a mapping or a sequence of tensors, "
            f"got {type(tensors).__name__}; put a single tensor into a list"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(
                f"{argument}: expected tensors, but {name} is {type(value).__name__}"
            )
    return names, values


def _check_within(
    within: Any, tensors: Any, names: list[str], values: list[Tensor]
) -> list[Tensor]:
    within_names, masks = _named("within", within)
    if isinstance(within, Mapping) != isinstance(tensors, Mapping):
        raise ArgumentTypeError("within: expected a mapping or a sequence, as tensors is")
    if sorted(within_names) != sorted(names):
        differing = sorted(set(within_names) ^ set(names))
        raise ArgumentError(f"within: expected one mask per tensor; without a partner: {differing}")
    if isinstance(within, Mapping):
        masks = [within[key] for key in tensors]
    for name, mask, tensor in zip(names, masks, values, strict=True):
        if mask.dtype != torch.bool:
            raise ArgumentTypeError(f"within: expected dtype bool, but {name} is {mask.dtype}")
        if mask.shape != tensor.shape:
            raise ArgumentError(
                f"within: expected shape {tuple(tensor.shape)} for {name}, got {tuple(mask.shape)}"
            )
    return masks
