"""The MLflow store of a folder of runs, and its experiments."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from medssl.runs import lock

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


def default_uri(runs_folder: Path) -> str:
    """Return the store of a folder of runs: sqlite, absolute; made at its first use."""
    return f"sqlite:///{runs_folder.resolve() / 'mlflow.db'}"


def choose(*values: str | None) -> str | None:
    """Return the first value that says something."""
    return next((value for value in values if value not in (None, "", "auto", "none")), None)


def connect(uri: str) -> Any:
    """Return a client; a sqlite store is made by one process while the others wait."""
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if not uri.startswith("sqlite:"):
        return MlflowClient(uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock")):
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


def is_there(client: Any, run_id: str) -> bool:
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

    found = client.get_experiment_by_name(name)
    if found is None:
        root = _place_artifacts(uri)
        location = root and f"{root}/{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": "test/dice_delivered",
            f"mlflow.sharedViewState.{VIEW}": _describe_view(),
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
