"""Scans and labels in and out, on the native grid, whatever kind of file they are.

Legend: C channels, I J K voxel axes. What is written holds voxels and geometry, nothing else of
the file that it belongs to. The name of a file says its kind (`medssl.formats.readers`).
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medssl.config import IGNORE, InputError
from medssl.data.cases import Case
from medssl.formats import dicom_files, nifti
from medssl.formats.readers import DICOM, Reader, find_reader, get_reader
from medssl.formats.scan import Color, Scan, guard
from medssl.transforms.geometry import (
    MAX_DISPLACEMENT,
    MAX_SHEAR,
    Affine,
    Header,
    Shape,
    Volume,
    measure_displacement,
    measure_shear,
)

MAX_VALUES = 2**16  # different values of a label: more are those of an image

STRAIGHTEN = (
    "resample it to right angles, and its label with it (nibabel.processing.resample_to_output "
    "does, of a label with order=0)"
)
"""How a scan whose axes are not at right angles is repaired."""

CONTRADICTIONS = {
    "size": (
        "the voxel size of the sform, which is used here, is not the one in pixdim, which "
        "ITK-SNAP and Slicer use: lengths and volumes differ between them; repair the wrong one"
    ),
    "place": (
        "sform and qform of the header place the voxels differently: the sform is used here, "
        "other programs may take the qform; repair the wrong one"
    ),
    "code": (
        "the header does not say where left and right are (in NIfTI no form has a code): "
        "the first axis is taken to run from right to left"
    ),
    "unit": "the header gives lengths in another unit, converted to mm",
    "shear": (
        "the axes of the scan are not at right angles (a tilted gantry, or a registration): "
        "lengths and volumes by its voxel size are wrong, and evaluate refuses it; "
        f"{STRAIGHTEN}"
    ),
    "values": (
        "the series of a CT does not say how its values become Hounsfield units (RescaleSlope or "
        "RescaleIntercept is missing), so the stored ones are taken; export it anew, unless air "
        "is at -1000 in it"
    ),
}
"""What `find_contradictions` finds, in words."""

_MARK = "made by a medssl model ({origin}), voxels {crc:08x}"
_MARKED = re.compile(r"made by a medssl model \((?P<origin>[\w -]+)\), voxels (?P<crc>[0-9a-f]{8})")
_ROUNDING = 1e-3  # label values this close to an integer are that integer
_LARGEST = 2.0**53  # beyond it a float does not know its integer


class LabelFacts(NamedTuple):
    """What a label holds.

    ``counts`` are the voxels of each label value; ``has_rounded`` says whether some values were
    only almost integers; ``colors`` are those of the values, where a palette or grays name them;
    ``origin`` which output of a model it is (`pseudo-mask`), empty if it is none or a person has
    changed a voxel since; ``header`` is that of its file, for `find_contradictions`.
    """

    counts: dict[int, int]
    affine: Affine
    shape: Shape
    has_rounded: bool
    origin: str
    colors: dict[int, Color]
    header: Header | None


def read_image(paths: Sequence[Path], num_channels: int) -> Volume:
    """Read the channels of one case.

    Args:
        paths: One file per channel, or one file whose last axis is the channels.
        num_channels: The number of channels that the data set declares.

    Returns:
        The scan (C, I, J, K) float32 with its affine, and the headers of its files.

    Raises:
        InputError: A file cannot be read, the channels lie on different grids, or their number
            is not the declared one.
    """
    if len(paths) not in (1, num_channels):
        raise InputError(
            f"{len(paths)} image files for {num_channels} channels: "
            f"{', '.join(str(path) for path in paths)}; give one file per channel"
        )
    each = num_channels if len(paths) == 1 else 1
    readers = [get_reader(path) for path in paths]
    scans = [
        reader.format.open_image(path, each) for reader, path in zip(readers, paths, strict=True)
    ]
    for path, scan in zip(paths[1:], scans[1:], strict=True):
        refuse_other_grid(
            *(path, scan.shape, scan.affine), str(paths[0]), scans[0].shape, scans[0].affine
        )
    shape = (num_channels, *scans[0].shape)
    array = guard(paths[0], lambda: np.empty(shape, np.float32))
    for index, (path, scan) in enumerate(zip(paths, scans, strict=True)):
        guard(path, partial(_fill, array[index * each : (index + 1) * each], scan.iterate_values))
    header, *others = (scan.header for scan in scans)
    more = tuple(other for other in others if other)
    has_spacing = all(reader.has_spacing for reader in readers)
    return Volume(array, scans[0].affine, has_spacing, header, more)


def _fill(array: NDArray[Any], iterate: Callable[[], Iterable[NDArray[Any]]]) -> None:
    """Write values (n,) that come along I first, then J, K, C into an array (C, I, J, K).

    They go there plane by plane: through ``flat`` they would take three times as long, and hold
    up all other threads.
    """
    planes = (plane for channel in array for plane in np.moveaxis(channel, -1, 0))
    plane = np.empty(array.shape[1:3][::-1], array.dtype)  # (J, I): I is the fast axis
    flat, start = plane.reshape(-1), 0
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        for values in iterate():
            while values.size:
                part = values[: flat.size - start]
                values = values[part.size :]
                flat[start : start + part.size] = part
                start += part.size
                if start == flat.size:
                    next(planes)[:] = plane.T
                    start = 0


def read_label(
    path: Path, label_values: tuple[int, ...], ignore: int | None, case: Case | None = None
) -> tuple[NDArray[np.uint8], Affine]:
    """Read a label as class indices.

    Args:
        path: The label file.
        label_values: Value of each class index; index 0 is the background.
        ignore: Value that means: not annotated; it becomes 255.
        case: The case that it is the label of; a label in DICOM cannot be read without.

    Returns:
        Classes (I, J, K) uint8, 255 = ignore, and the affine.

    Raises:
        InputError: The file cannot be read, or holds values that are not integers or not
            declared.
    """
    scan = _open_label(path, case, ignore)
    known = {value: index for index, value in enumerate(label_values)}
    if ignore is not None:
        known[ignore] = IGNORE
    declared = np.array(sorted(known))
    indices = np.array([known[value] for value in sorted(known)], dtype=np.uint8)
    unknown: set[int] = set()

    def find_indices(piece: NDArray[Any]) -> NDArray[np.uint8]:
        values = _round(path, piece)
        where = np.minimum(np.searchsorted(declared, values), len(declared) - 1)
        strange = values[declared[where] != values]
        if strange.size and len(unknown) <= MAX_VALUES:
            unknown.update(np.unique(strange).tolist())
        return indices[where]

    def read() -> NDArray[np.uint8]:
        classes = np.empty(scan.shape, np.uint8)
        _fill(classes[None], lambda: map(find_indices, scan.iterate_values()))
        return classes

    classes = guard(path, read)
    if unknown:
        some = sorted(unknown)[:12]
        more = f" and {len(unknown) - len(some)} more" if len(unknown) > len(some) else ""
        raise InputError(
            f"{path}: label values {some}{more} are not declared (declared: {sorted(known)}); "
            f"correct the file, or declare them, e.g. data.labels.{some[0]}=name "
            f"or data.ignore={some[0]}"
        )
    return classes, scan.affine


def read_label_values(
    path: Path, case: Case | None = None, ignore: int | None = None
) -> LabelFacts:
    """Return what the label of a case holds.

    `ignore` is the value that means: not annotated, which needs no segment in a file that names its
    values.

    Raises:
        InputError: The file cannot be read, holds values that are not integers, more of them than
            a label can, or some that none of its segments has.
    """
    scan = _open_label(path, case, ignore)

    def count() -> LabelFacts:
        counts: Counter[int] = Counter()
        has_rounded, crc = False, 0
        for piece in scan.iterate_values():
            values = _round(path, piece)
            has_rounded |= bool((values != piece).any())
            crc = _add_crc(values, crc)
            present, numbers = np.unique(values, return_counts=True)
            counts.update(dict(zip(present.tolist(), numbers.tolist(), strict=True)))
            if len(counts) > MAX_VALUES:
                raise InputError(
                    f"{path}: holds more than {MAX_VALUES} different values: is this an image? "
                    "Give the label in its place"
                )
        mark = _MARKED.search(scan.read_note())
        is_whole = mark and (int(mark["crc"], 16) == crc or get_reader(path) is DICOM)
        origin = mark["origin"] if mark and is_whole else ""  # what is DICOM is never changed
        return LabelFacts(
            dict(sorted(counts.items())),
            scan.affine,
            scan.shape,
            has_rounded,
            origin,
            scan.read_colors(),
            scan.header,
        )

    return guard(path, count)


def read_origin(path: Path, case: Case | None = None, ignore: int | None = None) -> str:
    """Return which output of a model a label is, such as `pseudo-mask`; empty if it is none.

    It is none once a person has changed a voxel. Without a mark in the file no voxel is read.
    `ignore` is that of `read_label_values`.

    Raises:
        InputError: The file cannot be read, or is no label.
    """
    scan = _open_label(path, case, ignore)
    marked = _MARKED.search(guard(path, scan.read_note))
    return read_label_values(path, case, ignore).origin if marked else ""


def _open_label(path: Path, case: Case | None, ignore: int | None) -> Scan:
    """Open a label; values are those of its case, where the file names them."""
    reader = get_reader(path)
    values = dict(case.segments) if case else {}
    if reader is DICOM and case:
        source = get_reader(case.images[0]).format.open_image(case.images[0], None)
        return dicom_files.open_segments(path, source, values or None)
    scan = reader.format.open_label(path)
    if not values:
        return scan
    named = {old: values.get(name, 0) for old, name in reader.format.read_names(path).items()}
    return scan._replace(iterate_values=partial(_rename, path, scan, named, ignore))


def _rename(
    path: Path, scan: Scan, values: Mapping[int, int], ignore: int | None
) -> Iterator[NDArray[np.int64]]:
    """Yield the values of a scan, those of its segments replaced by others; 0 and ignore stay."""
    renames = {0: 0, **({} if ignore is None else {ignore: ignore}), **values}
    for piece in scan.iterate_values():
        numbers = _round(path, piece)
        renamed, is_lone = np.zeros_like(numbers), np.ones(numbers.shape, bool)
        for old, new in renames.items():
            hit = numbers == old
            renamed[hit] = new
            is_lone &= ~hit
        if is_lone.any():
            lone = np.unique(numbers[is_lone])[:12].tolist()
            raise InputError(
                f"{path}: label values {lone} belong to none of its segments: make segments of "
                f"them or erase their voxels, or, if it means not annotated, data.ignore={lone[0]}"
            )
        yield renamed


def read_geometry(path: Path) -> tuple[Shape, Affine]:
    """Return the shape (I, J, K) and the affine (4, 4) of a file from its header alone.

    Raises:
        InputError: The header cannot be read, places no voxels, or declares more of them than the
            file can hold.
    """
    scan = get_reader(path).format.open_image(path, None)
    return scan.shape, scan.affine


def find_contradictions(volume: Volume, label: Header | None = None) -> dict[str, str]:
    """Say what in the headers of a scan makes programs place, measure or read voxels differently.

    Args:
        volume: Of `read_image`.
        label: The header of its label, if that is to be examined too.

    Returns:
        What stands in its headers, by kind: `size` (the spacing of the sform is not pixdim),
        `place` (sform and qform differ by more than 0.1 voxels), `code` (neither has a code: the
        sides are guessed), `unit` (lengths were not in mm), `shear` (axes are not at right
        angles), `values` (a CT without a rescale). What only the file of a later channel says
        begins with the number of the channel, what only that of the label says with that word.
        Empty for most scans.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    channels = ((f"channel {n}: ", one) for n, one in enumerate(volume.other_headers, 1))
    for whose, header in (("", volume.header), *channels, ("label: ", label)):
        for kind, what in (_contradict(header) if header else {}).items():
            if what not in texts[kind]:
                texts[kind].append(f"{whose}{what}".removesuffix(": "))
    shear = measure_shear(volume.shape, volume.affine)
    if shear > MAX_SHEAR:
        texts["shear"] = [f"{shear:.1f} degrees off"]
    return {kind: "; ".join(same) for kind, same in texts.items()}


