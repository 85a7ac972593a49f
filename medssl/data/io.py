"""Scans and pictures in and out, on the native grid.

Legend: C channels, I J K voxel axes. What is written holds voxels and geometry, nothing else of
the header it came from. The suffix of a file decides: NIfTI, or a PNG, JPEG or TIFF, which has no
spacing and lies on the identity affine (see `medssl.data.pictures` for its axes).

Where the voxels of a NIfTI file lie: by its sform, if the sform has a code; else by its qform, if
that has one; else by the voxel size (pixdim) alone, around the middle of the scan. Of a sform the
columns are the spacing, and pixdim does not count. Lengths are in the unit of xyzt_units (metre,
mm, micron; none is mm) and become mm here. Programs choose differently where these contradict each
other, so `medssl check` names such scans, and whatever is written carries all of these fields of
its scan as they were: it opens on the voxels of the scan, in whichever program.
"""

import gzip
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medssl.config import IGNORE, InputError
from medssl.data.files import KINDS, SUFFIXES, is_picture
from medssl.data.pictures import (
    read_channels,
    read_note,
    read_shape,
    read_values,
    write_picture,
)
from medssl.runs import write_file
from medssl.transforms.geometry import (
    Affine,
    Header,
    Shape,
    Volume,
    affines_differ,
    check_grid,
    grid_spacing,
)

MAX_DISPLACEMENT = 0.1  # voxels by which the grids of one case may differ
MAX_VALUES = 2**16  # different values of a label: more are those of an image

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
        "neither sform nor qform has a code, so the header does not say where left and right are: "
        "the first axis is taken to run from right to left"
    ),
    "unit": "the header gives lengths in another unit, converted to mm",
}
"""What `find_contradictions` finds, in words."""

_MARK = "made by a medssl model ({origin}), voxels {crc:08x}"
_MARKED = re.compile(r"made by a medssl model \((?P<origin>[\w -]+)\), voxels (?P<crc>[0-9a-f]{8})")
_ROUNDING = 1e-3  # label values this close to an integer are that integer
_LARGEST = 2.0**53  # beyond it a float does not know its integer
_SAME_SIZE = 0.01  # share by which two voxel sizes of one header may differ
_PIECE = 2**16  # voxels in memory at once beside the result
_MOST_DEFLATED = 1032  # bytes that one byte of a .gz can stand for
_UNITS = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # xyzt_units -> name, mm; all others are mm
_PLACING = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
_OTHER_STARTS = {  # first bytes of what is often found under the name of a scan
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the scan: run git lfs pull",
    b"<": "a web page or XML, not the scan: download it again",
    b"NRRD": "an NRRD file: convert it to NIfTI",
}
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)


class LabelFacts(NamedTuple):
    """What a label holds.

    ``counts`` are the voxels of each label value; ``has_rounded`` says whether some values were
    only almost integers; ``origin`` what a model made this label as (`pseudo-mask`), if it did and
    nobody has changed a voxel since, else nothing.
    """

    counts: dict[int, int]
    affine: Affine
    shape: Shape
    has_rounded: bool
    origin: str


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
    scans = [None if is_picture(path) else _open_channels(path, each) for path in paths]
    grids = [_find_grid(path, scan) for path, scan in zip(paths, scans, strict=True)]
    shape, affine = grids[0]
    for path, grid in zip(paths[1:], grids[1:], strict=True):
        _compare_grids(paths[0], shape, affine, path, *grid)
    array = _guard(paths[0], lambda: np.empty((num_channels, *shape), np.float32))
    for index, (path, scan) in enumerate(zip(paths, scans, strict=True)):
        _guard(path, partial(_fill, array[index * each : (index + 1) * each], path, scan))
    header = None if scans[0] is None else _describe_header(scans[0])
    others = tuple(_describe_header(scan) for scan in scans[1:] if scan is not None)
    return Volume(array, affine, all(scan is not None for scan in scans), header, others)


