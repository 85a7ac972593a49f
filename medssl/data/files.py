"""What file names alone say: stems, patients, masks, DICOM, and a draft list of an unknown tree."""

import csv
import io
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.config import InputError

SUFFIXES = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_DICOM = (".dcm", ".dicom", ".ima")
_OTHER_SCANS = (
    *(".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".gipl", ".gipl.gz", ".img", ".hdr"),
    *(".npy", ".npz", ".nii.zip", ".bmp", ".gif", ".webp"),
    *_DICOM,
)
KINDS = "NIfTI (.nii, .nii.gz), PNG, JPEG or TIFF"

_MASK_WORD = (
    "(?:labels?|lbl|masks?|seg|segs|segm|segmentations?|gt|groundtruth|annotations?|rois?|manual)"
)
_MASK_NAME = re.compile(rf"(?:^|(?<=[^a-z0-9])){_MASK_WORD}(?=$|[^a-z0-9])", re.IGNORECASE)
_MASK_FOLDER = re.compile(rf"^{_MASK_WORD}(?:tr|ts)?$", re.IGNORECASE)
_COMMON_FOLDER = re.compile(
    r"^(?:images?|imgs?|scans?|volumes?|data|nifti|raw|cases?|labeled|unlabeled|"
    r"train(?:ing)?|val(?:idation)?|test(?:ing)?)(?:tr|ts)?$",
    re.IGNORECASE,
)
_PATIENT = re.compile(r"^(sub-[A-Za-z0-9]+|(?:patient|subject|pat)[-_]?\d+)(?=[-_.]|$)", re.I)
_MAX_CHANNELS = 8  # a folder with more images than this holds several cases
_NUM_SHOWN = 12


def strip_suffix(name: str) -> str | None:
    """Return a file name without the suffix of a scan or picture, or None for other files."""
    for suffix in (*SUFFIXES, *PICTURES):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


def is_picture(path: Path) -> bool:
    """Tell whether a file is a PNG, JPEG or TIFF by its name: a picture, without spacing."""
    return path.suffix.lower() in PICTURES


def name_mask_suffix(image: Path) -> str:
    """Return the suffix of a mask of an image: its own format, PNG for a JPEG, .nii.gz for NIfTI.

    A JPEG would change the values of a mask.
    """
    if not is_picture(image):
        return SUFFIXES[0]
    is_tiff = image.suffix.lower() in (".tif", ".tiff")
    return image.suffix.lower() if is_tiff else ".png"


def keep_scans(paths: Iterable[Path]) -> list[Path]:
    """Return the NIfTI files among files, or, where there is none, the pictures.

    Pictures beside NIfTI files are previews of them.
    """
    scans = [path for path in paths if strip_suffix(path.name) is not None]
    return [path for path in scans if not is_picture(path)] or scans


def list_scans(folder: Path) -> dict[str, Path]:
    """Return stem -> path of the scans in a folder; hidden and `._*` files are ignored.

    Scans are NIfTI files or, in a folder without one, pictures.

    Raises:
        InputError: Two files have the same stem.
    """
    found: dict[str, Path] = {}
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.is_file()]
    for path in keep_scans(files):
        stem = strip_suffix(path.name) or path.name
        if stem in found:
            raise InputError(f"{folder}: {found[stem].name} and {path.name} both; keep one of them")
        found[stem] = path
    return found


def find_unread(folder: Path) -> list[str]:
    """Name what lies in a folder of scans and is not read: other formats, links to nothing."""
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            problems.append(f"{folder.name}/{path.name}: a link to {path.readlink()}, not there")
        elif path.name.lower().endswith(_OTHER_SCANS):
            problems.append(
                f"{folder.name}/{path.name}: a scan of another kind than {KINDS}: convert it, or "
                "move it elsewhere"
            )
    return problems


def guess_patient(case_id: str) -> str:
    """Return the patient that a case_id names (`sub-01_...`, `patient001_...`), else itself."""
    match = _PATIENT.match(case_id)
    return match.group(1) if match else case_id


def walk_files(root: Path) -> list[Path]:
    """Return all files below a folder, sorted, without hidden files and folders."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    return found


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM: by `.dcm`, or by the magic word at byte 128."""
    if path.suffix.lower() in _DICOM:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_mask(path: Path, root: Path) -> bool:
    """Tell whether a file is a mask by its name (`mask`, `*_seg`, ...) or that of a folder."""
    stem = strip_suffix(path.name) or path.name
    folders = path.relative_to(root).parts[:-1]
    return bool(_MASK_NAME.search(stem)) or any(_MASK_FOLDER.match(name) for name in folders)


