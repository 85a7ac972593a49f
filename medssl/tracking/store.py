"""The MLflow store of a folder of runs, and its experiments."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sqlite3
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl.config import InputError, hide_password
from medssl.runs import hold_lock

VIEW = "medssl"
ENVIRONMENT = {
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


UNUSED = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
"""What other programs send their runs to; ours are of patients, and go where medssl is told."""


def find_default_uri(runs_folder: Path) -> str:
    """Return the store of a folder of runs: sqlite, absolute; made at its first use."""
    return _to_uri(runs_folder.resolve() / "mlflow.db")


def _to_uri(path: Path) -> str:
    """Return the address of a sqlite file: in it `?` begins a query, and `%` may begin a code."""
    plain = f"sqlite:///{path}"
    if not re.search("[%?]", plain):
        return plain
    from sqlalchemy.engine import make_url

    for uri in (plain, plain.replace("%", "%25").replace("?", "%3F")):
        if make_url(uri).database == str(path):
            return uri
    raise InputError(f"{path}: MLflow cannot keep a store there; rename the folder, without % or ?")


@contextlib.contextmanager
def _remove_strays(uri: str) -> Iterator[None]:
    """Remove the folders that mlflow makes of an address as it stands, codes and all."""
    folder = Path(uri.removeprefix("sqlite:///")).parent
    strays = [stray for stray in (folder, *folder.parents) if not stray.exists()]
    try:
        yield
    finally:
        for stray in strays:
            with contextlib.suppress(OSError):
                stray.rmdir()


def _find_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for a server."""
    if not uri.startswith("sqlite:"):
        return None
    text = urllib.parse.unquote(uri.removeprefix("sqlite:///").partition("?")[0])
    return Path(text).expanduser().resolve()


def check_uri(uri: str) -> None:
    """Refuse what is no store.

    Raises:
        InputError: It is neither auto, none nor an address that MLflow takes.
    """
    is_known = uri in ("auto", "none", "databricks") or uri.startswith("sqlite:///")
    if not is_known and not re.match(r"(?!file:|sqlite:)[\w+.-]+://", uri):
        raise InputError(
            f"tracking.uri={uri}: no MLflow store; give auto (mlflow.db beside the run), none, "
            "http://SERVER:PORT or sqlite:////FOLDER/mlflow.db"
        )


def choose_store(runs_folder: Path, *candidates: str | None) -> str:
    """Return the store that was chosen, or that of the folder of runs."""
    chosen = choose_value(*candidates)
    if chosen is not None:
        check_uri(chosen)
        return chosen
    if os.environ.get(UNUSED[0]):
        print(
            f"note: {UNUSED[0]} is set and not followed: nothing of patients leaves unasked; "
            f"runs go to {runs_folder / 'mlflow.db'}; tracking.uri=${UNUSED[0]} sends them there",
            file=sys.stderr,
        )
    return find_default_uri(runs_folder)


def choose_value(*values: str | None) -> str | None:
    """Return the first value that says something."""
    return next((value for value in values if value not in (None, "", "auto", "none")), None)


