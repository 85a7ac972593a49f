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
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from medssl import ranks
from medssl.config import InputError, hide_password

Record = TypeVar("Record", bound=BaseModel)


class Shape(BaseModel):
    """What a JSON file of a run must hold, key by key; others may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)


class State(Shape):
    """state.json: the last checkpoint."""

    status: str
    round: int
    step: int


class GateMark(Shape):
    """How a gate judged a round."""

    passed: bool
    reasons: list[str]


class RoundMark(Shape):
    """done.json of a round."""

    hash: str
    round: int
    steps: int
    seconds: float
    gate: GateMark
    final: dict[str, float | None]


class ModelMark(Shape):
    """done.json of a model of a round."""

    hash: str
    num_kept: int
    agreement_with_average: float | None = None


class RoundLine(Shape):
    """What a page may say of a round: what is there is of its kind."""

    round: int = 0
    gate: dict[str, Any] | None = None
    final: dict[str, float | None] = {}


class RunSummary(Shape):
    """summary.json: what came of a run."""

    delivered: str = ""
    rounds: list[RoundLine] = []
    baseline: dict[str, int] = {}
    exit: str = ""


class DeliveredSummary(RunSummary):
    """summary.json of a run that delivers."""

    delivered: str


class DescriptionFile(Shape):
    """Any of the files that describe a run: what is there is of its kind."""

    versions: dict[str, str] = {}
    labels: dict[str, str] = {}
    label_values: list[int] = []
    reasons: list[str] = []
    dataset: dict[str, Any] = {}
    labeled: list[str] = []
    unlabeled: list[str] = []
    val: list[str] = []
    test: list[str] = []


class EvaluationSummary(Shape):
    """evaluation/summary.json, or that of a cross-check."""

    rounds: dict[str, float | None] = {}
    paired: dict[str, Any] | None = None
    dice: dict[str, Any] = {}
    classes: dict[str, dict[str, dict[str, Any] | float | None]] = {}
    notes: list[str] = []


class ConfigFile(Shape):
    """config.yaml."""

    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    losses: dict[str, dict[str, Any]] = {}
    tracking: dict[str, str] = {}
    views: list[str] = []


class PseudonymFile(RootModel[dict[str, str]]):
    """pseudonyms.json."""


SHAPES: dict[str, type[BaseModel]] = {
    "plan.json": DescriptionFile,
    "splits.json": DescriptionFile,
    "provenance.json": DescriptionFile,
    "state.json": State,
    "summary.json": RunSummary,
    "evaluation/summary.json": EvaluationSummary,
    "cross_check/summary.json": EvaluationSummary,
    "pseudonyms.json": PseudonymFile,
}
"""What those who only tell of a run read of it."""


class Entry(Shape):
    """A line of metrics.jsonl."""

    round: int
    step: int
    time: float
    metrics: dict[str, float | None]


FULL_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "files may not become so large here",
}


def write_file(path: Path, write: Callable[[Path], object], mode: int | None = None) -> None:
    """Write a file so that it is either the old one or the whole new one.

    Args:
        path: Where the file goes.
        write: Writes the content to the path that it is given.
        mode: Permissions of the file, from its first byte on; None for the usual ones.

    Raises:
        InputError: The disk is full; names the folder and the free space.
    """
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name}")
    try:
        with tell_full_disk(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            if mode is not None:
                temporary.touch(mode=mode)
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class FullDiskError(InputError):
    """A disk is full: what else would be written there fails as well."""


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written to, before anything is computed for it.

    Args:
        folder: The folder; it need not exist.
        option: What names another one on the command line.

    Raises:
        InputError: It, or the nearest folder above that exists, is read-only for this user.
    """
    home = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if home.is_dir() and not os.access(home, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {home} is read-only; name another folder by {option}")


@contextlib.contextmanager
def tell_full_disk(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn what comes of a full disk into one sentence.

    Args:
        path: The file that is written.
        temporary: The one that is written first. Some libraries hide what the disk said in errors
            of their own; then the disk is asked again, by a few more bytes of this file.

    Raises:
        FullDiskError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        match = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        reason = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if reason is None and temporary is not None:
            reason = _ask_disk(temporary)
        if reason not in FULL_DISK_ERRORS:
            raise
        raise FullDiskError(describe_full_disk(reason, path, temporary)) from error


def reserve_space(file: IO[bytes], size: int) -> None:
    """Give a file its size, with room on the disk: in a map, a full disk would end the process.

    Args:
        file: Open for writing.
        size: In bytes.

    Raises:
        OSError: There is no room.
    """
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _ask_disk(temporary: Path) -> int | None:
    """Return the error that the disk has for a few more bytes of a file, or None."""
    try:
        with temporary.open("ab") as file:
            file.write(bytes(2**16))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def describe_full_disk(reason: int, path: Path, temporary: Path | None = None) -> str:
    """Say which disk is full and that the previous file stands."""
    folder = next(home for home in path.absolute().parents if home.is_dir())
    free = shutil.disk_usage(folder).free / 2**20
    begun = ""
    if temporary is not None and temporary.exists():
        begun = f" after {temporary.stat().st_size / 2**20:.1f} MiB of it were written"
    return (
        f"{path}: {FULL_DISK_ERRORS[reason]}: {free:.1f} MiB free{begun}; the previous version is "
        f"untouched; free space on {folder} and start the same command again"
    )


_TEMPORARY = re.compile(r"\.(\d{1,9})\.[0-9a-f]{8}\..+")
_ABANDONED_S = 3600.0


def remove_leftovers(folder: Path, is_shared: bool = False, below: bool = True) -> None:
    """Remove the temporary files of processes of this program that were killed.

    Args:
        folder: Where to look.
        is_shared: Whether another machine may be writing there: files of the last hour then stay.
        below: Whether to look in all folders below it too.
    """
    for path in folder.glob("**/.*" if below else ".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or _is_running(int(match[1])):
            continue
        with contextlib.suppress(OSError):
            if not is_shared or time.time() - path.lstat().st_mtime > _ABANDONED_S:
                path.unlink()


def _is_running(number: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; names of files that are not UTF-8 stand in it as codes."""
    content = text.encode(errors="backslashreplace")
    write_file(path, lambda temporary: temporary.write_bytes(content))


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


MAKE_ANEW = (
    "restore it, or delete it and start the command again that wrote it, which makes it anew"
)


def read_json(path: Path, shape: type[BaseModel] | None = None, repair: str = MAKE_ANEW) -> Any:
    """Read a JSON file that holds an object, as all files of a run do.

    Args:
        path: The file.
        shape: What must stand in it.
        repair: What to do if it is damaged.

    Returns:
        The object, as it stands there.

    Raises:
        InputError: It is missing or damaged, or may not be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this a medssl run or model folder?") from error
    except PermissionError as error:
        raise InputError(
            f"{path}: you may not read it; it belongs to {_find_owner(path)}: ask for leave, or "
            "work in a folder of your own"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; mend the disk") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, no JSON ({error}); {repair}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged: it holds {str(content)[:40]!r} only; {repair}")
    if shape is not None:
        try:
            shape.model_validate(content)
        except ValidationError as error:
            raise InputError(
                f"{path}: damaged, or of another version: {_list_problems(error)}; {repair}"
            ) from error
    return content


def _find_owner(path: Path) -> str:
    """Return who owns a file, as far as it can be known."""
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):
        return "another user"


def _list_problems(error: ValidationError) -> str:
    """Return the places where a content is not of its shape."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file that holds a pydantic model.

    Raises:
        InputError: It is missing or damaged, or another version of this program wrote it.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(
            f"{path}: not as this version of medssl writes it: {_list_problems(error)}; use the "
            "version that it was made with, or train anew with another --run"
        ) from error


def list_rounds(run_dir: Path) -> dict[int, Path]:
    """Return the folders of a run's rounds, in order; a copy like `round_1 old` is none."""
    named = {
        int(path.name.removeprefix("round_")): path
        for path in run_dir.glob("round_*")
        if re.fullmatch(r"round_(0|[1-9][0-9]{0,5})", path.name)
    }
    return dict(sorted(named.items()))


@contextlib.contextmanager
def hold_lock(path: Path, busy: str | None = None, is_shared: bool = False) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it.

    Args:
        path: A file for it, made if there is none, or a folder.
        busy: What to say if another process holds it; None waits for that one.
        is_shared: Whether others may hold it too, if they share it as well.

    Raises:
        InputError: ``busy``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl  # not on every system; nothing else of this module needs it
    except ImportError:
        yield
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        fcntl.flock(file, kind | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
        os.close(file)
        raise InputError(str(busy)) from error
    except OSError:  # a network disk without locks
        pass
    try:
        yield
    finally:
        os.close(file)


def lock_run(run_dir: Path, is_shared: bool = False) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run folder, which lies beside it, or refuse; or share it with others.

    The first one holds it for the processes that write a run together. A loader process of a killed
    training may keep it for some seconds, for which one that torchrun has started again waits.
    """
    if not is_shared and not ranks.is_first():
        return contextlib.nullcontext()
    home = run_dir.resolve()
    busy = f"{run_dir}: another process works on this run; wait for it, or touch {run_dir}/STOP"
    path = home.parent / f".{home.name}.lock"
    return hold_lock(path, None if ranks.is_started_again() else busy, is_shared)


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


def hash_files(folder: Path, *names: str) -> dict[str, str]:
    """Return the hashes of files of a folder, for the mark that says they are whole."""
    return {name: hash_file(folder / name) for name in names}


def find_changed(folder: Path, mark: Mapping[str, Any]) -> list[Path]:
    """Return the files that are not what a mark's ``files``, of ``hash_files``, says.

    A mark of 0.1.0 says nothing of files.
    """
    hashes = mark.get("files")
    changed = []
    for name, digest in (hashes if isinstance(hashes, dict) else {}).items():
        try:
            is_same = hash_file(folder / name) == digest
        except OSError:
            is_same = False
        if not is_same:
            changed.append(folder / name)
    return changed


def hash_record(run_dir: Path) -> dict[str, str]:
    """Return the hashes that run.json keeps of what a run is begun with.

    They are of plan.json and of the parts in splits.json: where the data lies may change, and
    config.yaml is a copy for people that nothing is trained by.
    """
    plan, splits = run_dir / "plan.json", run_dir / "splits.json"
    hashes = {"plan": hash_file(plan)} if plan.is_file() else {}
    if splits.is_file():
        hashes["splits"] = hash_json({k: v for k, v in read_json(splits).items() if k != "dataset"})
    return hashes


def find_edited(run_dir: Path) -> dict[str, str]:
    """Return which of plan.json and splits.json is not what a run was begun with, and what to do.

    A run of 0.1.0 does not say it of its splits.

    Raises:
        InputError: run.json or splits.json is damaged.
    """
    mark = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    repair = {
        "plan": "start over with --restart",
        "splits": "delete it and start the same medssl train again, which writes it anew",
    }
    return {
        f"{name}.json": f"{run_dir / name}.json: not the {name} that this run was begun with; "
        f"restore it, or {repair[name]}"
        for name, digest in hash_record(run_dir).items()
        if mark.get(name) not in (None, digest)
    }


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
    """The metrics of a run, one JSON object a line: the truth that MLflow mirrors.

    Of several processes the first one writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, round_index: int, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        if not ranks.is_first():
            return
        entry = {"round": round_index, "step": step, "time": time.time()}
        line = json.dumps({**entry, "metrics": _replace_nonfinite(dict(metrics))})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tell_full_disk(self.path), self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a kill cut the last one short
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all entries; a line that a kill cut short, or that is damaged, is left out."""
        if not self.path.is_file():
            return []
        entries = map(parse_entry, self.path.read_bytes().split(b"\n"))
        return [entry for entry in entries if entry is not None]

    def cut(self, round_index: int, step: int) -> None:
        """Drop what came after a checkpoint, so that a resumed run writes nothing twice."""
        if not ranks.is_first() or not self.path.is_file():
            return
        earlier = [e for e in self.read() if (e["round"], e["step"]) <= (round_index, step)]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in earlier))


def parse_entry(line: bytes) -> dict[str, Any] | None:
    """Return an entry of the journal, or None for a line that holds none."""
    try:
        entry: dict[str, Any] = json.loads(line)
        Entry.model_validate(entry)
    except (ValueError, RecursionError):
        return None
    return entry


REPORT_SECONDS = 10.0


class CaseCounter:
    """Says how far a long look at all cases is, every ten seconds; call it after each one."""

    def __init__(self, what: str, unit: str = "cases") -> None:
        self.what, self.unit = what, unit
        self._next = time.monotonic() + REPORT_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Print the number of cases done, and of all cases, if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_SECONDS
            print(f"{self.what}: {done} of {total} {self.unit}", file=sys.stderr, flush=True)


class StopFlag:
    """One flag for Ctrl-C, SIGTERM, a file named STOP in the run folder, and a time limit.

    Of several processes the first one looks at file and time; all hear of what one knows.

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
        if self.reason is None:
            self.reason = ranks.hear_call() or self._find_reason()
        if self.reason is not None:
            ranks.call_off(self.reason)
        return self.reason is not None

    def _find_reason(self) -> str | None:
        """Return why to stop, if it is not a signal."""
        if not ranks.is_first():
            return None
        if self._file.exists():
            with contextlib.suppress(OSError):
                self._file.unlink()
            return f"a file {self._file}"
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        return "--max-hours" if is_late else None

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


_DELETING = ".deleting"
_RUN_FILES = re.compile(
    r"(config\.yaml|(plan|provenance|splits|pseudonyms|state|summary|run|tracking|trained_on)\.json|"
    r"metrics\.jsonl|report(_share)?\.html|round_\d+|evaluation|cross_check|unlabeled_masks)"
)
_EXTRA_FILES = re.compile(r"model|STOP|\.tracking\.lock|\.deleting")


def is_begun(run_dir: Path) -> bool:
    """Return whether a folder holds a run, and may go on: not one that is being deleted."""
    return (run_dir / "run.json").is_file() and not (run_dir / _DELETING).exists()


def is_remnant(run_dir: Path) -> bool:
    """Return whether a folder holds what a run left that was killed as it began or was deleted.

    That is nothing, or only what a run writes; of a model alone nobody knows.
    """
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    ours = [name for name in names if _RUN_FILES.fullmatch(name) or name == _DELETING]
    return not names or (bool(ours) and all(n in ours or _EXTRA_FILES.fullmatch(n) for n in names))


def delete_run(run_dir: Path) -> None:
    """Delete what a run folder holds, which may be a link; after a kill, go on with it."""
    if not run_dir.is_dir():
        return
    mark = run_dir / _DELETING
    mark.touch()
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    mark.unlink()


def is_half_deleted(run_dir: Path) -> bool:
    """Return whether a kill came while this run was deleted."""
    return (run_dir / _DELETING).exists()


def write_state(run_dir: Path, status: str, round_index: int, step: int) -> None:
    """Record the last checkpoint; nothing beyond it is mirrored to MLflow."""
    if not ranks.is_first():
        return
    content = {"status": status, "round": round_index, "step": step}
    write_json(run_dir / "state.json", content)


def make_pseudonyms(run_dir: Path, data_root: Path, case_ids: Iterable[str]) -> dict[str, str]:
    """Return, and keep in the run folder with mode 600, a pseudonym for each case.

    The salt is drawn once per data set and kept beside the runs, so that two runs on the same
    data agree. Where it is another user's, and so not to be read, one's own is kept. Among a
    hundred thousand cases two share eight digits: these have sixteen.
    """
    salts_path = run_dir.parent / ".pseudonym_salts.json"
    if salts_path.is_file() and not os.access(salts_path, os.R_OK):
        print(
            f"note: {salts_path} belongs to {_find_owner(salts_path)} and is for them alone: cases "
            "have other pseudonyms in your runs than in theirs",
            file=sys.stderr,
        )
        salts_path = run_dir.parent / f".pseudonym_salts.{os.getuid()}.json"
    repair = "restore it; without it cases have other pseudonyms in new runs than in old ones"
    salts = read_json(salts_path, repair=repair) if salts_path.is_file() else {}
    key = str(data_root.resolve())
    if key not in salts:
        salts[key] = secrets.token_hex(16)
        write_json(salts_path, salts, mode=0o600)
    digests = {
        case_id: hashlib.sha256(f"{salts[key]}/{case_id}".encode()).hexdigest()
        for case_id in sorted(case_ids)
    }
    counts = Counter(digest[:8] for digest in digests.values())
    names = {
        case_id: f"case_{digest[: 8 if counts[digest[:8]] == 1 else 16]}"
        for case_id, digest in digests.items()
    }
    write_json(run_dir / "pseudonyms.json", names, mode=0o600)
    return names


def describe_provenance(device: str, num_threads: int) -> dict[str, Any]:
    """Return what this run was made with: versions, machine, code revision, command."""
    packages = ("medssl", "torch", "monai", "numpy", "nibabel", "mlflow")
    return {
        "command": hide_password(" ".join(["medssl", *sys.argv[1:]])),
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
