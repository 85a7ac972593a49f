"""Gates: which pseudo-labeled cases a student may learn from, and which model may teach.

A model that lost a class, floods the volume or contradicts its predecessor makes pseudo-labels
that the next student would agree with; nothing later would notice. Axes: I J K voxel axes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medssl.config import IGNORE, FilterSection
from medssl.metrics import mean_known
from medssl.pseudo.thresholds import find_lowest
from medssl.pseudo.uncertainty import find_limit
from medssl.transforms.geometry import Box

OFTEN = 0.9  # share of labeled cases above which a case without the class is suspect
LEAST_ACCEPTED = 0.5  # share of cases
DOUBT = 0.01  # chance that so few labels all have what so many other scans lack
MOST_ABSENT = 0.8  # share of cases without a class beyond which it is the model that lost it
LEAST_PRIOR = 0.2  # share of the class's labeled voxel share, or volume
MOST_PRIOR = 5.0
ABSENT = ("empty", "lost ")  # how reasons begin that a scan without a class may have
ONE_PIECE = 0.98  # share of a class's voxels in its largest component
LEAST_AGREEMENT = 0.4  # mean Dice with the pseudo-labels of the round before, or the student

Slab = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Probs (num_classes, I, J, K) and uncertainty (I, J, K) of a part of a pseudo-label."""


@dataclass(frozen=True)
class Expectation:
    """What labeled cases lead one to expect of a pseudo-label.

    ``presence`` and ``share`` give, per foreground class, the fraction of labeled cases that have
    it and its mean fraction of their annotated voxels; ``single`` are the classes that are one
    piece in every labeled case; ``has_empty`` says whether some labeled case has no foreground,
    ``is_partial`` whether parts of some are not annotated, such as the slices without the organ.
    ``num_cases`` labeled cases say so; infinity: it is known for certain. Of the share and of the
    volume (ml, or pixels) of a class the ranges are from the lowest to the highest mean with any
    one case left out; volumes, of whole scans alone, are empty where they are not known.
    """

    presence: Mapping[int, float]
    share: Mapping[int, float]
    single: frozenset[int] = frozenset()
    has_empty: bool = False
    is_partial: bool = False
    num_cases: float = math.inf
    share_range: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    volume_range: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseReview:
    """One row of review.csv: what is known of the pseudo-label of a case.

    ``confidence`` is that of ``measure_confidence``; ``uncertainty`` (nats) the mean over predicted
    foreground; ``agreement`` the mean Dice with the round before, ``stability`` that with earlier
    checkpoints of the same training, or None; ``coverage`` are accepted fractions. Of a class that
    is not there they are n/a (None): nothing to trust is no distrust. Volumes of pictures, which
    have no spacing, are areas in pixels.
    """

    case_id: str
    accepted: bool
    reason: str
    confidence: float
    uncertainty: float
    agreement: float | None
    coverage: float
    coverage_per_class: dict[str, float | None]
    agreement_per_class: dict[str, float | None]
    volume_ml: dict[str, float]
    share: dict[int, float] = field(repr=False)
    stability: float | None = None
    has_spacing: bool = True

    def to_row(self) -> dict[str, object]:
        """Return the row of review.csv."""
        row = {k: v for k, v in asdict(self).items() if not isinstance(v, dict)}
        volume = "volume_ml" if row.pop("has_spacing") else "area_px"
        row["accepted"] = int(self.accepted)
        row |= {f"coverage/{name}": value for name, value in self.coverage_per_class.items()}
        row |= {f"agreement/{name}": value for name, value in self.agreement_per_class.items()}
        return row | {f"{volume}/{name}": value for name, value in self.volume_ml.items()}


