"""The gate that data pass before anything is trained: one look at every scan, all faults at once.

Images of all cases are opened, labels of labeled and validation cases only. Test images are
hashed, so that a duplicate among the others is found, and searched for NaN and for the few values
of a mask, and their headers for contradictions; nothing else of them is looked at.
Legend: C channels, I J K voxel axes.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.config import IGNORE, InputError
from medssl.data.cases import (
    PARTS,
    Case,
    Dataset,
    Part,
    Splits,
    format_count,
    select_cases,
    shorten,
)
from medssl.data.io import (
    CONTRADICTIONS,
    find_contradictions,
    find_largest_value,
    read_image,
    read_label_values,
    refuse_other_grid,
)
from medssl.data.trained import hash_voxels
from medssl.formats.pictures import compare_colors
from medssl.formats.readers import get_reader, has_spacing
from medssl.formats.scan import Color
from medssl.transforms.geometry import Shape, Spacing, Volume, show_sizes
from medssl.transforms.preprocess import MOST_VOXELS, is_ct_moved

PERCENTILES = (0.5, 50.0, 99.5)

_MAX_SAMPLES = 500_000  # voxels of a channel that its percentiles are taken from
_FEW_VALUES = 16  # of an image: it is a mask, where most others have more
_MAX_CLASSES = 100  # more label values than this are an image, not a label
_FEWEST_VOLUMES = 4  # of a class, from which on one of them can be unusual
_UNUSUAL_SPREADS, _UNUSUAL_FACTOR = 5.0, 8.0  # both are passed by the volume that is named
_PLAUSIBLE_MM = (0.02, 20.0)  # spacing outside of this is a header without units or a mistake
_MOST_OFF = 10.0  # times the usual spacing: another patient, or another unit
_VISIT = re.compile(  # a word of a name: a date, or what tells the scans of one patient apart
    r"(?<=[^\W_])[-_. ]+(?:(?:19|20)\d\d[-_.]?\d\d[-_.]?\d\d"
    r"|(?:tp?|v|visit|ses|session|scan|day|week|month|year|fu|follow-?up|bl|baseline|pre|post|time|"
    r"timepoint|repeat|retest)\d{0,4})(?![^\W_])",
    re.IGNORECASE,
)
_NUM_SHOWN = 12
_NUM_THREADS = 2  # each holds one scan in memory


@dataclass(frozen=True)
class CaseFacts:
    """What is known of one case; of a test case only its hashes and problems.

    `percentiles` has one tuple per channel, at `PERCENTILES`. `num_values` counts the values of
    each channel; 17 stands for more. `volumes_ml` maps label values to volumes, None if no label
    was opened; for a picture, which has no spacing, they are areas in pixels, and `colors` are
    those of its label values. `label_origin` says which output of a model the label is
    (`pseudo-mask`), if nobody has changed it since. A blank scan has one value in each channel.
    `contradictions` are those of the headers (`find_contradictions`), also of the label.
    """

    case_id: str
    part: str
    voxel_hash: str = ""
    turned_hash: str = ""
    shape: Shape | None = None
    spacing: Spacing | None = None
    percentiles: tuple[tuple[float, ...], ...] = ()
    num_values: tuple[int, ...] = ()
    volumes_ml: dict[int, float] | None = None
    num_voxels: dict[int, int] | None = None
    has_identity_affine: bool = False
    has_rounded_label: bool = False
    label_origin: str = ""
    has_spacing: bool = True
    is_blank: bool = False
    colors: dict[int, Color] = field(default_factory=dict)
    contradictions: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class CheckResult:
    """The facts about a data set, its problems (they stop a run), warnings and notes.

    `labels` maps label values to names, 0 included: as declared, or as found in the files.
    """

    dataset: Dataset
    splits: Splits
    facts: tuple[CaseFacts, ...]
    labels: dict[int, str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def palette(self) -> dict[int, Color]:
        """The color of each label value in the pictures that were opened."""
        palette: dict[int, Color] = {}
        for entry in self.facts:
            colors = entry.colors.items()
            palette |= {v: c for v, c in colors if v not in palette or c != (v,) * 3}
        return palette

    def raise_problems(self) -> None:
        """Stop if there are problems.

        Raises:
            InputError: Naming all of them.
        """
        if self.problems:
            lines = "\n".join(f"  - {problem}" for problem in self._group_problems())
            raise InputError(f"{self.dataset.root}: {self._count_problems()}\n{lines}")

    def render(self) -> str:
        """Return the data set as a table, then warnings, problems, and the verdict."""
        lines = [*_render_parts(self), *_render_grids(self), *_render_classes(self)]
        for title, texts in (("note", self.notes), ("warning", self.warnings)):
            lines += [f"{title}: {text}" for text in texts]
        lines += [f"PROBLEM: {text}" for text in self._group_problems()]
        return "\n".join([*lines, "", self._count_problems() if self.problems else "OK"])

    def _group_problems(self) -> list[str]:
        """Say once what is wrong with several cases, and name all of them."""
        cases = {case.case_id: case for case in self.dataset.cases}
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for text in self.problems:
            case_id, _, reason = text.partition(": ")
            case = cases.get(case_id)
            for path in case.files if case else ():
                reason = reason.replace(str(path), "")
            groups[reason if case else text].append((case_id, text))
        lines = []
        for (_, first), *others in groups.values():
            names = list(dict.fromkeys(case_id for case_id, _ in others))
            lines.append(first + (f"\n    the same in {', '.join(names)}" if names else ""))
        return lines

    def _count_problems(self) -> str:
        """Return `1 problem`, `2 problems`."""
        return format_count(len(self.problems), "problem")


def check_dataset(
    dataset: Dataset,
    splits: Splits,
    ignore: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Look at every case once.

    Args:
        dataset: The cases.
        splits: The part of each case, which decides whether its label may be opened.
        ignore: Label value that means: not annotated; None takes what the data set declares.
        report: Called with (cases done, cases) after each case.

    Returns:
        The facts of all cases; problems are collected, not raised.
    """
    ignore = dataset.ignore if ignore is None else ignore
    tasks = [(case, part) for part in PARTS for case in select_cases(dataset, splits, part)]
    facts = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        channels = len(dataset.channels)
        look = pool.map(lambda task: _look(task[0], task[1], channels, ignore), tasks)
        for index, entry in enumerate(look):
            facts.append(entry)
            if report is not None:
                report(index + 1, len(tasks))
    facts = [_pass_over_image(entry, dataset.labels) for entry in facts]
    labels = _name_labels(dataset, facts, ignore)
    problems = [problem for entry in facts for problem in entry.problems]
    problems += _check_classes(facts, labels, ignore, dataset.labels is not None)
    problems += _check_values(dataset, facts, labels, ignore)
    problems += _check_masks(dataset, labels)
    problems += _check_palettes(dataset, facts)
    shared, repeated = _find_duplicates(facts)
    problems += shared + _find_split_patients(dataset, splits) + _find_huge(facts)
    warnings = repeated + _warn_of_patients(dataset) + _warn_of_names(dataset)
    if dataset.labels is None and splits.test:
        warnings.append(
            f"classes are those of the opened labels ({', '.join(map(str, labels))}); a label of "
            "the test cases with another value cannot be measured: name all by data.labels"
        )
    warnings += _warn_of_labels(facts, labels, ignore, dataset.labels is not None)
    warnings += _warn_of_volumes(dataset, facts, labels, ignore)
    problems += _refuse_origins(facts)
    warnings += [text] if (text := describe_origins(facts)) else []
    warnings += _warn_of_grids(facts) + _warn_of_ct(facts) + _warn_of_masks(dataset, facts)
    return CheckResult(
        dataset,
        splits,
        tuple(facts),
        labels,
        tuple(problems),
        (*dataset.notes, *warnings),
        tuple(_collect_notes(dataset, splits, facts)),
    )


