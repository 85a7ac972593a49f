"""The MLflow mirror of a run folder: the folder is the truth, and no server can stop a run.

``sync`` reads files and sends what MLflow lacks. A parent run stands for a training, a child run
for each round. Case ids, paths and user names stay at home: see ``_make_scrub``. MLflow is slow
to import and has a will of its own, so training never loads it: ``Mirror`` talks to a small
process that does.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from medssl.config import InputError
from medssl.runs import hash_file, hash_json, read_json, write_json

PAUSE_S = 15.0
"""Seconds between two mirrorings of a run; doubled after each failure, up to ``_MAX_PAUSE_S``."""

_MAX_PAUSE_S = 240.0
_MODEL_LIMIT = 40 * 2**20  # bytes of a model that MLflow gets a copy of
_PAGE_LIMIT = 5 * 2**20  # bytes of a report that MLflow gets a copy of
_OVERLAY_SIDE = 1200  # pixels
_LINES_AT_ONCE = 500
_PARTS = ("labeled", "unlabeled", "val", "test")
_VIEW = "medssl"
_FINISHED = ("delivered", "stopped_by_gate")
_OF_A_ROUND = (
    "val/",
    "monitors/coverage/",
    "monitors/pseudo_coverage/",
    "monitors/uncertainty",
    "monitors/gate",
)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5FD0", "#8C6D31")
_RUN_STATUS = {
    "running": "RUNNING",
    "delivered": "FINISHED",
    "stopped_by_gate": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set before mlflow is imported, unless the person has set them; telemetry is off always."""

Scrub = Callable[[str], str]


def default_uri(runs_folder: Path) -> str:
    """Return the store of a folder of runs: sqlite, absolute; made at its first use."""
    return f"sqlite:///{runs_folder.resolve() / 'mlflow.db'}"


def sync(run_dir: Path, uri: str | None = None, experiment: str | None = None) -> None:
    """Bring MLflow up to what the run folder holds; twice is the same as once.

    Args:
        run_dir: The run folder; only its files are read, and RUN/tracking.json is written.
        uri: The MLflow store; None or "auto": the configured one, else the folder's own.
        experiment: Its name there; None or "auto": the configured one, else the data set's.

    Raises:
        InputError: This is no run folder, or MLflow did not take it; nothing is lost then.
    """
    folder = _read_folder(run_dir.resolve())
    configured = folder.config.get("tracking", {})
    uri = _choose(uri, configured.get("uri")) or default_uri(folder.path.parent)
    name = _choose(experiment, configured.get("experiment")) or folder.dataset
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.exceptions import MlflowException

    try:
        with _lock(folder.path / ".tracking.lock"):
            _send_all(folder, uri, name)
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(
            f"MLflow at {_hide_password(uri)} did not take {folder.path.name}: {reason}; nothing "
            f"is lost: `medssl sync {run_dir}` uploads it later"
        ) from error


class Mirror:
    """Keeps MLflow up to date beside a training, from a process of its own.

    Whatever happens to the server, nothing here raises or waits, but for ``close``.

    Args:
        run_dir: The run folder.
        uri: As in ``sync``; "none" mirrors nothing.
        experiment: As in ``sync``.
        pause_s: Seconds between two mirrorings.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str | None = None,
        experiment: str | None = None,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._run_dir = run_dir
        self._arguments = json.dumps([str(run_dir.resolve()), uri, experiment])
        self._pause_s = pause_s
        self._news = threading.Event()
        self._closing = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._work, name="mlflow mirror", daemon=True)
        if uri != "none":
            self._thread.start()

    def notify(self) -> None:
        """Say that the run folder has something new; returns at once."""
        self._news.set()

    def close(self, timeout_s: float = 60.0) -> None:
        """Mirror the last state within ``timeout_s`` seconds; one line says if that failed."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._problem = f"no answer within {timeout_s:g} s"
        self._end_process()
        if self._problem:
            print(
                f"MLflow has not got all of this run ({self._problem}); "
                f"`medssl sync {self._run_dir}` uploads it later"
            )

    def _end_process(self) -> None:
        """End the process, if it is still there, and close its pipes."""
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # leaving it closes and waits
            pass

    def _work(self) -> None:
        """Pass on the news, now and then; once more at the end."""
        pause = self._pause_s
        while not self._closing.is_set():
            self._news.wait()
            self._news.clear()
            if self._closing.is_set():
                break
            self._problem = self._ask()
            pause = min(2 * pause, _MAX_PAUSE_S) if self._problem else self._pause_s
            self._closing.wait(pause)
        self._problem = self._ask()
        if self._process is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.communicate(timeout=5)  # closes its input, at which it ends

    def _ask(self) -> str:
        """Have the process mirror the folder; return "" or what went wrong."""
        try:
            if self._process is None or self._process.poll() is not None:
                self._end_process()
                self._process = _start_process(self._arguments)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            return str(json.loads(answer)) if answer else "its process ended"
        except (OSError, ValueError) as error:
            return str(error)


