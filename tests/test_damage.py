"""A run folder whose files are damaged: one sentence with the file and the repair, or no harm."""

import random
import shutil

import pytest

from medssl import rounds, students, teachers
from medssl.compare import compare
from medssl.config import InputError, load_config
from medssl.data.phantoms import write_phantoms
from medssl.evaluate import evaluate_run
from medssl.predict import load_model
from medssl.pseudo.gates import Gate
from medssl.report import write_report
from medssl.tracking.folder import read_folder, read_points
from medssl.tracking.note import describe, write_note
from medssl.tracking.scrub import make_scrub

SETTINGS = [
    "method=classic",
    "plan.patch_size=[16,16,16]",
    "network.depth=3",
    "network.width=0.5",
    "plan.flips=[]",
    "train.batch=2",
    "train.log_every=1",
    "tracking.uri=none",
    "steps=2",
    "rounds=1",
    "filter.uncertainty={source: none}",
    "filter.threshold.name=none",
    "filter.components=all",
]
JSON_FILES = (
    *("run.json", "plan.json", "splits.json", "state.json", "summary.json", "provenance.json"),
    *("pseudonyms.json", "round_0/done.json", "round_1/done.json", "round_0/model/done.json"),
    *("round_1/model/model.json", "model/model.json", "evaluation/summary.json"),
)
OTHER_FILES = (
    *("config.yaml", "metrics.jsonl", "round_0/review.csv", "evaluation/per_case.csv"),
    *("round_0/pseudo_labels/CASE/probs.npy", "round_0/pseudo_labels/CASE/uncertainty.npy"),
    *("round_0/pseudo_labels/CASE/class_voxels.npz", "round_0/pseudo_labels/CASE/meta.json"),
    *("round_0/model/weights.safetensors", "model/weights.safetensors", "round_1/checkpoint.pt"),
)

SPARED = {"train": (0, 8), "evaluate": (2, 9), "report": (0, 8, 12), "share": (11,)}
"""Which of the damages the slow commands see."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, num_labeled=2, num_unlabeled=2, num_test=1, shape=(24, 24, 24))
    return folder


@pytest.fixture(scope="module")
def train(data, stop_at):
    """Return a function that trains in a folder, or goes on there; every model passes its gate."""
    accept = students.read_review
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "judge_model", lambda *_: Gate(True, ()))
        patch.setattr(
            students, "read_review", lambda home: [{**r, "accepted": "1"} for r in accept(home)]
        )

        def go_on(folder, *overrides, **options):
            given = [*SETTINGS, *overrides]
            prepared = rounds.prepare(
                load_config(data, given),
                lambda plan: load_config(data, given, plan),
                None if options.get("restart") else folder,
            )
            return rounds.run_training(prepared, folder, stop_at(None), **options)

        yield go_on


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The folder of a finished and evaluated run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder).delivered == "round_1"
    evaluate_run(folder, report=lambda text: None)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run, with the cache beside it."""
    shutil.copytree(whole.parent, tmp_path / "runs")
    return tmp_path / "runs" / "whole"


def read_all(run, train):
    """What the commands read of a run, one after the other."""

    def tell():
        folder = read_folder(run)
        describe(folder)
        write_note(folder, make_scrub(folder))
        list(read_points(folder, 0))

    return {
        "tell": tell,
        "report": lambda: write_report(run),
        "share": lambda: write_report(run, share=True),
        "compare": lambda: compare([f"a={run}", f"b={run}/round_0"]),
        "predict": lambda: load_model(run),
        "predict_round": lambda: load_model(run / "round_0"),
        "train": lambda: train(run),
        "evaluate": lambda: evaluate_run(run, report=lambda text: None),
    }


def damage(path):
    """Yield what a file may hold after a fault of a disk or of a hand."""
    content = path.read_bytes()
    yield content[: len(content) // 2]
    yield b""
    flip = random.Random(path.name)
    for _ in range(6):
        flipped = bytearray(content)
        flipped[flip.randrange(len(content))] ^= 1 << flip.randrange(8)
        yield bytes(flipped)
    if path.suffix == ".json":
        yield from (b"[]", b"5", b"null", b"{}", b'{"gate": [], "rounds": {}, "labels": 3}')
    if path.suffix == ".jsonl":
        yield from (content + b"5\n", content + b"\xff\n", content + b'{"round": []}\n')


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON_FILES, *OTHER_FILES])
def test_only_input_errors_that_name_the_file_come_of_a_damaged_one(run, train, name):
    case_id = next((run / "round_0" / "pseudo_labels").iterdir()).name
    path = run / name.replace("CASE", case_id)
    saved = run.with_name("saved")
    shutil.copytree(run, saved)
    for number, content in enumerate(damage(path)):
        for command, read in read_all(run, train).items():
            changes = command in ("train", "evaluate")
            if number not in SPARED.get(command, range(99)):
                continue
            path.write_bytes(content)
            try:
                read()
            except InputError as error:
                if str(run) not in str(error) and command != "compare":
                    pytest.fail(f"{command} names no file: {error}")
            except Exception as error:
                pytest.fail(f"{command}: {type(error).__name__}: {error} of {content[:200]}")
            if changes:
                shutil.rmtree(run)
                shutil.copytree(saved, run)
