"""Grids: where voxels lie in the world, and the way from one grid to another and back.

Legend: C channels, I J K voxel axes. An affine (4, 4) float64 takes the index of a voxel's
center to RAS+ world coordinates in mm. Arrays are sampled at voxel centers, in float64
coordinates, by scipy: no normalized coordinates, so no half-voxel convention to get wrong, and
axes of one voxel need no special case.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Affine = NDArray[np.float64]
Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
GridSpacing = tuple[float | None, float | None, float | None]
"""Spacing of a grid that is laid over a scan; None keeps the scan's own, so nothing is resampled
along that axis."""

Box = tuple[slice, slice, slice]
"""A part of a grid: from which voxel to before which one, along I, J, K."""

Header = dict[str, Any]
"""What a header says of the place of its voxels, field by field and in its own unit, in what JSON
can hold; its keys are those of the kind of file (`medssl.formats`)."""

MAX_DISPLACEMENT = 0.1
"""Voxels by which the grids of one case, or the places that one header gives, may differ."""

MAX_SHEAR = 0.5
"""Degrees by which the axes of a scan may be off right angles, so that its spacing measures it."""

_SPACINGS = (1e-6, 1e4)  # mm; what lies beyond is no voxel, even if its unit is wrong
_MOST_UNEQUAL = 200.0  # ratio of two spacings of one scan; that of retinal scans reaches 130
_FARTHEST = 1e6  # mm from the origin, where float32 still tells voxels apart
_SLACK = 0.1  # voxels of the field of view that a grid may leave uncovered, both sides together
_EXACT = 1e-4  # voxels: grids closer than this are the same up to the order of their axes
_SAME = 1e-2  # voxels by which a cache grid may lie beside the one that its scan has
_PIECE = 2**24  # values that are brought back at once


@dataclass(frozen=True, eq=False)
class Volume:
    """An array (C, I, J, K) with its affine (4, 4), voxel center -> RAS+ world in mm.

    A picture has no spacing: its affine is the identity, and the unit is the pixel. `header` is
    that of the file that the array is on the grid of; None for a picture and for all other grids.
    `other_headers` are those of the files of further channels.
    """

    array: NDArray[Any]
    affine: Affine
    has_spacing: bool = True
    header: Header | None = None
    other_headers: tuple[Header, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an array that is not (C, I, J, K), and an affine that is not one."""
        if self.array.ndim != 4:
            raise ValueError(f"a volume is (C, I, J, K), got shape {self.array.shape}")
        check_affine(self.affine)

    @property
    def shape(self) -> Shape:
        """The voxel counts (I, J, K)."""
        i, j, k = self.array.shape[1:]
        return i, j, k

    @property
    def spacing(self) -> Spacing:
        """The distance of neighboring voxels along I, J, K in mm."""
        return grid_spacing(self.affine)