def _start_process(arguments: str) -> subprocess.Popen[str]:
    """Start the process that mirrors a run folder at each line that it reads."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    code = "from medssl.tracking import _answer_requests; _answer_requests()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C stops the training, which then closes the mirror
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def _answer_requests() -> None:
    """Mirror the run folder once for each line of standard input; the end of it is the end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a job's end: the training still has a say
    run_dir, uri, experiment = json.loads(sys.argv[1])
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what mlflow prints is no answer
    for _ in sys.stdin:
        answer = ""
        try:
            sync(Path(run_dir), uri, experiment)
        except Exception as error:  # whatever it is, the training goes on and is told in a line
            answer = f"{type(error).__name__}: {error}".removeprefix("InputError: ")
        print(json.dumps(answer), file=answers, flush=True)


# --- the run folder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """What a run folder holds, as plain types; nothing in it has been scrubbed."""

    path: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    splits: dict[str, Any]
    provenance: dict[str, Any]
    state: dict[str, Any]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    pseudonyms: dict[str, str]

    @property
    def dataset(self) -> str:
        """Return the name of the data set."""
        return str(self.splits.get("dataset", {}).get("name") or "medssl")

    @property
    def status(self) -> str:
        """Return the state of the run, in our words."""
        return str(self.state.get("status", "running"))

    @property
    def is_finished(self) -> bool:
        """Return whether the run has ended with a delivered model, so that nothing changes."""
        return self.status in _FINISHED

    @property
    def rounds(self) -> dict[int, dict[str, Any]]:
        """Return what each completed round has recorded, in order."""
        found = {int(p.parent.name[6:]): p for p in self.path.glob("round_[0-9]*/done.json")}
        summaries = {entry["round"]: entry for entry in self.summary.get("rounds", [])}
        rounds = {r: {**summaries.get(r, {}), **read_json(found[r])} for r in sorted(found)}
        for done in rounds.values():
            for key in ("agreement", "kept_cases"):
                done.setdefault(key, done.get("final", {}).get(f"monitors/{key}"))
        return rounds


def _read_folder(path: Path) -> _Folder:
    """Read a run folder.

    Raises:
        InputError: It has no config.yaml: it is none.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: no run folder (it has no config.yaml); name one, as runs/mine")

    def read(name: str) -> dict[str, Any]:
        return dict(read_json(path / name)) if (path / name).is_file() else {}

    return _Folder(
        path=path,
        config=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {},
        plan=read("plan.json"),
        splits=read("splits.json"),
        provenance=read("provenance.json"),
        state=read("state.json"),
        summary=read("summary.json"),
        evaluation=read("evaluation/summary.json"),
        pseudonyms=read("pseudonyms.json"),
    )


def _read_points(folder: _Folder, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the journal's entries from a byte offset up to the last checkpoint.

    Each comes with the offset behind it. A line that is no JSON (cut by a kill) is passed over.
    """
    path = folder.path / "metrics.jsonl"
    if not path.is_file():
        return
    if offset > path.stat().st_size:
        offset = 0  # the journal has been rewritten; sending points again doubles nothing
    last = (folder.state.get("round", -1), folder.state.get("step", -1))
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            entry = _parse_line(line)
            if entry is None:
                continue
            if not folder.is_finished and (entry["round"], entry["step"]) > last:
                return
            yield entry, offset


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return a journal entry, or None for a line that was cut short."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry if line.endswith(b"\n") else None


