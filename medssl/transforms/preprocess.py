"""From a scan on its own grid to what the network sees: one stored recipe, applied for ever.

Legend: C channels, I J K voxel axes. The recipe is decided once per plan, travels with the
model, and is applied unchanged to every later scan. No statistic of a scan depends on a label.
"""

import math
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from medssl.config import IGNORE, InputError, Millimeters
from medssl.machine import count_free_memory
from medssl.transforms.geometry import (
    Affine,
    Shape,
    Volume,
    cache_grid,
    grid_spacing,
    resample,
    show_sizes,
)
from medssl.transforms.normalize import HIGH, LOW, normalize

MOST_VOXELS = 2**31  # of a cache grid that is finer than its scan


class Normalization(BaseModel):
    """How one channel is normalized.

    `zscore`: clip to the scan's own 0.5 and 99.5 percentiles, subtract the mean, divide by the
    standard deviation; over non-zero voxels if more than a third of them are exactly zero.
    `ct`: clip to `low` and `high`, subtract `mean`, divide by `std`: numbers (in HU) that were
    taken once from the labeled foreground, the same for every scan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["zscore", "ct"]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_set = [x is not None for x in (self.low, self.high, self.mean, self.std)]
        if self.kind == "zscore" and any(is_set):
            raise ValueError("zscore takes its numbers from each scan: give none")
        if self.kind == "ct" and not all(is_set):
            raise ValueError("ct needs low, high, mean and std")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        return self


class Preprocessing(BaseModel):
    """The recipe: spacing of the cache grid along right, anterior, superior in mm; channels.

    A spacing of None keeps that of each scan. In pictures the unit is the pixel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spacing: tuple[Millimeters | None, Millimeters | None, Millimeters | None]
    normalization: tuple[Normalization, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(step is not None and step <= 0 for step in self.spacing):
            raise ValueError(f"spacing must be above 0 mm, got {self.spacing}")
        if not self.normalization:
            raise ValueError("normalization needs one entry per channel, got none")
        return self


def preprocess_image(volume: Volume, recipe: Preprocessing, overwrite: bool = False) -> Volume:
    """Normalize a scan and bring it to the cache grid.

    The numbers of a z-score are taken on the native grid, so they do not depend on the spacing
    that the plan chose.

    Args:
        volume: The scan (C, I, J, K) as read.
        recipe: The stored recipe.
        overwrite: Whether the voxels of the scan may be written over, which saves a copy of them.

    Returns:
        The scan (C, I, J, K) float32 on its cache grid.

    Raises:
        InputError: The scan holds NaN or infinity, or other channels than the recipe, or its cache
            grid is larger than the memory.
    """
    num_channels = volume.array.shape[0]
    if num_channels != len(recipe.normalization):
        raise InputError(
            f"the scan has {num_channels} channels, the model was made for "
            f"{len(recipe.normalization)}: give the channels it was trained on, in their order"
        )
    num_bad = sum(
        plane.size - np.count_nonzero(np.isfinite(plane))
        for channel in volume.array
        for plane in channel
    )
    if num_bad:
        raise InputError(
            f"{num_bad} of {volume.array.size} voxels are NaN or infinite: "
            "replace them (by the value of air or background) and try again"
        )
    shape, affine = cache_grid(volume.shape, volume.affine, recipe.spacing)
    _refuse_huge(volume, shape, affine)
    normalized = volume.array if overwrite else np.empty(volume.array.shape, np.float32)
    for index, how in enumerate(recipe.normalization):
        normalize(volume.array[index], **how.model_dump(), out=normalized[index])
    resampled = resample(normalized, volume.affine, shape, affine, "linear")
    return Volume(resampled, affine, volume.has_spacing)


def count_bytes(shape: Shape, affine: Affine, recipe: Preprocessing) -> int:
    """Return the bytes that a scan takes at most while it is looked at and preprocessed.

    They are those of the scan, and beside it either what the statistics of one channel copy, or
    what the scan is resampled into.

    Args:
        shape: Shape (I, J, K) of the scan.
        affine: Affine (4, 4) of the scan.
        recipe: The stored recipe.
    """
    grid_shape, grid = cache_grid(shape, affine, recipe.spacing)
    native, num_channels = math.prod(shape), len(recipe.normalization)
    look = 9 if any(how.kind == "zscore" for how in recipe.normalization) else 4
    is_same = np.allclose(grid, affine, atol=1e-6)  # then nothing is resampled or turned
    resampled = 0 if is_same else 4 * num_channels * math.prod(grid_shape)
    return 4 * num_channels * native + max(look * native, resampled)


def _refuse_huge(volume: Volume, shape: Shape, affine: Affine) -> None:
    """Refuse a cache grid that the memory, or anyone's patience, is too small for."""
    num_voxels = math.prod(shape)
    needed = 4 * num_voxels * volume.array.shape[0]
    most = max(MOST_VOXELS, math.prod(volume.shape))
    if num_voxels <= most and needed <= count_free_memory():
        return
    old, new = show_sizes(volume.spacing), show_sizes(grid_spacing(affine))
    raise InputError(
        f"{volume.shape} voxels of {old} mm become {shape} of {new} mm, {needed / 2**30:.3g} GiB, "
        "more than can be computed here: is the voxel size in its header right? If so, cut the "
        "scan, or take a coarser plan.spacing"
    )


def preprocess_label(
    label: NDArray[np.uint8], affine: Affine, grid_shape: Shape, grid_affine: Affine
) -> NDArray[np.uint8]:
    """Bring a label to the cache grid: each class linearly, then the largest; 255 stays 255.

    Nearest neighbor leaves steps on oblique surfaces and loses thin structures; the share of
    each class does not. Voxels whose nearest native voxel is ignored are ignored.

    Args:
        label: Classes (I, J, K), 255 = ignore.
        affine: Affine (4, 4) of the label.
        grid_shape: Shape (I, J, K) of the cache grid.
        grid_affine: Affine (4, 4) of the cache grid.

    Returns:
        Classes (I, J, K) uint8 on the cache grid, 255 = ignore.
    """
    result = np.zeros(grid_shape, dtype=np.uint8)
    largest = np.full(grid_shape, -1.0, dtype=np.float32)
    share = np.empty((1, *grid_shape), np.float32)
    present = np.unique(label)
    for index in present[present != IGNORE]:
        one = (label == index)[None]
        resample(one, affine, grid_shape, grid_affine, "linear", out=share)
        np.copyto(result, index, where=share[0] > largest)
        np.maximum(largest, share[0], out=largest)
    if IGNORE in present:
        nearest = resample(label[None], affine, grid_shape, grid_affine, "nearest")[0]
        result[nearest == IGNORE] = IGNORE
    return result


def is_ct_moved(values: tuple[float, float], others: tuple[float, float]) -> bool:
    """Tell whether of two CTs one is in Hounsfield units and one about 1000 above them.

    So it is where the intercept got lost (0 to 4095). Air is at -1000 HU, so what goes below -850
    is in HU; what does not go below -50, air and fat, and beyond 1000 is above, unless it is
    bone alone.

    Args:
        values: The 0.5 and the 99.5 percentile of a scan.
        others: Of one or several others.

    Example:
        >>> is_ct_moved((24, 1300), (-1000, 400)), is_ct_moved((-90, 400), (-1000, 400))
        (True, False)
    """
    lower, upper = sorted((values, others))
    return lower[0] < -850 and upper[0] > -50 and upper[1] > 1000


def measure_percentiles(volume: Volume) -> tuple[tuple[float, float, float], ...]:
    """Return the 0.5, 50 and 99.5 percentiles of the raw intensities, per channel.

    Used to say that a scan lies outside of what a model was trained on.
    """
    return tuple(
        (float(low), float(middle), float(high))
        for low, middle, high in (
            np.percentile(channel, (LOW, 50, HIGH)) for channel in volume.array
        )
    )
