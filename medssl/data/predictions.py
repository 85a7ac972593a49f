"""The folder of predictions: which scans go in, which files come out, and what may be replaced.

`predictions.json` says of every file that predictions wrote the hash of its bytes. A file that it
does not name, or that has been changed since, is somebody's work: it is never replaced unasked.
"""

import contextlib
import datetime
import json
import os
import re
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl import __version__, ranks
from medssl.config import InputError
from medssl.data.cases import format_count, shorten
from medssl.data.files import (
    find_scan,
    find_unread,
    hash_source,
    is_scan,
    keep_scans,
    note_masks,
    refuse_loose_slices,
    walk_scans,
)
from medssl.data.layouts import read_dataset
from medssl.formats.readers import (
    DICOM,
    FORMATS,
    KINDS,
    find_reader,
    get_reader,
    has_spacing,
    is_dicom,
    is_series,
    name_mask_suffix,
    name_scan,
    strip_suffix,
)
from medssl.runs import (
    check_writable,
    hash_file,
    hash_json,
    hold_lock,
    read_json,
    tell_full_disk,
    write_json,
)

RECORD = "predictions.json"
AUDIT = "predictions.jsonl"
OVERWRITE = "--overwrite"
_LISTS = ("cases.csv", "cases.json", "dataset.json")
_NUM_SHOWN = 5
_PARTS = ("labels", "model", "flags", "scans", "files")
_FEWER = 19  # times as long as the last writing of the record, until the next one

Scans = dict[str, tuple[Path, ...]]
"""The image files of each scan, by its name."""


class SomeFailedError(InputError):
    """Some scans failed, and are named; what was done for all others stands."""


@dataclass(frozen=True)
class PlannedPredictions:
    """What a call of `predict` reads and writes.

    `files` are the mask and the maps of each scan; `problems` name the scans that cannot be read as
    asked for, `notes` what is left out. Of several processes of one command (`medssl.ranks`) each
    has the scans dealt to it, and the first one the problems and notes.
    """

    scans: Scans
    masks: dict[str, Path]
    files: dict[str, list[Path]]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def plan_predictions(
    inputs: Sequence[Path],
    out: Path,
    num_channels: int,
    *,
    maps: Sequence[str] = (),
    overwrite: bool = False,
    format: str | None = None,
) -> PlannedPredictions:
    """Say which scans are read and which files are written, before anything is computed.

    Args:
        inputs: Scans, folders of scans, data sets or lists of cases.
        out: Folder of the masks.
        num_channels: Channels of the model.
        maps: What else is written of each scan: `probs`, `uncertainty`.
        overwrite: Whether files that no prediction wrote may be replaced; scans never are.
        format: Of the masks, one of `FORMATS`; None: that of each scan.

    Raises:
        InputError: No scan was found, masks would lie among their scans, or files that no
            prediction wrote, or masks of other scans, would be replaced.
    """
    problems: list[str] = []
    notes: list[str] = []
    scans = find_scans(inputs, num_channels, problems, notes)
    _refuse_folder_of_scans(out, scans)
    if format and format.startswith("dicom"):
        for name in [n for n, images in scans.items() if find_reader(images[0]) is not DICOM]:
            problems.append(
                f"{scans.pop(name)[0]}: is no DICOM series, to whose images a mask in DICOM "
                "refers: leave out --format, or name another"
            )
    targets = {}
    for name, images in scans.items():
        mask = f"{name}{FORMATS[format] if format else _name_output_suffix(images[0])}"
        suffix = get_reader(Path(mask)).map_suffix
        targets[name] = [mask, *(f"{name}_{map_name}{suffix}" for map_name in maps)]
    for name in _find_twins(targets):
        listed = ", ".join(str(path) for path in scans.pop(name))
        problems.append(f"{listed}: another scan of this call has its file {targets.pop(name)[0]}")
    if not scans:
        raise InputError("\n".join(problems))
    scans = {name: scans[name] for name in ranks.deal(list(scans))}
    targets = {name: targets[name] for name in scans}
    if not ranks.is_first():
        problems, notes = [], []
    written = [file for files in targets.values() for file in files]
    protect_files(out, written, overwrite, [p for paths in scans.values() for p in paths])
    if not overwrite:
        _protect_other_scans(out, scans)
    paths = {name: [out / file for file in files] for name, files in targets.items()}
    masks = {name: files[0] for name, files in paths.items()}
    return PlannedPredictions(scans, masks, paths, tuple(problems), tuple(notes))


def _name_output_suffix(image: Path) -> str:
    """Return the suffix of the mask of a scan, in its own kind."""
    return get_reader(image).output_suffix or name_mask_suffix(image)