def _choose(*values: str | None) -> str | None:
    """Return the first value that says something."""
    return next((value for value in values if value not in (None, "", "auto", "none")), None)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it."""
    import fcntl  # not on every system; nothing else of this module needs it

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- what must not leave ------------------------------------------------------------------------


def _make_scrub(folder: _Folder) -> Scrub:
    """Return a function that takes case ids, folders and passwords out of a text.

    A case id becomes its pseudonym wherever it stands between characters that are no letters or
    digits. (In running text a number of one or two digits is left alone.) Of a path its last part
    stays, of a URL everything but the password.
    """
    names = folder.pseudonyms
    ids = _match_ids(name for name in names if not (name.isdigit() and len(name) < 3))
    roots = _match_roots(folder)

    def scrub(text: str) -> str:
        if text in names:
            return names[text]
        text = roots.sub(lambda match: Path(match.group()).name, _hide_password(text))
        if text.startswith(("/", "~/")):
            text = Path(text).name
        text = re.sub(r"sqlite:/{2,}(?:[^\s/]+/)*", "sqlite:", text)
        text = re.sub(r"(?<![\w./:-])~?/(?:[^\s/'\"]+/)+", "", text)
        return ids.sub(lambda match: names[match.group()], text)

    return scrub


def _match_ids(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of names that stand alone; digits behind a decimal point do not."""
    longest_first = sorted(names, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first)) or "(?!)"
    return re.compile(rf"(?<![A-Za-z0-9])(?<!\d\.)(?:{either})(?![A-Za-z0-9])")


def _match_roots(folder: _Folder) -> re.Pattern[str]:
    """Return a pattern of the folders that this run has to do with."""
    root = folder.config.get("data", {}).get("root"), folder.splits.get("dataset", {}).get("root")
    paths = {str(path).rstrip(os.sep) for path in (*root, folder.path) if path}
    known = sorted((path for path in paths if os.sep in path), key=len, reverse=True)
    either = "|".join(map(re.escape, known)) or "(?!)"
    return re.compile(rf"(?<![\w.])(?:{either})(?![\w-])")


def _hide_password(uri: str) -> str:
    """Return a URL without user name and password."""
    return re.sub(r"://[^/@\s]+@", "://", uri)


def _scrub_tree(value: Any, scrub: Scrub) -> Any:
    """Return plain data with every text, keys included, scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(str(key)): _scrub_tree(item, scrub) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub_tree(item, scrub) for item in value]
    return value


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and short texts of the values; what is unset or "auto" says nothing."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        for index, value in enumerate(tree):
            yield from _flatten(value, f"{prefix}.{index}")
    elif isinstance(tree, list | tuple):
        is_size = all(isinstance(item, int | float) for item in tree)
        yield from _flatten((" x " if is_size else ", ").join(map(_shorten, tree)), prefix)
    elif tree not in (None, "", "auto"):
        text = _shorten(tree)
        if len(text) < 250:
            yield prefix, text


def _shorten(value: object) -> str:
    """Return a value as a person would write it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _refuse_names(path: Path, found: Iterable[str]) -> None:
    """Refuse a file that others made for going out if something was found in it.

    Raises:
        InputError: It holds a case_id or a path; it stays here.
    """
    for text in found:
        raise InputError(
            f"{path} holds a case_id or a path, {text.strip()[:80]!r}, and so was not sent to "
            "MLflow; medssl never writes one there: make the file again with this version"
        )


# --- sending ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where a run folder goes: MLflow, and the record of what it has already got."""

    client: Any
    folder: _Folder
    scrub: Scrub
    record: dict[str, Any]
    save: Callable[[], None]

    @property
    def parent(self) -> str:
        """Return the id of the run that stands for the training."""
        return str(self.record["parent"])

    def once(self, name: str, content: object, send: Callable[[], object]) -> None:
        """Send something unless the same content has been sent under this name."""
        if self.record["sent"].get(name) != content:
            send()
            self.record["sent"][name] = content
            self.save()


def _send_all(folder: _Folder, uri: str, experiment: str) -> None:
    """Send what is new, the most telling first; the record says how far it came."""
    target = _open_target(folder, uri, experiment)
    _send_params(target)
    _send_tags(target)
    _send_points(target)
    _send_round_metrics(target)
    _send_test_metrics(target)
    _send_overlays(target)
    _send_documents(target)
    _send_status(target)
    _send_report(target)
    _send_model(target)


def _open_target(folder: _Folder, uri: str, experiment: str) -> _Target:
    """Connect, and find or make the parent run."""
    path = folder.path / "tracking.json"
    records = read_json(path) if path.is_file() else {}
    # a store that moves with the folder is still the same store
    key = "own store" if uri == default_uri(folder.path.parent) else _hide_password(uri)
    client = _connect(uri)
    if key not in records or not _is_there(client, records[key]["parent"]):
        records[key] = {"children": {}, "offset": 0, "sent": {}}
        records[key]["parent"] = _make_parent(client, folder, uri, experiment)
        write_json(path, records)
    save = lambda: write_json(path, records)  # noqa: E731 one expression, used once
    return _Target(client, folder, _make_scrub(folder), records[key], save)