def open_store(uri: str) -> Any:
    """Return a client; a sqlite store is made by one process while the others wait."""
    from mlflow import MlflowClient

    path = _find_file(uri)
    if path is None:
        return MlflowClient(uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    uri = _to_uri(path)
    with hold_lock(path.with_name(f".{path.name}.lock")), _remove_strays(uri):
        if not path.is_file() or not _opens(path):
            _make_store(path)
        follow_move(path)
        client = MlflowClient(uri, registry_uri=uri)
        client.search_registered_models(max_results=1)  # opens the registry too
    return client


def _opens(path: Path) -> bool:
    """Return whether MLflow takes a store; one that nobody has used and it does not take may go.

    Raises:
        InputError: It holds something, MLflow's or another program's, and MLflow does not take it.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    is_new, has_tables = _look_into(path)
    uri = _to_uri(path)
    if is_new and not has_tables:
        return False  # a kill came while an older version of medssl made it
    try:
        SqlAlchemyStore(uri, _place_artifacts(path))
    except Exception as error:  # of MLflow, SQLAlchemy and Alembic: they have no common class
        if not is_new:
            raise InputError(explain_store(path, error)) from error
        SqlAlchemyStore._get_or_create_engine(uri).dispose()  # it still holds the old file
        return False
    return True


def _look_into(path: Path) -> tuple[bool, bool]:
    """Return whether a store holds no more than MLflow's first tables, and whether it has all.

    Raises:
        InputError: It is no store of MLflow.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as store:
            tables = {name for (name,) in store.execute("select name from sqlite_master")}
            used = [
                table
                for table, where in _USED.items()
                if table in tables and store.execute(f"select 1 from {table} {where}").fetchone()
            ]
    except sqlite3.Error as error:
        raise InputError(explain_store(path, error)) from error
    if tables and not tables & {"alembic_version", "experiments"}:
        raise InputError(explain_store(path, "it is the database of another program"))
    return not used, {table for table, _ in _PLACES} <= tables


_USED = {"runs": "", "registered_models": "", "experiments": "where experiment_id != 0"}
"""Tables that are empty in a store that nobody has used; experiment 0 is MLflow's own."""


def find_store_problem(uri: str) -> str:
    """Return why a store cannot be used now, and the repair; "" if it can. None is made.

    Only a server that ``uri`` names is asked, and of others than these nothing is known.
    """
    path = _find_file(uri)
    if path is not None and path.is_file():
        try:
            _look_into(path)
            with contextlib.closing(sqlite3.connect(path, timeout=5)) as store:
                store.execute("begin immediate")
        except InputError as error:
            return str(error)
        except sqlite3.Error as error:
            return explain_store(path, error)
    elif re.match("https?://", uri):
        question = urllib.request.Request(f"{hide_password(uri).rstrip('/')}/health")
        credentials = urllib.parse.urlsplit(uri).netloc.rpartition("@")[0]
        if credentials:
            word = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
            question.add_header("Authorization", f"Basic {word}")
        try:
            urllib.request.urlopen(question, timeout=5).close()
        except (OSError, ValueError) as error:
            return (
                f"the MLflow server {hide_password(uri)} does not answer ({error}): start it, or "
                "train without it (tracking.uri=auto); runs keep everything, and `medssl sync RUN` "
                "uploads it later"
            )
    return ""


def explain_store(path: Path, error: Exception | str) -> str:
    """Say that a store cannot be used, and what to do: the run folders hold all that it does."""
    reason = str(error).strip().splitlines()[0][:300]
    return (
        f"{path}: MLflow cannot use this store ({reason}); if no other program holds it, move it "
        "away: `medssl sync RUN` makes it anew from each run folder, which holds everything"
    )


def _make_store(path: Path) -> None:
    """Make a store under another name, so that a kill leaves none that is half made."""
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = path.with_name(f".{path.name}.new")
    for left in path.parent.glob(f"{new.name}*"):
        left.unlink()
    uri = _to_uri(new)
    store = SqlAlchemyStore(uri, _place_artifacts(path))  # else mlflow notes the current folder
    client = MlflowClient(uri, registry_uri=uri)
    client.delete_experiment("0")  # "Default", which nobody asked for
    client.search_registered_models(max_results=1)  # makes the registry's tables too
    store.engine.dispose()
    new.replace(path)


_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def follow_move(path: Path) -> None:
    """Let a store find its artifacts beside it: MLflow notes their folders in full, and these move.

    Raises:
        InputError: It cannot be used.
    """
    new = f"{_place_artifacts(path)}/"
    if not (path.parent / "mlartifacts").is_dir():
        return  # somebody's store, whose artifacts lie elsewhere
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as store, store:
            locations = store.execute("select artifact_location from experiments").fetchall()
            roots = {str(place).rpartition("/mlartifacts/")[0] for (place,) in locations}
            for old in (f"{root}/mlartifacts/" for root in roots if root.startswith("file:")):
                for table, column in _PLACES if old != new else ():
                    store.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) "
                        f"where substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, len(old), old),
                    )
    except sqlite3.Error as error:
        raise InputError(explain_store(path, error)) from error


def _place_artifacts(path: Path) -> str:
    """Return where the artifacts of a sqlite store go: beside it."""
    return (path.parent / "mlartifacts").as_uri()


def has_run(client: Any, run_id: str) -> bool:
    """Return whether a run exists and nobody has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def find_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made or restored if need be."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = _find_file(uri)
        root = path and _place_artifacts(path)  # a server knows itself
        location = root and f"{root}/{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": "test/dice_delivered",
            f"mlflow.sharedViewState.{VIEW}": _describe_view(),
        }
        with contextlib.suppress(MlflowException):  # another run was faster, or so we will see
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _describe_view() -> str:
    """Return the view of the runs table that lets two runs be compared at a glance.

    It is in the UI's menu "Views"; ``serve_runs`` prints its address.
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
