"""Pseudo-labels on disk: probs and uncertainty on the cache grid, with no threshold applied.

Axes: I J K voxel axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.config import InputError
from medssl.data.cache import draw_class_voxels, map_array
from medssl.runs import (
    Shape,
    find_changed,
    hash_files,
    read_json,
    reserve_space,
    seed_from,
    write_file,
    write_json,
)
from medssl.transforms.geometry import Box

MOST_VOXELS = 5_000  # per class, kept to place patches on
_NUM_DRAWN = 100_000
_PIECE = 2**21  # probs that are looked at at once
_GONE = (
    "cannot be read: damaged, or removed while it was used; delete the done.json of its round: the "
    "same command then makes it anew"
)
_ARRAYS = ("probs.npy", "uncertainty.npy", "class_voxels.npz")

Classes = NDArray[np.uint8]
Part = tuple[Box, NDArray[np.float32] | None, NDArray[np.float32] | None]
"""A box of a pseudo-label, its probs (num_classes, I, J, K) and its uncertainty (I, J, K)."""


class Meta(Shape):
    """meta.json of a pseudo-label."""

    teacher: str
    stability: float | None = None


def write_pseudo_label(
    folder: Path,
    shape: tuple[int, int, int, int],
    parts: Iterable[Part],
    teacher: str,
    find_islands: Callable[[Classes], Iterable[tuple[Box, NDArray[np.bool_]]]] = lambda _: (),
    measure_stability: Callable[[Classes], float | None] = lambda _: None,
) -> None:
    """Write the pseudo-label of a case, part by part as it comes.

    meta.json comes last, so its existence means whole.

    Args:
        folder: pseudo_labels/<case_id>.
        shape: (num_classes, I, J, K).
        parts: Boxes of it, and their probs (num_classes, I, J, K), stored as uint8, 255 = 1, and
            predictive entropy (I, J, K) in nats, stored as float16; either may come later.
        teacher: Hash of the weights that made it.
        find_islands: Finds, in its classes (I, J, K), what is to be background.
        measure_stability: Returns the mean Dice of its classes, before that, with what earlier
            checkpoints of the teacher said, if it is measured.

    Raises:
        FloatingPointError: Probs or uncertainty are not finite.
        InputError: The disk is full.
    """
    stability: float | None = None

    def fill(probs_file: Path, uncertainty_file: Path) -> None:
        nonlocal stability
        _reserve(probs_file, shape, np.uint8)
        _reserve(uncertainty_file, shape[1:], np.float16)
        classes = np.empty(shape[1:], np.uint8)
        for box, probs, uncertainty in parts:
            arrays = [array for array in (probs, uncertainty) if array is not None]
            if not all(np.isfinite(array).all() for array in arrays):
                raise FloatingPointError(f"{folder.name}: a pseudo-label of non-finite numbers")
            if probs is not None:
                classes[box] = probs.argmax(0)
                _open(probs_file)[(slice(None), *box)] = np.rint(probs * 255)
            if uncertainty is not None:
                _open(uncertainty_file)[box] = uncertainty
        stability = measure_stability(classes)
        for box, islands in find_islands(classes):
            part = _open(probs_file)[(slice(None), *box)]
            part[:, islands] = 0
            part[0, islands] = 255

    (folder / "meta.json").unlink(missing_ok=True)
    write_file(
        folder / "probs.npy",
        lambda first: write_file(folder / "uncertainty.npy", lambda second: fill(first, second)),
    )
    classes = read_classes(folder)
    voxels: dict[str, Any] = {
        str(index): draw_class_voxels(
            classes, index, MOST_VOXELS, np.random.default_rng(seed_from("class_voxels", index))
        )
        for index in range(1, shape[0])
    }
    write_file(folder / "class_voxels.npz", lambda path: _save_archive(path, voxels))
    files = hash_files(folder, *_ARRAYS)
    write_json(folder / "meta.json", {"teacher": teacher, "stability": stability, "files": files})


def _reserve(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """Make an array file that can be mapped."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("rb+") as file:
        reserve_space(file, path.stat().st_size)


