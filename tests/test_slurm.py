"""The scripts of scripts/slurm, without a Slurm: what they do at a signal, and to whom scans go."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
SLURM = SCRIPTS / "slurm"
PLACES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
SHELLCHECK = shutil.which("shellcheck", path=PLACES)

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

PROGRAM = """#!/usr/bin/env bash
echo "${{RANK:+$RANK/$WORLD_SIZE }}$*" >> called
trap 'echo stopping; sleep 0.2; exit {code}' TERM
touch started
[ -n "${{QUICK:-}}" ] && exit 0
for _ in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def submit(tmp_path):
    """Return a function that starts a script as a job does, with programs that write down calls."""

    def start(script, *arguments, code=130, **environment):
        for name, text in (
            ("medssl", PROGRAM.format(code=code)),
            ("scontrol", '#!/usr/bin/env bash\necho "$*" >> requeued\n'),
        ):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        return subprocess.Popen(
            ["bash", str(SLURM / script), *arguments],
            cwd=tmp_path,
            env={
                "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "PYTHON": str(tmp_path / "medssl"),
                **environment,
            },
        )

    return start


def read(folder, name):
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def stop(job, folder, *signals):
    for _ in range(200):
        if (folder / "started").exists():
            break
        time.sleep(0.05)
    for number in signals:
        job.send_signal(number)
        time.sleep(0.05)
    return job.wait(timeout=20)


def test_near_the_limit_the_training_stops_and_the_job_goes_back(submit, tmp_path):
    job = submit("train.sbatch", "runs/a", "scans", "labeled=4")
    assert stop(job, tmp_path, signal.SIGUSR1) == 130
    assert read(tmp_path, "called") == ["train scans labeled=4 --run runs/a"]
    assert read(tmp_path, "requeued") == ["requeue 7"]


def test_a_task_of_an_array_has_a_draw_and_a_run_of_its_own(submit, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    job = submit("train.sbatch", "runs/a", "scans", **array)
    assert stop(job, tmp_path, signal.SIGUSR1) == 130
    assert read(tmp_path, "called") == ["train scans data.draw=2 --run runs/a_2"]
    assert read(tmp_path, "requeued") == ["requeue 5_2"]


@pytest.mark.parametrize("status", ["interrupted", "delivered"])
def test_several_cards_train_by_torchrun_and_the_state_says_whether_to_go_on(
    submit, tmp_path, status
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(f'{{\n "status": "{status}",\n "round": 0\n}}')
    cards = {"SLURM_GPUS_ON_NODE": "4", "TORCHRUN": str(tmp_path / "medssl")}
    job = submit("train.sbatch", "run", "scans", code=1, **cards)
    assert stop(job, tmp_path, signal.SIGUSR1) == (130 if status == "interrupted" else 1)
    command = "--nproc-per-node 4 --max-restarts 3 -m -- medssl train scans --run run"
    assert read(tmp_path, "called") == [command]
    assert read(tmp_path, "requeued") == (["requeue 7"] if status == "interrupted" else [])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGUSR1, 0)])
def test_a_job_that_is_cancelled_or_that_delivered_meanwhile_does_not(
    submit, tmp_path, number, code
):
    job = submit("train.sbatch", "runs/a", "scans", code=code)
    assert stop(job, tmp_path, number) == code
    assert read(tmp_path, "requeued") == []


def test_a_training_that_ends_by_itself_ends_the_job(submit, tmp_path):
    assert submit("train.sbatch", "runs/a", "scans", QUICK="1").wait(timeout=20) == 0
    assert read(tmp_path, "requeued") == []


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        ("predict.sbatch", ("runs/a", "masks", "a b.nii"), "predict runs/a a b.nii --out masks"),
        ("evaluate.sbatch", ("runs/a", "--round", "0"), "evaluate runs/a --round 0"),
        ("study.sbatch", ("scans", "--csv", "a.csv"), "scripts/study.py scans --csv a.csv"),
    ],
)
def test_each_task_of_an_array_says_which_of_them_it_is(
    submit, tmp_path, script, arguments, command
):
    for task in (3, 5, 7):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "3"}
        array |= {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "2", "QUICK": "1"}
        assert submit(script, *arguments, **array).wait(timeout=20) == 0
    assert read(tmp_path, "called") == [f"{place}/3 {command}" for place in range(3)]


@pytest.mark.parametrize(
    "script", ["train.sbatch", "predict.sbatch", "evaluate.sbatch", "study.sbatch"]
)
def test_without_arguments_a_script_says_how_it_is_used(submit, script):
    assert submit(script).wait(timeout=20) == 2


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    files = [*sorted(SLURM.glob("*")), SCRIPTS / "wheelhouse"]
    done = subprocess.run([str(SHELLCHECK), *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