def check_affine(affine: Affine) -> None:
    """Refuse an affine that does not place voxels in space.

    Raises:
        ValueError: The affine is not (4, 4), not finite, or flattens the volume.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"an affine is a finite (4, 4) matrix, got {affine.tolist()}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise ValueError(f"the affine flattens the volume: {affine.tolist()}")


@np.errstate(over="ignore", invalid="ignore")
def check_grid(shape: Shape, affine: Affine) -> None:
    """Refuse a grid that no scanner makes, before anything is computed on it.

    Spacings below 1e-6 or above 10,000 mm, spacings of which one is 200 times another (axes of a
    single voxel aside), and places more than 1 km from the origin are damage or a wrong unit.

    Raises:
        ValueError: With the value, for one of these reasons or those of `check_affine`.
    """
    check_affine(affine)
    spacing = grid_spacing(affine)
    text = f"{show_sizes(spacing)} mm"
    low, high = _SPACINGS
    if not all(low <= size <= high for size in spacing):
        raise ValueError(f"the spacing is {text}, outside of {low:g} to {high:g} mm")
    sizes = [size for size, count in zip(spacing, shape, strict=True) if count > 1]
    if sizes and max(sizes) > _MOST_UNEQUAL * min(sizes):
        raise ValueError(
            f"the spacing is {text}, one {max(sizes) / min(sizes):.4g} times another, where "
            f"{_MOST_UNEQUAL:g} times is the most that is taken"
        )
    distance = float(np.abs(affine[:3, 3]).max())
    if distance > _FARTHEST:
        raise ValueError(f"the voxels lie {distance:.4g} mm from the origin, beyond {_FARTHEST:g}")


def grid_spacing(affine: Affine) -> Spacing:
    """Return the distance of neighboring voxels along I, J, K in mm.

    Example:
        >>> grid_spacing(np.diag([-0.5, 0.5, 2.0, 1.0]))
        (0.5, 0.5, 2.0)
    """
    i, j, k = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return i, j, k


def show_sizes(sizes: Iterable[float]) -> str:
    """Return lengths or counts as `1 x 1 x 2.5`."""
    return " x ".join(f"{size:.4g}" for size in sizes)


def measure_shear(shape: Shape, affine: Affine) -> float:
    """Return by how many degrees the axes of a grid are off right angles; one of one voxel is not.

    Example:
        Slices that lie one voxel beside each other, as of a gantry that was tilted.

        >>> tilted = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        >>> round(measure_shear((4, 4, 3), tilted), 3), measure_shear((4, 4, 1), tilted)
        (45.0, 0.0)
    """
    axes = affine[:3, :3][:, np.array(shape) > 1]
    axes = axes / np.linalg.norm(axes, axis=0)
    cosines = np.abs(np.triu(axes.T @ axes, 1))
    return float(np.degrees(np.arcsin(np.minimum(cosines, 1)).max(initial=0)))


def cache_grid(shape: Shape, affine: Affine, spacing: GridSpacing) -> tuple[Shape, Affine]:
    """Lay the grid of the cache over a scan.

    The scan's own axes are kept (an oblique scan is not rotated: nothing is cut, nothing is
    blurred), reordered and flipped so that I, J, K point as closely as possible to right,
    anterior, superior. Both grids have the same center; the new one covers the field of view
    from outer voxel face to outer voxel face.

    Args:
        shape: Voxel counts (I, J, K) of the scan.
        affine: Affine (4, 4) of the scan.
        spacing: Spacing of the new grid along its own I, J, K in mm; None keeps the scan's own.

    Returns:
        Shape (I, J, K) and affine (4, 4) of the new grid.

    Example:
        Slices of 2 mm become two of 1 mm each.

        >>> cache_grid((4, 4, 3), np.diag([1.0, 1.0, 2.0, 1.0]), (1.0, 1.0, 1.0))[0]
        (4, 4, 6)
    """
    order = np.argsort(nib.orientations.io_orientation(affine)[:, 0])
    flips = nib.orientations.io_orientation(affine)[order, 1]
    old_spacing = np.asarray(grid_spacing(affine))[order]
    old_shape = np.asarray(shape)[order]
    pairs = zip(spacing, old_spacing, strict=True)
    steps = np.array([old if step is None else step for step, old in pairs], dtype=np.float64)
    counts = np.maximum(np.ceil(old_shape * old_spacing / steps - _SLACK), 1).astype(int)
    grid = np.eye(4)
    grid[:3, :3] = affine[:3, :3][:, order] * (flips / old_spacing * steps)
    center = affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3]
    grid[:3, 3] = center - grid[:3, :3] @ ((counts - 1) / 2)
    return (int(counts[0]), int(counts[1]), int(counts[2])), grid


def resample(
    array: NDArray[Any],
    affine: Affine,
    to_shape: Shape,
    to_affine: Affine,
    mode: Literal["linear", "nearest"],
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Sample an array on another grid, by world coordinates.

    Outside the array the nearest border value is taken. Grids that differ only in the order
    and direction of their axes are copied without any interpolation.

    Args:
        array: Values (C, I, J, K).
        affine: Affine (4, 4) of the array.
        to_shape: Shape (I, J, K) of the new grid.
        to_affine: Affine (4, 4) of the new grid.
        mode: `linear` for images and probs, `nearest` for anything that must not be mixed.
        out: Where the result goes, in a dtype of its own; None: a new array of that of `array`.

    Returns:
        Values (C, I, J, K), of ``to_shape``.
    """
    matrix: Affine = np.linalg.inv(affine) @ to_affine  # new voxel -> old voxel
    exact = _find_order(matrix, array.shape[1:], to_shape)
    if exact is not None and out is None:
        return _turn(array, exact)
    result = np.empty((array.shape[0], *to_shape), dtype=array.dtype) if out is None else out
    if exact is not None:
        result[:] = _turn(array, exact)
        return result
    for source, target in zip(array, result, strict=True):
        ndimage.affine_transform(
            source,
            matrix,
            output_shape=to_shape,
            output=target,
            order=1 if mode == "linear" else 0,
            mode="nearest",
        )
    return result


