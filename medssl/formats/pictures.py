"""PNG, JPEG and TIFF in and out: pictures without spacing, a multi-page TIFF a stack of slices.

Legend: C channels, I J K voxel axes: I counts the rows from the top, J the columns from the left,
K the pages. So an array is the picture as it is seen, and a mask lies on its picture pixel by
pixel. What is written holds pixels, nothing else of the file it came from.
"""

import json
import math
import re
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medssl.config import InputError
from medssl.formats.scan import PIECE, START_BYTES, Color, Scan, explain_start, guard, keep_quiet
from medssl.runs import write_file
from medssl.transforms.geometry import Affine, Header, Shape

_GRAY = {"1", "L", "I;16", "I;16B", "I", "F"}  # modes of Pillow with one number a pixel
_ORIENTATION = 0x0112  # the EXIF tag that asks a viewer to turn the picture
_UPRIGHT = (None, 0, 1)
_NEW_SUBFILE, _BITS, _PHOTOMETRIC, _DESCRIPTION, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = (
    *(254, 258, 262, 270),
    *(277, 284, 339),
)  # tags of a TIFF
_NOTE, _SOFTWARE = "Software", 305  # the chunk of a PNG and the tag of a TIFF
_PREVIEW_OR_MASK = 1 | 4  # bits of _NEW_SUBFILE
_DEFLATED, _PLACES = ("tiff_adobe_deflate", "tiff_deflate"), ((273, 279), (324, 325))
"""Compressions of a TIFF that have a checksum; tags of the offsets and sizes of strips or tiles."""
_IMAGE_DEPTH = 32997  # tag of slices within one page
_METAMORPH = range(33628, 33632)  # tags of a stack whose planes have one page entry
_SAVE_AGAIN = "save it as NIfTI, or as a TIFF with a page for each slice, channels and times apart"

_MOST_PIXELS = {  # that a byte of a file can stand for, of one bit each; of JPEG, blocks of one bit
    "raw": 8,
    "packbits": 8 * 64,
    "deflate": 8 * 1032,
    "tiff_adobe_deflate": 8 * 1032,
    "tiff_lzw": 8 * 2731,
    "jpeg": 512,
}
_PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_UNREADABLE = (  # all that Pillow says of damaged files
    *(OSError, EOFError, ValueError, SyntaxError, ArithmeticError, MemoryError),
    *(TypeError, LookupError, AttributeError, RuntimeError, struct.error, zlib.error),
)


def count_channels(path: Path) -> int:
    """Return the channels of a picture by its header: 3 if it is in color, else 1.

    Raises:
        InputError: The file cannot be read as a picture.
    """
    with _open(path) as image:
        return 1 if image.mode in _GRAY or _is_gray_palette(image) else 3


def open_image(path: Path, num_channels: int | None) -> Scan:
    """Open a picture; a gray one that is saved in color passes for a gray one.

    Raises:
        InputError: The file cannot be read as a picture; when its values are read, is transparent
            or has other channels than declared.
    """

    def iterate_values() -> Iterator[NDArray[Any]]:
        yield _read_channels(path, count).ravel(order="F")

    shape = _read_shape(path)
    count = count_channels(path) if num_channels is None else num_channels
    return Scan(shape, np.eye(4), count, iterate_values, read_note=partial(_read_note, path))


def open_label(path: Path) -> Scan:
    """Open a label: gray values, or the indices of a palette.

    Raises:
        InputError: The file is no picture; when its values are read, is a JPEG, is in color, or
            its pages have other palettes.
    """

    @cache
    def decode() -> list[tuple[NDArray[Any], dict[int, Color]]]:
        return list(_iterate_label(path))

    def iterate_values() -> Iterator[NDArray[Any]]:
        flat = _stack_pages(path, decode()).ravel(order="F")
        yield from (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))

    def read_colors() -> dict[int, Color]:
        return {value: color for _, page in decode() for value, color in page.items()}

    shape = _read_shape(path)
    note = partial(_read_note, path)
    return Scan(shape, np.eye(4), 1, iterate_values, read_note=note, read_colors=read_colors)


