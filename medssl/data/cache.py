"""Every scan preprocessed once, stored as memory maps that are bound to their source files.

Legend: C channels, I J K voxel axes. An entry is a folder `<recipe hash>/<case_id>/<hash of the
scan's bytes>/`. In it each label has its own folder, by its bytes and its label map, so another
scan of the same name, another label map or a corrected label never changes what a run is reading.
`meta.json` describes the image, `label.json` the label; each is written last, with the hashes of
its files. These are checked when a run starts, and what has changed is made anew. Sizes, times and
inodes would be read faster than bytes, and do not do: a program that maps a file changes it without
another time until the page is written back, and its old times may be put back.
Files are replaced, never overwritten or removed: several processes may build one entry while
another reads it, and open maps stay valid.

A file that another program has cut is reported by name when it is mapped, since its header says
how long it must be; so it is mapped anew for each patch. If it is cut in the milliseconds between
mapping and copying, SIGBUS ends the process (a loader process: with a message); the same command
then makes the file anew and goes on from the last checkpoint.
"""

import contextlib
import functools
import math
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medssl import ranks
from medssl.config import IGNORE, InputError
from medssl.data.cases import Case
from medssl.data.files import hash_source
from medssl.data.io import read_geometry, read_image, read_label, refuse_other_grid
from medssl.data.trained import hash_voxels
from medssl.formats.readers import has_spacing, name_mask_suffix
from medssl.machine import count_cores, count_free_memory, explain_out_of_memory
from medssl.runs import (
    FullDiskError,
    find_changed,
    hash_files,
    hash_json,
    read_json,
    remove_leftovers,
    seed_from,
    write_file,
    write_json,
)
from medssl.transforms.geometry import (
    Affine,
    Header,
    Shape,
    Spacing,
    Volume,
    cache_grid,
    grid_spacing,
)
from medssl.transforms.preprocess import (
    Preprocessing,
    count_bytes,
    measure_percentiles,
    preprocess_image,
    preprocess_label,
)

FORMAT = 2  # raised whenever the same recipe would give other voxels or an entry holds more
MAX_CLASS_VOXELS = 10_000
SHARE = 0.8  # of the free memory, for cases that are made at the same time


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A preprocessed case on disk; its arrays are opened on demand.

    Attributes:
        case_id: The case.
        folder: Folder of the entry.
        shape: Shape (I, J, K) of the cache grid.
        affine: Affine (4, 4) of the cache grid.
        native_shape: Shape (I, J, K) of the scan.
        native_affine: Affine (4, 4) of the scan.
        percentiles: The 0.5, 50 and 99.5 percentiles of the raw intensities, per channel.
        label_folder: Folder of the label; None for every case whose label this run may not open.
        has_spacing: Whether a spacing is known; False for a picture, on the identity affine.
        mask_suffix: Suffix of its masks, such as .nii.gz.
        native_header: Where the header of the scan places its voxels; None for a picture.
    """

    case_id: str
    folder: Path
    shape: Shape
    affine: Affine
    native_shape: Shape
    native_affine: Affine
    percentiles: tuple[tuple[float, float, float], ...]
    label_folder: Path | None
    has_spacing: bool = True
    mask_suffix: str = ".nii.gz"
    native_header: Header | None = None

    @property
    def spacing(self) -> Spacing:
        """The spacing of the cache grid along I, J, K in mm."""
        return grid_spacing(self.affine)

    @property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel of the cache grid in ml; None for a picture."""
        return float(np.prod(self.spacing)) / 1000 if self.has_spacing else None

    def image(self) -> NDArray[np.float16]:
        """Map the image (C, I, J, K), float16."""
        return map_array(self.folder / "image.npy")

    def label(self) -> NDArray[np.uint8] | None:
        """Map the classes (I, J, K), 255 = ignore; None for an unlabeled case."""
        return None if self.label_folder is None else map_array(self.label_folder / "label.npy")

    def class_voxels(self) -> dict[int, NDArray[np.int32]]:
        """Return up to 10,000 voxels (n, 3) of each foreground class that the label has."""
        return {} if self.label_folder is None else read_class_voxels(self.label_folder)


