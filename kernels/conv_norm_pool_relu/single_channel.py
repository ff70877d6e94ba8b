"""Convolution, instance norm, max pooling and ReLU of one input channel that needs no gradient.

Nothing of the full resolution is stored: the norm's statistics follow from the input and the
filters (`single_channel_gram`), the rest happens in registers (`single_channel_windows`). README.md
has the formulas, and when a call takes torch's layers instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.conv_norm_pool_relu import single_channel_gram as statistics
from sparsekit.kernels.conv_norm_pool_relu import single_channel_windows as windows
from sparsekit.kernels.vector import LANES, REGISTERS
from sparsekit.types import Size3

# Input of a band of output rows, 4 planes of it: well inside a second-level cache.
_BAND_BYTES = 98304
# Two channels together are faster if their taps are at most this share of what both have.
_UNION_PAYS = 0.85


class Plan:
    """What the kernels need to know of a mask; build it again when the mask changes.

    Channels come in groups of one or two. Two that share taps are computed together: each voxel is
    then loaded once for both, and a tap that only one of them has counts as a zero weight of the
    other.

    Parameters
    ----------
    mask : Tensor, (c_out, 1, 3, 3, 3), bool
        True where the weight is kept.
    """

    def __init__(self, mask: Tensor) -> None:
        # A normal tensor also if it is made in inference mode: a later backward pass may need it.
        with torch.inference_mode(False):
            self.mask = mask.detach().clone()
        self.channels = mask.shape[0]
        flat = self.mask.reshape(self.channels, 27)
        channel, self.taps = (part.contiguous() for part in flat.nonzero(as_tuple=True))
        self.positions = channel * 27 + self.taps
        self.first = _starts(flat.sum(1))
        # Products of voxels that no filter holds together need not be summed.
        planes = flat.view(self.channels, 3, 9).any(2)
        neighbours = bool((planes[:, :2] & planes[:, 1:]).any())
        ends = bool((planes[:, 0] & planes[:, 2]).any())
        self.lag_planes = 1 | neighbours << 1 | ends << 2

        groups = _groups(flat)
        self.groups = len(groups)
        self.members = torch.tensor(groups, dtype=torch.int64, device="cpu")
        one, two = self.members.unbind(1)
        both = flat[one] | (flat[two] & (two >= 0).unsqueeze(1))
        self.group_first = _starts(both.sum(1))
        self.group_taps = both.nonzero()[:, 1].contiguous()
        # Where each group has each of its taps, and each channel its group.
        entry = (both.flatten().cumsum(0) - 1).view(-1, 27)
        group_of = torch.empty(self.channels, dtype=torch.int64, device="cpu")
        place_of = torch.zeros(self.channels, dtype=torch.int64, device="cpu")
        numbers = torch.arange(self.groups, device="cpu")
        group_of[one] = numbers
        pairs = two >= 0
        group_of[two[pairs]] = numbers[pairs]
        place_of[two[pairs]] = 1
        self.slots = 2 * entry[group_of[channel], self.taps] + place_of[channel]
        # A group's columns: its 2 gradients, then 2 for each of its taps.
        self.own_column = 2 * (group_of + self.group_first[group_of]) + place_of
        self.tap_column = self.slots + 2 * (group_of[channel] + 1)
        self._offsets = (0, 0), self.group_taps

    def offsets(self, row: int, plane: int) -> Tensor:
        """Bytes from a filter's first voxel to that of each group's taps; row, plane in bytes."""
        key, found = self._offsets
        if key != (row, plane):
            d, h, w = self.group_taps // 9, self.group_taps // 3 % 3, self.group_taps % 3
            found = d * plane + h * row + w * 4
            # In one assignment: other threads may use this plan for other grids.
            self._offsets = (row, plane), found
        return found

    def group_weights(self, weights: Tensor) -> Tensor:
        """Unpruned weights in the order of the groups' taps, (group taps, 2)."""
        found = weights.new_zeros(self.group_taps.numel(), 2)
        found.view(-1)[self.slots] = weights
        return found