def _refuse_folder_of_scans(out: Path, scans: Scans) -> None:
    """Refuse to write masks where scans lie, or where nothing can be written."""
    check_writable(out, "--out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder for the masks")
    folders = {path.parent for images in scans.values() for path in images}
    if any(out.is_dir() and os.path.samefile(folder, out) for folder in folders):
        raise InputError(
            f"--out {out}: scans lie there, and a mask would overwrite its own scan or be taken "
            "for another one; name another folder"
        )


def _find_twins(targets: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the scans that share the name of a file with an earlier scan."""
    taken: set[str] = set()
    twins = []
    for name, files in targets.items():
        keys = {_fold(file) for file in files}
        if keys & taken:
            twins.append(name)
        else:
            taken |= keys
    return twins


def _fold(name: str) -> str:
    """Return a name as file systems compare it that know no case, or one form of an accent."""
    return unicodedata.normalize("NFC", name).casefold()


def protect_files(
    out: Path, files: Iterable[str], overwrite: bool = False, scans: Sequence[Path] = ()
) -> None:
    """Refuse to replace what no prediction wrote, or a person has changed since.

    Args:
        out: The folder.
        files: Names, relative to it, of the files that will be written.
        overwrite: Replace them all the same.
        scans: Files that are never replaced.

    Raises:
        InputError: Some would be replaced; says how many, the first of them, and the flag.
    """
    if not out.is_dir():
        return
    identities = {_identify(path) for path in scans} - {None}
    hashes = read_files(out)
    foreign, inputs = [], []
    for path in _find_standing(out, files):
        name = path.relative_to(out).as_posix()
        if _identify(path) in identities or (path.is_dir() and not path.is_symlink()):
            inputs.append(name)
        elif path.is_symlink() or not (hashes.get(name) == hash_file(path) or _is_prediction(path)):
            foreign.append(name)
    if inputs:
        raise InputError(
            f"{out}: would replace what is a scan or a folder: "
            f"{shorten(sorted(inputs), _NUM_SHOWN)}; name another folder"
        )
    if (out / RECORD).exists() and not _read_record(out):
        foreign.append(RECORD)
    if foreign and not overwrite:
        raise InputError(
            f"{out}: nothing was computed, for it would replace "
            f"{format_count(len(foreign), 'file')} that no prediction wrote, or that were changed "
            f"after it: {shorten(sorted(foreign), _NUM_SHOWN)}; name another folder, or give "
            f"{OVERWRITE} to replace them"
        )


def _protect_other_scans(out: Path, scans: Scans) -> None:
    """Refuse to replace the mask of a scan of the same name from another place.

    A copy of a scan is the same one, and so is what lies in its place: it was mended.

    Raises:
        InputError: Some would be replaced; names the first of them, and the flag.
    """
    entries = {entry.get("scan"): entry for entry in read_audit(out / AUDIT)}
    others = []
    for name, images in scans.items():
        entry = entries.get(name, {})
        if entry.get("places") in (None, locate_files(images)):
            continue
        with contextlib.suppress(InputError, TypeError, KeyError):
            hashes = [source["sha256"] for source in entry["input"]]
            stands = any((out / str(file)).exists() for file in entry["output"])
            if stands and hashes != [hash_source(path) for path in images]:
                others.append(f"{name} ({images[0]})")
    if others:
        raise InputError(
            f"{out}: nothing was computed, for the masks there of these names are those of other "
            f"scans: {shorten(sorted(others), _NUM_SHOWN)}; name another folder for each, or give "
            f"{OVERWRITE} to replace them"
        )


def locate_files(paths: Sequence[Path]) -> list[str]:
    """Return a hash of where each file or folder lies, which shows no name."""
    return [hash_json(os.path.realpath(path)) for path in paths]


def _find_standing(out: Path, files: Iterable[str]) -> list[Path]:
    """Return what stands in a folder under these names, in whatever case, form or format."""
    stems_by_folder: dict[str, set[str]] = defaultdict(set)
    for file in files:
        path = Path(file)
        stems_by_folder[path.parent.as_posix()].add(_fold(name_scan(path)))
    return [
        path
        for folder, stems in stems_by_folder.items()
        if (out / folder).is_dir()
        for path in sorted((out / folder).iterdir())
        if (strip_suffix(path.name) or not path.is_dir()) and _fold(name_scan(path)) in stems
    ]


def _is_prediction(path: Path) -> bool:
    """Tell whether a mask says that a prediction made it, though a kill came before the record."""
    from medssl.data.io import read_label_values  # heavy: only where something stands in the way

    with contextlib.suppress(InputError):
        return read_label_values(path).origin == "prediction"
    return False


def _identify(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, the same for all its names; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read_record(out: Path) -> dict[str, Any]:
    """Return the record of a folder; empty where there is none that a prediction wrote."""
    content = None
    with contextlib.suppress(InputError):
        content = read_json(out / RECORD)
    if not isinstance(content, dict) or "labels" not in content:
        return {}
    parts = (content.get(key, {}) for key in ("labels", "flags", "files", "scans"))
    return content if all(isinstance(part, dict) for part in parts) else {}


def read_files(out: Path) -> dict[str, str]:
    """Return the hash of each file of a folder that predictions wrote, as they wrote it."""
    return {str(name): str(value) for name, value in _read_record(out).get("files", {}).items()}


class Record:
    """Adds files to the record of a folder as they are written; other entries stay.

    The record of thousands of pictures takes longer to write than one of them takes to segment, so
    it is written when that costs no more than a twentieth of the time, and at the end by `write`.
    After a kill in between, masks are known by their marks, and maps are not.

    Args:
        out: The folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._pending: dict[str, dict[str, Any]] = {}
        self._next = 0.0

    def add_files(
        self,
        files: Iterable[Path],
        *,
        labels: Mapping[str, str] | None = None,
        model: Mapping[str, Any] | None = None,
        flags: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, str]:
        """Add files as they are now; return their hashes by name.

        Args:
            files: What was written into the folder.
            labels: Name of each label value.
            model: Where the model comes from.
            flags: By scan, what lies outside of the training range.
        """
        hashes = {path.relative_to(self.out).as_posix(): hash_file(path) for path in files}
        whole = {"labels": labels, "model": model}
        self._pending |= {key: dict(part) for key, part in whole.items() if part is not None}
        scans = {name: dict(model or {}) for name in flags or ()}
        for key, part in (("flags", flags or {}), ("scans", scans), ("files", hashes)):
            self._pending.setdefault(key, {}).update(part)
        if time.monotonic() >= self._next:
            self.write()
        return hashes

    def write(self) -> None:
        """Write what was added since the last time.

        Raises:
            InputError: The disk is full.
        """
        if not self._pending:
            return
        started = time.monotonic()
        with hold_lock(self.out):
            record = _read_record(self.out)
            merged = {key: {**record.get(key, {}), **self._pending.get(key, {})} for key in _PARTS}
            merged |= {k: self._pending[k] for k in ("labels", "model") if k in self._pending}
            write_json(self.out / RECORD, merged)
        self._pending = {}
        self._next = time.monotonic() + _FEWER * (time.monotonic() - started)


def append_audit(path: Path, **entry: Any) -> None:
    """Append a line of JSON to a log.

    Args:
        path: The log; that of predictions is `AUDIT` in their folder.
        entry: What to say beside the time and the version of medssl.

    Raises:
        InputError: The disk is full.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "medssl": __version__, **entry}) + "\n"
    with tell_full_disk(path), path.open("ab") as file:
        file.write(line.encode())


def read_audit(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; one that is damaged or cut is left out."""
    entries = []
    with contextlib.suppress(OSError):
        for line in path.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def record_predictions(out: Path, files: Iterable[Path], **about: Any) -> None:
    """Add files to the record of a folder at once; arguments as for `Record.add_files`."""
    record = Record(out)
    record.add_files(files, **about)
    record.write()


def find_scans(
    inputs: Sequence[Path], num_channels: int, problems: list[str], notes: list[str]
) -> Scans:
    """Return the image files of each scan by its name.

    A folder is a data set if it has a list, a dataset.json or a folder `images`; else the scans
    that lie in it are taken. With several channels these end in _0000, _0001, ..., or one file has
    all of them.

    Args:
        inputs: Scans, folders of scans, data sets or lists of cases.
        num_channels: Channels of the model.
        problems: Gets what is wrong with single scans or inputs.
        notes: Gets what is left out.

    Raises:
        InputError: There is no scan at all.
    """
    scans: Scans = {}
    files: list[Path] = []
    for path in inputs:
        try:
            if _is_dataset(path):
                notes += _add_cases(path, num_channels, scans, problems)
            else:
                files += _list_files(path, problems, notes)
        except InputError as error:
            problems.append(str(error))
    _group_files(files, num_channels, scans, problems)
    if not scans:
        raise InputError("\n".join(problems))
    return scans


def _is_dataset(path: Path) -> bool:
    """Tell whether a path is a list, or the folder of a data set."""
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() in (".csv", ".json")
    return (path / "images").is_dir() or any((path / name).is_file() for name in _LISTS)


def _add_cases(path: Path, num_channels: int, scans: Scans, problems: list[str]) -> tuple[str, ...]:
    """Add the cases of a data set, with or without a label; return the notes of its reader."""
    dataset = read_dataset(path, opens_files=False)
    for case in dataset.cases:
        if len(case.images) not in (1, num_channels):
            problems.append(
                f"{case.case_id}: the model wants {num_channels} channels, the data set has "
                f"{len(case.images)}: {', '.join(str(image) for image in case.images)}"
            )
        else:
            _add_scan(case.case_id, case.images, scans, problems)
    return dataset.notes


def _add_scan(name: str, images: tuple[Path, ...], scans: Scans, problems: list[str]) -> None:
    """Add a scan; two of one name are a problem, but for the same files given twice."""
    known = scans.setdefault(name, images)
    if [path.resolve() for path in known] != [path.resolve() for path in images]:
        listed = ", ".join(str(path) for path in (*known, *images))
        problems.append(f"{name}: two scans of one name, of which one mask would be left: {listed}")


def _list_files(path: Path, problems: list[str], notes: list[str]) -> list[Path]:
    """Return the scans of an input: a file, or a folder without what is hidden in it."""
    path = find_scan(path)
    if not path.exists() and not is_series(path):
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        if find_reader(path) is None:
            raise InputError(f"{path}: no scan that is read, {KINDS}")
        return [path]
    inside = [entry for entry in sorted(path.iterdir()) if entry.is_file()]
    slices = [file for file in inside if is_dicom(file)]
    if slices and not any(is_scan(file) and has_spacing(file) for file in set(inside) - {*slices}):
        return [path]
    try:
        refuse_loose_slices(path, slices)
        slices = []
    except InputError as error:
        problems.append(str(error))
    problems += [f"{path.parent / problem}" for problem in find_unread(path)]
    entries = [find_scan(p) for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    visible = [e for e in dict.fromkeys(entries) if is_scan(e) and e not in slices]
    files = keep_scans(visible)
    below = [
        scan for scan in walk_scans(path, with_dicom=False) if not _lies_in(scan, [path, *files])
    ]
    if not files:
        hint = f"; some lie in folders below it: name {below[0].parent}" if below else ""
        raise InputError(f"{path}: no scan that is read, {KINDS}{hint}")
    if below:
        notes.append(f"{path}: folders below it are not read, such as {below[0].parent}")
    previews = [file for file in visible if strip_suffix(file.name) and file not in files]
    if previews:
        names = shorten(sorted([file.name for file in previews]), _NUM_SHOWN)
        notes.append(f"{path}: pictures beside scans are left out: {names}")
    notes += [f"{path}: {note}" for note in note_masks(files, files)]
    return files


def _lies_in(scan: Path, places: Sequence[Path]) -> bool:
    """Tell whether a scan is one of some places, or lies in one that is a folder of DICOM."""
    return (
        scan in places
        or scan.parent == places[0]
        or any(place in scan.parents for place in places[1:])
    )


def _group_files(
    files: Sequence[Path], num_channels: int, scans: Scans, problems: list[str]
) -> None:
    """Add scans of files, which have all channels or end in the number of one."""
    groups: dict[str, dict[str, list[Path]]] = {}
    for file in {os.path.abspath(path): path for path in files}.values():
        name = name_scan(file)
        channel = ""
        if num_channels > 1 and re.search(r"_\d{4}$", name) and not _is_whole(file, num_channels):
            name, channel = name[:-5], name[-4:]
        groups.setdefault(name, {}).setdefault(channel, []).append(file)
    all_channels = {f"{channel:04d}" for channel in range(num_channels)}
    for name, split in groups.items():
        listed = ", ".join(str(file) for same in split.values() for file in same)
        if any(len(same) > 1 for same in split.values()):
            problems.append(
                f"{name}: two scans of one name, of which one mask would be left: {listed}"
            )
        elif set(split) not in ({""}, all_channels):
            problems.append(f"{name}: the model wants {num_channels} channels, found {listed}")
        else:
            images = tuple(split[channel][0] for channel in sorted(split))
            _add_scan(name, images, scans, problems)


def _is_whole(file: Path, num_channels: int) -> bool:
    """Tell whether a picture has all channels by itself; one that is damaged has not."""
    if has_spacing(file):
        return False
    from medssl.formats.pictures import count_channels  # heavy: only where there are pictures

    with contextlib.suppress(InputError):
        return count_channels(file) == num_channels
    return False
