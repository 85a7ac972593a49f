"""Batches of patches, each a pure function of (seed, round, step, index in batch, purpose).

Nothing about the randomness has to be saved, and any number of workers gives the same batches.
Axes: B batch, C channels, I J K voxel axes. In 2D a patch is cut from one slice of a case: the
batch then has the two axes of the plane, (B, C, I, J) where the slices lie along K.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medssl import ranks
from medssl.config import IGNORE, InputError, RandAugmentSection
from medssl.data.cache import CachedCase, read_class_voxels
from medssl.data.pseudo_labels import map_pseudo_label
from medssl.runs import seed_from
from medssl.transforms.intensity import apply_seeded, build_intensity, build_occlusion
from medssl.transforms.randaugment import (
    Operation,
    apply_intensity,
    draw_operations,
    spatial_matrix,
)
from medssl.transforms.spatial import SpatialDraw, draw_spatial

Batch = dict[str, dict[str, Tensor] | None]

_SHARED = Path("/dev/shm")  # loader processes hand their batches over there
_PREFETCH = 4  # batches that wait for each of them
SHARE_PATCHES = 256  # in which the shares of classes are counted, fewer of large ones:
SHARE_VOXELS = 2e7
LEAST_SHARE_PATCHES = 4  # of each labeled case, however large they are


@dataclass(frozen=True)
class UnlabeledCase:
    """An unlabeled case and its pseudo-label.

    ``folder`` holds probs.npy (num_classes, I, J, K) uint8, uncertainty.npy (I, J, K) float16 and
    class_voxels.npz, all on the cache grid; None for a method whose targets are made online.
    ``weight`` is how often patches are cut from it, relative to the others.
    """

    cached: CachedCase
    folder: Path | None
    weight: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """What decides the patches of a round besides the cases.

    ``foreground`` is the share of patches around a foreground voxel; ``strong`` scales the strong
    views, of which ``views`` names the ones that are made; ``flips`` are the axes of the volume
    that may be mirrored; ``num_unlabeled`` counts unlabeled patches per step. ``slice_axis`` is the
    axis along which slices are taken in 2D; then ``patch_size`` has the two others. From step
    ``fine_tune_from`` on there are labeled patches only, not augmented; ``pretrain`` leaves them
    out before it.
    """

    seed: int
    round_index: int
    patch_size: tuple[int, ...]
    batch: int
    num_unlabeled: int
    foreground: float
    strong: float
    flips: tuple[int, ...]
    views: tuple[str, ...] = ("strong",)
    randaugment: RandAugmentSection = field(default_factory=RandAugmentSection)
    fine_tune_from: int | None = None
    pretrain: bool = False
    slice_axis: int | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the volume that a patch has."""
        return tuple(axis for axis in range(3) if axis != self.slice_axis)


@dataclass(frozen=True)
class Cut:
    """Where a patch is cut: a draw, in the whole volume or in one slice of it."""

    draw: SpatialDraw
    slice_axis: int | None = None
    index: int = 0

    def sample(self, volume: NDArray[np.generic], nearest: bool) -> Tensor:
        """Return the patch (C, I, J[, K]) float32 of a volume (C, I, J, K); 0 outside of it."""
        if self.slice_axis is not None:
            volume = volume[(slice(None),) * (self.slice_axis + 1) + (self.index,)]
        return self.draw.sample(volume, nearest)

    def find_inside(self, shape: Sequence[int]) -> Tensor:
        """Return (1, I, J[, K]) float32: 1 inside a volume of a shape (I, J, K), 0 in padding."""
        return self.draw.find_inside([n for a, n in enumerate(shape) if a != self.slice_axis])


