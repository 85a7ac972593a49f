"""Mixing patches: copy-paste of a cube, with the targets, weights and ignore maps.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_cubes(
    num: int,
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    share: float = 2 / 3,
) -> Tensor:
    """Draw a cube for each patch of a batch.

    Args:
        num: Number of patches B.
        patch_size: Their shape, in voxels.
        generator: Source of the draw, on the CPU.
        probability: Probability that a patch gets a cube at all.
        share: Side of the cube, as a fraction of the patch, per axis.

    Returns:
        (B, 1, I, J, K) bool, True inside the cube.

    Source: Bai et al. 2023 (BCP), section 3.1; the side of 2/3.
    """
    cubes = torch.zeros((num, 1, *patch_size), dtype=torch.bool)
    for index in range(num):
        chosen = torch.rand((), generator=generator).item() < probability
        box = []
        for size in patch_size:
            side = max(1, round(share * size))
            start = int(torch.randint(0, size - side + 1, (), generator=generator).item())
            box.append(slice(start, start + side))
        if chosen:
            cubes[index, 0][tuple(box)] = True
    return cubes


def paste(into: Tensor, source: Tensor, cubes: Tensor) -> Tensor:
    """Return ``into`` with ``source`` inside the cubes; both (B, C, I, J, K)."""
    return torch.where(cubes, source, into)
