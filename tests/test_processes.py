"""A process of `processes` is one as Python starts it."""

import json
import os
import signal
import subprocess
import sys

import processes
import pytest

pytestmark = pytest.mark.slow

SAY = """
import json, os, signal, sys
handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
print(json.dumps({
    "argv": sys.argv, "first path": sys.path[0], "folder": os.getcwd(), "variables": {**os.environ},
    "handlers": handlers, "input": sys.stdin.read(), "threads": len(os.listdir("/proc/self/task")),
    "files": len(os.listdir("/proc/self/fd")), "group": os.getpgid(0), "main": __name__,
    "is a terminal": sys.stdout.isatty(),
}))
sys.stderr.write("to stderr")
sys.exit(3)
"""


@pytest.mark.parametrize("form", ["code", "module", "script"])
def test_it_begins_and_ends_as_a_process_of_python(tmp_path, form):
    (tmp_path / "say.py").write_text(SAY)
    command = {"code": ["-c", SAY], "module": ["-m", "say"], "script": [tmp_path / "say.py"]}[form]
    env = {**os.environ, "MLFLOW_TRACKING_URI": "ours"}
    command = [*map(str, command), "a b", "--c=ü"]
    ours = processes.run(*command, cwd=tmp_path, env=env)
    theirs = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = json.loads(ours.stdout)
    assert said == json.loads(theirs.stdout)
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr) == (3, "to stderr")


@pytest.mark.parametrize(
    ("code", "ended", "words"),
    [
        ("raise ValueError('so')", 1, "ValueError: so"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.abort()", -6, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
        ("import atexit; atexit.register(print, 'last')", 0, "last"),
    ],
)
def test_how_it_ended_is_told(code, ended, words):
    done = processes.run("-c", code)
    assert done.returncode == ended
    assert words in done.stdout + done.stderr


def test_a_signal_reaches_it_and_its_siblings_live():
    first, second = (processes.Process("-c", "import time; time.sleep(60)") for _ in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=20) == -signal.SIGTERM
    assert second.poll() is None
    second.send_signal(signal.SIGKILL)
    assert second.wait(timeout=20) == -signal.SIGKILL


def test_random_numbers_are_its_own_and_nothing_is_left_over():
    code = "import random, numpy; print(random.random(), numpy.random.rand()); import os; os.x = 1"
    first, second = (processes.run("-c", code).stdout for _ in range(2))
    assert first != second
    assert "has no attribute 'x'" in processes.run("-c", "import os; os.x").stderr


def test_other_numbers_of_threads_are_refused():
    done = processes.run("-c", "print('began')", env={**os.environ, "OMP_NUM_THREADS": "7"})
    assert done.returncode == 1
    assert "OMP_NUM_THREADS" in done.stderr
    assert not done.stdout