def build_cache(
    cases: Sequence[Case],
    recipe: Preprocessing,
    folder: Path,
    label_values: tuple[int, ...],
    ignore: int | None,
    num_channels: int,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, CachedCase]:
    """Preprocess what is not in the cache yet; a label is opened only where a case has one.

    As many cases are made at the same time as there are cores, and free memory.

    Args:
        cases: The cases; their `label` is None where no label may be opened.
        recipe: The stored recipe.
        folder: Folder of all caches.
        label_values: Value of each class index.
        ignore: Label value that means: not annotated.
        num_channels: Number of channels of every case.
        report: Called with (cases done, cases) after each case.

    Returns:
        case_id -> the case in the cache.

    Raises:
        InputError: Some cases cannot be read or used; names all of them.
    """
    entries = _name_entries(folder, recipe, num_channels)
    remove_leftovers(entries, is_shared=True)
    room = _Room(SHARE * count_free_memory() / ranks.count_neighbors())

    def make(case: Case) -> CachedCase:
        entry, sources, meta = _look_up(entries, case)
        if meta is None:
            with room.take(_measure_image(case, recipe), case.case_id):
                meta = _make_image(entry, case, sources, recipe, num_channels)
        label_folder = None
        if case.label is not None:
            how = (case.label, meta, label_values, ignore, room)
            label_folder = _open_label(entry, case, *how)
        return _describe(entry, label_folder, case, meta)

    made = _make_all(cases, make, room, report)
    problems = [
        f"  {name}: {error}" for name, error in made.items() if isinstance(error, InputError)
    ]
    if problems:
        raise InputError(
            "\n".join([f"{len(problems)} of {len(cases)} cases cannot be used:", *problems])
        )
    return {name: case for name, case in made.items() if isinstance(case, CachedCase)}


class _Room:
    """The memory, in bytes, that cases share which are made at the same time."""

    def __init__(self, free: float) -> None:
        self.is_closed = False
        self._free = free
        self._taken = 0
        self._is_told = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int, case_id: str) -> Iterator[None]:
        """Wait until a case has its memory; one that has all alone waits for no more than that."""
        with self._changed:
            self._tell(size, case_id)
            self._changed.wait_for(lambda: self.is_closed or self._has(size))
            if self.is_closed:
                raise InterruptedError("nothing is begun any more")
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()

    def close(self) -> None:
        """Let no case begin any more."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def _has(self, size: int) -> bool:
        """Return whether so much is left, or all of it."""
        return not self._taken or self._taken + size <= self._free

    def _tell(self, size: int, case_id: str) -> None:
        """Say where memory does not suffice, for one case or for as many as there are cores."""
        takes = f"{case_id} takes {size / 1e9:.1f} GB while it is cached"
        there_is = f"{self._free / 1e9:.1f} GB may be taken"
        if size > self._free:
            print(
                f"note: {takes}, and {there_is}: if the system kills this process, end other "
                "programs, raise the limit of the job or container, or cut the scan; the same "
                "command goes on",
                file=sys.stderr,
            )
        elif not self._has(size) and not self._is_told:
            self._is_told = True
            print(f"note: memory bounds the scans at a time: {takes}, {there_is}", file=sys.stderr)


_Made = SimpleQueue[tuple[str, CachedCase | Exception]]


def _make_all(
    cases: Sequence[Case],
    make: Callable[[Case], CachedCase],
    room: _Room,
    report: Callable[[int, int], None] | None,
) -> dict[str, CachedCase | InputError]:
    """Return each case, or what is wrong with it, made in as many threads as there are cores.

    Hashing, unpacking, statistics and resampling let other threads work. Where ``report`` raises,
    cases that were begun are finished; Ctrl-C waits for nobody: the threads end with the process.
    """
    remaining, made = iter(cases), _Made()
    number = min(count_cores(), len(cases))
    work = (remaining, make, room, made)
    threads = [threading.Thread(target=_work, args=work, daemon=True) for _ in range(number)]
    results: dict[str, CachedCase | InputError] = {}
    try:
        for thread in threads:
            thread.start()
        for done in range(1, len(cases) + 1):
            case_id, result = made.get()
            if isinstance(result, FullDiskError) or not isinstance(result, CachedCase | InputError):
                raise result
            results[case_id] = result
            if report is not None:
                report(done, len(cases))
    except KeyboardInterrupt:
        room.close()
        raise
    except Exception:
        room.close()
        _join(threads)
        raise
    _join(threads)
    return {case.case_id: results[case.case_id] for case in cases}


def _work(
    remaining: Iterator[Case], make: Callable[[Case], CachedCase], room: _Room, made: _Made
) -> None:
    """Make one case after another of those that threads share."""
    for case in remaining:
        if room.is_closed:
            return
        try:
            with explain_out_of_memory("out of memory: end other programs, or cut the scan"):
                made.put((case.case_id, make(case)))
        except Exception as error:
            made.put((case.case_id, error))


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait until threads have ended."""
    for thread in threads:
        thread.join()


