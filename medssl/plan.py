"""From the data and the machine to a plan: no configuration is needed, and each choice says why.

Voxel axes I, J, K point to right, anterior, superior; in pictures to the rows below, the columns to
the right, and the next page. In 2D a plan has a slice axis; sizes are those of the plane.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from medssl import machine
from medssl.config import IGNORE, Config, InputError, at_round
from medssl.data.cases import Case, Dataset
from medssl.data.io import read_geometry, read_image, read_label
from medssl.data.pseudo_labels import measure_agreement
from medssl.formats.readers import get_reader
from medssl.networks.build import (
    ENCODER_FACTOR,
    LEAST_SIDE,
    NetworkSpec,
    build_network,
)
from medssl.sides import find_mirrored, find_sided
from medssl.transforms.geometry import Affine, GridSpacing, cache_grid, grid_spacing
from medssl.transforms.preprocess import Normalization, Preprocessing, preprocess_label
from medssl.windows import OVERLAP, Window

CPU_PATCH_VOXELS = 110_000
GPU_PATCH_VOXELS = 128**3
CPU_PATCH_PIXELS = 160**2
GPU_PATCH_PIXELS = 512**2
CPU_BATCH_PIXELS = 2 * 160**2  # half a second of an encoder network's step on one core
GPU_BATCH_PIXELS = 12 * 512**2
MOST_PATCHES = {"cpu": 8, "gpu": 32}  # of a batch in 2D
THICK = 3.0  # times the spacing in plane from which on slices are thick
WHOLE = 0.5  # share of a scan's voxels in a patch, from which on it shows where in the body it is
COARSENINGS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # times the finest spacing
LEAST_AGREEMENT = 0.93  # Dice of labels and themselves after a coarser grid: few labels lose more
LEAST_SPEEDUP = 1.1  # of bfloat16 over float32 on a processor, which is no reason below
MOST_LABELS = 4  # of which that is measured
FEW_SLICES = 16  # under which a 3D network cannot halve their axis twice
_MOST_LEVELS = {  # by whether the network is flat, and whether it is on a GPU
    (False, False): 4,
    (False, True): 6,
    (True, False): 6,
    (True, True): 7,
}
MOST_FOREGROUND = 10**8  # voxels that the normalization of CT is taken from
CT_SCANS = 2  # that are looked at
CT_AIR, CT_BONE = -900.0, 300.0  # HU; air is at -1000, and what lies outside of the tube lower
LOOKS_LIKE_CT = "it looks like CT, with the air and bone of Hounsfield units"
AXES = ("left-right", "back-front", "feet-head")
CPU_STEPS = {2: (8000, 1600), 3: (2400, 1600)}
"""By dimension, of round 0, which ends about where it levels off, and of a student after it."""
GPU_STEPS = 10_000
_LEVEL_OFF = "what a processor has time for, and where few labels level off"
DEFAULT_ENCODER = "resnet18"
CPU_FILTERS = 16
GPU_FILTERS = 32
LEAST_FILTERS = 8
MOST_FILTERS = 320


class Plan(BaseModel):
    """What a run is made with; it stands in plan.json, where a person can read it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: dict[int, str]  # class index -> name, 0 is the background
    label_values: tuple[int, ...]  # class index -> value in the label files
    ignore: int | None
    channels: tuple[str, ...]
    palette: dict[int, tuple[int, int, int]] = {}  # label value -> RGB, of labels with a palette
    preprocessing: Preprocessing
    patch_size: tuple[int, ...]  # voxels; in 2D those of the plane
    slice_axis: Literal[0, 1, 2] | None = None  # along which slices are taken; None in 3D
    has_spacing: bool = True  # False for pictures, whose unit is the pixel
    flips: tuple[int, ...]  # axes of the volume
    network: NetworkSpec
    batch: int
    num_unlabeled: int
    steps: int | tuple[int, ...]
    device: str
    precision: str
    threads: int
    workers: int
    reasons: tuple[str, ...]
    estimate: dict[str, float]  # step_seconds, hours, disk_mb, windows (of all scans, once)

    @property
    def num_classes(self) -> int:
        """Number of classes, with background."""
        return len(self.label_values)

    @property
    def dimension(self) -> Literal[2, 3]:
        """2 for a network that sees slices, 3 for one that sees volumes."""
        return 3 if self.slice_axis is None else 2

    @property
    def window(self) -> Window:
        """How the network is moved over a scan, averaged over mirrorings."""
        return Window(self.patch_size, self.precision, self.flips, self.slice_axis)


