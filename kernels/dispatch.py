"""Which implementation runs an op: one explicit table, and a record of the choices made.

Nothing here catches a failing import: ``auto`` takes the first row of the table, or torch's dense
convolution where the cost model of `sparsekit.kernels.masked_conv3d.selector` says so; a backend
that was named runs or raises. Triton's rows stand where `sparsekit.kernels.triton_device` says that
its kernels can run.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekit.errors import ArgumentError, BackendError
from sparsekit.kernels import triton_device
from sparsekit.kernels.bitmap import reference as bitmap_reference
from sparsekit.kernels.conv_norm_pool_relu import reference as conv_norm_pool_relu_reference
from sparsekit.kernels.loading import at_first_use
from sparsekit.kernels.masked_conv3d import reference as conv_reference
from sparsekit.kernels.norm_pool_relu import reference as norm_pool_relu_reference
from sparsekit.kernels.topk_mask import reference as topk_reference
from sparsekit.kernels.zero_pruned import reference as zero_pruned_reference

if TYPE_CHECKING:
    from sparsekit.kernels.masked_conv3d.gpu_cost import Decision as GpuDecision
    from sparsekit.kernels.masked_conv3d.selector import Decision

BACKENDS = ("reference", "cpu", "triton")
"""Every backend that can be named; not each op has each of them."""

MAX_RECORDS = 256


@dataclass(frozen=True, slots=True)
class Implementation:
    """One row of the table: an implementation and what its time follows."""

    backend: str
    load: Callable[[], Callable[..., Any]]
    """Returns the function; a backend with heavy imports does them here, at first use."""
    follows_mask: bool
    """True if pruned weights cost no time; False if the op is computed densely."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What `resolve` picked, and why."""

    op: str
    implementation: Implementation
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One kind of call that was made, and how often."""

    op: str
    backend: str
    device: str
    detail: str
    reason: str
    calls: int


_masked_conv3d_autograd = at_first_use("masked_conv3d.autograd")
_conv_norm_pool_relu_autograd = at_first_use("conv_norm_pool_relu.autograd")
_masked_conv3d_dense = at_first_use("masked_conv3d.dense")
_conv_norm_pool_relu_dense = at_first_use("conv_norm_pool_relu.dense")
_topk_mask_cpu = at_first_use("topk_mask.cpu")
_norm_pool_relu_autograd = at_first_use("norm_pool_relu.autograd")
_zero_pruned_cpu = at_first_use("zero_pruned.cpu")
_bitmap_cpu = at_first_use("bitmap.cpu")
_topk_mask_triton = at_first_use("topk_mask.triton", "triton")
_bitmap_triton_module = at_first_use("bitmap.triton", "triton")
selector = at_first_use("masked_conv3d.selector")
"""The cost model, which knows the kernels."""
gpu_autograd = at_first_use("masked_conv3d.gpu_autograd", "triton")
"""The Triton kernels of the convolution, with the model that chooses for them."""

_CONV_REFERENCE = Implementation(
    "reference", lambda: conv_reference.masked_conv3d, follows_mask=False
)
_TOPK_REFERENCE = Implementation("reference", lambda: topk_reference.topk_mask, follows_mask=False)


def _load_conv_cpu() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _masked_conv3d_autograd().masked_conv3d
    return loaded


def _load_conv_norm_pool_relu_cpu() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _conv_norm_pool_relu_autograd().conv_norm_pool_relu
    return loaded


_CONV_CPU = Implementation("cpu", _load_conv_cpu, follows_mask=True)


def _load_conv_choosing() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _masked_conv3d_autograd().masked_conv3d_choosing
    return loaded


CONV_CHOOSING = Implementation("cpu", _load_conv_choosing, follows_mask=True)
"""For code that torch compiles with ``auto``: the operator chooses when it runs."""


def _load_conv_dense() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _masked_conv3d_dense().masked_conv3d
    return loaded


def _load_conv_norm_pool_relu_dense() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _conv_norm_pool_relu_dense().conv_norm_pool_relu
    return loaded


# What ``auto`` takes on a CPU where torch's dense convolution is predicted to be faster.
DENSE = {
    "masked_conv3d": Implementation("dense", _load_conv_dense, follows_mask=False),
    "conv_norm_pool_relu": Implementation(
        "dense", _load_conv_norm_pool_relu_dense, follows_mask=False
    ),
}

_CONV_NORM_POOL_RELU_CPU = Implementation("cpu", _load_conv_norm_pool_relu_cpu, follows_mask=True)
_CONV_NORM_POOL_RELU_REFERENCE = Implementation(
    "reference", lambda: conv_norm_pool_relu_reference.conv_norm_pool_relu, follows_mask=False
)


def _load_topk_cpu() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _topk_mask_cpu().topk_mask
    return loaded


_TOPK_CPU = Implementation("cpu", _load_topk_cpu, follows_mask=False)

_NORM_POOL_RELU_REFERENCE = Implementation(
    "reference", lambda: norm_pool_relu_reference.norm_pool_relu, follows_mask=False
)


def _load_norm_pool_relu_cpu() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _norm_pool_relu_autograd().norm_pool_relu
    return loaded


_NORM_POOL_RELU_CPU = Implementation("cpu", _load_norm_pool_relu_cpu, follows_mask=False)


def _load_zero_pruned_cpu() -> Callable[..., Any]:
    loaded: Callable[..., Any] = _zero_pruned_cpu().zero_pruned
    return loaded


_ZERO_PRUNED_CPU = Implementation("cpu", _load_zero_pruned_cpu, follows_mask=False)
_ZERO_PRUNED_REFERENCE = Implementation(
    "reference", lambda: zero_pruned_reference.zero_pruned, follows_mask=False
)


def _bitmap(function: str) -> tuple[Implementation, Implementation]:
    """Rows of one of the functions on masks as bits, which take NumPy arrays."""

    def load_cpu() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(_bitmap_cpu(), function)
        return loaded

    def load_reference() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(bitmap_reference, function)
        return loaded

    return (
        Implementation("cpu", load_cpu, follows_mask=False),
        Implementation("reference", load_reference, follows_mask=False),
    )


def _load_conv_triton() -> Callable[..., Any]:
    loaded: Callable[..., Any] = gpu_autograd().masked_conv3d
    return loaded


def _load_conv_triton_choosing() -> Callable[..., Any]:
    loaded: Callable[..., Any] = gpu_autograd().masked_conv3d_choosing
    return loaded


def _load_conv_norm_pool_relu_triton() -> Callable[..., Any]:
    from sparsekit.kernels.conv_norm_pool_relu import triton

    return triton.conv_norm_pool_relu


# (op, device type) -> implementations, best first. Devices that are not listed take ANY_DEVICE.
ANY_DEVICE = "any"
TABLE: dict[tuple[str, str], tuple[Implementation, ...]] = {
    ("masked_conv3d", "cpu"): (_CONV_CPU, _CONV_REFERENCE),
    ("masked_conv3d", ANY_DEVICE): (_CONV_REFERENCE,),
    ("conv_norm_pool_relu", "cpu"): (_CONV_NORM_POOL_RELU_CPU, _CONV_NORM_POOL_RELU_REFERENCE),
    ("conv_norm_pool_relu", ANY_DEVICE): (_CONV_NORM_POOL_RELU_REFERENCE,),
    ("topk_mask", "cpu"): (_TOPK_CPU, _TOPK_REFERENCE),
    ("topk_mask", ANY_DEVICE): (_TOPK_REFERENCE,),
    ("zero_pruned", "cpu"): (_ZERO_PRUNED_CPU, _ZERO_PRUNED_REFERENCE),
    ("zero_pruned", ANY_DEVICE): (_ZERO_PRUNED_REFERENCE,),
    ("norm_pool_relu", "cpu"): (_NORM_POOL_RELU_CPU, _NORM_POOL_RELU_REFERENCE),
    ("norm_pool_relu", ANY_DEVICE): (_NORM_POOL_RELU_REFERENCE,),
    ("bitmap_pack", ANY_DEVICE): _bitmap("pack"),
    ("bitmap_nonzero", ANY_DEVICE): _bitmap("nonzero"),
    ("bitmap_unpack", ANY_DEVICE): _bitmap("unpack"),
    ("bitmap_count", ANY_DEVICE): _bitmap("count"),
    ("bitmap_compact", ANY_DEVICE): _bitmap("compact"),
    ("bitmap_expand", ANY_DEVICE): _bitmap("expand"),
}


def _bitmap_triton(function: str) -> Implementation:
    """One of the functions on masks as bits, which takes tensors."""

    def load() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(_bitmap_triton_module(), function)
        return loaded

    return Implementation("triton", load, follows_mask=False)


# Ops that have Triton kernels: first choice on a GPU; on a CPU, in the interpreter, only by name.
TRITON: dict[str, Implementation] = {
    "topk_mask": Implementation(
        "triton", lambda: _topk_mask_triton().topk_mask, follows_mask=False
    ),
    **{
        f"bitmap_{function}": _bitmap_triton(function)
        for function in ("pack", "nonzero", "unpack", "count", "compact", "expand")
    },
    "masked_conv3d": Implementation("triton", _load_conv_triton, follows_mask=True),
    "conv_norm_pool_relu": Implementation(
        "triton", _load_conv_norm_pool_relu_triton, follows_mask=True
    ),
}
# What ``auto`` takes on a GPU instead where the model of `masked_conv3d.gpu_cost` says so.
GPU_DENSE = {
    "masked_conv3d": Implementation(
        "dense", lambda: conv_reference.masked_conv3d, follows_mask=False
    ),
    "conv_norm_pool_relu": Implementation(
        "dense", lambda: conv_norm_pool_relu_reference.conv_norm_pool_relu, follows_mask=False
    ),
}
GPU_CONV_CHOOSING = Implementation("triton", _load_conv_triton_choosing, follows_mask=True)
"""For code that torch compiles with ``auto``: the operator chooses when it runs."""


def ops() -> tuple[str, ...]:
    """Names of all ops in the table, in its order."""
    return tuple(dict.fromkeys(op for op, _ in TABLE))


def available(op: str, device_type: str) -> tuple[Implementation, ...]:
    """Implementations of `op` for tensors on `device_type`, best first."""
    rows = TABLE.get((op, device_type), TABLE[(op, ANY_DEVICE)])
    if op not in TRITON or triton_device.why_not(device_type):
        return rows
    return (*rows, TRITON[op]) if device_type == "cpu" else (TRITON[op], *rows)


def resolve(
    op: str,
    device_type: str,
    backend: str = "auto",
    *,
    reference_only: str = "",
    decision: "Decision | GpuDecision | None" = None,
) -> Choice:
    """Choose the implementation of `op`.

    Parameters
    ----------
    op : str
        A name in the table.
    device_type : str
        ``tensor.device.type`` of the inputs.
    backend : str
        ``"auto"`` or one of `BACKENDS`.
    reference_only : str
        Why only the reference can take these inputs; empty if all can.
    decision : Decision, optional
        What the cost model says for ``"auto"``.

    Raises
    ------
    ArgumentError
        The backend's name is unknown.
    BackendError
        The named backend has no implementation of `op` for this device, or cannot take the inputs.
    """
    every = available(op, device_type)
    narrowed = len(every) > 1 and reference_only != ""
    rows = [row for row in every if row.backend == "reference" or not narrowed]
    if backend == "auto":
        if decision is not None:
            dense = DENSE if device_type == "cpu" else GPU_DENSE
            return Choice(op, dense[op] if decision.dense else rows[0], decision.reason)
        if narrowed:
            reason = reference_only
        elif len(rows) == 1:
            reason = f"the only implementation for {device_type} tensors"
        else:
            reason = f"the first choice for {device_type} tensors"
            if op in DENSE and device_type == "cpu":
                reason += " where predicted to be faster than torch's dense convolution"
        return Choice(op, rows[0], reason)
    for row in rows:
        if row.backend == backend:
            return Choice(op, row, "named by the caller")
    names = ", ".join(repr(row.backend) for row in rows)
    if backend not in BACKENDS:
        raise ArgumentError(
            f"backend: expected 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    if narrowed and any(row.backend == backend for row in every):
        raise BackendError(
            f"backend: {backend!r} cannot run {op} here: {reference_only}; "
            f"use backend='auto' or {names}"
        )
    if backend == "triton" and op in TRITON:
        raise BackendError(
            f"backend: 'triton' cannot run {op} here: {triton_device.why_not(device_type)}"
        )
    raise BackendError(
        f"backend: this release has no {backend!r} implementation of {op} for {device_type} "
        f"tensors; use backend='auto' or one of {names}"
    )


def _records_operations() -> bool:
    """Whether a mode is active under which plain tensors stand for others, as in `make_fx`."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return any(isinstance(mode, FakeTensorMode | ProxyTorchDispatchMode) for mode in stack)