def read_label(
    path: Path, label_values: tuple[int, ...], ignore: int | None
) -> tuple[NDArray[np.uint8], Affine]:
    """Read a label as class indices.

    Args:
        path: The label file.
        label_values: Value of each class index; index 0 is the background.
        ignore: Value that means: not annotated; it becomes 255.

    Returns:
        Classes (I, J, K) uint8, 255 = ignore, and the affine.

    Raises:
        InputError: The file cannot be read, or holds values that are not integers or not
            declared.
    """
    shape, affine, pieces = _open_label(path)
    known = {value: index for index, value in enumerate(label_values)}
    if ignore is not None:
        known[ignore] = IGNORE
    declared = np.array(sorted(known))
    indices = np.array([known[value] for value in sorted(known)], dtype=np.uint8)
    unknown: set[int] = set()

    def read() -> NDArray[np.uint8]:
        classes = np.empty(shape, np.uint8)
        flat, start = classes.T.flat, 0
        for piece in pieces:
            values = _round(path, piece)
            where = np.minimum(np.searchsorted(declared, values), len(declared) - 1)
            strange = values[declared[where] != values]
            if strange.size and len(unknown) <= MAX_VALUES:
                unknown.update(np.unique(strange).tolist())
            flat[start : start + values.size] = indices[where]
            start += values.size
        return classes

    classes = _guard(path, read)
    if unknown:
        some = sorted(unknown)[:12]
        more = f" and {len(unknown) - len(some)} more" if len(unknown) > len(some) else ""
        raise InputError(
            f"{path}: label values {some}{more} are not declared (declared: {sorted(known)}); "
            f"correct the file, or declare them, e.g. data.labels.{some[0]}=name "
            f"or data.ignore={some[0]}"
        )
    return classes, affine


def read_label_values(path: Path) -> LabelFacts:
    """Return what a label holds.

    Raises:
        InputError: The file cannot be read, holds values that are not integers, or more of them
            than a label can.
    """
    shape, affine, pieces = _open_label(path)

    def count() -> LabelFacts:
        counts: Counter[int] = Counter()
        has_rounded, crc = False, 0
        for piece in pieces:
            values = _round(path, piece)
            has_rounded |= bool((values != piece).any())
            crc = _add_crc(values, crc)
            found, numbers = np.unique(values, return_counts=True)
            counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
            if len(counts) > MAX_VALUES:
                raise InputError(
                    f"{path}: holds more than {MAX_VALUES} different values: is this an image? "
                    "Give the label in its place"
                )
        mark = _MARKED.search(_read_mark(path))
        origin = mark["origin"] if mark and int(mark["crc"], 16) == crc else ""
        return LabelFacts(dict(sorted(counts.items())), affine, shape, has_rounded, origin)

    facts: LabelFacts = _guard(path, count)
    return facts


def read_origin(path: Path) -> str:
    """Return what a model made a label as, if it did and nobody has changed a voxel, else nothing.

    The voxels of a label without a mark are not read.

    Raises:
        InputError: The file cannot be read, or is no label.
    """
    marked = _MARKED.search(_guard(path, lambda: _read_mark(path)))
    return read_label_values(path).origin if marked else ""


def read_geometry(path: Path) -> tuple[Shape, Affine]:
    """Return the shape (I, J, K) and the affine (4, 4) of a file from its header alone.

    Raises:
        InputError: The header cannot be read, places no voxels, or declares more of them than the
            file can hold.
    """
    return _find_grid(path, None if is_picture(path) else _open(path))


