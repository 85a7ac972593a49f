"""The one equation: every method is a setting of it.

L(t) = L_sup(f(x~_l), y~_l)
     + sum over views v of a_pl(t)  mean[m_pl  L_pl(f(v), q_v)]
                         + a_ent(t) mean[m_ent H_r(f(v))]
                         + a_con(t) mean[m_con D(stopgrad g(w) || f(v))]

f is the noised student, g the teacher, w the weak view. ``mean`` is over all voxels that are not
ignored. Axes: B batch, C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medssl.config import IGNORE, Config, Ramp
from medssl.losses.consistency import consistency_loss
from medssl.losses.entropy import entropy_loss
from medssl.losses.ramps import ramp_value
from medssl.losses.supervised import cross_entropy, dice_ce, dice_loss
from medssl.networks.build import SegmentationNetwork, arrange
from medssl.pseudo.thresholds import ClassThresholds, measure_coverage
from medssl.transforms.mixing import draw_cubes, paste

SEGMENTATION_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "dice_ce": dice_ce,
    "ce": cross_entropy,
    "dice": dice_loss,
}
PASTED_WEIGHT = 0.5  # of pseudo-labeled voxels pasted into a labeled patch; Bai et al. 2023


@dataclass(frozen=True)
class Patches:
    """A batch that a loss can compare with: image, target probs, weight and valid voxels.

    ``weight`` (B, 1, I, J, K) scales the voxels; ``valid`` (B, 1, I, J, K) bool says which ones
    count at all.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    valid: Tensor


