"""What file names alone say: stems, patients, masks, other formats, a draft list of a tree."""

import csv
import io
import os
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from medssl.config import InputError
from medssl.data.cases import Case, escape_text, format_count, shorten
from medssl.formats.readers import (
    DICOM,
    KINDS,
    explain_kind,
    find_reader,
    has_spacing,
    is_dicom,
    is_series,
    name_scan,
    split_series,
    strip_suffix,
)
from medssl.runs import hash_file, hash_json

_MASK_WORD = (
    "(?:labels?|lbl|masks?|d?seg|segs|segm|segmentations?|gt|groundtruth|annotations?|rois?|manual)"
)
_MASK_NAME = re.compile(rf"(?:^|(?<=[^a-z0-9])){_MASK_WORD}(?=$|[^a-z0-9])", re.IGNORECASE)
_MASK_FOLDER = re.compile(rf"^{_MASK_WORD}(?:tr|ts)?$", re.IGNORECASE)
_COMMON_FOLDER = re.compile(
    r"^(?:images?|imgs?|scans?|volumes?|data|nifti|raw|cases?|labeled|unlabeled|"
    r"train(?:ing)?|val(?:idation)?|test(?:ing)?)(?:tr|ts)?$",
    re.IGNORECASE,
)
_PATIENT = re.compile(r"^(sub-[A-Za-z0-9]+|(?:patient|subject|pat)[-_]?\d+)(?=[-_.]|$)", re.I)
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "lost+found"}
_MAX_CHANNELS = 8  # a folder with more images than this holds several cases
_NUM_SHOWN = 12
_PAIRS = (".hdr", ".img", ".mhd", ".nhdr")  # files of the same name beside them belong to them
_NAMING = (".mha", ".mhd", ".nrrd", ".nhdr")  # headers that may name a file of their voxels
_DATA_FILE = re.compile(r"(?im)^\s*(?:ElementDataFile\s*=|data ?file:)(.+)$")
_LARGEST_HEADER = 2**20


def keep_scans(paths: Iterable[Path]) -> list[Path]:
    """Return the scans among paths, or, where there is none, the pictures.

    Pictures beside scans are previews of them.
    """
    scans = [path for path in paths if find_reader(path) is not None]
    return [path for path in scans if has_spacing(path)] or scans


def is_scan(path: Path) -> bool:
    """Tell whether there is a file of a kind that is read, or a DICOM series, at a path."""
    return find_reader(path) is not None and (os.path.isfile(path) or is_series(path))


def find_scan(path: Path) -> Path:
    """Return the file that a path stands for: itself, or a file in its place.

    In place of a missing file that is its name in the other Unicode form (macOS writes accents
    apart, NFD); of a folder named like a scan, as some archives unpack, the only scan in it; of an
    .img its .hdr.
    """
    if not os.path.lexists(path):
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            path = other if os.path.lexists(other) else path
    if path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file():
        return path.with_suffix(".hdr")
    if strip_suffix(path.name) is not None and os.path.isdir(path):
        inside = keep_scans(entry for entry in sorted(path.iterdir()) if _is_visible_file(entry))
        return inside[0] if len(inside) == 1 else path
    return path


def _is_visible_file(path: Path) -> bool:
    """Tell whether a path is a file that is not hidden."""
    return not path.name.startswith(".") and os.path.isfile(path)


def list_scans(folder: Path) -> dict[str, Path]:
    """Return stem (in NFC) -> path of the scans in a folder; hidden and `._*` files are ignored.

    A folder or archive of DICOM is a scan; in a folder without any scan, pictures are.

    Raises:
        InputError: Two files have the same stem, or the slices of a series lie loose.
    """
    scans: dict[str, Path] = {}
    visible = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    refuse_loose_slices(folder, visible)
    names = {path: find_scan(path) for path in visible}
    halves = {path for path, scan in names.items() if scan != path and scan in names}
    for path in keep_scans(path for path, scan in names.items() if is_scan(scan)):
        stem = unicodedata.normalize("NFC", name_scan(path))
        if path in halves:
            continue
        if stem in scans:
            raise InputError(f"{folder}: {scans[stem].name} and {path.name} both; keep one of them")
        scans[stem] = names[path]
    return scans