def find_contradictions(volume: Volume) -> dict[str, str]:
    """Say where the headers of a scan have programs place its voxels differently.

    Args:
        volume: Of `read_image`.

    Returns:
        What stands in its headers, by kind: `size` (the spacing of the sform is not pixdim),
        `place` (sform and qform differ by more than 0.1 voxels), `code` (neither has a code: the
        sides are guessed), `unit` (lengths were not in mm). What the file of a later channel says
        and the first does not bears the number of its channel. Empty for most scans.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for channel, header in enumerate((volume.header, *volume.other_headers)):
        for kind, what in (_contradict(header) if header else {}).items():
            if what not in found[kind]:
                text = f"channel {channel}: {what}".removesuffix(": ")
                found[kind].append(text if channel else what)
    return {kind: "; ".join(texts) for kind, texts in found.items()}


def _contradict(header: Header) -> dict[str, str]:
    """Say where one header has programs place its voxels differently, by kind."""
    found = {}
    image = _restore(header, header["dim"])
    unit, _ = _UNITS.get(header["xyzt_units"], ("mm", 1.0))
    if unit != "mm":
        found["unit"] = unit
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        found["code"] = ""
    if header["sform_code"] <= 0:
        return found
    sform = image.get_sform()
    sizes, pixdim = np.array(grid_spacing(sform)), np.abs(image["pixdim"][1:4])
    with np.errstate(invalid="ignore"):
        unequal = ~(np.abs(sizes - pixdim) <= _SAME_SIZE * sizes)
    if unequal[: len(header["dim"])].any():
        found["size"] = f"{_show(sizes)} {unit} against {_show(pixdim)} {unit}"
    elif header["qform_code"] > 0:
        shape = _complete(header["dim"])
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                distance = affines_differ(sform, image.get_qform(), shape)
        except (ValueError, HeaderDataError):  # no turn has this quaternion
            distance = np.inf
        if not distance <= MAX_DISPLACEMENT:
            found["place"] = f"by {distance:.3g} voxels"
    return found


def write_mask(
    path: Path,
    classes: NDArray[np.uint8],
    affine: Affine,
    label_values: tuple[int, ...],
    ignore: int = IGNORE,
    header: Header | None = None,
    origin: str = "",
) -> None:
    """Write class indices as a mask with the original label values, atomically.

    Args:
        path: A file name that ends in .nii, .nii.gz, .png (one slice), .tif or .tiff.
        classes: Class indices (I, J, K); 255 = not trusted.
        affine: Affine (4, 4) of the scan that the mask belongs to; a picture keeps none.
        label_values: Value of each class index.
        ignore: Value that stands for 255 in the file.
        header: Of the scan, if it has one: the mask then says the same of its place, word by word.
        origin: What a model makes this mask as, such as `pseudo-mask`; it is written down in the
            file, so that nobody takes it for a person's label. Nothing for labels.

    Raises:
        ValueError: There is a class without a value, or `ignore` is the value of a class, or the
            format cannot hold a value, or the header is that of another grid.
    """
    found = np.unique(classes)
    unknown = [int(index) for index in found if index >= len(label_values) and index != IGNORE]
    if unknown:
        raise ValueError(f"classes {unknown} have no value among {label_values}")
    values = np.zeros(256, dtype=np.int64)
    values[: len(label_values)] = label_values
    if IGNORE in found:
        if ignore in label_values:
            raise ValueError(f"{ignore} means ignored and is a label value: {label_values}")
        values[IGNORE] = ignore
    used = values[found] if found.size else values[:1]
    kinds = (np.uint8, np.uint16 if is_picture(path) else np.int16, np.int32)
    dtype = next(
        dtype
        for dtype in kinds
        if np.iinfo(dtype).min <= used.min() and used.max() <= np.iinfo(dtype).max
    )
    array = values.astype(dtype)[classes] if found.size else classes
    mark = ""
    if origin:
        crc = 0
        for plane in np.moveaxis(array, -1, 0):
            crc = _add_crc(plane.ravel(order="F"), crc)
        mark = _MARK.format(origin=origin, crc=crc)
    _write(path, array, affine, header, mark)


def _add_crc(values: NDArray[Any], crc: int) -> int:
    """Return the checksum of label values so far, whatever their type."""
    return zlib.crc32(values.astype("<i4").tobytes(), crc)


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
    if is_picture(path) and array.ndim == 4:
        i, j, k, c = array.shape
        array = np.moveaxis(array, -1, 2).reshape(i, j, c * k)
    _write(path, array.astype(np.float32, copy=False), affine, header)


def _open(path: Path) -> Any:
    """Return the header of a NIfTI file that can hold what it declares (nibabel has no types).

    Nothing else of the file is looked at, not even what stands between header and voxels.
    """
    name = path.name.lower()
    if name.endswith((".hdr", ".img")):
        other = path.with_suffix(".img" if name.endswith(".hdr") else ".hdr")
        lost = "" if other.exists() else f", and {other.name} is missing beside it"
        raise InputError(
            f"{path}: one half of a scan in two files (.hdr and .img){lost}: convert both to one "
            ".nii.gz"
        )
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path}: not a scan that is read, {KINDS}: convert it first")
    return _guard(path, lambda: _read_header(path))


def _read_header(path: Path) -> Any:
    """Read a header and compare what it declares with the size of the file."""
    is_compressed = _is_compressed(path)
    start = _read_start(path, is_compressed)
    kind = _find_format(start)
    if kind is None:
        _explain_start(path, start)
        raise ImageFileError(f"it is no NIfTI file, it starts with {start[:16]!r}")
    header = kind(start[: kind.sizeof_hdr])
    if header["magic"].item() != header.single_magic:
        raise InputError(
            f"{path}: the header alone of a scan in two files (.hdr and .img): convert both to one "
            ".nii.gz"
        )
    offset, shape, dtype = header.get_data_offset(), _list_axes(header), header.get_data_dtype()
    declared = offset + math.prod(shape) * dtype.itemsize
    held = path.stat().st_size * (_MOST_DEFLATED if is_compressed else 1)
    if declared > held:
        raise EOFError(
            f"the header declares {shape} voxels of {dtype}, which are {declared} bytes, and the "
            f"file holds {'at most ' if is_compressed else ''}{held}"
        )
    if offset < kind.sizeof_hdr:
        raise ImageFileError(f"the voxels begin at byte {offset}, within the header")
    return header


def _read_mark(path: Path) -> str:
    """Return what stands between the header and the voxels of a file, or the note of a picture."""
    if is_picture(path):
        return read_note(path)
    scan = _open(path)
    with gzip.open(path) if _is_compressed(path) else path.open("rb") as file:
        file.seek(scan.sizeof_hdr)
        return file.read(min(scan.get_data_offset() - scan.sizeof_hdr, _PIECE)).decode("latin-1")


def _read_start(path: Path, is_compressed: bool) -> bytes:
    """Return the bytes of a header, and refuse a file whose name says of its format what is not."""
    size = nib.Nifti2Header.sizeof_hdr
    with path.open("rb") as file:
        start = file.read(size)
    has_gzip = start.startswith(b"\x1f\x8b")
    if has_gzip and not is_compressed:
        raise InputError(f"{path}: is compressed: rename it to {path.name}.gz")
    if is_compressed and not has_gzip and _find_format(start) is not None:
        raise InputError(f"{path}: is not compressed: rename it to {path.name[:-3]}")
    if has_gzip:
        with gzip.open(path) as stream:
            return stream.read(size)
    return start


def _is_compressed(path: Path) -> bool:
    """Tell whether a file is compressed, by its name."""
    return path.name.lower().endswith(".gz")


def _find_format(start: bytes) -> Any:
    """Return nibabel's class for a header by its first bytes, or None."""
    kinds = (nib.Nifti1Header, nib.Nifti2Header)
    return next((kind for kind in kinds if kind.may_contain_header(start)), None)


