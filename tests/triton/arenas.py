"""Tensors that lie in one, with gaps of poison between them.

ttsem knows the tensors that a launch is given, and takes any other address for a mistake. Kernels
that reach several tensors from one are shown tensors of the same memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LINE = 16


class Arena:
    """Room for tensors of one dtype; what no tensor covers holds a poison."""

    def __init__(self, dtype: torch.dtype, entries: int, poison: float, device: str) -> None:
        self.memory = torch.full((entries,), poison, dtype=dtype, device=device)
        self.covered = torch.zeros(entries, dtype=torch.bool)
        self.poison = poison
        self._end = 0

    def take(self, shape: Sequence[int], *, aligned: bool = True) -> Tensor:
        """Return the next tensor, at a multiple of 16 bytes or one entry behind it."""
        per_line = max(1, _LINE // self.memory.element_size())
        begin = -(-self._end // per_line) * per_line + (0 if aligned else 1)
        n = torch.Size(shape).numel()
        self._end = begin + n + 1
        assert self._end <= self.memory.numel()
        self.covered[begin : begin + n] = True
        return self.memory[begin : begin + n].view(shape)

    def gaps_are_untouched(self) -> bool:
        """Whether nothing was written beside the tensors."""
        gaps = self.memory.cpu()[~self.covered]
        return bool(
            (gaps != gaps).all() if self.poison != self.poison else (gaps == self.poison).all()
        )


def in_arena(
    tensors: Sequence[Tensor], poison: float, device: str, *, skewed: bool
) -> list[Tensor]:
    """Copies in one arena for each dtype; with `skewed`, every other one off a multiple of 16."""
    room = sum(t.numel() + 2 * _LINE for t in tensors)
    arenas = {t.dtype: Arena(t.dtype, room, poison, device) for t in tensors}
    copies = []
    for i, tensor in enumerate(tensors):
        copy = arenas[tensor.dtype].take(tensor.shape, aligned=not (skewed and i % 2))
        copies.append(copy.copy_(tensor))
    return copies
