"""A data set on an object store (S3, or what else fsspec opens), read through a copy in the cache.

The copy is a plain folder that is brought up to date when a command starts, so that layouts and
readers know paths alone. All of it is copied before anything is read, since the gate opens every
scan, and hashes its bytes, before anything is trained.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from medssl.config import InputError, hide_password
from medssl.runs import (
    FULL_DISK_ERRORS,
    CaseCounter,
    hash_json,
    hold_lock,
    read_json,
    remove_leftovers,
    write_file,
    write_json,
    write_text,
)

MARK, INDEX = "store.json", "index.jsonl"  # beside the copy: its URL, and a line for each file

_LISTS = (".csv", ".json")
_MOST_THREADS = 8  # one connection alone does not fill a line
_VERSIONS = (
    "ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated",
    "mtime", "modified", "created",
)  # fmt: skip
_BUCKETS = {"s3", "gs", "az", "abfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


class _Object(NamedTuple):
    """An object on a store: its full name there, its bytes if known, what changes with it."""

    name: str
    size: int | None
    version: str


def mirror_store(url: str, cache: Path) -> Path:
    """Bring the copy of what a URL names up to date, and return where it is.

    What has another version there (ETag, else time; and size) is copied, what is gone there is
    removed. A file appears whole or not at all. Of several processes one copies at a time, and the
    next one, as the same command again, only what is not there yet.

    Args:
        url: A folder, a list and the files of its folder, or one scan.
        cache: The folder of caches; that of this copy in it goes by the URL without its password.

    Raises:
        InputError: Nothing is there, the store does not give it, or the disk does not hold it.
    """
    import fsspec  # heavy: only where there is a URL

    shown = hide_password(url).rstrip("/")
    with _explain(shown):
        system, place = fsspec.core.url_to_fs(url)
    place, name = place.rstrip("/"), ""
    if place.lower().endswith(_LISTS):
        place, _, name = place.rpartition("/")
    home = cache / "stores" / hash_json(shown.removesuffix(f"/{name}"))[:16]
    folder = home / (unquote(place.rpartition("/")[2].partition("?")[0]) or "data")
    with hold_lock(home / ".lock"):
        with _explain(shown):
            objects = _list_objects(system, place)
        _refuse_names(shown, objects)
        write_json(home / MARK, {"url": shown})
        _update(system, objects, folder, shown)
    is_scan = [one.name for one in objects.values()] == [place]
    return folder / (next(iter(objects)) if is_scan else name)


def find_url(path: Path) -> str | None:
    """Return the URL of which a folder is a copy, or lies in one; None for any other folder."""
    for folder in path.resolve().parents:
        with contextlib.suppress(InputError):
            return str(read_json(folder / MARK)["url"])
    return None


def _list_objects(system: Any, place: str) -> dict[str, _Object]:
    """Return the objects below a place, or at it, by their paths from there."""

    def describe(name: str) -> _Object:
        about = entries[name]
        if about.get("size") is None:  # as in a folder on the web
            about = system.info(name)
        version = next((str(about[key]) for key in _VERSIONS if about.get(key)), "")
        return _Object(name, about.get("size"), f"{about.get('size')} {version}")

    system.invalidate_cache()  # of an earlier look by this process
    entries = {
        name: about
        for name, about in _find_entries(system, place).items()
        if about.get("type") != "directory" and not name.endswith("/")
    }
    if not entries:
        raise FileNotFoundError(place)
    start = f"{place}/" if place not in entries else f"{place.rpartition('/')[0]}/"
    names = {name: name.removeprefix(start) for name in entries}
    if place.startswith("http"):
        names = {name: unquote(path.partition("?")[0]) for name, path in names.items()}
    with ThreadPoolExecutor(_count_threads(system)) as pool:
        return dict(zip(names.values(), pool.map(describe, names), strict=True))


def _find_entries(system: Any, place: str) -> dict[str, dict[str, Any]]:
    """Return what a store says of all that is below a place; of a file, of that alone."""
    entries: dict[str, dict[str, Any]] = {}
    if not _BUCKETS.isdisjoint(system.protocol):
        entries.update(system.find(place, detail=True))  # at once, and not folder by folder
        return entries
    folders = [place]
    while folders:  # find of the others leaves out, in silence, a folder that fails
        folder = folders.pop()
        for about in system.ls(folder, detail=True):
            if about["type"] != "directory":
                entries[about["name"]] = about
            elif about["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(about["name"])
    return entries or {place: system.info(place)}


def _count_threads(system: Any) -> int:
    """Return how many threads may ask a store at once."""
    return _MOST_THREADS if system.async_impl else 1


def _refuse_names(shown: str, objects: Mapping[str, _Object]) -> None:
    """Refuse objects that would leave the folder, and those that lie in another one."""
    wrong = [
        name
        for name in objects
        if not {"", ".", ".."}.isdisjoint(name.split("/"))
        or any(str(parent) in objects for parent in Path(name).parents)
    ]
    if wrong:
        raise InputError(
            f"{shown}: {len(wrong)} objects have names that no folder can hold, such as "
            f"{wrong[0]!r}: rename them there, or name a folder without them"
        )


def _update(system: Any, objects: Mapping[str, _Object], folder: Path, shown: str) -> None:
    """Make a folder hold these objects, and nothing else."""
    index = folder.with_name(INDEX)
    remove_leftovers(folder)
    _remove_others(folder, objects)
    lines = {
        name: line
        for name, line in _read_index(index).items()
        if name in objects and line == [objects[name].version, *_identify(folder / name)]
    }
    write_text(index, "".join(map(_write_line, lines.items())))
    new = {name: one for name, one in objects.items() if name not in lines}
    size, more = (sum(one.size or 0 for one in many.values()) for many in (objects, new))
    free = shutil.disk_usage(folder.parent).free
    about = f"{shown}: {len(objects)} files, {size / 1e9:.2f} GB"
    what = f"{len(new)} to copy, {more / 1e9:.2f} GB" if new else "nothing to copy"
    if more > free:
        raise InputError(
            f"{about}; {what}, and {folder} has room for {free / 1e9:.2f} GB: make room there, or "
            "start the command in a folder on another disk (training: give --run there)"
        )
    print(f"{about}; {what}: {folder} ({free / 1e9:.0f} GB free)", flush=True)
    report = CaseCounter(f"copying {shown}", "files")
    with index.open("ab", buffering=0) as file, ThreadPoolExecutor(_count_threads(system)) as pool:

        def copy(name: str) -> None:
            write_file(folder / name, lambda temporary: _copy(system, new[name], temporary, shown))
            line = [new[name].version, *_identify(folder / name)]
            file.write(_write_line((name, line)).encode())  # one call: whole beside those of others

        jobs = [pool.submit(copy, name) for name in new]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                report(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)


def _remove_others(folder: Path, objects: Mapping[str, _Object]) -> None:
    """Remove the files of a folder that are none of these objects, and folders without a file."""
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in names):
            if path.relative_to(folder).as_posix() not in objects:
                path.unlink()
        with contextlib.suppress(OSError):
            os.rmdir(place)


def _copy(system: Any, one: _Object, path: Path, shown: str) -> None:
    """Copy an object to a file."""
    with _explain(shown):
        system.get_file(one.name, str(path))
    size = path.stat().st_size
    if one.size not in (None, size):
        raise InputError(
            f"{shown}: {one.name} came with {size} of {one.size} bytes: it was changed, or the "
            "connection broke; the same command goes on"
        )


def _read_index(index: Path) -> dict[str, list[object]]:
    """Return version, size and time of the files that were copied; a damaged line is left out."""
    lines: dict[str, list[object]] = {}
    for text in index.read_bytes().splitlines() if index.is_file() else []:
        with contextlib.suppress(ValueError):
            name, *line = json.loads(text)
            lines[name] = line
    return lines


def _write_line(item: tuple[str, list[object]]) -> str:
    """Return the line of a file in the index."""
    return json.dumps([item[0], *item[1]]) + "\n"


def _identify(path: Path) -> tuple[int, int] | tuple[()]:
    """Return size and time of a file, which change if somebody writes it; nothing if it is gone."""
    try:
        status = path.lstat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _explain(shown: str) -> Iterator[None]:
    """Turn what a store, each in its own way, says into one sentence.

    Raises:
        InputError: What is wrong, and how to repair it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
            raise
        reason = hide_password(f"{type(error).__name__}: {error}")[:300]
        raise InputError(f"{shown}: {_repair(error, shown.partition(':')[0], reason)}") from error


def _repair(error: Exception, protocol: str, reason: str) -> str:
    """Say what an error of a store means, and what to do."""
    server = "AWS_ENDPOINT_URL names a server of your own" if protocol == "s3" else "its server too"
    if isinstance(error, ImportError):
        package = "'medssl[s3]'" if protocol == "s3" else "what it names"
        return f"{protocol}:// needs a package that is missing ({reason}): pip install {package}"
    if isinstance(error, ValueError) and "rotocol" in reason:
        return f"{reason}: give a folder, or a URL such as s3://BUCKET/FOLDER"
    if isinstance(error, FileNotFoundError):
        return f"no such bucket, folder or file, or nothing in it: look at its spelling; {server}"
    is_refused = isinstance(error, PermissionError) or "Credential" in reason
    if is_refused or getattr(error, "status", None) in (401, 403):
        known = _CREDENTIALS.get(protocol, "user and password")
        return f"the store does not let you read it ({reason}): set {known}, or ask for leave"
    return (
        f"the store does not answer ({reason}): look at the network, and at the address; {server}; "
        "the same command goes on with what is not copied yet"
    )
