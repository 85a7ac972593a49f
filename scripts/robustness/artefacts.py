"""MR artefacts in five severities, by torchio, which the extra `robust` brings.

A scan is corrupted as it was read, on its own grid: its label stays as it is. Slices are taken one
by one, as most of them are acquired: along the coarsest axis nothing moves, blurs or gets coarser,
and what happens in k-space happens in that of a slice. The last axis is that of phase encoding.
How strong an artefact is stands in `STRENGTHS`; where it falls (signs, places, noise) is drawn by
case and artefact, so that all models see the same scans, and severities of a case differ in
strength alone. Intensities are shares of the range from the scan's 0.5 to its 99.5 percentile.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medssl.config import InputError
from medssl.runs import seed_from
from medssl.transforms.geometry import Spacing, Volume
from medssl.transforms.preprocess import measure_percentiles

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS = {
    "motion": (0.4, 0.8, 1.3, 2.0, 3.0),
    "ghosting": (0.25, 0.5, 0.8, 1.1, 1.5),
    "spike": (0.04, 0.08, 0.12, 0.16, 0.2),
    "bias_field": (0.5, 1.0, 1.5, 2.0, 2.5),
    "noise": (0.02, 0.04, 0.06, 0.09, 0.12),
    "blur": (0.5, 0.8, 1.1, 1.4, 1.8),
    "low_resolution": (1.5, 2.0, 2.5, 3.0, 3.5),
    "contrast": (0.15, 0.3, 0.45, 0.6, 0.8),
}
"""How strong each artefact is in the severities 1 to 5, from what a reader hardly sees to what is
bad and can still be recognized (looked at on cardiac and hippocampal MR):

==============  ==================================================================================
motion          degrees, and voxels, of each of four movements between parts of k-space
ghosting        share that is missing of every line of k-space that is taken in one of its phases
spike           half the height of the stripes that one point of k-space makes, share of the range
bias_field      norm of the coefficients of a quadratic polynomial, the logarithm of the field
noise           standard deviation, as a share of the range
blur            standard deviation, voxels: that of scans of any resolution looks alike
low_resolution  how many voxels, along either axis of a slice, become one
contrast        logarithm of the exponent, one way or the other
==============  ==================================================================================
"""

MARGIN = 8  # voxels of the border that a slice goes on with, so that nothing comes from beyond it
NUM_MOVEMENTS = 4  # even: the middle of k-space is taken without one
NUM_GHOSTS = 4
SPIKE_RADIUS = 0.1  # of the spike from the middle of k-space, share of its width
ORDER = 2  # of the polynomial
NUM_COEFFICIENTS = 10  # that a quadratic polynomial of three variables has

Sizes = tuple[float, float, float]
"""Voxel size in mm along the slices, and within them."""


def load_torchio() -> Any:
    """Return torchio.

    Raises:
        InputError: It is not installed.
    """
    try:
        import torchio
    except ImportError as error:
        raise InputError("artefacts need torchio: pip install 'medssl[robust]'") from error
    return torchio


def _move(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    angles, first, second = strength * rng.choice([-1.0, 1.0], (3, NUM_MOVEMENTS))
    still = np.zeros(NUM_MOVEMENTS)
    return load_torchio().Motion(
        degrees=np.column_stack([angles, still, still]),
        translation=np.column_stack([still, first * sizes[1], second * sizes[2]]),
        times=np.arange(1, NUM_MOVEMENTS + 1) / (NUM_MOVEMENTS + 1),
        image_interpolation="linear",
    )(image)


def _ghost(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    options = {"num_ghosts": NUM_GHOSTS, "axis": 2, "restore": None}
    return load_torchio().Ghosting(intensity=strength, **options)(image)


def _spike(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    angle = rng.uniform(0, 2 * math.pi)
    place = 0.5 + SPIKE_RADIUS * np.array([[0.0, math.cos(angle), math.sin(angle)]])
    largest = float(torch.fft.fftn(image.data[0]).abs().max()) / image.data[0].numel()
    return load_torchio().Spike(spikes_positions=place, intensity=strength / largest)(image)


def _bias(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    coefficients = np.append(0.0, rng.uniform(-1, 1, NUM_COEFFICIENTS - 1))
    coefficients *= strength / np.linalg.norm(coefficients)
    return load_torchio().BiasField(coefficients=coefficients.tolist(), order=ORDER)(image)


def _add_noise(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    return load_torchio().Noise(mean=0.0, std=strength, seed=int(rng.integers(2**31)))(image)


def _blur(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    return load_torchio().Blur(std=(0.0, strength * sizes[1], strength * sizes[2]))(image)


def _coarsen(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    tio = load_torchio()
    coarse = tio.Resample((sizes[0], strength * sizes[1], strength * sizes[2]), antialias=True)
    return tio.Resample((image.spatial_shape, image.affine))(coarse(image))


def _change_contrast(image: Any, strength: float, rng: np.random.Generator, sizes: Sizes) -> Any:
    return load_torchio().Gamma(gamma=math.exp(strength * rng.choice([-1.0, 1.0])))(image)


TRANSFORMS: dict[str, Callable[[Any, float, np.random.Generator, Sizes], Any]] = {
    "motion": _move,
    "ghosting": _ghost,
    "spike": _spike,
    "bias_field": _bias,
    "noise": _add_noise,
    "blur": _blur,
    "low_resolution": _coarsen,
    "contrast": _change_contrast,
}


def corrupt_scan(volume: Volume, case_id: str, artefact: str, severity: int) -> Volume:
    """Return a scan with an artefact, on the same grid.

    Args:
        volume: The scan (C, I, J, K) as read.
        case_id: Whose artefact it is: that of a case falls alike in every call.
        artefact: One of `STRENGTHS`.
        severity: 1 to 5.

    Raises:
        InputError: torchio is not installed.

    Source: Perez-Garcia et al. 2021, TorchIO; Hendrycks and Dietterich 2019 (severities).
    """
    tio = load_torchio()
    axis = find_slice_axis(volume.spacing)
    first, second = (size for a, size in enumerate(volume.spacing) if a != axis)
    sizes = (volume.spacing[axis], first, second)
    ranges = np.array([(low, high) for low, _, high in measure_percentiles(volume)])
    low, width = (
        part.reshape(-1, 1, 1, 1) for part in (ranges[:, 0], np.ptp(ranges, axis=1).clip(1e-6))
    )
    slices = np.moveaxis((volume.array - low) / width, 1 + axis, 1)
    margins = [(0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)]
    tensor = torch.from_numpy(np.pad(slices, margins, "edge").astype(np.float32))
    affine = np.diag([*sizes, 1.0])  # its origin is the middle, about which torchio's motion turns
    affine[:3, 3] = -np.array(sizes) * (np.array(tensor.shape[1:]) - 1) / 2
    rng = np.random.default_rng(seed_from("artefact", case_id, artefact))
    image = tio.ScalarImage(tensor=tensor, affine=affine)
    image = TRANSFORMS[artefact](image, STRENGTHS[artefact][severity - 1], rng, sizes)
    inner = image.numpy()[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    corrupted = np.moveaxis(inner, 1, 1 + axis) * width + low
    return replace(volume, array=np.ascontiguousarray(corrupted, np.float32))


def find_slice_axis(spacing: Spacing) -> int:
    """Return the axis of the slices of a scan: the coarsest one, the last of several.

    Example:
        >>> find_slice_axis((1.5, 1.5, 8.0)), find_slice_axis((1.0, 1.0, 1.0))
        (2, 2)
    """
    return max(range(3), key=lambda axis: (round(spacing[axis], 3), axis))
