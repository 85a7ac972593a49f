"""Pure functions on logits: supervised, entropy and consistency losses, and the ramps of weights.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D). The losses share
these arguments:

- `logits`: (B, C, I, J, K) in any floating dtype; all is computed in float32.
- `target`: classes (B, 1, I, J, K) of integers, 255 = ignore, or probs (B, C, I, J, K) of a
  floating dtype. No gradient flows into it.
- `weight`: (B, 1, I, J, K), scales the loss of each voxel; None means 1 everywhere. It does not
  enter the denominator of a mean.
- `valid`: bool (B, 1, I, J, K); voxels that are False are ignored like those with 255, and give
  exactly zero gradient. None means every voxel.

A map whose shape does not fit the logits, or a `valid` that is not bool, raises a ValueError. Every
mean is over the valid voxels, whatever they weigh: dividing by the accepted voxels only would let a
few of them make a huge gradient.
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
        shape: The expected shape; its second axis is taken as 1.

    Raises:
        ValueError: The map has another shape, or `valid` is not bool.
    """
    if voxels is None:
        return
    expected = (shape[0], 1, *shape[2:])
    if tuple(voxels.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(voxels.shape)}, but the logits ask for {expected}"
        )
    if name == "valid" and voxels.dtype != torch.bool:
        raise ValueError(f"valid has dtype {voxels.dtype}, but it is a bool map")
