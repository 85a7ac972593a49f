"""A plain MONAI script as the tutorials have it, with minutes of the processor for epochs.

    PYTHONPATH=scripts python -m peers.plain_monai RAW OUT --minutes 100 --dimension 2

RAW is a folder in nnU-Net's raw format. Scans with thick slices are segmented slice by slice
(`--dimension 2`, the last axis of RAS). OUT gets the weights, `spent.json` and, in `masks`, the
class indices of the test scans on their grids.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, decollate_batch
from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Spacingd,
    SpatialPadd,
    SqueezeDimd,
)
from monai.utils import set_determinism
from peers.budget import Budget, write_spent

from medssl.runs import read_json

PATCHES = {2: (3, 4), 3: (2, 2)}  # of a step, by dimension: scans, and patches of each
SMALLEST, LARGEST = 32, 96  # voxels along an axis of a patch; of 16 one is left at the bottom
LR = 1e-3


def list_cases(raw: Path, part: str) -> list[dict[str, Any]]:
    """Return the files of each case of imagesTr or imagesTs."""
    names = sorted(path.name for path in (raw / f"images{part}").glob("*_0000.nii.gz"))
    cases = []
    for case_id in (name.removesuffix("_0000.nii.gz") for name in names):
        images = sorted((raw / f"images{part}").glob(f"{case_id}_[0-9][0-9][0-9][0-9].nii.gz"))
        label = {"label": raw / "labelsTr" / f"{case_id}.nii.gz"} if part == "Tr" else {}
        cases.append({"case_id": case_id, "image": images, **label})
    return cases


def choose_grid(
    cases: list[dict[str, Any]], dimension: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the median spacing in mm and a patch: multiples of 16 within the median scan."""
    scans = [nib.as_closest_canonical(nib.load(case["image"][0])) for case in cases]
    spacing = np.median([scan.header.get_zooms()[:3] for scan in scans], axis=0)
    extent = np.median([scan.header.get_zooms()[:3] * np.array(scan.shape) for scan in scans], 0)
    sizes = [min(LARGEST, max(SMALLEST, int(n) // 16 * 16)) for n in extent / spacing]
    if dimension == 2:
        spacing[2], sizes[2] = -1, 1  # slices stay where they are
    return tuple(map(float, spacing)), tuple(sizes)


def prepare(keys: list[str], spacing: tuple[float, ...]) -> list[Any]:
    """Return the transforms that training and prediction share."""
    modes = ["bilinear", "nearest"][: len(keys)]
    return [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=spacing, mode=modes),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    ]


def augment(patch: tuple[int, ...], dimension: int) -> list[Any]:
    """Return the random transforms of the training."""
    keys = ["image", "label"]
    return [
        SpatialPadd(keys, spatial_size=patch),
        RandCropByPosNegLabeld(
            keys, "label", spatial_size=patch, pos=1, neg=1, num_samples=PATCHES[dimension][1]
        ),
        *[SqueezeDimd(keys, dim=-1)] * (dimension == 2),
        *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(dimension)),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
    ]


def train(network: torch.nn.Module, loader: DataLoader, minutes: float) -> tuple[int, float]:
    """Train until the minutes are spent; return the steps, and the minutes in the end."""
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-5)
    network.train()
    budget, steps = Budget(minutes), 0
    while budget.progress < 1:
        for batch in loader:
            if (progress := budget.progress) == 1:
                break
            optimizer.param_groups[0]["lr"] = LR * (1 - progress) ** 0.9
            optimizer.zero_grad()
            loss_function(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
            steps += 1
    return steps, budget.spent


@torch.no_grad()
def predict(
    network: torch.nn.Module, cases: list[dict[str, Any]], before: Compose, infer: Any, out: Path
) -> None:
    """Segment scans, and write the class indices on the grid of each."""
    out.mkdir(parents=True, exist_ok=True)
    network.eval()
    back = Invertd("probs", before, orig_keys="image", nearest_interp=False, to_tensor=True)
    for batch in DataLoader(Dataset(cases, before), batch_size=1):
        batch["probs"] = infer(batch["image"], network).softmax(1)
        item = back(decollate_batch(batch)[0])
        classes = item["probs"].argmax(0).numpy().astype(np.uint8)
        affine = item["image"].meta["original_affine"]
        nib.save(nib.Nifti1Image(classes, np.asarray(affine)), out / f"{item['case_id']}.nii.gz")


def main() -> None:
    """Train, unless that is done, and segment the test scans."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--dimension", type=int, choices=(2, 3), required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_determinism(seed=0)
    about = read_json(options.raw / "dataset.json")
    labeled, test = list_cases(options.raw, "Tr"), list_cases(options.raw, "Ts")
    spacing, patch = choose_grid(labeled, options.dimension)
    counts = {"in_channels": len(about["channel_names"]), "out_channels": len(about["labels"])}
    network = BasicUNet(spatial_dims=options.dimension, **counts)
    weights = options.out / "model.pt"
    if not (options.out / "spent.json").is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        transforms = [*prepare(["image", "label"], spacing), *augment(patch, options.dimension)]
        data = CacheDataset(labeled, Compose(transforms), progress=False)
        loader = DataLoader(data, batch_size=PATCHES[options.dimension][0], shuffle=True)
        spent = train(network, loader, options.minutes)
        torch.save(network.state_dict(), weights)
        write_spent(options.out, *spent)
    network.load_state_dict(torch.load(weights, weights_only=True))
    if options.dimension == 2:
        infer = SliceInferer(spatial_dim=2, roi_size=patch[:2], sw_batch_size=12, overlap=0.5)
    else:
        infer = SlidingWindowInferer(roi_size=patch, sw_batch_size=4, overlap=0.5)
    predict(network, test, Compose(prepare(["image"], spacing)), infer, options.out / "masks")


if __name__ == "__main__":
    main()