def _connect(uri: str) -> Any:
    """Return a client; a sqlite store is made by one process while the others wait."""
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if not uri.startswith("sqlite:"):
        return MlflowClient(uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(f".{path.name}.lock")):
        is_new = not path.is_file()
        if is_new:  # by hand, as mlflow would note down the current folder
            SqlAlchemyStore(uri, _place_artifacts(uri))
        client = MlflowClient(uri, registry_uri=uri)
        if is_new:
            client.delete_experiment("0")  # "Default", which nobody asked for
        client.search_registered_models(max_results=1)  # makes the registry's tables too
    return client


def _place_artifacts(uri: str) -> str | None:
    """Return where a sqlite store's artifacts go; None for a server, which knows itself."""
    if not uri.startswith("sqlite:"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _is_there(client: Any, run_id: str) -> bool:
    """Return whether a run exists and nobody has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _find_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made or restored if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = _place_artifacts(uri)
        location = root and f"{root}/{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": "test/dice_delivered",
            f"mlflow.sharedViewState.{_VIEW}": _describe_view(),
        }
        with contextlib.suppress(MlflowException):  # another run was faster, or so we will see
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _describe_view() -> str:
    """Return the view of the runs table that lets two runs be compared at a glance.

    It is in the UI's menu "Views"; ``serve`` prints its address.
    """
    columns = [f"tags.`{name}`" for name in ("verdict", "method")]
    metrics = ("dice_labels_only", "dice_delivered", "gain", "gain_low", "gain_high")
    columns += [f"metrics.`test/{name}`" for name in metrics]
    columns += ["metrics.`val/dice`", "metrics.`monitors/agreement`"]
    names = ("delivered", "labeled_cases", "unlabeled_cases", "draw", "seed")
    columns += [f"tags.`{name}`" for name in names]
    stamp = int(1000 * time.time())
    state = json.dumps(
        {
            "selectedColumns": columns,
            "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *columns],
            "columnWidths": {
                "attributes.`Run Name`": 260,
                **{name: max(110, 7 * (len(name.split("`")[1]) + 6)) for name in columns},
            },
        }
    )
    return json.dumps(
        {"name": "medssl at a glance", "createdAt": stamp, "updatedAt": stamp, "state": state}
    )


def _make_parent(client: Any, folder: _Folder, uri: str, experiment: str) -> str:
    """Make the run that stands for the training."""
    number = _find_experiment(client, uri, experiment)
    before = client.search_runs([number], "tags.`mlflow.runColor` != ''", max_results=1000)
    tags = {
        "mlflow.source.name": "medssl train",
        "mlflow.source.type": "LOCAL",
        "mlflow.runColor": _COLORS[len(before) % len(_COLORS)],
    }
    revision = folder.provenance.get("revision")
    if revision:
        tags["mlflow.source.git.commit"] = str(revision)
    started = time.time()
    with contextlib.suppress(KeyError, ValueError):
        started = datetime.datetime.fromisoformat(folder.provenance["started"]).timestamp()
    run = client.create_run(
        number,
        start_time=int(1000 * started),
        run_name=folder.path.name,
        tags=tags,
    )
    return str(run.info.run_id)


def _find_child(target: _Target, name: str, started_ms: int) -> str:
    """Return the id of a child run, such as "round 0", which is made if need be."""
    children = target.record["children"]
    if name not in children:
        facts = _describe(target.folder)
        shared = {k: v for k, v in facts.items() if k in ("dataset", "method", "draw", "seed")}
        run = target.client.create_run(
            target.client.get_run(target.parent).info.experiment_id,
            start_time=started_ms,
            run_name=name,
            tags={
                "mlflow.parentRunId": target.parent,
                "mlflow.source.name": "medssl train",
                "mlflow.source.type": "LOCAL",
                "run": target.folder.path.name,
                **shared,
            },
        )
        children[name] = str(run.info.run_id)
        target.save()
    return str(children[name])


def _send_params(target: _Target) -> None:
    """Send the short parameters and the data set, once: MLflow never changes them."""
    from mlflow.entities import Dataset, DatasetInput, Param

    folder = target.folder
    if not folder.plan and not folder.is_finished:
        return  # the plan turns "auto" into values
    plan = {k: v for k, v in folder.plan.items() if k not in ("reasons", "estimate")}
    config = {k: v for k, v in _clean_config(target).items() if k != "tracking"}
    values = dict(_flatten(config))
    values.update(_flatten(_scrub_tree(plan, target.scrub), "plan"))
    params = [Param(_clean_key(key), value) for key, value in values.items()]

    def send() -> None:
        for first in range(0, len(params), 100):
            target.client.log_batch(target.parent, params=params[first : first + 100])
        parts = {k: v for k, v in folder.splits.items() if k != "dataset"}
        digest = hash_json(_scrub_tree(parts, target.scrub))[:8]
        data = Dataset(folder.dataset, digest, source_type="local", source=folder.dataset)
        target.client.log_inputs(target.parent, [DatasetInput(data, [])])

    target.once("params", True, send)


def _clean_config(target: _Target) -> dict[str, Any]:
    """Return the configuration as it may be seen: the data's folder by its name only."""
    config = dict(target.folder.config)
    data = dict(config.get("data", {}))
    if data.get("root"):
        data["root"] = Path(data["root"]).name or target.folder.dataset
    cleaned: dict[str, Any] = _scrub_tree({**config, "data": data}, target.scrub)
    return cleaned


def _clean_key(text: str) -> str:
    """Return a name that MLflow takes for a metric or parameter."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _describe(folder: _Folder) -> dict[str, str]:
    """Return the tags of a training: what a person would filter and group by."""
    config, splits = folder.config, folder.splits
    facts: dict[str, Any] = {
        "dataset": folder.dataset,
        "method": config.get("method"),
        "draw": config.get("data", {}).get("draw"),
        "seed": config.get("train", {}).get("seed"),
        "rounds": config.get("train", {}).get("rounds"),
        **{f"{part}_cases": len(splits[part]) for part in _PARTS if part in splits},
        "status": folder.status,
        "delivered": str(folder.summary.get("delivered") or "").replace("_", " "),
        "verdict": folder.evaluation.get("verdict") or ("not measured" * folder.is_finished),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _send_tags(target: _Target) -> None:
    """Send the tags and the note, where they have changed."""
    from mlflow.entities import RunTag

    tags = {key: target.scrub(value) for key, value in _describe(target.folder).items()}
    tags["mlflow.note.content"] = _write_note(target)[:7900]
    target.once(
        "tags",
        hash_json(tags),
        lambda: target.client.log_batch(target.parent, tags=[RunTag(*tag) for tag in tags.items()]),
    )


def _send_points(target: _Target) -> None:
    """Send the journal up to the last checkpoint, each round's points to its child run."""
    points = _read_points(target.folder, target.record["offset"])
    while lines := list(islice(points, _LINES_AT_ONCE)):
        by_round: dict[int, list[dict[str, Any]]] = {}
        for entry, _ in lines:
            by_round.setdefault(entry["round"], []).append(entry)
        for round_index, entries in by_round.items():
            started_ms = int(1000 * entries[0]["time"])
            child = _find_child(target, f"round {round_index}", started_ms)
            _log_metrics(target.client, child, entries)
        target.record["offset"] = lines[-1][1]
        target.save()


def _log_metrics(client: Any, run_id: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Send entries with "step", "time" in s and "metrics"; what is not finite is counted.

    The time of a point is the entry's, so that sending it again changes nothing.
    """
    from mlflow.entities import Metric

    metrics = []
    for entry in entries:
        finite = {k: float(v) for k, v in entry["metrics"].items() if _is_finite(v)}
        lost = len(entry["metrics"]) - len(finite)
        if lost:
            finite["monitors/nonfinite"] = finite.get("monitors/nonfinite", 0.0) + lost
        stamp = int(1000 * entry["time"])
        metrics += [Metric(_clean_key(k), v, stamp, entry["step"]) for k, v in finite.items()]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def _is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _send_round_metrics(target: _Target) -> None:
    """Send to the parent what each completed round came to; its step is the round."""
    for round_index, done in target.folder.rounds.items():
        kept = {k: v for k, v in done.get("final", {}).items() if k.startswith(_OF_A_ROUND)}
        for key in ("agreement", "kept_cases", "seconds"):
            if _is_finite(done.get(key)):
                kept[f"monitors/{key}"] = done[key]
        path = target.folder.path / f"round_{round_index}" / "done.json"
        _send_summary(target, round_index, path, kept)


def _send_test_metrics(target: _Target) -> None:
    """Send to the parent what `evaluate` measured: rounds as a curve, the verdict as columns."""
    path = target.folder.path / "evaluation" / "summary.json"
    evaluation = target.folder.evaluation
    for name, value in evaluation.get("rounds", {}).items():
        _send_summary(target, _round_of(name), path, {"test/dice": value})
    if not evaluation:
        return
    rounds, paired = evaluation.get("rounds", {}), evaluation.get("paired") or {}
    delivered = str(evaluation.get("delivered"))
    columns = {
        "test/dice_labels_only": rounds.get("round_0"),
        "test/dice_delivered": rounds.get(delivered),
        "test/gain": paired.get("mean"),
        "test/gain_low": paired.get("low"),
        "test/gain_high": paired.get("high"),
    }
    _send_summary(target, _round_of(delivered), path, columns)


def _round_of(name: str) -> int:
    """Return the number in a round's name, such as round_2; 0 where there is none."""
    found = re.search(r"\d+$", name)
    return int(found.group()) if found else 0


def _send_summary(target: _Target, step: int, path: Path, metrics: Mapping[str, Any]) -> None:
    """Send metrics to the parent, dated by the file that they were read from."""
    finite = {key: round(value, 4) for key, value in metrics.items() if _is_finite(value)}
    entry = {"step": step, "time": path.stat().st_mtime, "metrics": finite}
    name = f"{path.parent.name}/{step}/{','.join(sorted(finite))}"
    target.once(
        name, finite, lambda: _log_metrics(target.client, target.parent, [entry] if finite else [])
    )


def _send_overlays(target: _Target) -> None:
    """Send the rounds' pictures of a few fixed cases, so that the UI has a slider for each.

    They have a child run of their own: beside a picture the UI prints all parameters of its run.
    """
    from PIL import Image

    for path in sorted(target.folder.path.glob("round_[0-9]*/overlays/*.png")):
        pseudonym = target.folder.pseudonyms.get(path.stem)
        if pseudonym is None:
            continue

        def send(path: Path = path, pseudonym: str = pseudonym) -> None:
            with Image.open(path) as image:
                picture = image.convert("RGB")
            picture.thumbnail((_OVERLAY_SIDE, _OVERLAY_SIDE))
            stamp = int(1000 * path.stat().st_mtime)
            target.client.log_image(
                _find_child(target, "overlays", stamp),
                picture,
                key=f"overlay/{pseudonym}",
                step=_round_of(path.parent.parent.name),
                timestamp=stamp,
                synchronous=True,
            )

        target.once(f"overlay/{path.parent.parent.name}/{pseudonym}", hash_file(path), send)


def _send_documents(target: _Target) -> None:
    """Send the resolved configuration, the plan and the summaries, scrubbed."""
    folder = target.folder
    documents = {
        "config.yaml": _clean_config(target),
        "plan.json": _scrub_tree(folder.plan, target.scrub),
        "summary.json": _scrub_tree(folder.summary, target.scrub),
        "evaluation.json": _scrub_tree(folder.evaluation, target.scrub),
    }
    for name, content in documents.items():
        if not content:
            continue
        text = json.dumps(content, indent=1)
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        send = functools.partial(target.client.log_text, target.parent, text, name)
        target.once(name, digest, send)


def _send_status(target: _Target) -> None:
    """Set what MLflow calls the status, of the parent and of each round."""
    folder = target.folder
    status = _RUN_STATUS.get(folder.status, "RUNNING")
    paths = {target.parent: folder.path / "state.json"}
    statuses = {target.parent: status}
    for name, child in target.record["children"].items():
        done = folder.path / name.replace(" ", "_") / "done.json"
        statuses[child] = "FINISHED" if done.is_file() else status
        paths[child] = done if done.is_file() else paths[target.parent]
    for run_id, value in statuses.items():

        def send(run_id: str = run_id, value: str = value) -> None:
            if value == "RUNNING":
                target.client.update_run(run_id, status=value)
            else:
                ended = int(1000 * paths[run_id].stat().st_mtime)
                target.client.set_terminated(run_id, status=value, end_time=ended)

        target.once(f"status/{run_id}", value, send)


def _send_report(target: _Target) -> None:
    """Send the page that was made for going out, if there is one."""
    path = target.folder.path / "report_share.html"
    if not path.is_file() or path.stat().st_size > _PAGE_LIMIT:
        return

    def send() -> None:
        text = path.read_text(encoding="utf-8")
        ids = _match_ids(name for name in target.folder.pseudonyms if not name.isdigit())
        visible = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # in pictures anything can be read
        _refuse_names(path, ids.findall(visible) + _match_roots(target.folder).findall(visible))
        target.client.log_text(target.parent, text, "report.html")

    target.once("report.html", hash_file(path), send)


def _send_model(target: _Target) -> None:
    """Send the delivered model and register it under the experiment's name, as its champion.

    The champion is the model that was delivered last; a labels-only run takes no other's place.
    A model above 40 MiB stays in the run folder: MLflow gets its description only.
    """
    folder = target.folder.path / "model"
    path = folder / "model.json"
    if not target.folder.is_finished or not path.is_file():
        return
    texts = [text for pair in _flatten(read_json(path)) for text in pair]
    _refuse_names(path, (text for text in texts if target.scrub(text) != text))
    if _measure_model(target.folder) > _MODEL_LIMIT:
        target.once(
            "model", "model.json", lambda: target.client.log_artifact(target.parent, path, "model")
        )
        return
    target.once(
        "model", "model", lambda: target.client.log_artifacts(target.parent, folder, "model")
    )
    target.once("version", True, lambda: _register(target))


def _measure_model(folder: _Folder) -> int:
    """Return the bytes of the delivered model."""
    return sum(path.stat().st_size for path in (folder.path / "model").rglob("*") if path.is_file())


def _register(target: _Target) -> None:
    """Make a version of the registered model from the parent run's copy."""
    from mlflow.exceptions import MlflowException

    client = target.client
    experiment = client.get_experiment(client.get_run(target.parent).info.experiment_id)
    name = re.sub(r"[/:]", "_", experiment.name)
    with contextlib.suppress(MlflowException):  # it is there already, or the next call says why
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        source=f"runs:/{target.parent}/model",
        run_id=target.parent,
        description=f"Delivered by {target.folder.path.name}; `medssl predict` takes the folder.",
        tags={"run": target.folder.path.name},
    )
    trained = target.folder.config.get("train", {}).get("rounds")
    if trained != 0 or "champion" not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, "champion", version.version)