def _explain_start(path: Path, start: bytes) -> None:
    """Refuse by name what is no NIfTI file."""
    if not start:
        raise ImageFileError("it is empty")
    if start[128:132] == b"DICM":
        raise InputError(f"{path}: is a DICOM file: convert its series to NIfTI (dcm2niix)")
    for begin, text in _OTHER_STARTS.items():
        if start.startswith(begin):
            raise InputError(f"{path}: is {text}")
    if nib.AnalyzeHeader.may_contain_header(start):
        raise InputError(
            f"{path}: is an Analyze file, which does not say where left is: convert it to NIfTI "
            "with a program that knows its origin"
        )


def _guard(path: Path, read: Callable[[], Any]) -> Any:
    """Run a read; an unreadable file becomes an InputError that names it."""
    try:
        return read()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): allow it (chmod)") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory ({error}); cut it") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: cannot be read ({error}): the file is damaged or incomplete, "
            "copy or convert it again"
        ) from error


def _find_grid(path: Path, scan: Any) -> tuple[Shape, Affine]:
    """Return shape and affine of an opened file, or of a picture (None): the one rule for both."""
    if scan is None:
        return read_shape(path), np.eye(4)
    shape = _find_shape(path, scan)
    affine: Affine = _guard(path, lambda: _place(scan))
    try:
        check_grid(shape, affine)
    except ValueError as error:
        unit, _ = _UNITS.get(int(scan["xyzt_units"]) & 7, ("mm", 1.0))
        raise InputError(
            f"{path}: {error} (the unit of the header is {unit}); repair orientation, voxel size "
            "or unit in the header, or convert the scan again"
        ) from error
    return shape, affine


