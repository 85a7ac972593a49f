"""MetaImage in and out (.mha, and .mhd beside its .raw or .zraw).

Legend: C channels, I J K voxel axes. Places are in left-posterior-superior, as ITK has them: each
row of `TransformMatrix` is the direction of an axis, `Offset` the center of the first voxel;
`AnatomicalOrientation` and `CenterOfRotation` change nothing. Without a matrix the header does not
say where left is: ITK takes the identity, so it is taken here, and the `contradictions` of the
header name it.
Lengths in `DistanceUnits` other than mm become mm, which ITK does not do.

Source: MetaIO, https://itk.org/Wiki/ITK/MetaIO/Documentation, and what ITK reads of it.
"""

import math
import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats.scan import (
    START_BYTES,
    Scan,
    Values,
    check_channels,
    check_label,
    check_own_grid,
    check_place,
    complete_shape,
    explain_start,
    guard,
)
from medssl.formats.streams import find_beside, iterate_planes, open_numbers, split_channels
from medssl.runs import write_file
from medssl.transforms.geometry import Affine, Header

_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2"},
    **{"MET_INT": "i4", "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_NAMES = {code: name for name, code in _TYPES.items()}
_UNITS = {"": 1.0, "?": 1.0, "mm": 1.0, "cm": 10.0, "um": 1e-3}
_SAME = {  # other names of a field
    **dict.fromkeys(("Orientation", "Rotation"), "TransformMatrix"),
    **dict.fromkeys(("Position", "Origin"), "Offset"),
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
_PLACING = (
    *("TransformMatrix", "Offset", "CenterOfRotation", "AnatomicalOrientation"),
    *("DistanceUnits", "ElementSpacing", "ElementSize"),
)
_SIZE = "?" * 20  # in the place of the size that is not known yet
_MOST_LINES = 10_000
_LONGEST_LINE = 2**16


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open an image; a fourth axis, or the numbers of an element, are its channels.

    Raises:
        InputError: The file cannot be read, is not understood, or has other channels than declared.
    """
    return check_channels(path, guard(path, lambda: _open(path)), num_channels)


def open_label(path: Path) -> Scan:
    """Open a label.

    Raises:
        InputError: The file cannot be read, is not understood, or has channels.
    """
    return check_label(path, guard(path, lambda: _open(path)))


def write(
    path: Path,
    array: NDArray[Any],
    affine: Affine,
    header: Header | None,
    note: str,
    names: Mapping[int, str],
) -> None:
    """Write (I, J, K) or (I, J, K, C), compressed, to one .mha; names are not kept.

    See `medssl.formats.readers.Format`.

    Raises:
        ValueError: The header is that of another grid.
    """
    if header is None or "DimSize" not in header:
        header = _describe(array.shape, affine)
    sizes = header["DimSize"]
    place, _ = _find_place(path, header)
    check_own_grid(array, affine, sizes, place, header)
    fields = {
        "ObjectType": "Image",
        "NDims": len(sizes),
        "Comment": " ".join(note.split()),
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": True,
        "CompressedDataSize": _SIZE,
        **{name: header[name] for name in _PLACING if name in header},
        "DimSize": " ".join(str(size) for size in sizes),
        "ElementNumberOfChannels": array.shape[3] if array.ndim == 4 else 1,
        "ElementType": _NAMES[array.dtype.str[1:]],
        "ElementDataFile": "LOCAL",
    }
    lines = [f"{name} = {value}\n" for name, value in fields.items() if value != ""]
    head = "".join(lines)

    def save(temporary: Path) -> None:
        packer = zlib.compressobj(1)
        with temporary.open("wb") as file:
            start = file.write(head.encode())
            for plane in iterate_planes(array, has_channels_first=True):
                file.write(packer.compress(plane))
            file.write(packer.flush())
            size = str(file.tell() - start).ljust(len(_SIZE))  # without it ITK guesses, and fails
            file.seek(0)
            file.write(head.replace(_SIZE, size, 1).encode())

    write_file(path, save)


def _find_contradictions(header: Header) -> dict[str, str]:
    """Say what in one header makes programs place its voxels differently, by kind."""
    contradictions = {}
    if "TransformMatrix" not in header:
        contradictions["code"] = "no TransformMatrix"
    unit = header.get("DistanceUnits", "")
    if _UNITS[unit] != 1:
        contradictions["unit"] = unit
    return contradictions


def _describe(shape: tuple[int, ...], affine: Affine) -> Header:
    """Return a header for a grid that was not read from a file."""
    moved = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(moved[:, :3], axis=0)
    fields = {
        "TransformMatrix": (moved[:, :3] / spacing).T.ravel(),
        "Offset": moved[:, 3],
        "ElementSpacing": spacing,
    }
    texts = {name: " ".join(repr(float(x)) for x in v + 0.0) for name, v in fields.items()}
    return {"DimSize": list(shape[:3]), **texts}


def _open(path: Path) -> Scan:
    """Read the header of a file and compare what it declares with the size of the file."""
    fields, end = _read_header(path)
    sizes = [int(size) for size in _get(path, fields, "DimSize").split()]
    num_axes = int(_get(path, fields, "NDims"))
    together = int(fields.get("ElementNumberOfChannels", 1))
    if num_axes != len(sizes) or not 2 <= num_axes <= 4 or min(*sizes, together) < 1:
        raise InputError(
            f"{path}: NDims {num_axes}, DimSize {sizes} and {together} channels are not those of a "
            "scan (I, J, K[, channels])"
        )
    if num_axes == 4 and together > 1:
        raise InputError(f"{path}: has a fourth axis and {together} channels: split the file")
    header: Header = {"DimSize": sizes[:3]}
    header |= {name: fields[name] for name in _PLACING if name in fields}
    affine, unit = _find_place(path, header, num_axes)
    shape = complete_shape(sizes)
    check_place(path, shape, affine, unit or "mm")
    if num_axes == 4:
        header = _drop_fourth(header)
    header["contradictions"] = _find_contradictions(header)
    values = _open_values(path, fields, end, math.prod(sizes) * together)
    if together > 1:
        values = partial(split_channels, values, 1, together)
    num_channels = sizes[3] if num_axes == 4 else together
    note = fields.get("Comment", "")
    return Scan(shape, affine, num_channels, values, header, lambda: note)


def _read_header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields of a file and where they end; the last one names the data file."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for number in range(1, _MOST_LINES):
            line = file.readline(_LONGEST_LINE)
            match = re.fullmatch(rb"\s*(\w+)\s*=(.*)", line.rstrip(b"\r\n"))
            if not match and (line.strip() or not line):
                if number == 1:
                    file.seek(0)
                    explain_start(path, file.read(START_BYTES))
                what = f"line {number} is no field ({line[:40]!r})" if line else "it ends early"
                raise ValueError(f"the header of a MetaImage has no ElementDataFile: {what}")
            if match:
                name = match[1].decode("ascii", "replace")
                name = _SAME.get(name, name)
                if name in fields:
                    raise InputError(f"{path}: the header has {name} twice: delete the wrong one")
                fields[name] = match[2].decode("utf-8", "replace").strip()
                if name == "ElementDataFile":
                    return fields, file.tell()
    raise ValueError(f"the header has more than {_MOST_LINES} lines")


def _get(path: Path, fields: dict[str, str], name: str) -> str:
    """Return a field that must be there."""
    if not fields.get(name):
        raise InputError(f"{path}: the header has no {name}: add it, or save the file again")
    return fields[name]


def _is_true(path: Path, fields: dict[str, str], name: str) -> bool:
    """Return a field that is True or False, and False if it is not there."""
    text = fields.get(name, "False").lower()
    if text not in ("true", "t", "1", "false", "f", "0"):
        raise InputError(f"{path}: {name} is {text!r}: correct it to True or False")
    return text in ("true", "t", "1")


@np.errstate(all="ignore")
def _find_place(path: Path, header: Header, num_axes: int = 0) -> tuple[Affine, str]:
    """Return the affine (4, 4) in mm, voxel -> RAS+, of a header, and the unit it is in there."""
    num_axes = num_axes or len(header["DimSize"])
    unit = header.get("DistanceUnits", "")
    if unit not in _UNITS:
        raise InputError(f"{path}: DistanceUnits is {unit!r}: correct it to mm, cm or um")
    steps = header.get("ElementSpacing", header.get("ElementSize"))
    if steps is None:
        raise InputError(
            f"{path}: the header gives no voxel size: add it, e.g. ElementSpacing = 0.7 0.7 2.5"
        )
    spacing = _parse(path, "ElementSpacing", steps, num_axes)
    offset = _parse(path, "Offset", header.get("Offset", "0 " * num_axes), num_axes)
    identity = " ".join(str(x) for x in np.eye(num_axes).ravel())
    matrix = header.get("TransformMatrix", identity)
    turn = _parse(path, "TransformMatrix", matrix, num_axes**2).reshape(num_axes, num_axes).T
    if num_axes == 4 and (turn[3, :3].any() or turn[:3, 3].any()):
        raise InputError(f"{path}: its TransformMatrix turns the fourth axis: split the file")
    if not np.allclose(np.linalg.norm(turn, axis=0), 1, atol=1e-3):
        raise InputError(
            f"{path}: the rows of its TransformMatrix are not of length 1 ({matrix}): correct them"
        )
    in_space = min(num_axes, 3)
    affine = np.eye(4)
    affine[:in_space, :in_space] = (turn * spacing)[:in_space, :in_space]
    affine[:in_space, 3] = offset[:in_space]
    affine[:3] *= _UNITS[unit]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0, unit


def _parse(path: Path, name: str, text: str, count: int) -> NDArray[np.float64]:
    """Return the numbers of a field."""
    try:
        numbers = np.array([float(word) for word in text.split()])
    except ValueError:
        numbers = np.empty(0)
    if numbers.size != count or not np.isfinite(numbers).all():
        raise InputError(f"{path}: {name} is {text!r}, not {count} numbers: correct it")
    return numbers


def _drop_fourth(header: Header) -> Header:
    """Return what a header of four axes says of the first three."""
    fields = dict(header)
    for name in ("Offset", "CenterOfRotation", "ElementSpacing", "ElementSize"):
        if name in header:
            fields[name] = " ".join(header[name].split()[:3])
    if "TransformMatrix" in header:
        words = header["TransformMatrix"].split()
        fields["TransformMatrix"] = " ".join(word for i in (0, 4, 8) for word in words[i : i + 3])
    fields.pop("AnatomicalOrientation", None)  # of four letters
    return fields


def _open_values(path: Path, fields: dict[str, str], end: int, num_values: int) -> Values:
    """Return what yields all numbers of an opened file in its own order."""
    kind = _get(path, fields, "ElementType")
    code = _TYPES.get(kind.removesuffix("_ARRAY"))
    if fields.get("ObjectType", "Image") != "Image" or code is None:
        raise InputError(
            f"{path}: is {fields.get('ObjectType', 'Image')} of {kind}, which is not read: save it "
            "as an image of MET_SHORT, MET_INT or MET_FLOAT"
        )
    for name, usual in (("Slope", 1), ("Offset", 0)):
        name = f"ElementToIntensityFunction{name}"
        if name in fields and float(fields[name]) != usual:
            raise InputError(
                f"{path}: {name} is {fields[name]}, which some programs apply and others do not: "
                "apply it and delete it"
            )
    is_msb = _is_true(path, fields, "BinaryDataByteOrderMSB")
    dtype = np.dtype(code).newbyteorder(">" if is_msb else "<")
    encoding = "zlib" if _is_true(path, fields, "CompressedData") else "raw"
    if "BinaryData" in fields and not _is_true(path, fields, "BinaryData"):
        encoding = "ascii"
    name, skip = fields["ElementDataFile"], int(fields.get("HeaderSize", 0))
    if re.search(r"%\d*d|^LIST\b", name):
        raise InputError(f"{path}: its data are in several files: save it as one .mha")
    is_local = name.lower() == "local"
    source, offset = (path, end) if is_local else (find_beside(path, name), 0)
    if skip < -1 or (skip > 0 and is_local) or (skip == -1 and encoding != "raw"):
        raise InputError(f"{path}: HeaderSize is {skip}, which is not understood: correct it")
    size, declared = source.stat().st_size, num_values * dtype.itemsize
    offset = max(offset, size - declared) if skip == -1 else offset + skip
    packed = int(fields.get("CompressedDataSize", size - offset))
    if encoding == "zlib" and packed != size - offset:
        raise ValueError(f"{size - offset} bytes are there, and CompressedDataSize is {packed}")
    return open_numbers(source, dtype, num_values, encoding=encoding, offset=offset)