def _contradict(header: Header) -> Mapping[str, str]:
    """Say what in one header makes programs place its voxels differently, by kind."""
    if "sizeof_hdr" in header:
        return nifti.find_contradictions(header)
    contradictions: Mapping[str, str] = header.get("contradictions", {})
    return contradictions


def write_mask(
    path: Path,
    classes: NDArray[np.uint8],
    affine: Affine,
    label_values: tuple[int, ...],
    ignore: int = IGNORE,
    header: Header | None = None,
    origin: str = "",
    names: Sequence[str] = (),
) -> None:
    """Write class indices as a mask with the original label values, atomically.

    Args:
        path: A file name whose suffix is that of a kind that is written.
        classes: Class indices (I, J, K); 255 = not trusted.
        affine: Affine (4, 4) of the scan that the mask belongs to; a picture keeps none.
        label_values: Value of each class index.
        ignore: Value that stands for 255 in the file.
        header: Of the scan, if it has one: the mask repeats its geometry field by field.
        origin: Which output of a model the mask is, such as `pseudo-mask`. It is stored in the
            file, so that nobody takes it for a person's label. Empty for labels.
        names: Of the classes, for kinds of files that keep names.

    Raises:
        InputError: The format cannot hold a value.
        ValueError: There is a class without a value, or `ignore` is the value of a class, or the
            header is that of another grid.
    """
    planes = np.moveaxis(classes, -1, 0)  # one at a time: an index takes 8 bytes a voxel
    present = np.flatnonzero(sum((np.bincount(p.ravel(), minlength=256) for p in planes), 0))
    unknown = [int(index) for index in present if index >= len(label_values) and index != IGNORE]
    if unknown:
        raise ValueError(f"classes {unknown} have no value among {label_values}")
    values = np.zeros(256, dtype=np.int64)
    values[: len(label_values)] = label_values
    if IGNORE in present:
        if ignore in label_values:
            raise ValueError(f"{ignore} means ignored and is a label value: {label_values}")
        values[IGNORE] = ignore
    used = values[present] if present.size else values[:1]
    reader = _get_writer(path)
    dtypes = [
        dtype
        for dtype in map(np.dtype, reader.label_types)
        if np.iinfo(dtype).min <= used.min() and used.max() <= np.iinfo(dtype).max
    ]
    if not dtypes:
        raise InputError(
            f"{path}: no mask in {reader.name} holds the label values {used.tolist()}, only up to "
            f"{find_largest_value(reader)}: give another --format, or train on smaller values"
        )
    dtype = dtypes[0]
    array, crc = np.empty(classes.shape, dtype, order="F"), 0
    for plane, target in zip(planes, np.moveaxis(array, -1, 0), strict=True):
        target[:] = values[plane]
        crc = _add_crc(target.ravel(order="F"), crc) if origin else 0
    mark = _MARK.format(origin=origin, crc=crc) if origin else ""
    named = dict(zip(label_values, names, strict=True)) if names else {}
    reader.format.write(path, array, affine, header, mark, named)