def _name_labels(
    dataset: Dataset, facts: Iterable[CaseFacts], ignore: int | None
) -> dict[int, str]:
    """Return the declared names, or those of the values that were found."""
    if dataset.labels is not None:
        return dict(dataset.labels)
    return _name_values({value for entry in facts for value in entry.num_voxels or ()}, ignore)


def _name_values(values: Iterable[int], ignore: int | None) -> dict[int, str]:
    """Name label values by their number."""
    classes = sorted(set(values) - {0, ignore})
    return {0: "background", **{value: f"class_{value}" for value in classes}}


def _look(case: Case, part: Part, num_channels: int, ignore: int | None) -> CaseFacts:
    """Look at one case: its image, and its label if there is one to be opened."""
    try:
        volume = read_image(case.images, num_channels)
    except InputError as error:
        problems = [f"{case.case_id}: {error}"]
        if case.label is not None:
            problems += _look_at_label(case, case.label, None, ignore)[1]
        return CaseFacts(case.case_id, part, problems=tuple(problems))
    hashes = (_hash_voxels(volume.array), " ".join(hash_voxels(volume.array, volume.affine)))
    problems = []
    num_bad = [int(np.count_nonzero(~np.isfinite(channel))) for channel in volume.array]
    if any(num_bad):
        problems.append(
            f"{case.case_id}: {sum(num_bad)} of {volume.array.size} voxels are NaN or infinite in "
            f"{', '.join(str(path) for path in case.images)}; replace them by a background value"
        )
    facts = CaseFacts(
        case.case_id,
        part,
        *hashes,
        num_values=tuple(_count_values(channel) for channel in volume.array),
        is_blank=all(bool((channel == channel.flat[0]).all()) for channel in volume.array),
        contradictions=find_contradictions(volume),
        problems=tuple(problems),
    )
    if part == "test":
        return facts
    facts = replace(
        facts,
        shape=volume.shape,
        spacing=volume.spacing,
        percentiles=tuple(_measure_percentiles(channel) for channel in volume.array),
        has_identity_affine=bool(np.array_equal(volume.affine, np.eye(4))),
        has_spacing=volume.has_spacing,
    )
    if case.label is None:
        return facts
    of_label, faults = _look_at_label(case, case.label, volume, ignore)
    return replace(facts, **of_label, problems=(*problems, *faults))