def holds_values(x: Tensor) -> bool:
    """Whether code outside torch may read `x`.

    It may not while torch records or transforms operations instead of running them (tracing,
    `torch.compile`, `torch.func`), nor may it read a subclass such as a fake tensor, or one whose
    memory holds the numbers with the other sign.
    """
    return (
        type(x) in (Tensor, Parameter)
        # First: torch.compile cannot look at what follows.
        and not torch.compiler.is_compiling()
        and not x.is_neg()
        and not (torch._C._len_torch_dispatch_stack() and _records_operations())
        # Of these two torch has no public form that is typed; its own Python code asks them too.
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


_lock = threading.Lock()


def _after_fork() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
Kind = tuple[str, str, str, str, str]
_records: OrderedDict[Kind, int] = OrderedDict()


def record(choice: Choice, device_type: str, detail: str) -> Kind:
    """Remember a call for `records`; the kind of call used longest ago makes room.

    Returns
    -------
    tuple
        What `count` takes for another call like it.
    """
    kind = choice.op, choice.implementation.backend, device_type, detail, choice.reason
    count(kind)
    return kind


def count(kind: Kind) -> None:
    """Remember another call of a kind."""
    with _lock:
        _records[kind] = _records.pop(kind, 0) + 1
        if len(_records) > MAX_RECORDS:
            _records.popitem(last=False)


def records() -> tuple[Record, ...]:
    """The recent kinds of calls, the latest first."""
    with _lock:
        items = list(_records.items())
    return tuple(Record(*key, calls) for key, calls in reversed(items))


def clear_records() -> None:
    """Forget all calls."""
    with _lock:
        _records.clear()
