"""Where Triton kernels run: GPUs, and CPU tensors in Triton's interpreter.

The interpreter is for tests. Triton reads its switch, ``TRITON_INTERPRET=1``, when the module of a
kernel is imported, so it is set before Python starts.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

GPU = "cuda"
"""Device type of NVIDIA's and, in a ROCm build of torch, of AMD's GPUs."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.device.type == GPU else nullcontext()


def why_not(device_type: str) -> str:
    """Say why no Triton kernel can run on tensors of this device, and what to do; empty if it can.

    Parameters
    ----------
    device_type : str
        ``tensor.device.type``.
    """
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device_type == GPU or (device_type == "cpu" and interpreted()):
        return ""
    return (
        f"Triton kernels need tensors on a GPU, got {device_type} tensors; move them with "
        ".to('cuda'), or set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, "
        "in Triton's interpreter"
    )
