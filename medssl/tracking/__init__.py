"""The MLflow mirror of a run folder: the folder is the truth, and no server can stop a run.

``sync_run`` reads files and sends what MLflow lacks. A parent run stands for a training, a child
run for each round. Case ids, paths and user names are not sent: see ``medssl.names``. MLflow is
slow to import and may fail, so training never loads it: ``Mirror`` starts a small process that
does.
"""

from medssl.tracking.mirror import Mirror
from medssl.tracking.send import sync_run
from medssl.tracking.server import serve_runs
from medssl.tracking.store import check_uri, choose_store, find_default_uri, find_store_problem

__all__ = [
    "Mirror", "check_uri", "choose_store", "find_default_uri", "find_store_problem", "serve_runs",
    "sync_run",
]  # fmt: skip