def make_plan(
    config: Config,
    dataset: Dataset,
    labels: Mapping[int, str],
    labeled: Sequence[Case],
    unlabeled: Sequence[Case],
) -> Plan:
    """Decide everything that is ``auto``, from headers, labeled voxels and the machine.

    Args:
        config: The configuration, with ``auto`` values.
        dataset: The data set, for its channels and ignore value.
        labels: Names of all label values, 0 included.
        labeled: Labeled training cases.
        unlabeled: Unlabeled cases, without labels.

    Raises:
        InputError: A file's header cannot be read, or a given value does not fit the data.
    """
    reasons: list[str] = []
    device = machine.choose_device(config.train.device)
    on_gpu = device != "cpu"
    reasons.append(f"device {device}: " + ("found" if on_gpu else "no GPU was found or asked for"))
    cases = [*labeled, *unlabeled]
    has_spacing = all(get_reader(case.images[0]).has_spacing for case in cases)
    grids = [read_geometry(case.images[0]) for case in cases]
    ras_grids = [cache_grid(shape, affine, (None, None, None)) for shape, affine in grids]
    spacings = np.array([grid_spacing(affine) for _, affine in ras_grids])
    slice_axis = _choose_slice_axis(
        config, np.array([shape for shape, _ in ras_grids]), spacings, has_spacing, reasons
    )
    axes = [axis for axis in range(3) if axis != slice_axis]
    spacing = _choose_spacing(config, spacings, axes, has_spacing, reasons)
    ignore = config.data.ignore if config.data.ignore is not None else dataset.ignore
    auto = config.plan.spacing == config.plan.patch_size == "auto"
    if auto and has_spacing:
        budget = _find_budget(len(axes) == 2, on_gpu)
        values = tuple(sorted(labels))
        spacing = _coarsen_spacing(spacing, grids, budget, labeled, values, ignore, reasons)
    num_channels = max(1, len(dataset.channels))
    _refuse_fine_spacing(config, ras_grids, spacing, num_channels)
    shapes = np.array([cache_grid(shape, affine, spacing)[0] for shape, affine in grids])
    normalization = _choose_normalization(config, dataset, labels, labeled, has_spacing, reasons)
    in_plane = [step for step in spacing if step is not None]
    patch_size, network = _choose_network(
        config, shapes[:, axes], in_plane, (num_channels, len(labels)),
        bool(unlabeled), on_gpu, reasons,
    )  # fmt: skip
    batch = _choose_batch(config, patch_size, on_gpu, reasons)
    steps = config.train.steps
    if steps == "auto":
        goes_on = config.train.start == "warm"
        on_cpu = CPU_STEPS[len(axes)] if goes_on else CPU_STEPS[len(axes)][0]
        steps = GPU_STEPS if on_gpu else on_cpu
        why = "by default on a GPU, where none was measured" if on_gpu else _LEVEL_OFF
        reasons.append(f"{describe_steps(steps)}: {why}")
    precision = _choose_precision(config.train.precision, device, reasons)
    threads = machine.choose_threads()
    if threads < machine.TORCH_THREADS:
        reasons.append(
            f"{threads} of {machine.TORCH_THREADS} threads: what other programs leave free"
        )
    workers = _choose_workers(config, on_gpu)
    num_unlabeled = count_unlabeled(config, batch, 1)
    flips = _choose_flips(config, labels, labeled, ignore, slice_axis, has_spacing, reasons)
    return Plan(
        labels={index: labels[value] for index, value in enumerate(sorted(labels))},
        label_values=tuple(sorted(labels)),
        ignore=ignore,
        channels=dataset.channels or ("",),
        preprocessing=Preprocessing(spacing=spacing, normalization=normalization),
        patch_size=patch_size,
        slice_axis=slice_axis,
        has_spacing=has_spacing,
        flips=flips,
        network=network,
        batch=batch,
        num_unlabeled=num_unlabeled,
        steps=steps,
        device=device,
        precision=precision,
        threads=threads,
        workers=workers,
        reasons=tuple(reasons),
        estimate={
            **_estimate_disk(shapes, len(unlabeled), network),
            "windows": _count_windows(shapes[len(labeled) :], patch_size, axes),
        },
    )


def _choose_filters(first: float, levels: int) -> tuple[int, ...]:
    """Return the channels of each level: multiples of the least, doubling."""
    start = max(1, round(first / LEAST_FILTERS)) * LEAST_FILTERS
    return tuple(min(MOST_FILTERS, start * 2**level) for level in range(levels))


def count_unlabeled(config: Config, batch: int, round_index: int) -> int:
    """Return the number of unlabeled patches per step of a student round, 1 being the first."""
    return max(1, round(batch * at_round(config.train.unlabeled_ratio, round_index - 1)))