class Objective(nn.Module):
    """Student, EMA teacher, filter and losses of one round.

    Args:
        student: The network that learns.
        config: The resolved configuration.
        class_names: Names of the classes, background first; monitors are named by them.
    """

    def __init__(
        self, student: SegmentationNetwork, config: Config, class_names: Sequence[str]
    ) -> None:
        super().__init__()
        self.config = config
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.student = student
        decay = config.teacher.ema_decay
        self.teacher = AveragedModel(
            student,
            avg_fn=lambda average, current, count: (
                average.lerp(current, float(1.0 - min(1.0 - 1.0 / (float(count) + 1.0), decay)))
                if average.is_floating_point()
                else current
            ),  # batch norm counts its batches
            use_buffers=True,
        )
        self.teacher.requires_grad_(False)
        self.thresholds = ClassThresholds(config.filter.threshold, self.num_classes)
        self.monitors: dict[str, float] = {}

    @property
    def predictor(self) -> SegmentationNetwork:
        """The network that validates, labels and is delivered: the EMA teacher."""
        return cast(SegmentationNetwork, self.teacher.module)

    def after_step(self) -> None:
        """Move the EMA teacher towards the student, after an optimizer step."""
        self.teacher.update_parameters(self.student)

    def forward(
        self,
        labeled: Mapping[str, Tensor],
        unlabeled: Mapping[str, Tensor] | None,
        progress: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss.

        Args:
            labeled: image (B, C, I, J, K), label and weight (B, 1, I, J, K).
            unlabeled: weak and strong (B, C, I, J, K), weight (B, 1, I, J, K) and, with an offline
                teacher, probs (B, num_classes, I, J, K) and uncertainty (B, 1, I, J, K); or None.
            progress: t in [0, 1] within the round.
            generator: Source of the mixing draws, on the CPU.
        """
        self.monitors = {}
        known = self._read_labeled(labeled)
        cubes = self._draw_cubes(known, generator)
        if unlabeled is None:
            x_l = mix(known, roll(known), cubes)
            return {"supervised": self._compare("supervised", x_l, self._predict(x_l.image))}

        q_online = self._teach(unlabeled["weak"]) if "ema" in self.config.teacher.source else None
        q = unlabeled.get("probs", q_online)
        if q is None:
            raise ValueError("no teacher: the batch holds no probs and teacher.source no ema")
        valid = unlabeled["weight"] > 0
        accepted = self._filter(q, unlabeled, valid, progress)
        guessed = self._read_unlabeled(unlabeled, q, accepted, valid)
        cubes_v = self._draw_cubes(guessed, generator)
        x_l = mix(known, fit(guessed, len(known.image), PASTED_WEIGHT), cubes)
        x_v = mix(guessed, fit(known, len(guessed.image)), cubes_v)
        own = valid & ~cubes_v.to(valid.device)  # what of a view shows the unlabeled case itself

        logits = self._predict(torch.cat([x_l.image, x_v.image]))
        logits_l = [level[: len(x_l.image)] for level in logits]
        logits_v = [level[len(x_l.image) :] for level in logits]
        losses = self.config.losses
        terms = {"supervised": self._compare("supervised", x_l, logits_l)}
        if losses.pseudo_label.weight > 0:
            a = losses.pseudo_label.weight * ramp(losses.pseudo_label.ramp, progress)
            terms["pseudo_label"] = a * self._compare("pseudo_label", x_v, logits_v)
        if losses.entropy.weight > 0:
            a = losses.entropy.weight * ramp(losses.entropy.ramp, progress)
            m = accepted if losses.entropy.voxels == "accepted" else valid
            order = losses.entropy.order
            terms["entropy"] = a * entropy_loss(logits_v[0], order, (m & own).float(), valid)
        if losses.consistency.weight > 0 and q_online is not None:
            a = losses.consistency.weight * ramp(losses.consistency.ramp, progress)
            m = accepted if losses.consistency.voxels == "accepted" else valid
            name = losses.consistency.name
            weight = (m & own).float()
            terms["consistency"] = a * consistency_loss(logits_v[0], q_online, name, weight, valid)
        return terms

    def _predict(self, image: Tensor) -> list[Tensor]:
        """Return the student's logits, full resolution first."""
        return self.student.forward_heads(arrange(image))

    @torch.no_grad()
    def _teach(self, weak: Tensor) -> Tensor:
        """Return the probs of the un-noised EMA teacher on the weak view."""
        self.teacher.eval()
        logits = self.teacher(arrange(weak))
        return torch.softmax(logits.float(), dim=1)

    def _read_labeled(self, labeled: Mapping[str, Tensor]) -> Patches:
        """Return labeled patches with one-hot targets."""
        label = labeled["label"].long()
        valid = (labeled["weight"] > 0) & (label != IGNORE)
        classes = torch.where(valid, label, 0)[:, 0]
        target = F.one_hot(classes, self.num_classes).movedim(-1, 1).float()
        return Patches(labeled["image"], target, valid.float(), valid)

    def _read_unlabeled(
        self, unlabeled: Mapping[str, Tensor], q: Tensor, accepted: Tensor, valid: Tensor
    ) -> Patches:
        """Return strong views with their pseudo-targets."""
        section = self.config.target
        if section.kind == "hard":
            target = F.one_hot(q.argmax(1), self.num_classes).movedim(-1, 1).float()
        else:
            target = q.clamp(min=1e-6) ** (1.0 / section.temperature)
            target = target / target.sum(1, keepdim=True)
        trusted = accepted if self.config.losses.pseudo_label.voxels == "accepted" else valid
        return Patches(unlabeled["strong"], target, (trusted & valid).float(), valid)

    @torch.no_grad()
    def _filter(
        self, q: Tensor, unlabeled: Mapping[str, Tensor], valid: Tensor, progress: float
    ) -> Tensor:
        """Return (B, 1, I, J, K) bool: the voxels whose pseudo-target is trusted."""
        self.thresholds.update(q, valid, progress)
        accepted = self.thresholds.accept(q) & valid
        section = self.config.filter.uncertainty
        if section.source != "none" and "uncertainty" in unlabeled:
            risen = ramp_value("sigmoid", progress, 0.0, 1.0)
            limit = (section.start + (1.0 - section.start) * risen) * math.log(self.num_classes)
            accepted &= unlabeled["uncertainty"] < limit
        classes = q.argmax(1, keepdim=True)
        self.monitors |= measure_coverage(accepted, classes, valid, self.class_names)
        for name, threshold in zip(
            self.class_names, self.thresholds.thresholds.tolist(), strict=True
        ):
            self.monitors[f"threshold/{name}"] = threshold
        return accepted

    def _draw_cubes(self, patches: Patches, generator: torch.Generator) -> Tensor:
        """Draw which part of each patch is replaced; nothing without mixing."""
        noise = self.config.noise
        probability = noise.mixing_probability if noise.mixing == "copy_paste" else 0.0
        size = tuple(patches.image.shape[2:])
        return draw_cubes(len(patches.image), size, generator, probability)

    def _compare(self, section: str, patches: Patches, logits: Sequence[Tensor]) -> Tensor:
        """Return the segmentation loss over the heads, weighted 1, 1/2, 1/4, ... (sum 1)."""
        loss = SEGMENTATION_LOSSES[getattr(self.config.losses, section).name]
        shares = [0.5**level for level in range(len(logits))]
        total = torch.zeros((), device=patches.image.device)
        for share, level in zip(shares, logits, strict=True):
            target, weight, valid = shrink(patches, level.shape[2:])
            total = total + share / sum(shares) * loss(level, target, weight, valid)
        return total


def ramp(section: Ramp, progress: float) -> float:
    """Return a_*(t) without its weight."""
    return ramp_value(section.name, progress, section.start, section.end)


def mix(into: Patches, source: Patches, cubes: Tensor) -> Patches:
    """Paste the cubes (B, 1, I, J, K) of ``source``: image, target, weight and valid alike."""
    cubes = cubes.to(into.image.device)
    return Patches(
        paste(into.image, source.image, cubes),
        paste(into.target, source.target, cubes),
        paste(into.weight, source.weight, cubes),
        paste(into.valid, source.valid, cubes),
    )


def roll(patches: Patches) -> Patches:
    """Return the patches shifted by one along the batch: each one's partner for mixing."""
    return fit(patches, len(patches.image), shift=1)


def fit(patches: Patches, count: int, scale: float = 1.0, shift: int = 0) -> Patches:
    """Return ``count`` patches, repeated or cut as needed, their weights scaled."""
    index = (torch.arange(count) + shift) % len(patches.image)
    index = index.to(patches.image.device)
    return Patches(
        patches.image[index],
        patches.target[index],
        patches.weight[index] * scale,
        patches.valid[index],
    )


def shrink(patches: Patches, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return target, weight and valid at a lower resolution, averaged over the valid voxels."""
    if tuple(size) == tuple(patches.target.shape[2:]):
        return patches.target, patches.weight, patches.valid
    kernel = [full // low for full, low in zip(patches.target.shape[2:], size, strict=True)]
    pool = F.avg_pool3d if len(kernel) == 3 else F.avg_pool2d
    counted = patches.valid.float()
    share = pool(counted, kernel)
    target = pool(patches.target * counted, kernel) / share.clamp(min=1e-6)
    weight = pool(patches.weight * counted, kernel) / share.clamp(min=1e-6)
    return target, weight, share > 0.5
