"""From a folder or list to cases: the layouts that are read as they are.

Medical Segmentation Decathlon and nnU-Net v2 folders, `images/ labels/ [unlabeled/]`, and lists
of cases (CSV or JSON). Only names and lists are read here: no scan is opened.
"""

import contextlib
import csv
import difflib
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medssl.config import InputError, hide_password, is_url
from medssl.data.cases import PARTS, Case, Dataset, escape_text, raise_all, shorten
from medssl.data.files import (
    describe_unknown,
    find_scan,
    find_unread,
    guess_patient,
    is_mask,
    is_scan,
    list_scans,
    name_patients,
    note_crossed_labels,
    note_masks,
    relate,
    walk_files,
    walk_scans,
)
from medssl.formats.readers import (
    DICOM,
    KINDS,
    NIFTI,
    PLACEHOLDER,
    explain_kind,
    find_reader,
    has_spacing,
    name_scan,
    split_series,
    strip_suffix,
)

_BACKGROUND = ("background", "bg", "no label", "unlabeled", "unlabelled", "clear label", "void")
"""Names of the background, and of nothing else."""
_NOTHING = re.compile(
    rf"(no|non|not|none|nothing)\b.*|\d*|{'|'.join(_BACKGROUND)}|back ground|unknown|exterior|"
    "outside|empty|air|others?|rest|normal|healthy"
)
"""Names that 0 may have as the background."""
_COLORS = ("red", "green", "blue")
_MOST_OPENED = 25  # pictures whose headers tell the kind of all
_MAX_HINTS = 20  # missing files, or images, for which a near name is looked for
_MAX_ID_BYTES = 200  # of 255 that a file name may have, with `_uncertainty.nii.gz` and a prefix
_LISTS = ("cases.csv", "cases.json")


def read_dataset(
    root: Path | str,
    format: str = "auto",
    labels: Mapping[int, str] | None = None,
    *,
    opens_files: bool = True,
) -> Dataset:
    """Read which cases a folder or list holds.

    Args:
        root: A folder, a CSV or JSON list, or a dataset.json.
        format: `decathlon`, `nnunet`, `folders`, `list`, or `auto`.
        labels: Names of label values that replace what the data set declares.
        opens_files: Whether what only the files say is read: names of segments, and the modality
            and the patients of DICOM. Without, no label of the cases may be opened, and a
            patient_id may be empty.

    Raises:
        InputError: Nothing is there, the layout is unknown (the message shows the tree as it
            was understood and names a draft list to edit), or cases are wrong: all of them.
    """
    if is_url(root):
        raise InputError(
            f"{hide_password(str(root))}: a URL, which check, train, predict and evaluate copy "
            "from: give the folder of such a copy"
        )
    root = Path(root)
    if not os.path.exists(root):
        raise InputError(f"{root}: no such file or folder{_suggest_path(root)}")
    format, source = _detect_format(root) if format == "auto" else (format, _locate(root, format))
    dataset = _READERS[format](source)
    _check_cases(dataset, source)
    if labels is not None:
        dataset = replace(dataset, labels=_with_background(labels))
    images = [case.images[0] for case in dataset.cases]
    masks = note_masks(images, [case.images[0] for case in dataset.cases if case.label is None])
    shared = _find_shared_files(dataset.cases)[1]
    notes = (*dataset.notes, *_find_left_out(dataset), *masks, *shared)
    notes = (*notes, *note_crossed_labels(dataset.cases), *_note_background(dataset.labels or {}))
    if opens_files:
        dataset = _name_modality(_name_segments(dataset))
        cases, unclear = name_patients(dataset.cases)
        dataset, notes = replace(dataset, cases=tuple(cases)), (*notes, *unclear)
    cases = sorted(dataset.cases, key=lambda case: case.case_id)
    return replace(dataset, cases=tuple(cases), notes=notes)


def _note_background(labels: Mapping[int, str]) -> list[str]:
    """Name a background that is not 0, and a 0 that is called as if it were none."""
    notes = [
        f"the label value {value} is called {name} and is learned as a class, as 0 alone is the "
        "background: change the values in the files, or give it another name"
        for value, name in labels.items()
        if value and fold_name(name) in _BACKGROUND
    ]
    if not _NOTHING.fullmatch(fold_name(labels.get(0, "background"))):
        notes.append(
            f"the label value 0 is called {labels[0]} and is the background, which is not learned: "
            "if it is a structure, give it another value in the files"
        )
    return notes