def describe_student(plan: Plan, config: Config, round_index: int) -> NetworkSpec:
    """Return the network of a student: the plan's in its own width, with its noise."""
    widths = config.network.width
    scale = at_round(widths, round_index) / at_round(widths, 0)
    spec, dropout = plan.network, config.noise.dropout
    filters = spec.filters  # empty for networks with an encoder
    if filters:
        filters = _choose_filters(filters[0] * scale, len(filters))
    return spec.model_copy(
        update={
            "filters": filters,
            "dropout": spec.dropout if dropout == "auto" else dropout,
            "stochastic_depth": config.noise.stochastic_depth,
        }
    )


def _choose_slice_axis(
    config: Config,
    shapes: NDArray[np.int_],
    spacings: NDArray[np.float64],
    has_spacing: bool,
    reasons: list[str],
) -> Literal[0, 1, 2] | None:
    """Return the axis along which a 2D network gets its slices, or None for a 3D network.

    Args:
        config: The configuration.
        shapes: Shapes (n, 3) of the scans.
        spacings: Their spacings (n, 3), in mm.
        has_spacing: False for pictures.
        reasons: Takes the reason.
    """
    shape, spacing = np.median(shapes, axis=0), np.median(spacings, axis=0)
    thick = _find_thick_axis(shape, spacing) if has_spacing else 2
    others = np.delete(spacing, thick)
    ratio = float(spacing[thick] / others.max())
    dimensions = {len(v) for v in (config.plan.patch_size, config.plan.spacing) if v != "auto"}
    dimension = config.plan.dimension
    if dimension == "auto" and dimensions:
        dimension = 2 if dimensions == {2} else 3
    if len(dimensions) > 1 or (dimensions and dimensions != {dimension}):
        raise InputError(
            f"plan.dimension={config.plan.dimension}: plan.spacing and plan.patch_size have "
            f"{' and '.join(str(n) for n in sorted(dimensions))} entries; in dimension 2 they have "
            "two, those of the plane, in dimension 3 three"
        )
    if dimension == "auto":
        few = shape[thick] < FEW_SLICES
        dimension = 2 if not has_spacing or (shape[thick] == 1) or (ratio > THICK and few) else 3
        why = (
            "pictures; what lies between the pages of one is not known"
            if not has_spacing
            else f"along {AXES[thick]} slices are {spacing[thick]:g} mm apart, {ratio:.1f} times "
            f"the {others.max():g} mm in plane, and a scan has {shape[thick]:g} of them (2D from "
            f"{THICK:g} times on, with fewer than {FEW_SLICES})"
        )
    else:
        why = "as given"
    if dimension == 3:
        reasons.append(f"3D: {why}")
        return None
    where = f"slice by slice along {AXES[thick]}" if has_spacing else "picture by picture"
    reasons.append(f"2D, {where}: {why}")
    return thick  # type: ignore[return-value]  # 0, 1 or 2


def _find_thick_axis(shape: NDArray[np.float64], spacing: NDArray[np.float64]) -> int:
    """Return an axis of one slice, else the coarsest; of equal ones, that with fewest slices."""

    def rank(axis: int) -> tuple[bool, float, float, int]:
        return bool(shape[axis] == 1), round(float(spacing[axis]), 3), -float(shape[axis]), axis

    return max(range(3), key=rank)


def _choose_spacing(
    config: Config,
    spacings: NDArray[np.float64],
    axes: Sequence[int],
    has_spacing: bool,
    reasons: list[str],
) -> GridSpacing:
    """Return the spacing of the cache grid in mm; None along slices, which are never resampled."""
    setting = config.plan.spacing
    values = np.median(spacings, axis=0)[list(axes)] if setting == "auto" else setting
    chosen: list[float | None] = [None, None, None]
    for axis, value in zip(axes, values, strict=True):
        chosen[axis] = round(float(value), 4) if value > 0.1 else float(f"{value:.4g}")
    text = " x ".join(f"{step:g}" for step in chosen if step is not None)
    if setting == "auto" and has_spacing:
        reasons.append(f"spacing {text} mm: the median of {len(spacings)} scans")
    elif setting == "auto":
        reasons.append("no spacing: pictures keep their pixels, which are the unit of length")
    return chosen[0], chosen[1], chosen[2]


