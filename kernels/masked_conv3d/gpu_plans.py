"""Plans on GPUs, kept beside the mask that they are of, and the choice of tiles and path."""

import threading
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from sparsekit.kernels import tuning
from sparsekit.kernels.masked_conv3d import autotune, gpu_cost, gpu_plan
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_cost import Decision
from sparsekit.kernels.masked_conv3d.gpu_plan import Plan
from sparsekit.kernels.masked_conv3d.tiles import Kind, architecture_of, precision_of

MOST_ELEMENTS = 2**31
"""Elements that the kernels' offsets reach."""
_MOST_VOXELS = 128


class GpuPlans:
    """What was found out about one mask tensor in its present state."""

    MOST = 8

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask.detach().clone(memory_format=torch.contiguous_format)
        self._listed: dict[int, gpu_cost.Listed] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._decisions: dict[Hashable, Decision] = {}

    @classmethod
    def of(cls, mask: Tensor) -> "GpuPlans":
        """Return what is known of a mask; nothing yet if it has changed.

        The mask is compared with a copy, for which the host waits for the device: torch's count of
        changes misses those through ``mask.data`` and the broadcasts of DistributedDataParallel.
        While a CUDA graph is recorded nobody may wait, and the mask counts as unchanged.
        """
        compared = _thread.__dict__.pop("compared", None)
        if compared is not None and compared[0] is mask:
            last: GpuPlans = compared[1]
            return last
        entry = _known.get(id(mask))
        if entry is not None and entry[0]() is mask:
            recording = mask.is_cuda and torch.cuda.is_current_stream_capturing()
            same = entry[1]._mask.shape == mask.shape and entry[1]._mask.device == mask.device
            if same and (recording or torch.equal(entry[1]._mask, mask)):
                return entry[1]
        found, key = cls(mask), id(mask)
        _known[key] = weakref.ref(mask, lambda dead: _drop(key, dead)), found
        return found

    @classmethod
    def compare(cls, mask: Tensor) -> "GpuPlans":
        """Do as `of`, and spare this thread's next `of` for the same mask the comparison.

        For the first of two looks within one call, between which nothing else can run. Whoever
        takes no second look calls `forget`.
        """
        cls.forget()
        found = cls.of(mask)
        _thread.compared = mask, found
        return found

    @staticmethod
    def forget() -> None:
        """Let the next `of` compare again."""
        _thread.__dict__.pop("compared", None)

    def decide(self, shape: Shape, samples: int, kind: Kind, *, train: bool) -> Decision:
        """Choose tiles and path: by the model or, where that is asked for, by times."""
        recording = self._mask.is_cuda and torch.cuda.is_current_stream_capturing()
        timed = not recording and not autotune.why_not(self._mask)
        key = shape, samples, kind, train, timed
        if recording and (*key[:-1], True) in self._decisions and not tuning.why_off():
            key = *key[:-1], True
        known = self._decisions.get(key)
        if known is not None:
            return known
        listed = self._listed.get(shape.groups)
        if listed is None:
            listed = self._listed[shape.groups] = gpu_cost.count_columns(self._mask, shape.groups)
        if timed:
            found = autotune.decide(self._mask, shape, samples, kind, listed, train=train)
        else:
            found = gpu_cost.decide(shape, samples, kind, listed, train=train)
        _make_room(self._decisions, self.MOST)
        self._decisions[key] = found
        return found

    def plan(self, shape: Shape, samples: int, kind: Kind, *, train: bool) -> Plan:
        """Return the plan for the tiles that `decide` chooses."""
        settings = self.decide(shape, samples, kind, train=train).settings
        key = shape, settings
        found = self._plans.get(key)
        if found is None:
            _make_room(self._plans, self.MOST)
            found = self._plans[key] = gpu_plan.make(self._mask, shape, settings)
        return found


def _make_room(kept: dict[Hashable, Any], most: int) -> None:
    """Drop the oldest, so that one more makes no more than `most`."""
    # Other threads may do the same meanwhile.
    for old in list(kept)[: len(kept) + 1 - most]:
        kept.pop(old, None)


_thread = threading.local()
_known: dict[int, tuple[weakref.ref[Tensor], GpuPlans]] = {}


def _drop(key: int, dead: weakref.ref[Tensor]) -> None:
    entry = _known.get(key)
    if entry is not None and entry[0] is dead:
        del _known[key]


def kind_of(x: Tensor, precision: str) -> Kind:
    """What the kernels would compute with."""
    return Kind(architecture_of(x.device), x.dtype, precision_of(precision, x.dtype, x.device))


def why_too_large(shape: Shape) -> str:
    """Say why the kernels' 32-bit offsets do not reach; empty if they do.

    Counts the buffers with the widest padding that any tile asks for. A tile's voxels may lie in
    several samples, and its offsets begin with the first of them.
    """
    most_channels = max(shape.c_in, shape.c_out) + 127 * shape.groups
    grid = 1
    for axis in range(3):
        reach = (shape.kernel[axis] - 1) * shape.dilation[axis] + 16 * shape.stride[axis]
        longest = max(shape.size[axis] + 2 * shape.padding[axis], shape.out[axis])
        grid *= longest + 2 * reach
    # In loops: torch.compile looks at this.
    fewest, outputs = 1, 1
    for axis in range(3):
        fewest *= max(1, shape.size[axis] // shape.stride[axis])
        outputs *= shape.out[axis]
    together = 2 + _MOST_VOXELS // min(fewest, outputs)
    if most_channels * grid * together < MOST_ELEMENTS:
        return ""
    return (
        f"{together} samples need padded buffers of {most_channels * grid * together} elements, "
        f"and the kernels' offsets reach {MOST_ELEMENTS}; cut the volume into blocks"
    )