def _place(scan: Any) -> Affine:
    """Return the affine (4, 4) of an open header in mm: sform, else qform, else voxel size."""
    _, size = _UNITS.get(int(scan["xyzt_units"]) & 7, ("mm", 1.0))
    affine: Affine = np.asarray(scan.get_best_affine(), dtype=np.float64)
    affine[:3] *= size
    return affine


def _find_shape(path: Path, scan: Any) -> Shape:
    """Return (I, J, K); a missing third axis is one voxel, axes after the third are channels."""
    shape = _list_axes(scan)
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise InputError(f"{path}: shape {shape} is not that of a scan (I, J, K[, channels])")
    return _complete(shape)


def _list_axes(scan: Any) -> tuple[int, ...]:
    """Return the shape that an open header declares."""
    return tuple(int(size) for size in scan.get_data_shape())


def _complete(shape: Sequence[int]) -> Shape:
    """Return the first three axes of a shape; a missing one has one voxel."""
    i, j, k = (*shape, 1)[:3]
    return i, j, k


def _describe_header(scan: Any) -> Header:
    """Return what an open header says of the place of its voxels, in numbers that JSON can hold."""
    fields = {name: np.asarray(scan[name]).tolist() for name in _PLACING}
    fields["pixdim"] = fields["pixdim"][:4]  # the others are no lengths
    fields["xyzt_units"] &= 7  # nor is the unit of time
    dim = list(_list_axes(scan)[:3])
    return {"sizeof_hdr": int(scan.sizeof_hdr), "dim": dim, **fields}


def _restore(header: Header, shape: Sequence[int]) -> Any:
    """Return a header of nibabel that says of the place of its voxels what that of a scan did."""
    kind = nib.Nifti1Header if header["sizeof_hdr"] == 348 else nib.Nifti2Header
    restored = kind()
    restored.set_data_shape(shape)  # first, since it sets the pixdim of axes that are not there
    for name in _PLACING:
        if name == "pixdim":
            restored["pixdim"][:4] = np.array(header["pixdim"], dtype=np.float64)
        else:
            restored[name] = header[name]
    return restored


def _open_channels(path: Path, num_channels: int) -> Any:
    """Open a file that holds so many channels."""
    scan = _open(path)
    _find_shape(path, scan)
    shape = _list_axes(scan)
    found = math.prod(shape[3:])
    if found != num_channels or (found > 1 and shape[-1] != num_channels):
        raise InputError(
            f"{path}: shape {shape} holds {found} channels, declared are "
            f"{num_channels}; the last axis of a 4D file is the channels: "
            "declare them, or split the file"
        )
    _refuse_records(path, scan)
    return scan


def _open_label(path: Path) -> tuple[Shape, Affine, Iterator[NDArray[Any]]]:
    """Return shape and affine of a label, and its values in pieces."""
    if is_picture(path):
        values = read_values(path)
        i, j, k = values.shape
        flat = values.ravel(order="F")
        starts = range(0, flat.size, _PIECE)
        return (i, j, k), np.eye(4), (flat[start : start + _PIECE] for start in starts)
    scan = _open(path)
    shape, affine = _find_grid(path, scan)
    if math.prod(_list_axes(scan)) != math.prod(shape):
        raise InputError(f"{path}: a label is (I, J, K), got shape {_list_axes(scan)}")
    _refuse_records(path, scan)
    return shape, affine, _iterate_values(path, scan)


