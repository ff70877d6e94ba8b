"""Names for the types that cross module borders."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

State: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name, in the order of ``state_dict()``."""

Masks: TypeAlias = Mapping[str, Tensor]
"""Bool tensors by parameter name; True keeps the weight."""

Size3: TypeAlias = tuple[int, int, int]
"""Extent along depth, height and width."""

Shape: TypeAlias = Sequence[int]