def _coarsen_spacing(
    spacing: GridSpacing,
    grids: Sequence[tuple[tuple[int, int, int], Affine]],
    budget: int,
    labeled: Sequence[Case],
    label_values: tuple[int, ...],
    ignore: int | None,
    reasons: list[str],
) -> GridSpacing:
    """Return a spacing at which a patch holds much of a scan, no coarser than the labels allow.

    A patch that holds little of a scan does not show where in the body it lies, and a few labels
    do not teach to tell alike organs, or levels of the spine, from the last millimeter.

    Source: the second configuration, at low resolution, of nnU-Net (Isensee et al. 2021).
    """
    axes = [axis for axis, step in enumerate(spacing) if step is not None]

    def count(spacing: GridSpacing) -> float:
        shapes = [cache_grid(shape, affine, spacing)[0] for shape, affine in grids]
        return float(np.median(shapes, axis=0)[axes].prod())

    if budget >= WHOLE * count(spacing):
        return spacing
    crops = _crop_labels(labeled, label_values, ignore)
    finest = min(step for step in spacing if step is not None)
    fine = spacing
    for factor in COARSENINGS:
        i, j, k = (None if step is None else max(step, round(factor * finest, 4)) for step in fine)
        if not _keep_labels(crops, (i, j, k)):
            break
        spacing = i, j, k
        if budget >= WHOLE * count(spacing):
            break
    if spacing != fine:
        reasons.append(
            f"made coarser, {' x '.join(f'{spacing[axis]:g}' for axis in axes)} mm: a patch holds "
            f"{min(1, budget / count(spacing)):.0%} of a {'slice' if len(axes) == 2 else 'scan'} "
            f"then, else {budget / count(fine):.0%}, and labels keep {LEAST_AGREEMENT:.0%} of "
            f"their Dice; for the scans' own: plan.spacing={[fine[axis] for axis in axes]}"
        )
    return spacing