def _name_entries(folder: Path, recipe: Preprocessing, num_channels: int) -> Path:
    """Return the folder of the cases that are preprocessed by a recipe."""
    key = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), "channels": num_channels}
    return folder / hash_json(key)[:16]


def list_places(cached: Mapping[str, CachedCase]) -> list[list[str]]:
    """Return case_id and the names of the folders of image and label, "" for none, as JSON has."""
    return [
        [case_id, case.folder.name, case.label_folder.name if case.label_folder else ""]
        for case_id, case in cached.items()
    ]


def open_places(
    cases: Sequence[Case],
    places: Iterable[Sequence[str]],
    recipe: Preprocessing,
    folder: Path,
    num_channels: int,
) -> dict[str, CachedCase]:
    """Return the cases that other processes have just looked up, by their `list_places`.

    Nothing is hashed a second time: of each case one description is read. What cannot be seen from
    here, on a slow network disk, is left out.
    """
    entries = _name_entries(folder, recipe, num_channels)
    known = {place[0]: place for place in places}
    cached = {}
    for case in cases:
        _, name, label = known.get(case.case_id, ("", "", ""))
        entry = entries / case.case_id / name
        meta = _read_mark(entry / "meta.json") if name else None
        if meta is not None and (not label or (entry / label / "label.json").is_file()):
            cached[case.case_id] = _describe(entry, entry / label if label else None, case, meta)
    return cached


def _look_up(entries: Path, case: Case) -> tuple[Path, list[str], dict[str, Any] | None]:
    """Return the entry of a case, the hashes of its files, and what describes it if it is whole."""
    if Path(case.case_id).name != case.case_id:
        raise InputError("a case_id names a folder: rename it without path separators")
    sources = [hash_source(path) for path in case.images]
    entry = entries / case.case_id / hash_json(sources)[:16]
    meta = _read_mark(entry / "meta.json")
    is_whole = meta is not None and meta["sources"] == sources and not find_changed(entry, meta)
    return entry, sources, meta if is_whole else None


def _measure_image(case: Case, recipe: Preprocessing) -> int:
    """Return the bytes that the image of a case takes at most while it is made."""
    try:
        shape, affine = read_geometry(case.images[0])
    except InputError:  # reading it says so
        return 0
    grid_shape, _ = cache_grid(shape, affine, recipe.spacing)
    num_channels = len(recipe.normalization)
    return max(count_bytes(shape, affine, recipe), 6 * num_channels * math.prod(grid_shape))