def _read_shape(path: Path) -> Shape:
    """Return (I, J, K) of a picture by its header: rows, columns, pages."""
    with _open(path) as image:
        _refuse_more(path, image)
        _refuse_other_axes(path, image)
        columns, rows = image.size
        return rows, columns, _count_pages(image)


def _read_channels(path: Path, num_channels: int) -> NDArray[np.float32]:
    """Read a picture as (I, J, K, C) float32."""
    pages = [_read_colors(path, page) for page in _iterate_pages(path)]
    count = max(page.shape[-1] for page in pages)
    if count == 3 and num_channels == 1 and all(_is_gray(page) for page in pages):
        pages, count = [page[..., :1] for page in pages], 1
    if count != num_channels or any(page.shape != pages[0].shape for page in pages):
        shapes = sorted({page.shape for page in pages})
        raise InputError(
            f"{path}: the picture is {' and '.join(str(shape) for shape in shapes)} (rows, "
            f"columns, channels), declared are {num_channels} channels; give pictures of one kind"
        )
    return np.stack(pages, -2)


def _stack_pages(
    path: Path, pages: Sequence[tuple[NDArray[Any], Mapping[int, Color]]]
) -> NDArray[Any]:
    """Return the values (I, J, K) of the pages of a label."""
    arrays = [array for array, _ in pages]
    if any(array.shape != arrays[0].shape for array in arrays):
        raise InputError(f"{path}: pages differ in size: {sorted({a.shape for a in arrays})}")
    for problem in compare_colors({f"page {i}": colors for i, (_, colors) in enumerate(pages, 1)}):
        raise InputError(f"{path}: {problem}")
    return np.stack(arrays, -1)


def compare_colors(files: Mapping[str, Mapping[int, Color]]) -> list[str]:
    """Say where a value has another color, or a color another value, from file to file.

    The index of a palette is a class only where all files have the same palette; programs that
    number the colors as they come give one class another value in each file. A gray file has no
    colors: 1 may stand for what is red in a palette, but white (255) not for what a palette of
    grays calls 1.

    Args:
        files: Colors by value (of `read_colors`) of each label, by what the message calls it.

    Returns:
        One sentence at most.
    """
    colors: dict[int, dict[Color, str]] = defaultdict(dict)
    values: dict[Color, dict[int, str]] = defaultdict(dict)
    ambiguous = {color for palette in files.values() for color in _find_repeated(palette)}
    for name, palette in files.items():
        for value, color in palette.items():
            if color != (value,) * 3:  # a palette's
                colors[value].setdefault(color, name)
            if color not in ambiguous:
                values[color].setdefault(value, name)
    moved = [
        f"value {value} is {' and '.join(f'RGB {c} in {name}' for c, name in names.items())}"
        for value, names in sorted(colors.items())
        if len(names) > 1
    ]
    moved += [
        f"the color RGB {color} is {' and '.join(f'{v} in {name}' for v, name in names.items())}"
        for color, names in sorted(values.items())
        if len(names) > 1
    ]
    if not moved:
        return []
    return [
        f"the labels have different palettes: {'; '.join(moved[:3])}. A palette's index is taken "
        "for the class: save all labels with one palette, or as gray values that are the classes"
    ]


def _find_repeated(colors: Mapping[int, Color]) -> set[Color]:
    """Return the colors that several values of one file have: there the index decides."""
    return {color for color, count in Counter(colors.values()).items() if count > 1}


