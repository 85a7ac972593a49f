"""The first start on one core and on all of them, and the second start, on made-up scans.

The ways take turns. On a machine that others use, compare processor seconds, which say what work
there is, and ratios of seconds that were measured in one run.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np

from medssl.data import cache
from medssl.data.cases import Case
from medssl.machine import count_cores
from medssl.transforms.preprocess import Normalization, Preprocessing

SPACING = (0.8, 0.8, 1.0)  # mm, of the scans; the recipe's is a little coarser
RECIPE = Preprocessing(
    spacing=(0.9, 0.9, 1.0),
    normalization=(Normalization(kind="ct", low=-1000, high=1000, mean=0, std=500),),
)
VALUES = (0, 1, 2, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="voxels of each")
    parser.add_argument("--turns", type=int, default=3)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure each way, print a table, and return its rows."""
    ways = {"one core": 1, "all cores": count_cores(), "second start": count_cores()}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [make_case(folder, index, arguments.side) for index in range(arguments.scans)]
        for _ in range(arguments.turns):
            for way, cores in ways.items():
                if way != "second start":
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                times[way].append(time_start(cases, folder / "cache", cores))
    reference = float(np.median([seconds for seconds, _ in times["one core"]]))
    print(
        f"{arguments.scans} scans of {arguments.side}^3 voxels\n\n"
        "| start | cores | seconds | ratio | processor seconds |\n|---|---|---|---|---|"
    )
    rows: list[dict[str, object]] = []
    for way, cores in ways.items():
        seconds, work = (float(number) for number in np.median(times[way], axis=0))
        ratio = seconds / reference
        print(f"| {way} | {cores} | {seconds:.2f} | {ratio:.2f} | {work:.2f} |", flush=True)
        rows.append({"of": way, "cores": cores, "seconds": seconds, "ratio": ratio, "work": work})
    return rows


def make_case(folder: Path, index: int, side: int) -> Case:
    """Write a scan of noise that grows along its axes, and a label of its levels."""
    ramp = np.linspace(0, 1000, side)
    image = np.random.default_rng(index).normal(0, 20, (side,) * 3)
    image += (ramp[:, None, None] + ramp[:, None] + ramp) / 3
    affine = np.diag([*SPACING, 1.0])
    scan, label = folder / f"{index}.nii.gz", folder / f"{index}_label.nii.gz"
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), scan)
    nib.save(nib.Nifti1Image((image // 250).clip(0, 3).astype(np.uint8), affine), label)
    return Case(str(index), (scan,), label, str(index))


def time_start(cases: list[Case], folder: Path, cores: int) -> tuple[float, float]:
    """Return the seconds, and those of the processor, that a cache takes on so many cores."""
    started, worked = time.perf_counter(), time.process_time()
    with mock.patch.object(cache, "count_cores", return_value=cores):
        cache.build_cache(cases, RECIPE, folder, VALUES, None, 1)
    return time.perf_counter() - started, time.process_time() - worked