class PatchDataset(Dataset[Batch]):
    """The batch of each step of a round."""

    def __init__(
        self,
        labeled: Sequence[CachedCase],
        unlabeled: Sequence[UnlabeledCase],
        sampling: Sampling,
    ) -> None:
        self.labeled = list(labeled)
        self.unlabeled = list(unlabeled)
        self.sampling = sampling
        weights = np.array([case.weight for case in self.unlabeled])
        sums = np.cumsum(weights / weights.sum()) if len(set(weights.tolist())) > 1 else None
        self._sums = None if sums is None else sums / sums[-1]
        dimension = len(sampling.patch_size)
        self._weak = build_intensity(1.0, dimension)
        self._strong = build_intensity(2.0 * sampling.strong, dimension)
        self._occlusion = build_occlusion(sampling.patch_size, 2.0 * sampling.strong)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        tuning = is_fine_tune(self.sampling.fine_tune_from, step)
        alone = not self.unlabeled or tuning
        num_labeled = 0 if self.sampling.pretrain and not alone else self.sampling.batch
        num_unlabeled = 0 if alone else self.sampling.num_unlabeled
        with _draw_alike():
            labeled = [self._draw_labeled(step, index, tuning) for index in range(num_labeled)]
            unlabeled = [self._draw_unlabeled(step, index) for index in range(num_unlabeled)]
        return {"labeled": _stack(labeled), "unlabeled": _stack(unlabeled)}

    def measure_shares(self, num_classes: int) -> Tensor:
        """Return the share of each class (num_classes,) in labeled cases cut as unlabeled ones are.

        Patches hold the middle of a scan more often than its edge, so an organ has a larger share
        of them than of the scan: three times as large where they are small.
        """
        most = min(SHARE_PATCHES, SHARE_VOXELS / math.prod(self.sampling.patch_size))
        each = max(LEAST_SHARE_PATCHES, round(most / len(self.labeled)))
        counts = torch.zeros(num_classes, dtype=torch.float64)
        with _draw_alike():
            for index in range(each * len(self.labeled)):
                case = self.labeled[index % len(self.labeled)]
                seed = self._seed(index, 0, "share")
                operations = self._draw_operations(np.random.default_rng(seed + 1))
                draw = self._draw(seed, case, {}, operations)
                classes = draw.sample(_open_label(case)[None], nearest=True)
                counted = (draw.find_inside(case.shape) > 0) & (classes != IGNORE)
                counts += torch.bincount(classes[counted].long(), minlength=num_classes)
        return counts / counts.sum().clamp(min=1)

    def _draw_labeled(self, step: int, index: int, plain: bool) -> dict[str, Tensor]:
        """Cut one labeled patch, augmented or plain."""
        case = self.labeled[self._choose(len(self.labeled), "labeled", step, index)]
        label = _open_label(case)
        seed = self._seed(step, index, "labeled")
        draw = self._draw(seed, case, case.class_voxels(), plain=plain)
        image = draw.sample(case.image(), nearest=False)
        if not plain:
            image = apply_seeded(self._weak, image, seed)
        classes = draw.sample(label[None], nearest=True)
        inside = draw.find_inside(case.shape)
        weight = inside * (classes != IGNORE)
        return {"image": image * inside, "label": classes.to(torch.uint8), "weight": weight}

    def _draw_unlabeled(self, step: int, index: int) -> dict[str, Tensor]:
        """Cut one unlabeled patch with its weak and strong views and its pseudo-label."""
        case = self.unlabeled[self._choose(len(self.unlabeled), "unlabeled", step, index)]
        seed = self._seed(step, index, "unlabeled")
        voxels = read_class_voxels(case.folder) if case.folder else {}
        rng = np.random.default_rng(seed + 1)
        operations = self._draw_operations(rng)
        draw = self._draw(seed, case.cached, voxels, operations)
        weak = draw.sample(case.cached.image(), nearest=False)
        inside = draw.find_inside(case.cached.shape)
        patch = {"weak": weak * inside, "weight": inside}
        if "strong" in self.sampling.views:
            patch["strong"] = self._disturb(weak, operations, seed) * inside
        if "strong_2" in self.sampling.views:
            others = self._draw_operations(rng)
            patch["strong_2"] = self._disturb(weak, others, seed + 2) * inside
        if case.folder is None:
            return patch
        probs, uncertainty = map_pseudo_label(case.folder)
        sampled = draw.sample(probs, nearest=False)
        total = sampled.sum(0, keepdim=True)
        patch["probs"] = torch.where(total > 0, sampled / total.clamp(min=1.0), sampled)
        patch["uncertainty"] = draw.sample(uncertainty[None], nearest=False)
        patch["weight"] = inside * (total > 0)
        return patch

    def _draw_operations(self, rng: np.random.Generator) -> tuple[Operation, ...]:
        """Draw the operations of RandAugment on an unlabeled patch."""
        section = self.sampling.randaugment
        return draw_operations(rng, section.num_operations, section.magnitude)

    def _disturb(self, weak: Tensor, operations: Sequence[Operation], seed: int) -> Tensor:
        """Return a strong view: the weak one under intensity noise, RandAugment and occlusion."""
        image = apply_seeded(self._strong, weak, seed)
        image = apply_intensity(operations, image, seed)
        return apply_seeded(self._occlusion, image, seed + 1)

    def _draw(
        self,
        seed: int,
        case: CachedCase,
        voxels: Mapping[int, object],
        operations: Sequence[Operation] = (),
        plain: bool = False,
    ) -> Cut:
        """Draw the geometry of a patch, around a foreground voxel in a share of the patches.

        In 2D the voxel says which slice; without one, any slice is as likely.
        """
        rng = np.random.default_rng(seed)
        wants_foreground, which = rng.random(2)
        classes = [c for c, candidates in voxels.items() if c > 0 and len(np.asarray(candidates))]
        target = None
        if classes and wants_foreground < self.sampling.foreground:
            candidates = np.asarray(voxels[classes[int(which * len(classes))]])
            target = candidates[rng.integers(len(candidates))]
        spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
        normal, axes = self.sampling.slice_axis, list(self.sampling.axes)
        flips, strength = ((), 0.0) if plain else (self.sampling.flips, 1.0)
        index = 0
        if normal is not None:
            index = int(rng.integers(case.shape[normal]) if target is None else target[normal])
        plane = draw_spatial(
            rng,
            [case.shape[axis] for axis in axes],
            self.sampling.patch_size,
            None if target is None else target[axes],
            [place for place, axis in enumerate(axes) if axis in flips],
            strength,
            spacing[axes],
            spatial_matrix(operations, spacing[axes]) if operations else None,
        )
        return Cut(plane, normal, index)

    def _choose(self, num_cases: int, purpose: str, step: int, index: int) -> int:
        """Return which case a patch is cut from.

        Every case once per pass, in random order; by their weights where these differ.
        """
        per_step = self.sampling.batch if purpose == "labeled" else self.sampling.num_unlabeled
        if purpose == "unlabeled" and self._sums is not None:
            rng = np.random.default_rng(self._seed(step, index, "choice"))
            return int(self._sums.searchsorted(rng.random(), side="right"))
        turn, place = divmod(step * per_step + index, num_cases)
        key = (self.sampling.seed, self.sampling.round_index, purpose, "order", turn)
        return int(_shuffle(seed_from(*key), num_cases)[place])

    def _seed(self, step: int, index: int, purpose: str) -> int:
        """Return the seed of one patch."""
        sampling = self.sampling
        return seed_from(sampling.seed, sampling.round_index, step, index, purpose)


