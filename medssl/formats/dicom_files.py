"""DICOM as a kind of file: an image is a series, a label or mask a SEG or an RTSTRUCT.

Legend: I J K voxel axes, as in `medssl.formats.dicom`. An RTSTRUCT is written where a name ends in
`.rtstruct.dcm`, else a SEG, or a labelmap where it ends in `.labelmap.dcm`.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats import dicom, segmentation, segmentation_out
from medssl.formats.scan import Scan, check_channels
from medssl.transforms.geometry import Affine, Header


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open a series, see `medssl.formats.dicom.open_scan`.

    Raises:
        InputError: There is no image series or several, its slices are not an even stack, or more
            than one channel is declared.
    """
    return check_channels(path, dicom.open_scan(path), num_channels)


def open_label(path: Path) -> Scan:
    """Refuse a label without its scan.

    Raises:
        InputError: Always; see `open_segments`.
    """
    raise InputError(
        f"{path}: a label in DICOM lies on the slices of its scan, and no scan is named with it"
    )


def open_segments(path: Path, source: Scan, values: Mapping[str, int] | None) -> Scan:
    """Open a SEG or an RTSTRUCT as a label on the grid of a scan.

    Args:
        path: The file, or a folder with one such file.
        source: The scan that it belongs to.
        values: Label value of each name that is wanted; None: all, by their own numbers.

    Raises:
        InputError: When its values are read, as `read_segments`.
    """
    file = find_object(path)

    @cache
    def read() -> NDArray[Any]:
        return segmentation.read_segments(file, source, values)[0]

    def iterate_values() -> Iterator[NDArray[Any]]:
        yield from (plane.ravel(order="F") for plane in np.moveaxis(read(), -1, 0))

    note = partial(segmentation.read_note, file)
    return Scan(source.shape, source.affine, 1, iterate_values, source.header, note)


def read_names(path: Path) -> dict[int, str]:
    """Return the name of each segment or region by its number.

    Raises:
        InputError: The file is neither a SEG nor an RTSTRUCT.
    """
    return segmentation.list_segments(find_object(path))


def find_object(path: Path) -> Path:
    """Return a file, or the one DICOM file of a folder."""
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "."]
    if len(files) != 1:
        raise InputError(
            f"{path}: a label in DICOM is one file, a SEG or an RTSTRUCT, and this folder holds "
            f"{len(files)}: name the file"
        )
    return files[0]


def write(
    path: Path,
    array: NDArray[Any],
    affine: Affine,
    header: Header | None,
    note: str,
    names: Mapping[int, str],
) -> None:
    """Write a mask (I, J, K) as a SEG, or as what its name says.

    See `medssl.formats.readers.Format`. The grid is that of the header, whose scan must be a DICOM
    series that is still there.

    Raises:
        InputError: The scan is no DICOM series, or has changed since it was read.
    """
    if header is None or header.get("format") != "dicom":
        raise InputError(
            f"{path}: a mask in DICOM refers to the images of its scan, which is no DICOM series: "
            "give another --format"
        )
    if path.name.endswith(".rtstruct.dcm"):
        segmentation_out.write_rtstruct(path, array, header, names, note)
    else:
        is_labelmap = path.name.endswith(".labelmap.dcm")
        segmentation_out.write_seg(path, array, header, names, note, as_labelmap=is_labelmap)