def to_native(
    probs: NDArray[np.float32], affine: Affine, native_shape: Shape, native_affine: Affine
) -> NDArray[np.float32]:
    """Bring probs from the cache grid back to the grid of the scan: the one way back.

    Args:
        probs: Class probabilities (C, I, J, K) on the cache grid.
        affine: Affine (4, 4) of the cache grid.
        native_shape: Shape (I, J, K) of the scan.
        native_affine: Affine (4, 4) of the scan.

    Returns:
        Class probabilities (C, I, J, K) of ``native_shape``, float32.

    Raises:
        ValueError: The grid that `probs` are on is not one that was laid over this scan.
    """
    shape = (probs.shape[1], probs.shape[2], probs.shape[3])
    way = WayBack(shape, affine, native_shape, native_affine)
    return way.bring(probs, (0, 0, 0), way.whole)


class WayBack:
    """From the cache grid of a scan back to its own grid, all at once or part by part.

    Args:
        shape: Shape (I, J, K) of the cache grid.
        affine: Affine (4, 4) of the cache grid.
        native_shape: Shape (I, J, K) of the scan.
        native_affine: Affine (4, 4) of the scan.

    Raises:
        ValueError: The cache grid is not one that was laid over this scan.
    """

    def __init__(
        self, shape: Shape, affine: Affine, native_shape: Shape, native_affine: Affine
    ) -> None:
        expected_shape, expected = cache_grid(native_shape, native_affine, grid_spacing(affine))
        if shape != expected_shape or measure_displacement(expected, affine, shape) > _SAME:
            raise ValueError(
                f"probs of shape {shape} are not on the cache grid of this scan: expected shape "
                f"{expected_shape}, affine {expected.tolist()}, got {affine.tolist()}"
            )
        self.shape, self.native_shape = shape, native_shape
        matrix: Affine = np.linalg.inv(affine) @ native_affine  # native voxel -> cache voxel
        exact = _find_order(matrix, shape, native_shape)
        self._is_exact = exact is not None
        self._matrix = matrix if exact is None else exact
        self._order = np.abs(matrix[:3, :3]).argmax(1)  # cache axis -> native axis

    @property
    def whole(self) -> Box:
        """All of the scan's grid."""
        i, j, k = self.native_shape
        return slice(0, i), slice(0, j), slice(0, k)

    def cut(self, axis: int, parts: int, box: Box | None = None) -> Iterator[Box]:
        """Yield parts of a box of the scan's grid, cut along an axis of the cache grid."""
        box, native = box or self.whole, self._order[axis]
        ends = np.linspace(box[native].start, box[native].stop, parts + 1).astype(int).tolist()
        for start, stop in itertools.pairwise(ends):
            if start < stop:
                yield _replace(box, native, slice(start, stop))

    def find_source(self, box: Box) -> Box:
        """Return the voxels of the cache grid that those of a box of the scan's come from."""
        i, j, k = (
            slice(*self._reach(axis, [part.start, part.stop - 1]))
            for axis, part in enumerate(box[native] for native in self._order)
        )
        return i, j, k

    def _reach(self, axis: int, ends: list[int]) -> tuple[int, int]:
        """Return from which voxel to before which one of a cache axis these native ones reach."""
        slack = 0.0 if self._is_exact else 2 * _SAME
        along = self._matrix[axis, self._order[axis]] * np.array(ends) + self._matrix[axis, 3]
        size = self.shape[axis]
        first = min(max(int(np.floor(along.min() - slack)), 0), size - 1)
        return first, max(min(int(np.ceil(along.max() + slack)) + 1, size), first + 1)

    def bring(
        self, probs: NDArray[np.float32], start: tuple[int, int, int], box: Box
    ) -> NDArray[np.float32]:
        """Return values (C, I, J, K) float32 of a box of the scan's grid.

        Args:
            probs: Values (C, I, J, K) of a part of the cache grid that holds all that
                ``find_source`` of the box names.
            start: The first voxel of that part.
            box: What is wanted.
        """
        size = [part.stop - part.start for part in box]
        matrix = self._matrix[:3, :3]
        if self._is_exact:
            source = (
                slice(part.start - begin, part.stop - begin)
                for part, begin in zip(self.find_source(box), start, strict=True)
            )
            return _turn(probs[(slice(None), *source)], self._matrix).astype(np.float32, copy=False)
        offset = matrix @ [part.start for part in box] + self._matrix[:3, 3] - np.array(start)
        native = np.empty((len(probs), *size), dtype=np.float32)
        for source_class, target in zip(probs, native, strict=True):
            ndimage.affine_transform(
                source_class,
                matrix,
                offset,
                output_shape=tuple(size),
                output=target,
                order=1,
                mode="nearest",
            )
        return native

    def stream(
        self, slabs: Iterable[NDArray[np.float32]], axis: int, box: Box
    ) -> Iterator[tuple[Box, NDArray[np.float32]]]:
        """Bring slabs of the cache grid back as they come.

        Args:
            slabs: Values (C, I, J, K), in order along an axis, of all that ``find_source`` of the
                box names.
            axis: That axis of the cache grid.
            box: The part of the scan's grid that is wanted.

        Yields:
            Boxes of the scan's grid, and their values (C, I, J, K) float32.
        """
        native = self._order[axis]
        places = list(range(box[native].start, box[native].stop))
        if self._matrix[axis, native] < 0:
            places.reverse()
        plane = math.prod(part.stop - part.start for a, part in enumerate(box) if a != native)
        start = [part.start for part in self.find_source(box)]
        held: NDArray[np.float32] | None = None
        for slab in slabs:
            held = slab if held is None else np.concatenate([held, slab], axis=1 + axis)
            stop = start[axis] + held.shape[1 + axis]
            most = max(1, _PIECE // (len(held) * plane))
            while places and (piece := self._find_ready(axis, places[:most], stop)):
                places = places[len(piece) :]
                part = _replace(box, native, slice(min(piece), max(piece) + 1))
                i, j, k = start
                yield part, self.bring(held, (i, j, k), part)
            if places:
                passed = min(self._reach(axis, places[:1])[0], stop) - start[axis]
                held = np.take(held, range(passed, held.shape[1 + axis]), axis=1 + axis)
                start[axis] += passed
        assert not places, "the slabs covered the box"

    def _find_ready(self, axis: int, places: list[int], stop: int) -> list[int]:
        """Return the first native planes that need nothing of a cache axis from `stop` on."""
        return list(
            itertools.takewhile(lambda place: self._reach(axis, [place])[1] <= stop, places)
        )


def _replace(box: Box, axis: int, part: slice) -> Box:
    """Return a box with another part along an axis."""
    i, j, k = (part if a == axis else old for a, old in enumerate(box))
    return i, j, k


def measure_displacement(first: Affine, second: Affine, shape: Shape) -> float:
    """Return how far two grids of one shape are apart: the largest distance of their corners.

    Args:
        first: Affine (4, 4) whose voxels are the unit.
        second: Affine (4, 4).
        shape: Shape (I, J, K) of both grids.

    Returns:
        The largest displacement over the 8 corner voxels, in voxels of `first`.
    """
    ends = [(0, size - 1) for size in shape]
    corners = np.array([(*c, 1) for c in np.stack(np.meshgrid(*ends), -1).reshape(-1, 3)]).T
    moved = np.linalg.solve(first, second @ corners)
    return float(np.linalg.norm(moved[:3] - corners[:3], axis=0).max())


def _find_order(matrix: Affine, shape: tuple[int, ...], to_shape: Shape) -> Affine | None:
    """Return `matrix` free of rounding if all that it does is to reorder and flip axes, or None."""
    turn = np.rint(matrix[:3, :3])
    is_permutation = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    if not is_permutation:
        return None
    sources = np.abs(turn).argmax(0)  # new axis -> old axis
    old_shape = tuple(shape[source] for source in sources)
    exact = np.eye(4)
    exact[:3, :3] = turn
    exact[:3, 3] = np.where(turn.sum(1) < 0, np.asarray(shape) - 1, 0)
    ends = np.asarray([*to_shape, 1.0]) * np.abs(matrix - exact)
    return exact if old_shape == to_shape and ends.sum(1).max() <= _EXACT else None


def _turn(array: NDArray[Any], exact: Affine) -> NDArray[Any]:
    """Copy with the axes reordered and flipped."""
    order = np.abs(exact[:3, :3]).argmax(0)  # new axis -> old axis
    flipped = tuple(1 + axis for axis in range(3) if exact[order[axis], axis] < 0)
    return np.ascontiguousarray(np.flip(np.transpose(array, (0, *(1 + order))), flipped))