def expect_from(
    labels: Iterable[NDArray[np.uint8]], num_classes: int, voxel_ml: Iterable[float] | None = None
) -> Expectation:
    """Return what the labeled cases lead one to expect, looking at one after the other.

    Args:
        labels: Classes (I, J, K) of each case; 255 is not annotated, and counts nowhere.
        num_classes: Number of classes, with background.
        voxel_ml: Volume of a voxel of each case in ml, 1 for pixels; None if it is not known.
    """
    classes = range(1, num_classes)
    shares, volumes = [], []
    single = set(classes)
    is_partial = False
    sizes = itertools.repeat(0.0) if voxel_ml is None else voxel_ml
    for label, size in zip(labels, sizes, strict=voxel_ml is not None):
        every = np.zeros(IGNORE + 1, np.int64)
        for plane in label:
            every += np.bincount(plane.ravel(), minlength=IGNORE + 1)
        is_partial |= bool(every[IGNORE])
        counts = np.delete(every, IGNORE)
        if counts.sum():
            shares.append(counts[1:num_classes] / counts.sum())
            volumes.append(counts[1:num_classes] * size)
            boxes = ndimage.find_objects(label, num_classes - 1)
            single = {c for c in single if not (b := boxes[c - 1]) or _is_single(label[b] == c)}
    if not shares:
        nothing = dict.fromkeys(classes, 0.0)
        return Expectation(nothing, nothing, num_cases=0)
    table = np.array(shares)  # (cases, num_classes - 1)
    is_known = voxel_ml is not None and not is_partial
    return Expectation(
        presence=dict(zip(classes, (table > 0).mean(0).tolist(), strict=True)),
        share=dict(zip(classes, table.mean(0).tolist(), strict=True)),
        single=frozenset(single),
        has_empty=bool((table.sum(1) == 0).any()),
        is_partial=is_partial,
        num_cases=len(table),
        share_range=_range_means(table),
        volume_range=_range_means(np.array(volumes)) if is_known else {},
    )


def _range_means(table: NDArray[np.float64]) -> dict[int, tuple[float, float]]:
    """Return, by class, the lowest and highest mean of (cases, classes) with one case left out."""
    others = len(table) - 1
    means = (table.sum(0) - table) / others if others else table
    ranges = zip(means.min(0).clip(0.0).tolist(), means.max(0).tolist(), strict=True)
    return dict(enumerate(ranges, start=1))


def _is_single(mask: NDArray[np.bool_]) -> bool:
    """Return whether (nearly) all voxels of a mask hang together; corners count."""
    if not mask.any():
        return True
    sizes = np.bincount(_find_components(mask).ravel())[1:]
    return bool(sizes.max() >= ONE_PIECE * sizes.sum())


