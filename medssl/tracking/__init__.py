"""The MLflow mirror of a run folder: the folder is the truth, and no server can stop a run.

``sync`` reads files and sends what MLflow lacks. A parent run stands for a training, a child run
for each round. Case ids, paths and user names stay at home: see ``medssl.names``. MLflow is slow
to import and has a will of its own, so training never loads it: ``Mirror`` talks to a small
process that does.
"""

from medssl.tracking.mirror import Mirror
from medssl.tracking.send import sync
from medssl.tracking.server import serve
from medssl.tracking.store import check_uri, choose_store, default_uri, find_store_problem

__all__ = [
    "Mirror", "check_uri", "choose_store", "default_uri", "find_store_problem", "serve", "sync",
]  # fmt: skip
