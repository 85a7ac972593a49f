"""NRRD in and out (.nrrd, and .nhdr beside its data file), also the segmentations of 3D Slicer.

Legend: C channels, I J K voxel axes. The header is text; the parser here refuses what it does not
know. The axes that have a direction in space are I, J and K, in the order
of the file; one other axis may hold the channels, wherever it stands.

Where the voxels lie: by `space directions` and `space origin`, turned to RAS+ by the name of the
`space`. A header without a space, or with one that is not the patient's (scanner-xyz,
3D-right-handed), does not say where left is: ITK takes it for left-posterior-superior, so it is
taken for that here, and named among the
`contradictions` of the header. `spacings` alone count from `axis mins`.
Lengths in another unit than mm become mm, which ITK does not do.

Source: Definition of NRRD File Format, https://teem.sourceforge.net/nrrd/format.html
"""

import colorsys
import gzip
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        *("longlong", "long long", "long long int", "signed long long", "signed long long int"),
        *("int64", "int64_t"),
    ),
    "u8": (
        *("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    ),
    "f4": ("float",),
    "f8": ("double",),
}  # fmt: skip
_DTYPES = {name: code for code, names in _TYPES.items() for name in names}
_ENCODINGS = {
    "raw": "raw", "txt": "ascii", "text": "ascii", "ascii": "ascii", "hex": "hex",
    "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2",
}  # fmt: skip
_SPACES = {  # in the patient: signs of the axes on the way to RAS+
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}
_UNITS = {
    **dict.fromkeys(("", "mm", "millimeter", "millimetre", "millimeters", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "metre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer"), 1e-3),
}
_AXIS_FIELDS = {  # of one value an axis -> that of an axis of channels
    "spacings": "nan", "axis mins": "nan", "centers": "none", "units": '""',
    "space directions": "none", "kinds": "list",
}  # fmt: skip
_PLACING = ("space", "space dimension", "space units", "space origin")
_OTHER_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip"),
    *("content", "number", "min", "max", "old min", "old max", "block size", "sample units"),
    *("thicknesses", "axis maxs", "labels", "measurement frame"),
)
_SPELLED = {
    **{name.replace(" ", ""): name for name in (*_AXIS_FIELDS, *_PLACING, *_OTHER_FIELDS)},
    "centerings": "centers",
}
_NO_SPACE = ("domain", "space", "none", "???")  # kinds of an axis that may lie in space
_NOTE = "medssl note"
_MOST_LINES = 100_000
_LONGEST_LINE = 2**24  # bytes; those of Slicer list all segments
_GOLDEN = 0.618034  # of the circle of hues: neighbors are far apart, however many there are
_SEGMENT = re.compile(r"Segment(\d+)_(ID|Name|LabelValue|Layer)")


class _Header(NamedTuple):
    """What stands in a file before its data: fields, keys, and where the data begin."""

    fields: dict[str, str]
    keys: dict[str, str]
    end: int


