"""A sliding window beside those of MONAI and, where it is installed, nnU-Net; and MC dropout.

One scan, and a network in 3D and one in 2D that sees slices. All take turns in one process, on one
thread, and are measured in seconds of the processor, so that other programs disturb little; what
counts are the ratios.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from medssl.networks.build import SegmentationNetwork
    from medssl.windows import Window

SIZES = {False: (72, 48), True: (24, 16)}  # voxels of a side of scan and window, by --small
PRECISIONS = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--turns", type=int, default=5, help="of each rival")
    parser.add_argument("--small", action="store_true", help="a small scan")


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure all rivals and print a table."""
    sizes, turns = SIZES[arguments.small], arguments.turns
    rows = [row for dimension in (3, 2) for row in compare_inference(*sizes, turns, dimension)]
    print(format_inference(rows))
    return rows


def compare_inference(size: int, patch: int, turns: int, dimension: int) -> list[dict[str, object]]:
    """Return seconds of each rival and of ours in each number format, medians over all turns."""
    import torch

    from medssl.networks.build import NetworkSpec, build_network
    from medssl.predict import MC_PASSES, SAMPLERS, predict_logits
    from medssl.windows import Window

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = NetworkSpec(
        in_channels=1, num_classes=3, filters=(16, 32, 64, 128), kernels=((3,) * dimension,) * 4,
        strides=((1,) * dimension, *((2,) * dimension,) * 3), dropout=0.1, deep_supervision=True,
    )  # fmt: skip
    network = build_network(spec).eval()
    image = torch.randn(1, 1, size, size, size)
    rows: list[dict[str, object]] = []
    for precision in PRECISIONS:
        window = Window((patch,) * dimension, precision, (), None if dimension == 3 else 0)
        rivals: dict[str, Callable[[], object]] = {
            "medssl": partial(predict_logits, network, image, window),
            "MONAI": prepare_monai(network, image, window),
        }
        if importlib.util.find_spec("nnunetv2"):
            rivals["nnU-Net"] = prepare_nnunet(network, image, window, spec.num_classes)
        for fidelity, sample in SAMPLERS.items():
            walk = partial(sample, network, image, window, MC_PASSES)
            rivals[f"{MC_PASSES} passes, {fidelity}"] = lambda walk=walk: list(walk())
        seconds: dict[str, list[float]] = {name: [] for name in rivals}
        for turn in range(-1, turns):  # the first warms up
            for name, act in rivals.items():
                started = time.process_time()
                act()
                seconds[name] += [time.process_time() - started] * (turn >= 0)
        ours = seconds["medssl"]
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, ours, strict=True)]
            rows.append(
                {
                    "of": name,
                    "dimension": dimension,
                    "precision": precision,
                    "voxels": size**3,
                    "seconds": round(statistics.median(times), 3),
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
    return rows


def prepare_monai(
    network: "SegmentationNetwork", image: "Tensor", window: "Window"
) -> Callable[[], "Tensor"]:
    """Return what moves MONAI's window over an image, with the same overlap and weights."""
    import torch
    from monai.inferers import SliceInferer, SlidingWindowInferer

    from medssl.windows import OVERLAP

    how = {"roi_size": window.patch_size, "overlap": OVERLAP, "mode": "gaussian"}
    infer = SlidingWindowInferer(**how)
    if window.slice_axis is not None:
        infer = SliceInferer(window.slice_axis, **how)

    def act() -> torch.Tensor:
        enabled = window.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return infer(image, network)

    return act


def prepare_nnunet(
    network: "SegmentationNetwork", image: "Tensor", window: "Window", num_classes: int
) -> Callable[[], "Tensor"]:
    """Return what moves nnU-Net's window over an image, which by itself is always in float32."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from medssl.windows import OVERLAP

    class Cast(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            enabled = window.precision == "bfloat16"
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return network(image).float()

    device = torch.device("cpu")
    predictor = nnUNetPredictor(OVERLAP, use_mirroring=False, device=device, allow_tqdm=False)
    predictor.network = Cast()
    predictor.configuration_manager = SimpleNamespace(patch_size=window.patch_size)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=num_classes)
    return lambda: predictor.predict_sliding_window_return_logits(image[0])


def format_inference(rows: list[dict[str, object]]) -> str:
    """Return a table in Markdown; the ratio is the time of each to that of one pass of medssl."""
    lines = ["| of | in | format | voxels a second | time / medssl, one pass |", "|---" * 5 + "|"]
    for row in rows:
        speed = row["voxels"] / row["seconds"]
        what = f"{row['of']} | {row['dimension']}D | {row['precision']}"
        lines.append(f"| {what} | {speed:.0f} | {row['ratio']:.2f} |")
    return "\n".join(lines)