def _make_image(
    entry: Path, case: Case, sources: list[str], recipe: Preprocessing, num_channels: int
) -> dict[str, Any]:
    """Preprocess an image and return its description."""
    volume = read_image(case.images, num_channels)
    meta = {
        "sources": sources,
        "voxels": hash_voxels(volume.array, volume.affine),
        "native_shape": volume.shape,
        "native_affine": volume.affine.tolist(),
        "native_header": volume.header,
        "percentiles": measure_percentiles(volume),
        "has_spacing": volume.has_spacing,
    }
    image = preprocess_image(volume, recipe, overwrite=True)
    del volume  # its voxels are not needed any more
    meta |= {"shape": image.shape, "affine": image.affine.tolist()}
    _save(entry / "image.npy", _cast_to_float16(image))
    _write_mark(entry / "meta.json", meta, "image.npy")
    return meta


def _open_label(
    entry: Path,
    case: Case,
    path: Path,
    meta: dict[str, Any],
    label_values: tuple[int, ...],
    ignore: int | None,
    room: _Room,
) -> Path:
    """Return the folder of a label and its voxel lists, made anew if they are not whole."""
    made_from = {
        "source": hash_source(path),
        **({"segments": [list(pair) for pair in case.segments]} if case.segments else {}),
        "label_values": list(label_values),
        "ignore": ignore,
        "affine": meta["affine"],
        "native_affine": meta["native_affine"],
    }
    folder = entry / f"label_{hash_json(made_from)[:16]}"
    mark = _read_mark(folder / "label.json")
    if mark is not None and made_from.items() <= mark.items() and not find_changed(folder, mark):
        return folder
    shape, grid_shape = tuple(meta["native_shape"]), tuple(meta["shape"])
    with room.take(2 * math.prod(shape) + 11 * math.prod(grid_shape), case.case_id):
        classes, affine = read_label(path, label_values, ignore, case)
        native = np.asarray(meta["native_affine"])
        refuse_other_grid(path, classes.shape, affine, "its scan", shape, native)
        # The scan's own affine: the gate has let pass what differs by a hair, voxels correspond.
        label = preprocess_label(classes, native, grid_shape, np.asarray(meta["affine"]))
    _save(folder / "label.npy", label)
    voxels: dict[str, Any] = _draw_voxels(label, seed_from("class_voxels", case.case_id))
    write_file(folder / "class_voxels.npz", lambda temporary: np.savez(temporary, **voxels))
    _write_mark(folder / "label.json", made_from, "label.npy", "class_voxels.npz")
    return folder


def _describe(
    entry: Path, label_folder: Path | None, case: Case, meta: dict[str, Any]
) -> CachedCase:
    """Return the record of a cached case."""
    return CachedCase(
        case_id=case.case_id,
        folder=entry,
        shape=tuple(meta["shape"]),
        affine=np.asarray(meta["affine"], dtype=np.float64),
        native_shape=tuple(meta["native_shape"]),
        native_affine=np.asarray(meta["native_affine"], dtype=np.float64),
        percentiles=tuple((low, middle, high) for low, middle, high in meta["percentiles"]),
        label_folder=label_folder,
        has_spacing=all(has_spacing(path) for path in case.images),
        mask_suffix=name_mask_suffix(case.images[0]),
        native_header=meta["native_header"],
    )


def _cast_to_float16(image: Volume) -> NDArray[np.float16]:
    """Return the voxels in float16; values beyond its range are cut to it."""
    limit = float(np.finfo(np.float16).max)
    half = np.empty(image.array.shape, np.float16)
    for channel, target in zip(image.array, half, strict=True):
        for plane, rounded in zip(channel, target, strict=True):
            rounded[:] = np.clip(plane, -limit, limit)
    return half


def _draw_voxels(label: NDArray[np.uint8], seed: int) -> dict[str, Any]:
    """Return class index -> voxels (n, 3) drawn without replacement, for each foreground class."""
    generator = np.random.default_rng(seed)
    return {
        str(index): draw_class_voxels(label, index, MAX_CLASS_VOXELS, generator)
        for index in np.unique(label).tolist()
        if index not in (0, IGNORE)
    }


