"""What a case is, which part of a data set each belongs to, and who may open which label.

The layouts give a `Dataset`, `split_cases` deals the cases out, and `select_cases` hands out a part
of them: the labels of unlabeled and test cases are not there to be opened.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medssl.config import DataSection, InputError

Part = Literal["labeled", "unlabeled", "val", "test"]
PARTS: tuple[Part, ...] = ("labeled", "unlabeled", "val", "test")
Validation = Literal["auto", "fifth"] | int
FEWEST_SCANS = 16  # labeled, below which all of them train
FEWEST_PATIENTS = 6


@dataclass(frozen=True)
class Case:
    """One scan: one file per channel (or one 4D file), and perhaps its label.

    `split` is what a list says of the case: labeled, unlabeled, val, test, or nothing. `segments`
    are the names in its label file with the label values that they have here, where the kind of
    file has names (DICOM, segmentations of 3D Slicer).
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    patient_id: str
    split: str = ""
    segments: tuple[tuple[str, int], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The images and, if there is one, the label."""
        return self.images if self.label is None else (*self.images, self.label)

    def without_label(self) -> "Case":
        """Return the case with no way to its label."""
        return replace(self, label=None)


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder or list, sorted by case_id, and what is declared about them.

    `labels` maps a label's value to its name, 0 included; None: nothing is declared. `channels`
    are names of modalities, empty where unknown. `ignore` is the value of voxels that nobody
    annotated. `notes` are remarks of the reader for the user.
    """

    name: str
    root: Path
    format: str
    cases: tuple[Case, ...]
    labels: dict[int, str] | None
    channels: tuple[str, ...]
    ignore: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """The case_ids of each part; scans that fit on no side (see `split_cases`) are in none."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def to_json(self) -> dict[str, list[str]]:
        """Return the parts as plain lists."""
        return {part: list(getattr(self, part)) for part in PARTS}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Splits":
        """Read the parts back from what `to_json` returned; other keys are left alone."""
        return cls(**{part: tuple(content[part]) for part in PARTS})


def split_cases(dataset: Dataset, data: DataSection, validation: Validation) -> Splits:
    """Assign cases to the labeled, unlabeled, validation and test parts.

    The split column of a list is followed. Of the other cases, those without a label are
    unlabeled. The rest is drawn: `data.test` test cases and the validation cases by
    `data.split_seed`, then `data.labeled` minus the validation cases by `data.split_seed` and
    `data.draw`. What is left becomes unlabeled (simulated: `select_cases` strips its labels), or,
    with `data.unlabeled`, as many of it, drawn by the same seeds; the others are in no part.

    Validation `auto` takes no case if a list names the labeled ones, or if there are fewer than
    16 labeled scans or 6 patients: so few labels are worth more in training (holding back one of
    three ACDC patients cost 0.14 Dice). Otherwise it takes a fifth of the labeled cases, at least
    2; `data.labeled` includes them. `fifth` does so from 5 labeled scans on.

    A draw takes whole patients, as many as fit. Other scans of a test or validation patient are
    left out of all parts. Patients are ordered by a hash of seed and patient, so a draw depends on
    the seeds alone, not on the order of files.

    Args:
        dataset: The cases.
        data: The data section of the configuration.
        validation: Number of validation cases, `auto` or `fifth`.

    Raises:
        InputError: There are fewer labeled cases than asked for, or list and settings disagree.
    """
    by_part = {part: [c for c in dataset.cases if c.split == part] for part in PARTS}
    held_out = _patients(by_part["val"] + by_part["test"])
    trained = _patients(by_part["labeled"] + by_part["unlabeled"])
    free = [c for c in dataset.cases if not c.split and c.patient_id not in held_out]
    _check_listed(by_part, data.test, validation)

    num_test = 0 if by_part["test"] else data.test
    candidates = [c for c in free if c.label and c.patient_id not in trained]
    drawn_test = _draw(candidates, num_test, ("test", data.split_seed))
    rest = _drop(by_part["labeled"] + by_part["unlabeled"] + free, _patients(drawn_test))
    pool = [c for c in rest if c.label and c.split != "unlabeled"]
    num_labeled = len(pool) if data.labeled == "all" else data.labeled
    _check_counts(dataset, data, len(candidates) - num_test, len(pool) - num_labeled)

    few = _draw(pool, num_labeled, ("labeled", data.split_seed, data.draw))
    num_val = _count_val(by_part, num_labeled, len(_patients(few)), validation)
    drawn_val = _draw(pool, num_val, ("val", data.split_seed))
    rest = _drop(rest, _patients(drawn_val))
    pool = _drop(pool, _patients(drawn_val))
    num_left = num_labeled - len(drawn_val)
    labeled = _draw(pool, num_left, ("labeled", data.split_seed, data.draw))
    if not labeled:
        raise InputError(
            f"{dataset.root}: no labeled case is left for training: all belong to patients of "
            f"test ({len(drawn_test)} cases) or validation ({len(drawn_val)}); lower data.test or "
            "validation"
        )
    used = {case.case_id for case in labeled}
    unlabeled = [case for case in rest if case.case_id not in used]
    if data.unlabeled != "all":
        if data.unlabeled > len(unlabeled):
            raise InputError(
                f"{dataset.root}: data.unlabeled={data.unlabeled} asks for more than the "
                f"{len(unlabeled)} unlabeled cases; lower it, or leave it out and all are used"
            )
        seed = ("unlabeled", data.split_seed, data.draw)
        unlabeled = _draw(unlabeled, data.unlabeled, seed)
    parts = (labeled, unlabeled, by_part["val"] + drawn_val, by_part["test"] + drawn_test)
    return Splits(*(tuple(sorted(case.case_id for case in part)) for part in parts))


def _patients(cases: Iterable[Case]) -> set[str]:
    """Return the patients of cases."""
    return {case.patient_id for case in cases}


def _drop(cases: Iterable[Case], patients: set[str]) -> list[Case]:
    """Return the cases of other patients."""
    return [case for case in cases if case.patient_id not in patients]


def _draw(cases: Sequence[Case], number: int, seed: tuple[object, ...]) -> list[Case]:
    """Draw whole patients, as many as fit into a number of cases; at least one patient."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.patient_id].append(case)

    def rank(patient_id: str) -> str:
        return hashlib.sha256(repr((*seed, patient_id)).encode()).hexdigest()

    order = sorted(groups, key=rank)
    drawn: list[Case] = []
    for patient_id in order:
        if len(drawn) + len(groups[patient_id]) <= number:
            drawn += groups[patient_id]
    return groups[order[0]] if not drawn and order and number > 0 else drawn


def _check_listed(
    by_part: Mapping[Part, Sequence[Case]], num_test: int, validation: Validation
) -> None:
    """Refuse a list that names test or validation cases while the settings ask for others."""
    problems = []
    asked = {"test": ("data.test", num_test), "val": ("validation", validation)}
    parts: tuple[Part, ...] = ("test", "val")
    for part in parts:
        key, number = asked[part]
        if by_part[part] and number not in ("auto", "fifth", 0, len(by_part[part])):
            problems.append(
                f"the list names {len(by_part[part])} {part} cases, but {key}={number} asks for "
                "others: leave one of the two out"
            )
    raise_all(problems, "split")


def _check_counts(dataset: Dataset, data: DataSection, test_over: int, labeled_over: int) -> None:
    """Refuse draws that are larger than what is there, given what they leave over."""
    total = sum(case.label is not None for case in dataset.cases)
    if total == 0:
        raise InputError(
            f"{dataset.root}: none of {len(dataset.cases)} cases has a label; annotate some, or "
            "check where the masks lie and how they are named"
        )
    if test_over < 0 or labeled_over < 0:
        raise InputError(
            f"{dataset.root}: data.test={data.test} and data.labeled={data.labeled} together ask "
            f"for {-min(test_over, 0) - min(labeled_over, 0)} more than the {total} labeled cases; "
            "lower one of them"
        )


def _count_val(
    by_part: Mapping[Part, Sequence[Case]],
    num_labeled: int,
    num_patients: int,
    validation: Validation,
) -> int:
    """Return how many of the labeled cases validate."""
    if by_part["val"]:
        return 0
    if isinstance(validation, int):
        if validation >= num_labeled:
            raise InputError(
                f"validation={validation}: leaves no case for training, since validation cases "
                f"are taken out of the {num_labeled} labeled ones"
            )
        return validation
    few = num_labeled < FEWEST_SCANS or num_patients < FEWEST_PATIENTS
    if by_part["labeled"] or num_labeled < 5 or (few and validation == "auto"):
        return 0
    return max(2, round(0.2 * num_labeled))


def select_cases(dataset: Dataset, splits: Splits, part: Part) -> tuple[Case, ...]:
    """Return the cases of a part; unlabeled and test cases have no way to their label.

    Raises:
        InputError: The splits name cases that the data set does not hold.
    """
    cases = _find_cases(dataset, getattr(splits, part))
    return cases if part in ("labeled", "val") else tuple(case.without_label() for case in cases)


def select_test_with_labels(dataset: Dataset, splits: Splits) -> tuple[Case, ...]:
    """Return the test cases with their labels: for `evaluate` alone.

    Raises:
        InputError: The splits name cases that the data set does not hold.
    """
    return _find_cases(dataset, splits.test)


def _find_cases(dataset: Dataset, case_ids: Sequence[str]) -> tuple[Case, ...]:
    """Return cases by id, in the given order."""
    known = {case.case_id: case for case in dataset.cases}
    missing = [case_id for case_id in case_ids if case_id not in known]
    raise_all(
        [f"{case_id}: is in the splits, but not here" for case_id in missing], str(dataset.root)
    )
    return tuple(known[case_id] for case_id in case_ids)


def raise_all(problems: Sequence[str], place: str) -> None:
    """Raise one error that names all problems of a place.

    Raises:
        InputError: There is a problem.
    """
    if problems:
        count = format_count(len(problems), "problem")
        lines = [f"{place}: {count}", *(f"  {text}" for text in problems)]
        raise InputError(escape_text("\n".join(lines)))


def shorten(names: Iterable[str], most: int = 5) -> str:
    """Return names with commas between them, and how many there are beyond the first few."""
    texts = list(names)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def format_count(number: int, noun: str) -> str:
    """Return "1 scan", "2 scans" or "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def escape_text(text: str) -> str:
    """Return a text that can be printed: what is not UTF-8 in a file name is written out."""
    return text.encode("utf-8", "backslashreplace").decode()
