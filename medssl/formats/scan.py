"""An opened file, whatever its kind: where its voxels lie, and a way to read them.

Legend: C channels, I J K voxel axes.
"""

import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.transforms.geometry import Affine, Header, Shape, check_grid

Result = TypeVar("Result")

PIECE = 2**16
"""Voxels, or bytes, that are read at once."""

START_BYTES = 540
"""Of a file, that tell what it is: as many as a header of NIfTI has."""

Values = Callable[[], Iterator[NDArray[Any]]]
"""Yields numbers in pieces (n,), from the first one anew with each call."""

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

_STARTS = {  # first bytes of what is often found under the name of a scan of another kind
    b"\x1f\x8b": "compressed by gzip: unpack it, or rename it to .nii.gz if it is a NIfTI file",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the scan: run git lfs pull",
    b"<": "a web page or XML, not the scan: download it again",
    b"NRRD": "an NRRD file: rename it to .nrrd",
    b"ObjectType": "a MetaImage file: rename it to .mha",
    b"\0\0\0\1\0": "an MGH file: rename it to .mgh, or .mgz if it is compressed",
    b"\x89PNG": "a PNG: rename it to .png",
    b"\xff\xd8\xff": "a JPEG: rename it to .jpg",
    b"II*\0": "a TIFF: rename it to .tif",
    b"MM\0*": "a TIFF: rename it to .tif",
}
_UNREADABLE = (
    *(OSError, EOFError, ValueError, ArithmeticError, zlib.error),
    *(ImageFileError, HeaderDataError),
)


class Scan(NamedTuple):
    """An opened file: its header has been read and checked, no voxel yet.

    Attributes:
        shape: Shape (I, J, K).
        affine: Affine (4, 4), voxel center -> RAS+ world in mm; the identity where there is no
            spacing.
        num_channels: How many numbers a voxel has.
        iterate_values: Yields all numbers in pieces (n,): along I fastest, then J, K, C. The file
            is read to its end, where a checksum tells that no bit of it has changed.
        header: What a mask needs to repeat the geometry, in what JSON can hold.
        read_note: Returns the text that a writer of this project left in the file; empty if none.
        read_colors: Returns the color of each value of a label; empty where values have none.
    """

    shape: Shape
    affine: Affine
    num_channels: int
    iterate_values: Values
    header: Header | None = None
    read_note: Callable[[], str] = str
    read_colors: Callable[[], dict[int, Color]] = dict


def explain_start(path: Path, start: bytes) -> None:
    """Refuse by name a file that is of another kind than its name says, if the kind is known.

    Args:
        path: The file.
        start: Its first 348 bytes or more, unpacked where it is known to be compressed.

    Raises:
        ImageFileError: It is empty.
        InputError: Saying what it is.
    """
    if not start:
        raise ImageFileError("it is empty")
    what = next((text for begin, text in _STARTS.items() if start.startswith(begin)), "")
    if start[128:132] == b"DICM":
        what = "a DICOM file: rename it to .dcm, or convert its series to NIfTI (dcm2niix)"
    if start[344:347] == b"n+1" or start[4:7] == b"n+2":
        what = "a NIfTI file: rename it to .nii, or .nii.gz if it is compressed"
    if what:
        raise InputError(f"{path}: is {what}")


def check_place(path: Path, shape: Shape, affine: Affine, unit: str) -> None:
    """Refuse a grid that no scan can have.

    Raises:
        InputError: Naming the file, and the unit that its header gives lengths in.
    """
    try:
        check_grid(shape, affine)
    except ValueError as error:
        raise InputError(
            f"{path}: {error} (the unit of the header is {unit}); repair orientation, voxel size "
            "or unit in the header, or convert the scan again"
        ) from error


def complete_shape(sizes: Sequence[int]) -> Shape:
    """Return the first three axes of a file; a missing third one has one voxel."""
    i, j, k = (*sizes, 1)[:3]
    return i, j, k


def check_own_grid(
    array: NDArray[Any], affine: Affine, sizes: Sequence[int], place: Affine, header: Header
) -> None:
    """Refuse an array that is to be written with the header of another grid.

    Args:
        array: (I, J, K) or (I, J, K, C).
        affine: Of the array.
        sizes: That the header gives; a missing third one is one voxel.
        place: The affine that the header gives.
        header: For the message.

    Raises:
        ValueError: Shape or affine differ.
    """
    on_grid = np.allclose(place, affine, rtol=1e-6, atol=1e-6)
    if complete_shape(sizes) != complete_shape(array.shape) or not on_grid:
        raise ValueError(f"{array.shape} on {affine.tolist()} is not the grid of {header}")


def check_channels(path: Path, scan: Scan, num_channels: int | None) -> Scan:
    """Return a scan if it has the declared channels, or any where none are declared.

    Raises:
        InputError: It has others.
    """
    if num_channels not in (None, scan.num_channels):
        shape = (*scan.shape, scan.num_channels) if scan.num_channels > 1 else scan.shape
        raise InputError(
            f"{path}: shape {shape} holds {scan.num_channels} channels, declared are "
            f"{num_channels}; the last axis of a 4D file is the channels: "
            "declare them, or split the file"
        )
    return scan


def check_label(path: Path, scan: Scan) -> Scan:
    """Return a scan if it has one number a voxel.

    Raises:
        InputError: It has several.
    """
    if scan.num_channels != 1:
        shape = (*scan.shape, scan.num_channels)
        raise InputError(f"{path}: a label is (I, J, K), got shape {shape}")
    return scan


_quiet_lock, _quiet_stack = threading.Lock(), ExitStack()
_num_quiet = 0


@contextmanager
def keep_quiet() -> Iterator[None]:
    """Silence the warnings of pydicom and others, which show the values they are about.

    What is silenced is so in all threads: the first that asks for it begins, the last one ends it.
    """
    global _num_quiet
    with _quiet_lock:
        if _num_quiet == 0:
            _quiet_stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _num_quiet += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if _num_quiet == 0:
                _quiet_stack.close()


def guard(path: Path, read: Callable[[], Result]) -> Result:
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
