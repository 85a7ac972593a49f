"""Scans and pictures in and out, on the native grid.

Legend: C channels, I J K voxel axes. What is written holds voxels and geometry, nothing else of
the header it came from. The suffix of a file decides: NIfTI, or a PNG, JPEG or TIFF, which has no
spacing and lies on the identity affine (see `medssl.data.pictures` for its axes).
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medssl.config import IGNORE, InputError
from medssl.data.files import KINDS, SUFFIXES, is_picture
from medssl.data.pictures import read_channels, read_shape, read_values, write_picture
from medssl.runs import write_file
from medssl.transforms.geometry import Affine, Shape, Volume, affines_differ, check_affine

MAX_DISPLACEMENT = 0.1  # voxels by which the grids of one case may differ

_ROUNDING = 1e-3  # label values this close to an integer are that integer
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)


def read_image(paths: Sequence[Path], num_channels: int) -> Volume:
    """Read the channels of one case.

    Args:
        paths: One file per channel, or one file whose last axis is the channels.
        num_channels: The number of channels that the data set declares.

    Returns:
        The scan (C, I, J, K) float32 with its affine.

    Raises:
        InputError: A file cannot be read, the channels lie on different grids, or their number
            is not the declared one.
    """
    has_spacing = not any(is_picture(path) for path in paths)
    if len(paths) == 1:
        array, affine = _read_channels(paths[0], num_channels)
        return Volume(array, affine, has_spacing)
    if len(paths) != num_channels:
        raise InputError(
            f"{len(paths)} image files for {num_channels} channels: "
            f"{', '.join(str(path) for path in paths)}; give one file per channel"
        )
    channels = [_read_channels(path, 1) for path in paths]
    first, affine = channels[0]
    for path, (array, other) in zip(paths[1:], channels[1:], strict=True):
        _compare_grids(paths[0], first.shape[1:], affine, path, array.shape[1:], other)
    return Volume(np.concatenate([array for array, _ in channels]), affine, has_spacing)


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
    values, affine = _read_integers(path)
    known = {value: index for index, value in enumerate(label_values)}
    if ignore is not None:
        known[ignore] = IGNORE
    found, where = np.unique(values, return_inverse=True)
    unknown = [int(value) for value in found if int(value) not in known]
    if unknown:
        raise InputError(
            f"{path}: label values {unknown} are not declared (declared: {sorted(known)}); "
            f"correct the file, or declare them, e.g. data.labels.{unknown[0]}=name "
            f"or data.ignore={unknown[0]}"
        )
    classes = np.array([known[int(value)] for value in found], dtype=np.uint8)
    return classes[where.reshape(values.shape)], affine


def read_label_values(path: Path) -> tuple[dict[int, int], Affine, Shape]:
    """Return how many voxels each label value has, the affine and the shape (I, J, K).

    Raises:
        InputError: The file cannot be read or holds values that are not integers.
    """
    values, affine = _read_integers(path)
    found, counts = np.unique(values, return_counts=True)
    i, j, k = values.shape
    return {int(v): int(n) for v, n in zip(found, counts, strict=True)}, affine, (i, j, k)


def read_geometry(path: Path) -> tuple[Shape, Affine]:
    """Return the shape (I, J, K) and the affine (4, 4) of a file from its header alone.

    Raises:
        InputError: The header cannot be read or places no voxels.
    """
    if is_picture(path):
        return read_shape(path), np.eye(4)
    image = _open(path)
    return _spatial_shape(path, image), _affine(path, image)


def write_mask(
    path: Path,
    classes: NDArray[np.uint8],
    affine: Affine,
    label_values: tuple[int, ...],
    ignore: int = IGNORE,
) -> None:
    """Write class indices as a mask with the original label values, atomically.

    Args:
        path: A file name that ends in .nii, .nii.gz, .png (one slice), .tif or .tiff.
        classes: Class indices (I, J, K); 255 = not trusted.
        affine: Affine (4, 4) of the scan that the mask belongs to; a picture keeps none.
        label_values: Value of each class index.
        ignore: Value that stands for 255 in the file.

    Raises:
        ValueError: There is a class without a value, or `ignore` is the value of a class, or the
            format cannot hold a value.
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
    _write(path, values.astype(dtype)[classes] if found.size else classes, affine)


def find_untrusted_value(label_values: tuple[int, ...]) -> int:
    """Return the value that stands for 255 in a pseudo-mask: 255, unless that is a label's."""
    return max(set(range(IGNORE + 1)) - set(label_values))


def write_map(path: Path, array: NDArray[np.floating[Any]], affine: Affine) -> None:
    """Write a float32 map (I, J, K) or (I, J, K, C), atomically; a TIFF has the pages (C, K)."""
    if is_picture(path) and array.ndim == 4:
        i, j, k, c = array.shape
        array = np.moveaxis(array, -1, 2).reshape(i, j, c * k)
    _write(path, array.astype(np.float32), affine)