def _name_modality(dataset: Dataset) -> Dataset:
    """Name the one channel of a data set of DICOM series by their modality, if nobody has."""
    images = [case.images[0] for case in dataset.cases]
    if any(dataset.channels) or len(dataset.channels) != 1 or find_reader(images[0]) is not DICOM:
        return dataset
    from medssl.formats.dicom import read_modality  # heavy: only where there is DICOM

    modalities = set()
    for path in images[:: -(-len(images) // _MOST_OPENED)]:
        if find_reader(path) is not DICOM:
            return dataset
        with contextlib.suppress(InputError):  # it is named when it is read
            modalities.add(read_modality(path))
    return dataset if len(modalities) != 1 else replace(dataset, channels=(modalities.pop(),))


def _name_segments(dataset: Dataset) -> Dataset:
    """Give every case the label values of the names in its label file, where files have names.

    Declared labels decide the value of a name. Without them names keep their numbers if all files
    agree on these, else they are numbered in alphabetical order; a label without names, which has
    nothing but numbers, is then refused.
    """
    names: dict[str, dict[int, str]] = {}
    problems = []
    for case in dataset.cases:
        reader = find_reader(case.label) if case.label else None
        if case.label and reader and reader.has_names:
            try:
                names[case.case_id] = reader.format.read_names(case.label)
            except InputError as error:
                problems.append(f"{case.case_id}: {error}")
    raise_all(problems, str(dataset.root))
    if not any(names.values()):
        return dataset
    values = _number_names(list(names.values()), dataset.labels)
    for case_id, named in {"data.labels": dataset.labels or {}, **names}.items():
        counts = Counter(map(fold_name, named.values()))
        alike = sorted(name for name in named.values() if counts[fold_name(name)] > 1)
        if alike:
            problems.append(f"{case_id}: the names {alike} count as one: give each another")
    for case_id, named in names.items():
        if named and not any(fold_name(name) in values for name in named.values()):
            problems.append(
                f"{case_id}: its label holds {sorted(named.values())}, of which none is declared "
                f"({sorted(values)}): name them by data.labels"
            )
    problems += _refuse_unnamed(dataset, names, values)
    raise_all(problems, str(dataset.root))
    cases = tuple(
        replace(
            case,
            segments=tuple(
                (name, values[fold_name(name)])
                for name in names.get(case.case_id, {}).values()
                if fold_name(name) in values
            ),
        )
        for case in dataset.cases
    )
    spellings = {fold_name(name): name for named in names.values() for name in named.values()}
    labels = dataset.labels or {0: "background", **{values[key]: spellings[key] for key in values}}
    return replace(dataset, cases=cases, labels=dict(sorted(labels.items())))


def _number_names(
    files: Sequence[Mapping[int, str]], labels: Mapping[int, str] | None
) -> dict[str, int]:
    """Return the label value of each name, folded."""
    if labels is not None:
        return {fold_name(name): value for value, name in labels.items() if value}
    values: dict[str, set[int]] = defaultdict(set)
    for named in files:
        for number, name in named.items():
            values[fold_name(name)].add(number)
    numbers = [number for same in values.values() for number in same]
    if len(set(numbers)) == len(numbers) == len(values) and 0 not in numbers:
        return {name: same.pop() for name, same in values.items()}
    return {name: number for number, name in enumerate(sorted(values), 1)}


def _refuse_unnamed(
    dataset: Dataset, names: Mapping[str, Mapping[int, str]], values: Mapping[str, int]
) -> list[str]:
    """Refuse labels without names beside named ones whose numbers say nothing of theirs."""
    unnamed = [c.case_id for c in dataset.cases if c.label and not names.get(c.case_id)]
    pairs = {(name, number) for named in names.values() for number, name in named.items()}
    if dataset.labels or not unnamed or all(values[fold_name(name)] == n for name, n in pairs):
        return []
    numbers = ", ".join(f"{name} is {number}" for name, number in sorted(pairs)[:_MAX_HINTS])
    return [
        f"{shorten(unnamed, _MAX_HINTS)}: the label has values without names, and the "
        f"files with names do not agree on numbers ({numbers}): say what each value means in "
        "the labels without names, as data.labels.1=NAME data.labels.2=NAME"
    ]


def fold_name(name: str) -> str:
    """Return the name of a class for comparison: in one case, `_` and `-` as spaces."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def list_files(dataset: Dataset) -> list[Path]:
    """Return the files of all cases: images and labels."""
    return [path for case in dataset.cases for path in case.files]


def _find_left_out(dataset: Dataset) -> list[str]:
    """Name the lists and scans in the folder of a data set that are not read."""
    root = dataset.root
    if dataset.format == "list":
        return []
    notes = [
        f"{name} has no column of images, so it is not read as a list of cases"
        for name in _LISTS
        if (root / name).is_file()
    ]
    used = list_files(dataset)
    known, are_scans = {os.path.realpath(path) for path in used}, has_spacing(used[0])
    left_out = walk_scans(root, with_dicom=False)
    if any(find_reader(path) is DICOM for path in used):
        left_out += _find_series_left_out(root, used)
    counts = Counter(
        str(relate(path, root).parent)
        for path in left_out
        if has_spacing(path) == are_scans and os.path.realpath(path) not in known
    )
    if counts:
        places = (f"{place} ({count})" for place, count in counts.most_common())
        notes.append(
            f"{counts.total()} scans are not read, as the layout does not name them, in the "
            f"folders {shorten(places, _MAX_HINTS)}; to use them, move them to the others, or make "
            f"a list: medssl check {root} --draft FILE.csv"
        )
    return notes


def _find_series_left_out(root: Path, used: Iterable[Path]) -> list[Path]:
    """Return one DICOM file of each folder that is not read; by names, no header is opened."""
    places = {split_series(path)[0] for path in used}
    files = [path for path in walk_files(root) if path.suffix.lower() in DICOM.suffixes]
    return list(
        {path.parent: path for path in files if places.isdisjoint((path, *path.parents))}.values()
    )


def _suggest_path(path: Path) -> str:
    """Return a hint at the nearest existing sibling of the first missing part of a path."""
    missing = path.absolute()
    while not os.path.exists(missing.parent):
        missing = missing.parent
    if not os.path.isdir(missing.parent):
        return f"; {missing.parent} is a file"
    names = [entry.name for entry in missing.parent.iterdir() if entry.name[0] != "."]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""


def _detect_format(root: Path) -> tuple[str, Path]:
    """Return the format of a folder or file, and the file or folder to read."""
    if root.is_file():
        return _detect_file_format(root) or ("list", root)
    tables = [root / name for name in _LISTS if (root / name).is_file()]
    lists = [path for path in tables if _is_list(path)]
    if len(lists) == 2:
        raise InputError(f"{root}: holds cases.csv and cases.json; name the one to read")
    if lists:
        return "list", lists[0]
    is_folders = _is_folders(root)
    if (root / "dataset.json").is_file():
        layout = _detect_file_format(root / "dataset.json", or_nothing=is_folders)
        return layout or ("folders", root)
    if is_folders:
        return "folders", root
    inner = sorted(p.parent for depth in ("*", "*/*") for p in root.glob(f"{depth}/imagesTr"))
    if inner:
        lines = [f"  medssl check {path}" for path in inner[:_MAX_HINTS]]
        raise InputError(
            "\n".join([f"{root}: holds {len(inner)} data sets; name one of them:", *lines])
        )
    if tables:
        return "list", tables[0]
    raise InputError(describe_unknown(root))


def _is_list(path: Path) -> bool:
    """Tell whether a file beside the scans lists them: it has a column of images, or one meant so.

    One that cannot be understood counts as a list, so that its faults are named.
    """
    try:
        rows = _read_rows(path, [])[1]
    except InputError:
        return path.suffix.lower() == ".csv" or _may_list(path)
    columns = {column for _, row in rows for column in row}
    return not rows or any(
        _is_channel(column) or _are_scans(_list_values(column, rows), path.parent)
        for column in columns
    )


def _may_list(path: Path) -> bool:
    """Tell whether a JSON file cannot be read or is empty, or names a scan anywhere."""
    try:
        content = _read_json(path)
    except InputError:
        return True
    return not content or _count_scans(content) > 0


def _is_folders(root: Path) -> bool:
    """Tell whether a folder is `images/ labels/`; one whose masks lie elsewhere is not."""
    if not (root / "images").is_dir() or not list_scans(root / "images"):
        return False
    if (root / "labels").is_dir():
        return True
    return not any(is_mask(path, root) for path in walk_scans(root, with_dicom=False))


def _detect_file_format(path: Path, or_nothing: bool = False) -> tuple[str, Path] | None:
    """Return the format of a list or dataset.json; raise, or return None, where it is none."""
    if path.suffix.lower() == ".csv":
        return "list", path
    if path.suffix.lower() != ".json":
        raise InputError(
            f"{path}: is a file, and not a CSV or JSON list of cases; give the folder of the scans"
        )
    content = _read_json(path)
    keys = set(content) if isinstance(content, dict) else set()
    if "training" in keys:
        return "decathlon", path
    if keys & {"channel_names", "file_ending"}:
        return "nnunet", path
    if isinstance(content, list) or "cases" in keys:
        return "list", path
    if keys & set(_PARTS_OF_KEYS):
        return "decathlon", path
    if or_nothing:
        return None
    raise InputError(
        f"{path}: neither a Decathlon dataset (no `training`), nor one of nnU-Net v2 (no "
        f"`channel_names`), nor a list of cases; its keys: {', '.join(sorted(keys)) or 'none'}"
    )


def _locate(root: Path, format: str) -> Path:
    """Return the file or folder to read for a format that the user named."""
    names = {"list": _LISTS, "folders": ("images",)}
    options = names.get(format, ("dataset.json",))
    if root.is_file() and format != "folders":
        return root
    paths = [root / name for name in options if (root / name).exists()]
    if not paths:
        raise InputError(
            f"{root}: data.format={format} needs {' or '.join(options)} there; leave data.format "
            "out to have the layout recognized"
        )
    return root if format == "folders" else paths[0]


def _read_json(path: Path) -> Any:
    """Read JSON; a duplicate key is an error, not a silent choice."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands twice")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    content = _read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object with keys, got a {type(content).__name__}")
    return content


_PARTS_OF_KEYS: dict[str, str] = {
    **dict.fromkeys(("training", "train"), ""),
    **dict.fromkeys(("validation", "val"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "unlabeled": "unlabeled",
}


def _read_decathlon(path: Path) -> Dataset:
    """Read a Decathlon dataset.json; images without a label are unlabeled cases."""
    content, root = _read_object(path), path.parent
    problems: list[str] = []
    channels = _read_channels(content.get("modality") or content.get("channel_names"), problems)
    labels = _read_names(content.get("labels"), problems)
    entries = _list_entries(content, problems)
    cases: list[Case] = []
    num_lost = 0
    for key, entry in entries:
        images, label = _read_entry(entry)
        if not images:
            problems.append(f"{key}: expected an image, got {entry!r}")
            continue
        problems += [
            f"{key}: the path {text} leads out of {root}, the folder of {path.name}; copy the file "
            "there, or list the cases in a CSV, which may name files anywhere"
            for text in (*images, label or "")
            if _leads_out(text, root)
        ]
        paths = tuple(find_scan(root / image) for image in images)
        if len(paths) == 1:
            paths = _find_channels(paths[0], len(channels))
        mask = find_scan(root / label) if label else None
        num_lost += mask is not None and not os.path.isfile(mask)
        mask = mask if mask and os.path.isfile(mask) else None
        part = _PARTS_OF_KEYS[key.partition("[")[0]]
        case = _make_case(paths, mask)
        patient_id = entry.get("patient_id") if isinstance(entry, dict) else None
        patient_id = "" if patient_id is None else str(patient_id)
        cases.append(
            replace(
                case,
                patient_id=patient_id or case.patient_id,
                split=part if mask or part == "unlabeled" else "",
            )
        )
    notes = _find_unread_keys(path, content, set(_PARTS_OF_KEYS))
    notes += _find_unread_fields(path, entries, problems)
    has_patients = any(
        isinstance(entry, dict) and entry.get("patient_id") not in (None, "")
        for _, entry in entries
    )
    notes += _note_unnamed_patients(cases, has_patients, path)
    raise_all(problems, str(path))
    if num_lost:
        notes.append(
            f"{num_lost} label files named in {path.name} do not exist: their cases are unlabeled"
        )
    name = str(content.get("name") or root.resolve().name)
    return Dataset(name, root, "decathlon", tuple(cases), labels, channels, notes=tuple(notes))


def _note_unnamed_patients(cases: Sequence[Case], has_names: bool, path: Path) -> list[str]:
    """Name the cases of a list that say no patient where others do; headers of DICOM may.

    So do those whose patient is a word that stands for none, as they count as one.
    """
    unnamed = [
        case.case_id
        for case in cases
        if has_names and not case.patient_id and find_reader(case.images[0]) is not DICOM
    ]
    counts = Counter(case.patient_id for case in cases)
    shared = [
        f"{name!r} ({count} cases)"
        for name, count in counts.items()
        if count > 1 and PLACEHOLDER.fullmatch(name.casefold()) and not name.isdecimal()
    ]
    return [
        f"{path.name}: patient_id is empty for {shorten(unnamed, _MAX_HINTS)}: each counts as a "
        "patient of its own, so that one may be trained on and another test: fill it in"
    ] * bool(unnamed) + [
        f"{path.name}: patient_id is {shorten(shared, _MAX_HINTS)}, and cases of one patient_id "
        "count as one patient: give each patient one, or leave it empty"
    ] * bool(shared)


def _leads_out(text: str, root: Path) -> bool:
    """Tell whether a path leads out of a folder by its words; where links lead is the user's."""
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(top, text))
    return path != top and not path.startswith(top.rstrip(os.sep) + os.sep)


def _find_unread_keys(path: Path, content: Mapping[str, Any], known: set[str]) -> list[str]:
    """Name the keys of a dataset.json that list cases and are not read."""
    counts = {key: _count_scans(value) for key, value in content.items() if key not in known}
    return [
        f"{path.name}: the key {key!r} names {count} scans and is not read"
        + (f"; keys that are: {', '.join(sorted(known))}" if known else "")
        for key, count in counts.items()
        if count
    ]


def _count_scans(value: Any) -> int:
    """Count the file names of scans in a part of a JSON file."""
    if isinstance(value, str):
        return int(strip_suffix(value) is not None)
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(_count_scans, parts)) if isinstance(value, (dict, list)) else 0


def _find_unread_fields(
    path: Path, entries: Sequence[tuple[str, Any]], problems: list[str]
) -> list[str]:
    """Name the fields of cases that are not read; one that was meant for another is a problem."""
    rows = [
        (key, {name: str(value) for name, value in entry.items() if name != "patient_id"})
        for key, entry in entries
        if isinstance(entry, dict)
    ]
    slips, notes = _check_names(rows, ("image", "label"), path)
    problems += slips
    return notes


def _list_entries(content: Mapping[str, Any], problems: list[str]) -> list[tuple[str, Any]]:
    """Return the entries of a dataset.json with their places."""
    pairs = []
    for key in _PARTS_OF_KEYS:
        entries = content.get(key) or []
        if not isinstance(entries, list):
            problems.append(f"{key}: expected a list of cases, got {entries!r}")
        else:
            pairs += [(f"{key}[{index}]", entry) for index, entry in enumerate(entries)]
    return pairs


def _read_entry(entry: Any) -> tuple[list[str], str | None]:
    """Return images and label of an entry; no image where it cannot be understood."""
    fields = entry if isinstance(entry, dict) else {"image": entry}
    images, label = fields.get("image"), fields.get("label") or None
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(text, str) and text for text in (*images, label or "none")):
        return [], None
    return images, label


