"""The MLflow UI on the store of a folder of runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from medssl.config import InputError
from medssl.tracking.store import (
    ENVIRONMENT,
    UNUSED,
    VIEW,
    explain_store,
    follow_move,
)


def serve_runs(runs_folder: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
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
    follow_move(folder / "mlflow.db")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"),
        *("--artifacts-destination", (folder / "mlartifacts").as_uri()),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]
    with tempfile.TemporaryFile("w+") as messages, _sigterm_as_interrupt():
        process = subprocess.Popen(
            command,
            env={k: v for k, v in os.environ.items() if k not in UNUSED} | ENVIRONMENT,
            cwd=folder,
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
        query = f"viewStateShareKey={VIEW}&workflowType=machine_learning"
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
    try:
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
            return list(store.execute(query))
    except sqlite3.Error as error:
        raise InputError(explain_store(folder / "mlflow.db", error)) from error


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
    next_free = next(free, None)
    if next_free != port:
        hint = "choose another --host" if next_free is None else f"--port {next_free} is free"
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
