"""The pseudo-labels of a round: made, reviewed, and written as files that people can look at.

Axes: I J K voxel axes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from medssl import ranks
from medssl.beside import WRITE_BYTES, begin, has_room
from medssl.config import IGNORE, CaseFilterSection, FilterSection
from medssl.data.cache import CachedCase
from medssl.data.io import find_untrusted_value, write_mask
from medssl.data.pseudo_labels import (
    Classes,
    Part,
    has_pseudo_label,
    iterate_pseudo_label,
    measure_agreement,
    read_classes,
    read_stability,
    write_pseudo_label,
)
from medssl.overlays import render_overlay, show_channels
from medssl.pseudo.gates import (
    CaseReview,
    Expectation,
    Slab,
    find_islands,
    review_case,
    trust_voxels,
)
from medssl.runs import write_file, write_text
from medssl.transforms.geometry import WayBack

NUM_OVERLAYS = 4  # fixed cases, pictured after each round
LEAST_WEIGHT = 0.01  # of a case, so that none is lost for good


@dataclass(frozen=True)
class RawPseudoLabel:
    """What a teacher says of a case, before any filter.

    ``parts`` are boxes of it with their probs and uncertainty; ``measure_stability`` returns the
    mean Dice of earlier checkpoints' class maps with its own (I, J, K), or None where that is not
    measured.
    """

    parts: Iterable[Part]
    measure_stability: Callable[[Classes], float | None]


def label_cases(
    cases: Sequence[CachedCase],
    predict: Callable[[CachedCase], RawPseudoLabel],
    folder: Path,
    before: Path | None,
    teacher_hash: str,
    expectation: Expectation,
    names: Mapping[int, str],
    label_values: tuple[int, ...],
    section: FilterSection,
    should_stop: Callable[[], bool],
) -> list[CaseReview] | None:
    """Pseudo-label unlabeled cases; goes on where it was stopped.

    Of several processes each labels the cases dealt to it, and all have the reviews. A case is
    reviewed and its mask written while the next one is labeled, if there is memory.

    Writes pseudo_labels/<case_id>/, pseudo_masks/<case_id>.nii.gz (of a picture, in its format) on
    the native grid, a few overlays and review.csv into the folder.

    Args:
        cases: The unlabeled cases.
        predict: Labels a case.
        folder: The folder of the round whose model labels.
        before: pseudo_labels/ of that model's teacher, to measure agreement with; None in round 0.
        teacher_hash: Hash of the model's weights: pseudo-labels of other weights are made anew.
        expectation: What labeled cases lead one to expect.
        names: Class names by index.
        label_values: Value of each class in files.
        section: The filter's settings.
        should_stop: Asked before each case.

    Returns:
        A review of each case, or None if it was told to stop.
    """
    finish = partial(_finish_case, folder, before, expectation, names, label_values, section)
    finishing: list[Future[CaseReview]] = []  # of the last case, and beside the next one
    reviews: list[CaseReview] = []
    is_stopped = False
    for number, case in ranks.deal(list(enumerate(cases, start=1))):
        if is_stopped := should_stop():
            break
        target = folder / "pseudo_labels" / case.case_id
        if not has_pseudo_label(target, teacher_hash, (len(names), *case.shape)):
            raw = predict(case)
            single = expectation.single if section.components == "largest" else frozenset()
            write_pseudo_label(
                target,
                (len(names), *case.shape),
                raw.parts,
                teacher_hash,
                partial(find_islands, single=single),
                raw.measure_stability,
            )
        reviews += [each.result() for each in finishing]
        finishing = [begin(partial(finish, case, number <= NUM_OVERLAYS))]
        if not has_room(WRITE_BYTES * math.prod(case.native_shape)):
            wait(finishing)
        if number % 50 == 0 or number == len(cases):
            title = folder.name.replace("_", " ")
            print(f"{title}: pseudo-labels of {number} of {len(cases)} cases", flush=True)
    reviews += [each.result() for each in finishing]
    if any(ranks.pool([is_stopped])):
        return None
    reviews = _bring_together(reviews, [case.case_id for case in cases])
    if ranks.is_first():
        write_review(folder, reviews)
    return reviews


def _finish_case(
    folder: Path,
    before: Path | None,
    expectation: Expectation,
    names: Mapping[int, str],
    label_values: tuple[int, ...],
    section: FilterSection,
    case: CachedCase,
    has_overlay: bool,
) -> CaseReview:
    """Review the pseudo-label of a case, write its mask and, if asked for, an overlay."""
    target = folder / "pseudo_labels" / case.case_id
    classes = read_classes(target)
    agreement = _compare(classes, before / case.case_id, names) if before else {}
    slabs = iterate_pseudo_label(target)
    about = (case.voxel_ml, names, expectation, section)
    review = review_case(case.case_id, slabs, agreement, *about)
    _write_mask(folder, case, iterate_pseudo_label(target), label_values, section)
    if has_overlay:
        picture = render_overlay(
            show_channels(np.asarray(case.image(), np.float32), not case.has_spacing),
            classes,
            title=f"{folder.name.replace('_', ' ')}, pseudo-mask",
            spacing=case.spacing if case.has_spacing else None,
            names=names,
            is_picture=not case.has_spacing,
        )
        path = folder / "overlays" / f"{case.case_id}.png"
        write_file(path, lambda temporary: temporary.write_bytes(picture))
    return replace(review, stability=read_stability(target))


def _bring_together(reviews: Sequence[CaseReview], order: Sequence[str]) -> list[CaseReview]:
    """Return the reviews of all processes in an order of case_ids."""
    entries = {entry["case_id"]: entry for entry in ranks.pool([asdict(each) for each in reviews])}
    return [
        CaseReview(**{**entry, "share": {int(key): v for key, v in entry["share"].items()}})
        for entry in map(entries.__getitem__, order)
    ]


def _compare(classes: Classes, before: Path, names: Mapping[int, str]) -> dict[str, float | None]:
    """Return the Dice of each foreground class with an earlier pseudo-label, None for n/a."""
    earlier = read_classes(before)
    there = {*np.unique(classes).tolist(), *np.unique(earlier).tolist()}
    return {
        name: measure_agreement(classes, earlier, [index]) if index in there else None
        for index, name in names.items()
        if index
    }


def _write_mask(
    folder: Path,
    case: CachedCase,
    slabs: Iterable[Slab],
    label_values: tuple[int, ...],
    section: FilterSection,
) -> None:
    """Write the pseudo-mask of a case on its native grid; voxels that are not trusted are 255."""
    way = WayBack(case.shape, case.affine, case.native_shape, case.native_affine)
    mask = np.empty(case.native_shape, np.uint8)
    joined = (np.concatenate([probs, uncertainty[None]]) for probs, uncertainty in slabs)
    for box, native in way.stream(joined, 0, way.whole):
        trusted = trust_voxels(native[:-1], native[-1], section)
        mask[box] = np.where(trusted, native[:-1].argmax(0), IGNORE)
    path = folder / "pseudo_masks" / f"{case.case_id}{case.mask_suffix}"
    untrusted = find_untrusted_value(label_values)
    place = (mask, case.native_affine, label_values, untrusted)
    write_mask(path, *place, header=case.native_header, origin="pseudo-mask")


def write_review(folder: Path, reviews: Sequence[CaseReview]) -> None:
    """Write review.csv, the most uncertain case first: the order to look at them in."""
    rows = [r.to_row() for r in sorted(reviews, key=lambda review: -review.uncertainty)]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(short)
    write_text(folder / "review.csv", text.getvalue())


def weigh_cases(
    rows: Sequence[Mapping[str, str]], section: CaseFilterSection, names: Sequence[str]
) -> dict[str, float]:
    """Return how often patches are cut from each case, relative to the others.

    Args:
        rows: Rows of review.csv.
        section: ``draw: coverage`` weighs by the accepted share of the predicted foreground;
            ``balance`` by how much rarer a case's rarest class is than the most frequent one, as if
            cases of rare classes were repeated.
        names: Foreground classes.

    Source: Xie et al. 2020 (Noisy Student), section 3.1, for the balance of classes.
    """
    present = {name: {row["case_id"] for row in rows if has_class(row, name)} for name in names}
    most = max((len(cases) for cases in present.values()), default=0)
    weights = {}
    for row in rows:
        weight = 1.0
        if section.draw == "coverage":
            shares = [float(row[f"coverage/{n}"]) for n in names if has_class(row, n)]
            weight *= max(float(np.mean(shares)) if shares else 0.0, LEAST_WEIGHT)
        if section.balance:
            counts = [len(cases) for cases in present.values() if row["case_id"] in cases]
            weight *= most / min(counts) if counts else 1.0
        weights[row["case_id"]] = weight
    return weights


def has_class(row: Mapping[str, str], name: str) -> bool:
    """Return whether the pseudo-mask of a row of review.csv has a class."""
    size = row.get(f"volume_ml/{name}") or row[f"area_px/{name}"]
    return float(size) > 0
