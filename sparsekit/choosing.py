"""Which implementation a checked convolution takes, and the choices that were made before."""

import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.arguments import Convolution
from sparsekit.kernels import calls, dispatch, implementations, triton_device
from sparsekit.kernels.calls import Known
from sparsekit.kernels.dispatch import Choice

if TYPE_CHECKING:
    from sparsekit.kernels.masked_conv3d.cost import Op
    from sparsekit.kernels.masked_conv3d.gpu_cost import Decision as GpuDecision
    from sparsekit.kernels.masked_conv3d.selector import Decision

# Loaded with the kernels that they belong to.
_PLANS = (
    ("sparsekit.kernels.masked_conv3d.plan_cache", "PlanCache"),
    ("sparsekit.kernels.masked_conv3d.gpu_plans", "GpuPlans"),
)


def known(kind: Hashable | None, mask: Tensor, backend: str) -> Known | None:
    """What an earlier call like this one did, which is counted as another; None if none was."""
    if kind is None:
        return None
    found = calls.find(kind, lambda: _density(mask, backend))
    if found is not None:
        dispatch.count(found.record)
    return found


def convolution(
    call: Convolution,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    backend: str,
    kind: Hashable | None,
    precision: str,
) -> Callable[..., Any]:
    """Choose for `masked_conv3d`; `kind` is what `known` will be asked for."""
    x = call.x
    why = _why_only_reference(call, weight, bias, backend)
    compiling = torch.compiler.is_compiling()
    decision: Decision | GpuDecision | None = None
    if backend == "auto" and not (why or compiling):
        if x.device.type == "cpu":
            decision = _decide("masked_conv3d", call, weight, mask, bias)
        elif precision == "auto":
            decision = _decide_gpu(call, weight, mask, bias)
    # Meta tensors only carry shapes, which every backend gives alike.
    choice = dispatch.resolve(
        "masked_conv3d",
        x.device.type,
        "auto" if x.is_meta else backend,
        reference_only=why,
        decision=decision,
    )
    own = choice.implementation.backend
    open_choice = backend == "auto" and (own == "cpu" or (own == "triton" and precision == "auto"))
    if compiling and open_choice:
        return implementations.CHOOSING[x.device.type].load()
    return _record(choice, call, weight, mask, backend, kind)


def block(
    call: Convolution,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    backend: str,
    kind: Hashable | None,
) -> Callable[..., Any]:
    """Choose for `conv_norm_pool_relu`; `kind` is what `known` will be asked for."""
    x = call.x
    why = _why_only_reference(call, weight, bias, backend)
    if not why and x.device.type == "cpu" and torch.compiler.is_compiling():
        why = "torch.compile sees the single ops"
    decision: Decision | GpuDecision | None = None
    if backend == "auto" and not (why or torch.compiler.is_compiling()):
        if x.device.type == "cpu":
            decision = _decide("conv_norm_pool_relu", call, weight, mask, bias)
        else:
            decision = _decide_gpu(call, weight, mask, bias)
    choice = dispatch.resolve(
        "conv_norm_pool_relu", x.device.type, backend, reference_only=why, decision=decision
    )
    return _record(choice, call, weight, mask, backend, kind)


def call(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run what was chosen; if it raises, nothing of the choice is left to the next call."""
    try:
        return run(*arguments, **options)
    except BaseException:
        for module, plans in _PLANS:
            if module in sys.modules:
                getattr(sys.modules[module], plans).forget()
        raise


def why_only_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """Say why the CPU kernels of the convolution cannot take these tensors; empty if they can."""
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on, and the CPU kernels compute in float32 only"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"the CPU kernels are for float32, and x is {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0:
        return "x is empty"
    plain = all(dispatch.holds_values(t) for t in (x, weight, bias) if t is not None)
    if not (torch.compiler.is_compiling() or plain):
        return "the CPU kernels cannot see into traced tensors, torch.func or tensor subclasses"
    return ""


def _why_only_reference(
    call: Convolution, weight: Tensor, bias: Tensor | None, backend: str
) -> str:
    x = call.x
    if x.device.type == "cpu" and backend != "triton":
        return why_only_reference(x, weight, bias)
    if x.is_meta or triton_device.why_not(x.device.type):
        return ""
    if x.dtype == torch.float64:
        return "the Triton kernels are for float32, float16 and bfloat16, and x is float64"
    if x.numel() == 0:
        return "x is empty"
    plain = all(dispatch.holds_values(t) for t in (x, weight, bias) if t is not None)
    if not (torch.compiler.is_compiling() or plain):
        return "the Triton kernels cannot see into traced tensors, torch.func or tensor subclasses"
    # Where the kernels are, there is what knows their offsets.
    implementations.TRITON["masked_conv3d"].load()
    from sparsekit.kernels.masked_conv3d import gpu_plans

    return gpu_plans.why_too_large(call.shape)


def _decide_gpu(
    call: Convolution, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> "GpuDecision | None":
    if triton_device.why_not(call.x.device.type):
        return None
    decision: GpuDecision = implementations.gpu_autograd().decide(
        call.x, weight, mask, bias, call.shape, "auto"
    )
    return decision


def _decide(
    op: "Op", call: Convolution, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> "Decision":
    # The cost model knows the kernels, and those load Numba.
    selector = implementations.selector()
    gradients = selector.gradients_of(call.x, weight, bias)
    decision: Decision = selector.decide_for(
        op, call.shape, call.x.shape[0], selector.density_of(mask), gradients
    )
    return decision


def _density(mask: Tensor, backend: str) -> float | None:
    """Density on which the choice depends."""
    if backend != "auto":
        return None
    density: float = implementations.selector().density_of(mask)
    return density


def _record(
    choice: Choice, call: Convolution, weight: Tensor, mask: Tensor, backend: str,
    kind: Hashable | None,
) -> Callable[..., Any]:  # fmt: skip
    run: Callable[..., Any] = choice.implementation.load()
    x = call.x
    if not (x.is_meta or torch.compiler.is_compiling()):
        detail = f"{tuple(weight.shape)} {str(x.dtype).removeprefix('torch.')}"
        record = dispatch.record(choice, x.device.type, detail)
        if kind is not None and choice.implementation.backend in ("cpu", "dense"):
            calls.keep(kind, _density(mask, backend), Known(run, call.shape, record))
    return run
