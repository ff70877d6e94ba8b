"""Exact magnitude pruning: which weights stay, and making a model hold the choice."""

from sparsekit.masks import masks_of, prunable_parameters
from sparsekit.prune.held import adopt_torch_masks, apply_masks, check_masks, zero_outside
from sparsekit.prune.magnitude import magnitude_masks, paper_masks
from sparsekit.prune.vote import majority_vote

__all__ = [
    "adopt_torch_masks",
    "apply_masks",
    "check_masks",
    "magnitude_masks",
    "majority_vote",
    "masks_of",
    "paper_masks",
    "prunable_parameters",
    "zero_outside",
]