@dataclass(frozen=True)
class Found:
    """One case as its names suggest it; a draft to be confirmed by a person."""

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    label: Path | None


def recognize_tree(root: Path, scans: Sequence[Path]) -> tuple[list[Found], list[Path]]:
    """Group scans into cases by their names; returns the cases and the masks that fit to none."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in scans:
        folders[path.parent].append(path)
    cases, images, masks = [], [], []
    for folder, paths in folders.items():
        own_masks = [path for path in paths if is_mask(path, root)]
        own_images = [path for path in paths if path not in own_masks]
        if _is_patient_folder(folder, root, own_images, own_masks):
            cases.append(_read_patient_folder(folder, root, own_images, own_masks))
        else:
            images += own_images
            masks += own_masks
    paired, unmatched = _match_by_stem(root, images, masks)
    return sorted(cases + paired, key=lambda case: case.case_id), unmatched


def _is_patient_folder(
    folder: Path, root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> bool:
    """Tell whether the images of a folder are the channels of one scan."""
    named = folder != root and not _COMMON_FOLDER.match(folder.name)
    return named and 1 <= len(images) <= _MAX_CHANNELS and len(masks) <= 1


def _read_patient_folder(
    folder: Path, root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> Found:
    """Make one case of a folder."""
    parts = folder.relative_to(root).parts
    names = [name for name in parts if not _COMMON_FOLDER.match(name)]
    return Found("_".join(names), names[0], tuple(images), masks[0] if masks else None)


def _match_by_stem(
    root: Path, images: Sequence[Path], masks: Sequence[Path]
) -> tuple[list[Found], list[Path]]:
    """Pair images and masks of the same name; the nearest folder wins."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        by_stem[_bare_stem(mask)].append(mask)
    cases, used = [], set()
    for image in images:
        stem = strip_suffix(image.name) or image.name
        options = [mask for mask in by_stem.get(_bare_stem(image), []) if mask not in used]
        options.sort(key=lambda mask: (-len(os.path.commonpath([mask, image])), str(mask)))
        used.update(options[:1])
        cases.append(Found(stem, guess_patient(stem), (image,), options[0] if options else None))
    repeated = {name for name, count in Counter(c.case_id for c in cases).items() if count > 1}
    cases = [_name_by_path(case, root) if case.case_id in repeated else case for case in cases]
    return cases, [mask for mask in masks if mask not in used]


def _name_by_path(case: Found, root: Path) -> Found:
    """Name a case by its whole path, because its file name alone is not unique."""
    parts = case.images[0].relative_to(root).parts[:-1]
    case_id = "_".join((*parts, case.case_id))
    return Found(case_id, guess_patient(parts[0]) if parts else case_id, case.images, case.label)


def _bare_stem(path: Path) -> str:
    """Return a stem without mask words, image words and the separators around them."""
    stem = _MASK_NAME.sub("", strip_suffix(path.name) or path.name)
    stem = re.sub(r"(?:^|[-_. ])(?:image|img|scan|volume)(?=$|[-_. ])|_0000$", "", stem, flags=re.I)
    return re.sub(r"[-_. ]+", "_", stem).strip("_").lower()


def describe_unknown(root: Path) -> str:
    """Describe a folder that is in no known layout, and write a draft list of it to edit.

    The draft is written to the current folder as `<folder name>_cases.csv`; an existing file of
    other content is never overwritten.

    Returns:
        The lines to print: the tree as understood, and what to do next.
    """
    paths = walk_files(root)
    scans = keep_scans(paths)
    others = [path for path in paths if strip_suffix(path.name) is None]
    lines = [f"{root}: this is none of the layouts that medssl reads."]
    if not paths:
        lines.append("The folder is empty (hidden files are not counted).")
    if scans:
        lines += _describe_scans(root, scans)
    dicom = [path for path in others if is_dicom(path)]
    lines += _describe_dicom(root, dicom)
    if others and not scans and not dicom:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))
        lines.append(f"It holds no scan that is read, {KINDS}: {counts}.")
    return "\n".join([*lines, _LAYOUTS])


_LAYOUTS = """Layouts that are read as they are:
  images/ labels/ [unlabeled/]                  scan and mask of the same name
  dataset.json imagesTr/ labelsTr/ [imagesTs/]  Medical Segmentation Decathlon, nnU-Net v2
  cases.csv                                     case_id,image[,image_1],label,patient_id,split"""


