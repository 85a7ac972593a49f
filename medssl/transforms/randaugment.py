"""RandAugment in 3D and 2D: a few operations per patch, all at one magnitude from 0 to 30.

The magnitude goes linearly from 0, where every operation leaves the patch as it is, to 30:

=============== =================================================================== ===========
operation       its value, in the unit of the table                                 at 30
=============== =================================================================== ===========
noise           Gaussian noise: sd, in sd of the scan                               0.5
blur            Gaussian blur: sd of the kernel, in voxels                          2.0
sharpen         what a blur of 1 voxel takes away, added so many times              2.0
brightness      shift, in sd of the scan                                            +1.0, -1.0
contrast        scale about the mean of a channel: fraction above or below 1        +0.7, -0.7
gamma           log2 of the exponent, over the range of a channel; mean, sd kept    +1.0, -1.0
bias_field      largest coefficient of a field exp(polynomial of degree 3)          0.3
low_resolution  zoom out to larger voxels, then back in: fraction below 1           0.6
gibbs           share of the radius of k-space (half its diagonal) that is cut off  0.6
histogram       share of the way to a random monotone map of 5 nodes                1.0
occlusion       side of a box of zeros, as a fraction of the patch                  0.5
rotate          angle in one of the planes of axes, in degrees, rigid in mm         +30, -30
scale           field of view of the patch: fraction above or below 1               +0.3, -0.3
shear           shift along one axis per mm along another, in mm                    +0.3, -0.3
translate       shift along one axis, as a fraction of the patch                    +0.2, -0.2
=============== =================================================================== ===========

The last four are spatial: they join the one spatial draw of a patch, so that the voxels of all its
views and of its target still correspond. A lower resolution, a cut of k-space and an occlusion grow
in steps of whole voxels, and the first step of a lower resolution, which averages neighbors, is the
largest; all the others grow steadily. Images are normalized, so their sd is 1 and 0 is their mean.
Axes: C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import (
    AdjustContrast,
    GaussianSmooth,
    GibbsNoise,
    RandBiasField,
    RandCoarseDropout,
    RandGaussianNoise,
    RandHistogramShift,
    RandSimulateLowResolution,
    ScaleIntensityFixedMean,
    ShiftIntensity,
    Transform,
)
from numpy.typing import NDArray
from torch import Tensor

from medssl.runs import seed_from
from medssl.transforms.spatial import build_turn

LARGEST_MAGNITUDE = 30.0
LARGEST_VALUES = {
    "noise": 0.5,
    "blur": 2.0,
    "sharpen": 2.0,
    "brightness": 1.0,
    "contrast": 0.7,
    "gamma": 1.0,
    "bias_field": 0.3,
    "low_resolution": 0.6,
    "gibbs": 0.6,
    "histogram": 1.0,
    "occlusion": 0.5,
    "rotate": 30.0,
    "scale": 0.3,
    "shear": 0.3,
    "translate": 0.2,
}
SIGNED = frozenset({"brightness", "contrast", "gamma", "rotate", "scale", "shear", "translate"})


@dataclass(frozen=True)
class Operation:
    """One drawn operation.

    ``value`` is in the unit of the table above; ``place`` in [0, 1) says which axis or which plane
    a spatial operation is about, whatever the number of axes.
    """

    name: str
    value: float
    place: float


def draw_operations(
    rng: np.random.Generator, num_operations: int, magnitude: float
) -> tuple[Operation, ...]:
    """Draw the operations of a patch, uniformly and none of them twice.

    Args:
        rng: Source of the draw; which operations it gives does not depend on the magnitude.
        num_operations: How many operations.
        magnitude: Strength of all of them, 0 (nothing changes) to 30.

    Raises:
        ValueError: There are not so many operations, or the magnitude is out of its range.

    Source: Cubuk et al. 2020, RandAugment, section 3, with operations for scans in place of those
        for photographs. Departure: without replacement, so that two blurs never meet.
    """
    if not 0 <= num_operations <= len(LARGEST_VALUES):
        raise ValueError(f"num_operations is 0 to {len(LARGEST_VALUES)}, got {num_operations}")
    if not 0.0 <= magnitude <= LARGEST_MAGNITUDE:
        raise ValueError(f"magnitude is 0 to {LARGEST_MAGNITUDE:g}, got {magnitude}")
    names = rng.permutation(list(LARGEST_VALUES))[:num_operations]
    drawn = []
    for name in map(str, names):
        side, place = rng.random(2)
        sign = -1.0 if name in SIGNED and side < 0.5 else 1.0
        value = sign * LARGEST_VALUES[name] * magnitude / LARGEST_MAGNITUDE
        drawn.append(Operation(name, value, float(place)))
    return tuple(drawn)


def spatial_matrix(
    operations: Sequence[Operation], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the spatial operations add to the spatial draw of a patch.

    Args:
        operations: Drawn operations; those of intensity are passed over.
        spacing: Voxel size in mm, per axis.

    Returns:
        A matrix (3, 3) from patch to volume offsets, in voxels, and an offset (3,), as a fraction
        of the patch; (2, 2) and (2,) for two axes.
    """
    steps = np.array(spacing, dtype=float)
    matrix, offset = np.eye(len(steps)), np.zeros(len(steps))
    for operation in operations:
        if operation.name == "translate":
            offset[int(operation.place * len(steps))] += operation.value
        else:
            matrix = _build_matrix(operation, len(steps)) @ matrix
    return np.diag(1 / steps) @ matrix @ np.diag(steps), offset


