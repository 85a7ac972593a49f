"""NIfTI in and out.

Legend: C channels, I J K voxel axes. What is written holds voxels and geometry, nothing else of
the header it came from.

Where the voxels lie: by the sform, if it has a code; else by the qform, if that has one; else by
the voxel size (pixdim) alone, around the middle of the scan. Of a sform the columns are the
spacing, and pixdim does not count; without, a size of 0 or below there is refused. Lengths are in
the unit of xyzt_units (meter, mm, micron; none is mm) and become mm here. Programs choose
differently where these contradict each other, so `medssl check` names such scans and labels, and
masks and maps repeat all of these fields of their scan: in every program they lie on the voxels of
the scan.
"""

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats.scan import (
    PIECE,
    Scan,
    check_channels,
    check_label,
    check_own_grid,
    check_place,
    complete_shape,
    explain_start,
    guard,
)
from medssl.runs import write_file
from medssl.transforms.geometry import (
    MAX_DISPLACEMENT,
    Affine,
    Header,
    Shape,
    grid_spacing,
    measure_displacement,
    show_sizes,
)

_SAME_SIZE = 0.01  # share by which two voxel sizes of one header may differ
_MOST_DEFLATED = 1032  # bytes that one byte of a .gz can stand for
_UNITS = {1: ("meter", 1e3), 3: ("micron", 1e-3)}  # xyzt_units -> name, mm; all others are mm
_PLACING = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open an image; all axes after the third are channels.

    Raises:
        InputError: The file is none, or has other channels than declared.
    """
    header = _open(path)
    shape = _list_axes(header)
    if num_channels not in (None, 1) and 1 < math.prod(shape[3:]) != shape[-1]:
        raise InputError(
            f"{path}: shape {shape} has several axes after the third: the last one is the "
            "channels, and the others need one voxel each; split the file"
        )
    return check_channels(path, describe_scan(path, header), num_channels)


def open_label(path: Path) -> Scan:
    """Open a label.

    Raises:
        InputError: The file is none.
    """
    return check_label(path, describe_scan(path, _open(path)))


def describe_scan(path: Path, header: Any) -> Scan:
    """Return the scan of a file by its open header of nibabel.

    Raises:
        InputError: The header places no voxels, or they are no numbers.
    """
    shape = find_shape(path, header)
    if header["sform_code"] <= 0:
        check_sizes(path, header)
    affine = guard(path, lambda: _find_affine(header))
    check_place(path, shape, affine, _find_unit(header)[0])
    refuse_records(path, header)
    return Scan(
        shape,
        affine,
        math.prod(_list_axes(header)[3:]),
        partial(_iterate_values, path, header),
        _describe_header(header),
        partial(_read_note, path, header),
    )


def write(
    path: Path,
    array: NDArray[Any],
    affine: Affine,
    header: Header | None,
    note: str,
    names: Mapping[int, str],
) -> None:
    """Write (I, J, K) or (I, J, K, C), see `medssl.formats.readers.Format`; names are not kept.

    Raises:
        ValueError: The header is that of another grid.
    """
    is_own = header is not None and "sizeof_hdr" in header
    image = _place_as(array, affine, header) if header and is_own else _place(array, affine)
    if note:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", note.encode()))
    write_file(path, lambda temporary: nib.save(image, temporary))


def check_sizes(path: Path, header: Any) -> None:
    """Refuse voxel sizes (pixdim) of an open header that are not above 0, axes of one voxel aside.

    Some programs take 1 in their place, others the absolute value, or mirror the axis.

    Raises:
        InputError: With the sizes.
    """
    sizes = header["pixdim"][1:4]
    axes = zip(sizes, _list_axes(header), strict=False)
    if any(size <= 0 for size, count in axes if count > 1):
        raise InputError(
            f"{path}: the voxel size in its header (pixdim) is {show_sizes(sizes)}, which programs "
            "read differently: correct it, or convert the scan again"
        )


def find_contradictions(header: Header) -> dict[str, str]:
    """Say what in one header makes programs place its voxels differently, by kind.

    See `medssl.data.io.CONTRADICTIONS`.
    """
    contradictions = {}
    image = _restore(header, header["dim"])
    unit, _ = _find_unit(header)
    if unit != "mm":
        contradictions["unit"] = unit
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        contradictions["code"] = ""
    if header["sform_code"] <= 0:
        return contradictions
    sform = image.get_sform()
    image["pixdim"][1:4] = pixdim = np.abs(image["pixdim"][1:4])
    sizes = np.array(grid_spacing(sform))
    with np.errstate(invalid="ignore"):
        unequal = ~(np.abs(sizes - pixdim) <= _SAME_SIZE * sizes)
    if unequal[: len(header["dim"])].any():
        contradictions["size"] = f"{show_sizes(sizes)} {unit} against {show_sizes(pixdim)} {unit}"
    elif header["qform_code"] > 0:
        shape = complete_shape(header["dim"])
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                distance = measure_displacement(sform, image.get_qform(), shape)
        except (ValueError, HeaderDataError):  # no turn has this quaternion
            distance = np.inf
        if not distance <= MAX_DISPLACEMENT:
            contradictions["place"] = f"by {distance:.3g} voxels"
    return contradictions


def _open(path: Path) -> Any:
    """Return the header of a NIfTI file that can hold what it declares (nibabel has no types).

    Nothing else of the file is looked at, not even what stands between header and voxels.
    """
    return guard(path, lambda: _read_header(path))


def _read_header(path: Path) -> Any:
    """Read a header and compare what it declares with the size of the file."""
    is_compressed = _is_compressed(path)
    start = _read_start(path, is_compressed)
    kind = _find_format(start)
    if kind is None:
        _explain_start(path, start)
        raise ImageFileError(f"it is no NIfTI file, it starts with {start[:16]!r}")
    header = kind(start[: kind.sizeof_hdr])
    stored = kind(start[: kind.sizeof_hdr], check=False)["pixdim"]  # nibabel mends them silently
    for axis, count in enumerate(_list_axes(header)[:3], 1):
        header["pixdim"][axis] = stored[axis] if count > 1 else header["pixdim"][axis]
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


def _read_note(path: Path, header: Any) -> str:
    """Return what stands between the header and the voxels of a file."""
    with gzip.open(path) if _is_compressed(path) else path.open("rb") as file:
        file.seek(header.sizeof_hdr)
        return file.read(min(header.get_data_offset() - header.sizeof_hdr, PIECE)).decode("latin-1")


def _read_start(path: Path, is_compressed: bool) -> bytes:
    """Return the bytes of a header, and refuse a file whose suffix contradicts its content."""
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
    explain_start(path, start)
    if nib.AnalyzeHeader.may_contain_header(start):
        raise InputError(
            f"{path}: is an Analyze file, which does not say where left is: convert it to NIfTI "
            "with a program that knows its origin"
        )


def _find_unit(header: Any) -> tuple[str, float]:
    """Return the unit of the lengths in a header, and how many mm it has."""
    return _UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))


def _find_affine(header: Any) -> Affine:
    """Return the affine (4, 4) of an open header in mm: sform, else qform, else voxel size."""
    affine: Affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    affine[:3] *= _find_unit(header)[1]
    return affine


def find_shape(path: Path, header: Any) -> Shape:
    """Return (I, J, K); a missing third axis is one voxel, axes after the third are channels.

    Raises:
        InputError: The open header has too few axes or too many, or an empty one.
    """
    shape = _list_axes(header)
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise InputError(f"{path}: shape {shape} is not that of a scan (I, J, K[, channels])")
    return complete_shape(shape)


def _list_axes(header: Any) -> tuple[int, ...]:
    """Return the shape that an open header declares."""
    return tuple(int(size) for size in header.get_data_shape())


def _describe_header(header: Any) -> Header:
    """Return the geometry in an open header, in numbers that JSON can hold."""
    fields = {name: np.asarray(header[name]).tolist() for name in _PLACING}
    fields["pixdim"] = fields["pixdim"][:4]  # the others are no lengths
    fields["xyzt_units"] &= 7  # nor is the unit of time
    dim = list(_list_axes(header)[:3])
    return {"sizeof_hdr": int(header.sizeof_hdr), "dim": dim, **fields}


def _restore(header: Header, shape: Sequence[int]) -> Any:
    """Return a header of nibabel with the geometry of the header of a scan."""
    kind = nib.Nifti1Header if header["sizeof_hdr"] == 348 else nib.Nifti2Header
    restored = kind()
    restored.set_data_shape(shape)  # first, since it sets the pixdim of axes that are not there
    for name in _PLACING:
        if name == "pixdim":
            restored["pixdim"][:4] = np.array(header["pixdim"], dtype=np.float64)
        else:
            restored[name] = header[name]
    return restored


def _iterate_values(path: Path, header: Any) -> Iterator[NDArray[Any]]:
    """Yield the values (n,) of a file in its own order, and read it to its end.

    Only there a compressed file has the checksum that tells whether a bit of it has changed. Zeros
    behind the last voxel are padding; anything else tells that the header declares too little.
    """
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    num_left = math.prod(_list_axes(header))
    with gzip.open(path) if _is_compressed(path) else path.open("rb") as file:
        file.seek(header.get_data_offset())
        while num_left:
            block = file.read(min(num_left, PIECE) * dtype.itemsize)
            if not block or len(block) % dtype.itemsize:
                raise EOFError(f"{num_left} voxels that the header declares are missing")
            values = np.frombuffer(block, dtype)
            num_left -= values.size
            if slope in (None, 1) and inter in (None, 0):
                yield values
            else:
                yield values.astype(np.float64) * slope + inter
        try:
            while block := file.read(PIECE):
                if block.strip(b"\0"):
                    raise InputError(
                        f"{path}: the file goes on behind the {_list_axes(header)} voxels that its "
                        "header declares: correct dim in the header, or convert the scan again"
                    )
        except gzip.BadGzipFile as error:
            if "CRC" in str(error) or "length" in str(error):
                raise
            raise OSError("behind the compressed data stands what does not belong to it") from error


def refuse_records(path: Path, header: Any) -> None:
    """Refuse color and complex voxels of an open header.

    Raises:
        InputError: With their type.
    """
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are {dtype}, not numbers: convert it to gray values")


def _place_as(array: NDArray[Any], affine: Affine, header: Header) -> Any:
    """Return an image whose header repeats the geometry of its scan."""
    if array.ndim == 3 and len(header["dim"]) == 2:
        array = array[..., 0]
    restored = _restore(header, array.shape)
    check_own_grid(array, affine, header["dim"], _find_affine(restored), header)
    kind = nib.Nifti2Image if isinstance(restored, nib.Nifti2Header) else nib.Nifti1Image
    restored.set_data_dtype(array.dtype)
    image = kind(array, None, restored)
    image.header.set_slope_inter(1, 0)
    return image


def _place(array: NDArray[Any], affine: Affine) -> Any:
    """Return an image on an affine that was not read from a header."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None)  # a sheared grid: no quaternion says it, the sform does
    return image