def _open(path: Path) -> NDArray[Any]:
    """Map an array file to write to it; mapped anew, what was written before takes no memory."""
    array: NDArray[Any] = np.load(path, "r+", allow_pickle=False)
    return array


def _save_archive(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays under exactly this file name."""
    with path.open("wb") as file:
        np.savez(file, **arrays)


def has_pseudo_label(folder: Path, teacher: str, shape: tuple[int, ...]) -> bool:
    """Return whether a whole pseudo-label (num_classes, I, J, K) of this teacher stands here."""
    return is_whole(folder, shape) and read_json(folder / "meta.json")["teacher"] == teacher


def is_whole(folder: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a pseudo-label (num_classes, I, J, K) is as it was when it was written."""
    try:
        meta = read_json(folder / "meta.json", Meta)
        probs, uncertainty = map_pseudo_label(folder)
    except InputError:
        return False
    is_shaped = (probs.shape, uncertainty.shape) == (shape, shape[1:])
    is_typed = probs.dtype == np.uint8 and uncertainty.dtype == np.float16
    return is_shaped and is_typed and not find_changed(folder, meta)


def map_pseudo_label(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Map probs (num_classes, I, J, K), 255 = 1, and uncertainty (I, J, K) of a pseudo-label.

    Raises:
        InputError: One of them is gone or damaged.
    """
    probs, uncertainty = (map_array(folder / name, _GONE) for name in _ARRAYS[:2])
    return probs, uncertainty


def read_slabs(folder: Path) -> Iterator[tuple[slice, NDArray[np.uint8], NDArray[np.float16]]]:
    """Yield planes of a pseudo-label along I, with its probs and uncertainty as they are stored.

    Each slab is mapped anew, so that the memory does not fill with what was looked at.

    Raises:
        InputError: The files are gone or damaged.
    """
    num_classes, num_planes, *plane = map_pseudo_label(folder)[0].shape
    step = max(1, _PIECE // (num_classes * int(np.prod(plane))))
    for start in range(0, num_planes, step):
        where = slice(start, min(start + step, num_planes))
        probs, uncertainty = map_pseudo_label(folder)
        yield where, probs[:, where], uncertainty[where]


def iterate_pseudo_label(folder: Path) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield probs (num_classes, I, J, K) and uncertainty (I, J, K), some planes along I at a time.

    Raises:
        InputError: The files are gone or damaged.
    """
    for _, probs, uncertainty in read_slabs(folder):
        yield probs.astype(np.float32) / np.float32(255), uncertainty.astype(np.float32)


def read_classes(folder: Path) -> Classes:
    """Return the classes (I, J, K) of a pseudo-label."""
    return np.concatenate([p.argmax(0).astype(np.uint8) for _, p, _ in read_slabs(folder)])


def read_stability(folder: Path) -> float | None:
    """Return the stability that stands with a pseudo-label, if it was measured."""
    value: float | None = read_json(folder / "meta.json", Meta).get("stability")
    return value


def draw_probs(folders: Sequence[Path]) -> Tensor:
    """Return (N, num_classes) probs of 100,000 voxels of pseudo-labels, as many from each."""
    each = max(1, _NUM_DRAWN // len(folders))
    drawn = []
    for folder in folders:
        probs, _ = map_pseudo_label(folder)
        rng = np.random.default_rng(seed_from("draw_probs", folder.name))
        places = rng.integers(int(np.prod(probs.shape[1:])), size=each)
        drawn.append(np.asarray(probs.reshape(len(probs), -1)[:, places].T, dtype=np.float32))
    samples = torch.from_numpy(np.concatenate(drawn))
    return samples / samples.sum(1, keepdim=True).clamp(min=1.0)


def measure_agreement(
    first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]], classes: Sequence[int]
) -> float:
    """Return the mean Dice of two class maps over the classes that either of them has.

    1 where both are empty: cases are ranked by it. Means over cases leave such ones out.
    """
    values = []
    for index in classes:
        a, b = first == index, second == index
        size = int(a.sum()) + int(b.sum())
        if size:
            values.append(2.0 * int((a & b).sum()) / size)
    return float(np.mean(values)) if values else 1.0
