"""Brings MLflow up to what a run folder holds: a run for the training, a child for each round."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from medssl.config import InputError, hide_password
from medssl.names import Names, choose_names, refuse_names
from medssl.run_folder import RunFolder, is_finite, read_folder, read_points
from medssl.runs import Shape, hash_file, hash_json, hold_lock, list_rounds, read_json, write_json
from medssl.tracking.note import describe_training, write_note
from medssl.tracking.store import (
    ENVIRONMENT,
    choose_store,
    choose_value,
    find_default_uri,
    find_experiment,
    has_run,
    open_store,
)

_MODEL_LIMIT = 40 * 2**20  # bytes of a model that MLflow gets a copy of
_LOADER = "medssl.export.serving"  # by its name: MLflow imports it, where a model is served
_PAGE_LIMIT = 5 * 2**20  # bytes of a report that MLflow gets a copy of
_OVERLAY_SIDE = 1200  # pixels
_LINES_AT_ONCE = 500
_OF_A_ROUND = (
    "val/",
    "monitors/coverage/",
    "monitors/pseudo_coverage/",
    "monitors/uncertainty",
    "monitors/gate",
)
_GAIN = {"": "mean", "_low": "low", "_high": "high"}  # of a paired difference, by column
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5FD0", "#8C6D31")
_RUN_STATUS = {
    "running": "RUNNING",
    "delivered": "FINISHED",
    "stopped_by_gate": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}


def sync_run(run_dir: Path, uri: str | None = None) -> None:
    """Bring MLflow up to what the run folder holds; twice is the same as once.

    Args:
        run_dir: The run folder; only its files are read, and RUN/tracking.json is written.
        uri: The MLflow store; None or "auto": the configured one, else the folder's own.

    Raises:
        InputError: This is no run folder, or MLflow did not take it; nothing is lost then.
    """
    folder = read_folder(run_dir.resolve())
    configured = folder.config.get("tracking", {})
    uri = choose_store(folder.path.parent, uri, configured.get("uri"))
    name = choose_value(configured.get("experiment")) or folder.dataset
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with hold_lock(folder.path / ".tracking.lock"):
            _send_all(folder, uri, name)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(
            f"MLflow at {hide_password(uri)} did not take {folder.path.name}: {reason}; nothing "
            f"is lost: `medssl sync {run_dir}` uploads it later"
        ) from error


_FORGET = (
    "delete it, and what MLflow has of this run: `medssl sync` then sends the whole run once more"
)


class _Record(Shape):
    """What tracking.json says of a store."""

    parent: str
    children: dict[str, str]
    offset: int
    sent: dict[str, Any]


@dataclass(frozen=True)
class _Target:
    """Where a run folder goes: MLflow, and the record of what it has already got."""

    client: Any
    folder: RunFolder
    names: Names
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


def _send_all(folder: RunFolder, uri: str, experiment: str) -> None:
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


def _open_target(folder: RunFolder, uri: str, experiment: str) -> _Target:
    """Connect, and find or make the parent run."""
    path = folder.path / "tracking.json"
    records = read_json(path, repair=_FORGET) if path.is_file() else {}
    # a store that moves with the folder is still the same store
    key = "own store" if uri == find_default_uri(folder.path.parent) else hide_password(uri)
    client = open_store(uri)
    if key not in records or not has_run(client, _check_record(path, records[key])["parent"]):
        records[key] = {"children": {}, "offset": 0, "sent": {}}
        records[key]["parent"] = _make_parent(client, folder, uri, experiment)
        write_json(path, records)
    record = _check_record(path, records[key])
    if key == "own store" and not _has_artifacts(folder.path.parent, record["parent"]):
        record["sent"] = {k: v for k, v in record["sent"].items() if k in ("params", "version")}
    save = lambda: write_json(path, records)  # noqa: E731 one expression, used once
    return _Target(client, folder, choose_names(folder), record, save)


def _check_record(path: Path, record: Any) -> dict[str, Any]:
    """Return the record of a store, if it is one."""
    try:
        _Record.model_validate(record)
    except ValueError as error:
        raise InputError(f"{path}: damaged; {_FORGET}") from error
    checked: dict[str, Any] = record
    return checked


def _has_artifacts(runs_folder: Path, parent: str) -> bool:
    """Return whether the files that a run was sent with are beside its store."""
    root = runs_folder / "mlartifacts"
    return any(root.glob(f"*/{parent}"))


def _make_parent(client: Any, folder: RunFolder, uri: str, experiment: str) -> str:
    """Make the run that stands for the training."""
    number = find_experiment(client, uri, experiment)
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
        facts = describe_training(target.folder)
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
    values.update(_flatten(target.names.clean_tree(plan), "plan"))
    params = [Param(_clean_key(key), value) for key, value in values.items()]

    def send() -> None:
        for first in range(0, len(params), 100):
            target.client.log_batch(target.parent, params=params[first : first + 100])
        parts = {k: v for k, v in folder.splits.items() if k != "dataset"}
        digest = hash_json(target.names.clean_tree(parts))[:8]
        data = Dataset(folder.dataset, digest, source_type="local", source=folder.dataset)
        target.client.log_inputs(target.parent, [DatasetInput(data, [])])

    target.once("params", True, send)


def _clean_config(target: _Target) -> dict[str, Any]:
    """Return the configuration as it may be seen: the data's folder by its name only."""
    config = dict(target.folder.config)
    data = dict(config.get("data", {}))
    if data.get("root"):
        data["root"] = Path(data["root"]).name or target.folder.dataset
    cleaned: dict[str, Any] = target.names.clean_tree({**config, "data": data})
    return cleaned


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