def _find_channels(image: Path, num_channels: int) -> tuple[Path, ...]:
    """Return an image, or in its absence the `_0000` files of its channels (nnU-Net v1)."""
    stem = strip_suffix(image.name)
    if os.path.isfile(image) or stem is None:
        return (image,)
    suffix = image.name[len(stem) :]
    options = tuple(image.with_name(f"{stem}_{i:04d}{suffix}") for i in range(num_channels))
    return options if os.path.isfile(options[0]) else (image,)


def _make_case(images: tuple[Path, ...], label: Path | None, case_id: str = "") -> Case:
    """Make a case whose id is its file's name."""
    if not case_id:
        stem = name_scan(images[0])
        case_id = stem if len(images) == 1 else stem.removesuffix("_0000")
    case_id = unicodedata.normalize("NFC", case_id)
    return Case(case_id, images, label, guess_patient(case_id))


def _read_channels(declared: Any, problems: list[str]) -> tuple[str, ...]:
    """Read channel names: a mapping index -> name, or a list."""
    if isinstance(declared, list):
        declared = {str(index): name for index, name in enumerate(declared)}
    if not isinstance(declared, dict) or not declared:
        problems.append(f'channels: expected names like {{"0": "MRI"}}, got {declared!r}')
        return ("",)
    if sorted(declared) != sorted(str(index) for index in range(len(declared))):
        problems.append(f"channels: expected the keys 0, 1, ..., got {', '.join(declared)}")
        return ("",)
    return tuple(str(declared[str(index)]) for index in range(len(declared)))


