"""A run folder: atomic writes, done marks, hashes, journal, provenance, pseudonyms, stop flag."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from medssl.config import InputError

Record = TypeVar("Record", bound=BaseModel)


def write_file(path: Path, write: Callable[[Path], object], mode: int | None = None) -> None:
    """Write a file so that it is either the old one or the whole new one.

    Args:
        path: Where the file goes.
        write: Writes the content to the path that it is given.
        mode: Permissions of the file, from its first byte on; None for the usual ones.

    Raises:
        InputError: The disk is full; names the folder and the free space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name}")
    try:
        if mode is not None:
            temporary.touch(mode=mode)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(_describe_full_disk(path, temporary)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _describe_full_disk(path: Path, temporary: Path) -> str:
    """Say which disk is full and that the previous file stands."""
    free = shutil.disk_usage(path.parent).free / 2**20
    written = temporary.stat().st_size / 2**20 if temporary.exists() else 0.0
    return (
        f"{path}: the disk is full: {free:.1f} MiB free after {written:.1f} MiB of it were "
        f"written; the previous version is untouched; free space on {path.parent} and start the "
        "same command again"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object, mode: int | None = None) -> None:
    """Write a JSON file atomically; non-finite numbers become null."""
    text = json.dumps(_replace_nonfinite(content), indent=1, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), mode)


def _replace_nonfinite(content: Any) -> Any:
    """Return the content with NaN and infinities as None: JSON knows neither."""
    if isinstance(content, float):
        return content if abs(content) < float("inf") else None
    if isinstance(content, Mapping):
        return {str(key): _replace_nonfinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_nonfinite(value) for value in content]
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this a medssl run or model folder?") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}; restore or delete it") from error


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file that holds a pydantic model.

    Raises:
        InputError: It is missing or damaged, or another version of this program wrote it.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
        raise InputError(
            f"{path}: not as this version of medssl writes it: {problems}; use the version that it "
            "was made with, or train anew with another --run"
        ) from error


@contextlib.contextmanager
def lock(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it.

    Args:
        path: A file for it, made if there is none.
        busy: What to say if another process holds it; None waits for that one.

    Raises:
        InputError: ``busy``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl  # not on every system; nothing else of this module needs it

            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise InputError(str(busy)) from error
        except (ImportError, OSError):  # a system, or a network disk, without locks
            pass
        yield


def lock_run(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run folder, which lies beside it, or refuse.

    A loader process of a killed training may keep it for some seconds.
    """
    home = run_dir.resolve()
    busy = f"{run_dir}: another process works on this run; wait for it, or touch {run_dir}/STOP"
    return lock(home.parent / f".{home.name}.lock", busy)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: object) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def seed_from(*parts: object) -> int:
    """Return 63 bits that are a pure function of the parts: the seed of one random draw."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_done(folder: Path, stage_hash: str) -> bool:
    """Return whether a stage has been completed with this hash.

    Raises:
        InputError: It has been completed with another hash: nothing is overwritten.
    """
    path = folder / "done.json"
    if not path.is_file():
        return False
    if read_json(path).get("hash") != stage_hash:
        raise InputError(
            f"{folder} was made with another configuration or other data; give another --run, or "
            "--restart to start this one over"
        )
    return True


class Journal:
    """The metrics of a run, one JSON object a line: the truth that MLflow mirrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, round_index: int, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        entry = {"round": round_index, "step": step, "time": time.time()}
        line = json.dumps({**entry, "metrics": _replace_nonfinite(dict(metrics))})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = (
                    line if file.read() == b"\n" else "\n" + line
                )  # a kill cut the last one short
            file.write((line + "\n").encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all entries; a line that a kill cut short is left out."""
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return entries

    def cut(self, round_index: int, step: int) -> None:
        """Drop what came after a checkpoint, so that a resumed run writes nothing twice."""
        entries = self.read()
        kept = [e for e in entries if (e["round"], e["step"]) <= (round_index, step)]
        if len(kept) < len(entries) or self.path.is_file():
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


REPORT_SECONDS = 10.0


class CaseCounter:
    """Says how far a long look at all cases is, every ten seconds; call it after each case."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._next = time.monotonic() + REPORT_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Print the number of cases done, and of all cases, if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_SECONDS
            print(f"{self.what}: {done} of {total} cases", file=sys.stderr, flush=True)


class StopFlag:
    """One flag for Ctrl-C, SIGTERM, a file named STOP in the run folder, and a time limit.

    Args:
        run_dir: The run folder, which is watched for a file named STOP.
        max_hours: Hours after which to stop; None is no limit.
    """

    def __init__(self, run_dir: Path, max_hours: float | None = None) -> None:
        self.reason: str | None = None
        self._file = run_dir / "STOP"
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def is_set(self) -> bool:
        """Return whether to stop after the current step."""
        if self.reason is None and self._file.exists():
            self.reason = f"a file {self._file}"
            with contextlib.suppress(OSError):
                self._file.unlink()
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "--max-hours"
        return self.reason is not None

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Set the flag at the first SIGINT or SIGTERM; the second one interrupts at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.reason is not None:
                print("\nstopped; the same command goes on from the last checkpoint")
                raise KeyboardInterrupt
            self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"\nstopping after this step ({self.reason}); once more stops at once")

        try:
            previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller has its own way of stopping
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def write_state(run_dir: Path, status: str, round_index: int, step: int) -> None:
    """Record the last checkpoint; nothing beyond it is mirrored to MLflow."""
    content = {"status": status, "round": round_index, "step": step}
    write_json(run_dir / "state.json", content)


def make_pseudonyms(run_dir: Path, data_root: Path, case_ids: Iterable[str]) -> dict[str, str]:
    """Return, and keep in the run folder with mode 600, a pseudonym for each case.

    The salt is drawn once per data set and kept beside the runs, so that two runs on the same
    data agree.
    """
    salts_path = run_dir.parent / ".pseudonym_salts.json"
    salts = read_json(salts_path) if salts_path.is_file() else {}
    key = str(data_root.resolve())
    if key not in salts:
        salts[key] = secrets.token_hex(16)
        write_json(salts_path, salts, mode=0o600)
    salted = {case_id: f"{salts[key]}/{case_id}" for case_id in sorted(case_ids)}
    names = {
        case_id: f"case_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for case_id, text in salted.items()
    }
    write_json(run_dir / "pseudonyms.json", names, mode=0o600)
    return names


def describe_provenance(device: str, num_threads: int) -> dict[str, Any]:
    """Return what this run was made with: versions, machine, code revision, command."""
    packages = ("medssl", "torch", "monai", "numpy", "nibabel", "mlflow")
    return {
        "command": " ".join(["medssl", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _find_version(name) for name in packages},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device,
        "threads": num_threads,
        "revision": _find_revision(),
    }


def _find_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _find_revision() -> str | None:
    """Return the git revision of the checkout that holds this package, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