def _hash_voxels(array: NDArray[np.float32]) -> str:
    """Return a hash of shape and voxels, not of the header."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _sample(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the finite ones among the voxels (n,) of a channel, of a large one evenly spaced."""
    values = channel.reshape(-1)
    values = values[:: -(-values.size // _MAX_SAMPLES)]
    return values[np.isfinite(values)]


def _count_values(channel: NDArray[np.float32]) -> int:
    """Return how many values a channel has, or `_FEW_VALUES` + 1 for more."""
    values, count = _sample(channel), 0
    while values.size and count <= _FEW_VALUES:
        values, count = values[values != values[0]], count + 1
    return count


def _measure_percentiles(channel: NDArray[np.float32]) -> tuple[float, ...]:
    """Return the percentiles of a channel, of a large one from evenly spaced voxels."""
    values = _sample(channel)
    if values.size == 0:
        return (float("nan"),) * len(PERCENTILES)
    return tuple(float(value) for value in np.percentile(values, PERCENTILES))


def _look_at_label(
    case: Case, path: Path, volume: Volume | None, ignore: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the facts that a label adds, and its faults, of its own or beside the image."""
    try:
        label = read_label_values(path, case, ignore)
    except InputError as error:
        return {}, [f"{case.case_id}: {error}"]
    problems = []
    if volume:
        grids = (label.shape, label.affine, "the image", volume.shape, volume.affine)
        try:
            refuse_other_grid(path, *grids)
        except InputError as error:
            problems.append(f"{case.case_id}: {error}")
    size = abs(float(np.linalg.det(label.affine[:3, :3])))
    voxel_ml = size / 1000 if has_spacing(path) else 1.0
    facts = {
        "volumes_ml": {value: count * voxel_ml for value, count in label.counts.items()},
        "num_voxels": label.counts,
        "has_rounded_label": label.has_rounded,
        "label_origin": label.origin,
        "colors": label.colors,
        "contradictions": find_contradictions(volume, label.header) if volume else {},
    }
    return facts, problems


def _check_classes(
    facts: Sequence[CaseFacts], labels: Mapping[int, str], ignore: int | None, declared: bool
) -> list[str]:
    """Refuse a set without a class, with too many, and an ignore value that is a class."""
    if declared and len(labels) > IGNORE:
        return [
            f"there are {len(labels)} classes with the background, from {min(labels)} to "
            f"{max(labels)}; at most {IGNORE} can be told apart: merge some in the label files and "
            "name those that are left, by data.labels or where they are declared"
        ]
    if ignore is not None and ignore in labels:
        return [
            f"data.ignore={ignore} is the value of {labels[ignore]}: voxels that nobody annotated "
            "need a value of their own"
        ]
    if len(labels) < 2 and any(entry.num_voxels is not None for entry in facts):
        return [
            "no label that may be opened has any foreground, and no class is declared: there is "
            "nothing to learn; annotate a case that has the structure, or draw others by data.draw"
        ]
    return []


def _pass_over_image(entry: CaseFacts, declared: Mapping[int, str] | None) -> CaseFacts:
    """Return a case whose label is an image with that as its problem, and no values of classes."""
    values = entry.num_voxels or {}
    if len(set(values) - set(declared or ())) <= _MAX_CLASSES:
        return entry
    problem = (
        f"{entry.case_id}: its label holds {len(values)} different values, from "
        f"{min(values)} to {max(values)}: is it an image? Give the label in its place"
    )
    return replace(
        entry, volumes_ml=None, num_voxels=None, colors={}, problems=(*entry.problems, problem)
    )


def _check_values(
    dataset: Dataset, facts: Iterable[CaseFacts], labels: Mapping[int, str], ignore: int | None
) -> list[str]:
    """Name the label values that nobody declared, with their cases."""
    where: dict[int, list[str]] = defaultdict(list)
    for entry in facts:
        for value, count in (entry.num_voxels or {}).items():
            where[value].append(f"{entry.case_id} ({count} voxels)")
    if dataset.labels is None and len(where) > _MAX_CLASSES:
        return [
            f"the labels hold {len(where)} different values, from {min(where)} to {max(where)}: "
            f"are they images? Check the paths, or name the classes (at most {IGNORE - 1} beside "
            "the background) by data.labels",
        ]
    known = set(labels) | {0, ignore}
    if dataset.labels is None:  # 255 and negative values mean something else in half of all sets
        known -= {value for value in where if (value == IGNORE or value < 0) and value != ignore}
    return [
        f"label value {value} is not declared: {', '.join(cases)}; "
        f"{_offer(value, set(where), known - {None})}"
        for value, cases in sorted(where.items())
        if value not in known
    ]


def _check_masks(dataset: Dataset, labels: Mapping[int, str]) -> list[str]:
    """Refuse label values that no mask of the scans can hold."""
    readers = {get_reader(case.images[0]) for case in dataset.cases}
    reader = min(readers, key=lambda reader: (find_largest_value(reader), reader.name))
    most = find_largest_value(reader)
    return [
        f"label value {value} ({name}) is larger than a mask of {reader.name} can hold ({most}): "
        "give the class a smaller value in the label files"
        for value, name in labels.items()
        if value > most
    ]


def _check_palettes(dataset: Dataset, facts: Iterable[CaseFacts]) -> list[str]:
    """Refuse label pictures whose values or colors mean something else in each file."""
    paths = {case.case_id: case.label for case in dataset.cases}
    return compare_colors({str(paths[entry.case_id]): entry.colors for entry in facts})


def _offer(value: int, values: set[int], known: set[int | None]) -> str:
    """Say how to declare a value."""
    if values == {0, IGNORE}:
        return "if it is the structure to segment, add data.labels.255=name"
    if value < 0:
        return f"no class is below 0: correct the files, or say data.ignore={value} (not annotated)"
    declared = ", ".join(str(number) for number in sorted(number or 0 for number in known))
    return (
        f"declared are {declared}: correct the files, or name it (data.labels.{value}=name, with "
        f"all other classes), or, if it means not annotated, data.ignore={value}"
    )


def _find_duplicates(facts: Iterable[CaseFacts]) -> tuple[list[str], list[str]]:
    """Return problems and warnings: equal scans of different parts, and of one part."""
    groups: dict[str, list[CaseFacts]] = defaultdict(list)
    for entry in facts:
        for digest in {entry.voxel_hash, entry.turned_hash} - {""}:
            if not entry.is_blank:  # blank scans are equal without being copies
                groups[digest].append(entry)
    problems, warnings = [], []
    for group in {
        tuple(entry.case_id for entry in same): same for same in groups.values()
    }.values():
        names = ", ".join(f"{entry.case_id} ({entry.part})" for entry in group)
        if len({entry.part for entry in group}) > 1:
            problems.append(
                f"the same scan, voxel by voxel, is in different parts: {names}; keep one of them"
            )
        elif len(group) > 1:
            warnings.append(f"the same scan, voxel by voxel, is there {len(group)} times: {names}")
    return problems, warnings


def _find_split_patients(dataset: Dataset, splits: Splits) -> list[str]:
    """Name patients of whom scans stand on two sides: training, validation, test."""
    sides: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for part in PARTS:
        side = "training" if part in ("labeled", "unlabeled") else part
        for case in select_cases(dataset, splits, part):
            sides[case.patient_id][side].append(f"{case.case_id} ({part})")
    return [
        f"patient {patient} stands on two sides: "
        f"{', '.join(name for names in by_side.values() for name in names)}; give all scans of a "
        "patient one side in the split column, or correct patient_id"
        for patient, by_side in sorted(sides.items())
        if len(by_side) > 1
    ]


def _warn_of_patients(dataset: Dataset) -> list[str]:
    """Warn of patients that may be one by their names: P07 and p7, P01_pre and P01_post.

    Where a list or a name says who the patient is, the beginning of an id counts only if it is
    another patient's.
    """
    unsaid = {case.patient_id for case in dataset.cases if case.patient_id == case.case_id}
    patients = sorted({case.patient_id for case in dataset.cases})
    folded = {patient: _fold_patient(patient) for patient in patients}
    known = set(folded.values())
    groups: dict[str, list[str]] = defaultdict(list)
    for patient in patients:
        heads = {_fold_patient(head) for head in _list_heads(patient)} - {folded[patient]}
        for key in (folded[patient], *heads):
            if patient in unsaid or key in known:
                groups[key].append(patient)
    alike = {
        tuple(names): None
        for key, names in groups.items()
        if len(names) > 1 and (key in known or len(names) < len(patients))
    }
    if not alike:
        return []
    first, *others = alike
    return [
        f"scans of one patient by their names? {_shorten(first)} and {len(others)} more such "
        "groups count as different patients, so that one may be trained on and another test; if "
        "they are of one patient, give them one patient_id in a list"
    ]


def _fold_patient(name: str) -> str:
    """Return a name for comparison: in one case, without separators and leading zeros."""
    words = re.findall(r"\d+|[^\W\d_]+", unicodedata.normalize("NFC", name).casefold())
    return " ".join(word.lstrip("0") or "0" if word.isdecimal() else word for word in words) or name


def _list_heads(name: str) -> list[str]:
    """Return the beginnings of a name that may be a patient: up to the last number, or a visit."""
    last = re.match(r"(.*\d)[-_. ]+.+$", name)
    ends = [match.start() for match in _VISIT.finditer(name)]
    heads = [last[1] if last else "", *(name[:end] for end in ends)]
    return [head for head in heads if re.search(r"\d", head)]


def _warn_of_names(dataset: Dataset) -> list[str]:
    """Warn of case_ids that other disks do not tell apart, or do not take at all."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case in dataset.cases:
        groups[unicodedata.normalize("NFC", case.case_id).casefold()].append(case.case_id)
    alike = [" and ".join(names) for names in groups.values() if len(names) > 1]
    devices = r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[. ]|.*[<>\"|?*].*"
    reserved = [case.case_id for case in dataset.cases if re.fullmatch(devices, case.case_id)]
    texts = (
        ("case_ids that only upper and lower case tell apart, which the disks of macOS and "
         "Windows do not: rename one before the data or the run go there", alike),
        ("case_ids that cannot name a file under Windows: rename them if data or run go there",
         reserved),
    )  # fmt: skip
    return [f"{text}: {_shorten(names)}" for text, names in texts if names]


def _warn_of_volumes(
    dataset: Dataset, facts: Sequence[CaseFacts], labels: Mapping[int, str], ignore: int | None
) -> list[str]:
    """Warn of a class whose volume in one label is far from that in the others.

    It is far if it differs by a factor above `_UNUSUAL_FACTOR` and, in its logarithm, by more than
    `_UNUSUAL_SPREADS` standard deviations. These are estimated by the median absolute deviation, so
    one wild label does not hide itself, and lesions of all sizes are not unusual.
    """
    warnings = []
    paths = {case.case_id: case.label for case in dataset.cases}
    unit = "ml" if all(entry.has_spacing for entry in facts) else "px"
    for value, name in labels.items():
        volumes = {entry.case_id: (entry.volumes_ml or {}).get(value, 0) for entry in facts}
        volumes = {case_id: volume for case_id, volume in volumes.items() if volume > 0}
        if value in (0, ignore) or len(volumes) < _FEWEST_VOLUMES:
            continue
        logs = np.log(list(volumes.values()))
        distance = np.abs(logs - np.median(logs))
        limit = max(_UNUSUAL_SPREADS * 1.4826 * np.median(distance), np.log(_UNUSUAL_FACTOR))
        middle = float(np.exp(np.median(logs)))
        odd = [
            f"{case_id} ({_show(volumes[case_id])} {unit}, {_show(volumes[case_id] / middle)} "
            f"times that, {paths[case_id]})"
            for case_id, far in zip(volumes, distance > limit, strict=True)
            if far
        ]
        if odd:
            warnings.append(
                f"unusual volume of {name} ({value}), in most labels about {_show(middle)} {unit}: "
                f"{_shorten(odd)}; look at the mask and the spacing, and mend or remove the label "
                "if no person drew it so"
            )
    return warnings


def _warn_of_labels(
    facts: Iterable[CaseFacts], labels: Mapping[int, str], ignore: int | None, declared: bool
) -> list[str]:
    """Warn of labels without foreground, of classes without voxels, and of stray values."""
    opened = [entry for entry in facts if entry.num_voxels is not None]
    empty = [entry.case_id for entry in opened if not set(entry.num_voxels or ()) - {0, ignore}]
    warnings = [f"labels without any foreground: {_shorten(empty)}"] if empty else []
    counts = Counter(value for entry in opened for value in entry.num_voxels or ())
    rare = [
        f"{value} in {counts[value]} of {len(opened)} labels"
        for value in sorted(set(counts) - {0, ignore})
        if not declared and len(opened) > 2 and counts[value] == 1
    ]
    if rare:
        warnings.append(
            f"label values that hardly any label has: {', '.join(rare)}; every value found is a "
            "class: name the classes that are meant, as data.labels.1=liver, if this is a slip"
        )
    groups = {} if declared else _group_values(opened, ignore)
    if len(groups) > 1 and min(groups.values()) > 1:
        listed = " or ".join(
            f"{', '.join(map(str, sorted(values)))} ({count} labels)"
            for values, count in groups.items()
        )
        warnings.append(
            f"labels hold either the values {listed}, never those of both: if they are the same "
            "structures under other values, as from another site, give them one value"
        )
    lost = [f"{name} ({value})" for value, name in labels.items() if value and value not in counts]
    if lost and opened:
        warnings.append(
            f"declared, but in none of the {len(opened)} labels opened: {', '.join(lost)}; such a "
            "class cannot be learned"
        )
    return warnings


def _group_values(facts: Iterable[CaseFacts], ignore: int | None) -> dict[frozenset[int], int]:
    """Return the values that stand in labels together, directly or by others, and of how many."""
    groups: dict[frozenset[int], int] = {}
    for entry in facts:
        values, count = frozenset(entry.num_voxels or ()) - {0, ignore}, 1
        for group in [group for group in groups if group & values]:
            values, count = values | group, count + groups.pop(group)
        if values:
            groups[values] = count
    return groups


def describe_origins(facts: Iterable[CaseFacts], with_names: bool = True) -> str:
    """Say how many labels a model made and nobody has changed, and which; empty if none."""
    opened = [entry for entry in facts if entry.num_voxels is not None]
    made = [entry.case_id for entry in opened if entry.label_origin]
    if not made:
        return ""
    names = f": {_shorten(made)}" if with_names else ""
    return (
        f"{len(made)} of {len(opened)} labels were made by a model of medssl and nobody has "
        f"changed a voxel{names}; correct them, or its mistakes are taught again"
    )


def _refuse_origins(facts: Iterable[CaseFacts]) -> list[str]:
    """Refuse validation labels that a model made."""
    return [
        f"{entry.case_id}: its label, which shall validate, is a {entry.label_origin} of a model, "
        "as it was made: give a person's label, or take the case out of val"
        for entry in facts
        if entry.part == "val" and entry.label_origin
    ]


def _find_huge(facts: Iterable[CaseFacts]) -> list[str]:
    """Name scans that are too large to be brought to the spacing that most scans have."""
    scans = [entry for entry in facts if entry.shape and entry.spacing and entry.has_spacing]
    counts = {entry.case_id: math.prod(entry.shape or ()) for entry in scans}
    sizes = {entry.case_id: math.prod(entry.spacing or ()) for entry in scans}
    usual = float(np.median(list(sizes.values()))) if sizes else 1.0
    return [
        f"{entry.case_id}: {show_sizes(entry.shape or ())} voxels of "
        f"{show_sizes(entry.spacing or ())} mm become {_show(counts[entry.case_id] * size)} of "
        "the size that most scans have: repair the voxel size in the header, or leave the scan out"
        for entry in scans
        if (size := sizes[entry.case_id] / usual) * counts[entry.case_id]
        > max(MOST_VOXELS, counts[entry.case_id])
    ]


def _warn_of_grids(facts: Sequence[CaseFacts]) -> list[str]:
    """Warn of missing or contradictory geometry, odd spacing and constant images."""
    opened = [entry for entry in facts if entry.spacing is not None]
    scans = [entry for entry in opened if entry.has_spacing]
    identity = [entry.case_id for entry in scans if entry.has_identity_affine]
    low, high = _PLAUSIBLE_MM
    implausible = [
        entry for entry in scans if not all(low <= size <= high for size in entry.spacing or ())
    ]
    unusual = [entry for entry in _find_unusual(scans) if entry not in implausible]
    flat = [
        entry.case_id
        for entry in opened
        if any(channel[0] == channel[-1] for channel in entry.percentiles)
    ] + [entry.case_id for entry in facts if entry.is_blank and entry.part == "test"]
    texts = (
        ("the header places no voxels (identity affine), 1 mm is assumed", identity),
        *((text, _list(facts, kind)) for kind, text in CONTRADICTIONS.items() if kind != "unit"),
        (f"spacing outside of {low:g} to {high:g} mm: is the unit right?", _size(implausible)),
        (f"spacing off that of most scans by over {_MOST_OFF:g} times", _size(unusual)),
        ("images of a single value (99 % of the voxels at least)", flat),
    )
    return [f"{text}: {_shorten(names)}" for text, names in texts if names]


def _warn_of_masks(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[str]:
    """Warn of images with as few values as a mask has, where most of their channel have more."""
    warnings = []
    images = {case.case_id: case.images for case in dataset.cases}
    for channel in range(len(dataset.channels)):
        counts = {entry.case_id: entry.num_values[channel] for entry in facts if entry.num_values}
        few = {case_id: count for case_id, count in counts.items() if count <= _FEW_VALUES}
        names = [
            f"{case_id} ({count} values, {images[case_id][min(channel, len(images[case_id]) - 1)]})"
            for case_id, count in few.items()
            if count > 1
        ]
        if names and 2 * len(few) <= len(counts):
            warnings.append(
                f"images of at most {_FEW_VALUES} different values, as masks have: "
                f"{_shorten(names)}; if they are masks, put the scans in their place"
            )
    return list(dict.fromkeys(warnings))  # of the colors of a picture the same


def _warn_of_ct(facts: Sequence[CaseFacts]) -> list[str]:
    """Warn of scans of a CT set, three or more, whose values are about 1000 off those of most."""
    warnings = []
    scans = [entry for entry in facts if entry.percentiles and not entry.is_blank]
    for channel in range(min((len(entry.percentiles) for entry in scans), default=0)):
        ranges = {
            entry.case_id: (entry.percentiles[channel][0], entry.percentiles[channel][-1])
            for entry in scans
        }
        usual = sorted(ranges.values())[(len(ranges) - 1) // 2]
        moved = [
            f"{case_id} ({_show(bottom)} to {_show(top)})"
            for case_id, (bottom, top) in ranges.items()
            if len(ranges) > 2 and is_ct_moved((bottom, top), usual)
        ]
        if moved:
            warnings.append(
                f"values about 1000 off those of most scans ({_show(usual[0])} to "
                f"{_show(usual[1])}), as where CT is not in Hounsfield units: {_shorten(moved)}; "
                "convert these anew with their intercept (-1024 or -1000)"
            )
    return warnings


def _list(facts: Iterable[CaseFacts], kind: str) -> list[str]:
    """Return the cases whose headers contradict themselves in one way, and how."""
    texts = [(entry.case_id, entry.contradictions.get(kind)) for entry in facts]
    return [f"{name} ({text})" if text else name for name, text in texts if text is not None]


def _size(facts: Iterable[CaseFacts]) -> list[str]:
    """Return cases with their spacing."""
    return [f"{entry.case_id} ({show_sizes(entry.spacing or ())})" for entry in facts]


def _find_unusual(facts: Sequence[CaseFacts]) -> list[CaseFacts]:
    """Return the scans whose spacing, from fine to coarse, is far from that of most others."""
    spacings = np.array([sorted(entry.spacing or ()) for entry in facts])
    if len(facts) < 3:
        return []
    ratios = np.abs(np.log(spacings / np.median(spacings, axis=0))).max(1)
    return [entry for entry, off in zip(facts, ratios, strict=True) if off > np.log(_MOST_OFF)]


def _collect_notes(dataset: Dataset, splits: Splits, facts: Sequence[CaseFacts]) -> list[str]:
    """Note what was done silently: rounded labels, cases that are in no part; and a way out."""
    rounded = [entry.case_id for entry in facts if entry.has_rounded_label]
    notes = [f"almost-integer label values were rounded: {_shorten(rounded)}"] if rounded else []
    other_units = _list(facts, "unit")
    if other_units:
        notes.append(f"{CONTRADICTIONS['unit']}: {_shorten(other_units)}")
    used = {case_id for part in PARTS for case_id in getattr(splits, part)}
    unused = [case.case_id for case in dataset.cases if case.case_id not in used]
    if unused:
        notes.append(
            f"left out, as other scans of their patients validate or test: {_shorten(unused)}"
        )
    if facts and dataset.channels == ("",) and not any(entry.voxel_hash for entry in facts):
        notes.append(
            "no scan could be read; if each file holds several channels, name them in a "
            'cases.json: {"channels": ["T1", "T2"], "cases": [{"case_id": ..., "image": ...}]}'
        )
    return notes


def _shorten(names: Sequence[str]) -> str:
    """Join names, and count those beyond the first twelve."""
    count = f"{len(names)} cases: " if len(names) > _NUM_SHOWN else ""
    return count + shorten(names, _NUM_SHOWN)


def _render_parts(result: CheckResult) -> list[str]:
    """Return the head of the table: name, layout, channels, cases of each part."""
    dataset = result.dataset
    names = ", ".join(name or f"channel {i}" for i, name in enumerate(dataset.channels))
    counts = Counter(entry.part for entry in result.facts)
    hidden = set(result.splits.unlabeled)
    simulated = sum(case.case_id in hidden and case.label is not None for case in dataset.cases)
    remarks = {
        "labeled": "(labels opened)",
        "unlabeled": f"({simulated} of them have a label that stays closed)" if simulated else "",
        "val": "(validation; their labels count as labels)",
        "test": "(locked: images searched for duplicates and NaN, labels not opened)",
    }
    patients = len({case.patient_id for case in dataset.cases})
    extent = f"{len(dataset.cases)} cases of {patients} patients"
    lines = [f"{dataset.name}: {extent}, {dataset.format} layout, {names}", ""]
    lines += [f"  {p:<12}{counts[p]:>6}  {remarks[p] if counts[p] else ''}".rstrip() for p in PARTS]
    return [*lines, ""]


def _render_grids(result: CheckResult) -> list[str]:
    """Return spacing, shape and intensity over all cases but those of test."""
    facts = [entry for entry in result.facts if entry.shape and entry.spacing]
    if not facts:
        return []
    rows: list[tuple[str, Sequence[float]]] = []
    names = ["shape I, voxels", "shape J, voxels", "shape K, voxels"]
    if not facts[0].has_spacing:
        names = ["rows (I), pixels", "columns (J), pixels", "pages (K)"]
    else:
        for axis, name in enumerate("IJK"):
            sizes = [(entry.spacing or (0, 0, 0))[axis] for entry in facts]
            rows.append((f"spacing {name}, mm", sizes))
    for axis, name in enumerate(names):
        rows.append((name, [(entry.shape or (0, 0, 0))[axis] for entry in facts]))
    for channel, name in enumerate(result.dataset.channels):
        for index, percent in enumerate(PERCENTILES):
            title = f"{name or f'channel {channel}'}, {percent:g} % of voxels below"
            rows.append((title, [entry.percentiles[channel][index] for entry in facts]))
    title = _render_row(f"over {len(facts)} cases", ("min", "median", "max"))
    return [title, *(_render_row(name, _summarize(values)) for name, values in rows), ""]


def _render_classes(result: CheckResult) -> list[str]:
    """Return one line per foreground class: in how many labels it is, and its volumes."""
    opened = [entry.volumes_ml for entry in result.facts if entry.volumes_ml is not None]
    if not opened:
        return []
    unit = "ml" if all(entry.has_spacing for entry in result.facts) else "px"
    columns = ("value", "labels", f"min {unit}", f"median {unit}", f"max {unit}")
    lines = [_render_row(f"in the {format_count(len(opened), 'label')} opened", columns)]
    for value, name in result.labels.items():
        volumes = [by_value[value] for by_value in opened if value in by_value]
        if value:
            lines.append(_render_row(name, [value, len(volumes), *_summarize(volumes)]))
    return [*lines, ""]


def _render_row(name: str, cells: Iterable[object]) -> str:
    """Return a line of a table."""
    return f"  {name:<34}" + "".join(f"{cell!s:>11}" for cell in cells)


def _summarize(values: Sequence[float]) -> list[str]:
    """Return min, median and max; nothing of no value."""
    numbers = (min(values), float(np.median(values)), max(values)) if values else ()
    return [_show(number) for number in numbers]


def _show(value: float) -> str:
    """Return a number with four digits, without an exponent where people expect none."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
