"""One spatial draw per patch: where it is cut, how it is turned, scaled, bent and flipped.

Drawing is apart from applying, so image, probs and label of a patch see the same geometry and
voxels of all views correspond. Axes: C channels, I J K voxel axes (K is absent in 2D, where a
patch is cut from one slice and turned in its plane).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ROTATION_DEGREES = 30.0
SCALES = (0.7, 1.4)
PLANES = ((1, 2), (0, 2), (0, 1))  # of rotations
TURN_DEGREES = 10.0  # of a teacher's view
TURN_SCALE = 1.1
ELASTIC_NODES = 5
ELASTIC_SHARE = 0.03  # standard deviation of a node's displacement, fraction of the patch


@dataclass(frozen=True)
class _Place:
    """The part of a volume that a patch is cut from.

    ``box`` cuts the part; ``grid`` (1, I, J, K, 3) says in it where each voxel of the patch lies,
    as grid_sample wants it; ``distance`` (I, J, K, n) how far along axes of a single voxel, if any.
    """

    box: tuple[slice, ...]
    grid: Tensor
    distance: Tensor | None


@dataclass(frozen=True)
class SpatialDraw:
    """Where each voxel of a patch lies in the volume that it is cut from.

    ``coordinates`` is (I, J, K, 3) float32, in voxels of the volume; (I, J, 2) in a slice.
    """

    coordinates: Tensor
    _places: dict[tuple[int, ...], _Place] = field(default_factory=dict, repr=False, compare=False)

    def sample(self, volume: NDArray[np.generic], nearest: bool) -> Tensor:
        """Return the patch (C, I, J, K) float32 of a volume (C, I', J', K'); 0 outside of it."""
        place = self._find_place(volume.shape[1:])
        crop = volume[(slice(None), *place.box)]
        patch = F.grid_sample(
            torch.from_numpy(np.ascontiguousarray(crop, dtype=np.float32))[None],
            place.grid,
            mode="nearest" if nearest else "bilinear",
            padding_mode="zeros",
            align_corners=True,
        )
        if place.distance is not None:
            near = (place.distance <= 0.5).float() if nearest else (1 - place.distance).clamp(min=0)
            patch = patch * near.prod(-1)
        return patch[0]

    def _find_place(self, shape: tuple[int, ...]) -> _Place:
        """Return where the patch lies in a volume of a shape: image and label have the same."""
        if shape not in self._places:
            ends = np.array([axis.aminmax() for axis in self.coordinates.unbind(-1)])
            limit = np.array(shape)
            low = np.clip(np.floor(ends[:, 0]).astype(int), 0, limit - 1)
            high = np.clip(np.ceil(ends[:, 1]).astype(int) + 1, low + 1, limit)
            local = self.coordinates - torch.as_tensor(low, dtype=torch.float32)
            size = torch.as_tensor(high - low, dtype=torch.float32)
            # grid_sample wants (x, y, z) = (K, J, I) in [-1, 1]
            grid = 2 * local / (size - 1).clamp(min=1) - 1
            thin = size == 1  # to grid_sample an axis of one voxel has no outside
            self._places[shape] = _Place(
                box=tuple(slice(a, b) for a, b in zip(low, high, strict=True)),
                grid=grid.flip(-1)[None],
                distance=local[..., thin].abs() if bool(thin.any()) else None,
            )
        return self._places[shape]

    def find_inside(self, shape: Sequence[int]) -> Tensor:
        """Return (1, I, J, K) float32: 1 where the patch lies inside the volume, 0 in padding."""
        limit = torch.tensor([float(n) - 1 for n in shape])
        inside = ((self.coordinates > -0.5) & (self.coordinates < limit + 0.5)).all(-1)
        return inside.float()[None]


def draw_spatial(
    rng: np.random.Generator,
    shape: Sequence[int],
    patch_size: Sequence[int],
    target: Sequence[int] | None,
    flips: Sequence[int],
    strength: float = 1.0,
    spacing: Sequence[float] | None = None,
    extra: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> SpatialDraw:
    """Draw the geometry of a patch.

    Args:
        rng: Source of the draw.
        shape: Shape (I, J, K) of the volume, in voxels; (I, J) of a slice.
        patch_size: Shape of the patch, in voxels, of as many axes.
        target: A voxel that the patch shall contain, or None for a place anywhere.
        flips: Axes that may be mirrored.
        strength: 0 cuts and flips only; 1 is the full augmentation.
        spacing: Voxel size in mm, so that rotations are rigid in mm; None for equal sides.
        extra: A matrix (3, 3) that follows the drawn rotation, scale and mirroring, in voxels, and
            a shift (3,) of the patch, as a fraction of it; it changes nothing else of the draw.
            (2, 2) and (2,) in 2D.

    Returns:
        The draw; without rotation, scaling and bending its coordinates are whole numbers.

    Source: rotation and scaling ranges of nnU-Net (Isensee et al. 2021, supplementary note 4).
    """
    size = np.array(patch_size)
    start = _draw_start(rng, np.array(shape), size, target)
    sides = np.ones(len(size)) if spacing is None else np.array(spacing, dtype=float)
    matrix = _draw_matrix(rng, strength, sides)
    for axis in range(len(size)):
        flipped = rng.random() < 0.5
        if axis in flips and flipped:
            matrix[:, axis] *= -1
    place = start.astype(float)
    if extra is not None:
        matrix, place = extra[0] @ matrix, place + extra[1] * size
    coordinates = _place_voxels(size, matrix, place + (size - 1) / 2)
    bent = rng.random() < 0.3 * min(strength, 1.0)
    dimension = len(size)
    nodes = rng.standard_normal((1, dimension, *[ELASTIC_NODES] * dimension))
    if bent:
        nodes *= (ELASTIC_SHARE * strength * size).reshape(1, dimension, *[1] * dimension)
        field = torch.as_tensor(nodes, dtype=torch.float32)
        mode = "trilinear" if dimension == 3 else "bilinear"
        field = F.interpolate(field, size=tuple(patch_size), mode=mode, align_corners=True)
        coordinates = coordinates + field[0].movedim(0, -1)
    return SpatialDraw(coordinates)


def _place_voxels(
    size: NDArray[np.int_], matrix: NDArray[np.float64], center: NDArray[np.float64]
) -> Tensor:
    """Return where the voxels of a turned patch lie around its center, (I, J, K, 3), in voxels.

    Axis by axis, so that the last one alone costs a sum over all voxels.
    """
    coordinates = torch.as_tensor(center, dtype=torch.float32)
    for axis, (length, column) in enumerate(zip(size.tolist(), matrix.T, strict=True)):
        steps = torch.arange(length, dtype=torch.float32) - (length - 1) / 2
        moved = steps[:, None] * torch.as_tensor(column, dtype=torch.float32)
        coordinates = coordinates + moved.unflatten(0, (length, *[1] * (len(size) - 1 - axis)))
    return coordinates


def build_turn(num_axes: int, plane: tuple[int, int], angle: float) -> NDArray[np.float64]:
    """Return the matrix (num_axes, num_axes) of a turn in the plane of two axes, by radians."""
    matrix = np.eye(num_axes)
    first, second = plane
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def draw_turn(
    rng: np.random.Generator, flips: Sequence[int], slice_axis: int | None, spacing: Sequence[float]
) -> NDArray[np.float64]:
    """Draw a mirroring, a small rotation and a scale under which a teacher sees a scan once more.

    Args:
        rng: Source of the draw.
        flips: Axes that may be mirrored.
        slice_axis: Axis of the slices of a network in 2D, along which nothing is moved; None in 3D.
        spacing: Voxel size in mm of the three axes, so that the rotation is rigid.

    Returns:
        A matrix (3, 3) from offsets of the turned scan to those of the scan, in voxels.
    """
    angles = np.deg2rad(rng.uniform(-1, 1, 3) * TURN_DEGREES)
    scale = float(np.exp(rng.uniform(-1, 1) * np.log(TURN_SCALE)))
    matrix = np.eye(3)
    for fixed, (plane, angle) in enumerate(zip(PLANES, angles, strict=True)):
        if slice_axis in (None, fixed):
            matrix = matrix @ build_turn(3, plane, angle)
    scales = np.where(np.arange(3) == slice_axis, 1.0, scale)
    sides = np.array(spacing, dtype=float)
    matrix = np.diag(1 / sides) @ (matrix * scales) @ np.diag(sides)
    for axis in flips:
        if rng.random() < 0.5:
            matrix[:, axis] *= -1
    return matrix


def turn_volume(
    volume: Tensor,
    matrix: NDArray[np.float64],
    outside: str,
    box: Sequence[slice] | None = None,
) -> Tensor:
    """Return a box of volumes (B, C, I, J, K) turned about its center, on the same grid, linearly.

    Args:
        volume: The volumes.
        matrix: (3, 3) from offsets of the result to those of the volume, in voxels.
        outside: ``border`` goes on with the voxels of the border, ``zeros`` with 0.
        box: From which voxel to before which one, along I, J, K; None for all of the volume.
    """
    shape = np.array(volume.shape[2:])
    first, stop = np.array([(p.start, p.stop) for p in box]).T if box else (0 * shape, shape)
    size, center = stop - first, (first + stop - 1) / 2
    reach = np.abs(matrix) @ ((size - 1) / 2) + 1  # a voxel more, for the rounding
    low = np.clip(np.floor(center - reach).astype(int), 0, shape - 1)
    high = np.clip(np.ceil(center + reach).astype(int) + 1, low + 1, shape)
    parts = (slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    source = volume[(slice(None), slice(None), *parts)]
    relative = matrix * size[None, :] / (high - low)[:, None]
    shift = (2 * (center - low) + 1) / (high - low) - 1
    theta = np.column_stack([relative[::-1, ::-1], shift[::-1]])  # grid_sample wants K, J, I
    rows = torch.as_tensor(theta, dtype=torch.float32, device=volume.device)
    grid = F.affine_grid(
        rows.expand(len(volume), 3, 4), [*volume.shape[:2], *size.tolist()], align_corners=False
    )
    return F.grid_sample(source, grid, padding_mode=outside, align_corners=False)


def _draw_start(
    rng: np.random.Generator,
    shape: NDArray[np.int_],
    size: NDArray[np.int_],
    target: Sequence[int] | None,
) -> NDArray[np.int_]:
    """Draw the first voxel of the patch: near the target, inside the volume where it fits."""
    slack = shape - size
    low, high = np.minimum(slack, 0), np.maximum(slack, 0)
    anywhere: NDArray[np.int_] = rng.integers(low - size // 16, high + size // 16, endpoint=True)
    jitter = rng.integers(-(size // 4), size // 4, endpoint=True)
    if target is None:
        return anywhere
    nearby = np.array(target) - size // 2 + jitter
    start: NDArray[np.int_] = np.minimum(np.maximum(nearby, low - size // 16), high + size // 16)
    return start


def _draw_matrix(
    rng: np.random.Generator, strength: float, spacing: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Draw rotation and scale as a matrix from patch to volume offsets, in voxels."""
    dimension = len(spacing)
    matrix = np.eye(dimension)
    planes = PLANES if dimension == 3 else PLANES[2:]
    angles = np.deg2rad(rng.uniform(-1, 1, 3) * ROTATION_DEGREES * strength)
    exponents = rng.uniform(np.log(SCALES[0]), np.log(SCALES[1]), 3)
    rotated, scaled, anisotropic = rng.random(3)
    if rotated < 0.5 * min(strength, 1.0):
        for plane, angle in zip(planes, angles, strict=False):
            matrix = matrix @ build_turn(dimension, plane, angle)
    if scaled < 0.5 * min(strength, 1.0):
        together = anisotropic < 0.5
        factors = np.exp((np.repeat(exponents[:1], 3) if together else exponents) * strength)
        matrix = matrix * factors[None, :dimension]
    return np.diag(1 / spacing) @ matrix @ np.diag(spacing)