def _clean_key(text: str) -> str:
    """Return a name that MLflow takes for a metric or parameter."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _send_tags(target: _Target) -> None:
    """Send the tags and the note, where they have changed."""
    from mlflow.entities import RunTag

    tags = {
        key: target.names.clean_text(value)
        for key, value in describe_training(target.folder).items()
    }
    tags["mlflow.note.content"] = write_note(target.folder, target.names)[:7900]
    target.once(
        "tags",
        hash_json(tags),
        lambda: target.client.log_batch(target.parent, tags=[RunTag(*tag) for tag in tags.items()]),
    )


def _send_points(target: _Target) -> None:
    """Send the journal up to the last checkpoint, each round's points to its child run."""
    points = read_points(target.folder, target.record["offset"])
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
        finite = {k: float(v) for k, v in entry["metrics"].items() if is_finite(v)}
        lost = len(entry["metrics"]) - len(finite)
        if lost:
            finite["monitors/nonfinite"] = finite.get("monitors/nonfinite", 0.0) + lost
        stamp = int(1000 * entry["time"])
        metrics += [Metric(_clean_key(k), v, stamp, entry["step"]) for k, v in finite.items()]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def _send_round_metrics(target: _Target) -> None:
    """Send to the parent what each completed round came to; its step is the round."""
    for round_index, done in target.folder.done_rounds.items():
        metrics = {k: v for k, v in done.get("final", {}).items() if k.startswith(_OF_A_ROUND)}
        for key in ("agreement", "kept_cases", "seconds"):
            if is_finite(done.get(key)):
                metrics[f"monitors/{key}"] = done[key]
        path = target.folder.path / f"round_{round_index}" / "done.json"
        _send_summary(target, round_index, path, metrics)


def _send_test_metrics(target: _Target) -> None:
    """Send to the parent what `evaluate` measured: rounds as a curve, the verdict as columns.

    Out of fold there are columns alone, under a name of their own.
    """
    path = target.folder.path / "evaluation" / "summary.json"
    evaluation, folds = target.folder.evaluation, target.folder.cross_check
    if folds:
        gain = folds.get("paired") or {}
        columns = {f"cross_check/gain{end}": gain.get(key) for end, key in _GAIN.items()}
        columns["cross_check/dice"] = (folds.get("dice") or {}).get("mean")
        _send_summary(target, 0, target.folder.path / "cross_check" / "summary.json", columns)
    for name, value in evaluation.get("rounds", {}).items():
        _send_summary(target, _round_of(name), path, {"test/dice": value})
    if not evaluation:
        _withdraw_test_metrics(target)
        return
    rounds, paired = evaluation.get("rounds", {}), evaluation.get("paired") or {}
    delivered = str(evaluation.get("delivered"))
    columns = {
        "test/dice_labels_only": rounds.get("round_0"),
        "test/dice_delivered": rounds.get(delivered),
        **{f"test/gain{end}": paired.get(key) for end, key in _GAIN.items()},
    }
    _send_summary(target, len(rounds), path, columns)  # a later evaluation has no fewer rounds


def _withdraw_test_metrics(target: _Target) -> None:
    """Let no figure stand of an evaluation that is gone: it was of another model."""
    from mlflow.entities import Metric

    sent = target.record["sent"]
    names = [name for name in sent if name.startswith("evaluation/")]
    last: dict[str, int] = {}
    for name in names:
        step = int(name.split("/")[1])
        last.update({key: max(step, last.get(key, step)) for key in sent[name]})
    if not last:
        return
    stamp = int(1000 * time.time())
    metrics = [Metric(key, math.nan, stamp, step) for key, step in last.items()]
    target.client.log_batch(target.parent, metrics=metrics)
    for name in names:
        del sent[name]
    target.save()


def _round_of(name: str) -> int:
    """Return the number in a round's name, such as round_2; 0 where there is none."""
    match = re.search(r"\d+$", name)
    return int(match.group()) if match else 0


