"""From the data and the machine to a plan: no configuration is needed, and each choice says why.

Voxel axes I, J, K point to right, anterior, superior.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from medssl.config import Config, InputError, at_round
from medssl.data.cases import Case, Dataset
from medssl.data.io import read_geometry, read_image, read_label
from medssl.networks.build import NetworkSpec, build_network
from medssl.transforms.geometry import Shape, cache_grid, grid_spacing
from medssl.transforms.preprocess import Normalization, Preprocessing

CPU_PATCH_VOXELS = 110_000
GPU_PATCH_VOXELS = 128**3
CPU_STEPS = 2400
GPU_STEPS = 10_000
CPU_FILTERS = 16
GPU_FILTERS = 32
MOST_FILTERS = 320
STEP_COST = 2.4  # of a student's step with as many unlabeled as labeled patches, in labeled steps
SIDES = re.compile(
    r"(^|[^a-z])(l|r|lt|rt|lh|rh|sin|dex|links|rechts|gauche|droite)($|[^a-z])"
    r"|(^|[^a-z])(left|right)|(left|right)($|[^a-z])"
)


class Plan(BaseModel):
    """What a run is made with; it stands in plan.json, where a person can read it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: dict[int, str]  # class index -> name, 0 is the background
    label_values: tuple[int, ...]  # class index -> value in the label files
    ignore: int | None
    channels: tuple[str, ...]
    preprocessing: Preprocessing
    patch_size: tuple[int, int, int]
    flips: tuple[int, ...]
    network: NetworkSpec
    batch: int
    num_unlabeled: int
    steps: int
    device: str
    precision: str
    threads: int
    workers: int
    reasons: tuple[str, ...]
    estimate: dict[str, float]  # step_seconds, hours, disk_mb

    @property
    def num_classes(self) -> int:
        """Number of classes, with background."""
        return len(self.label_values)


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
    device = choose_device(config.train.device)
    on_gpu = device != "cpu"
    reasons.append(f"device {device}: " + ("found" if on_gpu else "no GPU was found or asked for"))
    grids = [read_geometry(case.images[0]) for case in [*labeled, *unlabeled]]
    spacing = _choose_spacing(config, grids, reasons)
    shapes = np.array([cache_grid(shape, affine, spacing)[0] for shape, affine in grids])
    normalization = _choose_normalization(config, dataset, labels, labeled, reasons)
    patch_size, strides = _choose_patch(config, shapes, spacing, on_gpu, reasons)
    base = GPU_FILTERS if on_gpu else CPU_FILTERS
    filters = _choose_filters(base * at_round(config.network.width, 0), len(strides))
    reasons.append(
        f"network DynUNet with residual blocks, {len(strides)} levels, filters {filters}, channel "
        f"dropout {config.network.dropout}"
    )
    network = NetworkSpec(
        in_channels=max(1, len(dataset.channels)),
        num_classes=len(labels),
        filters=filters,
        kernels=tuple(_choose_kernel(level, spacing) for level in range(len(strides))),
        strides=strides,
        dropout=config.network.dropout,
        deep_supervision=config.network.deep_supervision,
    )
    batch = 2 if config.train.batch == "auto" else config.train.batch
    steps = config.train.steps
    if steps == "auto":
        steps = GPU_STEPS if on_gpu else CPU_STEPS
        reasons.append(f"{steps} steps a round: where few labels level off on this device")
    precision = _choose_precision(config.train.precision, device, reasons)
    threads = torch.get_num_threads()
    workers = _choose_workers(config, on_gpu)
    num_unlabeled = count_unlabeled(config, batch, 1)
    return Plan(
        labels={index: labels[value] for index, value in enumerate(sorted(labels))},
        label_values=tuple(sorted(labels)),
        ignore=config.data.ignore if config.data.ignore is not None else dataset.ignore,
        channels=dataset.channels or ("",),
        preprocessing=Preprocessing(spacing=spacing, normalization=normalization),
        patch_size=patch_size,
        flips=_choose_flips(config, labels, reasons),
        network=network,
        batch=batch,
        num_unlabeled=num_unlabeled,
        steps=steps,
        device=device,
        precision=precision,
        threads=threads,
        workers=workers,
        reasons=tuple(reasons),
        estimate=_estimate_disk(shapes, len(unlabeled), network),
    )


def _choose_filters(first: float, levels: int) -> tuple[int, ...]:
    """Return the channels of each level: multiples of 8, doubling."""
    start = max(8, round(first / 8) * 8)
    return tuple(min(MOST_FILTERS, start * 2**level) for level in range(levels))


def count_unlabeled(config: Config, batch: int, round_index: int) -> int:
    """Return the number of unlabeled patches per step of a student round, 1 being the first."""
    return max(1, round(batch * at_round(config.train.unlabeled_ratio, round_index - 1)))


