"""Tiles and path of a convolution by timing the candidates on the device, where that is asked for.

`sparsekit.kernels.tuning` says when it is. Candidates are tiles from the committed table only,
the best ones by the model, and torch's dense convolution: one forward pass, with its backward
passes if gradients count, of numbers that are made for it, in the layer's sizes.
"""

import hashlib
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels import triton_device, tuning
from sparsekit.kernels.masked_conv3d import gpu_cost, gpu_plan, launches
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_cost import Decision, Listed
from sparsekit.kernels.masked_conv3d.gpu_plan import Settings, Tile
from sparsekit.kernels.masked_conv3d.tiles import Kind, settings

Timer = Callable[[Callable[[], object]], float]
"""Runs a function, as often as it wants, and returns the seconds of one run."""

FORWARD, BACKWARD = 3, 2
"""How many of the model's best are timed: tiles of the forward pass, each with tiles of the input
gradient."""
_WARM_UP, _RUNS = 3, 7


def events(run: Callable[[], object]) -> float:
    """Median by the device's own clock, after the compilation."""
    for _ in range(_WARM_UP):
        run()
    seconds: list[float] = []
    for _ in range(_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


timer: Timer | None = None
"""Instead of `events`, which need a GPU; tests put a clock of their own here."""


def why_not(mask: Tensor) -> str:
    """Say why nothing is timed for this mask now; empty if it is."""
    why = tuning.why_off()
    if why or timer is not None:
        return why
    return "" if mask.is_cuda else "tiles are timed on a GPU only"


def decide(
    mask: Tensor, shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool
) -> Decision:
    """Do as `gpu_cost.decide`, by times: those in the file, or new ones.

    Falls back on the model where the candidates do not fit into the device's memory.
    """
    modelled = gpu_cost.decide(shape, samples, kind, listed, train=train)
    versions, key = _versions(), key_of(mask, shape, samples, kind, listed, train=train)
    found = tuning.read(versions).get(key)
    if found is None:
        try:
            found = _time(mask, shape, samples, kind, listed, train=train)
        except torch.OutOfMemoryError:
            warnings.warn(
                f"no tiles are timed for {shape}: the device's memory does not hold the layer "
                "twice; the model's are taken",
                stacklevel=2,
            )
            return modelled
        tuning.keep(versions, key, found)
    try:
        chosen = _settings(found["settings"])
        kernels, dense = float(found["kernels"]), float(found["dense"])
    except (KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f"{tuning.path()}: the choice for {key} is damaged ({error!r}) and ignored; delete "
            "the file to have it timed anew",
            stacklevel=2,
        )  # fmt: skip
        return modelled
    reason = (
        f"autotuned on {found.get('device')}: kernels {kernels * 1e6:.0f} us in tiles of "
        f"{chosen.forward.rows} x {chosen.width}, dense {dense * 1e6:.0f} us"
    )
    return replace(
        modelled, dense=dense < kernels, settings=chosen, kernel_seconds=kernels,
        dense_seconds=dense, reason=reason,
    )  # fmt: skip


def key_of(
    mask: Tensor, shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool
) -> str:
    """What a choice is kept under.

    Masks are alike if they keep about as many weights, and their tiles about as many columns: each
    class is half as wide again as it begins.
    """
    columns = [listed.forward[sizes] for sizes in ((16, 1), (16, 16), (64, 16))]
    classes = [round(2 * math.log2(max(1, count))) for count in (listed.kept, *columns)]
    described = {
        "op": "masked_conv3d", "device": _device(mask), "architecture": kind.architecture,
        "dtype": str(kind.dtype).removeprefix("torch."), "precision": kind.precision,
        "train": train, "samples": samples, "shape": asdict(shape), "classes": classes,
    }  # fmt: skip
    return json.dumps(described, separators=(",", ":"))


def candidates(
    shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool
) -> list[Settings]:
    """Tiles to time, the model's own choice first."""
    forward, backward = gpu_cost.ranked(shape, samples, kind, listed, train=train)
    backward = backward[: BACKWARD if train else 1]
    return [
        settings(kind, own[1], own[2], back[1], back[2])
        for own, back in itertools.product(forward[:FORWARD], backward)
    ]


def _time(
    mask: Tensor, shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool
) -> dict[str, Any]:
    clock = events if timer is None else timer
    off = torch.autocast(mask.device.type, enabled=False)
    with torch.no_grad(), off, triton_device.on_device_of(mask):
        x = _numbers((samples, shape.c_in, *shape.size), kind, mask.device)
        weight = _numbers(tuple(mask.shape), kind, mask.device)
        gradient = _numbers((samples, shape.c_out, *shape.out), kind, mask.device)
        timed = []
        for tiles in candidates(shape, samples, kind, listed, train=train):
            plan = gpu_plan.make(mask, shape, tiles)

            def kernels(plan: gpu_plan.Plan = plan) -> None:
                source, y = launches.pack_source(x, plan), torch.empty_like(gradient)
                launches.forward(source, weight, mask, None, plan, y, precision=kind.precision)
                if train:
                    launches.backward(
                        gradient, source, weight, mask, plan, precision=kind.precision,
                        need_x=True, need_weight=True,
                    )  # fmt: skip

            timed.append((clock(kernels), tiles))

        def dense() -> None:
            kept = torch.where(mask, weight, 0.0)
            steps = shape.stride, shape.padding, shape.dilation
            functional.conv3d(x, kept, None, *steps, shape.groups)
            if train:
                found = torch.ops.aten.convolution_backward(
                    gradient, x, kept, [shape.c_out], *steps, False, [0, 0, 0], shape.groups,
                    [True, True, False],
                )  # fmt: skip
                torch.where(mask, found[1], 0.0)

        dense_seconds = clock(dense)
    seconds, best = min(timed, key=lambda one: one[0])
    return {
        "kernels": seconds, "dense": dense_seconds, "device": _device(mask),
        "settings": asdict(best),
    }  # fmt: skip


def _numbers(sizes: tuple[int, ...], kind: Kind, device: torch.device) -> Tensor:
    """Numbers of both signs, without touching torch's random ones."""
    count = torch.arange(math.prod(sizes), dtype=torch.float32, device=device)
    return count.sin_().to(kind.dtype).reshape(sizes)


def _settings(stored: dict[str, Any]) -> Settings:
    tiles: dict[str, Any] = {
        name: Tile(**value) if isinstance(value, dict) else value for name, value in stored.items()
    }
    return Settings(**tiles)


def _device(mask: Tensor) -> str:
    return torch.cuda.get_device_name(mask.device) if mask.is_cuda else mask.device.type


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """What makes a choice of another time or machine worthless."""
    own = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        own.update(module.read_bytes())
    # Only CUDA builds of torch have it; of ROCm, torch knows the version of its own libraries.
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: torch.version.hip)()
    return {
        "sparsekit": own.hexdigest()[:16], "triton": triton.__version__,
        "torch": torch.__version__, "driver": str(driver),
    }  # fmt: skip
