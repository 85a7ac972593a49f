"""Mirrors a run folder beside its training, from a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from medssl.tracking.send import sync_run

PAUSE_S = 15.0
"""Seconds between two mirrorings of a run; doubled after each failure, up to ``_MAX_PAUSE_S``."""

_MAX_PAUSE_S = 240.0


class Mirror:
    """Keeps MLflow up to date beside a training, from a process of its own.

    Whatever happens to the server, nothing here raises or waits, but for ``close``.

    Args:
        run_dir: The run folder.
        uri: As in ``sync_run``.
        pause_s: Seconds between two mirrorings.
    """

    def __init__(self, run_dir: Path, uri: str | None = None, pause_s: float = PAUSE_S) -> None:
        self._run_dir = run_dir
        self._arguments = json.dumps([str(run_dir.resolve()), uri])
        self._pause_s = pause_s
        self._news = threading.Event()
        self._closing = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._work, name="mlflow mirror", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that the run folder has something new; returns at once."""
        self._news.set()

    def close(self, timeout_s: float = 60.0) -> None:
        """Mirror the last state within ``timeout_s`` seconds; one line says if that failed."""
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        is_late = self._thread.is_alive()  # what it says of the process that ends now is no reason
        problem = f"no answer within {timeout_s:g} s" if is_late else self._problem
        self._end_process()
        if problem:
            print(
                f"MLflow has not got all of this run ({problem}); "
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
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    code = "from medssl.tracking.mirror import answer_requests; answer_requests()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C stops the training, which then closes the mirror
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def answer_requests() -> None:
    """Mirror the run folder once for each line of standard input; the end of it is the end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a job's end: the training still has a say
    run_dir, uri = json.loads(sys.argv[1])
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what mlflow prints is no answer
    for _ in sys.stdin:
        answer = ""
        try:
            sync_run(Path(run_dir), uri)
        except Exception as error:  # whatever it is, the training goes on and is told in a line
            answer = f"{type(error).__name__}: {error}".removeprefix("InputError: ")
        print(json.dumps(answer), file=answers, flush=True)