def _iterate_label(path: Path) -> Iterator[tuple[NDArray[Any], dict[int, Color]]]:
    """Yield values (rows, columns) of each page of a label and the color of each value."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(
            f"{path}: a JPEG does not keep label values as they are: save labels as PNG or TIFF"
        )
    for page in _iterate_pages(path, is_label=True):
        if page.mode not in _GRAY and page.mode != "P":
            raise InputError(
                f"{path}: a label holds one class value a pixel, got the colors of {page.mode}: "
                "save it as gray values or with a palette"
            )
        array = _to_array(path, page)
        yield array, _name_colors(page, array)


def _name_colors(page: Image.Image, array: NDArray[Any]) -> dict[int, Color]:
    """Return the color of each value of a page; white where a page is black and white."""
    if page.mode == "P":
        palette = np.array(page.getpalette("RGB") or (), dtype=int).reshape(-1, 3)
        used = [int(value) for value in np.unique(array) if value < len(palette)]
        return {value: (*map(int, palette[value]),) for value in used}  # type: ignore[misc]
    if page.mode == "1":
        return {int(value): (255 * int(value),) * 3 for value in np.unique(array)}
    if array.dtype.kind == "f" or array.max(initial=0) > 255 or array.min(initial=0) < 0:
        return {}
    return {int(value): (int(value),) * 3 for value in np.unique(array)}


def _read_note(path: Path) -> str:
    """Return the text that `write` left in a picture, or another one's in its place."""
    with _open(path) as image:
        return str(image.info.get(_NOTE) or _get_tags(image).get(_SOFTWARE) or "")


