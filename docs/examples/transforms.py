"""Weak and strong views, RandAugment and CutMix in MONAI's Compose and in a plain torch loop."""

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, CopyItemsd, Lambdad, NormalizeIntensityd

from medssl.data.phantoms import make_phantom
from medssl.transforms.intensity import build_intensity, build_occlusion
from medssl.transforms.mixing import draw_boxes, paste
from medssl.transforms.randaugment import apply_intensity, draw_operations
from medssl.transforms.spatial import draw_spatial

size = (24, 24, 24)
scans = [make_phantom(0, index, (32, 32, 32), "organs") for index in range(4)]
rng = np.random.default_rng(0)


def cut(case):
    """Cut image and label under one draw, so that their voxels still correspond."""
    image, label = case["image"], case["label"]
    draw = draw_spatial(rng, image.shape[1:], size, target=None, flips=(0, 1, 2))
    return {"weak": draw.sample(image, nearest=False), "label": draw.sample(label, True).long()}


def augment(patch):
    """Apply two operations of RandAugment at magnitude 9."""
    operations = draw_operations(rng, num_operations=2, magnitude=9.0)
    return apply_intensity(operations, torch.as_tensor(patch), seed=int(rng.integers(2**31)))


strong = Compose([build_intensity(strength=2.0), build_occlusion(size, strength=1.0)])
views = [NormalizeIntensityd("image"), cut, CopyItemsd("weak", 2, ["strong", "randaugment"])]
views += [Lambdad("strong", strong), Lambdad("randaugment", augment)]
cases = [{"image": i[None].astype("float32"), "label": y[None]} for i, y in scans]
batch = next(iter(DataLoader(Dataset(cases, Compose(views)), batch_size=4)))

boxes = draw_boxes(4, size, torch.Generator().manual_seed(0), probability=1.0)
mixed = paste(batch["strong"], batch["strong"].roll(1, 0), boxes)
mixed_label = paste(batch["label"], batch["label"].roll(1, 0), boxes)
