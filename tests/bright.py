"""A scan whose voxels are as bright as their class says, and an untrained model for it."""

import nibabel as nib
import numpy as np
import torch

from medssl.data.cases import Case
from medssl.networks.build import NetworkSpec, build_network
from medssl.predict import Model, describe_model


def make_model(plan, slice_axis=None):
    torch.manual_seed(0)
    if slice_axis is not None:
        spec = NetworkSpec(
            in_channels=1, num_classes=3, filters=(4, 8, 16), kernels=((3, 3),) * 3,
            strides=((1, 1), (2, 2), (2, 2)), dropout=0.1, deep_supervision=True,
        )  # fmt: skip
        plan = plan.model_copy(
            update={"network": spec, "patch_size": (8, 8), "slice_axis": slice_axis}
        )
    info = describe_model(plan.model_copy(update={"flips": ()}), {})
    return Model(build_network(info.network).eval(), info, torch.device("cpu"))


def write_case(folder):
    """A case of 10 x 9 x 8 voxels with the label values 0, 1 and 5."""
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 1, 5], np.uint8), (10, 9, 8))
    image = 40.0 * label + rng.normal(0, 3, label.shape)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, array in zip(paths, (image.astype(np.float32), label), strict=True):
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.5, 1.0, 1.0])), path)
    return Case("a", paths[:1], paths[1], "p")
