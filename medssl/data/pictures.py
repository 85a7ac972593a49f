"""PNG, JPEG and TIFF in and out: pictures without spacing, a multi-page TIFF a stack of slices.

Legend: C channels, I J K voxel axes: I counts the rows from the top, J the columns from the left,
K the pages. So an array is the picture as it is seen, and a mask lies on its picture pixel by
pixel. What is written holds pixels, nothing else of the file it came from.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medssl.config import InputError
from medssl.runs import write_file

_GRAY = {"1", "L", "I;16", "I;16B", "I", "F"}  # modes of Pillow with one number a pixel
_ORIENTATION = 0x0112  # the EXIF tag that asks a viewer to turn the picture
_UPRIGHT = (None, 0, 1)
_UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, ArithmeticError, MemoryError)


def count_channels(path: Path) -> int:
    """Return the channels of a picture by its header: 3 if it is in colour, else 1.

    Raises:
        InputError: The file cannot be read as a picture.
    """
    with _open(path) as image:
        return 1 if image.mode in _GRAY or _is_gray_palette(image) else 3


def read_shape(path: Path) -> tuple[int, int, int]:
    """Return (I, J, K) of a picture by its header: rows, columns, pages.

    Raises:
        InputError: The file cannot be read as a picture.
    """
    with _open(path) as image:
        columns, rows = image.size
        return rows, columns, _count_pages(image)


def read_channels(path: Path, num_channels: int) -> NDArray[np.float32]:
    """Read a picture as (C, I, J, K) float32; a gray one in colour passes for a gray one.

    Raises:
        InputError: The file cannot be read, is transparent, or has other channels than declared.
    """
    pages = [_read_colours(path, page) for page in _iterate_pages(path)]
    found = max(page.shape[-1] for page in pages)
    if found == 3 and num_channels == 1 and all(_is_gray(page) for page in pages):
        pages, found = [page[..., :1] for page in pages], 1
    if found != num_channels or any(page.shape != pages[0].shape for page in pages):
        shapes = sorted({page.shape for page in pages})
        raise InputError(
            f"{path}: the picture is {' and '.join(str(shape) for shape in shapes)} (rows, "
            f"columns, channels), declared are {num_channels} channels; give pictures of one kind"
        )
    return np.ascontiguousarray(np.moveaxis(np.stack(pages, -2), -1, 0))


def read_values(path: Path) -> NDArray[Any]:
    """Read a label as values (I, J, K): grey values, or the indices of a palette.

    Raises:
        InputError: The file cannot be read, is a JPEG, or is in colour.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(
            f"{path}: a JPEG does not keep label values as they are: save labels as PNG or TIFF"
        )
    pages = []
    for page in _iterate_pages(path):
        if page.mode not in _GRAY and page.mode != "P":
            raise InputError(
                f"{path}: a label holds one class value a pixel, got the colours of {page.mode}: "
                "save it as grey values or with a palette"
            )
        pages.append(np.array(page))
    if any(page.shape != pages[0].shape for page in pages):
        raise InputError(f"{path}: pages differ in size: {sorted({p.shape for p in pages})}")
    return np.stack(pages, -1)


def write_picture(path: Path, array: NDArray[Any]) -> None:
    """Write values (I, J, K), atomically; a PNG holds one slice, a TIFF one page each.

    Args:
        path: A file name that ends in .png, .tif or .tiff.
        array: uint8, uint16 (both), int32 or float32 (TIFF only).

    Raises:
        ValueError: The format cannot hold this array without a change.
    """
    is_png = path.suffix.lower() == ".png"
    kinds = ("uint8", "uint16") if is_png else ("uint8", "uint16", "int32", "float32")
    if array.dtype.name not in kinds or (is_png and array.shape[2] != 1):
        raise ValueError(f"{path}: cannot hold {array.dtype} of shape {array.shape}")
    first, *others = (
        Image.fromarray(np.ascontiguousarray(array[..., k])) for k in range(array.shape[2])
    )
    if is_png:
        write_file(path, lambda temporary: first.save(temporary, "PNG"))
        return
    more = {"save_all": True, "append_images": others} if others else {}
    compression = "tiff_adobe_deflate"
    write_file(path, lambda to: first.save(to, "TIFF", compression=compression, **more))


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever is wrong with the file becomes an InputError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
                yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; cut it into tiles") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: cannot be read as PNG, JPEG or TIFF ({error}): the file is damaged or of a "
            "kind that Pillow does not read, save it again"
        ) from error


def _count_pages(image: Image.Image) -> int:
    """Return the number of pages; only those of a TIFF are slices."""
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def _iterate_pages(path: Path) -> Iterator[Image.Image]:
    """Yield the pages of a picture, and refuse one that a viewer would turn."""
    with _open(path) as image:
        turned = image.getexif().get(_ORIENTATION)
        if turned not in _UPRIGHT:
            raise InputError(
                f"{path}: its orientation tag ({turned}) has viewers turn it, and programs differ "
                "in that: save it upright, without the tag"
            )
        for index in range(_count_pages(image)):
            if index:
                image.seek(index)
            image.load()  # here, where a damaged file is caught
            yield image


def _read_colours(path: Path, page: Image.Image) -> NDArray[np.float32]:
    """Return a page as (rows, columns, channels): 1 or 3; transparency must be empty."""
    if page.mode in _GRAY:
        return np.asarray(page, dtype=np.float32)[..., None]
    if page.mode == "P":
        page = page.convert("RGBA")
    if page.mode not in ("RGB", "RGBA", "LA"):
        raise InputError(f"{path}: colours of the kind {page.mode} are not read: save it as RGB")
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
    """Tell whether a picture is gray with transparency, or has a palette of greys."""
    if image.mode == "LA":
        return True
    colours: Sequence[int] = (image.getpalette("RGB") or ()) if image.mode == "P" else ()
    greys = np.array(colours, dtype=int).reshape(-1, 3)
    return bool(len(greys) and (greys == greys[:, :1]).all())