class _Opened(NamedTuple):
    """An opened file: scan, keys, all numbers in its own order, and those before a channel."""

    scan: Scan
    keys: dict[str, str]
    iterate: Values
    num_before: int


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open an image.

    Raises:
        InputError: The file cannot be read, is not understood, or has other channels than declared.
    """
    return check_channels(path, guard(path, lambda: _open(path)).scan, num_channels)


def open_label(path: Path) -> Scan:
    """Open a label; of a segmentation of 3D Slicer the layers become one, see `read_names`.

    Raises:
        InputError: The file cannot be read or is not understood; and, while it is read, segments
            that overlap.
    """
    opened = guard(path, lambda: _open(path))
    scan = opened.scan
    segments = guard(path, lambda: _list_segments(path, opened.keys))
    if scan.num_channels == 1 or not segments:
        return check_label(path, scan)
    if opened.num_before != 1:
        raise InputError(f"{path}: its layers are not the first axis: save it again in 3D Slicer")
    iterate = partial(_merge_layers, path, opened.iterate, scan.num_channels, segments)
    return scan._replace(num_channels=1, iterate_values=iterate)


def read_names(path: Path) -> dict[int, str]:
    """Return the names of the values of a label that 3D Slicer wrote as a segmentation.

    The values are those of the file, unless segments of different layers have the same: then all
    are counted from 1, in the order of the file. Empty for any other NRRD file.

    Raises:
        InputError: The file cannot be read.
    """
    segments = guard(path, lambda: _list_segments(path, _read_header(path).keys))
    return {value: name for _, _, value, name in segments}


def write(
    path: Path,
    array: NDArray[Any],
    affine: Affine,
    header: Header | None,
    note: str,
    names: Mapping[int, str],
) -> None:
    """Write (I, J, K) or (I, J, K, C), gzipped, to one .nrrd.

    See `medssl.formats.readers.Format`. A file that ends in .seg.nrrd has a segment for each name
    but that of 0.

    Raises:
        ValueError: The header is that of another grid.
    """
    if header is None or "nrrd sizes" not in header:
        header = _describe(array.shape[:3], affine)
    expected = tuple(header["nrrd sizes"])
    place, _ = _find_place(path, header)
    check_own_grid(array, affine, expected, place, header)
    channels = array.shape[3:]
    sizes = " ".join(str(size) for size in (*expected, *channels))
    lines = [
        "NRRD0004",
        f"type: {_TYPES[array.dtype.str[1:]][-1]}",
        f"dimension: {len(expected) + len(channels)}",
        *(f"{name}: {header[name]}" for name in _PLACING if name in header),
        f"sizes: {sizes}",
        "endian: little",
        "encoding: gzip",
    ]
    axes = {"kinds": ["domain"] * len(expected), **header}
    for name, filler in _AXIS_FIELDS.items():
        if name in axes:
            lines.append(f"{name}: {' '.join([*axes[name], *[filler] * len(channels)])}")
    keys = {_NOTE: note} if note else {}
    if path.name.lower().endswith(".seg.nrrd"):
        keys |= _describe_segments(names, expected)
    for key, text in keys.items():
        escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
        lines.append(f"{key}:={escaped}")
    start = "\n".join([*lines, "", ""]).encode()

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(start)
            with gzip.GzipFile("", "wb", 1, file, mtime=0) as stream:
                for plane in iterate_planes(array):
                    stream.write(plane)

    write_file(path, save)


def _find_contradictions(header: Header) -> dict[str, str]:
    """Say what in one header makes programs place its voxels differently, by kind."""
    contradictions = {}
    if header.get("space", "").lower() not in _SPACES:
        contradictions["code"] = f"space: {header.get('space') or 'none'}"
    unit = _find_unit(header)
    if _UNITS[unit] != 1:
        contradictions["unit"] = unit
    return contradictions


def _describe(shape: Sequence[int], affine: Affine) -> Header:
    """Return a header for a grid without a file, in left-posterior-superior as ITK writes it."""
    columns = (np.diag([-1.0, -1.0, 1.0]) @ affine[:3]).T + 0.0  # no minus zero
    texts = [f"({','.join(repr(float(x)) for x in column)})" for column in columns]
    return {
        "nrrd sizes": [int(size) for size in shape],
        "space": "left-posterior-superior",
        "space directions": texts[:3],
        "space origin": texts[3],
    }


def _describe_segments(names: Mapping[int, str], shape: Sequence[int]) -> dict[str, str]:
    """Return the keys by which 3D Slicer shows the values of a label as segments."""
    keys = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    extent = " ".join(f"0 {size - 1}" for size in complete_shape(shape))
    for index, value in enumerate(value for value in names if value):
        color = colorsys.hsv_to_rgb(index * _GOLDEN % 1, 0.6, 0.9)
        segment = {
            "ID": f"Segment_{value}",
            "Name": names[value],
            "NameAutoGenerated": "0",
            "Color": " ".join(f"{part:.6g}" for part in color),
            "ColorAutoGenerated": "1",
            "LabelValue": str(value),
            "Layer": "0",
            "Extent": extent,
            "Tags": "|",
        }
        keys |= {f"Segment{index}_{key}": text for key, text in segment.items()}
    return keys


def _open(path: Path) -> _Opened:
    """Read the header of a file and compare what it declares with the size of the file."""
    head = _read_header(path)
    fields = head.fields
    sizes = _parse_sizes(path, fields)
    axes = {
        name: _split_axes(path, name, fields[name], len(sizes))
        for name in _AXIS_FIELDS
        if name in fields
    }
    is_space = _find_space_axes(path, axes, "space directions" in fields, len(sizes))
    in_space = [size for size, where in zip(sizes, is_space, strict=True) if where]
    others = [index for index, where in enumerate(is_space) if not where]
    if not 2 <= len(in_space) <= 3 or len(others) > 1:
        raise InputError(
            f"{path}: has {len(in_space)} axes in space and {len(others)} others (sizes {sizes}), "
            "where 2 or 3 and at most one are read: split the file"
        )
    header: Header = {"nrrd sizes": in_space}
    header |= {name: fields[name] for name in _PLACING if name in fields}
    for name, texts in axes.items():
        header[name] = [text for text, where in zip(texts, is_space, strict=True) if where]
    affine, unit = _find_place(path, header)
    shape = complete_shape(in_space)
    check_place(path, shape, affine, unit or "mm")
    header["contradictions"] = _find_contradictions(header)
    num_channels = sizes[others[0]] if others else 1
    iterate = _open_values(path, head, math.prod(sizes))
    num_before = math.prod(sizes[: others[0]]) if others else 1
    is_apart = num_channels == 1 or num_before == math.prod(shape)
    values = iterate if is_apart else partial(split_channels, iterate, num_before, num_channels)
    note = head.keys.get(_NOTE, "")
    scan = Scan(shape, affine, num_channels, values, header, lambda: note)
    return _Opened(scan, head.keys, iterate, num_before)


def _read_header(path: Path) -> _Header:
    """Read the text before the data."""
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    with path.open("rb") as file:
        magic = file.readline(64).strip()
        if not re.fullmatch(rb"NRRD000[1-5]", magic):
            file.seek(0)
            explain_start(path, file.read(START_BYTES))
            raise ValueError(f"it is no NRRD file, it starts with {magic[:16]!r}")
        for number in range(2, _MOST_LINES):
            line = file.readline(_LONGEST_LINE).decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                return _Header(fields, keys, file.tell())
            if line[0] != "#":
                _parse_line(path, number, line, fields, keys)
    raise ValueError(f"the header has more than {_MOST_LINES} lines")


def _parse_line(
    path: Path, number: int, line: str, fields: dict[str, str], keys: dict[str, str]
) -> None:
    """Add a line of a header to its fields or keys."""
    name, mark, value = re.match(r"([^:]*)(:=|: |)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
    if mark == ":=":
        keys[name] = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value)
        return
    known = _SPELLED.get(name.lower().replace(" ", ""))
    if not mark or known is None:
        raise InputError(
            f"{path}: line {number} of the header is no field of NRRD ({line[:60]!r}): correct it, "
            "or save the file again with the program that made it"
        )
    if known in fields:
        raise InputError(f"{path}: the header has `{known}` twice: delete the wrong one")
    if known == "data file" and re.search(r"%\d*d|^LIST\b", value):
        raise InputError(f"{path}: its data are in several files: save it as one .nrrd")
    fields[known] = value.strip()


def _get(path: Path, fields: dict[str, str], name: str) -> str:
    """Return a field that must be there."""
    if not fields.get(name):
        raise InputError(f"{path}: the header has no `{name}`: add it, or save the file again")
    return fields[name]


def _parse_sizes(path: Path, fields: dict[str, str]) -> list[int]:
    """Return the length of each axis."""
    sizes = [int(size) for size in _get(path, fields, "sizes").split()]
    dimension = int(_get(path, fields, "dimension"))
    if dimension != len(sizes) or not 2 <= dimension <= 5 or min(sizes) < 1:
        raise InputError(f"{path}: {dimension} axes of sizes {sizes} are not those of a scan")
    return sizes


def _split_axes(path: Path, name: str, text: str, dimension: int) -> list[str]:
    """Return what a field says of each axis."""
    pattern = {"space directions": r"none|\([^()]*\)", "units": r'"[^"]*"'}.get(name, r"\S+")
    values = re.findall(pattern, text)
    if len(values) != dimension:
        raise InputError(
            f"{path}: `{name}` is said of {len(values)} axes ({text[:80]!r}), and there are "
            f"{dimension}: correct the header"
        )
    return values


def _find_space_axes(
    path: Path, axes: dict[str, list[str]], has_space: bool, dimension: int
) -> list[bool]:
    """Tell of each axis whether it lies in space: it has a direction, or no kind that it cannot."""
    kinds = [kind.lower() for kind in axes.get("kinds", ["domain"] * dimension)]
    if "complex" in kinds:
        raise InputError(f"{path}: holds complex numbers: save their magnitude")
    may = [kind in _NO_SPACE for kind in kinds]
    if not has_space:
        if dimension > 3 and "kinds" not in axes:
            raise InputError(
                f"{path}: has {dimension} axes, and neither `space directions` nor `kinds` says "
                "which of them are the channels: add `kinds`, e.g. `list domain domain domain`"
            )
        return may
    has_direction = [direction != "none" for direction in axes["space directions"]]
    for index, (there, possible) in enumerate(zip(has_direction, may, strict=True)):
        if there and not possible:
            raise InputError(
                f"{path}: axis {index} is of the kind {kinds[index]!r} and has a direction in "
                "space: correct `kinds` or `space directions`"
            )
    return has_direction


@np.errstate(all="ignore")
def _find_place(path: Path, header: Header) -> tuple[Affine, str]:
    """Return the affine (4, 4) in mm, voxel -> RAS+, of a header, and the unit it is in there."""
    space = header.get("space", "").lower()
    if "time" in space:
        raise InputError(f"{path}: its space is {space!r}: save each time as a file of its own")
    unit = _find_unit(header)
    if unit not in _UNITS:
        raise InputError(f"{path}: its lengths are in {unit!r}: convert them to mm")
    if "space directions" in header:
        affine = _place_by_directions(path, header)
    elif "spacings" in header:
        affine = _place_by_spacings(header)
    else:
        raise InputError(
            f"{path}: the header gives no voxel size: add `spacings`, e.g. `spacings: 0.7 0.7 2.5`,"
            " or `space directions`"
        )
    affine[:3] *= _UNITS[unit] * np.array(_SPACES.get(space, (-1, -1, 1)))[:, None]
    return affine + 0.0, unit  # no minus zero


def _place_by_directions(path: Path, header: Header) -> Affine:
    """Return the affine (4, 4) in the space and the unit of a header."""
    affine = np.eye(4)
    vectors = [_parse_vector(path, text) for text in header["space directions"]]
    num_axes, size = len(vectors), len(vectors[0])
    origin = header.get("space origin")
    vectors.append([0.0] * size if origin is None else _parse_vector(path, origin))
    if {len(vector) for vector in vectors} != {size} or not num_axes <= size <= 3:
        raise InputError(
            f"{path}: {num_axes} axes in space have the directions {header['space directions']} "
            f"and the origin {origin}, not all of 3 numbers: correct the header"
        )
    for column, vector in zip((*range(num_axes), 3), vectors, strict=True):
        affine[:size, column] = vector
    if num_axes < size:  # a slice in space: 1 mm thick, across its own axes
        across = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = across / np.linalg.norm(across)
    return affine


def _place_by_spacings(header: Header) -> Affine:
    """Return the affine (4, 4) of a header that gives no directions, in its unit."""
    affine = np.eye(4)
    steps = [float(step) for step in header["spacings"]]
    mins = [float(low) for low in header.get("axis mins", ["nan"] * len(steps))]
    centers = header.get("centers", ["cell"] * len(steps))
    for axis, (step, low, center) in enumerate(zip(steps, mins, centers, strict=True)):
        affine[axis, axis] = step
        if not any(map(math.isnan, mins)):
            affine[axis, 3] = low if center.lower() == "node" else low + step / 2
    return affine


def _parse_vector(path: Path, text: str) -> list[float]:
    """Return the numbers of `(1,0,0)`."""
    try:
        return [float(number) for number in text.strip().strip("()").split(",")]
    except ValueError as error:
        raise InputError(f"{path}: {text!r} is no vector: correct the header") from error


def _find_unit(header: Header) -> str:
    """Return the unit of lengths in a header; empty for none, several for those that differ."""
    if "space directions" in header:
        units = re.findall(r'"([^"]*)"', header.get("space units", ""))
    else:
        units = [text.strip('"') for text in header.get("units", [])]
    return " and ".join(sorted({text.strip() for text in units}))


def _open_values(path: Path, head: _Header, num_values: int) -> Values:
    """Return what yields all numbers of an opened file in its own order."""
    fields = head.fields
    kind = _get(path, fields, "type").lower()
    encoding = _ENCODINGS.get(_get(path, fields, "encoding").lower())
    if kind not in _DTYPES or encoding is None:
        raise InputError(
            f"{path}: type {kind!r} in encoding {fields['encoding']!r} is not read: save it again "
            "with a known type (e.g. short) and encoding (e.g. gzip)"
        )
    dtype = np.dtype(_DTYPES[kind])
    if dtype.itemsize > 1 and encoding != "ascii":
        endian = _get(path, fields, "endian").lower()
        if endian not in ("little", "big"):
            raise InputError(f"{path}: `endian` is {endian!r}: correct it to little or big")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    lines, skip = int(fields.get("line skip", 0)), int(fields.get("byte skip", 0))
    if lines < 0 or skip < -1 or (skip == -1 and encoding != "raw"):
        raise InputError(f"{path}: line skip {lines} and byte skip {skip} are not understood")
    name = fields.get("data file")
    source, offset = (path, head.end) if name is None else (find_beside(path, name), 0)
    inner = 0
    if encoding in ("gzip", "bzip2"):  # there the bytes of the content are skipped
        skip, inner = 0, skip
    start = _find_start(source, offset, lines, skip, num_values * dtype.itemsize)
    return open_numbers(source, dtype, num_values, encoding=encoding, offset=start, skip=inner)


def _find_start(path: Path, offset: int, lines: int, skip: int, num_bytes: int) -> int:
    """Return where the encoded numbers begin; a skip of -1 says that they end with the file."""
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(lines):
            if not file.readline():
                raise EOFError(f"`line skip` is {lines}, and the data file has fewer lines")
        start = file.tell()
    return max(start, path.stat().st_size - num_bytes) if skip < 0 else start + skip


def _list_segments(path: Path, keys: dict[str, str]) -> list[tuple[int, int, int, str]]:
    """Return layer, value there, value as a label, and name of each segment of 3D Slicer.

    Before its version 4.11 each segment was a layer of its own, of the value 1.
    """
    entries: dict[int, dict[str, str]] = {}
    for key, text in keys.items():
        if match := _SEGMENT.fullmatch(key):
            entries.setdefault(int(match[1]), {})[match[2]] = text
    segments = []
    for index, says in sorted(entries.items()):
        layer, value = int(says.get("Layer", index)), int(says.get("LabelValue", 1))
        segments.append((layer, value, says.get("Name") or says.get("ID") or f"segment {index}"))
    values = [value for _, value, _ in segments]
    if len(set(values)) < len(values):
        if len({(layer, value) for layer, value, _ in segments}) < len(values):
            raise InputError(f"{path}: two segments of one layer have the same value")
        values = list(range(1, len(segments) + 1))
    return [
        (layer, value, as_label, name)
        for (layer, value, name), as_label in zip(segments, values, strict=True)
    ]


def _merge_layers(
    path: Path,
    iterate: Values,
    num_layers: int,
    segments: Sequence[tuple[int, int, int, str]],
) -> Iterator[NDArray[np.int64]]:
    """Yield the label values (n,) of voxels whose layers stand together, at most one set."""
    names = {value: name for _, _, value, name in segments}
    rest = np.empty(0)
    for piece in iterate():
        values = np.concatenate([rest.astype(piece.dtype), piece])
        whole = len(values) // num_layers * num_layers
        layers, rest = values[:whole].reshape(-1, num_layers), values[whole:]
        labels = np.zeros(len(layers), np.int64)
        num_known = np.zeros(len(layers), np.int64)
        for layer, value, as_label, name in segments:
            if layer < num_layers:
                hit = layers[:, layer] == value
                taken = np.unique(labels[hit & (labels > 0)])
                if taken.size:
                    raise InputError(
                        f"{path}: the segments {names[int(taken[0])]!r} and {name!r} overlap, and "
                        "a voxel has one class: in 3D Slicer, erase one where both are (Masking, "
                        "Modify other segments: Overwrite all), or save them as two files"
                    )
                labels[hit] = as_label
                num_known += hit
        if (num_known != (layers != 0).sum(1)).any():
            raise InputError(f"{path}: has values that no segment has: save it again in 3D Slicer")
        yield labels
