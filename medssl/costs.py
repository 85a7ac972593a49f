"""What predictions will take, said before they start: memory, time and disk, from a short probe.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from medssl.config import Fidelity, InputError
from medssl.data.cases import format_count
from medssl.data.io import read_geometry, read_image, write_map, write_mask
from medssl.machine import count_free_memory
from medssl.metrics import case_metrics
from medssl.predict import MC_PASSES, Model, choose_parts, count_views, find_flags
from medssl.transforms.geometry import Affine, Shape, WayBack, cache_grid, grid_spacing
from medssl.transforms.preprocess import count_bytes, preprocess_image
from medssl.windows import slide_window

SIDE = 48  # voxels of the made-up scan of the probe
TRIES = 4  # of each step of it
LONG = 4.0  # seconds, after which a step is not tried again
FAST = 0.5  # seconds of a window, below which several of them are timed
MASK_BYTES = 0.1  # of a compressed mask, a voxel, at most; most take a third of that


@dataclass(frozen=True)
class Costs:
    """``peak`` and ``disk`` in bytes, ``seconds``, and the windows that go through the network."""

    peak: float
    seconds: float
    disk: float
    num_windows: int

    def describe(self, num_scans: int, out: Path) -> str:
        """Return the costs as a sentence, with what there is of memory and disk."""
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        free, disk = count_free_memory(), shutil.disk_usage(place).free
        minutes = self.seconds / 60
        duration = f"{self.seconds:.0f} seconds" if self.seconds >= 1.5 else "a second"
        duration = f"{minutes:.0f} minutes" if minutes >= 2 else duration
        return (
            f"{format_count(num_scans, 'scan')}, {self.num_windows} windows: about {duration}; "
            f"{self.peak / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"at most {self.disk / 1e9:.2f} GB of disk, {disk / 1e9:.0f} GB are free"
        )


class _Rates(NamedTuple):
    """Seconds of a window, and of a voxel or value that is read, brought back, and so on."""

    window: float
    read: float
    back: float
    write: float
    measure: float
    network: float  # bytes that a window takes beside its scan


def forecast_costs(
    model: Model,
    scans: Mapping[str, tuple[Path, ...]],
    *,
    probs: bool = False,
    uncertainty: bool = False,
    fidelity: Fidelity = "full",
    measured: bool = False,
) -> Costs:
    """Return what the segmentation of scans will take; those that cannot be read take nothing.

    Args:
        model: A loaded model.
        scans: The image files of each scan, by its name.
        probs: Whether class probabilities are written.
        uncertainty: Whether the uncertainty of MC dropout is written.
        fidelity: Of its passes.
        measured: Whether the masks are compared with labels, which takes less memory.
    """
    grids = []
    for images in scans.values():
        with contextlib.suppress(InputError):
            grids.append(read_geometry(images[0]))
    if not grids:
        return Costs(_read_status("VmRSS"), 0.0, 0.0, 0)
    rates = _probe(model, grids[0][1])
    base = _read_status("VmRSS")
    passes = count_views(MC_PASSES, fidelity) if uncertainty else 0
    each = [_count(model, rates, *grid, probs, passes) for grid in grids]
    compare = measured * sum(float(np.prod(shape)) for shape, _ in grids)
    return Costs(
        base + max(costs.peak for costs in each),
        sum(costs.seconds for costs in each) + compare * (rates.read + rates.measure),
        sum(costs.disk for costs in each) + probs * max(costs.disk for costs in each),
        sum(costs.num_windows for costs in each),
    )


def _count(
    model: Model, rates: _Rates, shape: Shape, affine: Affine, probs: bool, passes: int
) -> Costs:
    """Return what one scan takes beside the model."""
    info = model.info
    window, classes, channels = info.window, info.network.num_classes, len(info.channels)
    grid_shape, grid = cache_grid(shape, affine, info.preprocessing.spacing)
    way = WayBack(grid_shape, grid, shape, affine)
    native, cached = float(np.prod(shape)), float(np.prod(grid_shape))
    num_windows, slabs, uncertainty = 0, 0.0, passes > 0
    for views in [len(window.mirrorings), *[passes] * uncertainty]:
        parts = choose_parts(window, way, classes, views, model.device)
        slabs = max(slabs, window.count_bytes(grid_shape, classes, views, parts))
        boxes = way.cut(window.find_cut(grid_shape), parts)
        num_windows += views * sum(
            window.count_windows(grid_shape, way.find_source(box)) for box in boxes
        )
    prepare = count_bytes(shape, affine, info.preprocessing)
    sweep = 4 * channels * cached + (5 if uncertainty else 1) * native + slabs + rates.network
    values = classes + uncertainty * 2
    written = native * ((4 * classes) * probs + 4 * uncertainty)
    seconds = num_windows * rates.window + native * (
        rates.read * channels + rates.back * values + rates.write
    )
    seconds += 4 * rates.write * written
    return Costs(max(prepare, sweep), seconds, MASK_BYTES * native + written, num_windows)


def _probe(model: Model, affine: Affine) -> _Rates:
    """Segment a made-up scan whose voxels are as large as those of a real one, step by step."""
    info, network = model.info, model.network
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, len(info.channels), *info.window.pass_shape), generator=generator)
    before = _read_status("VmRSS")
    _forget_peak()
    window = _measure(lambda: [slab.cpu() for slab in slide_window(network, image, info.window)])
    if window < FAST:  # slabs cost much beside it, and leave less often in a scan
        axis = 2 + info.window.find_axis(image.shape[2:])
        image = torch.cat([image] * 4, dim=axis)
        window = _measure(
            lambda: [slab.cpu() for slab in slide_window(network, image, info.window)]
        )
    window /= info.window.count_windows(image.shape[2:])
    network_bytes = max(_read_status("VmHWM") - before, 0.0)
    shape = (SIDE, SIDE, SIDE)
    voxels = np.random.default_rng(0).normal(100, 30, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        scans = tuple(Path(folder) / f"{n}.nii.gz" for n in range(len(info.channels)))
        for path in scans:
            write_map(path, voxels, affine, None)

        def read() -> None:
            volume = read_image(scans, len(scans))
            find_flags(info, volume)
            preprocess_image(volume, info.preprocessing)

        read_seconds = _measure(read) / len(scans)
        grid_shape, grid = cache_grid(shape, affine, info.preprocessing.spacing)
        way = WayBack(grid_shape, grid, shape, affine)
        classes = info.network.num_classes
        probs = np.zeros((classes, *grid_shape), np.float32)
        back = _measure(lambda: way.bring(probs, (0, 0, 0), way.whole).argmax(0)) / classes
        mask: NDArray[np.uint8] = (voxels > 100).astype(np.uint8)
        mask[1:] = mask[:1]  # not noise: a mask of large structures
        path = Path(folder) / "mask.nii.gz"
        values = info.label_values
        write = _measure(lambda: write_mask(path, mask, affine, values, header=None))
    place = (np.indices(shape) - SIDE / 2) ** 2
    ball: NDArray[np.uint8] = (place.sum(0) < (0.4 * SIDE) ** 2).astype(np.uint8)
    spacing = grid_spacing(affine)
    measure = _measure(lambda: case_metrics(ball, np.roll(ball, 1, 0), spacing, 2))
    steps = (read_seconds, back, write, measure)
    read_rate, back, write, measure = (step / float(voxels.size) for step in steps)
    return _Rates(window, read_rate, back, write, measure, network_bytes)


def _measure(act: Callable[[], object]) -> float:
    """Return the seconds that something takes, its first and unlucky times aside."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
        if sum(times) > LONG and len(times) > 1:
            break
    return float(np.median(times[1:]))


def _read_status(field: str) -> float:
    """Return VmRSS, or its peak VmHWM, of this process in bytes; 0 where nobody says it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return float(psutil.Process().memory_info().rss) if field == "VmRSS" else 0.0
    return 1024.0 * int(re.findall(rf"{field}:\s+(\d+)", status)[0])


def _forget_peak() -> None:
    """Let the peak of this process begin anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
