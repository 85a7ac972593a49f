"""Pure functions on logits: supervised, entropy and consistency losses, and the ramps of weights.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D). Logits are
(B, C, I, J, K) in any floating dtype and are computed with in float32. `weight` is a map
(B, 1, I, J, K) that scales each voxel's loss, `valid` a bool map of the same shape that says which
voxels count at all. Every mean is over the valid voxels, whatever they weigh: dividing by the
accepted voxels only would let a few of them make a huge gradient.
"""

import torch
from torch import Tensor


def mean_over_valid(values: Tensor, weight: Tensor | None, valid: Tensor | None) -> Tensor:
    """Return the sum of weight * values over the valid voxels, divided by the number of these.

    Voxels that are not valid give exactly zero gradient, non-finite ones included. Without any
    valid voxel the mean is zero.

    Args:
        values: Loss of each voxel, (B, 1, I, J, K).
        weight: Weight of each voxel, (B, 1, I, J, K); None means 1 everywhere.
        valid: Bool, (B, 1, I, J, K); None means every voxel.

    Raises:
        ValueError: A map has another shape than `values`, or `valid` is not bool.
    """
    check_map("weight", weight, values.shape)
    values = replace_ignored(values, valid)
    if weight is not None:
        values = values * replace_ignored(weight.detach().float(), valid)
    return values.sum() / (values.numel() if valid is None else valid.sum().clamp(min=1))


def replace_ignored(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the values with 0 at every voxel that is not valid, which cuts the gradient there.

    Done to logits before their softmax: a factor 0 behind it would turn non-finite logits of
    ignored voxels into a non-finite gradient.

    Args:
        values: (B, C, I, J, K) or (B, 1, I, J, K).
        valid: Bool, (B, 1, I, J, K); None means every voxel.

    Raises:
        ValueError: `valid` has another shape, or is not bool.
    """
    check_map("valid", valid, values.shape)
    return values if valid is None else torch.where(valid, values, 0.0)


def check_map(name: str, voxels: Tensor | None, shape: torch.Size) -> None:
    """Refuse a voxel map that would broadcast silently instead of matching voxel by voxel.

    Args:
        name: "weight" or "valid" (bool), for the message.
        voxels: The map, or None.
        shape: The shape wanted; its second axis is taken as 1.

    Raises:
        ValueError: The map has another shape, or `valid` is not bool.
    """
    if voxels is None:
        return
    wanted = (shape[0], 1, *shape[2:])
    if tuple(voxels.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(voxels.shape)}, but the logits ask for {wanted}")
    if name == "valid" and voxels.dtype != torch.bool:
        raise ValueError(f"valid has dtype {voxels.dtype}, but it is a bool map")
