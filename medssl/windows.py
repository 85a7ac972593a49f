"""A network is moved over a scan in windows, whose sums are held in slabs of it.

Axes: B batch, C channels or classes, I J K voxel axes. Windows come in order along one axis of the
scan, so that a plane is complete, and leaves, once all windows that reach it have been summed up.
What is held at once is a slab as thick as a window, under each mirroring or pass, and not the scan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from numpy.typing import NDArray
from torch import Tensor

from medssl.networks.build import SegmentationNetwork, arrange
from medssl.transforms.geometry import Box
from medssl.transforms.spatial import turn_volume

OVERLAP = 0.5  # of neighboring windows at prediction, fraction
SLICES = 8  # windows of slices that go through a network in 2D at once
MOST_PARTS = 64  # that a scan is cut into, since each one repeats windows of its neighbor
SPARE = 5  # copies of the planes that leave: logits, probs, their mean, on both grids


class Window(NamedTuple):
    """What of a scan a network sees at once, and how often.

    ``patch_size`` in voxels, of a network in 2D that of the plane; ``precision`` float32 or
    bfloat16; ``flips`` are the axes of the volume whose mirrorings are averaged over;
    ``slice_axis`` is the one along which a network in 2D sees slices, None in 3D.
    """

    patch_size: tuple[int, ...]
    precision: str = "float32"
    flips: tuple[int, ...] = ()
    slice_axis: int | None = None

    @property
    def plain(self) -> Window:
        """The same without mirrorings."""
        return self._replace(flips=())

    @property
    def extent(self) -> tuple[int, int, int]:
        """The voxels of a window along I, J, K: one along the slice axis."""
        size = list(self.patch_size)
        if self.slice_axis is not None:
            size.insert(self.slice_axis, 1)
        i, j, k = size
        return i, j, k

    @property
    def pass_shape(self) -> tuple[int, int, int]:
        """The voxels along I, J, K that go through a network at once: in 2D some slices."""
        size = list(self.extent)
        if self.slice_axis is not None:
            size[self.slice_axis] = SLICES
        i, j, k = size
        return i, j, k

    @property
    def mirrorings(self) -> list[tuple[int, ...]]:
        """The axes that are mirrored in each view that is averaged over, none first."""
        sizes = range(len(self.flips) + 1)
        return [axes for size in sizes for axes in itertools.combinations(self.flips, size)]

    def find_axis(self, shape: Sequence[int]) -> int:
        """Return the axis of a scan (I, J, K) along which slabs of it leave."""
        if self.slice_axis is not None:
            return self.slice_axis
        return max(range(3), key=lambda axis: (shape[axis] / self.extent[axis], -axis))

    def count_windows(self, shape: Sequence[int], box: Box | None = None) -> int:
        """Return the windows that cover a scan (I, J, K) once, or a box of it."""
        parts = box or (slice(None),) * 3
        return math.prod(
            len(_find_starts(size, extent, False, slice(*part.indices(size))))
            for size, extent, part in zip(shape, self.extent, parts, strict=True)
        )

    def find_cut(self, shape: Sequence[int]) -> int:
        """Return the axis of a scan (I, J, K) that is cut where its slabs do not fit the memory."""
        axis = self.find_axis(shape)
        return max((a for a in range(3) if a != axis), key=lambda a: (shape[a], -a))

    def count_bytes(
        self, shape: Sequence[int], num_classes: int, num_views: int, parts: int = 1
    ) -> int:
        """Return the bytes of the slabs of a scan (I, J, K) that are held at once.

        Args:
            shape: Of the scan on the cache grid.
            num_classes: C, with background.
            num_views: Mirrorings or passes, whose slabs are held beside each other.
            parts: That the scan is cut into.
        """
        axis, cut = self.find_axis(shape), self.find_cut(shape)
        thick = min(shape[axis], max(self.extent[axis], SLICES))
        leaving = max(thick // 2, 1)
        planes = num_views * (thick * (num_classes + 1) + leaving * num_classes)
        planes += SPARE * leaving * num_classes
        size = dict(enumerate(shape))
        return (
            4
            * planes
            * math.ceil(size.pop(cut) / parts)
            * math.prod(n for a, n in size.items() if a not in (axis, cut))
        )

    def choose_parts(
        self, shape: Sequence[int], num_classes: int, num_views: int, limit: float
    ) -> int:
        """Return into how many parts a scan is cut so that its slabs take so many bytes at most."""
        parts = 1
        while parts < MOST_PARTS:
            if self.count_bytes(shape, num_classes, num_views, parts) <= limit:
                break
            parts += 1
        return parts


def _find_starts(size: int, extent: int, is_mirrored: bool, part: slice) -> list[int]:
    """Return where windows begin along an axis that reach a part of it; of small scans below 0."""
    last = max(size - extent, 0)
    step = max(int(extent * (1 - OVERLAP)), 1)
    before = max(extent - size, 0) // 2
    starts = [min(number * step, last) - before for number in range(1 + math.ceil(last / step))]
    if is_mirrored:
        starts = [size - extent - start for start in reversed(starts)]
    return [start for start in starts if start < part.stop and start + extent > part.start]


def slide_window(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    mirrored: Sequence[int] = (),
    box: Box | None = None,
    advance: Callable[[int], object] = int,
) -> Iterator[Tensor]:
    """Yield logits of an image in slabs, in order along ``window.find_axis`` of its shape.

    Windows overlap by half and are blended with Gaussian weights, as those of MONAI's
    ``sliding_window_inference`` are; what lies outside of the image is 0. The network's mode is
    left as it is.

    Args:
        network: The network; patches are brought to its device.
        image: (1, C, I, J, K).
        window: Its flips do not count.
        mirrored: Axes of the volume along which the network sees it mirrored.
        box: The part of the image that is wanted; None for all of it.
        advance: Is told how many windows have gone through the network.

    Yields:
        Logits (num_classes, I, J, K) float32 of the box, a few planes of one axis at a time.

    Raises:
        FloatingPointError: The logits are not finite.
    """

    def see(places: Sequence[Sequence[int]]) -> Tensor:
        return _run(network, image, window, places, mirrored)

    yield from _slide(see, image.shape[2:], window, mirrored, box, advance)


def slide_turned(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    matrix: NDArray[np.float64],
    box: Box | None = None,
) -> Iterator[Tensor]:
    """Yield probs of an image in slabs, of which each window sees its part turned.

    A window is turned about its own center, so that its probs, which are turned back, lie where
    those of `slide_window` do, and no more than a slab has to be held.

    Args:
        network: The network; patches are brought to its device.
        image: (1, C, I, J, K).
        window: Its flips do not count.
        matrix: Of ``medssl.transforms.spatial.draw_turn``.
        box: The part of the image that is wanted; None for all of it.

    Yields:
        Probs (num_classes, I, J, K) float32 as `slide_window` does. Their sum is the share of a
        voxel that was not turned out of its windows, as some is at the faces of the image.

    Raises:
        FloatingPointError: The probs are not finite.
    """
    shape = image.shape[2:]
    back = np.linalg.inv(matrix).astype(np.float64)
    share: Tensor | None = None

    def see(places: Sequence[Sequence[int]]) -> Tensor:
        nonlocal share
        probs = torch.softmax(_run(network, image, window, places, matrix=matrix), 1)
        part = _find_inside(places[0], window.extent, shape)  # all have the same margins
        inner = probs[(slice(None), slice(None), *part)]
        if share is None:
            whole = turn_volume(inner.new_ones((1, 1, *inner.shape[2:])), matrix, "zeros")
            share = turn_volume(whole, back, "zeros").clamp(max=1.0)
        inner.copy_(share * turn_volume(inner, back, "border"))
        return probs

    yield from _slide(see, shape, window, (), box)


def _slide(
    see: Callable[[Sequence[Sequence[int]]], Tensor],
    shape: Sequence[int],
    window: Window,
    mirrored: Sequence[int],
    box: Box | None,
    advance: Callable[[int], object] = int,
) -> Iterator[Tensor]:
    """Yield slabs of the weighted mean of what is seen (B, C, I, J, K) in windows at places."""
    extent = window.extent
    box = box or (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    axis = window.find_axis(shape)
    starts = [_find_starts(shape[a], extent[a], a in mirrored, part) for a, part in enumerate(box)]
    others = [a for a in range(3) if a != axis]
    places = [
        dict(zip((axis, *others), place, strict=True))
        for place in itertools.product(starts[axis], *(starts[a] for a in others))
    ]
    at_once = 1 if window.slice_axis is None else SLICES
    weights = compute_importance_map(tuple(window.patch_size), mode="gaussian").reshape(extent)
    slab = _Slab(box, axis, max(extent[axis], at_once), weights)
    waiting: list[list[int]] = []

    def flush() -> None:
        if waiting:
            for place, patch in zip(waiting, see(waiting), strict=True):
                slab.add_window(patch, place)
            advance(len(waiting))
            waiting.clear()

    for place in places:
        if not slab.covers(place[axis] + extent[axis]):
            flush()
            yield slab.release_planes(place[axis])
        waiting.append([place[a] for a in range(3)])
        if len(waiting) == at_once:
            flush()
    flush()
    yield slab.release_planes(box[axis].stop)


class _Slab:
    """The sums of windows over some planes of a box, and the weights that they were added with."""

    def __init__(self, box: Box, axis: int, thick: int, weights: Tensor) -> None:
        self.box, self.axis, self.weights = box, axis, weights
        self.start = box[axis].start
        self.thick = min(thick, box[axis].stop - self.start)
        self.sums: Tensor | None = None

    def covers(self, stop: int) -> bool:
        """Return whether the slab has the planes up to here, as far as the box has them."""
        return bool(min(stop, self.box[self.axis].stop) <= self.start + self.thick)

    def add_window(self, logits: Tensor, place: Sequence[int]) -> None:
        """Add the logits (C, I, J, K) of a window that begins here."""
        if self.sums is None:
            size = [part.stop - part.start for part in self.box]
            size[self.axis] = self.thick
            self.sums = torch.zeros((len(logits) + 1, *size), device=logits.device)
            self.weights = self.weights.to(logits.device)
        begins = [part.start for part in self.box]
        begins[self.axis] = self.start
        inside = [
            slice(max(begin - start, 0), min(begin + size - start, extent))
            for begin, size, start, extent in zip(
                begins, self.sums.shape[1:], place, self.weights.shape, strict=True
            )
        ]
        target = self.sums
        for a, (part, begin, start) in enumerate(zip(inside, begins, place, strict=True)):
            target = target.narrow(1 + a, start + part.start - begin, part.stop - part.start)
        weights = self.weights[tuple(inside)]
        target[:-1].addcmul_(logits[(slice(None), *inside)], weights)
        target[-1] += weights

    def release_planes(self, stop: int) -> Tensor:
        """Return the logits of the planes before this one, and make room for later ones."""
        assert self.sums is not None, "a window was added"
        count, dim = stop - self.start, 1 + self.axis
        planes = self.sums.narrow(dim, 0, count)
        logits = planes[:-1] / planes[-1:]
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the network gave logits that are not finite")
        for first in range(count, self.thick, count):
            moved = self.sums.narrow(dim, first, min(count, self.thick - first))
            self.sums.narrow(dim, first - count, moved.shape[dim]).copy_(moved)
        self.sums.narrow(dim, self.thick - count, count).zero_()
        self.start = stop
        return logits


def _run(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    places: Sequence[Sequence[int]],
    mirrored: Sequence[int] = (),
    matrix: NDArray[np.float64] | None = None,
) -> Tensor:
    """Return the logits (B, num_classes, I, J, K) float32 of windows that begin at these places.

    Mirrorings of what the network sees are taken back, a turn by a matrix is not.
    """
    device = find_device(network, image)
    dtype = torch.bfloat16 if window.precision == "bfloat16" else torch.float32
    axes = [2 + axis for axis in mirrored]
    patches = torch.cat([_cut(image, place, window.extent, matrix) for place in places]).to(device)
    patches = patches.flip(axes) if axes else patches
    if window.slice_axis is not None:
        patches = patches.squeeze(2 + window.slice_axis)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits: Tensor = network(arrange(patches)).float()
    if window.slice_axis is not None:
        logits = logits.unsqueeze(2 + window.slice_axis)
    return logits.flip(axes) if axes else logits


def find_device(network: SegmentationNetwork, image: Tensor) -> torch.device:
    """Return where a network is; one without weights is where its image is."""
    return next((weight.device for weight in network.parameters()), image.device)


def _cut(
    image: Tensor,
    place: Sequence[int],
    extent: Sequence[int],
    matrix: NDArray[np.float64] | None,
) -> Tensor:
    """Return the patch (1, C, I, J, K) of an image (1, C, I, J, K) that begins here, or turned."""
    inside = _find_inside(place, extent, image.shape[2:])
    box = [
        slice(start + part.start, start + part.stop)
        for start, part in zip(place, inside, strict=True)
    ]
    margins = [(part.start, size - part.stop) for part, size in zip(inside, extent, strict=True)]
    padding = [count for margin in reversed(margins) for count in margin]
    if matrix is None:
        patch = image[(slice(None), slice(None), *box)]
    else:
        patch = turn_volume(image, matrix, "border", box)
    return F.pad(patch, padding) if any(padding) else patch


def _find_inside(place: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> list[slice]:
    """Return the part of a window that lies in an image, in voxels of the window."""
    return [
        slice(max(-start, 0), min(whole - start, size))
        for start, size, whole in zip(place, extent, shape, strict=True)
    ]


def align_slabs(views: Sequence[Iterator[Tensor]], axis: int) -> Iterator[list[Tensor]]:
    """Yield what several walks over one box say of the same planes, a few planes at a time.

    Args:
        views: Of ``slide_window``, under several mirrorings or passes.
        axis: Along which their slabs leave.
    """
    slabs = [next(view) for view in views]
    while True:
        count = min(slab.shape[1 + axis] for slab in slabs)
        yield [slab.narrow(1 + axis, 0, count) for slab in slabs]
        for number, (slab, view) in enumerate(zip(slabs, views, strict=True)):
            left = slab.shape[1 + axis] - count
            del slab
            if left:
                slabs[number] = slabs[number].narrow(1 + axis, count, left)
            elif (following := next(view, None)) is not None:
                slabs[number] = following
            else:
                return