def _read_names(declared: Any, problems: list[str]) -> dict[int, str] | None:
    """Read label names: a mapping value -> name."""
    if declared is None:
        return None
    try:
        names = _with_background({int(value): str(name) for value, name in declared.items()})
    except (AttributeError, ValueError):
        problems.append(f'labels: expected names like {{"1": "liver"}}, got {declared!r}')
        return None
    problems += [
        f"labels: the value {value} of {names[value]} is below 0" for value in names if value < 0
    ]
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    problems += [f"labels: several values are named {name}" for name in twice]
    return names


def _with_background(labels: Mapping[int, str]) -> dict[int, str]:
    """Return label names sorted by value, with 0."""
    return dict(sorted({0: "background", **labels}.items()))


def _read_nnunet(path: Path) -> Dataset:
    """Read an nnU-Net v2 raw folder."""
    content, root = _read_object(path), path.parent
    problems: list[str] = []
    channels = _read_channels(content.get("channel_names"), problems)
    labels, ignore = _read_nnunet_labels(content.get("labels"), problems)
    ending = content.get("file_ending", ".nii.gz")
    if ending not in NIFTI.suffixes:
        problems.append(
            f"file_ending: only {' and '.join(NIFTI.suffixes)} are read, got {ending!r}"
        )
    raise_all(problems, str(path))
    if not (root / "imagesTr").is_dir():
        raise InputError(f"{root}: there is no folder imagesTr beside dataset.json")
    training = _group_channels(root / "imagesTr", len(channels), problems)
    unlabeled = _group_channels(root / "imagesTs", len(channels), problems)
    masks = list_scans(root / "labelsTr") if (root / "labelsTr").is_dir() else {}
    for name in ("imagesTr", "imagesTs", "labelsTr"):
        problems += find_unread(root / name)
    problems += _find_lone_labels(masks, training, "imagesTr")
    raise_all(problems, str(root))
    cases = [_make_case(images, masks.get(name), name) for name, images in training.items()]
    cases += [_make_case(images, None, name) for name, images in unlabeled.items()]
    name = str(content.get("name") or root.resolve().name)
    notes = _find_unread_keys(path, content, set())
    if (root / "labelsTs").is_dir() and unlabeled:
        notes.append(
            "imagesTs are unlabeled cases, which are trained on; labelsTs is not read. Keep a test "
            "set out of them: medssl evaluate MODEL on a folder of its own"
        )
    return Dataset(name, root, "nnunet", tuple(cases), labels, channels, ignore, tuple(notes))


