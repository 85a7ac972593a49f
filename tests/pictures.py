"""A data set of pictures: PNG images and labels, and the list that names them."""

import csv

import numpy as np
from PIL import Image

from medssl.data.phantoms import make_phantom


def write_pictures(
    folder, num_labeled, num_unlabeled, num_test, shape, label_values=(0, 1, 2, 3), has_colors=False
):
    """Each is the slice of a phantom with most foreground; no channel of a color is the gray."""
    parts = ["labeled"] * num_labeled + ["unlabeled"] * num_unlabeled + ["test"] * num_test
    rows = [("case_id", "image", "label", "patient_id", "split")]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index, part in enumerate(parts):
        scan, classes = make_phantom(0, index, (*shape, 12), "organs")
        k = int(np.argmax((classes > 0).sum((0, 1))))
        gray = np.rint(scan[..., k] * (255.0 / scan.max())).astype(np.uint8)
        pixels = np.stack([gray, 255 - gray, gray // 2], -1) if has_colors else gray
        case_id = f"organs_{index:03d}"
        image, label = f"images/{case_id}.png", ""
        Image.fromarray(pixels).save(folder / image)
        if part != "unlabeled":
            label = f"labels/{case_id}.png"
            values = np.array(label_values, np.uint8)[classes[..., k]]
            Image.fromarray(values).save(folder / label)
        rows.append((case_id, image, label, case_id, part))
    with (folder / "cases.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