def _crop_labels(
    labeled: Sequence[Case], label_values: tuple[int, ...], ignore: int | None
) -> list[tuple[NDArray[np.uint8], Affine]]:
    """Return the foreground of a few labels, with two voxels around it, and its affine."""
    crops = []
    for case in labeled[:: -(-len(labeled) // MOST_LABELS) or 1]:
        if case.label is None:
            continue
        label, affine = read_label(case.label, label_values, ignore, case)
        boxes = ndimage.find_objects(((label > 0) & (label != IGNORE)).astype(np.uint8))
        if not boxes:
            continue
        start = np.array([max(part.start - 2, 0) for part in boxes[0]])
        inside = tuple(slice(a, part.stop + 2) for a, part in zip(start, boxes[0], strict=True))
        affine = affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        crops.append((label[inside].copy(), affine))  # not a view, which would hold the whole label
    return crops


def _keep_labels(crops: Sequence[tuple[NDArray[np.uint8], Affine]], spacing: GridSpacing) -> bool:
    """Return whether each class is nearly the same after it was brought to a grid and back."""
    agreements: dict[int, list[float]] = {}
    for label, affine in crops:
        shape, grid = cache_grid(label.shape, affine, spacing)
        coarse = preprocess_label(label, affine, shape, grid)
        back = preprocess_label(coarse, grid, label.shape, affine)
        back[label == IGNORE] = IGNORE
        for index in np.unique(label[label != IGNORE]):
            agreements.setdefault(int(index), []).append(measure_agreement(label, back, [index]))
    means = [float(np.mean(values)) for index, values in agreements.items() if index]
    return bool(means) and min(means) >= LEAST_AGREEMENT


def _refuse_fine_spacing(
    config: Config,
    grids: Sequence[tuple[tuple[int, ...], NDArray[np.float64]]],
    spacing: GridSpacing,
    num_channels: int,
) -> None:
    """Refuse a spacing that makes grids beyond this machine's memory."""
    limit = machine.read_memory_limit()
    for shape, affine in grids:
        voxels = math.prod(
            size if step is None else size * native_step / step
            for size, native_step, step in zip(shape, grid_spacing(affine), spacing, strict=True)
        )
        if voxels * num_channels * 4 > limit and config.plan.spacing != "auto":
            raise InputError(
                f"plan.spacing={list(config.plan.spacing)}: a scan of {shape} voxels would have "
                f"{voxels:.3g} of them, more than fit {limit / 1e9:.0f} GB; it is in mm: make it "
                "coarser"
            )


def _choose_normalization(
    config: Config,
    dataset: Dataset,
    labels: Mapping[int, str],
    labeled: Sequence[Case],
    has_spacing: bool,
    reasons: list[str],
) -> tuple[Normalization, ...]:
    """Return how each channel is normalized: HU statistics for CT, z-score for all else."""
    channels = dataset.channels or ("",)
    ignore = config.data.ignore if config.data.ignore is not None else dataset.ignore
    result = []
    for index, name in enumerate(channels):
        kind, hint = config.plan.normalization, ""
        if kind == "auto":
            looks = partial(_look_like_ct, labeled[:CT_SCANS], index, len(channels))
            kind, hint = _recognize_ct(name, looks if has_spacing else None)
        reasons.append(f"channel {index} ({name or 'unknown'}): normalization {kind}{hint}")
        if kind == "zscore":
            result.append(Normalization(kind="zscore"))
            continue
        values = _collect_foreground(labeled, index, len(channels), tuple(sorted(labels)), ignore)
        low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
        clipped = np.clip(values, low, high)
        mean, std = float(clipped.mean()), max(float(clipped.std()), 1e-3)
        result.append(Normalization(kind="ct", low=low, high=high, mean=mean, std=std))
    return tuple(result)


def _recognize_ct(
    name: str, look: Callable[[], bool] | None
) -> tuple[Literal["zscore", "ct"], str]:
    """Return the normalization of a channel for which none is set, and what to say of it.

    ``look`` tells whether its scans look like CT; None for pictures.
    """
    plain = name.strip().lower()
    if plain in ("ct", "computed tomography"):
        return "ct", ""
    if look is None:
        return "zscore", ""
    if not look():
        hint = "; for CT in Hounsfield units plan.normalization=ct"
        return "zscore", "" if name else hint
    if re.search(r"(?<![a-z])ct(?![a-z])", plain):
        return "ct", ": its name says so, and it looks like it; else plan.normalization=zscore"
    return "zscore", f"; but {LOOKS_LIKE_CT}: if it is, plan.normalization=ct"


def _look_like_ct(cases: Sequence[Case], channel: int, num_channels: int) -> bool:
    """Return whether scans hold whole numbers from those of air to those of bone."""
    for case in cases:
        values = read_image(case.images, num_channels).array[channel]
        some = values.reshape(-1)[:: 1 + values.size // 10**6]
        if values.min() > CT_AIR or values.max() < CT_BONE or (some != np.rint(some)).any():
            return False
    return bool(cases)


def _collect_foreground(
    labeled: Sequence[Case],
    channel: int,
    num_channels: int,
    label_values: tuple[int, ...],
    ignore: int | None,
) -> NDArray[np.float32]:
    """Return intensities of labeled foreground voxels: of thousands of scans some of each."""
    most = max(1, MOST_FOREGROUND // max(1, len(labeled)))
    pieces = []
    for case in labeled:
        if case.label is None:
            continue
        classes, _ = read_label(case.label, label_values, ignore, case)
        image = read_image(case.images, num_channels).array[channel]
        values = image[(classes > 0) & (classes < len(label_values))]
        pieces.append(values[:: -(-values.size // most) or 1])
    values = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(values):
        raise InputError(
            "CT is normalized by its labeled foreground, but no labeled case has any; set "
            "plan.normalization=zscore"
        )
    return values


def _choose_network(
    config: Config,
    shapes: NDArray[np.int_],
    spacing: Sequence[float],
    counts: tuple[int, int],
    has_students: bool,
    on_gpu: bool,
    reasons: list[str],
) -> tuple[tuple[int, ...], NetworkSpec]:
    """Return the patch size and the network; of both one entry for each axis of ``shapes``."""
    dimension = shapes.shape[1]
    name = config.network.name
    if name == "auto":
        wants_encoder = config.network.pretrained or config.network.encoder != "auto"
        name = "unet" if dimension == 2 and wants_encoder else "dynunet"
    if name != "dynunet":
        patch_size = _choose_encoder_patch(config, shapes, on_gpu, reasons)
        return patch_size, _choose_encoder(config, name, counts, has_students, reasons)
    if config.network.encoder != "auto":
        raise InputError(
            f"network.encoder={config.network.encoder}: a DynUNet, the network in 3D, has no other "
            "encoder than its own; leave it out, or in 2D take network.name=unet"
        )
    if config.network.pretrained:
        raise InputError(
            "network.pretrained=true: a DynUNet has no encoder with weights of ImageNet; in 2D "
            "take network.name=unet"
        )
    patch_size, strides = _choose_patch(config, shapes, spacing, on_gpu, reasons)
    base = GPU_FILTERS if on_gpu else CPU_FILTERS
    filters = _choose_filters(base * at_round(config.network.width, 0), len(strides))
    reasons.append(
        f"network DynUNet with residual blocks, {len(strides)} levels, filters {filters}, channel "
        f"dropout {config.network.dropout}"
    )
    return patch_size, NetworkSpec(
        in_channels=counts[0],
        num_classes=counts[1],
        filters=filters,
        kernels=tuple(_choose_kernel(level, spacing) for level in range(len(strides))),
        strides=strides,
        dropout=config.network.dropout,
        deep_supervision=config.network.deep_supervision,
    )


def _choose_encoder(
    config: Config, name: Any, counts: tuple[int, int], has_students: bool, reasons: list[str]
) -> NetworkSpec:
    """Return a network of segmentation-models-pytorch, built once so that mistakes come first."""
    section = config.network
    encoder = DEFAULT_ENCODER if section.encoder == "auto" else section.encoder
    if at_round(section.width, 0) != 1.0 or section.depth not in (
        "auto",
        ENCODER_FACTOR.bit_length(),
    ):
        raise InputError(
            f"network.width={section.width}, network.depth={section.depth}: {name} has the "
            "channels and levels of its encoder; leave both out and choose another "
            "network.encoder, as resnet34, or network.name=dynunet"
        )
    spec = NetworkSpec(
        name=name,
        in_channels=counts[0],
        num_classes=counts[1],
        dropout=section.dropout,
        encoder=encoder,
        pretrained=section.pretrained,
    )
    noisy = has_students and config.train.rounds > 0
    build_network(
        spec.model_copy(update={"stochastic_depth": config.noise.stochastic_depth if noisy else 1})
    )
    if section.width != 1.0:
        reasons.append(f"students as large as their teacher: {name} has the width of its encoder")
    norm = "batch norm, from weights of ImageNet" if section.pretrained else "instance norm"
    reasons.append(
        f"network {name} with encoder {encoder}, {norm}, channel dropout {section.dropout}"
    )
    return spec


def _choose_encoder_patch(
    config: Config, shapes: NDArray[np.int_], on_gpu: bool, reasons: list[str]
) -> tuple[int, ...]:
    """Return the patch size, in pixels, of a network with an encoder: multiples of 32 from 64."""
    if shapes.shape[1] == 3:
        raise InputError(
            f"network.name={config.network.name}: is for 2D, and these are volumes; leave it out, "
            "or set plan.dimension=2 to segment them slice by slice"
        )
    budget = _find_budget(True, on_gpu)
    setting = config.plan.patch_size
    median = np.median(shapes, axis=0)
    target = median.copy() if setting == "auto" else np.array(setting, dtype=float)
    while True:
        size = _fit_encoder_patch(target)
        if setting != "auto" or size.prod() <= budget:
            break
        target[np.argmax(target)] *= 0.9
    if setting != "auto" and tuple(size) != tuple(setting):
        raise InputError(
            f"plan.patch_size={list(setting)}: with an encoder each side must be a multiple of "
            f"{ENCODER_FACTOR} and {LEAST_SIDE} at least; the nearest is {size.tolist()}"
        )
    _explain_patch(size, median, budget, "pixels", reasons)
    return tuple(size.tolist())


def _fit_encoder_patch(target: NDArray[np.float64]) -> NDArray[np.int_]:
    """Return the nearest patch size, no smaller, that a network with an encoder takes."""
    size = np.ceil(target / ENCODER_FACTOR) * ENCODER_FACTOR
    return size.clip(LEAST_SIDE).astype(int)


def _explain_patch(
    size: NDArray[np.int_],
    median: NDArray[np.float64],
    budget: int,
    unit: str,
    reasons: list[str],
) -> None:
    """Say why a patch has its size."""
    reasons.append(
        f"patch {'x'.join(str(n) for n in size)} {unit}: scans have a median of "
        f"{'x'.join(f'{n:g}' for n in median)}, at most {budget} {unit} fit this device's time"
    )


def _choose_batch(
    config: Config, patch_size: Sequence[int], on_gpu: bool, reasons: list[str]
) -> int:
    """Return the number of labeled patches of a step."""
    if config.train.batch != "auto":
        if config.train.batch == 1 and config.noise.labeled_mixing != "none":
            reasons.append(
                "batch 1: labeled patches are not mixed with each other, as one is alone"
            )
        return config.train.batch
    if len(patch_size) == 3:
        return 2
    most = MOST_PATCHES["gpu" if on_gpu else "cpu"]
    fitting = (GPU_BATCH_PIXELS if on_gpu else CPU_BATCH_PIXELS) // math.prod(patch_size)
    batch = min(most, max(2, fitting))
    reasons.append(f"batch {batch}: patches of one slice are small")
    return batch


def _choose_patch(
    config: Config,
    shapes: NDArray[np.int_],
    spacing: Sequence[float],
    on_gpu: bool,
    reasons: list[str],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the patch size in voxels and the strides of the levels of a DynUNet."""
    is_flat = shapes.shape[1] == 2
    budget = _find_budget(is_flat, on_gpu)
    setting = config.plan.patch_size
    median = np.median(shapes, axis=0)
    target = median.copy() if setting == "auto" else np.array(setting, dtype=float)
    most = config.network.depth if config.network.depth != "auto" else _MOST_LEVELS[is_flat, on_gpu]
    while True:
        size, strides = _fit_patch(target, spacing, most)
        if setting != "auto" or size.prod() <= budget:
            break
        target[np.argmax(target / median * target)] *= 0.9
    if config.network.depth != "auto" and len(strides) < config.network.depth:
        raise InputError(
            f"network.depth={config.network.depth}: a patch of {'x'.join(str(n) for n in size)} "
            f"voxels has room for {len(strides)} levels; lower it, or leave it out"
        )
    factor = np.prod(np.array(strides), axis=0)
    if setting != "auto" and tuple(size) != tuple(setting):
        raise InputError(
            f"plan.patch_size={list(setting)}: with {len(strides)} levels each side must be a "
            f"multiple of {factor.tolist()}; the nearest is {size.tolist()}"
        )
    if (size == factor).all():
        raise InputError(
            f"plan.patch_size={size.tolist()}: after {len(strides)} levels one voxel of a patch is "
            "left; give larger ones"
        )
    _explain_patch(size, median, budget, "pixels" if is_flat else "voxels", reasons)
    return tuple(size.tolist()), strides


def _fit_patch(
    target: NDArray[np.float64], spacing: Sequence[float], most: int
) -> tuple[NDArray[np.int_], tuple[tuple[int, ...], ...]]:
    """Return the nearest patch size, no smaller, that a DynUNet takes, and its strides."""
    strides = _choose_strides(target, np.array(spacing), most)
    factor = np.prod(np.array(strides), axis=0)
    return np.maximum(np.ceil(target / factor) * factor, factor).astype(int), strides


def suggest_patch(plan: Plan, config: Config, share: float) -> tuple[int, ...] | None:
    """Return a smaller patch size that the same plan would take, or None if there is none.

    Args:
        plan: The plan, whose spacing stays.
        config: Its configuration.
        share: Of the voxels of the plan's patch, at most.
    """
    spacing = [step for step in plan.preprocessing.spacing if step is not None]
    on_gpu, is_own = plan.device != "cpu", plan.network.name == "dynunet"
    levels = len(plan.network.strides)
    target = np.array(plan.patch_size, dtype=float)
    most = share * target.prod()
    while target.max() > 1:
        target[np.argmax(target)] *= 0.9
        size = _fit_patch(target, spacing, levels)[0] if is_own else _fit_encoder_patch(target)
        if size.prod() > most:
            continue
        section = config.plan.model_copy(update={"patch_size": tuple(size.tolist())})
        smaller = config.model_copy(update={"plan": section})
        with contextlib.suppress(InputError):
            if is_own:
                return _choose_patch(smaller, size[None], spacing, on_gpu, [])[0]
            return _choose_encoder_patch(smaller, size[None], on_gpu, [])
    return None


def _find_budget(is_flat: bool, on_gpu: bool) -> int:
    """Return how many voxels of a patch, or pixels in 2D, a device has time for."""
    if is_flat:
        return GPU_PATCH_PIXELS if on_gpu else CPU_PATCH_PIXELS
    return GPU_PATCH_VOXELS if on_gpu else CPU_PATCH_VOXELS


def _choose_strides(
    size: NDArray[np.float64], spacing: NDArray[np.float64], most: int
) -> tuple[tuple[int, ...], ...]:
    """Return strides: halve an axis while it stays long enough and is not the coarse one.

    Source: Isensee et al. 2021 (nnU-Net), the rule for the network topology.
    """
    size, spacing = size.copy(), spacing.copy()
    strides: list[tuple[int, ...]] = [(1,) * len(size)]
    while len(strides) < most:
        can = (size >= 8) & (spacing <= 2 * spacing[size >= 8].min(initial=math.inf))
        if not can.any() and len(strides) >= 3:
            break
        stride = np.where(can, 2, 1)
        size, spacing = size / stride, spacing * stride
        strides.append(tuple(stride.tolist()))
    return tuple(strides)


def _choose_kernel(level: int, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the kernel of a level: flat along an axis that is still coarser than the others."""
    now = np.array(spacing)
    finest = now.min() * 2**level
    return tuple(np.where(now > 2 * finest, 1, 3).tolist())


def _choose_flips(
    config: Config,
    labels: Mapping[int, str],
    labeled: Sequence[Case],
    ignore: int | None,
    slice_axis: int | None,
    has_spacing: bool,
    reasons: list[str],
) -> tuple[int, ...]:
    """Return the axes that may be mirrored: left-right, where no class has a side."""
    setting = config.plan.flips
    if setting != "auto":
        if slice_axis in setting:
            raise InputError(
                f"plan.flips={list(setting)}: slices along axis {slice_axis} are mirrored in their "
                f"plane only; leave out {slice_axis}"
            )
        return setting
    axis = 0 if has_spacing else 1
    if slice_axis == axis:
        reasons.append("no mirroring: slices lie left-right, and bodies are not symmetric in them")
        return ()
    values = tuple(sorted(labels))
    names = [labels[value] for value in values]
    anyway = f"; if what is mirrored could be real all the same: plan.flips=[{axis}]"
    sided = find_sided(names[1:])
    if sided:
        reasons.append(f"no mirroring: labels have sides ({', '.join(sided)}){anyway}")
        return ()
    pair, were_together = find_mirrored(labeled, values, ignore, axis)
    if pair is not None:
        one, other = (names[index] for index in pair)
        reasons.append(
            f"no mirroring: {one} and {other} are as large as each other and lie in the labels as "
            f"left and right do{anyway}"
        )
        return ()
    unnamed = [name for name in names[1:] if re.fullmatch(r"\D*[\W_]?\d+", name)]
    if unnamed[1:] and not were_together:
        reasons.append(
            "no mirroring: labels without names may be left and right, and no label holds them "
            f"together to see it{anyway}"
        )
        return ()
    hint = "; if two of the unnamed labels are left and right: plan.flips=[]" if unnamed[1:] else ""
    why = "no label name has a side" + (
        ", no two labels lie as left and right do" if len(names) > 2 else ""
    )
    if not has_spacing:
        reasons.append(
            f"mirroring left-right only: {why}; where pictures have no above and below either, "
            f"plan.flips=[0,1]{hint}"
        )
        return (1,)
    reasons.append(
        f"mirroring left-right only: {why}, and bodies are not symmetric along the other axes{hint}"
    )
    return (0,)


def _choose_precision(setting: str, device: str, reasons: list[str]) -> str:
    """Return bfloat16 where the device computes in it, a processor faster; float32 elsewhere."""
    if setting != "auto":
        return setting
    if not machine.has_bfloat16(device):
        reasons.append("float32: no native bfloat16")
        return "float32"
    if device != "cpu":
        reasons.append("bfloat16: the GPU has it")
        return "bfloat16"
    factor = machine.measure_bfloat16()
    chosen = "bfloat16" if factor >= LEAST_SPEEDUP else "float32"
    reasons.append(
        f"{chosen}: a convolution in bfloat16 is {factor:.1f} times as fast as in float32 on this "
        "processor, by a short probe"
    )
    return chosen


def _choose_workers(config: Config, on_gpu: bool) -> int:
    """Return the number of loader processes; on a CPU they would take cores from the network."""
    if config.train.workers != "auto":
        return config.train.workers
    return min(8, max(1, machine.count_cores() - 1)) if on_gpu else 0


def _estimate_disk(
    shapes: NDArray[np.int_], num_unlabeled: int, network: NetworkSpec
) -> dict[str, float]:
    """Return the disk that cache and the pseudo-labels of two rounds will take, in MB."""
    voxels = float(np.mean(np.prod(shapes, axis=1)))
    cache = len(shapes) * voxels * (2 * network.in_channels + 1)
    pseudo = 2 * num_unlabeled * voxels * (network.num_classes + 2)
    return {"disk_mb": round((cache + pseudo) / 1e6 + 30, 1)}


def _count_windows(
    shapes: NDArray[np.int_], patch_size: Sequence[int], axes: Sequence[int]
) -> float:
    """Return how many windows cover all scans once."""
    size = np.array(patch_size)
    along = 1 + np.ceil(np.maximum(shapes[:, axes] - size, 0) / (size * (1 - OVERLAP)))
    slices = np.delete(shapes, axes, axis=1)  # none in 3D
    return float((along.prod(1) * slices.prod(1)).sum())


def describe_steps(steps: int | tuple[int, ...]) -> str:
    """Return the steps of the rounds as text."""
    if isinstance(steps, int) or len(steps) == 1:
        return f"{at_round(steps, 0)} steps a round"
    return f"{steps[0]} steps in round 0, then {', '.join(map(str, steps[1:]))}"


def list_decisions(plan: Plan) -> dict[str, Any]:
    """Return the dotted keys of the configuration that the plan decided."""
    spacing = plan.preprocessing.spacing
    kinds = {how.kind for how in plan.preprocessing.normalization}
    return {
        "plan.dimension": plan.dimension,
        "plan.spacing": [s for axis, s in enumerate(spacing) if axis != plan.slice_axis],
        "plan.patch_size": list(plan.patch_size),
        "plan.normalization": kinds.pop() if len(kinds) == 1 else "auto",  # by the channels' names
        "plan.flips": list(plan.flips),
        "network.name": plan.network.name,
        "network.depth": len(plan.network.strides) or ENCODER_FACTOR.bit_length(),
        "train.batch": plan.batch,
        "train.steps": plan.steps if isinstance(plan.steps, int) else list(plan.steps),
        "train.device": plan.device,
        "train.precision": plan.precision,
        "train.workers": plan.workers,
    }
