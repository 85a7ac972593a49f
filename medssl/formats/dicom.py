"""DICOM images in: a scan is one series of a folder, a tree or a ZIP archive.

Legend: I counts the columns of a slice from the left, J its rows from the top, K the slices along
the normal of their plane (rows x columns), whatever the order of the files; so I, J, K is
right-handed in the coordinates of DICOM, as in ITK.

A series is a scan if its slices lie one behind the other at one distance. Everything else is
refused with the place, since a volume could only be made of it by inventing or dropping something.
Values are those of the modality: stored values by the rescale slope and intercept (or the lookup
table) of each slice or frame, such as Hounsfield units. The geometry is read from the headers
alone and pixels are decoded slice by slice, so no more than one file is in memory.

No name, date or number of a patient leaves this module, in messages and records neither.

Source: DICOM PS3.3, C.7.6.2 (image plane), C.7.6.16 (functional groups), C.11.1 (modality LUT).
"""

import functools
import importlib
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats.readers import PLACEHOLDER, START, split_series, starts_dicom
from medssl.formats.scan import Result, Scan, check_place, guard, keep_quiet
from medssl.transforms.geometry import MAX_SHEAR, Affine, Header, Shape

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's world points to the left and to the back of the patient."""

Place = Path | zipfile.Path
"""A file, or a member of an archive."""

Source = TypeVar("Source", Path, Place)
Arguments = ParamSpec("Arguments")