def _send_summary(target: _Target, step: int, path: Path, metrics: Mapping[str, Any]) -> None:
    """Send metrics to the parent, dated by the file that they were read from."""
    finite = {key: round(value, 4) for key, value in metrics.items() if is_finite(value)}
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

    rounds = list_rounds(target.folder.path).values()
    for path in (path for folder in rounds for path in sorted(folder.glob("overlays/*.png"))):
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
    """Send the resolved configuration, the plan and the summaries, without names."""
    folder = target.folder
    documents = {
        "config.yaml": _clean_config(target),
        "plan.json": target.names.clean_tree(folder.plan),
        "summary.json": target.names.clean_tree(folder.summary),
        "evaluation.json": target.names.clean_tree(folder.evaluation),
        "cross_check.json": target.names.clean_tree(folder.cross_check),
    }
    for name, content in documents.items():
        if not content and name not in target.record["sent"]:
            continue  # what has been sent and is gone is sent as empty
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
        visible = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # in pictures anything can be read
        refuse_names(path, replace(target.names, numbers=False).find_names(visible))
        target.client.log_text(target.parent, text, "report.html")

    target.once("report.html", hash_file(path), send)


def _send_model(target: _Target) -> None:
    """Send the delivered model and register it under the experiment's name, as its champion.

    The champion is the model that was delivered last; a labels-only run takes no other's place.
    The teacher is the one of the round before, whose labels the champion learned from. Both can be
    served by MLflow and loaded as a pyfunc: see `medssl.export.serving`. A model above 40 MiB stays
    in the run folder: MLflow gets its description only.
    """
    folder = target.folder
    if not folder.is_finished or not (folder.path / "model" / "model.json").is_file():
        return
    is_new = folder.config.get("train", {}).get("rounds") != 0
    _send_version(target, folder.path / "model", "champion", is_new)
    teacher = _find_teacher(folder)
    if teacher is not None and (teacher / "model.json").is_file():
        _send_version(target, teacher, "teacher", True)


def _find_teacher(folder: RunFolder) -> Path | None:
    """Return the model of the last round before the delivered one that passed its gate."""
    last = _round_of(str(folder.summary.get("delivered") or ""))
    passed = [
        index
        for index, done in folder.done_rounds.items()
        if index < last and (done.get("gate") or {}).get("passed")
    ]
    return folder.path / f"round_{passed[-1]}" / "model" if passed else None


def _send_version(target: _Target, folder: Path, alias: str, takes_alias: bool) -> None:
    """Send a model folder, and make a version of the registered model from this copy."""
    path, name = folder / "model.json", "model" if alias == "champion" else alias
    about = read_json(path)
    texts = [text for pair in _flatten(about) for text in pair]
    names = replace(target.names, numbers=False)  # it is full of them
    refuse_names(path, (text for text in texts if names.clean_text(text) != text))
    files = [path, folder / "weights.safetensors"]
    if sum(file.stat().st_size for file in files if file.is_file()) > _MODEL_LIMIT:
        target.once(
            name, "model.json", lambda: target.client.log_artifact(target.parent, path, name)
        )
        return

    def send() -> None:
        for file in files:
            target.client.log_artifact(target.parent, file, name)
        channels = about.get("channels") or [""]
        target.client.log_text(target.parent, _describe_pyfunc(len(channels)), f"{name}/MLmodel")

    target.once(name, "pyfunc", send)
    version = "version" if alias == "champion" else f"version/{alias}"
    target.once(version, True, lambda: _register(target, name, alias, takes_alias))


def _describe_pyfunc(num_channels: int) -> str:
    """Return the MLmodel file that makes a model folder one that MLflow serves.

    A row is a scan: the bytes of its file, or of a file a channel. What comes back is the file of
    the mask in base64.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    names = ["scan"] if num_channels == 1 else [f"scan_{i:04d}" for i in range(num_channels)]
    takes = Schema([ColSpec("binary", name) for name in names])
    model = Model(signature=ModelSignature(takes, Schema([ColSpec("string")])))
    pyfunc.add_to_model(model, loader_module=_LOADER)
    return str(model.to_yaml())


def _register(target: _Target, artifact: str, alias: str, takes_alias: bool) -> None:
    """Make a version of the registered model from the parent run's copy."""
    from mlflow.exceptions import MlflowException

    client = target.client
    experiment = client.get_experiment(client.get_run(target.parent).info.experiment_id)
    name = re.sub(r"[/:]", "_", experiment.name)
    with contextlib.suppress(MlflowException):  # it is there already, or the next call says why
        client.create_registered_model(name)
    what = "Delivered by" if alias == "champion" else "Teacher of what was delivered by"
    version = client.create_model_version(
        name,
        source=f"runs:/{target.parent}/{artifact}",
        run_id=target.parent,
        description=f"{what} {target.folder.path.name}; `medssl predict` takes the folder.",
        tags={"run": target.folder.path.name},
    )
    if takes_alias or alias not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, alias, version.version)
