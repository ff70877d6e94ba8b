"""Which weights are kept or pruned as one, and how much a group is worth.

A weight is seen as (output channels, input channels, taps): axis 0, axis 1, and the rest. A tensor
without an axis has one channel there: a linear layer's weight is that of a 1x1x1 convolution.
"""

import math
import re
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.ops import check_magnitudes
from sparsekit.types import Masks, State

N_OF_M = "2:4"
GRANULARITIES = ("weight", "vector:V", "block:VxW", "filter", N_OF_M)
_FORMS = re.compile(r"vector:([1-9]\d*)|block:([1-9]\d*)x([1-9]\d*)|filter")


@dataclass(frozen=True, slots=True)
class Form:
    """Sizes of a group: so many output and input channels at one tap, or a whole filter."""

    outputs: int
    inputs: int
    whole_filter: bool = False


def parse(granularity: str) -> Form | None:
    """Read a granularity; None stands for single weights and for 2 of 4.

    Raises
    ------
    ArgumentError
        It is none of `GRANULARITIES`.
    """
    if granularity in ("weight", N_OF_M):
        return None
    found = _FORMS.fullmatch(str(granularity))
    if found is None:
        raise ArgumentError(
            f"granularity: expected one of {', '.join(map(repr, GRANULARITIES))} with whole "
            f"numbers V and W from 1, got {granularity!r}"
        )
    vector, outputs, inputs = found.groups()
    if vector is not None:
        return Form(int(vector), 1)
    if outputs is not None:
        return Form(int(outputs), int(inputs))
    return Form(1, 0, whole_filter=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the weights of one tensor fall into groups; the last of an axis may be smaller.

    Groups form a table: a row has the groups of the same output channels, and rows and columns
    are in the order of the groups' first weights. Whole filters are one row.
    """

    shape: torch.Size
    form: Form

    @property
    def _sizes(self) -> tuple[int, int, int]:
        shape = tuple(self.shape)
        outputs, inputs = (*shape, 1, 1)[:2]
        return outputs, inputs, math.prod(shape[2:])

    def members(self, x: Tensor) -> Tensor:
        """Elements by group: (rows, columns, output channels of a group, the rest), 0 beyond."""
        outputs, inputs, taps = self._sizes
        flat = x.reshape(outputs, inputs, taps)
        if self.form.whole_filter:
            return flat.reshape(1, outputs, 1, inputs * taps)
        v, w = self.form.outputs, self.form.inputs
        rows, columns = -(-outputs // v), -(-inputs // w)
        padded = flat.new_zeros(rows * v, columns * w, taps)
        padded[:outputs, :inputs] = flat
        blocks = padded.view(rows, v, columns, w, taps).permute(0, 2, 4, 1, 3)
        return blocks.reshape(rows, columns * taps, v, w)

    def restored(self, members: Tensor) -> Tensor:
        """Put elements by group back into the tensor's shape, the inverse of `members`."""
        outputs, inputs, taps = self._sizes
        if self.form.whole_filter:
            return members.reshape(self.shape)
        v, w = self.form.outputs, self.form.inputs
        rows, columns = -(-outputs // v), -(-inputs // w)
        blocks = members.reshape(rows, columns, taps, v, w).permute(0, 3, 1, 4, 2)
        return blocks.reshape(rows * v, columns * w, taps)[:outputs, :inputs].reshape(self.shape)

    def spread(self, chosen: Tensor) -> Tensor:
        """One entry per weight from (rows, columns), one per group."""
        _, inputs, taps = self._sizes
        width = (
            (1, inputs * taps) if self.form.whole_filter else (self.form.outputs, self.form.inputs)
        )
        return self.restored(chosen[:, :, None, None].expand(*chosen.shape, *width))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one tensor: what each is worth, and how many weights it would keep."""

    layout: Layout
    scores: Tensor
    """(rows, columns), float32: mean magnitude of the weights that may be kept."""
    alive: Tensor
    """(rows, columns, output channels), int64: how many they are in each channel."""

    @property
    def sizes(self) -> Tensor:
        """(rows, columns), int64: weights of a group that may be kept."""
        return self.alive.sum(2)


def groups_of(tensors: State, within: Masks | None, form: Form) -> dict[str, Groups]:
    """Score the groups of all tensors.

    A score is the sum of the magnitudes divided by their number, both float32. The members, in C
    order, are filled up with zeros to a power of two; then the second half is added to the first
    until one is left. Additions of two numbers are exactly rounded everywhere, so that every
    device has the same scores.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A tensor holds NaN, or magnitudes that backends might order differently.
    """
    found = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        layout = Layout(tensor.shape, form)
        allowed = torch.ones_like(tensor, dtype=torch.bool) if within is None else within[name]
        sizes = tensor.detach().abs().float()
        members = layout.members(torch.where(allowed.to(tensor.device), sizes, 0.0))
        alive = layout.members(allowed.to(tensor.device)).sum(3)
        total = _sum(members.flatten(2))
        found[name] = Groups(layout, total / alive.sum(2).clamp(min=1).float(), alive)
    return found


def _sum(members: Tensor) -> Tensor:
    """Sum over the last axis, in the order that `groups_of` documents."""
    n = members.shape[-1]
    if n == 0:
        return members.new_zeros(members.shape[:-1])
    power = 1 << (n - 1).bit_length()
    if power > n:
        members = torch.nn.functional.pad(members, (0, power - n))
    while power > 1:
        power //= 2
        members = members[..., :power] + members[..., power:]
    return members[..., 0]


def _check(name: str, tensor: Tensor) -> None:
    """Raise for what `topk_mask` refuses; sums and sorting would carry NaN elsewhere."""
    check_magnitudes([repr(name)], [tensor])
    if bool(tensor.detach().isnan().any()):
        raise ArgumentError(
            f"tensors: {name!r} holds NaN, which has no magnitude; "
            "find the step that made it before pruning"
        )


def two_of_four(tensors: State, within: Masks | None) -> dict[str, Tensor]:
    """Masks that keep, of every 4 consecutive input channels, the 2 largest weights.

    The 4 weights share output channel and tap. Of equal magnitudes the first channel wins; of the
    fewer channels at the end 2 are kept as well, or all.
    """
    masks = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        layout = Layout(tensor.shape, Form(1, 4))
        allowed = torch.ones_like(tensor, dtype=torch.bool) if within is None else within[name]
        alive = layout.members(allowed.to(tensor.device))
        sizes = torch.where(alive, layout.members(tensor.detach().abs().float()), -1.0)
        masks[name] = layout.restored(_two_largest(sizes) & alive)
    return masks


def _two_largest(sizes: Tensor) -> Tensor:
    """Where the 2 largest of the 4 in the last axis stand; of equal ones the first wins.

    By the 6 comparisons of every two: sorting so few takes many times longer.
    """
    four = sizes.unbind(-1)
    above = [torch.zeros(one.shape, dtype=torch.int8, device=one.device) for one in four]
    for earlier, later in combinations(range(4), 2):
        wins = four[earlier] >= four[later]
        above[later] += wins
        above[earlier] += ~wins
    return torch.stack(above, dim=-1) < 2