def _starts(counts: Tensor) -> Tensor:
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def _groups(flat: Tensor) -> list[tuple[int, int]]:
    """Pair each channel with the one that shares most taps with it, if that pays."""
    shared = (flat.float() @ flat.float().T).fill_diagonal_(0.0)
    counts = flat.sum(1).tolist()
    free = torch.ones(len(counts), device="cpu")
    groups = []
    # Those with many taps choose first.
    for channel in sorted(range(len(counts)), key=lambda c: -counts[c]):
        if not free[channel]:
            continue
        free[channel] = 0.0
        candidates = shared[channel] * free
        partner = int(candidates.argmax())
        union = counts[channel] + counts[partner] - float(candidates[partner])
        # Two channels' registers fit only where there are 32.
        pays = REGISTERS >= 32 and union <= _UNION_PAYS * (counts[channel] + counts[partner])
        if counts[channel] and float(candidates[partner]) > 0.0 and pays:
            free[partner] = 0.0
            groups.append((min(channel, partner), max(channel, partner)))
        else:
            groups.append((channel, -1))
    return sorted(groups)


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of a `forward`."""

    plan: Plan
    grid: Size3
    samples: int
    offsets: Tensor
    weights: Tensor
    padded: Tensor
    winners: Tensor
    gram: Tensor
    boxes: Tensor
    moments: Tensor


@dataclass(frozen=True)
class SavedInputs:
    """The inputs of a `forward` that took torch's layers."""

    plan: Plan
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float


