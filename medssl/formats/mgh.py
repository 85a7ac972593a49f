"""MGH of FreeSurfer (.mgz, .mgh): scans and labels in; their masks are NIfTI.

Legend: C channels, I J K voxel axes. Places are RAS+ in mm. A header without the flag that its
geometry is good is refused: FreeSurfer and nibabel turn it differently, and both take 1 mm.

Source: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat, by nibabel.
"""

import gzip
import math
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHHeader

from medssl.config import InputError
from medssl.formats.scan import (
    START_BYTES,
    Scan,
    check_channels,
    check_label,
    check_place,
    explain_start,
    guard,
)
from medssl.formats.streams import open_numbers
from medssl.transforms.geometry import Shape

_START = 284  # byte of the first voxel
_FLAG = slice(28, 30)
_TYPES = {0: "u1", 1: "i4", 3: "f4", 4: "i2", 10: "u2"}


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open an image; its frames are its channels.

    Raises:
        InputError: The file cannot be read, or has other frames than declared channels.
    """
    return check_channels(path, guard(path, lambda: _open(path)), num_channels)


def open_label(path: Path) -> Scan:
    """Open a label.

    Raises:
        InputError: The file cannot be read, or has several frames.
    """
    return check_label(path, guard(path, lambda: _open(path)))


def _open(path: Path) -> Scan:
    """Read the header of a file and compare what it declares with the size of the file."""
    is_packed = path.name.lower().endswith((".mgz", ".gz"))
    with path.open("rb") as file:
        has_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if has_gzip != is_packed:
            other = ".mgz" if has_gzip else ".mgh"
            raise InputError(
                f"{path}: is {'' if has_gzip else 'not '}compressed: rename it to {other}, or "
                "copy it again"
            )
        start = (gzip.GzipFile(fileobj=file) if has_gzip else file).read(START_BYTES)
    if len(start) < _START or start[:4] != b"\0\0\0\1":
        explain_start(path, start)
        raise ImageFileError(f"it is no MGH file, it starts with {start[:8]!r}")
    header = MGHHeader(start[:_START], check=False)
    sizes = [int(size) for size in header["dims"]]
    code = int(header["type"])
    if min(sizes) < 1 or code not in _TYPES:
        raise InputError(
            f"{path}: sizes {sizes} of type {code} are not those of a scan: convert it again "
            "(mri_convert)"
        )
    if not any(start[_FLAG]):  # nibabel sets it
        raise InputError(
            f"{path}: its header gives no place (goodRASFlag is 0), and programs guess another "
            "one: convert it again from the scan that it was made of (mri_convert)"
        )
    with np.errstate(all="ignore"):
        affine = np.asarray(header.get_affine(), np.float64)
    i, j, k, num_channels = sizes
    shape: Shape = (i, j, k)
    values = open_numbers(
        path,
        np.dtype(_TYPES[code]).newbyteorder(">"),
        math.prod(sizes),
        encoding="gzip" if is_packed else "raw",
        offset=0 if is_packed else _START,
        skip=_START if is_packed else 0,
        has_more=True,  # times of the scanner and a history
    )
    check_place(path, shape, affine, "mm")
    return Scan(shape, affine, num_channels, values)
