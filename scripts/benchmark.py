"""Measures what medssl takes of a machine: `python scripts/benchmark.py memory --out DIR`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = [  # shape, classes, mirrored axes
    ((256, 256, 256), 3, 0),
    ((512, 512, 300), 3, 0),
    ((512, 512, 600), 5, 0),
    ((512, 512, 600), 5, 3),
    ((768, 768, 576), 5, 0),
    ((768, 768, 576), 20, 0),
]
PATCH = 64  # voxels of a side of a window
SPACING = (0.8, 0.8, 1.0)  # mm, of the scan; the plan's is a little coarser


def main() -> None:
    """Measure each size in a process of its own, print a table and write memory.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory"])
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="Folder of the table.")
    parser.add_argument("--most", type=float, default=400, help="Million voxels of a scan.")
    parser.add_argument("--row", help="Measure one row, I,J,K,classes,flips, in this process.")
    arguments = parser.parse_args()
    if arguments.row:
        *shape, classes, flips = (int(word) for word in arguments.row.split(","))
        print(json.dumps(measure_row((shape[0], shape[1], shape[2]), classes, flips)))
        return
    rows = []
    for shape, classes, flips in ROWS:
        if shape[0] * shape[1] * shape[2] > arguments.most * 1e6:
            continue
        row = ",".join(map(str, (*shape, classes, flips)))
        command = [sys.executable, __file__, "memory", "--row", row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(format_rows(rows[-1:]) if len(rows) > 1 else HEAD + format_rows(rows), flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "memory.json").write_text(json.dumps(rows, indent=2) + "\n")


HEAD = (
    "| voxels | classes | mirrored axes | peak | expected | bytes a voxel and class | seconds |\n"
    "|---|---|---|---|---|---|---|\n"
)


def format_rows(rows: list[dict[str, float]]) -> str:
    """Return rows of the table in Markdown; memory in GB of 10^9 bytes."""
    return "\n".join(
        f"| {' x '.join(map(str, row['shape']))} | {row['classes']} | {row['flips']} "
        f"| {row['peak'] / 1e9:.2f} GB | {row['expected'] / 1e9:.2f} GB "
        f"| {row['peak'] / row['voxels'] / row['classes']:.1f} | {row['seconds']:.0f} |"
        for row in rows
    )


def measure_row(shape: tuple[int, int, int], classes: int, flips: int) -> dict[str, object]:
    """Segment a made-up scan by a network of one layer; return peak and expected memory."""
    import nibabel as nib
    import numpy as np
    import torch

    from medssl.costs import forecast_costs
    from medssl.networks.build import NetworkSpec
    from medssl.predict import Model, ModelInfo, predict_files
    from medssl.transforms.preprocess import Normalization, Preprocessing

    levels = {"filters": (4,), "kernels": ((1, 1, 1),), "strides": ((1, 1, 1),)}
    spec = NetworkSpec(in_channels=1, num_classes=classes, **levels)
    info = ModelInfo(
        network=spec,
        labels={index: f"class {index}" for index in range(classes)},
        label_values=tuple(range(classes)),
        channels=("CT",),
        preprocessing=Preprocessing(
            spacing=(0.9, 0.9, 1.0),
            normalization=(Normalization(kind="ct", low=-1000, high=1000, mean=0, std=500),),
        ),
        patch_size=(PATCH,) * 3,
        flips=tuple(range(flips)),
        precision="float32",
    )
    torch.manual_seed(0)
    model = Model(torch.nn.Conv3d(1, classes, 1).eval(), info, torch.device("cpu"))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        scan, out = Path(folder) / "scan.nii", Path(folder) / "masks"
        header = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.diag([*SPACING, 1])).header
        header.set_data_shape(shape)
        header["vox_offset"] = 352
        with scan.open("wb") as file:  # a file with holes: bright planes, and air
            file.write(header.binaryblock + bytes(4))
            file.write(np.random.default_rng(0).integers(-900, 900, shape[0] * shape[1] * 8, "i2"))
            file.truncate(352 + 2 * shape[0] * shape[1] * shape[2])
        costs = forecast_costs(model, {"scan": (scan,)})
        started = time.perf_counter()
        predict_files(model, [scan], out, report=lambda text: None)
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    return {
        "shape": shape,
        "classes": classes,
        "flips": flips,
        "voxels": shape[0] * shape[1] * shape[2],
        "peak": peak,
        "expected": round(costs.peak),
        "seconds": round(seconds, 1),
        "expected_seconds": round(costs.seconds, 1),
    }


if __name__ == "__main__":
    main()