def write(
    path: Path,
    array: NDArray[Any],
    affine: Affine,
    header: Header | None,
    note: str,
    names: Mapping[int, str],
) -> None:
    """Write (I, J, K) or (I, J, K, C): a PNG holds one slice, a TIFF the pages (C, K).

    See `medssl.formats.readers.Format`. Of affine, header and names a picture keeps nothing; the
    note goes to a chunk of a PNG, or the tag Software of a TIFF.

    Raises:
        ValueError: The format cannot hold this array without a change: uint8 and uint16 are held,
            by a TIFF also int32 and float32.
    """
    if array.ndim == 4:
        i, j, k, c = array.shape
        array = np.moveaxis(array, -1, 2).reshape(i, j, c * k)
    is_png = path.suffix.lower() == ".png"
    kinds = ("uint8", "uint16") if is_png else ("uint8", "uint16", "int32", "float32")
    if array.dtype.name not in kinds or (is_png and array.shape[2] != 1):
        raise ValueError(f"{path}: cannot hold {array.dtype} of shape {array.shape}")
    first, *others = (
        Image.fromarray(np.ascontiguousarray(array[..., k])) for k in range(array.shape[2])
    )
    if is_png:
        chunks = PngInfo()
        if note:
            chunks.add_text(_NOTE, note)
        write_file(path, lambda temporary: first.save(temporary, "PNG", pnginfo=chunks))
        return
    more: dict[str, Any] = {"save_all": True, "append_images": others} if others else {}
    more |= {"software": note} if note else {}
    compression = "tiff_adobe_deflate"
    write_file(path, lambda to: first.save(to, "TIFF", compression=compression, **more))


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever is wrong with the file becomes an InputError that names it."""
    try:
        with keep_quiet(), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; cut it into tiles") from error
    except _UNREADABLE as error:
        guard(path, lambda: _explain(path))
        raise InputError(
            f"{path}: cannot be read as PNG, JPEG or TIFF ({error}): the file is damaged or of a "
            "kind that Pillow does not read, save it again"
        ) from error


def _explain(path: Path) -> None:
    """Refuse by name a file that is no picture."""
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    if not start.startswith(_PICTURE_STARTS):
        explain_start(path, start)


def _count_pages(image: Image.Image) -> int:
    """Return the number of pages; only those of a TIFF are slices."""
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def _iterate_pages(path: Path, is_label: bool = False) -> Iterator[Image.Image]:
    """Yield the pages of a picture; refuse a page that Pillow would change or cut."""
    with _open(path) as image:
        _check_sums(path, image)
        for index in range(_count_pages(image)):
            if index:
                image.seek(index)
            lost = _find_loss(image, is_label) or (index and _find_extra_page(image))
            if lost:
                raise InputError(f"{path}: {lost}")
            _refuse_more(path, image)
            if index == 0:
                _refuse_other_axes(path, image)
                _refuse_turned(path, image)
            image.load()  # here, where a damaged file is caught
            yield image


def _check_sums(path: Path, image: Image.Image) -> None:
    """Compare all checksums of a PNG or deflated TIFF: what decodes stops before the last ones."""
    if image.format == "PNG":
        with Image.open(path, formats=("PNG",)) as again:
            again.verify()
    for index in range(_count_pages(image)):
        image.seek(index)
        if image.info.get("compression") in _DEFLATED:
            _check_strips(path, _get_tags(image))
    image.seek(0)


def _check_strips(path: Path, tags: Mapping[int, Any]) -> None:
    """Decompress the strips or tiles of a deflated page to their ends."""
    with path.open("rb") as file:
        for offsets, sizes in _PLACES:
            for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=True):
                file.seek(offset)
                unpacker = zlib.decompressobj()
                rest = file.read(size)
                while rest and not unpacker.eof:
                    unpacker.decompress(rest, PIECE)
                    rest = unpacker.unconsumed_tail
                if not unpacker.eof:
                    raise EOFError("the compressed data end early")


def _refuse_more(path: Path, image: Image.Image) -> None:
    """Refuse a page of more pixels than its file can hold, before it is decoded.

    Where a JPEG ends early, its decoder makes the rest gray without a word.
    """
    packed = {"PNG": "deflate", "JPEG": "jpeg"}.get(str(image.format))
    most = _MOST_PIXELS.get(packed or str(image.info.get("compression")))
    width, height = image.size
    if most is not None and width * height > most * path.stat().st_size:
        raise EOFError(
            f"it declares {width} x {height} pixels, and its {path.stat().st_size} bytes can hold "
            f"{most * path.stat().st_size} at most"
        )


def _refuse_turned(path: Path, image: Image.Image) -> None:
    """Refuse a picture that a viewer would turn; of a PNG this decodes the pixels."""
    turned = image.getexif().get(_ORIENTATION)
    if turned not in _UPRIGHT:
        raise InputError(
            f"{path}: its orientation tag ({turned}) has viewers turn it, and programs differ "
            "in that: save it upright, without the tag"
        )


def _find_loss(image: Image.Image, is_label: bool) -> str:
    """Say what of a page, not loaded yet, would not be read as it is; empty if all is."""
    tags = _get_tags(image)
    tile: Any = next(iter(getattr(image, "tile", ())), ("", (), 0, ""))
    raw = str(tile[3])  # how Pillow unpacks the bytes
    samples = int(tags.get(_SAMPLES, 1))
    if len(image.getbands()) > 1 and (";16" in raw or max(tags.get(_BITS, (8,))) > 8):
        return (
            "has 16 bits a color, of which the lower 8 would be dropped: save it in gray (one file "
            "a channel), or in 8 bits a color"
        )
    if samples > len(image.getbands()):
        return (
            f"has {samples} values a pixel, of which {len(image.getbands())} would be read: save "
            "it as RGB or in gray, one file a channel"
        )
    if tags.get(_PHOTOMETRIC) == 0:
        return (
            "stores white as 0 (MinIsWhite), which some programs turn and others do not: save it "
            "with black as 0 (MinIsBlack)"
        )
    is_swapped = re.search(r"16BS|32BF|32BS", raw) and tile[0] == "libtiff"
    is_cut = tags.get(_PLANAR) == 2 and samples == 1 and tags.get(_BITS, (8,))[0] != 8
    if is_swapped or is_cut:
        return (
            "stores its numbers in an order that Pillow misreads: save it as an ordinary TIFF, "
            "without compression and with the colors of a pixel together"
        )
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 and tags.get(_BITS, (1,))[0] == 8:
        return "has 8 bits with a sign, which would be read without: save it in 16 bits"
    if is_label and re.search(r"L;[24]", raw):
        return (
            "has 2 or 4 bits a pixel, which some programs stretch to 255 and others do not: save "
            "the label in 8 bits"
        )
    return ""


def _find_extra_page(image: Image.Image) -> str:
    """Say what a page after the first is if it is no slice."""
    if int(_get_tags(image).get(_NEW_SUBFILE, 0)) & _PREVIEW_OR_MASK:
        return (
            f"page {image.tell() + 1} is a smaller copy or a mask of another by its tag, no slice: "
            "save the slices alone"
        )
    return ""


def _refuse_other_axes(path: Path, image: Image.Image) -> None:
    """Refuse channels and times among the pages, and slices that have no page of their own."""
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: holds an animation: save each picture as a PNG of its own")
    tags, num_pages = _get_tags(image), _count_pages(image)
    if not tags:
        return
    if any(tag in tags for tag in _METAMORPH):
        raise InputError(f"{path}: a MetaMorph stack, whose planes are not found: {_SAVE_AGAIN}")
    if int(tags.get(_IMAGE_DEPTH, 1)) > 1:
        raise InputError(f"{path}: slices lie within a page (ImageDepth): {_SAVE_AGAIN}")
    try:
        axes = _read_axes(str(tags.get(_DESCRIPTION, "")), image, num_pages)
    except (ValueError, TypeError, ArithmeticError):
        return  # a description of another kind
    if axes is None:
        return
    channels, slices, times = axes
    channels //= math.gcd(channels, int(tags.get(_SAMPLES, 1)))
    if (channels, slices, times) != (1, num_pages, 1):
        raise InputError(
            f"{path}: its description names {channels} channels, {slices} slices and {times} "
            f"times, the file has {num_pages} pages, which would be read as slices: {_SAVE_AGAIN}"
        )


def _read_axes(text: str, image: Image.Image, num_pages: int) -> tuple[int, int, int] | None:
    """Return the channels, slices and times that the description of a TIFF names.

    Source: the descriptions of ImageJ (`ImageJ=1.53t`, `images=10`), of OME-TIFF (XML with the
    sizes of its first image) and of tifffile (JSON with a shape).
    """
    if text.startswith("ImageJ="):
        counts = dict(re.findall(r"^(\w+)=(\d+)\s*$", text, re.M))
        channels, times = int(counts.get("channels", 1)), int(counts.get("frames", 1))
        total = int(counts.get("images", 1))
        return channels, max(1, total // (channels * times)), times
    if "<OME" in text[:2000]:
        sizes = {axis: int(n) for axis, n in re.findall(r'\bSize([CZT])="(\d+)"', text)[:3]}
        return sizes.get("C", 1), sizes.get("Z", 1), sizes.get("T", 1)
    if text.startswith('{"shape"'):
        shape = [int(size) for size in json.loads(text)["shape"]]
        page = image.size[0] * image.size[1] * len(image.getbands())
        outer = [size for size in shape[: -2 if len(image.getbands()) == 1 else -3] if size > 1]
        if len(outer) > 1 and math.prod(shape) == num_pages * page:
            return outer[0], num_pages // outer[0], 1
        return 1, max(1, math.prod(shape) // page), 1
    return None


def _get_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of the current page of a TIFF, of another picture none."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return tags


def _to_array(path: Path, page: Image.Image) -> NDArray[Any]:
    """Return a gray page (rows, columns) as it is."""
    array = np.array(page)
    tags = _get_tags(page)
    if page.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1 and array.min(initial=0) < 0:
        raise InputError(f"{path}: has values above {2**31 - 1}: save it with smaller ones")
    return array


def _read_colors(path: Path, page: Image.Image) -> NDArray[np.float32]:
    """Return a page as (rows, columns, channels): 1 or 3; transparency must be empty."""
    if page.mode in _GRAY:
        return _to_array(path, page).astype(np.float32)[..., None]
    if page.mode == "P":
        page = page.convert("RGBA")
    if page.mode not in ("RGB", "RGBA", "LA"):
        raise InputError(f"{path}: colors of the kind {page.mode} are not read: save it as RGB")
    array = np.asarray(page, dtype=np.float32)
    if page.mode in ("RGBA", "LA"):
        array, alpha = array[..., :-1], array[..., -1]
        if (alpha != alpha.max()).any():
            raise InputError(f"{path}: is partly transparent: save it without transparency")
    return array


def _is_gray(page: NDArray[np.float32]) -> bool:
    """Tell whether all channels of a page (rows, columns, channels) are the same."""
    return bool((page == page[..., :1]).all())


def _is_gray_palette(image: Image.Image) -> bool:
    """Tell whether a picture is gray with transparency, or has a palette of grays."""
    if image.mode == "LA":
        return True
    colors: Sequence[int] = (image.getpalette("RGB") or ()) if image.mode == "P" else ()
    grays = np.array(colors, dtype=int).reshape(-1, 3)
    return bool(len(grays) and (grays == grays[:, :1]).all())