def _iterate_values(path: Path, scan: Any) -> Iterator[NDArray[Any]]:
    """Yield the values (n,) of a file in its own order, and read it to its end.

    Only there a compressed file has the checksum that tells whether a bit of it has changed.
    """
    dtype = scan.get_data_dtype()
    slope, inter = scan.get_slope_inter()
    num_left = math.prod(_list_axes(scan))
    with gzip.open(path) if _is_compressed(path) else path.open("rb") as file:
        file.seek(scan.get_data_offset())
        while num_left:
            block = file.read(min(num_left, _PIECE) * dtype.itemsize)
            if not block or len(block) % dtype.itemsize:
                raise EOFError(f"{num_left} voxels that the header declares are missing")
            values = np.frombuffer(block, dtype)
            num_left -= values.size
            if slope in (None, 1) and inter in (None, 0):
                yield values
            else:
                yield values.astype(np.float64) * slope + inter
        try:
            while file.read(_PIECE):
                pass
        except gzip.BadGzipFile as error:
            if "CRC" in str(error) or "length" in str(error):
                raise
            raise OSError("behind the compressed data stands what does not belong to it") from error


def _fill(array: NDArray[np.float32], path: Path, scan: Any) -> None:
    """Read the channels (C, I, J, K) of an opened file, or of a picture (None), into an array."""
    if scan is None:
        array[:] = read_channels(path, len(array))
        return
    flat, start = np.moveaxis(array, 0, -1).T.flat, 0
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        for values in _iterate_values(path, scan):
            flat[start : start + values.size] = values
            start += values.size


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


def _refuse_records(path: Path, scan: Any) -> None:
    """Refuse colour and complex voxels."""
    dtype = scan.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are {dtype}, not numbers: convert it to grey values")


def _compare_grids(
    first: Path,
    shape: Shape,
    affine: Affine,
    second: Path,
    other_shape: Shape,
    other: Affine,
) -> None:
    """Refuse two files of one case that do not lie on one grid."""
    if shape != other_shape:
        raise InputError(
            f"{second}: shape {other_shape} differs from {shape} of {first}: "
            "resample them to one grid"
        )
    distance = affines_differ(affine, other, shape)
    if distance > MAX_DISPLACEMENT:
        raise InputError(
            f"{second}: lies up to {distance:.2f} voxels beside {first}: "
            f"affine {other.tolist()} against {affine.tolist()}; register or correct the header"
        )


def _write(
    path: Path, array: NDArray[Any], affine: Affine, header: Header | None, mark: str = ""
) -> None:
    """Write voxels with a header that holds the geometry, and perhaps a mark."""
    if is_picture(path):
        write_picture(path, array, mark)
        return
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: must end in .nii, .nii.gz, .png, .tif or .tiff")
    image = _place_by_affine(array, affine) if header is None else _place_as(array, affine, header)
    if mark:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", mark.encode()))
    write_file(path, lambda temporary: nib.save(image, temporary))


def _place_as(array: NDArray[Any], affine: Affine, header: Header) -> Any:
    """Return an image whose header says of its place what that of its scan did."""
    if array.ndim == 3 and len(header["dim"]) == 2:
        array = array[..., 0]
    restored = _restore(header, array.shape)
    on_grid = np.allclose(_place(restored), affine, rtol=1e-6, atol=1e-6)
    if _complete(array.shape) != _complete(header["dim"]) or not on_grid:
        raise ValueError(f"{array.shape} on {affine.tolist()} is not the grid of {header}")
    kind = nib.Nifti2Image if isinstance(restored, nib.Nifti2Header) else nib.Nifti1Image
    restored.set_data_dtype(array.dtype)
    image = kind(array, None, restored)
    image.header.set_slope_inter(1, 0)
    return image


def _place_by_affine(array: NDArray[Any], affine: Affine) -> Any:
    """Return an image on an affine that no header said."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None)  # a sheared grid: no quaternion says it, the sform does
    return image


def _show(sizes: NDArray[Any]) -> str:
    """Return lengths as `1 x 1 x 2.5`."""
    return " x ".join(f"{size:.4g}" for size in sizes)
