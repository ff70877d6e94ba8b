"""Times of the GPU benchmark: sides interleaved, medians and quartiles of CUDA events."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton

from sparsekit import explain, topk_mask
from sparsekit._version import __version__
from sparsekit.bench.gpu import cases
from sparsekit.kernels import dispatch

Side = Callable[[], object]
Row = dict[str, Any]


def machine() -> Row:
    """Device, versions, and clocks as they are found."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "sparsekit": __version__,
        "clocks": _clocks(),
    }


def _clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def timed(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every side, one after the other in every round; two rounds warm up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, side in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            side()
            end.record()
            end.synchronize()
            if i >= 2:
                found[name].append(start.elapsed_time(end))
    return found


def convolutions(rounds: int, samples: int) -> Iterator[Row]:
    """A training step of every layer, format, sparsity and mode, and the dense one beside it."""
    last = torch.channels_last_3d
    for layer in cases.LAYERS:
        for mode in cases.modes("cuda"):
            dtype = cases.dtype_of(mode)
            cudnn: Any = torch.backends.cudnn
            cudnn.conv.fp32_precision = "tf32" if mode == "tf32" else "ieee"
            for granularity in cases.FORMATS:
                for sparsity in cases.SPARSITIES:
                    x, weight, mask, g = cases.inputs(layer, granularity, sparsity, samples, "cuda")
                    x, weight, g = (t.to(dtype) for t in (x, weight, g))
                    wide = [t.to(memory_format=last) for t in (x, weight, g)]
                    precision = cases.precision_of(mode)
                    dispatch.clear_records()
                    own = (wide[0], weight, mask, wide[2])
                    cases.step(*own, "auto" if mode in ("ieee", "tf32") else precision, "auto")
                    sides: dict[str, Side] = {
                        "sparsekit": partial(cases.step, *own, precision),
                        "dense": partial(cases.dense_step, x, weight, g),
                        "dense, channels last": partial(cases.dense_step, *wide),
                    }
                    yield {
                        "what": "convolution", "layer": layer.name, "mode": mode,
                        "format": granularity, "sparsity": sparsity, "samples": samples,
                        "density": float(mask.float().mean()),
                        "auto": explain().calls[0].backend,
                        "milliseconds": timed(sides, rounds),
                    }  # fmt: skip


def selections(rounds: int) -> Iterator[Row]:
    """Global thresholds over 3 and 100 million weights."""
    for total in (3_000_000, 100_000_000):
        random = torch.Generator(device="cuda").manual_seed(0)
        sizes = [total // 2, total // 4, total // 4]
        tensors = [torch.randn(n, generator=random, device="cuda") for n in sizes]
        for sparsity in (0.5, 0.95):
            keep = sum(sizes) - int(sparsity * sum(sizes))
            sides: dict[str, Side] = {"sparsekit": partial(topk_mask, tensors, keep)}
            sides |= cases.incumbents(tensors, keep)
            yield {
                "what": "selection", "weights": sum(sizes), "sparsity": sparsity,
                "milliseconds": timed(sides, rounds),
            }  # fmt: skip
