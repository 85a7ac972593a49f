"""Class-wise dynamic confidence thresholds, with their statistics inside each predicted class.

Counted over all voxels, background would drown the foreground: with 2 % of it the published
formulas give thresholds that filter nothing. A rule is a function of (statistics, section,
progress); ``RULES`` has the name that a configuration gives it, and what else it asks for. Axes: B
batch, C classes, I J K voxel axes (K is absent in 2D), N voxels of a batch that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medssl.config import ThresholdSection

MEMORY = 0.99  # of the running counts, per step
FEWEST = 20.0  # running count of voxels under which a class keeps its last threshold
HIGHEST = 0.95
NUM_BINS = 200  # of confidence; a bin is under 6 % of 1 - confidence wide
LEAST_GAP = 1e-5  # 1 - confidence of the highest bin; about the resolution of a softmax
DEVIATIONS = 2.0  # n of soft: the sd of its Gaussian is that of the confidence, divided by n
NARROWEST = 1e-4  # width of a Gaussian of soft, in confidence
HALF_WIDTH = math.sqrt(2 * math.log(2))  # of a Gaussian at half its maximum, in its sd
FARTHEST = 13.0  # widths under the mean beyond which float32 has no Gaussian above 0


@dataclass(frozen=True)
class ClassStatistics:
    """What is known of the confidence of the voxels predicted as each class.

    Args:
        predicted: (C,) running count of voxels.
        reached: (C,) running count of those that reach the threshold of the curriculum.
        mean: (C,) of the confidence.
        variance: (C,) of the confidence.
        histogram: (C, bins) running count of voxels; 0 for rules that do not ask for it.
        edges: (bins,) lower edge of each bin, in confidence; the first is 0.
        last: (C,) thresholds of the step before.
        floor: Lowest threshold of the rules that clamp.
    """

    predicted: Tensor
    reached: Tensor
    mean: Tensor
    variance: Tensor
    histogram: Tensor
    edges: Tensor
    last: Tensor
    floor: float

    @property
    def has_enough(self) -> Tensor:
        """(C,) bool: the class has enough voxels to say something of them."""
        return self.predicted >= FEWEST

    @property
    def width(self) -> Tensor:
        """(C,) of the Gaussians of soft, in confidence."""
        return (self.variance.sqrt() / DEVIATIONS).clamp(min=NARROWEST)

    def settle(self, proposed: Tensor) -> Tensor:
        """Return the proposed thresholds (C,), but the last one for classes with too few voxels.

        The background has the lowest threshold of the foreground classes: a stricter one takes
        away only the outer side of every surface, and masks grow.
        """
        settled = torch.where(self.has_enough, proposed, self.last)
        settled[0] = settled[1:].min()
        return settled


@dataclass(frozen=True)
class Rule:
    """A rule, and what it asks for.

    Args:
        propose: Returns the thresholds (C,) of (statistics, section, progress in [0, 1]).
        find_lowest: Returns, of (section, number of classes), the lowest threshold that a round may
            have; None where confidences alone decide it, or where there is none.
        counts: Whether it asks for the statistics of voxels.
        needs_histogram: Whether for their histogram too.
        find_first: Returns the threshold of (section,) until a class has enough voxels.
        is_soft: Whether its weights are Gaussian, not 1 and 0.
    """

    propose: Callable[[ClassStatistics, ThresholdSection, float], Tensor]
    find_lowest: Callable[[ThresholdSection, int], float] | None
    counts: bool = True
    needs_histogram: bool = False
    find_first: Callable[[ThresholdSection], float] = lambda section: HIGHEST
    is_soft: bool = False


def interpolate(section: ThresholdSection, progress: float) -> float:
    """Return the value at a progress in [0, 1] between ``start`` and ``end``."""
    return section.start + progress * (section.end - section.start)


def none(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return thresholds (C,) that every voxel reaches."""
    return torch.zeros_like(statistics.last)