def _write_note(target: _Target) -> str:
    """Write what this training was, in sentences."""
    folder, scrub = target.folder, target.scrub
    facts = _describe(folder)
    lines = [
        f"**{facts.get('method', 'medssl')}** on **{folder.dataset}**: "
        f"{facts.get('labeled_cases', '?')} labeled and {facts.get('unlabeled_cases', '?')} "
        f"unlabeled cases (draw {facts.get('draw', 0)}, seed {facts.get('seed', 0)}), "
        f"{facts.get('val_cases', 0)} for validation, {facts.get('test_cases', 0)} for the test.",
        "",
        _say_outcome(folder),
        "",
        *_write_round_table(folder),
    ]
    for round_index, done in folder.rounds.items():
        reasons = "; ".join(done.get("gate", {}).get("reasons", []))
        if reasons and not done["gate"].get("passed", True):
            lines.append(f"Round {round_index} did not pass its gate: {scrub(reasons)}.  ")
    if folder.plan.get("reasons"):
        lines += ["", "Why it was planned so:", ""]
        lines += [f"- {scrub(str(reason))}" for reason in folder.plan["reasons"]]
    lines += [
        "",
        f"Everything else is in the run folder `{folder.path.name}`: report, masks, model.",
    ]
    return "\n".join(lines)


