"""Which implementation of `implementations` runs an op, and a record of the choices made.

Nothing here catches a failing import: ``auto`` takes the first row of the table, or torch's dense
convolution where the cost model of `sparsekit.kernels.masked_conv3d.selector` says so; a backend
that was named runs or raises. Triton's rows stand where `sparsekit.kernels.triton_device` says that
its kernels can run.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekit.errors import ArgumentError, BackendError
from sparsekit.kernels import triton_device
from sparsekit.kernels.implementations import (
    DENSE,
    GPU_DENSE,
    TRITON,
    Implementation,
    available,
)

if TYPE_CHECKING:
    from sparsekit.kernels.masked_conv3d.gpu_cost import Decision as GpuDecision
    from sparsekit.kernels.masked_conv3d.selector import Decision

BACKENDS = ("reference", "cpu", "triton")
"""Every backend that can be named; not each op has each of them."""

MAX_RECORDS = 256


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