def _find_components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the connected components of a mask (I, J, K) from 1 on."""
    components, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return np.asarray(components, dtype=np.int32)


def find_islands(
    classes: NDArray[np.uint8], single: frozenset[int]
) -> Iterator[tuple[Box, NDArray[np.bool_]]]:
    """Yield the islands, all but the largest component, of each class that is one piece.

    Args:
        classes: Classes (I, J, K).
        single: Classes that are one piece.

    Yields:
        The box of a class, and where islands are in it.

    Source: Bai et al. 2023 (BCP), section 3.2, for pseudo-labels.
    """
    boxes = ndimage.find_objects(classes, max(single, default=0))
    for index in single:
        if (box := boxes[index - 1]) is None:
            continue
        components = _find_components(classes[box] == index)
        if components.max() > 1:
            largest = int(np.bincount(components.ravel())[1:].argmax()) + 1
            i, j, k = box
            yield (i, j, k), (components > 0) & (components != largest)


def trust_voxels(
    probs: NDArray[np.float32], uncertainty: NDArray[np.float32], section: FilterSection
) -> NDArray[np.bool_]:
    """Return (I, J, K): the voxels that people are shown as trusted, and that coverage counts.

    The confidence reaches the lowest threshold that a student may meet, and the uncertainty is
    under the strictest limit. The student's own filter moves in between, class by class.

    Args:
        probs: (num_classes, I, J, K).
        uncertainty: (I, J, K), nats.
        section: The filter's settings.
    """
    trusted: NDArray[np.bool_] = probs.max(0) >= find_lowest(section.threshold, len(probs))
    if section.uncertainty.source != "none":
        trusted &= uncertainty < find_limit(section.uncertainty, len(probs), 0.0)
    return trusted


@dataclass(frozen=True)
class ClassSums:
    """Sums over the voxels of a pseudo-label, by class (num_classes,).

    ``counts`` are the voxels that it gives to a class, ``trusted`` those of them that are trusted,
    ``uncertainty`` that of theirs in nats; ``probs`` is the sum of the probs of a class over all
    voxels, ``inside`` over those that it is given to.
    """

    counts: NDArray[np.int64]
    trusted: NDArray[np.int64]
    uncertainty: NDArray[np.float64]
    probs: NDArray[np.float64]
    inside: NDArray[np.float64]


def sum_classes(slabs: Iterable[Slab], section: FilterSection) -> ClassSums:
    """Add up what is asked of a pseudo-label.

    Args:
        slabs: Its probs (num_classes, I, J, K) and its uncertainty (I, J, K) in nats, of a part of
            it each.
        section: The filter's settings.
    """
    total: list[NDArray[Any]] = []
    for probs, uncertainty in slabs:
        classes, size = probs.argmax(0).ravel(), len(probs)
        trusted = trust_voxels(probs, uncertainty, section).ravel()
        flat = probs.reshape(size, -1)
        own = np.take_along_axis(flat, classes[None], 0)[0]
        sums = [
            np.bincount(classes, minlength=size),
            np.bincount(classes[trusted], minlength=size),
            np.bincount(classes, uncertainty.ravel(), size),
            flat.sum(1, dtype=np.float64),
            np.bincount(classes, own, size),
        ]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
    return ClassSums(*total)


def measure_confidence(sums: ClassSums, usual: Collection[int]) -> float:
    """Return the Dice that a teacher expects of its own mask, in the class where it is lowest.

    Per class 2 sum p_v m_v / sum (p_v + m_v), where m is the mask of the argmax. The mean of the
    largest prob, which classifiers are filtered by, says little of a mask: it is 1 / C or more in
    every voxel, and high inside of a wrong mask.

    Args:
        sums: Of the pseudo-label.
        usual: The classes that count. If the mask has none of them, all that it has count.

    Source: Borges et al. 2024, Soft Dice Confidence. Departure: several classes, of which the
        lowest counts.
    """
    present = set((np.flatnonzero(sums.counts[1:]) + 1).tolist()) or {0}
    expected = 2 * sums.inside / np.maximum(sums.probs + sums.counts, 1e-300)
    return min(float(expected[index]) for index in present & set(usual) or present)


def review_case(
    case_id: str,
    slabs: Iterable[Slab],
    agreement: Mapping[str, float | None],
    voxel_ml: float | None,
    names: Mapping[int, str],
    expectation: Expectation,
    section: FilterSection,
) -> CaseReview:
    """Judge the pseudo-label of one case.

    Args:
        case_id: The case.
        slabs: As for `sum_classes`.
        agreement: Dice of each class with the pseudo-label of the round before, None for a class
            that neither has; empty without one.
        voxel_ml: Volume of a voxel of this grid in ml; None counts pixels.
        names: Class names by index.
        expectation: What the labeled cases lead one to expect.
        section: The filter's settings.
    """
    sums = sum_classes(slabs, section)
    counts, num_voxels = sums.counts.tolist(), int(sums.counts.sum())
    where = slice(1, None) if any(counts[1:]) else slice(None)
    usual = {i for i, share in expectation.presence.items() if share > OFTEN}
    confidence = measure_confidence(sums, usual)
    reason = _find_reason(counts, confidence, usual, expectation.has_empty, names, section)
    return CaseReview(
        case_id=case_id,
        accepted=not reason,
        reason=reason,
        confidence=confidence,
        uncertainty=float(sums.uncertainty[where].sum() / sums.counts[where].sum()),
        agreement=mean_known(agreement.values()),
        agreement_per_class=dict(agreement),
        coverage=float(sums.trusted.sum()) / num_voxels,
        coverage_per_class={
            name: float(sums.trusted[i]) / counts[i] if counts[i] else None
            for i, name in names.items()
            if i
        },
        volume_ml={
            name: float(counts[i]) * (1.0 if voxel_ml is None else voxel_ml)
            for i, name in names.items()
            if i
        },
        share={i: counts[i] / num_voxels for i in names if i},
        has_spacing=voxel_ml is not None,
    )


def _find_reason(
    counts: Sequence[int],
    confidence: float,
    usual: Collection[int],
    may_be_empty: bool,
    names: Mapping[int, str],
    section: FilterSection,
) -> str:
    """Return why a case of so many voxels of each class is not used, or nothing."""
    present = [index for index, count in enumerate(counts) if count]
    is_empty = present == [0]
    if is_empty and not may_be_empty:
        return "empty"
    if len(present) == 1 and not is_empty:
        return f"constant: all {names[present[0]]}"
    if confidence < section.case.confidence:
        return f"confidence {confidence:.2f} is below {section.case.confidence:g}"
    lost = [] if is_empty else [names[i] for i in sorted(usual) if not counts[i]]
    return f"lost {', '.join(lost)}" if lost else ""


@dataclass(frozen=True)
class Gate:
    """Whether a model may teach and be delivered, and why not."""

    passed: bool
    reasons: tuple[str, ...]


def judge_model(
    reviews: Sequence[CaseReview],
    expectation: Expectation,
    names: Mapping[int, str],
    with_student: float | None = None,
) -> Gate:
    """Judge a model by its pseudo-labels.

    It fails if most of its pseudo-labels were refused, if a class covers under a fifth (where the
    labels are of whole scans) or over five times of its labeled share and volume, if it contradicts
    the round before, or if the student that it is the average of contradicts it. Of masks that are
    empty or lost a class only so many count as refused as the labels speak against.

    Args:
        reviews: Of its pseudo-labels.
        expectation: What labeled cases lead one to expect.
        names: Class names by index.
        with_student: Mean Dice with the student whose average the model is, None if unknown.
    """
    if not reviews:
        return Gate(True, ("no unlabeled case to judge it by",))
    reasons = []
    accepted = [review for review in reviews if review.accepted]
    judged = [review for review in reviews if not review.reason.startswith(ABSENT)]
    if len(judged) < (1.0 - find_most_absent(expectation.num_cases)) * len(reviews):
        judged = list(reviews)
    if not accepted or len(accepted) < LEAST_ACCEPTED * len(judged):
        kinds = Counter(_name_kind(review.reason) for review in reviews if not review.accepted)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        reasons.append(
            f"{len(reviews) - len(accepted)} of {len(reviews)} pseudo-labels were refused "
            f"({listed}){_advise(kinds.most_common(1)[0][0])}"
        )
    reasons += _list_misfits(judged, expectation, names)
    agreement = mean_known(review.agreement for review in reviews)
    if agreement is not None and agreement < LEAST_AGREEMENT:
        reasons.append(f"mean Dice {agreement:.2f} with the pseudo-labels of the round before")
    if with_student is not None and with_student < LEAST_AGREEMENT:
        reasons.append(f"mean Dice {with_student:.2f} of student and average: it did not settle")
    return Gate(not reasons, tuple(reasons))


def find_most_absent(num_cases: float) -> float:
    """Return the share of cases that may lack a class which all of so many labeled cases have.

    With a share p of scans without it, n labels miss all of them with the chance (1 - p)^n: p is
    where that is `DOUBT`, 68 % for four labels. It is 0, and such masks are refused as others are,
    from seven labels on, where p is under half.

    Example:
        >>> [round(find_most_absent(n), 2) for n in (1, 2, 3, 4, 6, 7, math.inf)]
        [0.8, 0.8, 0.78, 0.68, 0.54, 0.0, 0.0]

    Source: the binomial bound whose approximation is the rule of three (Hanley and Lippman-Hand
        1983).
    """
    most = 1.0 - DOUBT ** (1.0 / num_cases) if num_cases else 1.0
    return min(most, MOST_ABSENT) if most > 1.0 - LEAST_ACCEPTED else 0.0


def _list_misfits(
    reviews: Sequence[CaseReview], expectation: Expectation, names: Mapping[int, str]
) -> list[str]:
    """Name the classes that fit neither the share nor the volume that they have in labels."""
    least, misfits = 0.0 if expectation.is_partial else LEAST_PRIOR, []
    for index, prior in expectation.share.items():
        share = float(np.mean([review.share[index] for review in reviews]))
        volume = float(np.mean([review.volume_ml[names[index]] for review in reviews]))
        sizes = [(share, expectation.share_range.get(index, (prior, prior)))]
        if index in expectation.volume_range:
            sizes.append((volume, expectation.volume_range[index]))
        if prior > 0 and not any(
            least * low <= size <= MOST_PRIOR * high for size, (low, high) in sizes
        ):
            misfits.append(
                f"{names[index]} covers {share:.3%} of the volumes, {prior:.3%} in labeled cases"
            )
    return misfits


def _name_kind(reason: str) -> str:
    """Return a reason without the number that is each scan's own."""
    return re.sub(r"^confidence [\d.]+ is", "with a confidence", reason)


def _advise(reason: str) -> str:
    """Return what to do about a reason, or if such scans are as they should be."""
    if reason.startswith("with a confidence"):
        return "; give it more train.steps, or label more scans"
    if reason == "empty":
        return "; if scans without any structure are to be expected, label one of them"
    if reason.startswith("lost"):
        return "; if scans without it are to be expected, label some: more than a tenth of all"
    return ""