_EXTRA = "pip install 'medssl[dicom]'"
_EQUAL = 1e-3  # by which two direction cosines, or two spacings as a share, may differ
_UNEVEN = 0.01  # share of a step, and mm, by which two steps may differ: positions are rounded
_CROOKED = 0.1  # pixels by which a slice may lie off the line of the stack
_UNPLACED = "it does not say where it lies (no ImagePositionPatient)"
_LISTED = 30  # series in a message
_DIFFERING = (  # what tells images at one position apart
    *("EchoTime", "EffectiveEchoTime", "TemporalPositionIdentifier", "TemporalPositionIndex"),
    *("TriggerTime", "DiffusionBValue", "NominalPercentageOfCardiacPhase", "FlipAngle"),
    *("AcquisitionNumber", "ConvolutionKernel"),
)
_GROUPS = {  # where a file of several frames keeps what others have at their top
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRDiffusionSequence": ("DiffusionBValue",),
    "FrameContentSequence": ("TemporalPositionIndex",),
}
_FIELDS = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("GantryDetectorTilt", *_DIFFERING),
)
_MOST_PIXELS = {  # by the beginning of a transfer syntax: pixels that a byte can stand for
    "1.2.840.10008.1.2.5": 64,  # RLE
    "1.2.840.10008.1.2.4.8": 2**18,  # JPEG-LS
    "1.2.840.10008.1.2.4.9": 2**18,  # JPEG 2000
    "1.2.840.10008.1.2.4.20": 2**18,  # JPEG 2000, high throughput
    "1.2.840.10008.1.2.4": 512,  # JPEG: blocks of 64 pixels of at least one bit
}
_TAGS = (
    *("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "PatientName"),
    "StudyInstanceUID",
    *("SeriesDescription", "PatientID", "ImageType", "Rows", "Columns", "NumberOfFrames"),
    "SamplesPerPixel",
    *("PhotometricInterpretation", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", *_FIELDS),
)


class Series(NamedTuple):
    """What a tree holds under one SeriesInstanceUID.

    Attributes:
        uid: SeriesInstanceUID.
        modality: Such as CT; empty if the header does not say.
        description: SeriesDescription, without the words of the patient's name and number.
        num_images: Images, or frames; of a series that is no image, files.
        shape: Columns, rows and number of images; None if it is no image.
        other: Why the series is no image, such as `a segmentation`; empty if it is one.
        folder: Where the first of its files lies.
        files: All of its files; of an archive, that.
    """

    uid: str
    modality: str
    description: str
    num_images: int
    shape: Shape | None
    other: str
    folder: Path
    files: tuple[Path, ...]

    @property
    def is_image(self) -> bool:
        """Whether the series may be a scan."""
        return not self.other

    def __str__(self) -> str:
        """The line of a list."""
        size = " x ".join(map(str, self.shape or ())) or f"{self.num_images} files"
        other = f", no image: {self.other}" if self.other else ""
        return f"{self.uid}  {self.modality or '?'} {self.description!r} {size}{other}"


class Plane(NamedTuple):
    """A slice: one image, or one frame of a file.

    Attributes:
        place: The file.
        frame: Index of the frame in it, from 0.
        instance: SOPInstanceUID.
        frame_of_reference: FrameOfReferenceUID; empty if there is none.
        position: Center of the first pixel (3,), LPS in mm.
        directions: Unit vectors (2, 3) along a row (I) and along a column (J), LPS.
        spacing: Distance of pixels along I and J in mm.
        shape: Columns and rows.
        thickness: Distance of slices that the header gives, in mm; 0 if it gives none.
        rescale: Slope and intercept of the stored values; None if a lookup table has them.
        has_rescale: Whether the header gives both, or the table.
        modality: Such as CT; empty if the header does not say.
        notes: Further fields of the header, for messages.
    """

    place: Place
    frame: int
    instance: str
    frame_of_reference: str
    position: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    thickness: float
    rescale: tuple[float, float] | None
    has_rescale: bool
    modality: str
    notes: dict[str, str]

    @property
    def normal(self) -> NDArray[np.float64]:
        """The unit vector (3,) along K."""
        return np.cross(*self.directions)


def load_package(name: str) -> Any:
    """Import a package of the extra `dicom`.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"DICOM needs the package {name.split('.')[0]} ({error}): {_EXTRA}"
        ) from error


def guard_dicom(place: Place, read: Callable[[], Result]) -> Result:
    """Run a read; whatever pydicom raises of a damaged file becomes an InputError that names it."""

    def attempt() -> Result:
        try:
            return read()
        except (InputError, MemoryError, OSError):
            raise
        except Exception as error:  # of all kinds, also late, as the fields are converted
            raise InputError(
                f"{place}: cannot be read as DICOM ({type(error).__name__}): the file is damaged "
                "or incomplete, copy it again"
            ) from error

    return guard(Path(str(place)), attempt)


def refuse_damaged(
    read: Callable[Concatenate[Source, Arguments], Result],
) -> Callable[Concatenate[Source, Arguments], Result]:
    """Make a function of a path quiet, and whatever pydicom raises in it an InputError.

    pydicom converts a field when it is asked for, so a damaged one is found anywhere.
    """

    @functools.wraps(read)
    def attempt(source: Source, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with keep_quiet():
            return guard_dicom(source, lambda: read(source, *args, **kwargs))

    return attempt


@refuse_damaged
def list_series(path: Path) -> list[Series]:
    """Return the series of a folder and all below it, of an archive, or of a file.

    Files that are not DICOM are skipped.

    Raises:
        InputError: The path does not exist, or a DICOM file is damaged.
    """
    return [_describe(group) for group in _read_headers(path).values()]


@refuse_damaged
def read_modality(path: Path) -> str:
    """Return the modality of the first image of a series, such as CT; empty if there is none.

    Raises:
        InputError: There is no such file or folder, or a file before the image is damaged.
    """
    return str(_read_first(path).get("Modality") or "")


def group_by_patient(paths: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Say which series are of one patient, by PatientID, or else by StudyInstanceUID.

    What stands in all headers, or in the place of a number (`ANON`), tells no patients apart.
    Damaged files, which are refused where they are read, say nothing either.

    Args:
        paths: Two series or more, as for `open_scan`.

    Returns:
        For each series the index of the first one of its patient; and the indices of those whose
        PatientID says nothing.
    """
    ids = []
    for path in paths:
        try:
            ids.append(_read_ids(path))
        except InputError:
            ids.append(("", ""))
    patients, studies = (_keep_telling(column) for column in zip(*ids, strict=True))
    groups: dict[tuple[str, object], int] = {}
    first = []
    for index, (patient, study) in enumerate(zip(patients, studies, strict=True)):
        key = ("patient", patient) if patient else ("study", study or index)
        first.append(groups.setdefault(key, index))
    return first, [index for index, patient in enumerate(patients) if not patient]


@refuse_damaged
def _read_ids(path: Path) -> tuple[str, str]:
    """Return PatientID and StudyInstanceUID of a series, empty where there is none."""
    header = _read_first(path)
    return str(header.get("PatientID") or ""), str(header.get("StudyInstanceUID") or "")


def _keep_telling(ids: Sequence[str]) -> list[str]:
    """Return ids for comparison, empty where they tell no patients apart."""
    folded = [one.strip(" \0").casefold() for one in ids]
    is_shared = len(set(folded)) == 1
    return ["" if is_shared or PLACEHOLDER.fullmatch(one) else one for one in folded]


def open_scan(path: Path) -> Scan:
    """Open the one image series of a folder or archive, or the one named by `PATH#UID`.

    Args:
        path: A folder, a ZIP archive or a file; a `#` and the beginning of a SeriesInstanceUID may
            follow.

    Raises:
        InputError: There is no image series or several, or its slices are not an even stack.
    """
    planes, affine = read_planes(path)
    shape = (*planes[0].shape, len(planes))
    check_place(path, shape, affine, "mm")
    header: Header = {
        "format": "dicom",
        "path": str(path.absolute()),
        "shape": list(shape),
        "frame_of_reference": planes[0].frame_of_reference,
        "instances": list(dict.fromkeys(plane.instance for plane in planes)),
    }
    if any(plane.modality == "CT" and not plane.has_rescale for plane in planes):
        header["contradictions"] = {"values": ""}
    return Scan(shape, affine, 1, partial(_iterate_values, planes), header)


@refuse_damaged
def read_planes(path: Path) -> tuple[list[Plane], Affine]:
    """Return the slices of a series in the order of K, and their affine (4, 4) to RAS+ mm.

    Raises:
        InputError: As `open_scan`.
    """
    group = _choose_series(path, _read_headers(path))
    _refuse_unplaced(path, group)
    _refuse_damaged(path, group)
    planes = [
        plane
        for place, header in group
        if not _name_other(header)
        for plane in guard_dicom(place, partial(find_planes, place, header))
    ]
    return _stack(path, planes)


@refuse_damaged
def read_fields(place: Place, *names: str) -> Any:
    """Read some fields of a DICOM file, and pass over all others.

    Raises:
        InputError: It is damaged.
    """
    return _read(place, stop_before_pixels=True, specific_tags=list(names))


@refuse_damaged
def read_dataset(place: Place, *, with_pixels: bool) -> Any:
    """Read a DICOM file whole, or without its pixels.

    Raises:
        InputError: It is damaged.
    """
    dataset = _read(place, stop_before_pixels=not with_pixels)
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None:  # older than the file format, or written without it
        is_implicit, is_little = dataset.original_encoding
        end = "Little" if is_little else "Big"
        name = f"{'Implicit' if is_implicit else 'Explicit'}VR{end}Endian"
        dataset.file_meta.TransferSyntaxUID = getattr(load_package("pydicom.uid"), name)
    return dataset


# ---------------------------------------------------------------- files and series


def _list_files(path: Path) -> list[Place]:
    """Return all files at a path, hidden ones aside."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        below = [file for file in files if not file.name.startswith(".")]
        return sorted(below, key=lambda file: _order(str(file)))
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if not zipfile.is_zipfile(path):
        return [path]
    archive = zipfile.ZipFile(path)
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)|/$")
    names = [name for name in archive.namelist() if not hidden.search(name)]
    return [zipfile.Path(archive, name) for name in sorted(names, key=_order)]


def _order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts 2.dcm before 10.dcm."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", name)]


def _is_dicom(place: Place) -> bool:
    """Tell whether a file is DICOM, with or without the preamble, by its first bytes."""
    try:
        with place.open("rb") as file:
            return starts_dicom(file.read(START))
    except (RuntimeError, NotImplementedError) as error:  # has a password, or is packed strangely
        raise InputError(f"{place}: cannot be unpacked ({error}): unpack the archive") from error


def _read(place: Place, **options: Any) -> Any:
    """Read a file by pydicom."""
    pydicom = load_package("pydicom")

    def read() -> Any:
        with place.open("rb") as file:
            return pydicom.dcmread(file, force=True, **options)

    return guard_dicom(place, read)


def _iterate_headers(path: Path) -> Iterator[tuple[Place, Any]]:
    """Yield all DICOM files at a path, whatever their series, with their headers."""
    path, _ = split_series(path)
    for place in guard(path, partial(_list_files, path)):
        if guard_dicom(place, partial(_is_dicom, place)):
            yield place, _read(place, stop_before_pixels=True, specific_tags=list(_TAGS))


def _read_headers(path: Path) -> dict[str, list[tuple[Place, Any]]]:
    """Return the headers of all DICOM files at a path, by SeriesInstanceUID."""
    groups = defaultdict(list)
    for place, header in _iterate_headers(path):
        if "SeriesInstanceUID" in header or "Rows" in header:
            groups[str(header.get("SeriesInstanceUID", ""))].append((place, header))
    return dict(groups)


def _read_first(path: Path) -> Any:
    """Return the header of the first image of a series; empty if there is none.

    A UID that another one begins with is its own series all the same.
    """
    _, uid = split_series(path)
    first: Any = {}
    for _, header in _iterate_headers(path):
        name = str(header.get("SeriesInstanceUID", ""))
        if name.startswith(uid) and not _name_other(header):
            if uid in ("", name):
                return header
            first = first or header
    return first


def _name_other(header: Any) -> str:
    """Say what a file is if it is no slice of a scan; empty if it is."""
    modality = header.get("Modality", "")
    others = {"SEG": "a segmentation", "RTDOSE": "a dose"}
    if modality in others or "Rows" not in header or "Columns" not in header:
        return others.get(modality, f"it has no pixels ({modality or 'no modality'})")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "a localizer"
    if "MOSAIC" in (header.get("ImageType") or ()):
        return "a mosaic of slices (convert it with dcm2niix)"
    if header.get("SamplesPerPixel", 1) != 1 or "MONO" not in header.get(
        "PhotometricInterpretation", "MONOCHROME2"
    ):
        return "in color"
    if "ImagePositionPatient" not in header and "PerFrameFunctionalGroupsSequence" not in header:
        return _UNPLACED
    return ""


def _describe(group: Sequence[tuple[Place, Any]]) -> Series:
    """Return what a list says of a series."""
    images = [header for _, header in group if not _name_other(header)]
    place, first = group[0] if not images else next(p for p in group if p[1] is images[0])
    count = sum(int(image.get("NumberOfFrames") or 1) for image in images)
    folder = _find_file(place) if isinstance(place, zipfile.Path) else place.parent
    private = f"{first.get('PatientName', '')} {first.get('PatientID', '')}"
    words = [re.escape(word) for word in re.split(r"[\W_]+", private) if len(word) > 2]
    description = str(first.get("SeriesDescription") or "")
    if words:
        description = re.sub("|".join(words), "...", description, flags=re.IGNORECASE)
    return Series(
        str(first.get("SeriesInstanceUID", "")),
        str(first.get("Modality") or ""),
        description,
        count or len(group),
        (int(first.Columns), int(first.Rows), count) if images else None,
        "" if images else _name_other(first),
        folder,
        tuple(dict.fromkeys(_find_file(place) for place, _ in group)),
    )


def _find_file(place: Place) -> Path:
    """Return a file, or the archive that it is a member of."""
    return Path(str(place.root.filename)) if isinstance(place, zipfile.Path) else place


def _choose_series(
    path: Path, groups: dict[str, list[tuple[Place, Any]]]
) -> list[tuple[Place, Any]]:
    """Return the files of the series that a path names, or of the only one with images."""
    source, uid = split_series(path)
    listed = [_describe(group) for group in groups.values()]
    lines = "".join(f"\n  {series}" for series in listed[:_LISTED])
    if len(listed) > _LISTED:
        lines += f"\n  and {len(listed) - _LISTED} more"
    matching = [series for series in listed if series.uid.startswith(uid)]
    images = [series for series in matching if series.is_image]
    exact = [series for series in matching if uid and series.uid == uid]
    chosen = exact or images
    if len(chosen) > 1:
        raise InputError(
            f"{path}: {len(chosen)} image series; name one by its UID, or by as much of it as no "
            f"other begins with, as in {source}#{chosen[0].uid}:{lines}"
        )
    if not chosen or not chosen[0].is_image:
        what = "; it holds:" + lines if lines else ", and no other DICOM file"
        raise InputError(f"{path}: no DICOM image series{what}")
    return groups[chosen[0].uid]


# ---------------------------------------------------------------- slices


def find_planes(place: Place, header: Any) -> list[Plane]:
    """Return the slices of a file by its header, as they come in it.

    Raises:
        InputError: It does not say of each where it lies.
    """
    frames = header.get("PerFrameFunctionalGroupsSequence")
    count = int(header.get("NumberOfFrames") or 1)
    if frames is None and count > 1:
        raise InputError(
            f"{place}: {count} frames without functional groups, so it does not say where each "
            "lies: export the series as single images, or as an enhanced multi-frame image"
        )
    top = {name: header.get(name) for name in _FIELDS}
    if frames is None:
        return [_find_plane(f"{place}", place, 0, header, top)]
    if len(frames) != count:
        raise InputError(
            f"{place}: {count} frames, but functional groups of {len(frames)}: export it again"
        )
    shared = get_shared(header)
    return [
        _find_plane(
            f"{place}, frame {index + 1}",
            place,
            index,
            header,
            top | _read_groups(shared) | _read_groups(frame),
        )
        for index, frame in enumerate(frames)
    ]


def get_shared(header: Any) -> Any:
    """Return the functional groups that all frames of a file share; empty if there are none."""
    return (header.get("SharedFunctionalGroupsSequence") or [{}])[0]


def _read_groups(groups: Any) -> dict[str, Any]:
    """Return the fields that the functional groups of a frame, or of all frames, hold."""
    return {
        name: groups[sequence][0].get(name)
        for sequence, names in _GROUPS.items()
        if groups.get(sequence)
        for name in names
        if name in groups[sequence][0]
    }


def _find_plane(what: str, place: Place, frame: int, header: Any, fields: dict[str, Any]) -> Plane:
    """Return one slice of a file, by its fields."""
    directions = _read_numbers(what, fields, "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(directions @ directions.T - np.eye(2)).max() > 10 * _EQUAL:
        raise InputError(
            f"{what}: ImageOrientationPatient {directions.ravel().tolist()} are no two unit "
            "vectors at a right angle: export the series again"
        )
    rows_apart, columns_apart = _read_numbers(what, fields, "PixelSpacing", 2).tolist()
    thickness = fields["SpacingBetweenSlices"] or fields["SliceThickness"]
    rescale = None
    slope, intercept = fields["RescaleSlope"], fields["RescaleIntercept"]
    if not fields["ModalityLUTSequence"]:
        rescale = (1.0 if slope is None else float(slope), float(intercept or 0))
        if rescale[0] == 0 or not np.isfinite(rescale).all():
            raise InputError(f"{what}: values would be x {slope} + {intercept} (RescaleSlope)")
    return Plane(
        place,
        frame,
        str(header.get("SOPInstanceUID", "")),
        str(header.get("FrameOfReferenceUID") or ""),
        _read_numbers(what, fields, "ImagePositionPatient", 3),
        directions / np.linalg.norm(directions, axis=1, keepdims=True),
        (columns_apart, rows_apart),
        (int(header.Columns), int(header.Rows)),
        abs(float(thickness or 0)),
        rescale,
        rescale is None or None not in (slope, intercept),
        str(header.get("Modality") or ""),
        {name: str(fields[name]) for name in ("GantryDetectorTilt", *_DIFFERING) if fields[name]},
    )


def _read_numbers(what: str, fields: dict[str, Any], name: str, count: int) -> NDArray[np.float64]:
    """Return a field of so many numbers."""
    value = fields[name]
    try:
        numbers = np.array([float(number) for number in value], dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        got = "nothing" if value is None else "no such numbers"
        raise InputError(
            f"{what}: {name} must be {count} numbers, the header has {got}: it does not say where "
            "its pixels lie; export the series again"
        )
    return numbers


# ---------------------------------------------------------------- one grid of all slices


def _refuse_unplaced(path: Path, group: list[tuple[Place, Any]]) -> None:
    """Refuse slices that lack their place among others of their size that have one."""
    others = [(_name_other(header), place, header) for place, header in group]
    sizes = {(header.Columns, header.Rows) for other, _, header in others if not other}
    lost = [
        Path(str(place)).name
        for other, place, header in others
        if other == _UNPLACED and (header.Columns, header.Rows) in sizes
    ]
    if lost:
        raise InputError(
            f"{path}: {len(lost)} of {len(group)} images have no ImagePositionPatient, such as "
            f"{lost[0]}, and would be left out: export the series again, or remove them if they "
            "are no slices"
        )


def _refuse_damaged(path: Path, group: list[tuple[Place, Any]]) -> None:
    """Refuse slices that were cut or emptied as they were copied: the others would be a scan."""
    slices = {str(place): header for place, header in group if not _name_other(header)}
    kinds = {str(header.get("Modality", "")) for header in slices.values()}
    damaged = [
        str(place)
        for place, header in group
        if "Rows" not in header and str(header.get("Modality", "")) in kinds
    ]
    homes = {(os.path.dirname(name), Path(name).suffix) for name in slices}
    for place in _list_files(split_series(path)[0]):
        name = str(place)
        if (os.path.dirname(name), Path(name).suffix) in homes and name not in slices:
            with place.open("rb") as file:
                begin = file.read(START)
            is_slice = Path(name).suffix != "" or not begin.strip(b"\0")
            if is_slice and not starts_dicom(begin):
                damaged.append(name)
    if damaged:
        raise InputError(
            f"{path}: {len(damaged)} files beside its slices are cut off or empty, such as "
            f"{Path(damaged[0]).name}, and would be left out: copy the series again, or remove "
            "them if they are no slices"
        )


def _stack(path: Path, planes: list[Plane]) -> tuple[list[Plane], Affine]:
    """Put slices in order and return their grid, if they have one."""
    _refuse_mixed(path, planes)
    _refuse_lost_rescale(path, planes)
    first = planes[0]
    depths = np.array([plane.position @ first.normal for plane in planes])
    order = np.argsort(depths, kind="stable")
    planes, depths = [planes[index] for index in order], depths[order]
    if len(planes) == 1:
        if not first.thickness:
            raise InputError(
                f"{path}: one slice, and no SliceThickness or SpacingBetweenSlices: give the whole "
                "series, or save the image as PNG"
            )
        step = first.normal * first.thickness
    else:
        _refuse_uneven(path, planes, depths)
        step = (planes[-1].position - planes[0].position) / (len(planes) - 1)
        _refuse_sheared(path, planes, step)
    affine = np.eye(4)
    affine[:3, :2] = planes[0].directions.T * planes[0].spacing
    affine[:3, 2] = step
    affine[:3, 3] = planes[0].position
    return planes, LPS_TO_RAS @ affine


def _show(plane: Plane) -> str:
    """Name a slice in a message."""
    x, y, z = plane.position
    frame = f", frame {plane.frame + 1}" if plane.frame else ""
    return f"{Path(str(plane.place)).name}{frame} at ({x:.2f}, {y:.2f}, {z:.2f})"


def _refuse_mixed(path: Path, planes: list[Plane]) -> None:
    """Refuse slices of several directions, sizes or spacings."""
    kinds: dict[str, list[Plane]] = defaultdict(list)
    for plane in planes:
        kinds[_name_kind(plane, planes)].append(plane)
    if len(kinds) > 1:
        listed = "; ".join(
            f"{len(group)} images of {kind}, such as {_show(group[0])}"
            for kind, group in kinds.items()
        )
        raise InputError(
            f"{path}: {len(kinds)} kinds of slices in one series, which are no one volume: "
            f"{listed}. Put those of one kind into a folder of their own"
        )


def _refuse_lost_rescale(path: Path, planes: list[Plane]) -> None:
    """Refuse slices without a rescale among others whose values are changed by theirs."""
    lost = [plane for plane in planes if not plane.has_rescale]
    others = [
        (plane, plane.rescale)
        for plane in planes
        if plane.has_rescale and plane.rescale and plane.rescale != (1.0, 0.0)
    ]
    if lost and others:
        other, (slope, intercept) = others[0]
        raise InputError(
            f"{path}: {len(lost)} of {len(planes)} slices lack RescaleSlope or RescaleIntercept, "
            f"such as {_show(lost[0])}, and others have them ({slope:g} and {intercept:g} in "
            f"{_show(other)}), so their values are of several scales: export the series again"
        )


def _name_kind(plane: Plane, planes: list[Plane]) -> str:
    """Return size and direction of a slice, in the words of the first that is like it."""
    like = next(
        other
        for other in planes
        if other.shape == plane.shape
        and np.allclose(other.directions, plane.directions, rtol=0, atol=_EQUAL)
        and np.allclose(other.spacing, plane.spacing, rtol=_EQUAL, atol=0)
    )
    (x, y), (i, j) = like.shape, like.spacing
    letters = "LPSRAI"
    axes = np.abs(like.directions).argmax(1)
    ends = "".join(
        letters[axis + 3 * (vector[axis] < 0)]
        for axis, vector in zip(axes, like.directions, strict=True)
    )
    turned = " ".join(f"{number:.3f}" for number in like.directions.ravel())
    return f"{x} x {y} pixels of {i:.4g} x {j:.4g} mm toward {ends} ({turned})"


def _refuse_uneven(path: Path, planes: list[Plane], depths: NDArray[np.float64]) -> None:
    """Refuse slices, in order, that lie at one position, or at several distances."""
    steps = np.diff(depths)
    same = steps < _UNEVEN
    if same.any():
        _explain_same(path, planes, np.concatenate([[True], ~same]))
    usual = float(np.median(steps))
    allowed = max(_UNEVEN * usual, 2 * _UNEVEN)
    uneven = np.flatnonzero(np.abs(steps - usual) > allowed)
    if not uneven.size:
        return
    places = "; ".join(
        f"{steps[k]:.2f} mm from {_show(planes[k])} to {_show(planes[k + 1])}" for k in uneven[:3]
    )
    missing = steps[uneven] / usual
    are_missing = bool((np.abs(missing - np.rint(missing)) < 0.1).all() and missing.min() > 1.5)
    count = int(np.rint(missing - 1).sum())
    lost = "1 slice is missing" if count == 1 else f"{count} slices are missing"
    what = lost if are_missing else "the slices are not evenly spaced"
    raise InputError(
        f"{path}: {what}: most are {usual:.2f} mm apart, but it is {places}"
        f"{f' and {uneven.size - 3} more' if uneven.size > 3 else ''}. "
        "Get the missing slices, or resample the series to one distance"
    )


def _explain_same(path: Path, planes: list[Plane], starts: NDArray[np.bool_]) -> None:
    """Refuse slices at one position, by what they are: times, echoes, or copies."""
    groups = np.cumsum(starts) - 1
    counts = np.bincount(groups)
    differing = [
        name for name in _DIFFERING if len({plane.notes.get(name) for plane in planes}) > 1
    ]
    why = f" (they differ in {', '.join(differing)})" if differing else ""
    if len(counts) > 1 and (counts == counts[0]).all():
        raise InputError(
            f"{path}: {counts[0]} images at each of {len(counts)} positions{why}: several times, "
            "echoes or kinds of image in one series; put each into a folder of its own"
        )
    group = int(counts.argmax())
    first, second = [plane for plane, index in zip(planes, groups, strict=True) if index == group][
        :2
    ]
    raise InputError(
        f"{path}: {counts[group]} images at the same position{why}, such as {_show(first)} and "
        f"{Path(str(second.place)).name}; keep one of them"
    )


def _refuse_sheared(path: Path, planes: list[Plane], step: NDArray[np.float64]) -> None:
    """Refuse slices whose stack is not at a right angle to them, or not straight."""
    along = float(step @ planes[0].normal)
    aside = float(np.linalg.norm(step - along * planes[0].normal))
    angle = float(np.degrees(np.arctan2(aside, along)))
    if angle > MAX_SHEAR:  # the affine keeps what is below
        tilt = planes[0].notes.get("GantryDetectorTilt")
        named = f" (GantryDetectorTilt {tilt})" if tilt else ""
        raise InputError(
            f"{path}: the gantry was tilted{named}: each slice lies {aside:.2f} mm beside the one "
            f"before, {angle:.1f} degrees off the normal, which no grid of right angles holds; "
            "straighten the series first (dcm2niix does)"
        )
    line = planes[0].position + np.arange(len(planes))[:, None] * step
    off = np.linalg.norm([plane.position for plane in planes] - line, axis=1)
    worst = int(off.argmax())
    if off[worst] > max(_CROOKED * min(planes[0].spacing), 2 * _UNEVEN):
        raise InputError(
            f"{path}: {_show(planes[worst])} lies {off[worst]:.2f} mm off the line of the other "
            "slices: the patient or the table was moved; export the series again"
        )


# ---------------------------------------------------------------- pixels


def _iterate_values(planes: list[Plane]) -> Iterator[NDArray[Any]]:
    """Yield the values of one slice after the other, (I * J,) along I first."""
    for place, group in groupby(planes, key=lambda plane: plane.place):
        frames = list(group)
        dataset = read_dataset(place, with_pixels=True)
        for plane, stored in zip(frames, decode_frames(place, dataset, frames), strict=True):
            if plane.rescale is None:
                apply = load_package("pydicom.pixels").apply_modality_lut
                yield guard_dicom(place, partial(apply, stored, dataset)).ravel()
            else:
                slope, intercept = plane.rescale
                yield (stored * slope + intercept).ravel()


def _refuse_more(place: Place, dataset: Any) -> None:
    """Refuse compressed pixels of fewer bytes than their number needs, before they are decoded."""
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    most = next((most for begin, most in _MOST_PIXELS.items() if syntax.startswith(begin)), None)
    declared = int(dataset.get("NumberOfFrames") or 1) * int(dataset.Rows) * int(dataset.Columns)
    held = len(dataset.get("PixelData") or b"")
    if most is not None and declared > most * held:
        raise InputError(
            f"{place}: its header declares {declared} pixels, and its {held} bytes of pixels can "
            f"hold {most * held} at most: the file is damaged or incomplete, copy it again"
        )


def _refuse_shifted(place: Place, dataset: Any) -> None:
    """Refuse pixels whose header lays them into the upper bits: pydicom would scale them by 2^n."""
    stored, highest = dataset.get("BitsStored"), dataset.get("HighBit")
    if None not in (stored, highest) and highest != stored - 1:
        raise InputError(
            f"{place}: HighBit is {highest}, where {stored} stored bits end at {stored - 1}: its "
            "values would be of another scale; export the series again"
        )


def _unpack_bits(dataset: Any, indices: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield frames (J, I) of one bit a pixel that begin within a byte, which pydicom cuts short."""
    count = int(dataset.Rows) * int(dataset.Columns)
    packed = np.frombuffer(dataset.PixelData, np.uint8)
    for index in indices:
        first, skipped = divmod(index * count, 8)
        last = first + -(-(skipped + count) // 8)
        bits = np.unpackbits(packed[first:last], bitorder="little")[skipped : skipped + count]
        yield bits.reshape(int(dataset.Rows), int(dataset.Columns))


def decode_frames(place: Place, dataset: Any, planes: list[Plane]) -> Iterator[NDArray[Any]]:
    """Yield the stored values (J, I) of some frames of a file.

    Raises:
        InputError: The file is damaged, or its compression is not known.
    """
    pixels = load_package("pydicom.pixels")
    guard_dicom(place, partial(_refuse_more, place, dataset))
    guard_dicom(place, partial(_refuse_shifted, place, dataset))
    indices = [plane.frame for plane in planes]
    count = int(dataset.Rows) * int(dataset.Columns)
    is_split = dataset.get("BitsAllocated") == 1 and count % 8 > 0  # a byte is of two frames
    if is_split and not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        frames = _unpack_bits(dataset, indices)
    else:
        frames = pixels.iter_pixels(dataset, indices=indices)
    for plane in planes:
        try:
            array: NDArray[Any] = next(frames)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds of them
            syntax = getattr(dataset.file_meta.TransferSyntaxUID, "name", "of no known kind")
            raise InputError(
                f"{place}: its pixels ({syntax}) cannot be decoded ({error}): the file is damaged "
                f"or incomplete, or a decoder is missing ({_EXTRA})"
            ) from error
        if array.shape != plane.shape[::-1]:
            raise InputError(f"{place}: a frame of shape {array.shape}, not {plane.shape[::-1]}")
        yield array
