"""Pruned 3D networks that pay off for real: kernels, pruning, a codec, and a federation layer.

The names below are the public API. The command line is ``sparsekit``; the federation layer is
``sparsekit.fed``. sparsekit is a research tool, not a medical device.
"""

import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError(
        f"sparsekit runs on Linux only, this is {_sys.platform}; use a Linux machine, a container "
        "or the Windows Subsystem for Linux"
    )

from importlib.util import find_spec as _find_spec

from sparsekit._version import __version__

# Without torch `sparsekit.codec.arrays` still reads payloads.
if _find_spec("torch") is not None:
    from sparsekit import flops, models, nn, prune, schedule
    from sparsekit.codec import PayloadInfo, base_digest, decode, decode_masks, encode, inspect
    from sparsekit.explanation import explain
    from sparsekit.nn import MaskedConv3d, densify, sparsify
    from sparsekit.ops import conv_norm_pool_relu, masked_conv3d, norm_pool_relu, topk_mask

__all__ = [
    "MaskedConv3d",
    "PayloadInfo",
    "__version__",
    "base_digest",
    "conv_norm_pool_relu",
    "decode",
    "decode_masks",
    "densify",
    "encode",
    "explain",
    "flops",
    "inspect",
    "masked_conv3d",
    "models",
    "nn",
    "norm_pool_relu",
    "prune",
    "schedule",
    "sparsify",
    "topk_mask",
]