@contextlib.contextmanager
def _draw_alike() -> Iterator[None]:
    """Draw patches as a loader process does, whatever is set in this one."""
    threads, tracks = torch.get_num_threads(), get_track_meta()
    torch.set_num_threads(1)  # a sum over two threads rounds differently
    set_track_meta(False)  # of what was done to a patch, MONAI's record is not read
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_track_meta(tracks)


def _open_label(case: CachedCase) -> NDArray[np.uint8]:
    """Map the classes (I, J, K) of a labeled case."""
    label = case.label()
    if label is None:
        raise ValueError(f"{case.case_id}: a labeled case without a label in the cache")
    return label


@functools.lru_cache(maxsize=4)  # labeled and unlabeled, and the next order of each
def _shuffle(seed: int, size: int) -> NDArray[np.int64]:
    """Return the order of so many cases in a pass over them: not anew for each patch."""
    return np.random.default_rng(seed).permutation(size)


def is_fine_tune(first_step: int | None, step: int) -> bool:
    """Return whether a step belongs to the fine-tune at the end of a round."""
    return first_step is not None and step >= first_step


def _stack(patches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Stack patches into a batch; None if there are none."""
    return (
        None
        if not patches
        else {key: torch.stack([patch[key] for patch in patches]) for key in patches[0]}
    )


def iterate_batches(
    dataset: PatchDataset, first_step: int, num_steps: int, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches of the steps from ``first_step`` up to ``num_steps``, in order.

    Only as many loader processes are started as shared memory has room for their batches; a note
    says if these are fewer.

    Raises:
        InputError: A file that a batch is cut from is gone or damaged, or a loader process was
            killed, which torch may also raise elsewhere (`explain_killed_loader`).
    """
    num_workers = _limit_workers(dataset, first_step, num_workers) if first_step < num_steps else 0
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        sampler=range(first_step, num_steps),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCH if num_workers else None,
    )
    try:
        yield from loader
    except InputError as error:  # a worker's comes with its traceback
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
    except (OSError, EOFError) as error:  # of the way to a worker, not of what it read
        if not num_workers or "in DataLoader worker process" in str(error):
            raise
        raise InputError(_describe_killed(error)) from error


@contextlib.contextmanager
def explain_killed_loader() -> Iterator[None]:
    """Explain the error that torch raises, anywhere in the program, when a loader was killed.

    Raises:
        InputError: A loader process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise InputError(_describe_killed(error)) from error


def _describe_killed(error: Exception) -> str:
    """Say that a loader process was killed, and what to do."""
    signal = re.search(r"killed by signal: ([^.]+)", f"{error} {error.__cause__}")
    return (
        f"a loader process was killed{f' ({signal[1]})' if signal else ''}: memory or {_SHARED} is "
        "full, or a file of the cache was cut while it was read; the same command goes on from the "
        "last checkpoint, with train.workers=0 in this process alone"
    )


def _limit_workers(dataset: PatchDataset, step: int, num_workers: int) -> int:
    """Return how many loader processes may run: where shared memory is full, torch waits forever.

    Half of what is free is taken: there may be other trainings, and later batches may be larger.
    """
    if not num_workers or not _SHARED.is_dir():
        return num_workers
    parts = (part for part in dataset[step].values() if part is not None)
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    free = shutil.disk_usage(_SHARED).free
    fitting = int(free / 2 / ranks.count_neighbors() / (_PREFETCH * size))
    if fitting < num_workers:
        print(
            f"note: {_SHARED} has {free / 1e6:.0f} MB free, and {_PREFETCH} batches of "
            f"{size / 1e6:.1f} MB wait there for each loader process: {fitting} are started, not "
            f"{num_workers}; give a container more of it, as --shm-size=1g",
            file=sys.stderr,
        )
    return min(fitting, num_workers)
