"""Class-wise dynamic confidence thresholds, with their statistics inside each predicted class.

Counted over all voxels, background would drown the foreground: with 2 % of it the published
formulas give thresholds that filter nothing. Axes: B batch, C classes, I J K voxel axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl.config import ThresholdSection

MEMORY = 0.99  # of the running counts, per step
FEWEST = 20.0  # running count of voxels under which a class keeps its last threshold
HIGHEST = 0.95


class ClassThresholds(nn.Module):
    """Thresholds T_c; the running counts and T_c are buffers, so a checkpoint holds them.

    ``fixed`` and ``curriculum`` give every class the same threshold: constant ``start``, or falling
    linearly from ``start`` to ``end`` over the round. ``flex`` lowers it for the classes that the
    teacher is unsure of: b_c is the share of voxels predicted c that reach the (falling)
    threshold, relative to the best class, and T_c = tau b_c / (2 - b_c).

    Args:
        section: Name and range of the thresholds.
        num_classes: Number of classes, with background.

    Source: Zhang et al. 2021 (FlexMatch), equations 5-7 and 11; Cascante-Bonilla et al. 2021
        (curriculum). Departures: counts are taken inside each predicted class and under tau, not
        T_c, which would spiral; T_c stays in [floor, 0.95], floor 0.6 for two classes and
        1/C + 0.2 for more; the background has the lowest threshold of the foreground classes,
        since a stricter one takes away only the outer side of every surface, and masks grow.
    """

    predicted: Tensor
    reached: Tensor
    thresholds: Tensor

    def __init__(self, section: ThresholdSection, num_classes: int) -> None:
        super().__init__()
        self.section = section
        self.floor = 0.6 if num_classes == 2 else min(HIGHEST, 1 / num_classes + 0.2)
        self.register_buffer("predicted", torch.zeros(num_classes))
        self.register_buffer("reached", torch.zeros(num_classes))
        first = 0.0 if section.name == "none" else section.start
        self.register_buffer("thresholds", torch.full((num_classes,), first))

    def find_tau(self, progress: float) -> float:
        """Return the common threshold at a progress in [0, 1] of the round."""
        if self.section.name == "none":
            return 0.0
        if self.section.name == "fixed":
            return self.section.start
        return self.section.start + progress * (self.section.end - self.section.start)

    @torch.no_grad()
    def update(self, probs: Tensor, valid: Tensor, progress: float) -> None:
        """Count the voxels of a batch and move the thresholds.

        Args:
            probs: (B, C, I, J, K) of the teacher.
            valid: (B, 1, I, J, K) bool, voxels that count.
            progress: In [0, 1].
        """
        tau = self.find_tau(progress)
        if self.section.name != "flex":
            self.thresholds.fill_(tau)
            return
        confidence, classes = probs.max(dim=1, keepdim=True)
        chosen = classes[valid]
        num_classes = self.predicted.numel()
        predicted = torch.bincount(chosen, minlength=num_classes)
        reached = torch.bincount(chosen[confidence[valid] >= tau], minlength=num_classes)
        self.predicted.mul_(MEMORY).add_(predicted)
        self.reached.mul_(MEMORY).add_(reached)
        share = self.reached / self.predicted.clamp(min=1.0)
        share = share / share.max().clamp(min=1e-6)
        wanted = (tau * share / (2.0 - share)).clamp(self.floor, HIGHEST)
        enough = self.predicted >= FEWEST
        self.thresholds.copy_(torch.where(enough, wanted, self.thresholds))
        self.thresholds[0] = self.thresholds[1:].min()

    def accept(self, probs: Tensor) -> Tensor:
        """Return (B, 1, I, J, K) bool: the confidence reaches the threshold of its class."""
        confidence, classes = probs.max(dim=1, keepdim=True)
        return confidence >= self.thresholds[classes]


def find_surface(classes: Tensor) -> Tensor:
    """Return (B, 1, I, J, K) bool: voxels with a neighbor of another class along an axis."""
    surface = torch.zeros_like(classes, dtype=torch.bool)
    for axis in range(2, classes.ndim):
        length = classes.shape[axis] - 1
        differs = classes.narrow(axis, 0, length) != classes.narrow(axis, 1, length)
        surface.narrow(axis, 0, length).logical_or_(differs)
        surface.narrow(axis, 1, length).logical_or_(differs)
    return surface


def measure_coverage(
    accepted: Tensor, classes: Tensor, valid: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Return the accepted fraction of all voxels, of each predicted class, and of surfaces.

    Args:
        accepted: (B, 1, I, J, K) bool.
        classes: (B, 1, I, J, K) predicted classes.
        valid: (B, 1, I, J, K) bool.
        names: Names of the classes, background first.
    """
    places = {"coverage": valid, "coverage_surface": valid & find_surface(classes)}
    places |= {f"coverage/{name}": valid & (classes == i) for i, name in enumerate(names)}
    return {
        name: float((accepted & where).sum() / where.sum())
        for name, where in places.items()
        if bool(where.any())
    }