def refuse_loose_slices(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse the slices of a series that lie among scans: each would be taken for a scan.

    Args:
        folder: Where they lie.
        paths: What lies there.

    Raises:
        InputError: Two are of one series, or one is damaged.
    """
    files = [path for path in paths if os.path.isfile(path) and is_dicom(path)]
    if len(files) < 2:
        return
    from medssl.formats.dicom import list_series  # heavy: only where there is DICOM

    series = [one for path in files for one in list_series(path) if one.is_image]
    if len({one.uid for one in series}) < len(series):
        raise InputError(
            f"{folder}: holds {len(series)} images of {len({one.uid for one in series})} DICOM "
            "series: put the slices of each scan into a folder of its own"
        )


def find_unread(folder: Path) -> list[str]:
    """Name what lies in a folder of scans and is not read: other formats, links to nothing."""
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        place = f"{folder.name}/{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not os.path.exists(path):
            problems.append(f"{place}: a link to {path.readlink()}, not there")
        elif explain_kind(path):
            problems.append(
                f"{place}: a scan of another kind than {KINDS}: {explain_kind(path)}, or move it "
                "elsewhere"
            )
        elif strip_suffix(path.name) is not None and not is_scan(find_scan(path)):
            problems.append(f"{place}: a folder that holds no scan or several: name one of them so")
    return problems


def guess_patient(case_id: str) -> str:
    """Return the patient that a case_id names (`sub-01_...`, `patient001_...`); empty if none."""
    match = _PATIENT.match(case_id)
    return match.group(1) if match else ""


def name_patients(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """Name the patients that no file name and no list has named.

    Series in DICOM of one patient by their headers get the case_id of the first of them, so that
    nothing of a header is shown; any other case counts as a patient of its own.

    Args:
        cases: An empty patient_id is to be filled.

    Returns:
        The cases, and a note on headers that tell no patients apart.
    """
    unnamed = sorted((case for case in cases if not case.patient_id), key=lambda c: c.case_id)
    patients = {case.case_id: case.case_id for case in unnamed}
    series = [case for case in unnamed if find_reader(case.images[0]) is DICOM]
    notes = []
    if len(series) > 1:
        from medssl.formats.dicom import group_by_patient  # heavy: only where there is DICOM

        first, unclear = group_by_patient([case.images[0] for case in series])
        patients |= {case.case_id: series[i].case_id for case, i in zip(series, first, strict=True)}
        if unclear:
            names = shorten((series[index].case_id for index in unclear), _NUM_SHOWN)
            notes.append(
                "the headers do not tell the patients of DICOM apart (PatientID is empty, a "
                f"placeholder, or one in all scans): {names}; "
                "each study counts as a patient of its own: make a list with the column patient_id "
                "if some are of one patient, or it may be trained on and another test"
            )
    return [replace(c, patient_id=c.patient_id or patients[c.case_id]) for c in cases], notes


def walk_files(root: Path, hidden: bool = False) -> list[Path]:
    """Return all files below a folder, sorted; and the folders that cannot be opened.

    A linked folder is read once, or not at all if the walk also reaches it without the link.

    Args:
        root: The folder.
        hidden: Whether to go into hidden folders and return hidden files.
    """
    files: list[Path] = []
    roots = [os.path.realpath(root)]

    def is_wanted(folder: str, name: str) -> bool:
        path = os.path.join(folder, name)
        if not hidden and name.startswith("."):
            return False
        if os.path.islink(path):
            target = os.path.realpath(path)
            if any(_is_within(target, other) or _is_within(other, target) for other in roots):
                return False
            roots.append(target)
        return True

    def add(error: OSError) -> None:
        files.append(Path(error.filename))

    for folder, folders, names in os.walk(root, onerror=add, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_wanted(folder, name)]
        files += [Path(folder, name) for name in sorted(names) if hidden or name[0] != "."]
    return files


def _is_within(path: str, folder: str) -> bool:
    """Tell whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def list_sources(path: Path) -> list[Path]:
    """Return the files that a scan is read from: itself, those of a series, or header and data."""
    folder, _ = split_series(path)
    if os.path.isdir(folder):
        return walk_files(folder)
    files = {folder}
    suffix = path.suffix.lower()
    if suffix in _PAIRS:
        files.update(other for other in path.parent.iterdir() if other.stem == path.stem)
    if suffix in _NAMING:
        names = (name.strip().replace("\\", "/") for name in _DATA_FILE.findall(_read_start(path)))
        files.update(path.parent / name for name in names)
    return sorted(file for file in files if file == folder or os.path.isfile(file))


def _read_start(path: Path) -> str:
    """Return what a file begins with as text; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_HEADER).decode("utf-8", "replace")
    except OSError:
        return ""


def hash_source(path: Path) -> str:
    """Return the SHA-256 of a scan: of its file, or of the hashes of its files.

    Raises:
        InputError: It cannot be read.
    """
    try:
        files = list_sources(path)
        if files == [path]:
            return hash_file(path)
        return hash_json([[file.name, hash_file(file)] for file in files])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): is it there?") from error


def walk_scans(root: Path, with_dicom: bool = True) -> list[Path]:
    """Return the scans below a folder: files, series of DICOM, and masks in DICOM; no previews.

    A series is its folder, if that holds no other image, else `FOLDER#UID`, or its one file.

    Raises:
        InputError: A DICOM file is damaged, or the packages that read DICOM are missing.
    """
    readers = {path: find_reader(path) for path in walk_files(root)}
    plain = {path for path, reader in readers.items() if reader not in (None, DICOM)}
    scans = [path for path in readers if path in plain and not _is_half(path, plain)]
    if with_dicom:
        others = [path for path in readers if path not in plain]
        scans += _walk_series(root, [path for path in others if readers[path] or is_dicom(path)])
    return keep_scans(scans)


def _is_half(path: Path, paths: Container[Path]) -> bool:
    """Tell whether a path is the .img of a .hdr that is there, which stands for both."""
    return path.suffix.lower() == ".img" and path.with_suffix(".hdr") in paths


def _walk_series(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return the series and masks of DICOM files below a folder, and the archives among them."""
    archives = [path for path in files if path.suffix.lower() == ".zip"]
    if len(archives) == len(files):
        return archives
    from medssl.formats.dicom import list_series  # heavy: only where there is DICOM

    series = list_series(root)
    counts = Counter(one.folder for one in series if one.is_image)
    scans = []
    for one in series:
        if one.is_image and counts[one.folder] == 1:
            scans.append(one.folder)
        elif one.is_image:
            scans.append(one.files[0] if len(one.files) == 1 else Path(f"{one.folder}#{one.uid}"))
        elif one.modality in ("SEG", "RTSTRUCT"):
            scans += one.files
    return [*scans, *archives]


def explain_files(root: Path, used: Iterable[Path]) -> list[str]:
    """Say of every file below a folder whether it is used, and if not, why, in groups.

    Args:
        root: The folder.
        used: The files that a data set reads.

    Returns:
        Lines: how many files are used, then one line a reason.
    """
    used = list(used)
    known = {os.path.realpath(file) for path in used for file in list_sources(path)}
    files = walk_files(root, hidden=True)
    reasons: dict[str, list[Path]] = defaultdict(list)
    has_scans = any(find_reader(path) is not None and has_spacing(path) for path in used)
    for path in files:
        if os.path.realpath(path) not in known:
            reasons[_explain_file(path, root, has_scans)].append(path)
    num_left = sum(map(len, reasons.values()))
    lines = [f"files below {root}: {len(files)}, of them {len(files) - num_left} used"]
    by_size = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, paths in by_size[:_NUM_SHOWN]:
        lines.append(f"  not used: {len(paths)} x {reason}: {_show_folders(paths, root)}")
    rest = [path for _, paths in by_size[_NUM_SHOWN:] for path in paths]
    if rest:
        lines.append(f"  not used: {len(rest)} x files of other kinds: {_show_folders(rest, root)}")
    return [escape_text(line) for line in lines]


def _explain_file(path: Path, root: Path, has_scans: bool) -> str:
    """Say why a file is not used."""
    parts = path.relative_to(root).parts
    if any(part.startswith(".") or part.lower() in _SYSTEM_FILES for part in parts):
        return "hidden or of the system"
    if not os.path.isfile(path):
        return "cannot be opened, or a link to what is not there"
    if strip_suffix(path.name) is not None:
        if has_scans and not has_spacing(path):
            return "pictures beside scans, taken for previews"
        return "scans that the layout or the list does not name"
    if is_dicom(path):
        return "DICOM that the layout or the list does not name"
    if explain_kind(path):
        return f"scans of a kind that is not read, {explain_kind(path)}"
    return f"no scans ({path.suffix.lower() or 'no suffix'})"


def _show_folders(paths: Sequence[Path], root: Path) -> str:
    """Show one file of each folder, and how many there are."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    texts = (
        _show(same[0], root) + (f" and {len(same) - 1} more there" if len(same) > 1 else "")
        for same in folders.values()
    )
    return shorten(texts, _NUM_SHOWN)


def is_mask(path: Path, root: Path) -> bool:
    """Tell whether a file is a mask by its name (`mask`, `*_seg`, ...) or that of a folder."""
    if find_reader(path) is DICOM and os.path.isfile(path):
        from medssl.formats.dicom import list_series  # heavy: only where there is DICOM

        return any(one.modality in ("SEG", "RTSTRUCT") for one in list_series(path))
    stem = name_scan(path)
    folders = relate(path, root).parts[:-1]
    return bool(_MASK_NAME.search(stem)) or any(_MASK_FOLDER.match(name) for name in folders)


def note_masks(images: Sequence[Path], suspects: Iterable[Path]) -> list[str]:
    """Name the scans that are masks by their names; where most are called so, these are no masks.

    Args:
        images: All scans of a data set or folder.
        suspects: Those of them that have no label.
    """
    masks = {path for path in images if _MASK_NAME.search(name_scan(path))}
    stems = {_bare_stem(path) for path in images if path not in masks}
    are_few = len(masks) < len(images) / 2
    names = [
        name_scan(path)
        for path in suspects
        if path in masks and (are_few or _bare_stem(path) in stems)
    ]
    return [
        f"read as scans, though by their names they are masks: {shorten(names, _NUM_SHOWN)}; move "
        "them out of the folder or list, or rename them if they are scans"
    ] * bool(names)


def note_crossed_labels(cases: Sequence[Case]) -> list[str]:
    """Name the cases whose label is called as the image of another case, and not as their own.

    So it is where the rows of two columns were sorted differently.
    """
    owners: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        for stem in {_bare_stem(path) for path in case.images} - {""}:
            owners[stem].append(case)

    def find_owners(case: Case) -> list[Case]:  # of the images that its label is called as
        return owners.get(_bare_stem(case.label), []) if case.label else []

    crossed = []
    for case in cases:
        others = find_owners(case)
        if any(other is case or other.label == case.label for other in others):
            continue
        if any(other not in find_owners(other) for other in others):  # sites may share names
            crossed.append(f"{case.case_id} ({case.label}, as {others[0].case_id})")
    return [
        f"labels that are called as the image of another case: {shorten(crossed, _NUM_SHOWN)}; "
        "correct the list, unless the names are misleading"
    ] * bool(crossed)


def recognize_tree(root: Path, scans: Sequence[Path]) -> tuple[list[Case], list[Path]]:
    """Group scans into cases by their names; returns the cases and the masks that fit to none.

    Where a name tells no patient, `patient_id` is empty: see `name_patients`.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    series = [path for path in scans if find_reader(path) is DICOM]
    for path in sorted(set(scans) - set(series)):
        folders[path.parent].append(path)
    images: list[Path] = []
    cases, masks = _pair_series(root, series)
    for folder, paths in folders.items():
        own_masks = [path for path in paths if is_mask(path, root)]
        own_images = sorted(set(paths) - set(own_masks))
        if _is_patient_folder(folder, root, own_images, own_masks):
            cases.append(_read_patient_folder(folder, root, own_images, own_masks))
        else:
            images += own_images
            masks += own_masks
    paired, masks = _match_by_stem(root, images, masks)
    cases, unmatched = _match_mirrored(root, cases + paired, masks)
    return sorted(cases, key=lambda case: case.case_id), unmatched


def _pair_series(root: Path, paths: Sequence[Path]) -> tuple[list[Case], list[Path]]:
    """Make cases of DICOM series and the masks that refer to them; returns the other masks too."""
    if not paths:
        return [], []
    from medssl.formats.segmentation import list_references  # heavy: only where there is DICOM

    masks = {path: list_references(path) for path in paths if is_mask(path, root)}
    cases = []
    for path in sorted(set(paths) - set(masks)):
        uids = list_references(path)
        ranked = sorted(masks, key=lambda mask: (-len(masks[mask] & uids), str(mask)))
        label = ranked[0] if ranked and masks[ranked[0]] & uids else None
        parts = [part for part in relate(path, root).parts if not _COMMON_FOLDER.match(part)]
        names = [name_scan(Path(part)).replace("#", "_").strip("_") for part in parts]
        names = names or [root.name]
        patient_id = names[0] if len(names) > 1 else guess_patient(names[0])
        cases.append(Case("_".join(names), (path,), label, patient_id))
    used = {case.label for case in cases}
    return cases, [mask for mask in masks if mask not in used]


def _is_patient_folder(
    folder: Path, root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> bool:
    """Tell whether the images of a folder are the channels of one scan."""
    named = folder != root and not _COMMON_FOLDER.match(folder.name)
    return named and 1 <= len(images) <= _MAX_CHANNELS and len(masks) <= 1


def _read_patient_folder(
    folder: Path, root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> Case:
    """Make one case of a folder."""
    parts = folder.relative_to(root).parts
    names = [name for name in parts if not _COMMON_FOLDER.match(name)]
    label = masks[0] if masks else None
    return Case("_".join(names), tuple(images), label, _guess_from_folders(names))


def _match_by_stem(
    root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> tuple[list[Case], list[Path]]:
    """Pair images and masks of the same name; the nearest folder wins."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        by_stem[_bare_stem(mask)].append(mask)
    cases, used = [], set()
    for stem, channels in _group_channels(images, set(by_stem)):
        image = channels[0]
        options = [mask for mask in by_stem.get(_bare_stem(image), []) if mask not in used]
        options.sort(key=lambda mask: (-len(os.path.commonpath([mask, image])), str(mask)))
        used.update(options[:1])
        cases.append(Case(stem, channels, options[0] if options else None, guess_patient(stem)))
    repeated = {name for name, count in Counter(c.case_id for c in cases).items() if count > 1}
    cases = [_name_by_path(case, root) if case.case_id in repeated else case for case in cases]
    return cases, [mask for mask in masks if mask not in used]


def _match_mirrored(
    root: Path, cases: Sequence[Case], masks: Sequence[Path]
) -> tuple[list[Case], list[Path]]:
    """Pair masks with cases whose folders they repeat below others, as BIDS has derivatives/.

    Only where one mask stands against one case: of two raters, or two structures, a person chooses.
    """
    by_folder: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in cases:
        by_folder[relate(case.images[0], root).parent.parts].append(case)
    candidates: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        parts = mask.parent.relative_to(root).parts
        tails = [parts[start:] for start in range(1, len(parts))]
        mirrored = next((by_folder[tail] for tail in tails if tail in by_folder), [])
        if len(mirrored) == 1 and mirrored[0].label is None:
            candidates[mirrored[0].case_id].append(mask)
    labels = {case_id: same[0] for case_id, same in candidates.items() if len(same) == 1}
    paired = [replace(case, label=labels.get(case.case_id, case.label)) for case in cases]
    return paired, [mask for mask in masks if mask not in labels.values()]


def _group_channels(images: Sequence[Path], masks: set[str]) -> list[tuple[str, tuple[Path, ...]]]:
    """Group `<case>_0000`, `<case>_0001`: channels where a mask is called <case>, or all agree."""
    groups: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for path in images:
        stem = name_scan(path)
        number = re.search(r"_\d{4}$", stem)
        groups[path.parent, stem[: number.start()] if number else stem][
            number.group() if number else ""
        ] = path
    sizes = Counter(len(group) for group in groups.values())
    cases = []
    for (_, stem), group in groups.items():
        is_whole = sorted(group) == [f"_{index:04d}" for index in range(len(group))]
        agrees = stem.lower() in masks or sizes[len(group)] > 1
        if 2 <= len(group) <= _MAX_CHANNELS and is_whole and agrees:
            cases.append((stem, tuple(path for _, path in sorted(group.items()))))
        else:
            cases += [(stem + number, (path,)) for number, path in group.items()]
    return cases


def _name_by_path(case: Case, root: Path) -> Case:
    """Name a case by its whole path, because its file name alone is not unique."""
    parts = relate(case.images[0], root).parts[:-1]
    case_id = "_".join((*parts, case.case_id))
    return replace(case, case_id=case_id, patient_id=_guess_from_folders(parts))


def _guess_from_folders(names: Sequence[str]) -> str:
    """Return the patient that folders name, from the outer one: else the outer one's name, if any.

    So `sub-01` wherever it lies, and of `sub-01_ses-1` and `sub-01_ses-2` one patient.
    """
    return next(filter(None, map(guess_patient, names)), names[0] if names else "")


def _bare_stem(path: Path) -> str:
    """Return a stem without mask words, image words and the separators around them."""
    stem = _MASK_NAME.sub("", name_scan(path))
    stem = re.sub(r"(?:^|[-_. ])(?:image|img|scan|volume)(?=$|[-_. ])|_0000$", "", stem, flags=re.I)
    return re.sub(r"[-_. ]+", "_", stem).strip("_").lower()


def describe_unknown(root: Path) -> str:
    """Describe a folder that is in no known layout; writes nothing.

    Returns:
        The lines to print: the tree as understood, and what to do next.
    """
    paths = walk_files(root)
    scans = walk_scans(root)
    others = [path for path in paths if find_reader(path) is None]
    lines = [f"{root}: this is none of the layouts that medssl reads."]
    if not paths:
        lines.append("The folder is empty (hidden files are not counted).")
    if scans:
        lines += _describe_scans(root, scans)
    lines += _describe_dicom(root, [path for path in paths if is_dicom(path)])
    if others and not scans:
        lines.append(f"It holds no scan that is read, {KINDS}.")
    lines += explain_files(root, scans)[1:]
    return "\n".join([*lines, _LAYOUTS])


_LAYOUTS = """Layouts that are read as they are:
  images/ labels/ [unlabeled/]                  scan and mask of the same name
  dataset.json imagesTr/ labelsTr/ [imagesTs/]  Medical Segmentation Decathlon, nnU-Net v2
  cases.csv                                     case_id,image[,image_1],label,patient_id,split"""


def _describe_scans(root: Path, scans: Sequence[Path]) -> list[str]:
    """Describe what was recognized, and say how a list is made of it."""
    cases, unmatched = recognize_tree(root, scans)
    cases, notes = name_patients(cases)
    num_masks = sum(case.label is not None for case in cases)
    num_patients = len({case.patient_id for case in cases})
    lines = [
        f"As understood by file names: {format_count(num_patients, 'patient')}, "
        f"{format_count(len(cases), 'case')}, {num_masks} with a mask"
    ]
    lines += [f"  {_describe_case(case, root)}" for case in cases[:_NUM_SHOWN]]
    if len(cases) > _NUM_SHOWN:
        lines.append(f"  ... and {len(cases) - _NUM_SHOWN} more")
    if unmatched:
        names = shorten((_show(mask, root) for mask in unmatched), _NUM_SHOWN)
        lines.append(f"Masks that fit to no scan: {names}")
    counts = Counter(len(case.images) for case in cases)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [f"{c.case_id} ({len(c.images)})" for c in cases if len(c.images) != usual]
        lines.append(
            f"Most cases have {format_count(usual, 'image')}, but not: {shorten(odd, _NUM_SHOWN)}"
        )
    lines += [*_describe_channels([case for case in cases if len(case.images) > 1]), *notes]
    if not cases:
        return lines
    draft = shlex.quote(f"{root.resolve().name}_cases.csv")
    return [
        *lines,
        "For a draft list of this to look through and mend:",
        f"  medssl check {shlex.quote(str(root))} --draft {draft}",
    ]


def _describe_channels(cases: Sequence[Case]) -> list[str]:
    """Name the cases whose files of a column are called otherwise than in most cases."""
    lines = []
    for index in range(max((len(case.images) for case in cases), default=0)):
        names = {
            case.case_id: _name_channel(case, index) for case in cases if index < len(case.images)
        }
        usual = Counter(names.values()).most_common(1)[0][0]
        odd = [f"{name} in {case_id}" for case_id, name in names.items() if name != usual]
        if odd and len(odd) < len(names) / 2:
            column = f"image_{index}" if index else "image"
            lines.append(
                f"Column {column} is {usual} in most cases, but {shorten(odd, _NUM_SHOWN)}"
            )
    return lines


def _name_channel(case: Case, index: int) -> str:
    """Return what the name of an image says beside its case."""
    name = strip_suffix(case.images[index].name) or case.images[index].name
    for known in (case.case_id, case.patient_id):
        name = name.replace(known, "")
    return name.strip("-_. ").lower()


def write_draft(root: Path, file: Path) -> str:
    """Write a list of what the file names of a folder suggest, to be mended by a person.

    Args:
        root: The folder.
        file: The CSV; its paths are relative to its folder where they lie below it.

    Returns:
        The lines to print.

    Raises:
        InputError: The file is there already or is no CSV, or the folder holds no scan.
    """
    if file.suffix.lower() != ".csv" or os.path.lexists(file):
        what = "is there already" if os.path.lexists(file) else "does not end in .csv"
        raise InputError(f"--draft {file}: {what}; name a new .csv file")
    if not file.absolute().parent.is_dir():
        raise InputError(f"--draft {file}: there is no folder {file.parent}; make it first")
    if not root.is_dir():
        raise InputError(f"{root}: is no folder; --draft makes a list of the scans in a folder")
    cases, _ = recognize_tree(root, walk_scans(root))
    if not cases:
        raise InputError(f"{root}: holds no scan that is read, {KINDS}: there is nothing to list")
    cases, notes = name_patients(cases)
    num_channels = max(len(case.images) for case in cases)
    columns = ["image", *(f"image_{index}" for index in range(1, num_channels))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", *columns, "label", "patient_id", "split"])
    for case in cases:
        images = [_path_from(file.parent, path) for path in case.images]
        images += [""] * (num_channels - len(images))
        label = _path_from(file.parent, case.label) if case.label else ""
        writer.writerow([case.case_id, *images, label, case.patient_id, ""])
    with file.open("x", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        stream.write(text.getvalue())
    return (
        f"a draft of {format_count(len(cases), 'case')} was written: {file}\n"
        "Look through it, mend what is wrong (label empty = unlabeled; patient_id keeps scans of\n"
        "one patient together; split may be empty, labeled, unlabeled, val or test), then run:\n"
        f"  medssl check {shlex.quote(str(file))}" + "".join(f"\nnote: {note}" for note in notes)
    )


def _path_from(folder: Path, path: Path) -> str:
    """Return a path relative to a folder if it lies below it, else the absolute one."""
    absolute, start = path.absolute(), folder.absolute()
    return str(absolute.relative_to(start) if absolute.is_relative_to(start) else absolute)


def _describe_dicom(root: Path, files: Sequence[Path]) -> list[str]:
    """List the DICOM series of a tree."""
    if not files:
        return []
    from medssl.formats.dicom import list_series  # heavy: only where there is DICOM

    series = list_series(root)
    lines = [f"DICOM: {format_count(len(files), 'file')} of {len(series)} series:"]
    lines += [f"  {one} in {_show(one.folder, root)}" for one in series[:_NUM_SHOWN]]
    if len(series) > _NUM_SHOWN:
        lines.append(f"  ... and {len(series) - _NUM_SHOWN} more")
    return lines


def _describe_case(case: Case, root: Path) -> str:
    """Return one line: a case, its images and its mask."""
    images = " + ".join(_show(path, root) for path in case.images)
    return f"{case.case_id}: {images}" + (
        f"  mask {_show(case.label, root)}" if case.label else "  no mask"
    )


def _show(path: Path, root: Path) -> str:
    """Return a path relative to the root, `.` for the root itself."""
    return str(relate(path, root))


def relate(path: Path, root: Path) -> Path:
    """Return a path as it lies below a folder; of a series in the folder itself `#UID` is left."""
    text = str(path)
    return (
        Path(text.removeprefix(str(root)))
        if text.startswith(f"{root}#")
        else path.relative_to(root)
    )