def _describe_scans(root: Path, scans: Sequence[Path]) -> list[str]:
    """Describe what was recognized, and write the draft."""
    cases, unmatched = recognize_tree(root, scans)
    num_masks = sum(case.label is not None for case in cases)
    num_patients = len({case.patient_id for case in cases})
    lines = [
        f"As understood by file names: {_count(num_patients, 'patient')}, "
        f"{_count(len(cases), 'case')}, {num_masks} with a mask"
    ]
    lines += [f"  {_describe_case(case, root)}" for case in cases[:_NUM_SHOWN]]
    if len(cases) > _NUM_SHOWN:
        lines.append(f"  ... and {len(cases) - _NUM_SHOWN} more")
    if unmatched:
        lines.append("Masks that fit to no scan: " + _join(_show(m, root) for m in unmatched))
    counts = Counter(len(case.images) for case in cases)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [f"{c.case_id} ({len(c.images)})" for c in cases if len(c.images) != usual]
        lines.append(f"Most cases have {_count(usual, 'image')}, but not: {_join(odd)}")
    lines += _describe_channels([case for case in cases if len(case.images) > 1])
    return lines + _describe_draft(root, cases) if cases else lines


def _describe_channels(cases: Sequence[Found]) -> list[str]:
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
            lines.append(f"Column {column} is {usual} in most cases, but {_join(odd)}")
    return lines


def _name_channel(case: Found, index: int) -> str:
    """Return what the name of an image says beside its case."""
    name = strip_suffix(case.images[index].name) or case.images[index].name
    for known in (case.case_id, case.patient_id):
        name = name.replace(known, "")
    return name.strip("-_. ").lower()


def _describe_draft(root: Path, cases: Sequence[Found]) -> list[str]:
    """Write the draft list and say how to use it."""
    try:
        draft = write_draft(cases, root.resolve().name)
    except OSError as error:
        return [f"No draft list was written to the current folder: {error}"]
    return [
        f"A draft list was written: {draft}",
        "  Look through it, mend what is wrong (label empty = unlabeled; patient_id keeps scans of",
        "  one patient together; split may be empty, labeled, unlabeled, val or test), then run:",
        f"  medssl check {shlex.quote(draft)}",
    ]


def write_draft(cases: Sequence[Found], name: str) -> str:
    """Write `<name>_cases.csv` to the current folder under a free name and return that name."""
    num_channels = max(len(case.images) for case in cases)
    columns = ["image", *(f"image_{index}" for index in range(1, num_channels))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", *columns, "label", "patient_id", "split"])
    for case in cases:
        images = [_path_from_here(path) for path in case.images]
        images += [""] * (num_channels - len(images))
        label = _path_from_here(case.label) if case.label else ""
        writer.writerow([case.case_id, *images, label, case.patient_id, ""])
    number = 1
    while True:
        path = Path(f"{name}_cases{'' if number == 1 else f'_{number}'}.csv")
        try:
            with path.open("x", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
            return str(path)
        except FileExistsError:
            if path.is_file() and path.read_bytes() == text.getvalue().encode():
                return str(path)
            number += 1


def _path_from_here(path: Path) -> str:
    """Return a path relative to the current folder if it lies below it, else the absolute one."""
    absolute = path.absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def _describe_dicom(root: Path, dicom: Sequence[Path]) -> list[str]:
    """Return the lines that convert DICOM series."""
    if not dicom:
        return []
    folders = sorted({path.parent for path in dicom})
    out = f"{root.resolve().name}_nifti"
    return [
        f"DICOM: {_count(len(dicom), 'file')} in {_count(len(folders), 'folder')} "
        f"({_join(_show(folder, root) for folder in folders)}). Convert first:",
        f"  mkdir -p {shlex.quote(out)} && "
        f"dcm2niix -z y -o {shlex.quote(out)} {shlex.quote(str(root))}",
        f"  then: medssl check {shlex.quote(out)}",
    ]


def _describe_case(case: Found, root: Path) -> str:
    """Return one line: a case, its images and its mask."""
    images = " + ".join(_show(path, root) for path in case.images)
    return f"{case.case_id}: {images}" + (
        f"  mask {_show(case.label, root)}" if case.label else "  no mask"
    )


def _show(path: Path, root: Path) -> str:
    """Return a path relative to the root, `.` for the root itself."""
    return str(path.relative_to(root))


def _join(items: Iterable[str]) -> str:
    """Join items by commas, the first twelve of them."""
    shown = list(items)
    more = [f"... {len(shown) - _NUM_SHOWN} more"] if len(shown) > _NUM_SHOWN else []
    return ", ".join(shown[:_NUM_SHOWN] + more)


def _count(number: int, noun: str) -> str:
    """Return `1 case`, `2 cases`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
