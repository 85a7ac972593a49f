"""Mixing patches: copy-paste of a box, with the targets, weights and ignore maps.

Axes: B batch, C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_cubes(
    num: int,
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    share: float = 2 / 3,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a cube for each patch of a batch.

    Args:
        num: Number of patches B.
        patch_size: Their shape, in voxels.
        generator: Source of the draw, on the CPU.
        probability: Probability that a patch gets a cube at all.
        share: Side of the cube, as a fraction of the patch, per axis.
        device: Of what is returned; nothing is copied to it.

    Returns:
        (B, 1, I, J, K) bool, True inside the cube.

    Source: Bai et al. 2023 (BCP), section 3.1; the side of 2/3.
    """
    cubes = torch.zeros((num, 1, *patch_size), dtype=torch.bool, device=device)
    for index in range(num):
        chosen = torch.rand((), generator=generator).item() < probability
        box = _draw_box(patch_size, share, generator)
        if chosen:
            cubes[index, 0][box].fill_(True)
    return cubes


def draw_boxes(
    num: int,
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    alpha: float = 4.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a box of random size for each patch of a batch: CutMix with any number of axes.

    Args:
        num: Number of patches B.
        patch_size: Their shape, in voxels.
        generator: Source of the draw, on the CPU; it is all that the boxes depend on.
        probability: Probability that a patch gets a box at all.
        alpha: The share of the patch's volume is drawn from Beta(alpha, alpha), whose mean is 1/2;
            each side is the same fraction of the patch, to the nearest voxel.
        device: Of what is returned; nothing is copied to it.

    Returns:
        (B, 1, I, J, K) bool, True inside the box.

    Raises:
        ValueError: alpha is not above 0.

    Source: Yun et al. 2019 (CutMix), section 3.1. Departure: the box is placed inside the patch,
        rather than cut off at its faces, so the share is the one that was drawn.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator).item())
    volumes = np.random.default_rng(seed).beta(alpha, alpha, size=num)
    boxes = torch.zeros((num, 1, *patch_size), dtype=torch.bool, device=device)
    for index, volume in enumerate(volumes.tolist()):
        chosen = torch.rand((), generator=generator).item() < probability
        box = _draw_box(patch_size, volume ** (1 / len(patch_size)), generator)
        if chosen:
            boxes[index, 0][box].fill_(True)
    return boxes


def paste(into: Tensor, source: Tensor, cubes: Tensor) -> Tensor:
    """Return ``into`` with ``source`` inside the cubes or boxes; both (B, C, I, J, K)."""
    return torch.where(cubes, source, into)


def _draw_box(
    patch_size: tuple[int, ...], share: float, generator: torch.Generator
) -> tuple[slice, ...]:
    """Draw where a box lies whose sides are this share of the patch's."""
    box = []
    for size in patch_size:
        side = max(1, round(share * size))
        start = int(torch.randint(0, size - side + 1, (), generator=generator).item())
        box.append(slice(start, start + side))
    return tuple(box)