def _open(path: Path) -> Any:
    """Open a NIfTI file without reading its voxels (nibabel has no types, hence Any)."""
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: not a scan that is read, {KINDS}: convert it first")
    return _guard(path, lambda: nib.load(path))


def _guard(path: Path, read: Callable[[], Any]) -> Any:
    """Run a read; an unreadable file becomes an InputError that names it."""
    try:
        return read()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory ({error}); cut it") from error
    except UNREADABLE as error:
        raise InputError(
            f"{path}: cannot be read ({error}): the file is damaged or incomplete, "
            "copy or convert it again"
        ) from error


def _affine(path: Path, image: Any) -> Affine:
    """Return the affine of an open file, float64."""
    affine: Affine = np.asarray(image.affine, dtype=np.float64)
    try:
        check_affine(affine)
    except ValueError as error:
        raise InputError(
            f"{path}: {error}; repair the orientation in the header, or convert the scan again"
        ) from error
    return affine


def _spatial_shape(path: Path, image: Any) -> Shape:
    """Return (I, J, K); a missing third axis is one voxel, axes after the third are channels."""
    shape = tuple(int(size) for size in image.shape)
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise InputError(f"{path}: shape {shape} is not that of a scan (I, J, K[, channels])")
    i, j, k = (*shape, 1)[:3]
    return i, j, k


def _read_channels(path: Path, num_channels: int) -> tuple[NDArray[np.float32], Affine]:
    """Read one file as (C, I, J, K) float32 with its affine."""
    if is_picture(path):
        return read_channels(path, num_channels), np.eye(4)
    image = _open(path)
    shape = _spatial_shape(path, image)
    found = int(np.prod(image.shape[3:])) if len(image.shape) > 3 else 1
    if found != num_channels or (found > 1 and image.shape[-1] != num_channels):
        raise InputError(
            f"{path}: shape {tuple(image.shape)} holds {found} channels, declared are "
            f"{num_channels}; the last axis of a 4D file is the channels: "
            "declare them, or split the file"
        )
    _refuse_records(path, image)
    array = _guard(path, lambda: image.get_fdata(dtype=np.float32, caching="unchanged"))
    array = array.reshape(*shape, found)
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)), _affine(path, image)


def _read_integers(path: Path) -> tuple[NDArray[np.int64], Affine]:
    if is_picture(path):
        return _round(path, read_values(path)), np.eye(4)
    image = _open(path)
    shape = _spatial_shape(path, image)
    if int(np.prod(image.shape)) != int(np.prod(shape)):
        raise InputError(f"{path}: a label is (I, J, K), got shape {tuple(image.shape)}")
    _refuse_records(path, image)
    values = _guard(path, lambda: np.asanyarray(image.dataobj)).reshape(shape)
    return _round(path, values), _affine(path, image)


def _round(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return label values (I, J, K) as integers, or refuse those that are none."""
    integers: NDArray[np.int64]
    if values.dtype.kind in "iub":
        integers = values.astype(np.int64)
        return integers
    bad = ~np.isfinite(values)
    if not bad.any():
        rounded = np.rint(values)
        bad = np.abs(values - rounded) > _ROUNDING
        if not bad.any():
            integers = rounded.astype(np.int64)
            return integers
    examples = [float(value) for value in np.unique(values[bad])[:5]]
    raise InputError(
        f"{path}: {int(bad.sum())} label voxels are not integers, e.g. {examples}: "
        "labels are classes, not probabilities; export them without interpolation"
    )


def _refuse_records(path: Path, image: Any) -> None:
    """Refuse colour and complex voxels."""
    dtype = _guard(path, image.get_data_dtype)
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are {dtype}, not numbers: convert it to grey values")


def _compare_grids(
    first: Path,
    shape: tuple[int, ...],
    affine: Affine,
    second: Path,
    other_shape: tuple[int, ...],
    other: Affine,
) -> None:
    """Refuse two files of one case that do not lie on one grid."""
    if shape != other_shape:
        raise InputError(
            f"{second}: shape {other_shape} differs from {shape} of {first}: "
            "resample them to one grid"
        )
    distance = affines_differ(affine, other, (shape[0], shape[1], shape[2]))
    if distance > MAX_DISPLACEMENT:
        raise InputError(
            f"{second}: lies up to {distance:.2f} voxels beside {first}: "
            f"affine {other.tolist()} against {affine.tolist()}; register or correct the header"
        )


def _write(path: Path, array: NDArray[Any], affine: Affine) -> None:
    """Write voxels with a header that holds the geometry alone."""
    if is_picture(path):
        write_picture(path, array)
        return
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: must end in .nii, .nii.gz, .png, .tif or .tiff")
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None)  # a sheared grid: no quaternion says it, the sform does
    write_file(path, lambda temporary: nib.save(image, temporary))
