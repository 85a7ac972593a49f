"""Numbers in a file, in any encoding: how many it can hold, and a way to read them in pieces.

Encodings are `raw`, `gzip`, `bzip2`, `zlib` (gzip too), `hex` and `ascii` (numbers as text).
"""

import bz2
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medssl.config import InputError
from medssl.formats.scan import PIECE, Values

_MOST_HELD = {"raw": 1.0, "gzip": 1032.0, "zlib": 1032.0, "bzip2": 1.5e6, "hex": 0.5}
_LONGEST = 1000  # characters of one number in text
_FOREIGN = "behind the compressed data stands what does not belong to it"


def find_beside(path: Path, name: str) -> Path:
    """Return the data file that a header names, beside it or in a folder there.

    Raises:
        InputError: It is elsewhere, or not there.
    """
    relative = Path(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or ":" in name:
        raise InputError(
            f"{path}: its data file is elsewhere ({name}): put both into one folder and correct "
            "the name in the header"
        )
    beside = path.parent / relative
    if not beside.is_file():
        raise InputError(f"{path}: its data file {name} is not there: copy it there too")
    return beside


def open_numbers(
    path: Path,
    dtype: np.dtype[Any],
    num_values: int,
    *,
    encoding: str = "raw",
    offset: int = 0,
    skip: int = 0,
    has_more: bool = False,
) -> Values:
    """Return a function that yields the numbers of a file in pieces (n,), and reads it to its end.

    A file that is damaged or cut is refused there, by any error that `guard` explains.

    Args:
        path: The file.
        dtype: Of the numbers.
        num_values: How many the header declares.
        encoding: See the module.
        offset: Byte of the file from which on they are encoded.
        skip: Decoded bytes before the first number.
        has_more: Whether other things may stand behind the last one.

    Raises:
        EOFError: There are not as many bytes, before anything is allocated; or more raw ones.
    """
    held = path.stat().st_size - offset
    declared = num_values * dtype.itemsize
    most = (held + 1) // 2 if encoding == "ascii" else int(held * _MOST_HELD[encoding])
    is_more = encoding == "raw" and declared < held and not has_more
    if (num_values if encoding == "ascii" else declared) > most or is_more:
        raise EOFError(
            f"the header declares {num_values} values of {dtype}, which are {declared} bytes, and "
            f"{held} bytes ({encoding}) are there for them"
        )

    def iterate() -> Iterator[NDArray[Any]]:
        with path.open("rb") as file:
            file.seek(offset)
            blocks = _iterate_bytes(file, encoding, dtype)
            yield from _iterate_numbers(blocks, dtype, num_values, skip, has_more)

    return iterate


def _iterate_bytes(file: IO[bytes], encoding: str, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Yield the decoded bytes of a file, from its current position to its end."""
    if encoding == "zlib":
        yield from _unpack(file)
        return
    if encoding in ("hex", "ascii"):
        yield from _read_text(file, encoding, dtype)
        return
    stream: Any = file
    if encoding == "gzip":
        stream = gzip.GzipFile(fileobj=file)
    elif encoding == "bzip2":
        stream = bz2.BZ2File(file)
    try:
        while block := stream.read(PIECE):
            yield block
    except gzip.BadGzipFile as error:
        if "CRC" in str(error) or "length" in str(error):
            raise
        raise OSError(_FOREIGN) from error


def _unpack(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the decoded bytes of a zlib or gzip stream."""
    unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)
    block = file.read(PIECE)
    while block and not unpacker.eof:
        if content := unpacker.decompress(block, PIECE):
            yield content
        block = unpacker.unconsumed_tail or unpacker.unused_data or file.read(PIECE)
    if not unpacker.eof:
        raise EOFError("the compressed data end early")
    if block:
        raise OSError(_FOREIGN)


def _read_text(file: IO[bytes], encoding: str, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Yield the bytes of hexadecimal digits, or of numbers between spaces or commas."""
    parse: Callable[[bytes], int | float] = float if dtype.kind == "f" else int
    rest = b""
    while True:
        block = file.read(PIECE)
        text = rest + block.replace(b",", b" ")
        if encoding == "hex":
            digits = b"".join(text.split())
            end = len(digits) if not block else len(digits) // 2 * 2
            rest = digits[end:]
            yield bytes.fromhex(digits[:end].decode("ascii"))
        else:
            words = text.split()
            is_cut = bool(block) and not text[-1:].isspace()
            rest = words.pop() if is_cut and words else b""
            if len(rest) > _LONGEST:
                raise ValueError(f"{rest[:16]!r}... is no number")
            with np.errstate(over="ignore"):
                yield np.array([parse(word) for word in words], dtype).tobytes()
        if not block:
            return


def _iterate_numbers(
    blocks: Iterable[bytes], dtype: np.dtype[Any], num_values: int, skip: int, has_more: bool
) -> Iterator[NDArray[Any]]:
    """Yield numbers in pieces (n,), and take all blocks, also those behind the last number."""
    rest = b""
    for block in blocks:
        content = rest + block[skip:]
        skip -= min(skip, len(block))
        whole = min(len(content) // dtype.itemsize, num_values) * dtype.itemsize
        rest = content[whole:] if num_values else content[:1]
        if whole:
            values = np.frombuffer(content[:whole], dtype)
            num_values -= values.size
            yield values
    if num_values:
        raise EOFError(f"{num_values} values that the header declares are missing")
    if rest and not has_more:
        raise ValueError("there are more values than the header declares")


def split_channels(iterate: Values, num_before: int, num_channels: int) -> Iterator[NDArray[Any]]:
    """Yield numbers channel by channel where the file has them together, in a pass for each.

    Args:
        iterate: Starts a pass over all numbers.
        num_before: Numbers of one channel that stand together: 1 where a voxel's do.
        num_channels: How many there are.
    """
    for channel in range(num_channels):
        start = 0
        for values in iterate():
            owners = np.arange(start, start + values.size) // num_before % num_channels
            start += values.size
            yield values[owners == channel]


def iterate_planes(array: NDArray[Any], has_channels_first: bool = False) -> Iterator[bytes]:
    """Yield the little-endian bytes of each plane of (I, J, K[, C]): along I first, then J, K, C.

    Args:
        array: The numbers.
        has_channels_first: Put the channels of a voxel together instead.
    """
    if has_channels_first and array.ndim == 4:
        array = np.moveaxis(array, -1, 0)
    dtype = array.dtype.newbyteorder("<")
    for where in np.ndindex(array.shape[:1:-1]):
        yield array[(..., *where[::-1])].astype(dtype, copy=False).tobytes(order="F")