def _say_outcome(folder: _Folder) -> str:
    """Say in a sentence or two what came of it."""
    words = {
        "running": "It is running.",
        "stopped_by_gate": "A gate stopped it; the last good model was kept.",
        "interrupted": "It was interrupted; the same command resumes it.",
        "failed": "It failed; the terminal and the run folder say why.",
    }
    sentences = [words.get(folder.status, "")]
    delivered, summary = folder.summary.get("delivered"), folder.summary
    if delivered:
        sentences.append(f"Delivered: **{str(delivered).replace('_', ' ')}**.")
    if summary.get("total_steps") and summary.get("baseline"):
        sentences.append(
            f"Baseline: labels only, {summary['baseline'].get('steps', '?')} steps; the whole run "
            f"took {summary['total_steps']}."
        )
    if folder.evaluation.get("statement"):
        sentences.append(f"On the test cases: {folder.evaluation['statement']}.")
    elif folder.is_finished and folder.config.get("train", {}).get("rounds") == 0:
        sentences.append("Labels only: a baseline for others.")
    elif folder.is_finished:
        sentences.append("Whether it beats labels only has not been measured.")
    return " ".join(filter(None, sentences))


def _write_round_table(folder: _Folder) -> list[str]:
    """Write one line for each completed round, as Markdown."""
    if not folder.rounds:
        return []
    lines = [
        "| round | steps | gate | kept cases | agreement | val Dice | test Dice |",
        "|---|---|---|---|---|---|---|",
    ]
    for round_index, done in folder.rounds.items():
        gate = done.get("gate", {}).get("passed")
        cells = [
            str(round_index),
            str(done.get("steps", "")),
            "" if gate is None else "passed" if gate else "not passed",
            str(done.get("kept_cases") if done.get("kept_cases") is not None else ""),
            _shorten_number(done.get("agreement")),
            _shorten_number(done.get("final", {}).get("val/dice")),
            _shorten_number(folder.evaluation.get("rounds", {}).get(f"round_{round_index}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _shorten_number(value: Any) -> str:
    """Return three digits of a number, nothing of no number."""
    return f"{value:.3f}" if _is_finite(value) else ""


# --- the UI -------------------------------------------------------------------------------------


def serve(runs_folder: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Run the MLflow UI on the store of a folder of runs until Ctrl-C.

    Args:
        runs_folder: The folder that holds the run folders and mlflow.db.
        host: Where it listens; the default can be reached from this machine only.
        port: The port.

    Returns:
        0 after Ctrl-C or SIGTERM, else the server's own exit status.

    Raises:
        InputError: The folder holds no store, or the port is taken.
    """
    _check_store(runs_folder)
    _check_port(host, port)
    folder = runs_folder.resolve()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri(folder)),
        *("--artifacts-destination", (folder / "mlartifacts").as_uri()),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]
    with tempfile.TemporaryFile("w+") as messages, _sigterm_as_interrupt():
        process = subprocess.Popen(
            command,
            env={**os.environ, **_ENVIRONMENT},
            stdout=messages,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it and its workers are one group, which we end
        )
        try:
            _announce(process, folder, host, port)
            code = process.wait()
        except KeyboardInterrupt:
            print("\nMLflow UI stopped")
            return 0
        finally:
            _stop_group(process)
        messages.seek(0)
        print(f"the MLflow server ended by itself ({code}):\n{messages.read()[-2000:]}")
        return code


def _announce(process: subprocess.Popen[bytes], folder: Path, host: str, port: int) -> None:
    """Wait until the server answers and say where; return at once if it ends."""
    print("starting the MLflow UI ...", flush=True)
    local = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1") else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy in between
    while process.poll() is None:
        try:
            opener.open(f"http://{local}:{port}/health", timeout=2).close()
        except OSError:
            time.sleep(0.2)
            continue
        query = f"viewStateShareKey={_VIEW}&workflowType=machine_learning"
        pages = [
            f"  {name}: http://{local}:{port}/#/experiments/{number}/runs?{query}"
            for number, name in _list_experiments(folder)
        ]
        lines = [
            f"MLflow UI: http://{local}:{port}/#/experiments?workflowType=machine_learning",
            *(["the runs of each data set, at a glance:", *pages] if pages else []),
            "on a server: run this on your own computer, then open the same address there",
            f"  ssh -L {port}:localhost:{port} user@server",
            "Ctrl-C stops it",
        ]
        print("\n".join(lines), flush=True)
        return


def _list_experiments(folder: Path) -> list[tuple[int, str]]:
    """Return number and name of the newest experiments of a folder's store."""
    query = (
        "select experiment_id, name from experiments where lifecycle_stage = 'active' "
        "order by last_update_time desc limit 5"
    )
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return list(store.execute(query))


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that no server stays behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _check_store(folder: Path) -> None:
    """Check that there is something to show."""
    if (folder / "mlflow.db").is_file():
        return
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    hint = "name the folder that holds your runs, such as runs/, or train something first"
    if runs:
        hint = f"`medssl sync {runs[0]}` makes it from the run folder"
    what = "holds no MLflow store (mlflow.db)" if folder.is_dir() else "no such folder"
    raise InputError(f"{folder}: {what}; {hint}")


def _check_port(host: str, port: int) -> None:
    """Check that a port can be listened on; otherwise name the next one that can."""
    free = (candidate for candidate in range(port, 65536) if _is_free(host, candidate))
    found = next(free, None)
    if found != port:
        hint = "choose another --host" if found is None else f"--port {found} is free"
        raise InputError(f"port {port} on {host} is in use; {hint}")


def _is_free(host: str, port: int) -> bool:
    """Return whether a port can be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True