def _read_nnunet_labels(
    declared: Any, problems: list[str]
) -> tuple[dict[int, str] | None, int | None]:
    """Read nnU-Net's name -> value, of which `ignore` is no class; refuse regions."""
    if not isinstance(declared, dict):
        problems.append(f'labels: expected values like {{"liver": 1}}, got {declared!r}')
        return None, None
    regions = [name for name, value in declared.items() if isinstance(value, list)]
    if regions:
        problems.append(
            f"labels: {', '.join(regions)} are regions (lists of values), which are not trained "
            "here; give each value one name in dataset.json"
        )
        return None, None
    values = {name: value for name, value in declared.items() if name != "ignore"}
    ignore = _read_ignore(declared.get("ignore"), problems)
    twice = [value for value, count in Counter(values.values()).items() if count > 1]
    problems += [f"labels: the value {value} has several names" for value in twice]
    return _read_names({value: name for name, value in values.items()}, problems), ignore


def _read_ignore(declared: Any, problems: list[str]) -> int | None:
    """Read the label value of voxels that nobody annotated."""
    if declared is None or type(declared) is int:
        return declared
    problems.append(f"ignore: expected a label value, got {declared!r}")
    return None


def _group_channels(
    folder: Path, num_channels: int, problems: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Group the `<case>_0000` files of a folder; a folder that does not exist is empty."""
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for stem, path in (list_scans(folder) if folder.is_dir() else {}).items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None:
            problems.append(f"{folder.name}/{path.name}: has no channel number like _0000")
        else:
            groups[match[1]][int(match[2])] = path
    for name, channels in groups.items():
        if sorted(channels) != list(range(num_channels)):
            got = ", ".join(f"_{index:04d}" for index in sorted(channels))
            problems.append(
                f"{folder.name}/{name}: expected {num_channels} channels "
                f"(_0000 to _{num_channels - 1:04d}), got {got}"
            )
    return {name: tuple(channels[i] for i in sorted(channels)) for name, channels in groups.items()}


def _find_lone_labels(labels: Iterable[str], cases: Iterable[str], folder: str) -> list[str]:
    """Name the labels that belong to no image, with the nearest one."""
    known = sorted(cases)
    problems: list[str] = []
    for stem in sorted(set(labels) - set(known)):
        hinted = len(problems) < _MAX_HINTS
        near = difflib.get_close_matches(stem, known, n=1) if hinted else []
        hint = f"; the nearest name there is {near[0]}" if near else ""
        problems.append(f"label {stem}: no image of this name in {folder}/{hint}")
    return problems


def _read_folders(root: Path) -> Dataset:
    """Read `images/ labels/ [unlabeled/]`; an image without a label is unlabeled too."""
    folders = {
        name: list_scans(root / name) if (root / name).is_dir() else {}
        for name in ("images", "labels", "unlabeled")
    }
    images, masks, unlabeled = folders["images"], folders["labels"], folders["unlabeled"]
    if not images:
        kinds = sorted({path.suffix for path in (root / "images").iterdir() if path.is_file()})
        got = f"files of the kind {', '.join(kinds)}" if kinds else "no file"
        raise InputError(f"{root / 'images'}: expected scans, {KINDS}, got {got}")
    problems = [text for name in folders for text in find_unread(root / name)]
    groups: dict[str, tuple[Path, ...]] = {stem: (path,) for stem, path in images.items()}
    more: dict[str, tuple[Path, ...]] = {stem: (path,) for stem, path in unlabeled.items()}
    num_channels = 1
    if not set(masks) <= set(images) and set(masks) <= {re.sub(r"_\d{4}$", "", s) for s in images}:
        num_channels = len({stem[-5:] for stem in images})
        groups = _group_channels(root / "images", num_channels, problems)
        more = _group_channels(root / "unlabeled", num_channels, problems)
    problems += _find_lone_labels(masks, groups, "images")
    raise_all(problems, str(root))
    cases = [_make_case(paths, masks.get(name), name) for name, paths in groups.items()]
    cases += [_make_case(paths, None, name) for name, paths in more.items()]
    channels = _name_channels(cases, num_channels)
    return Dataset(root.resolve().name, root, "folders", tuple(cases), None, channels)


def _name_channels(cases: Sequence[Case], num_channels: int) -> tuple[str, ...]:
    """Return empty names, or those of colors where most pictures, by their headers, are in color.

    Scans keep their channels in the number of files; pictures in the file itself.
    """
    pictures = [case.images[0] for case in cases if not has_spacing(case.images[0])]
    if num_channels == 1 and pictures:
        from medssl.formats.pictures import count_channels  # heavy: only where there are pictures

        counts: Counter[int] = Counter()
        for path in pictures[:: -(-len(pictures) // _MOST_OPENED)]:
            with contextlib.suppress(InputError):  # it is named when it is read
                counts[count_channels(path)] += 1
        if counts[len(_COLORS)] > counts.total() / 2:
            return _COLORS
    return ("",) * num_channels


_COLUMNS = ("case_id", "image", "label", "patient_id", "split")
_OTHER_WORDS = {
    "case_id": {"id", "case", "name", "uid", "scan_id"},
    "image": {"image_0", "img", "scan", "volume", "file", "path"},
    "label": {"mask", "seg", "segmentation", "gt", "ground_truth", "annotation", "labels"},
    "patient_id": {"patient", "subject", "subject_id", "pid", "participant_id"},
    "split": {"set", "partition", "part", "subset", "fold"},
}
Rows = Sequence[tuple[str, Mapping[str, str]]]
_SPLIT_WORDS = {"train": "labeled", "training": "labeled", "validation": "val", "valid": "val"}


def _read_list(path: Path) -> Dataset:
    """Read a CSV or JSON list; paths in it are relative to the list's folder."""
    problems: list[str] = []
    content, rows = _read_rows(path, problems)
    slips, notes = _check_columns(rows, path)
    raise_all(problems + slips, str(path))
    if not rows:
        raise InputError(f"{path}: lists no case")
    columns = sorted({k for _, row in rows for k in row if _is_channel(k)}, key=_channel_index)
    cases = [_read_row(where, row, columns, path.parent, problems) for where, row in rows]
    channels = _name_channels(cases, len(columns))
    if content.get("channels") is not None:
        channels = _read_channels(content["channels"], problems)
        if len(columns) not in (1, len(channels)):
            problems.append(f"channels: {len(channels)} are named, but there are {len(columns)}")
    notes += _note_unnamed_patients(cases, any(row.get("patient_id") for _, row in rows), path)
    labels = _read_names(content.get("labels"), problems)
    ignore = _read_ignore(content.get("ignore"), problems)
    raise_all(problems and [*problems, *_find_case_problems(cases)], str(path))
    default = path.parent.resolve().name if path.stem == "cases" else path.stem
    name = str(content.get("name") or default.removesuffix("_cases"))
    return Dataset(name, path.parent, "list", tuple(cases), labels, channels, ignore, tuple(notes))


def _read_rows(
    path: Path, problems: list[str]
) -> tuple[dict[str, Any], list[tuple[str, dict[str, str]]]]:
    """Read the declarations of a list, which only JSON has, and its rows with their places."""
    if path.suffix.lower() == ".json":
        return _read_json_rows(path)
    return {}, _read_csv_rows(path, problems)


def _read_json_rows(path: Path) -> tuple[dict[str, Any], list[tuple[str, dict[str, str]]]]:
    """Read the rows of a JSON list: an array, or an object with `cases` and declarations."""
    content = _read_json(path)
    if isinstance(content, list):
        content = {"cases": content}
    rows = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f'{path}: expected [{{"case_id": ..., "image": ..., "label": ...}}, ...], or an object '
            "with such a list as `cases` (and name, channels, labels, ignore)"
        )
    known = ("cases", "name", "channels", "labels", "ignore")
    raise_all(
        [f"unknown key {key!r}{_suggest(key, known)}" for key in content if key not in known],
        str(path),
    )
    texts = [{k: "" if v is None else str(v).strip() for k, v in row.items()} for row in rows]
    return content, [(f"cases[{index}]", row) for index, row in enumerate(texts)]


