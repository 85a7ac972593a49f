"""Pseudo-labels on disk: probs and uncertainty on the cache grid, with no threshold applied.

Axes: I J K voxel axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.config import InputError
from medssl.data.cache import map_array
from medssl.runs import (
    Shape,
    find_changed,
    hash_files,
    read_json,
    seed_from,
    write_file,
    write_json,
)

MOST_VOXELS = 5_000  # per class, kept to place patches on
_GONE = (
    "cannot be read: damaged, or removed while it was used; delete the done.json of its round: the "
    "same command then makes it anew"
)
_ARRAYS = ("probs.npy", "uncertainty.npy", "class_voxels.npz")


class Meta(Shape):
    """meta.json of a pseudo-label."""

    teacher: str
    stability: float | None = None


def write_pseudo_label(
    folder: Path,
    probs: NDArray[np.float32],
    uncertainty: NDArray[np.float32],
    teacher: str,
    stability: float | None = None,
) -> None:
    """Write the pseudo-label of a case; meta.json comes last, so its existence means whole.

    Args:
        folder: pseudo_labels/<case_id>.
        probs: (num_classes, I, J, K); stored as uint8, 255 = 1.
        uncertainty: (I, J, K) predictive entropy in nats; stored as float16.
        teacher: Hash of the weights that made it.
        stability: Mean Dice with what earlier checkpoints of the teacher said, if measured.

    Raises:
        FloatingPointError: Probs or uncertainty are not finite.
    """
    if not (np.isfinite(probs).all() and np.isfinite(uncertainty).all()):
        raise FloatingPointError(f"{folder.name}: a pseudo-label of non-finite numbers")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    stored = np.rint(probs * 255).astype(np.uint8)
    voxels = _draw_class_voxels(stored)
    _save(folder / "probs.npy", stored)
    _save(folder / "uncertainty.npy", uncertainty.astype(np.float16))
    named: dict[str, Any] = {str(index): places for index, places in voxels.items()}
    write_file(folder / "class_voxels.npz", lambda path: _save_archive(path, named))
    files = hash_files(folder, *_ARRAYS)
    write_json(folder / "meta.json", {"teacher": teacher, "stability": stability, "files": files})


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write an array atomically."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_file(path, save)


def _save_archive(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays under exactly this file name."""
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _draw_class_voxels(probs: NDArray[np.uint8]) -> dict[int, NDArray[np.int32]]:
    """Return some voxels of each foreground class of a pseudo-label."""
    classes = probs.argmax(0)
    result = {}
    for index in range(1, len(probs)):
        candidates = np.argwhere(classes == index).astype(np.int32)
        rng = np.random.default_rng(seed_from("class_voxels", index))
        chosen = rng.choice(len(candidates), min(len(candidates), MOST_VOXELS), replace=False)
        result[index] = candidates[np.sort(chosen)]
    return result


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


def read_pseudo_label(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return probs (num_classes, I, J, K) and uncertainty (I, J, K) of a pseudo-label."""
    probs, uncertainty = (array.astype(np.float32) for array in map_pseudo_label(folder))
    return probs / np.float32(255), uncertainty


def read_stability(folder: Path) -> float | None:
    """Return the stability that stands with a pseudo-label, if it was measured."""
    value: float | None = read_json(folder / "meta.json", Meta).get("stability")
    return value


def draw_probs(folders: Sequence[Path], num_voxels: int = 100_000) -> Tensor:
    """Return (N, num_classes) probs of voxels drawn from pseudo-labels, as many from each."""
    each = max(1, num_voxels // len(folders))
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
