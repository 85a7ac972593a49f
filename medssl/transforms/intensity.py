"""Weak and strong intensity views: MONAI transforms with a stated range for each.

Images are normalized, so ranges are in standard deviations of the scan. Axes: C channels,
I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandBiasField,
    RandCoarseDropout,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
    RandSimulateLowResolution,
    Transform,
)
from monai.utils.enums import InterpolateMode
from torch import Tensor


def build_intensity(strength: float, dimension: int = 3) -> Compose:
    """Build the intensity augmentation of labeled patches and, stronger, of strong views.

    Args:
        strength: 1 is nnU-Net's augmentation; 2 is the strong view; probabilities and ranges
            grow with it.
        dimension: 2 for patches (C, I, J), 3 for (C, I, J, K).

    Source: Isensee et al. 2021 (nnU-Net), supplementary note 4.
    """
    often = min(1.0, 0.15 * strength)
    steps: list[Transform] = [
        RandBiasField(prob=often, degree=3, coeff_range=(0.0, 0.1)),
        RandGaussianSmooth((0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=often),
        RandSimulateLowResolution(
            prob=often,
            zoom_range=(0.5, 1.0),
            downsample_mode="area",  # the default picks voxels: a shift against the label
            upsample_mode=InterpolateMode.TRILINEAR if dimension == 3 else InterpolateMode.BILINEAR,
        ),
        RandScaleIntensity(factors=0.25 * strength, prob=min(1.0, 2 * often)),
        RandShiftIntensity(offsets=0.2 * strength, prob=min(1.0, 2 * often)),
        RandAdjustContrast(prob=min(1.0, 2 * often), gamma=(0.7, 1.5), retain_stats=True),
        RandGaussianNoise(prob=often, std=0.15 * strength),
    ]
    return Compose(steps)


def build_occlusion(patch_size: tuple[int, ...], strength: float) -> Compose:
    """Build the occlusion of strong views: up to three boxes of up to a quarter of each side."""
    smallest = tuple(max(1, n // 10) for n in patch_size)
    largest = tuple(max(2, n // 4) for n in patch_size)
    drop = RandCoarseDropout(
        holes=1,
        max_holes=3,
        spatial_size=smallest,
        max_spatial_size=largest,
        fill_value=0.0,
        prob=min(1.0, 0.25 * strength),
    )
    return Compose([drop])


def apply_seeded(transform: Compose, patch: Tensor, seed: int) -> Tensor:
    """Return the patch (C, I, J, K) under the draw that belongs to the seed.

    All transforms draw from one source: MONAI would seed one of each, which takes as long as to
    apply them. It is of another kind than that of the geometry, whose seed may be the same.
    """
    source = np.random.RandomState(np.random.SFC64(seed))
    for step in transform.transforms:
        step.set_random_state(state=source)
    result = torch.as_tensor(transform(patch.clone()), dtype=torch.float32)
    return result.as_subclass(Tensor)