def forward(
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    bias: Tensor | None,
    *,
    eps: float,
    threads: int,
    save: bool = True,
) -> tuple[Tensor, Saved | SavedInputs | None]:
    """Compute ``relu(max_pool3d(instance_norm(conv3d(x, weight * mask, bias, padding=1)), 2))``.

    Parameters
    ----------
    x : Tensor, (n, 1, d, h, w), float32
        Contiguous; n >= 1 and d, h, w >= 2.
    weight : Tensor, (c_out, 1, 3, 3, 3), float32
        Contiguous. Pruned weights are not read.
    plan : Plan
        Of the mask.
    bias : Tensor, (c_out,), float32, optional
        The norm takes it away again; it only matters if it is not finite.
    eps : float
        Added to the variance.
    threads : int
        Most threads to use. The result does not depend on it.
    save : bool
        Whether to keep what `backward` needs.

    Returns
    -------
    y : Tensor, (n, c_out, d // 2, h // 2, w // 2), float32
    saved : Saved, SavedInputs or None
    """
    n, _, depth, height, width = x.shape
    channels = plan.channels
    # At least two zeros behind each row, which are those before the next row as well.
    pitch = -(-(width + 2) // LANES) * LANES
    plane = (height + 2) * pitch
    # Tiles read up to two vectors and two voxels past the end.
    lead, slack = LANES, 4 * LANES
    padded = buffers.empty((lead + n * (depth + 2) * plane + slack,))
    sides = x.new_empty(n, 2, depth, height)
    sums = x.new_empty(n, depth + statistics.FACES, statistics.SUMS, dtype=torch.float64)
    gram = x.new_empty(n, 27, 27, dtype=torch.float64)
    boxes = x.new_empty(n, 27, dtype=torch.float64)
    moments = x.new_empty(n, channels, 2, dtype=torch.float64)
    verdicts = torch.empty(n, dtype=torch.int64, device="cpu")
    weights = weight.detach().reshape(-1)[plan.positions]
    job = statistics.pad.job(
        n=n, depth=depth, height=height, width=width, pitch=pitch, lead=lead, slack=slack,
        channels=channels, lag_planes=plan.lag_planes, eps=eps, x=x.data_ptr(),
        padded=padded.data_ptr(), sides=sides.data_ptr(), sums=sums.data_ptr(),
        weights=weights.data_ptr(), taps=plan.taps.data_ptr(), first=plan.first.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(), gram=gram.data_ptr(),
        boxes=boxes.data_ptr(), moments=moments.data_ptr(), verdicts=verdicts.data_ptr(),
    )  # fmt: skip
    for kernel in (statistics.pad, statistics.sum_products, statistics.moments):
        parallel.run(kernel.address, job, threads)
    verdict = int(verdicts.max())
    if verdict != statistics.FINE:
        # What is not finite must be so in the same places; the rest needs digits.
        dtype = x.dtype if verdict == statistics.NOT_FINITE else torch.float64
        inputs = SavedInputs(
            plan, x.detach().to(dtype), weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype), eps,
        )  # fmt: skip
        with torch.no_grad():
            y = _torch_layers(inputs, inputs.weight, inputs.bias).to(x.dtype)
        return y, inputs if save else None

    y = buffers.empty((n, channels, depth // 2, height // 2, width // 2))
    # Bytes, stored by whole vectors.
    winner_pitch = -(-(width // 2) // LANES) * LANES
    winner_bytes = n * channels * (depth // 2) * (height // 2) * winner_pitch if save else 0
    winners = buffers.empty((winner_bytes // 4,)).view(torch.uint8)
    offsets = plan.offsets(4 * pitch, 4 * plane)
    group_weights = plan.group_weights(weights)
    job = windows.forward.job(
        n=n, channels=channels, depth=depth, height=height, width=width, pitch=pitch, lead=lead,
        winner_pitch=winner_pitch, band=_band(pitch), padded=padded.data_ptr(),
        moments=moments.data_ptr(), y=y.data_ptr(), winners=winners.data_ptr() if save else 0,
        groups=plan.groups, members=plan.members.data_ptr(),
        group_first=plan.group_first.data_ptr(), offsets=offsets.data_ptr(),
        group_weights=group_weights.data_ptr(),
    )  # fmt: skip
    parallel.run(windows.forward.address, job, threads)
    if not save:
        return y, None
    grid = depth, height, width
    return y, Saved(plan, grid, n, offsets, weights, padded, winners, gram, boxes, moments)


def backward(
    saved: Saved | SavedInputs, grad_y: Tensor, *, threads: int, need_bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, exactly 0 where it is pruned, and of the bias.

    Parameters
    ----------
    saved : Saved or SavedInputs
        From `forward`.
    grad_y : Tensor, (n, c_out, d // 2, h // 2, w // 2), float32
        Contiguous.
    threads : int
        Most threads to use. The result does not depend on it.
    need_bias : bool
        Whether to return a gradient of the bias, which is 0.

    Returns
    -------
    grad_weight : Tensor, (c_out, 1, 3, 3, 3), float32
    grad_bias : Tensor, (c_out,), float32, or None
    """
    if isinstance(saved, SavedInputs):
        return _torch_backward(saved, grad_y, need_bias)
    plan = saved.plan
    depth, height, width = saved.grid
    n, channels = saved.samples, plan.channels
    pitch = -(-(width + 2) // LANES) * LANES
    columns = 2 * (plan.groups + plan.group_taps.numel())
    sums = grad_y.new_empty(n * (depth // 2), columns, dtype=torch.float64)
    grad_weight = grad_y.new_zeros(plan.mask.shape)
    job = windows.sum_gradients.job(
        n=n, channels=channels, depth=depth, height=height, width=width, pitch=pitch, lead=LANES,
        winner_pitch=-(-(width // 2) // LANES) * LANES, band=_band(pitch),
        padded=saved.padded.data_ptr(), moments=saved.moments.data_ptr(), y=grad_y.data_ptr(),
        winners=saved.winners.data_ptr(), groups=plan.groups, members=plan.members.data_ptr(),
        group_first=plan.group_first.data_ptr(), offsets=saved.offsets.data_ptr(),
        sums=sums.data_ptr(), first=plan.first.data_ptr(), taps=plan.taps.data_ptr(),
        weights=saved.weights.data_ptr(), own_column=plan.own_column.data_ptr(),
        tap_column=plan.tap_column.data_ptr(), gram=saved.gram.data_ptr(),
        boxes=saved.boxes.data_ptr(), grad_weight=grad_weight.data_ptr(),
    )  # fmt: skip
    parallel.run(windows.sum_gradients.address, job, threads)
    parallel.run(windows.weight_gradients.address, job, threads)
    return grad_weight, grad_y.new_zeros(channels) if need_bias else None


def _band(pitch: int) -> int:
    return max(1, (_BAND_BYTES // (4 * 4 * pitch) - 2) // 2)


def _torch_layers(inputs: SavedInputs, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = torch.where(inputs.plan.mask, weight, 0.0)
    z = functional.conv3d(inputs.x, weight, bias, padding=1)
    return functional.relu(functional.max_pool3d(functional.instance_norm(z, eps=inputs.eps), 2))


def _torch_backward(
    inputs: SavedInputs, grad_y: Tensor, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    leaves = [t.clone().requires_grad_() for t in (inputs.weight, inputs.bias) if t is not None]
    with torch.enable_grad():
        y = _torch_layers(inputs, leaves[0], leaves[1] if len(leaves) == 2 else None)
    grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
    grad_weight = grads[0].to(grad_y.dtype)
    if not need_bias:
        return grad_weight, None
    # Without a bias the gradient of one is still 0.
    bias = grads[1].to(grad_y.dtype) if len(grads) == 2 else grad_y.new_zeros(len(grad_weight))
    return grad_weight, bias