def _read_csv_rows(path: Path, problems: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Read the rows of a CSV and their lines; comma, semicolon or tab; `#` columns are notes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; save it as CSV in UTF-8") from error
    header = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        table = [(reader.line_num, values) for values in reader]
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num} and before: {error}; is a quotation mark not closed?"
        ) from error
    names = [name.strip() for name in (table[0][1] if table else [])]
    problems += [f"column {name!r} stands twice" for name, n in Counter(names).items() if n > 1]
    rows = []
    for number, values in table[1:]:
        where = f"line {number}"
        if not any(value.strip() for value in values):
            continue
        if any("\n" in value for value in values):
            problems.append(f"{where}: a value goes over lines; is a quotation mark not closed?")
        if len(values) > len(names):
            problems.append(f"{where}: {len(values)} values for {len(names)} columns")
        row = {name: value.strip() for name, value in zip(names, values, strict=False)}
        rows.append((where, {**dict.fromkeys(names, ""), **row}))
    return [(where, {k: v for k, v in row.items() if k[:1] != "#"}) for where, row in rows]


def _is_channel(column: str) -> bool:
    """Tell whether a column holds images."""
    return column == "image" or re.fullmatch(r"image_[1-9]\d*", column) is not None


def _channel_index(column: str) -> int:
    """Return the channel of an image column."""
    return int(column[6:] or 0)


