"""Processes that share the steps of a training do what one does alone."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from crew import Crew
from processes import run

from medssl.data.phantoms import write_phantoms
from medssl.runs import Journal, hash_file, read_json
from medssl.settings import load_config

TRAIN = """
import os, sys
from pathlib import Path
import torch
from medssl import ranks
from medssl.config import Config
from medssl.networks.sharing import share_steps
from medssl.plan import Plan
from medssl.rounds.estimate import make_trial
from medssl.runs import StopFlag
from medssl.train import train_model

plan = Plan.model_validate_json(Path("plan.json").read_text())
config = Config.model_validate_json(Path("config.json").read_text())
rank, run = os.environ.get("RANK", "0"), Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(int(rank))  # the first one's weights are taken
objective, dataset = make_trial(plan, config, int(sys.argv[2]), run / f"scans_{rank}")
with ranks.join_others(), share_steps("cpu"):
    train_model(objective, dataset, config, plan, run, int(sys.argv[2]), StopFlag(run))
torch.save(objective.state_dict(), run / f"weights_{rank}.pt")
"""
RUN = """
import os, signal, sys
from pathlib import Path
from medssl import cli, train
from medssl.pseudo.gates import Gate
from medssl.rounds import student, teacher

teacher.judge_model = lambda *_: Gate(True, ())  # of a few steps none would pass
accept = student.read_review
student.read_review = lambda folder: [{**row, "accepted": "1"} for row in accept(folder)]
add_up, steps = train.sum_gradients, []

def die(parameters):
    steps.append(1)
    mark = Path(os.environ["KILL"])
    if len(steps) == 9 and os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(parameters)

if "KILL" in os.environ:
    train.sum_gradients = die
sys.argv[0] = "medssl"
cli.main()
"""
SETTINGS = [
    *("rounds=1", "steps=[6,6]", "train.batch=3", "train.unlabeled_ratio=1", "validation=1"),
    *("plan.patch_size=[16,16,16]", "network.depth=3", "network.width=0.5", "plan.flips=[]"),
    *("train.log_every=1", "train.checkpoint_every=4", "tracking.uri=none"),
    *("train.device=cpu", "train.precision=float32"),
]
SHORT = ["train.log_every=1", "train.checkpoint_every=2", "train.batch=3", "tracking.uri=none"]
NOISY = [
    "views=[strong,strong_2,feature_noise]",
    "noise.stochastic_depth=0.8",
    "noise.dropout=0.2",
    "noise.labeled_mixing=copy_paste",
    "teacher.probs=sampled",
    "filter.threshold={name: soft}",
    "losses.entropy.weight=0.1",
    "losses.consistency.weight=0.1",
]


@pytest.fixture
def describe(tmp_path, tiny_plan):
    """Return a function that writes plan and configuration of a training of four steps."""

    def write(*settings):
        config = load_config(None, [*SHORT, *settings]).config
        plan = tiny_plan.model_copy(update={"steps": 4, "batch": 3, "num_unlabeled": 3})
        (tmp_path / "plan.json").write_text(plan.model_dump_json())
        (tmp_path / "config.json").write_text(config.model_dump_json())
        return tmp_path

    return write


def read_losses(folder):
    entries = Journal(folder / "metrics.jsonl").read()
    return [{k: v for k, v in e["metrics"].items() if k.startswith("losses/")} for e in entries]


def read_weights(folder, rank=0):
    return torch.load(folder / f"weights_{rank}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("round_index", "count", "settings"),
    [
        (0, 2, []),
        (1, 2, []),
        (1, 4, NOISY),  # of 3 + 9 patches
        (1, 2, ["objective=medssl.cross_pseudo:CrossPseudo"]),
    ],
    ids=["labels", "student", "noisy student", "two students"],
)
def test_several_processes_have_the_losses_of_one(describe, round_index, count, settings):
    folder = describe(*settings)
    assert run("-c", TRAIN, "one", round_index, cwd=folder).returncode == 0
    with Crew(count, "-c", TRAIN, "many", round_index, cwd=folder) as crew:
        assert crew.wait(300) == [0] * count, crew.read()
    one, many = (read_losses(folder / name) for name in ("one", "many"))
    assert len(one) == len(many) == 4
    for ours, theirs in zip(many, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    weights, last = read_weights(folder / "one"), read_weights(folder / "many", count - 1)
    for key, value in read_weights(folder / "many").items():
        torch.testing.assert_close(value, weights[key], atol=1e-4, rtol=1e-4, msg=key)
        assert torch.equal(value, last[key]), key


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with scans, in which processes are started."""
    folder = tmp_path_factory.mktemp("shared")
    shape = (16, 16, 16)
    write_phantoms(folder / "scans", num_labeled=3, num_unlabeled=3, num_test=0, shape=shape)
    return folder


@pytest.fixture(scope="module")
def whole(scans):
    """The run of two processes that nobody disturbs, and what they said."""
    return train(scans, 2, "whole")


def train(folder, count, name, **environment):
    """Train in so many processes, all of which end well; return the run and what they said."""
    command = ("-c", RUN, "train", "scans", "--run", f"{name}/run", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        if count == 1:
            done = run(*command, cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            return folder / name / "run", [done.stdout]
        with Crew(count, *command, cwd=folder) as crew:
            assert crew.wait(300) == [0] * count, crew.read()
            return folder / name / "run", crew.read()


def read_reviews(folder):
    with (folder / "round_0" / "review.csv").open(newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(scans, whole):
    (two, said), (one, _) = whole, train(scans, 1, "one")
    assert said[1] == ""
    assert "2 processes share the patches of a step" in said[0]
    losses = list(zip(read_losses(two), read_losses(one), strict=True))
    assert losses[0][0] == pytest.approx(losses[0][1], abs=1e-5)
    for ours, theirs in losses:  # rounding grows from step to step
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert read_json(two / "summary.json")["delivered"] == "round_1"
    done = [read_json(folder / "round_1" / "done.json") for folder in (two, one)]
    assert done[0]["final"]["val/dice"] == pytest.approx(done[1]["final"]["val/dice"], abs=0.005)
    ours, theirs = read_reviews(two), read_reviews(one)
    assert ours.keys() == theirs.keys()
    for case_id, row in ours.items():
        assert float(row["confidence"]) == pytest.approx(float(theirs[case_id]["confidence"]), 0.01)
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_same_command_goes_on_to_the_same_bits(scans, whole):
    command = ("-c", RUN, "train", "scans", "--run", "killed_one/run", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL", "killed")
        with Crew(2, *command, cwd=scans) as crew:
            assert crew.wait(300) == [2, -9], crew.read()
            assert "waits in vain for another one of this command" in crew.read()[0]
    again, _ = train(scans, 2, "killed_one")
    assert_same_run(again, whole[0])


def assert_same_run(first, second):
    for name in ("round_0/model", "round_1/model", "model"):
        path = f"{name}/weights.safetensors"
        assert hash_file(first / path) == hash_file(second / path)
    assert read_losses(first) == read_losses(second)


@pytest.mark.slow
def test_torchrun_starts_a_killed_training_again(scans, whole):
    (scans / "run.py").write_text(RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--standalone", "--max-restarts=1", "--", "run.py", "train", "scans"]
    done = subprocess.run(
        [*command, "--run", "again/run", *SETTINGS],
        cwd=scans,
        env={**os.environ, "KILL": "killed_again"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (scans / "killed_again").exists()
    assert done.returncode == 0, done.stderr
    assert_same_run(scans / "again" / "run", whole[0])
