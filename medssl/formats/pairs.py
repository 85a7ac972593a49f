"""Scans in two files, .hdr and .img: pairs of NIfTI, and Analyze 7.5; their masks are .nii.gz.

Legend: C channels, I J K voxel axes. Either file may be named. A pair of NIfTI says where its
voxels lie as a .nii does. Analyze does not say where left is, except where SPM has left a .mat
beside it: without, the first axis is taken to run from right to left, as SPM and nibabel take it,
around the origin of SPM or the middle of the scan, and the `contradictions` of the header name it.
One whose `orient` is not 0 is refused, since programs turn it differently.

Source: nibabel's Spm99AnalyzeImage and Nifti1Pair.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spm99analyze import Spm99AnalyzeHeader
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats import nifti
from medssl.formats.scan import (
    Scan,
    Values,
    check_channels,
    check_label,
    check_place,
    explain_start,
    guard,
)
from medssl.formats.streams import open_numbers
from medssl.transforms.geometry import Affine, Header

_LARGEST_MAT = 2**16  # bytes
_ORIENT = 252  # byte of a header of Analyze


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open an image; all axes after the third are channels.

    Raises:
        InputError: A file of the pair cannot be read, is not there, or has other channels than
            declared.
    """
    return check_channels(path, guard(path, lambda: _open(path)), num_channels)


def open_label(path: Path) -> Scan:
    """Open a label.

    Raises:
        InputError: A file of the pair cannot be read, is not there, or has channels.
    """
    return check_label(path, guard(path, lambda: _open(path)))


def find_pair(path: Path) -> tuple[Path, Path]:
    """Return the .hdr and the .img of a pair by either of them.

    Raises:
        InputError, FileNotFoundError: One of them is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    is_head = path.suffix.lower() == ".hdr"
    suffix = ".img" if is_head else ".hdr"
    other = path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)
    if not other.is_file():
        raise InputError(
            f"{path}: one half of a scan in two files (.hdr and .img), and {other.name} is missing "
            "beside it: copy it there too"
        )
    return (path, other) if is_head else (other, path)


def _open(path: Path) -> Scan:
    """Read the header of a pair and compare what it declares with the size of its other file."""
    head, data = find_pair(path)
    header = _read_header(head)
    sizes = [int(size) for size in header.get_data_shape()]
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:  # of Analyze
        raise InputError(f"{head}: voxels of the type {error} are not read: convert it") from error
    num_values, offset = math.prod(sizes), int(header.get_data_offset())
    if offset < 0:
        raise InputError(f"{head}: its voxels begin at byte {offset}: correct vox_offset")
    values = open_numbers(data, dtype, num_values, offset=offset, has_more=True)
    if not isinstance(header, Spm99AnalyzeHeader):
        return nifti.describe_scan(data, header)._replace(read_note=str)
    shape = nifti.find_shape(head, header)
    nifti.refuse_records(head, header)
    affine, contradictions = _find_place(head, header)
    check_place(head, shape, affine, "mm")
    slope, _ = header.get_slope_inter()
    if slope not in (None, 1):
        values = partial(_scale, values, slope)
    described: Header = {"contradictions": contradictions}
    return Scan(shape, affine, math.prod(sizes[3:]), values, described)


def _read_header(path: Path) -> Any:
    """Return the header of a pair of NIfTI or of Analyze (nibabel has no types)."""
    with path.open("rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.nifti1.Nifti1PairHeader, nib.nifti2.Nifti2PairHeader):
        if kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            if header["magic"].item() != header.pair_magic:
                raise InputError(f"{path}: is a whole NIfTI file: rename it to .nii")
            return header
    if not Spm99AnalyzeHeader.may_contain_header(start):
        explain_start(path, start)
        raise ImageFileError(f"it is no header of Analyze or NIfTI, it starts with {start[:8]!r}")
    return Spm99AnalyzeHeader(start[: Spm99AnalyzeHeader.sizeof_hdr], check=False)


@np.errstate(all="ignore")
def _find_place(path: Path, header: Any) -> tuple[Affine, dict[str, str]]:
    """Return the affine (4, 4) in mm, voxel -> RAS+, of Analyze, and what is not certain of it."""
    mat = path.with_suffix(".mat")
    if mat.is_file():
        return _read_mat(mat), {}
    orient = header.binaryblock[_ORIENT]
    if orient:
        raise InputError(
            f"{path}: an Analyze file of the orientation {orient}, which programs turn "
            "differently: convert it to NIfTI with a program that knows its origin"
        )
    nifti.check_sizes(path, header)
    affine: Affine = np.asarray(header.get_best_affine(), np.float64)
    return affine, {"code": "Analyze without a .mat"}


def _read_mat(path: Path) -> Affine:
    """Return the affine (4, 4) in mm, voxel -> RAS+, that SPM left beside an Analyze file."""
    import scipy.io

    if path.stat().st_size > _LARGEST_MAT:
        raise InputError(f"{path}: is too large for the place of a scan: move it elsewhere")
    try:
        matrices = scipy.io.loadmat(str(path), variable_names=("mat", "M"))
        matrix = matrices.get("mat", matrices.get("M"))
        affine: Affine = np.array(matrix, np.float64).reshape(4, 4, -1)[..., 0]
    except Exception as error:  # what a damaged one gives is of any kind
        raise InputError(
            f"{path}: cannot be read as the place that SPM keeps of the scan beside it ({error}): "
            "delete or rename it if it is none"
        ) from error
    if "mat" not in matrices:  # before SPM2: without the flip of its first axis
        affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ affine
    affine[:3, 3] = affine[:3] @ np.ones(4)  # the first voxel is 1, 1, 1 there
    return affine


def _scale(iterate: Values, slope: float) -> Iterator[NDArray[np.float64]]:
    """Yield numbers (n,) multiplied by a slope."""
    for values in iterate():
        yield values.astype(np.float64) * slope
