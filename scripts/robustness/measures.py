"""How steady and how honest a model is: calibration, flips under small movements, an attack.

Axes: C classes or channels, I J K voxel axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from robustness.artefacts import find_slice_axis
from scipy.ndimage import binary_dilation
from torch import Tensor

from medssl.config import IGNORE
from medssl.losses.supervised import dice_ce
from medssl.predict import Model, Prediction
from medssl.transforms.geometry import Affine, Volume, resample

NUM_BINS = 15
MARGIN = 3  # voxels around the foreground that count for calibration
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
MOVEMENTS = {"rotation": 2.0, "shift": 1.0}
"""Degrees, or voxels along both axes of a slice, from one frame to the next."""

ENCODER_MULTIPLE = 32  # of the size of what a network without strides of its own takes
EPSILONS = (0.02, 0.05, 0.1)
"""Of the attack in its three severities, standard deviations of the normalized image."""


def measure_calibration(
    probs: NDArray[np.float32], reference: NDArray[np.uint8], margin: int = MARGIN
) -> float | None:
    """Return the expected calibration error of the voxels in and around a structure.

    They are those of the reference's foreground and all that are at most `margin` steps from face
    to face away from it: the same for every model, and few of the many that no model doubts.

    Args:
        probs: (C, I, J, K).
        reference: Class indices (I, J, K); 255 is ignored.
        margin: In voxels.

    Returns:
        The mean over voxels of how far the share of right voxels is from the mean confidence of
        those in the same of 15 equal bins of confidence; None without foreground.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    near = find_near(reference, margin)
    if not near.any():
        return None
    confidence = probs.max(0)[near]
    right = probs.argmax(0)[near] == reference[near]
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(bins))


def find_near(reference: NDArray[np.uint8], margin: int = MARGIN) -> NDArray[np.bool_]:
    """Return the known voxels (I, J, K) of a reference's foreground and some steps around it."""
    known = reference != IGNORE
    near: NDArray[np.bool_] = binary_dilation((reference > 0) & known, iterations=margin) & known
    return near


def follow_frames(
    predict: Callable[[Volume], Prediction], volume: Volume, movement: str
) -> list[NDArray[np.uint8]]:
    """Return what a model says of a scan in five frames of a small movement, mapped back.

    The scan is turned about its middle within its slices, or shifted along both of their axes,
    linearly and on its own grid; where it leaves the grid its border goes on. Probs are mapped
    back linearly, and then the largest one counts.

    Args:
        predict: Returns a prediction with its probs.
        volume: The scan as read.
        movement: One of `MOVEMENTS`.

    Returns:
        Five class maps (I, J, K) on the grid of the scan.
    """
    masks = []
    for step in STEPS:
        grid = volume.affine @ _move_grid(volume, movement, MOVEMENTS[movement] * step)
        place = (volume.affine, volume.shape, grid)
        frame = replace(volume, array=resample(volume.array, *place, "linear"))
        probs = predict(frame).probs
        assert probs is not None, "asked for"
        back = resample(np.asarray(probs), grid, volume.shape, volume.affine, "linear")
        masks.append(back.argmax(0).astype(np.uint8))
    return masks


def _move_grid(volume: Volume, movement: str, amount: float) -> Affine:
    """Return the matrix from voxels of a frame to those of the scan."""
    axis = find_slice_axis(volume.spacing)
    first, second = (a for a in range(3) if a != axis)
    matrix = np.eye(4)
    if movement == "shift":
        matrix[[first, second], 3] = amount
        return matrix
    angle, sizes = math.radians(amount), volume.spacing
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second] = -math.sin(angle) * sizes[second] / sizes[first]
    matrix[second, first] = math.sin(angle) * sizes[first] / sizes[second]
    center = (np.array(volume.shape) - 1) / 2
    matrix[:3, 3] = center - matrix[:3, :3] @ center
    return matrix


def measure_flips(masks: Sequence[NDArray[np.uint8]]) -> float:
    """Return the share of foreground voxels whose class changes from one frame to the next.

    The voxels are those that are foreground in one of two neighboring frames, summed over all
    pairs; where no frame has foreground nothing flips.

    Source: Hendrycks and Dietterich 2019, section 4.3. Departure: they ask whether the class of an
        image changes, this asks which share of the voxels changes.
    """
    changed = union = 0
    for one, other in itertools.pairwise(masks):
        changed += int((one != other).sum())
        union += int(((one > 0) | (other > 0)).sum())
    return changed / max(union, 1)


def find_attack(model: Model, image: Tensor, label: NDArray[np.uint8]) -> Tensor:
    """Return the direction in which the loss of a labeled scan rises the fastest under a bound.

    The whole image goes through the network at once, without mirroring, padded with zeros as a
    window is: where it fits a window that is what prediction sees before the mirrorings, and where
    not, windows see a little less of it.

    Args:
        model: The network, in evaluation mode.
        image: The normalized scan (1, C, I, J, K) on the cache grid.
        label: Class indices (I, J, K) there; 255 is ignored.

    Returns:
        Signs (1, C, I, J, K) of the gradient of Dice and cross-entropy: a step of one epsilon along
        them is the attack.

    Source: Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples (FGSM).
    """
    image = image.clone().requires_grad_()
    loss = measure_loss(model, image, label)
    return torch.autograd.grad(loss, image)[0].sign()


def measure_loss(model: Model, image: Tensor, label: NDArray[np.uint8]) -> Tensor:
    """Return Dice and cross-entropy of a scan, whose arguments are those of `find_attack`."""
    logits = run_whole(model, image)
    target = torch.from_numpy(label)[None, None].long()
    if model.info.slice_axis is not None:
        target = target.movedim(2 + model.info.slice_axis, 0).squeeze(1)
    return dice_ce(logits, target.to(model.device))


def run_whole(
    model: Model, image: Tensor, network: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return what a network says of a whole scan at once, at its voxels.

    Args:
        model: The model.
        image: The normalized scan (1, C, I, J, K) on the cache grid.
        network: What takes patches in place of the network of the model.

    Returns:
        (1, channels, I, J, K) float32, or slices (K, channels, I, J) of a 2D network.
    """
    axis, strides = model.info.slice_axis, model.info.network.strides
    patches = image if axis is None else image.movedim(2 + axis, 0).squeeze(1)
    multiples = [math.prod(along) for along in zip(*strides, strict=True)] or [ENCODER_MULTIPLE] * 2
    padding: list[int] = []  # as F.pad wants it, the last axis first
    inside: list[slice] = []
    sizes = patches.shape[2:]
    for size, extent, multiple in zip(sizes, model.info.patch_size, multiples, strict=True):
        missing = max(extent, multiple * math.ceil(size / multiple)) - size
        padding = [missing // 2, missing - missing // 2, *padding]
        inside.append(slice(missing // 2, missing // 2 + size))
    outputs = (network or model.network)(F.pad(patches, padding).to(model.device)).float()
    return outputs[(slice(None), slice(None), *inside)]