def draw_class_voxels(
    classes: NDArray[np.uint8], index: int, most: int, generator: np.random.Generator
) -> NDArray[np.int32]:
    """Return voxels (n, 3) of a class, in order: all of them, or as many as wanted.

    Args:
        classes: Classes (I, J, K).
        index: The class.
        most: How many are drawn, without replacement, where there are more.
        generator: Source of the draw.
    """
    counts = [int(np.count_nonzero(plane == index)) for plane in classes]
    chosen = np.arange(total := sum(counts))
    if total > most:
        chosen = np.sort(generator.choice(total, most, replace=False))
    first, voxels = 0, [np.empty((0, 3), np.int32)]
    for i, (plane, count) in enumerate(zip(classes, counts, strict=True)):
        start, stop = np.searchsorted(chosen, (first, first + count))
        if start < stop:  # a list of all voxels takes 24 bytes for each
            places = np.argwhere(plane == index)[chosen[start:stop] - first]
            voxels.append(np.insert(places, 0, i, axis=1).astype(np.int32))
        first += count
    return np.concatenate(voxels)


def _write_mark(path: Path, content: dict[str, Any], *names: str) -> None:
    """Write a description, with the hashes of the files it describes and of itself."""
    content = {**content, "files": hash_files(path.parent, *names)}
    write_json(path, {**content, "digest": hash_json(content)})


def _read_mark(path: Path) -> dict[str, Any] | None:
    """Return a description as it was written; None if it is missing, damaged or of 0.1.0."""
    try:
        content: dict[str, Any] = read_json(path)
    except InputError:
        return None
    digest = content.pop("digest", None)
    return content if digest == hash_json(content) else None


def read_sources(case: CachedCase) -> list[object]:
    """Return what a cached case was made from: hashes of files, and how the label was read."""
    sources = [read_json(case.folder / "meta.json")["sources"]]
    if case.label_folder is not None:
        label = read_json(case.label_folder / "label.json")
        sources.append({k: v for k, v in label.items() if k not in ("files", "digest")})
    return sources


_GONE = (
    "cannot be read: damaged, or removed while it was used; the same command makes it anew and "
    "goes on from the last checkpoint"
)


def map_array(path: Path, repair: str = _GONE) -> NDArray[Any]:
    """Map an array file, read-only; an error says how to ``repair`` it.

    Raises:
        InputError: It is gone or damaged.
    """
    try:
        dtype, shape, order, offset = _read_layout(path, _find_version(path))
        return np.memmap(path, dtype, "r", offset, shape, order)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: {repair}") from error


def read_class_voxels(folder: Path) -> dict[int, NDArray[np.int32]]:
    """Return the voxels (n, 3) of each foreground class that are stored with a label.

    Raises:
        InputError: They are gone or damaged.
    """
    path = folder / "class_voxels.npz"
    try:
        return _read_version(path, _find_version(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {_GONE}") from error


Version = tuple[int, int, int]  # of a file: one that was written anew has another


def _find_version(path: Path) -> Version:
    """Return what tells a file from the one that was there before."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)  # each patch is cut from a case that was cut from before
def _read_layout(
    path: Path, version: Version
) -> tuple[np.dtype[Any], tuple[int, ...], Literal["C", "F"], int]:
    """Read how the values of an array file lie in it: of a map that stays open all would stay."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.dtype, array.shape, "F" if array.flags.fnc else "C", array.offset


@functools.lru_cache(maxsize=64)  # of a few hundred kilobytes each
def _read_version(path: Path, version: Version) -> dict[int, NDArray[np.int32]]:
    """Read the voxels of each class."""
    with np.load(path, allow_pickle=False) as stored:
        return {int(index): stored[index] for index in stored.files}


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write an array file atomically."""
    write_file(path, lambda temporary: np.save(temporary, array, allow_pickle=False))