def _get_writer(path: Path) -> Reader:
    """Return the kind of a file that is to be written."""
    reader = find_reader(path)
    if reader is None:
        raise ValueError(f"{path}: the name of a mask ends in that of a kind: .nii.gz, .nrrd, .png")
    return reader


def _add_crc(values: NDArray[Any], crc: int) -> int:
    """Return the checksum of label values so far, whatever their type."""
    return zlib.crc32(values.astype("<i4").tobytes(), crc)


def find_largest_value(reader: Reader) -> int:
    """Return the largest label value that a mask of an image of this kind can hold."""
    return int(np.iinfo(reader.label_types[-1]).max)


def find_untrusted_value(label_values: tuple[int, ...]) -> int:
    """Return the value that stands for 255 in a pseudo-mask: 255, unless that is a label's."""
    return max(set(range(IGNORE + 1)) - set(label_values))


def write_map(
    path: Path,
    array: NDArray[np.floating[Any]],
    affine: Affine,
    header: Header | None = None,
) -> None:
    """Write a float32 map (I, J, K) or (I, J, K, C), atomically; a TIFF has the pages (C, K).

    The affine and the header are those of the scan, as in `write_mask`.
    """
    _get_writer(path).format.write(
        path, array.astype(np.float32, copy=False), affine, header, "", {}
    )