def describe_student(plan: Plan, config: Config, round_index: int) -> NetworkSpec:
    """Return the network of a student: the plan's in its own width, with its noise."""
    widths = config.network.width
    scale = at_round(widths, round_index) / at_round(widths, 0)
    spec, dropout = plan.network, config.noise.dropout
    return spec.model_copy(
        update={
            "filters": _choose_filters(spec.filters[0] * scale, len(spec.filters)),
            "dropout": spec.dropout if dropout == "auto" else dropout,
            "stochastic_depth": config.noise.stochastic_depth,
        }
    )


def choose_device(name: str) -> str:
    """Return the device to compute on.

    Raises:
        InputError: The device that was asked for is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"train.device={name}: not available here ({str(error).splitlines()[0]}); leave it out "
            "for automatic choice, or run `medssl doctor`"
        ) from error
    return name


def _choose_spacing(
    config: Config, grids: Sequence[tuple[Shape, NDArray[np.float64]]], reasons: list[str]
) -> tuple[float, float, float]:
    """Return the spacing of the cache grid in mm along right, anterior, superior."""
    if config.plan.spacing != "auto":
        return config.plan.spacing
    spacings = []
    for shape, affine in grids:
        _, canonical = cache_grid(shape, affine, (1.0, 1.0, 1.0))
        own = np.array(grid_spacing(affine))
        turn = np.abs(np.linalg.inv(canonical[:3, :3]) @ affine[:3, :3]) / own[None, :]
        spacings.append([own[np.argmax(turn[axis])] for axis in range(3)])
    first, second, third = (round(float(value), 4) for value in np.median(spacings, axis=0))
    reasons.append(
        f"spacing {first:g} x {second:g} x {third:g} mm: the median of {len(grids)} scans"
    )
    return first, second, third


def _choose_normalization(
    config: Config,
    dataset: Dataset,
    labels: Mapping[int, str],
    labeled: Sequence[Case],
    reasons: list[str],
) -> tuple[Normalization, ...]:
    """Return how each channel is normalized: HU statistics for CT, z-score for all else."""
    channels = dataset.channels or ("",)
    kinds = [
        config.plan.normalization
        if config.plan.normalization != "auto"
        else ("ct" if name.strip().lower() in ("ct", "computed tomography") else "zscore")
        for name in channels
    ]
    ignore = config.data.ignore if config.data.ignore is not None else dataset.ignore
    result = []
    for index, (name, kind) in enumerate(zip(channels, kinds, strict=True)):
        reasons.append(f"channel {index} ({name or 'unknown'}): normalization {kind}")
        if kind == "zscore":
            result.append(Normalization(kind="zscore"))
            continue
        values = _collect_foreground(labeled, index, len(channels), tuple(sorted(labels)), ignore)
        low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
        clipped = np.clip(values, low, high)
        mean, std = float(clipped.mean()), max(float(clipped.std()), 1e-3)
        result.append(Normalization(kind="ct", low=low, high=high, mean=mean, std=std))
    return tuple(result)


def _collect_foreground(
    labeled: Sequence[Case],
    channel: int,
    num_channels: int,
    label_values: tuple[int, ...],
    ignore: int | None,
) -> NDArray[np.float32]:
    """Return intensities of labeled foreground voxels."""
    found = []
    for case in labeled:
        if case.label is None:
            continue
        classes, _ = read_label(case.label, label_values, ignore)
        image = read_image(case.images, num_channels).array[channel]
        found.append(image[(classes > 0) & (classes < len(label_values))])
    values = np.concatenate(found) if found else np.zeros(0, np.float32)
    if not len(values):
        raise InputError(
            "CT is normalized by its labeled foreground, but no labeled case has any; set "
            "plan.normalization=zscore"
        )
    return values


def _choose_patch(
    config: Config,
    shapes: NDArray[np.int_],
    spacing: Sequence[float],
    on_gpu: bool,
    reasons: list[str],
) -> tuple[tuple[int, int, int], tuple[tuple[int, int, int], ...]]:
    """Return the patch size in voxels and the strides of the levels."""
    budget = GPU_PATCH_VOXELS if on_gpu else CPU_PATCH_VOXELS
    wanted = np.median(shapes, axis=0)
    given = config.plan.patch_size
    if given != "auto":
        wanted = np.array(given, dtype=float)
    most = config.network.depth if config.network.depth != "auto" else (6 if on_gpu else 4)
    while True:
        strides = _choose_strides(wanted, np.array(spacing), most)
        factor = np.prod(np.array(strides), axis=0)
        size = np.maximum(np.ceil(wanted / factor) * factor, factor).astype(int)
        if given != "auto" or size.prod() <= budget:
            break
        wanted[np.argmax(wanted / np.median(shapes, axis=0) * wanted)] *= 0.9
    if config.network.depth != "auto" and len(strides) < config.network.depth:
        raise InputError(
            f"network.depth={config.network.depth}: a patch of {'x'.join(str(n) for n in size)} "
            f"voxels has room for {len(strides)} levels; lower it, or leave it out"
        )
    if given != "auto" and tuple(size) != tuple(given):
        raise InputError(
            f"plan.patch_size={list(given)}: with {len(strides)} levels each side must be a "
            f"multiple of {factor.tolist()}; the nearest is {size.tolist()}"
        )
    median = "x".join(f"{n:g}" for n in np.median(shapes, axis=0))
    reasons.append(
        f"patch {'x'.join(str(n) for n in size)} voxels: scans have a median of {median}, at most "
        f"{budget} voxels fit this device's time"
    )
    return (int(size[0]), int(size[1]), int(size[2])), strides


def _choose_strides(
    size: NDArray[np.float64], spacing: NDArray[np.float64], most: int
) -> tuple[tuple[int, int, int], ...]:
    """Return strides: halve an axis while it stays long enough and is not the coarse one.

    Source: Isensee et al. 2021 (nnU-Net), the rule for the network topology.
    """
    size, spacing = size.copy(), spacing.copy()
    strides = [(1, 1, 1)]
    while len(strides) < most:
        can = (size >= 8) & (spacing <= 2 * spacing[size >= 8].min(initial=math.inf))
        if not can.any() and len(strides) >= 3:
            break
        stride = np.where(can, 2, 1)
        size, spacing = size / stride, spacing * stride
        strides.append((int(stride[0]), int(stride[1]), int(stride[2])))
    return tuple(strides)


def _choose_kernel(level: int, spacing: Sequence[float]) -> tuple[int, int, int]:
    """Return the kernel of a level: flat along an axis that is still coarser than the others."""
    now = np.array(spacing)
    finest = now.min() * 2**level
    kernel = np.where(now > 2 * finest, 1, 3)
    return int(kernel[0]), int(kernel[1]), int(kernel[2])


def _choose_flips(config: Config, labels: Mapping[int, str], reasons: list[str]) -> tuple[int, ...]:
    """Return the axes that may be mirrored: left-right, where no label has a side."""
    if config.plan.flips != "auto":
        return config.plan.flips
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in labels.values()}
    sided = [name for name in labels.values() if SIDES.search(words[name].replace("_", " "))]
    if sided:
        reasons.append(f"no mirroring: labels have sides ({', '.join(sided)})")
        return ()
    reasons.append(
        "mirroring left-right only: no label name has a side, and bodies are not symmetric along "
        "the other axes"
    )
    return (0,)


def _choose_precision(given: str, device: str, reasons: list[str]) -> str:
    """Return bfloat16 where the processor computes in it, float32 elsewhere."""
    if given != "auto":
        return given
    native = has_bfloat16(device)
    reasons.append("bfloat16: the processor has it" if native else "float32: no native bfloat16")
    return "bfloat16" if native else "float32"


def has_bfloat16(device: str) -> bool:
    """Return whether a device computes in bfloat16 natively; emulated it is slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and has_cpu_bfloat16()


