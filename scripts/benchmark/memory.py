"""The peak of memory of what the commands do, each size in a process of its own."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medssl.data.cache import CachedCase
    from medssl.data.cases import Case
    from medssl.predict import Model

ROWS = [  # what is done, shape, classes, mirrored axes
    ("predict", (256, 256, 256), 3, 0),
    ("evaluate", (256, 256, 256), 3, 0),
    ("cache", (256, 256, 256), 3, 0),
    ("pseudo-label", (256, 256, 256), 3, 0),
    ("sampled pseudo-label", (256, 256, 256), 3, 0),
    ("predict", (512, 512, 300), 3, 0),
    ("predict", (512, 512, 600), 5, 0),
    ("predict", (512, 512, 600), 5, 3),
    ("predict", (768, 768, 576), 5, 0),
    ("predict", (768, 768, 576), 20, 0),
]
PATCH = 64  # voxels of a side of a window
SPACING = (0.8, 0.8, 1.0)  # mm, of the scan; the plan's is a little coarser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--most", type=float, default=400, help="million voxels of a scan")
    parser.add_argument("--row", help="measure one, WHAT,I,J,K,classes,flips, in this process")


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure each size and print a table; of one --row, print it and return nothing."""
    if arguments.row:
        what, *words = arguments.row.split(",")
        *shape, classes, flips = map(int, words)
        print(json.dumps(measure_row(what, (shape[0], shape[1], shape[2]), classes, flips)))
        return []
    rows = []
    for what, shape, classes, flips in ROWS:
        if shape[0] * shape[1] * shape[2] > arguments.most * 1e6:
            continue
        row = ",".join(map(str, (what, *shape, classes, flips)))
        command = [sys.executable, str(Path(__file__).parent), "memory", "--row", row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(format_rows(rows[-1:]) if len(rows) > 1 else HEAD + format_rows(rows), flush=True)
    return rows


HEAD = (
    "| of | voxels | classes | mirrored axes | peak | expected | bytes a voxel and class "
    "| seconds |\n|---|---|---|---|---|---|---|---|\n"
)


def format_rows(rows: list[dict[str, float]]) -> str:
    """Return rows of the table in Markdown; memory in GB of 10^9 bytes."""
    return "\n".join(
        f"| {row['of']} | {' x '.join(map(str, row['shape']))} | {row['classes']} | {row['flips']} "
        f"| {row['peak'] / 1e9:.2f} GB | {_show_expected(row['expected'])} "
        f"| {row['peak'] / row['voxels'] / row['classes']:.1f} | {row['seconds']:.0f} |"
        for row in rows
    )


def _show_expected(size: float | None) -> str:
    """Return what was forecast, where something is."""
    return "" if size is None else f"{size / 1e9:.2f} GB"


def measure_row(
    what: str, shape: tuple[int, int, int], classes: int, flips: int
) -> dict[str, object]:
    """Do it with a made-up scan and a network of one layer; return peak and expected memory."""
    import nibabel as nib
    import numpy as np
    import torch

    from medssl.costs import forecast_costs
    from medssl.data.cases import Case
    from medssl.evaluate import evaluate_model
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
        mask = np.zeros(shape, np.uint8)
        mask[shape[0] // 4 : -shape[0] // 4, shape[1] // 4 : -shape[1] // 4] = 1
        label = Path(folder) / "label.nii"
        nib.save(nib.Nifti1Image(mask, np.diag([*SPACING, 1])), label)
        del mask
        case = Case("scan", (scan,), label, "scan")
        costs = None
        if what in ("predict", "evaluate"):
            costs = forecast_costs(model, {"scan": (scan,)}, measured=what == "evaluate")
        act: Callable[[], object]
        if what.endswith("pseudo-label"):
            act = prepare_labeling(model, case, Path(folder), what.startswith("sampled"))
        else:
            act = {
                "predict": lambda: predict_files(model, [scan], out, report=lambda text: None),
                "evaluate": lambda: evaluate_model(model, [case], out, report=lambda text: None),
                "cache": lambda: cache_case(model, case, Path(folder)),
            }[what]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.perf_counter()
        act()
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    return {
        "of": what,
        "shape": shape,
        "classes": classes,
        "flips": flips,
        "voxels": shape[0] * shape[1] * shape[2],
        "peak": peak,
        "expected": round(costs.peak) if costs else None,
        "seconds": round(seconds, 1),
        "expected_seconds": round(costs.seconds, 1) if costs else None,
    }


def cache_case(model: "Model", case: "Case", folder: Path) -> "CachedCase":
    """Preprocess a scan and its label into a cache."""
    from medssl.data.cache import build_cache

    info = model.info
    values, recipe = info.label_values, info.preprocessing
    return build_cache([case], recipe, folder / "cache", values, None, 1)["scan"]


def prepare_labeling(
    model: "Model", case: "Case", folder: Path, is_sampled: bool
) -> Callable[[], object]:
    """Cache a scan; return what pseudo-labels it as a clean or a sampled teacher does."""
    import numpy as np
    import torch

    from medssl.config import FilterSection
    from medssl.predict import MC_PASSES, bring_boxes
    from medssl.pseudo.gates import Expectation
    from medssl.pseudo.label import RawPseudoLabel, label_cases
    from medssl.rounds.teacher import average_passes, average_with_entropy
    from medssl.transforms.geometry import WayBack
    from medssl.transforms.spatial import draw_turn

    info, cached = model.info, cache_case(model, case, folder)
    way = WayBack(cached.shape, cached.affine, cached.shape, cached.affine)
    size = info.network.num_classes

    def say(case: "CachedCase") -> RawPseudoLabel:
        image = torch.from_numpy(case.image().astype("float32"))[None]
        walk = partial(average_with_entropy, model, image, info.window)
        if is_sampled:
            network = torch.nn.Sequential(torch.nn.Dropout3d(0.1), model.network).eval()
            rng = np.random.default_rng(0)
            turns = [draw_turn(rng, (0,), None, case.spacing) for _ in range(MC_PASSES - 1)]
            walk = partial(average_passes, [network], image, info.window, turns, True)
        num_views = MC_PASSES if is_sampled else 1
        boxes = bring_boxes(walk, info.window, way, size, num_views, model.device)
        parts = ((box, values[:-1], values[-1]) for box, values in boxes)
        return RawPseudoLabel(parts, lambda _: None)

    expected = Expectation({1: 1.0}, {1: 0.2})
    names, values = info.labels, info.label_values
    options = (folder / "round_0", None, "", expected, names, values, FilterSection())
    return lambda: label_cases([cached], say, *options, lambda: False)
