"""Mixing patches: copy-paste of a box, with the targets, weights and ignore maps.

Axes: B batch, C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_CUBE_SIDE = 2 / 3  # of the side of the patch
_ALPHA = 4.0


def draw_cubes(
    num: int,
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a cube for each patch of a batch, of 2/3 of each of its sides.

    Args:
        num: Number of patches B.
        patch_size: Their shape, in voxels.
        generator: Source of the draw, on the CPU; it is all that the cubes depend on.
        probability: Probability that a patch gets a cube at all.
        device: Of what is returned; nothing is copied to it.

    Returns:
        (B, 1, I, J, K) bool, True inside the cube.

    Source: Bai et al. 2023 (BCP), section 3.1; the side of 2/3.
    """
    return _draw_parts([_CUBE_SIDE] * num, patch_size, generator, probability, device)


def draw_boxes(
    num: int,
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a box of random size for each patch of a batch: CutMix with any number of axes.

    The share of the patch's volume is drawn from Beta(4, 4), whose mean is 1/2; each side is the
    same fraction of the patch, to the nearest voxel. Arguments and result as for `draw_cubes`.

    Source: Yun et al. 2019 (CutMix), section 3.1. Departure: the box is placed inside the patch,
        rather than cut off at its faces, so the share is the one that was drawn.
    """
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator).item())
    volumes = np.random.default_rng(seed).beta(_ALPHA, _ALPHA, size=num).tolist()
    shares = [volume ** (1 / len(patch_size)) for volume in volumes]
    return _draw_parts(shares, patch_size, generator, probability, device)


def paste(into: Tensor, source: Tensor, cubes: Tensor) -> Tensor:
    """Return ``into`` with ``source`` inside the cubes or boxes; both (B, C, I, J, K)."""
    return torch.where(cubes, source, into)


def _draw_parts(
    shares: Sequence[float],
    patch_size: tuple[int, ...],
    generator: torch.Generator,
    probability: float,
    device: torch.device | str,
) -> Tensor:
    """Draw a box for each patch, by the share of the patch's sides that its sides have."""
    parts = torch.zeros((len(shares), 1, *patch_size), dtype=torch.bool, device=device)
    for index, share in enumerate(shares):
        chosen = torch.rand((), generator=generator).item() < probability
        box = _draw_box(patch_size, share, generator)
        if chosen:
            parts[index, 0][box].fill_(True)
    return parts


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
