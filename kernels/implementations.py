"""The table of implementations: which functions compute an op, by device and best first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsekit.kernels import triton_device
from sparsekit.kernels.loading import at_first_use


@dataclass(frozen=True, slots=True)
class Implementation:
    """One row of the table: an implementation and what its time follows."""

    backend: str
    load: Callable[[], Callable[..., Any]]
    """Returns the function; a backend with heavy imports does them here, at first use."""
    follows_mask: bool
    """True if pruned weights cost no time; False if the op is computed densely."""


selector = at_first_use("masked_conv3d.selector")
"""The cost model, which knows the kernels."""
gpu_autograd = at_first_use("masked_conv3d.gpu_autograd", "triton")
"""The Triton kernels of the convolution, with the model that chooses for them."""


def _row(
    backend: str, module: str, function: str, *before: str, follows_mask: bool = False
) -> Implementation:
    """Implementation by a function of a module that is imported at first use.

    `before` are modules that are imported first, those of the CPU kernels by default.
    """
    load = at_first_use(module, *before)

    def imported() -> bool:
        load()
        return True

    # torch.compile runs that as it is; it could not look into how a module is imported. This is
    # what `torch.compiler.assume_constant_result` does, which imports the compiler, and so Triton.
    imported.__dict__["_dynamo_marked_constant"] = True

    def found() -> Callable[..., Any]:
        imported()
        loaded: Callable[..., Any] = getattr(load(), function)
        return loaded

    return Implementation(backend, found, follows_mask)


def _cpu(op: str, module: str = "autograd", *, follows_mask: bool = False) -> Implementation:
    return _row("cpu", f"{op}.{module}", op, follows_mask=follows_mask)


def _reference(op: str) -> Implementation:
    return _row("reference", f"{op}.reference", op, "torch")


def _triton(op: str, module: str = "triton", *, follows_mask: bool = False) -> Implementation:
    return _row("triton", f"{op}.{module}", op, "triton", follows_mask=follows_mask)


_BITMAP = ("pack", "nonzero", "unpack", "count", "compact", "expand")

# (op, device type) -> implementations, best first. Devices that are not listed take ANY_DEVICE.
ANY_DEVICE = "any"
TABLE: dict[tuple[str, str], tuple[Implementation, ...]] = {
    ("masked_conv3d", "cpu"): (
        _cpu("masked_conv3d", follows_mask=True), _reference("masked_conv3d"),
    ),
    ("masked_conv3d", ANY_DEVICE): (_reference("masked_conv3d"),),
    ("conv_norm_pool_relu", "cpu"): (
        _cpu("conv_norm_pool_relu", follows_mask=True), _reference("conv_norm_pool_relu"),
    ),
    ("conv_norm_pool_relu", ANY_DEVICE): (_reference("conv_norm_pool_relu"),),
    ("topk_mask", "cpu"): (_cpu("topk_mask", "cpu"), _reference("topk_mask")),
    ("topk_mask", ANY_DEVICE): (_reference("topk_mask"),),
    ("zero_pruned", "cpu"): (_cpu("zero_pruned", "cpu"), _reference("zero_pruned")),
    ("zero_pruned", ANY_DEVICE): (_reference("zero_pruned"),),
    ("norm_pool_relu", "cpu"): (_cpu("norm_pool_relu"), _reference("norm_pool_relu")),
    ("norm_pool_relu", ANY_DEVICE): (_reference("norm_pool_relu"),),
    # Those of the CPU and the reference take NumPy arrays, whatever the device.
    **{
        (f"bitmap_{function}", ANY_DEVICE): (
            _row("cpu", "bitmap.cpu", function),
            _row("reference", "bitmap.reference", function, "numpy"),
        )
        for function in _BITMAP
    },
}  # fmt: skip

# Ops that have Triton kernels: first choice on a GPU; on a CPU, in the interpreter, only by name.
TRITON: dict[str, Implementation] = {
    "masked_conv3d": _triton("masked_conv3d", "gpu_autograd", follows_mask=True),
    "conv_norm_pool_relu": _triton("conv_norm_pool_relu", follows_mask=True),
    "topk_mask": _triton("topk_mask"),
    # These take tensors.
    **{
        f"bitmap_{function}": _row("triton", "bitmap.triton", function, "triton")
        for function in _BITMAP
    },
}

# What ``auto`` takes on a CPU where torch's dense convolution is predicted to be faster.
DENSE = {op: _row("dense", f"{op}.dense", op) for op in ("masked_conv3d", "conv_norm_pool_relu")}
# The same on a GPU.
GPU_DENSE = {
    op: _row("dense", f"{op}.reference", op, "torch")
    for op in ("masked_conv3d", "conv_norm_pool_relu")
}

# For code that torch compiles with ``auto``: the operator chooses when it runs.
CHOOSING = {
    "cpu": _row(
        "cpu", "masked_conv3d.autograd", "masked_conv3d_choosing", follows_mask=True
    ),
    triton_device.GPU: _row(
        "triton", "masked_conv3d.gpu_autograd", "masked_conv3d_choosing", "triton",
        follows_mask=True,
    ),
}  # fmt: skip


def ops() -> tuple[str, ...]:
    """Names of all ops in the table, in its order."""
    return tuple(dict.fromkeys(op for op, _ in TABLE))


def available(op: str, device_type: str) -> tuple[Implementation, ...]:
    """Implementations of `op` for tensors on `device_type`, best first."""
    rows = TABLE.get((op, device_type), TABLE[(op, ANY_DEVICE)])
    if op not in TRITON or triton_device.why_not(device_type):
        return rows
    return (*rows, TRITON[op]) if device_type == "cpu" else (TRITON[op], *rows)
