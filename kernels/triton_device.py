"""Where Triton kernels run: GPUs, and CPU tensors in Triton's interpreter.

The interpreter is for tests. Triton reads its switch, ``TRITON_INTERPRET=1``, when the module of a
kernel is imported, so it is set before Python starts.
"""

import os
from importlib.util import find_spec

GPU = "cuda"
"""Device type of NVIDIA's and, in a ROCm build of torch, of AMD's GPUs."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
