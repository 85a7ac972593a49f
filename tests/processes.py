"""Python processes of their own that begin with everything imported.

`import monai` takes nine seconds, and every process that is to be killed, interrupted or limited
would pay them anew. A server without threads, one for each pytest worker, has imported everything
and forks. A child has its own pid, arguments, folder, environment, streams, signals, random numbers
and exit code. It shares with its siblings the seed of hashes and what libraries read once, as they
are loaded: a request with other variables of `LOADED` is refused. What is imported when, and the
installed wheel, are tested with Python itself.
"""

import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

PRELOADED = (
    "matplotlib.backends.backend_agg", "mlflow.store.tracking.sqlalchemy_store", "scipy.stats",
    "medssl.cli", "medssl.costs", "medssl.evaluate", "medssl.report", "medssl.rounds.loop",
)  # fmt: skip
LOADED = (
    "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS",
)  # fmt: skip
NUMBER = struct.Struct("i")
MOST_BYTES = 100_000  # of a request

_server: socket.socket | None = None


class Process:
    """A process of its own, used as `subprocess.Popen` is; arguments are those of Python.

    The first one is -m, -c or a script. Streams go to open files, by default nowhere.
    """

    def __init__(self, *arguments, cwd=None, env=None, stdout=None, stderr=None):
        self.returncode = None
        self._answers, theirs = socket.socketpair()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        with open(os.devnull, "r+b") as nowhere, theirs:
            streams = [nowhere, stdout or nowhere, stderr or nowhere, theirs]
            files = [stream.fileno() for stream in streams]
            socket.send_fds(_find_server(), [json.dumps(request).encode()], files)
        self.pid = self._read()

    def _read(self):
        """Return the next number of the server; an error if it has died."""
        return NUMBER.unpack(self._answers.recv(NUMBER.size))[0]

    def poll(self):
        """Return the exit code, -N of a process that signal N ended; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = self._read()
            self._answers.close()
        return self.returncode

    def wait(self, timeout=600):
        """Return the exit code once there is one."""
        if self.returncode is None:
            select.select([self._answers], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def run(*arguments, cwd=None, env=None):
    """Run a process to its end; return its exit code and what it wrote, as `subprocess.run`."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Process(*arguments, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            code = process.wait()
        finally:
            process.send_signal(signal.SIGKILL)
        told = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(arguments, code, *told)


def _find_server():
    """Return the socket of this worker's server, which ends when the worker does."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            subprocess.Popen(command, pass_fds=[theirs.fileno()], **nowhere)
    return _server


def serve(requests):
    """Fork at each request; return it, in the child."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["medssl.rounds.estimate"].TRIED_SECONDS = 0.0  # as the fixture brief
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # which sees to forks
    assert len(threads) == 1, f"a fork would lose all threads but one: {threads}"
    gc.collect()
    gc.freeze()  # else each child spends seconds at its end on what it has inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the children
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        message, files, _, _ = socket.recv_fds(requests, MOST_BYTES, 4)
        if not message:
            raise SystemExit
        if not os.fork():
            break
        for file in files:
            os.close(file)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, answers = files
    if child := os.fork():
        _wait(child, streams, answers)
    os.close(answers)
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    return json.loads(message)


def _wait(child, streams, answers):
    """Say the pid of a child, and its exit code once it has ended."""
    for file in streams:
        os.close(file)
    os.write(answers, NUMBER.pack(child))
    os.write(answers, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def become(arguments, cwd, env):
    """Do in this child what Python does at its start, and then what is asked."""
    import numpy as np

    signal.signal(signal.SIGINT, signal.default_int_handler)
    changed = [name for name in LOADED if os.environ.get(name) != env.get(name)]
    assert not changed, f"read when libraries were loaded: {changed}"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    random.seed()
    np.random.seed()
    first, *rest = arguments
    if first == "-m":
        sys.argv, sys.path[0] = rest, cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))
