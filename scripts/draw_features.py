"""A picture of how classes lie in the features of a network, of the models of a study (t-SNE).

    python scripts/draw_features.py RUNS --draw 1 --arms labels,recipe --out docs/features.svg

RUNS is the --out of scripts/study.py. From the test cases of a draw, which no training saw, as many
voxels of each class are drawn for all arms; their features are what the last layer of the network
takes. The picture has a panel per arm. What it shows is measured too, in all dimensions: the share
of voxels whose ten nearest ones of other patients are mostly of their own class.

Source: Lee 2013, Pseudo-Label, section 3.2 (its figure of an embedding with and without unlabeled
    data); van der Maaten and Hinton 2008 (t-SNE). Departure: voxels have the place of digits.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from robustness.measures import run_whole
from scipy.spatial.distance import cdist
from sklearn.manifold import TSNE
from study import explain_mistakes, find_run, split_arms
from torch import Tensor

from medssl.config import InputError
from medssl.data.cases import Case
from medssl.data.io import read_label
from medssl.data.trained import open_test_cases
from medssl.networks.build import DynamicUNet
from medssl.predict import Model, load_model, prepare_scan
from medssl.runs import write_text
from medssl.transforms.preprocess import preprocess_label

NEIGHBORS = 10
COLORS = ("#b0b0b0", "#1f5fa8", "#d1495b", "#2e933c", "#edae49", "#8d5a97", "#00798c", "#7a5230")


class Sample(NamedTuple):
    """Voxels of some cases: features (N, D), classes (N,) and patients (N,)."""

    features: NDArray[np.float32]
    classes: NDArray[np.int64]
    patients: NDArray[np.str_]


def sample_arm(run: Path, num_cases: int, num_voxels: int) -> tuple[Sample, Mapping[int, str]]:
    """Return voxels of the test cases of a run, and the names of classes.

    Args:
        run: The run folder.
        num_cases: Cases, evenly over all of them.
        num_voxels: Of each class and case at most.

    Raises:
        InputError: It has no test cases, or its network is no DynUNet.
    """
    model = load_model(run)
    if not isinstance(model.network, DynamicUNet):
        raise InputError(f"{run}: features are read of network.name=dynunet only")
    _, ignore, cases, _ = open_test_cases(run, print)
    places = np.linspace(0, len(cases) - 1, min(num_cases, len(cases))).astype(int)
    parts = [sample_case(model, cases[place], ignore, num_voxels) for place in places]
    return Sample(*map(np.concatenate, zip(*parts, strict=True))), model.info.labels


def sample_case(model: Model, case: Case, ignore: int | None, num_voxels: int) -> Sample:
    """Return as many voxels of each class of a case, the same for every model.

    Raises:
        InputError: The scan or its label cannot be read.
    """
    assert case.label is not None, "cases without a label were left out"
    label, affine = read_label(case.label, model.info.label_values, ignore, case)
    scan = prepare_scan(model.info, case.images)
    i, j, k = scan.image.shape[2:]
    target = preprocess_label(label, affine, (i, j, k), scan.affine)
    features = read_features(model, scan.image)
    rng = np.random.default_rng(0)
    chosen = [
        rng.permutation(np.flatnonzero(target == index))[:num_voxels]
        for index in range(model.info.network.num_classes)
    ]
    voxels = np.concatenate(chosen)
    patients = np.full(len(voxels), case.patient_id)
    return Sample(features[:, voxels].T, target.ravel()[voxels].astype(np.int64), patients)


@torch.no_grad()
def read_features(model: Model, image: Tensor) -> NDArray[np.float32]:
    """Return what the last layer takes (D, voxels), in the order of the scan's voxels.

    Args:
        model: With a DynUNet.
        image: The normalized scan (1, C, I, J, K) on the cache grid.
    """
    network = model.network
    assert isinstance(network, DynamicUNet), "refused before"
    features = run_whole(model, image, network.dynunet.skip_layers)
    if model.info.slice_axis is not None:  # slices follow one another along their axis
        features = features[None].movedim(1, 2 + model.info.slice_axis)
    result: NDArray[np.float32] = features[0].flatten(1).cpu().numpy()
    return result


def standardize(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return features (N, D) of mean 0 and deviation 1 in each dimension."""
    return (features - features.mean(0)) / (features.std(0) + 1e-6)


def measure_purity(sample: Sample) -> float:
    """Return the share of voxels whose nearest ones of other patients are mostly of their class."""
    scaled = standardize(sample.features)
    distances = cdist(scaled, scaled)
    distances[sample.patients[:, None] == sample.patients] = np.inf
    nearest = sample.classes[np.argsort(distances, axis=1)[:, :NEIGHBORS]]
    votes = np.stack([(nearest == index).sum(1) for index in range(sample.classes.max() + 1)], 1)
    return float((votes.argmax(1) == sample.classes).mean())


def draw_panels(samples: Mapping[str, Sample], names: Mapping[int, str]) -> str:
    """Return an SVG with the t-SNE of each sample.

    The same samples give the same picture.

    Args:
        samples: By what stands above the panel.
        names: Of the classes.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": "medssl", "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(3.6 * len(samples), 3.9), layout="constrained")
        panels = figure.subplots(1, len(samples), squeeze=False)[0]
        for axes, (title, sample) in zip(panels, samples.items(), strict=True):
            places = TSNE(random_state=0, init="pca").fit_transform(standardize(sample.features))
            for index, name in names.items():
                chosen = sample.classes == index
                color = COLORS[index % len(COLORS)]
                axes.scatter(*places[chosen].T, s=4, color=color, label=name, rasterized=True)
            axes.set(title=title, xticks=[], yticks=[])
        handles, texts = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, texts, loc="outside lower center", ncols=4, frameon=False, markerscale=3
        )
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, dpi=200)
    return stream.getvalue()


def draw_features(options: argparse.Namespace) -> None:
    """Draw the arms that were asked for, and print how pure the neighborhoods are.

    Raises:
        InputError: There is no such folder or run.
    """
    runs = {arm: find_run(options.runs, options.draw, arm) for arm in options.arms}
    samples: dict[str, Sample] = {}
    names: Mapping[int, str] = {}
    for arm, run in runs.items():
        sample, names = sample_arm(run, options.cases, options.voxels)
        purity = measure_purity(sample)
        print(f"{arm}: {purity:.4f} of {len(sample.classes)} voxels")
        samples[f"{arm}: {purity:.3f}"] = sample
    write_text(options.out, draw_panels(samples, names))


def main() -> None:
    """Read the arguments; a mistake in them is exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="--out of scripts/study.py")
    parser.add_argument("--out", type=Path, required=True, help="an SVG")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--arms", type=split_arms, default=["labels", "recipe"])
    parser.add_argument("--cases", type=int, default=20, help="test cases")
    parser.add_argument("--voxels", type=int, default=25, help="of each class and case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with explain_mistakes():
        draw_features(options)


if __name__ == "__main__":
    main()