def _round(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return label values (n,) as integers, or refuse those that are none."""
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    rounded = np.rint(values)
    with np.errstate(invalid="ignore"):
        good = (np.abs(values - rounded) <= _ROUNDING) & (np.abs(values) < _LARGEST)
    if not good.all():
        examples = [float(value) for value in np.unique(values[~good])[:5]]
        raise InputError(
            f"{path}: label voxels are not integers, e.g. {examples}: "
            "labels are classes, not probabilities; export them without interpolation"
        )
    integers: NDArray[np.int64] = rounded.astype(np.int64)
    return integers


def refuse_other_grid(
    path: Path,
    shape: tuple[int, ...],
    affine: Affine,
    what: str,
    other_shape: Shape,
    other_affine: Affine,
) -> None:
    """Refuse a file that does not lie on the grid of another one of its case.

    Args:
        path: The file, a label or a channel.
        shape: Its shape (I, J, K).
        affine: Its affine (4, 4).
        what: What the other one is, for the message.
        other_shape: Shape of the other one.
        other_affine: Affine of the other one, whose voxels are the unit.

    Raises:
        InputError: They differ in shape, or are more than `MAX_DISPLACEMENT` apart.
    """
    if shape != other_shape:
        raise InputError(
            f"{path}: shape {shape} differs from {other_shape} of {what}: resample it to that grid "
            "(a label by nearest neighbor), or find the file that belongs there"
        )
    distance = measure_displacement(other_affine, affine, other_shape)
    if distance > MAX_DISPLACEMENT:
        raise InputError(
            f"{path}: lies up to {distance:.2f} voxels beside {what}: affine "
            f"{_show_affine(affine)} against {_show_affine(other_affine)}; correct the header of "
            "the wrong one if the voxels agree, else resample it"
        )


def _show_affine(affine: Affine) -> str:
    """Return the three rows of an affine that say something."""
    rows = [", ".join(f"{value:.6g}" for value in row) for row in affine[:3]]
    return f"[{'; '.join(rows)}]"