def apply_intensity(operations: Sequence[Operation], patch: Tensor, seed: int) -> Tensor:
    """Return the patch (C, I, J, K) or (C, I, J) float32 under the intensity operations, in order.

    Args:
        operations: Drawn operations; spatial ones are passed over.
        patch: Normalized image; it is left as it is.
        seed: Where noise, field, map and box come from; the same seed gives the same bits, and the
            same noise, field and map for any magnitude.
    """
    result = patch.clone()
    for operation in operations:
        change = _INTENSITY.get(operation.name)
        if change is not None and operation.value != 0.0:
            result = change(result, operation.value, seed_from(seed, operation.name) % 2**32)
    return result


def _build_matrix(operation: Operation, num_axes: int) -> NDArray[np.float64]:
    """Return one operation as a matrix from patch to volume offsets, in mm."""
    matrix = np.eye(num_axes)
    axes = range(num_axes)
    if operation.name == "rotate":
        planes = [(a, b) for a in axes for b in axes if a < b]
        plane = planes[int(operation.place * len(planes))]
        return build_turn(num_axes, plane, math.radians(operation.value))
    if operation.name == "scale":
        matrix *= 1.0 + operation.value
    elif operation.name == "shear":
        pairs = [(a, b) for a in axes for b in axes if a != b]
        matrix[pairs[int(operation.place * len(pairs))]] = operation.value
    return matrix


def _apply(transform: Transform, patch: Tensor) -> Tensor:
    """Return the patch under a MONAI transform, without the metadata that MONAI adds."""
    result = torch.as_tensor(transform(patch), dtype=torch.float32).as_subclass(Tensor)
    return result.contiguous()


def _add_noise(patch: Tensor, value: float, seed: int) -> Tensor:
    """Add Gaussian noise."""
    transform = RandGaussianNoise(prob=1.0, std=value, sample_std=False)
    return _apply(transform.set_random_state(seed), patch)


def _blur(patch: Tensor, value: float, seed: int) -> Tensor:
    """Blur; beyond its faces the patch goes on as at its faces, where MONAI alone has zeros."""
    width = math.ceil(4 * value)
    padded = F.pad(patch[None], [width] * (2 * (patch.ndim - 1)), mode="replicate")[0]
    inner = tuple(slice(width, width + n) for n in patch.shape[1:])
    return _apply(GaussianSmooth(value), padded)[(slice(None), *inner)]


def _sharpen(patch: Tensor, value: float, seed: int) -> Tensor:
    """Add what a blur takes away: MONAI's GaussianSharpen without the blur that comes first."""
    return patch + value * (patch - _blur(patch, 1.0, seed))


def _shift(patch: Tensor, value: float, seed: int) -> Tensor:
    """Shift the intensities."""
    return _apply(ShiftIntensity(value), patch)


def _scale_contrast(patch: Tensor, value: float, seed: int) -> Tensor:
    """Scale the intensities about the mean of each channel."""
    return _apply(ScaleIntensityFixedMean(value, channel_wise=True), patch)


def _bend_gamma(patch: Tensor, value: float, seed: int) -> Tensor:
    """Raise each channel to a power over its own range."""
    transform = AdjustContrast(2.0**value, retain_stats=True)
    return torch.cat([_apply(transform, channel[None]) for channel in patch])


def _multiply_field(patch: Tensor, value: float, seed: int) -> Tensor:
    """Multiply with a smooth field; a field multiplies what is measured, so from the minimum on."""
    low = patch.flatten(1).amin(1).reshape(-1, *[1] * (patch.ndim - 1))
    transform = RandBiasField(prob=1.0, degree=3, coeff_range=(-value, value))
    return _apply(transform.set_random_state(seed), patch - low) + low


def _lower_resolution(patch: Tensor, value: float, seed: int) -> Tensor:
    """Average to larger voxels and interpolate back; picking voxels would shift the patch."""
    transform = RandSimulateLowResolution(
        prob=1.0,
        downsample_mode="area",
        upsample_mode="trilinear" if patch.ndim == 4 else "bilinear",
        zoom_range=(1.0 - value, 1.0 - value),
    )
    return _apply(transform, patch)


def _cut_frequencies(patch: Tensor, value: float, seed: int) -> Tensor:
    """Cut off the outer part of k-space: ringing at edges."""
    return _apply(GibbsNoise(value), patch)


def _shift_histogram(patch: Tensor, value: float, seed: int) -> Tensor:
    """Go a share of the way to a random monotone map of each channel's range."""
    mapped = []
    for channel in patch:
        transform = RandHistogramShift(num_control_points=5, prob=1.0).set_random_state(seed)
        is_even = bool(channel.amin() == channel.amax())
        mapped.append(channel[None] if is_even else _apply(transform, channel[None]))
    return torch.lerp(patch, torch.cat(mapped), value)


def _occlude(patch: Tensor, value: float, seed: int) -> Tensor:
    """Fill a box with zeros."""
    sides = tuple(max(1, round(value * n)) for n in patch.shape[1:])
    transform = RandCoarseDropout(holes=1, spatial_size=sides, fill_value=0.0, prob=1.0)
    return _apply(transform.set_random_state(seed), patch)


_INTENSITY: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": _add_noise,
    "blur": _blur,
    "sharpen": _sharpen,
    "brightness": _shift,
    "contrast": _scale_contrast,
    "gamma": _bend_gamma,
    "bias_field": _multiply_field,
    "low_resolution": _lower_resolution,
    "gibbs": _cut_frequencies,
    "histogram": _shift_histogram,
    "occlusion": _occlude,
}