def fixed(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return the threshold ``start`` for every class, (C,)."""
    return torch.full_like(statistics.last, section.start)


def curriculum(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return, for every class, the threshold on its way from ``start`` to ``end``, (C,).

    Source: Cascante-Bonilla et al. 2021, as a line where they take percentiles.
    """
    return torch.full_like(statistics.last, interpolate(section, progress))


def flex(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return thresholds (C,) that are lower for the classes that the teacher is unsure of.

    T_c = tau b_c / (2 - b_c), where tau is that of the curriculum and b_c the share of the voxels
    predicted c that reach it, relative to the best foreground class.

    Source: Zhang et al. 2021 (FlexMatch), equations 5-7 and 11. Departures: counts are taken
        inside each predicted class and under tau, not T_c, which would spiral; T_c is clamped; the
        background, which is sure nearly everywhere, is not the best class: next to it all others
        are at the floor, and nothing is filtered. One foreground class alone has tau.
    """
    tau = interpolate(section, progress)
    share = statistics.reached / statistics.predicted.clamp(min=1.0)
    best = torch.where(statistics.has_enough, share, 0.0)[1:].max()
    share = (share / best.clamp(min=1e-6)).clamp(max=1.0)
    return statistics.settle((tau * share / (2.0 - share)).clamp(statistics.floor, HIGHEST))


def free(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return thresholds (C,) that follow the mean confidence mu_c; ``start``, ``end`` play no part.

    T_c = tau mu_c / max mu, with tau the mean of mu over the classes that have enough voxels.

    Source: Wang et al. 2023 (FreeMatch), self-adaptive thresholds. Departures: mu_c is the mean
        confidence of the voxels predicted c, not the mean probability of c, which is its voxel
        share, and tau is a mean over classes, not over voxels; T_c is clamped.
    """
    mean = torch.where(statistics.has_enough, statistics.mean, 0.0)
    tau = mean.sum() / statistics.has_enough.sum().clamp(min=1)
    proposed = tau * mean / mean.max().clamp(min=1e-6)
    return statistics.settle(proposed.clamp(statistics.floor, HIGHEST))


def soft(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return the confidence (C,) at which the weight is 1/2; ``start``, ``end`` play no part.

    ``ClassThresholds.weigh`` gives the weights, exp(-min(conf - mu_c, 0)^2 n^2 / (2 var_c)), n = 2.

    Source: Chen et al. 2023 (SoftMatch), truncated Gaussian weights. Departures: mu_c and var_c are
        those of the voxels predicted c, not of all; var_c is divided by the count, not by one
        less.
    """
    return statistics.settle(statistics.mean - HALF_WIDTH * statistics.width)


def quantile(statistics: ClassStatistics, section: ThresholdSection, progress: float) -> Tensor:
    """Return thresholds (C,) that the most confident voxels of each predicted class reach.

    Their share moves from ``start`` to ``end``. At least that share is accepted and at most one bin
    of the histogram more: where many voxels are within `LEAST_GAP` of certain, or equally
    confident, all of them are. The background has the lowest threshold of the foreground classes,
    and so another share.

    Source: Cascante-Bonilla et al. 2021 (curriculum labeling). Departures: percentiles are taken
        inside each predicted class, and from running counts.
    """
    above = statistics.histogram.flip(1).cumsum(1).flip(1)  # voxels in a bin or a higher one
    share = interpolate(section, progress) - 1e-6  # for the rounding of the counts
    lowest_bin = (above >= share * above[:, :1]).sum(1) - 1
    return statistics.settle(statistics.edges[lowest_bin])


def find_floor(num_classes: int) -> float:
    """Return the lowest threshold of the rules that clamp; ``num_classes`` is with background."""
    return 0.6 if num_classes == 2 else min(HIGHEST, 1 / num_classes + 0.2)


RULES: dict[str, Rule] = {
    "none": Rule(none, None, counts=False, find_first=lambda section: 0.0),
    "fixed": Rule(
        fixed,
        lambda section, num_classes: section.start,
        counts=False,
        find_first=lambda section: section.start,
    ),
    "curriculum": Rule(
        curriculum,
        lambda section, num_classes: min(section.start, section.end),
        counts=False,
        find_first=lambda section: section.start,
    ),
    "flex": Rule(
        flex,
        lambda section, num_classes: find_floor(num_classes),
        find_first=lambda section: section.start,
    ),
    "free": Rule(free, None),
    "soft": Rule(soft, None, is_soft=True),
    "quantile": Rule(quantile, None, needs_histogram=True),
}


def find_rule(name: str) -> Rule:
    """Return the rule of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in RULES:
        raise ValueError(f"threshold {name!r} is unknown; there are {', '.join(RULES)}")
    return RULES[name]


def find_lowest(section: ThresholdSection, num_classes: int) -> float:
    """Return the lowest threshold that a round may have; 0 where confidences alone decide it."""
    find = find_rule(section.name).find_lowest
    return 0.0 if find is None else find(section, num_classes)


class ClassThresholds(nn.Module):
    """Thresholds T_c and the running statistics under them, all in buffers: a checkpoint has them.

    A class keeps its last threshold until it has enough voxels; the first is ``start``, or 0.95 for
    the rules where ``start`` is no confidence. T_c of flex and free stays in [floor, 0.95], floor
    0.6 for two classes and 1/C + 0.2 for more. Of flex, free, soft and quantile the background has
    the threshold, and of soft the weights, of the foreground class with the lowest threshold.

    Args:
        section: Name of the rule, and range of the thresholds or (quantile) of the kept share.
        num_classes: Number of classes, with background.

    Raises:
        ValueError: There is no rule of that name.
    """

    predicted: Tensor
    reached: Tensor
    mean: Tensor
    squares: Tensor
    histogram: Tensor
    thresholds: Tensor
    widths: Tensor
    edges: Tensor

    def __init__(self, section: ThresholdSection, num_classes: int) -> None:
        super().__init__()
        self.section = section
        self.rule = find_rule(section.name)
        self.floor = find_floor(num_classes)
        self.register_buffer("predicted", torch.zeros(num_classes))
        self.register_buffer("reached", torch.zeros(num_classes))
        self.register_buffer("mean", torch.zeros(num_classes))
        self.register_buffer("squares", torch.zeros(num_classes))  # sum of (confidence - mean)^2
        self.register_buffer("histogram", torch.zeros(num_classes, NUM_BINS))
        first = self.rule.find_first(section)
        self.register_buffer("thresholds", torch.full((num_classes,), first))
        # Until a class has enough voxels: a weight of 1 at confidence 1, and of 1/2 at HIGHEST.
        self.register_buffer("widths", torch.full((num_classes,), (1 - HIGHEST) / HALF_WIDTH))
        gaps = torch.logspace(math.log10(1 - 1 / num_classes), math.log10(LEAST_GAP), NUM_BINS)
        edges = 1 - gaps
        edges[0] = 0.0
        self.register_buffer("edges", edges, persistent=False)

    @torch.no_grad()
    def update(self, probs: Tensor, valid: Tensor, progress: float) -> None:
        """Count the voxels of a batch and move the thresholds.

        Args:
            probs: (B, C, I, J, K) of the teacher.
            valid: (B, 1, I, J, K) bool, voxels that count.
            progress: In [0, 1].
        """
        if self.rule.counts:
            confidence, classes = probs.float().max(dim=1, keepdim=True)
            tau = interpolate(self.section, progress)
            self._count(confidence.flatten(), classes.flatten(), valid.flatten(), tau)
        statistics = ClassStatistics(
            predicted=self.predicted,
            reached=self.reached,
            mean=self.mean,
            variance=self.squares / self.predicted.clamp(min=1.0),
            histogram=self.histogram,
            edges=self.edges,
            last=self.thresholds,
            floor=self.floor,
        )
        self.thresholds.copy_(self.rule.propose(statistics, self.section, progress))
        self.widths.copy_(torch.where(statistics.has_enough, statistics.width, self.widths))
        self.widths[0] = self.widths[1:].take(self.thresholds[1:].argmin())

    def _count(self, confidence: Tensor, classes: Tensor, valid: Tensor, tau: float) -> None:
        """Add the valid ones of some voxels (N,) to the running statistics."""
        num_classes = self.predicted.numel()
        member = (classes == torch.arange(num_classes, device=classes.device)[:, None]) & valid
        predicted = member.sum(1)
        reached = (member & (confidence >= tau)).sum(1)
        mean = torch.where(member, confidence, 0.0).sum(1) / predicted.clamp(min=1)
        squares = torch.where(member, confidence - mean[:, None], 0.0).square().sum(1)

        self.predicted.mul_(MEMORY)  # the earlier part, until the sums below have used it
        joint = (self.predicted + predicted).clamp(min=1e-6)
        step = mean - self.mean
        self.squares.mul_(MEMORY).add_(squares + step**2 * self.predicted * predicted / joint)
        self.mean.add_(step * predicted / joint)
        self.predicted.add_(predicted)
        self.reached.mul_(MEMORY).add_(reached)
        if self.rule.needs_histogram:
            bins = torch.bucketize(confidence, self.edges, right=True) - 1
            places = torch.zeros(self.histogram.numel(), dtype=torch.long, device=classes.device)
            places.scatter_add_(0, classes * NUM_BINS + bins, valid.long())
            self.histogram.mul_(MEMORY).add_(places.view_as(self.histogram))

    def accept(self, probs: Tensor) -> Tensor:
        """Return (B, 1, I, J, K) bool: the confidence reaches the threshold of its class.

        With ``soft`` that is where the weight reaches 1/2, so that coverage says something there.
        """
        confidence, classes = probs.max(dim=1, keepdim=True)
        return confidence >= self.thresholds[classes]

    def weigh(self, probs: Tensor) -> Tensor:
        """Return (B, 1, I, J, K) float32: accepted voxels as 1 and 0, or with ``soft`` (0, 1]."""
        if not self.rule.is_soft:
            return self.accept(probs).float()
        confidence, classes = probs.float().max(dim=1, keepdim=True)
        under = (self.thresholds[classes] - confidence) / self.widths[classes] + HALF_WIDTH
        return torch.exp(-under.clamp(0.0, FARTHEST).square() / 2)


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
) -> dict[str, Tensor]:
    """Return the accepted fraction of all voxels, of each predicted class, and of surfaces.

    They stay on the device, 0-dim float32; of a class or surface without a voxel it is NaN.

    Args:
        accepted: (B, 1, I, J, K) bool.
        classes: (B, 1, I, J, K) predicted classes.
        valid: (B, 1, I, J, K) bool.
        names: Names of the classes, background first.
    """
    each = torch.arange(len(names), device=classes.device).view(-1, *[1] * (classes.ndim - 2))
    where = torch.cat([valid, valid & find_surface(classes), valid & (classes == each)], dim=1)
    axes = [0, *range(2, classes.ndim)]
    shares = (accepted & where).sum(axes) / where.sum(axes)
    keys = ["coverage", "coverage_surface", *(f"coverage/{name}" for name in names)]
    return dict(zip(keys, shares.unbind(), strict=True))