def _suggest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the known word nearest to a word."""
    synonyms = [name for name, words in _OTHER_WORDS.items() if word.lower() in words]
    near = [name for name in synonyms if name in known] or difflib.get_close_matches(
        word.lower(), known, n=1
    )
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _check_columns(rows: Rows, path: Path) -> tuple[list[str], list[str]]:
    """Return what is wrong with the columns of a list, and a note on those that are not read."""
    columns = {column for _, row in rows for column in row}
    problems, notes = _check_names(rows, (*_COLUMNS, *filter(_is_channel, columns)), path)
    channels = sorted(_channel_index(column) for column in columns if _is_channel(column))
    if channels and channels != list(range(len(channels))):
        problems.append("image columns must be image, image_1, image_2, ... without a gap")
    missing = [c for c in ("case_id", "image") if rows and c not in columns]
    return problems + [f"there is no column {column!r}" for column in missing], notes


def _check_names(rows: Rows, known: Sequence[str], path: Path) -> tuple[list[str], list[str]]:
    """Return the unknown columns that were meant for known ones, and a note on the others."""
    columns = dict.fromkeys(column for _, row in rows for column in row)
    missing = [name for name in known if name not in columns]
    slips = {
        name: _find_slip(name, missing, _list_values(name, rows), path.parent)
        for name in columns
        if name not in known
    }
    problems = [
        f"unknown column {name!r}; did you mean {meant!r}? (a note for people starts with #)"
        for name, meant in slips.items()
        if meant
    ]
    ignored = ", ".join(name for name, meant in slips.items() if not meant)
    return problems, [f"{path.name}: columns that are not read: {ignored}"] if ignored else []


def _find_slip(column: str, missing: Sequence[str], values: set[str], root: Path) -> str:
    """Return the missing column that an unknown one was probably meant for; empty if none.

    Its name is another spelling of that column (`lable`, `patientID`), or another word for it and
    its values fit: names of scans, or words of a split.
    """
    word = re.sub(r"[^a-z0-9]", "", column.lower())
    channel = re.fullmatch(r"(?:image|img)0*(\d*)", word)
    if channel and ("image" in missing or channel[1]):
        return f"image_{channel[1]}" if channel[1] and "image" not in missing else "image"
    tokens = {*re.split(r"[^a-z0-9]+", column.lower()), column.lower()}
    words = {value.lower() for value in values}
    for known in missing:
        names = {known, *_OTHER_WORDS[known]}
        fits = {
            "image": bool(tokens & names) and _are_scans(values, root),
            "label": bool(tokens & names) and any(map(_names_scan, values)),
            "split": column.lower() in names and words <= {*PARTS, *_SPLIT_WORDS},
        }
        near = difflib.SequenceMatcher(None, word, known.replace("_", "")).ratio() >= 0.8
        if near or fits.get(known, column.lower() in names):
            return known
    return ""


def _list_values(column: str, rows: Rows) -> set[str]:
    """Return the values of a column, without the empty one."""
    return {row[column] for _, row in rows if row.get(column)}


def _names_scan(value: str) -> bool:
    """Tell whether a value is the name of a scan."""
    return strip_suffix(Path(value).name) is not None


def _are_scans(values: Iterable[str], root: Path) -> bool:
    """Tell whether one of the first values is a scan that is there."""
    some = sorted(filter(_names_scan, values))[:_MAX_HINTS]
    return any(is_scan(find_scan(root / value)) for value in some)


def _read_row(
    where: str, row: Mapping[str, str], columns: Sequence[str], root: Path, problems: list[str]
) -> Case:
    """Make a case of a row."""
    case_id = unicodedata.normalize("NFC", row.get("case_id", ""))
    split = row.get("split", "").lower()
    place = f"{where} ({case_id})" if case_id else where
    if not case_id:
        problems.append(f"{where}: case_id is empty")
    empty = [column for column in columns if not row.get(column)]
    problems += [f"{place}: {column} is empty" for column in empty]
    if split and split not in PARTS:
        near = _SPLIT_WORDS.get(split)
        hint = f"; did you mean {near!r}?" if near else _suggest(split, PARTS)
        problems.append(f"{place}: unknown split {split!r}{hint}")
    label = find_scan(root / os.path.expanduser(row["label"])) if row.get("label") else None
    if label is None and split in ("labeled", "val", "test"):
        problems.append(f"{place}: split is {split}, but there is no label")
    images = tuple(find_scan(root / os.path.expanduser(row.get(column, ""))) for column in columns)
    return Case(case_id, images, label, row.get("patient_id") or guess_patient(case_id), split)


def _check_cases(dataset: Dataset, source: Path) -> None:
    """Refuse a set without a case, and cases that cannot be used."""
    raise_all(_find_case_problems(dataset.cases), str(source))
    if not dataset.cases:
        raise InputError(f"{source}: lists no case")


def _find_case_problems(cases: Sequence[Case]) -> list[str]:
    """Name missing files, duplicate case_ids and those that cannot name a folder."""
    problems = []
    counts = Counter(case.case_id for case in cases if case.case_id)
    problems += [f"case_id {name} stands {n} times" for name, n in counts.items() if n > 1]
    num_hints = _MAX_HINTS
    sound = []
    for case in cases:
        if re.search(r"[/\\:\x00-\x1f]", case.case_id) or case.case_id.startswith("."):
            problems.append(
                f"case_id {case.case_id!r}: names a folder of the run, so it may not start with a "
                "dot or hold a slash, backslash or colon"
            )
        names = "".join(map(str, (case.case_id, *case.files)))
        if escape_text(names) != names:
            problems.append(
                f"case_id {case.case_id!r}: the name of a file or folder is not UTF-8: rename it"
            )
            continue
        if len(case.case_id.encode()) > _MAX_ID_BYTES:
            problems.append(
                f"case_id {case.case_id}: has {len(case.case_id.encode())} bytes, and names files "
                f"for which {_MAX_ID_BYTES} are left: rename the scan, or give it a short case_id "
                "in a list"
            )
        bad = [path for path in case.files if not is_scan(path)]
        sound += [] if bad else [case]
        for path in bad:
            num_hints -= 1
            hint = _suggest_path(path) if num_hints >= 0 and not os.path.exists(path) else ""
            problems.append(f"{case.case_id}: {_explain_file(path)}{hint}")
    return problems + _find_shared_files(sound)[0] + _find_other_kinds(cases)


def _find_shared_files(cases: Sequence[Case]) -> tuple[list[str], list[str]]:
    """Return problems and notes: files that stand in several places, which is wrong or may be."""
    images, labels, channels = (defaultdict[str, dict[str, None]](dict) for _ in range(3))
    problems, notes = [], []
    for case in cases:
        files = [os.path.abspath(path) for path in case.images]
        if len(set(files)) < len(files):
            twice = next(path for path in files if files.count(path) > 1)
            problems.append(f"{case.case_id}: {twice} is two of its channels: name another for one")
        for file in files:
            channels[file][case.case_id] = None
        images["\n".join(files)][case.case_id] = None
        if case.label:
            labels[os.path.abspath(case.label)][case.case_id] = None
    for text, names in images.items():
        if len(names) > 1:
            file = text.split("\n")[0]
            problems.append(
                f"{shorten(names, _MAX_HINTS)}: the same image {file}: keep one of them"
            )
    for file, names in labels.items():
        if file in channels:
            problems.append(
                f"{shorten(names, _MAX_HINTS)}: the label {file} is an image too: name the label"
            )
        elif len(names) > 1:
            notes.append(
                f"{shorten(names, _MAX_HINTS)}: have one label, {file}: name that of each, unless "
                "these are images of one scan"
            )
    notes += [
        f"{shorten(names, _MAX_HINTS)}: have one file for a channel, {file}: name that of each, if "
        "this is a slip"
        for file, names in channels.items()
        if len(names) > 1
    ]
    return problems, notes


def _find_other_kinds(cases: Sequence[Case]) -> list[str]:
    """Name the cases of the rarer kind where NIfTI files and pictures are mixed."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for case in cases:
        for kind in {reader.has_spacing for reader in map(find_reader, case.files) if reader}:
            kinds[kind].append(case.case_id)
    fewer = min(kinds.values(), key=len)
    return [
        f"{case_id}: NIfTI files, which have a spacing, and pictures, which have none, are mixed "
        "in this data set; make two of it"
        for case_id in fewer
    ]


def _explain_file(path: Path) -> str:
    """Say why a file cannot be used."""
    if os.path.isdir(path):
        inside = " that holds no scan or several" if strip_suffix(path.name) is not None else ""
        return f"{path} is a folder{inside}, no scan"
    if os.path.isfile(path):
        return f"{path} is no scan that is read, {KINDS}; {explain_kind(path) or 'name another'}"
    return f"{path} does not exist" if not os.path.exists(path) else f"{path} is no regular file"


_READERS: dict[str, Callable[[Path], Dataset]] = {
    "decathlon": _read_decathlon,
    "nnunet": _read_nnunet,
    "folders": _read_folders,
    "list": _read_list,
}