def has_cpu_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 natively."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _choose_workers(config: Config, on_gpu: bool) -> int:
    """Return the number of loader processes; on a CPU they would take cores from the network."""
    if config.train.workers != "auto":
        return config.train.workers
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if on_gpu else 0


def _estimate_disk(
    shapes: NDArray[np.int_], num_unlabeled: int, network: NetworkSpec
) -> dict[str, float]:
    """Return the disk that cache and the pseudo-labels of two rounds will take, in MB."""
    voxels = float(np.mean(np.prod(shapes, axis=1)))
    cache = len(shapes) * voxels * (2 * network.in_channels + 1)
    pseudo = 2 * num_unlabeled * voxels * (network.num_classes + 2)
    return {"disk_mb": round((cache + pseudo) / 1e6 + 30, 1)}


def measure_step(plan: Plan) -> float:
    """Return the seconds of one labeled training step on this device, measured on noise."""
    device = torch.device(plan.device)
    network = build_network(plan.network).to(device).train()
    image = torch.randn(plan.batch, plan.network.in_channels, *plan.patch_size, device=device)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = network.forward_heads(image)
        sum(level.float().square().mean() for level in logits).backward()  # type: ignore[union-attr]  # sum() may be 0 for mypy
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def estimate_hours(plan: Plan, rounds: int, step_seconds: float) -> dict[str, float]:
    """Return the plan's estimate with the time that all rounds take."""
    cost = 1.0 + rounds * (1.0 + (STEP_COST - 1.0) * plan.num_unlabeled / plan.batch)
    hours = step_seconds * plan.steps * cost / 3600
    return {**plan.estimate, "step_seconds": round(step_seconds, 4), "hours": round(hours, 3)}


def resolve(plan: Plan) -> dict[str, Any]:
    """Return the dotted keys of the configuration that the plan decided."""
    return {
        "plan.spacing": list(plan.preprocessing.spacing),
        "plan.patch_size": list(plan.patch_size),
        "plan.normalization": plan.preprocessing.normalization[0].kind,
        "plan.flips": list(plan.flips),
        "network.depth": len(plan.network.strides),
        "train.batch": plan.batch,
        "train.steps": plan.steps,
        "train.device": plan.device,
        "train.precision": plan.precision,
        "train.workers": plan.workers,
    }
