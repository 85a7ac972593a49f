"""What a round does beyond the plain loop: ensembles, stable cases, fine-tunes, shared round 0."""

import csv
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssl import cli, predict, runs, windows
from medssl.config import InputError
from medssl.data.io import read_label, write_mask
from medssl.data.layouts import read_dataset
from medssl.data.phantoms import write_phantoms
from medssl.data.pseudo_labels import map_pseudo_label
from medssl.plan import LOOKS_LIKE_CT
from medssl.predict import load_model, predict_probs
from medssl.pseudo import label
from medssl.pseudo.gates import Expectation, Gate, judge_model
from medssl.pseudo.label import weigh_cases
from medssl.rounds import loop
from medssl.rounds import run as run_of_rounds
from medssl.rounds import student as students
from medssl.rounds import teacher as teachers
from medssl.rounds.run import measure_validation
from medssl.run_folder import read_folder
from medssl.runs import Journal, hash_file, is_half_deleted, read_json, write_json
from medssl.settings import list_methods, load_config
from medssl.transforms.spatial import draw_turn
from medssl.windows import Window

SMALL = [
    "method=classic",
    "plan.patch_size=[16,16,16]",
    "network.depth=3",
    "plan.flips=[]",
    "train.batch=2",
    "train.log_every=1",
    "tracking.uri=none",
    "steps=3",
    "filter.uncertainty.passes=2",
]
TERMS = ("pseudo_label", "entropy", "consistency")
SETTINGS = [
    *SMALL,
    "teacher.ema_decay=0.99",  # of all presets, as one round 0 asks for
    "network.width=0.5",
    "filter.uncertainty={source: none}",
    "filter.threshold.name=none",
    "filter.components=all",
    "rounds=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, num_labeled=2, num_unlabeled=4, num_test=0, shape=(16, 16, 16))
    return folder


@pytest.fixture
def start(data, tmp_path, monkeypatch, stop_at):
    """Return a function that runs all rounds in a folder; models of a few steps pass the gate.

    Their time is not estimated first, nothing is drawn, transport is fitted in a few steps: each of
    these takes longer than the training.
    """
    monkeypatch.setattr(teachers, "judge_model", lambda *_: Gate(True, ()))
    monkeypatch.setattr(loop, "estimate_run", lambda *_: {"hours": 0.01})
    monkeypatch.setattr(label, "render_overlay", lambda *_, **__: b"")
    monkeypatch.setattr(students, "TRANSPORT_STEPS", 20)
    accept = students.read_review
    monkeypatch.setattr(
        students, "read_review", lambda folder: [{**row, "accepted": "1"} for row in accept(folder)]
    )

    def run(
        *overrides, name="run", stop=None, settings=SETTINGS, taken=None, stop_flag=None, **options
    ):
        given = [*settings, *overrides]
        prepared = loop.prepare_run(
            load_config(data, given), lambda plan: load_config(data, given, plan), taken
        )
        folder = tmp_path / "runs" / name
        loop.run_training(prepared, folder, stop_flag or stop_at(stop), **options)
        return folder

    return run


def read_losses(folder, round_index):
    """Return the losses of each step of a round."""
    entries = Journal(folder / "metrics.jsonl").read()
    kept = [e for e in entries if e["round"] == round_index and "losses/total" in e["metrics"]]
    return {
        e["step"]: {k[7:]: v for k, v in e["metrics"].items() if k.startswith("losses/")}
        for e in kept
    }


def read_rows(folder):
    with (folder / "review.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objective=medssl.cross_pseudo:CrossPseud"], "CrossPseud"),
        (["filter.uncertainty.source=flips"], r"plan\.flips=\[\]"),
        (["train.fine_tune={share: 0.5, frozen_levels: 4}"], "the encoder has 3 levels"),
        (["noise.mixing=cutmix", "train.batch=1"], r"cutmix .* train\.unlabeled_ratio=2"),
        (
            ["losses.pseudo_label={name: forward_ce, transition: [[0.9, 0.1], [0.1, 0.9]]}"],
            r"losses\.pseudo_label: .*4 classes",
        ),
        (["losses.pseudo_label={name: forward_ce, transition: held_out}"], "validation=1"),
        (["losses.pseudo_label={name: generalized_ce, options: {q: 2}}"], r"q is 2\.0"),
        (
            ["losses.pseudo_label={name: mae, options: {q: 0.5}}"],
            "mae has no option q; it has none",
        ),
        (["losses.pseudo_label={name: symmetric_ce, options: {p: 1}}"], "alpha=1.0, beta=1.0"),
        (["losses.pseudo_label={name: generalized_ce, options: {q: high}}"], "pseudo_label"),
    ],
)
def test_what_a_student_would_fail_at_is_refused_before_round_0(start, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        start(*settings)
    assert not (tmp_path / "runs").exists()


ALIKE = {"entropy", "fixmatch", "flexmatch", "mean_teacher", "pseudo_label", "softmatch"}
"""Presets that differ from freematch, uamt or default by numbers, a threshold or terms left out."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.nightly] * (method in ALIKE))
        for method in sorted(set(list_methods()) - {"labels_only"})
    ],
)
def test_every_preset_trains_its_rounds_labels_and_delivers(start, method):
    folder = start(f"method={method}", settings=SMALL)
    config = load_config(folder / "config.yaml").config
    summary = read_json(folder / "summary.json")
    assert len(summary["rounds"]) == config.train.rounds + 1
    assert summary["delivered"] == f"round_{config.train.rounds}"
    for index in range(1, config.train.rounds + 1):
        losses = read_losses(folder, index)
        assert all(np.isfinite(list(terms.values())).all() for terms in losses.values())
        on = {name for name in TERMS if getattr(config.losses, name).weight > 0}
        assert on <= set().union(*losses.values())
        assert read_json(folder / f"round_{index}" / "model" / "done.json")["num_kept"] > 0


def test_no_scan_is_labeled_where_nobody_reads_it(start):
    folder = start("rounds=0")
    assert not (folder / "round_0" / "pseudo_labels").exists()
    gate = read_json(folder / "round_0" / "done.json")["gate"]
    assert gate == {"passed": True, "reasons": ["not judged: no student learns from it"]}
    assert read_json(folder / "summary.json")["delivered"] == "round_0"


def test_an_online_teacher_labels_all_scans_in_full_at_the_end_only(start, monkeypatch):
    passes = []
    real = teachers.sample_probs

    def count(networks, image, window, turns, *others):
        passes.append(1 + len(turns))
        return real(networks, image, window, turns, *others)

    monkeypatch.setattr(teachers, "sample_probs", count)
    folder = start("method=default", "rounds=2", "network.width=0.5", settings=SMALL)
    assert passes == [2] * 4  # the four unlabeled scans, once
    for index in range(3):
        assert len(read_rows(folder / f"round_{index}")) == 4
        done = read_json(folder / f"round_{index}" / "model" / "done.json")
        assert (0 <= done["agreement_with_average"] <= 1) if index else True
    final = read_json(folder / "round_2" / "done.json")["final"]
    assert final["monitors/agreement_with_average"] == done["agreement_with_average"]


@pytest.mark.parametrize("fidelity", teachers.SAMPLERS)
def test_a_clean_teacher_measures_its_uncertainty_with_the_fidelity_asked_for(
    start, monkeypatch, fidelity
):
    asked = []

    def spy(name, network, image, window, passes, box):
        asked.append((name, passes))
        yield from real[name](network, image, window, passes, box)

    real = dict(teachers.SAMPLERS)
    for name in real:
        monkeypatch.setitem(teachers.SAMPLERS, name, partial(spy, name))
    uncertainty = f"{{source: mc_dropout, passes: 3, fidelity: {fidelity}}}"
    start("rounds=1", f"filter.uncertainty={uncertainty}")
    assert set(asked) == {(fidelity, 3)}


def test_an_ensemble_labels_by_its_mean_and_the_last_round_has_one_model(start):
    folder = start("teacher.ensemble=2", "filter.uncertainty={source: ensemble}")
    second = folder / "round_0" / "models" / "1"
    assert (second / "metrics.jsonl").is_file()
    assert not (folder / "round_1" / "models").exists()
    summary = read_json(folder / "summary.json")
    assert summary["total_steps"] == 3 + 3 + 3, "two models of round 0, and the student"
    rates = [
        e["metrics"]["monitors/steps_per_second"] for e in Journal(second / "metrics.jsonl").read()
    ]
    assert summary["rounds"][0]["seconds"] > sum(1 / rate for rate in rates)
    weights = [load_file(p / "model" / "weights.safetensors") for p in (folder / "round_0", second)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    models = [teachers.load_model(p) for p in (folder / "round_0", second)]
    (case_id, *_) = sorted(p.name for p in (folder / "round_0" / "pseudo_labels").iterdir())
    probs, doubt = map_pseudo_label(folder / "round_0" / "pseudo_labels" / case_id)
    (image,) = (folder.parent / "cache").glob(f"**/{case_id}*/*/image.npy")
    tensor = torch.from_numpy(np.load(image).astype(np.float32))[None]
    window = Window((16, 16, 16), models[0].info.precision)
    own = [predict_probs(m.network, tensor, window)[0].numpy() for m in models]
    assert np.abs(probs / 255 - (own[0] + own[1]) / 2).max() < 0.02
    assert np.abs(own[0] - own[1]).max() > 0.02
    mean = (own[0] + own[1]) / 2
    assert np.allclose(doubt, -(mean * np.log(mean)).sum(0), atol=0.02)


@pytest.mark.slow  # of a single model the same holds in test_train.py
def test_a_stop_inside_an_ensemble_resumes_to_the_same_bits(start):
    overrides = ["teacher.ensemble=2", "filter.uncertainty={source: ensemble}", "steps=6"]
    whole = start(*overrides, name="whole")
    stopped = start(*overrides, name="stopped", stop=14)
    assert read_json(stopped / "state.json")["status"] == "interrupted"
    assert not (stopped / "round_1").exists()
    assert (stopped / "round_0" / "models" / "1").is_dir()
    start(*overrides, name="stopped")
    for path in sorted(whole.glob("**/weights.safetensors")):
        assert hash_file(path) == hash_file(stopped / path.relative_to(whole)), path


def test_the_stable_half_comes_first_and_then_all(start, monkeypatch):
    base = start("method=labels_only", "rounds=0", name="base")
    chosen, choose = [], students._choose_cases

    def keep(run, index, teacher):
        chosen.append(choose(run, index, teacher))
        return chosen[-1]

    monkeypatch.setattr(students, "_choose_cases", keep)
    folder = start("filter.case.stable=[0.5, 1.0]", "rounds=2", round_0=base)
    rows = read_rows(folder / "round_0")
    values = {row["case_id"]: float(row["stability"]) for row in rows}
    first, second = ({case.cached.case_id for case in cases} for cases in chosen)
    assert first == set(sorted(values, key=values.__getitem__)[2:])
    assert second == set(values)
    assert read_json(folder / "round_1" / "model" / "done.json")["num_kept"] == 2
    assert read_json(folder / "round_2" / "model" / "done.json")["num_kept"] == 4
    assert all(row["stability"] == "" for row in read_rows(folder / "round_1"))
    snapshots = [folder / "round_0" / "snapshots" / part for part in "12"]
    paths = [*snapshots, folder / "round_0" / "model"]
    assert len({hash_file(path / "weights.safetensors") for path in paths}) == 3


def test_stability_is_the_mean_dice_of_earlier_checkpoints_with_the_last(monkeypatch):
    def say(*classes):
        return torch.eye(3)[list(classes)].T.reshape(3, 5, 1, 1)

    said = {"last": say(1, 1, 2, 2, 0), "first": say(0, 0, 0, 2, 2), "second": say(1, 1, 0, 0, 2)}
    for name in ("teacher", "run"):  # who labels, and who looks at the checkpoints
        path = f"medssl.rounds.{name}.average_views"
        monkeypatch.setattr(path, lambda network, *_: iter([said[network]]))
    plan = SimpleNamespace(window=Window((5, 1, 1)), num_classes=3, device="cpu")
    settings = ["method=classic", "filter.uncertainty.source=none"]
    config = load_config(overrides=settings).config
    grid = {"shape": (5, 1, 1), "affine": np.eye(4)}
    case = SimpleNamespace(case_id="a", image=lambda: np.zeros((1, 5, 1, 1), np.float32), **grid)
    models = [SimpleNamespace(network=name) for name in said]
    run = SimpleNamespace(plan=plan, config=config, num_rounds=2)
    found = teachers._label_case(run, 0, models[:1], models[1:], case)
    # class 1: 0 and 2 x 2 / (2 + 2); class 2: 2 x 1 / (2 + 2) and 0
    ((_, probs, _),) = found.parts
    stability = found.measure_stability(probs.argmax(0).astype(np.uint8))
    assert stability == pytest.approx(((0 + 0.5) / 2 + (1 + 0) / 2) / 2)


@pytest.mark.slow
def test_a_fine_tune_sees_labels_only_and_leaves_the_first_levels_as_they_are(start):
    tuned = ["train.fine_tune={share: 0.5, lr: 0.01, frozen_levels: 1}", "steps=6"]
    folder = start(*tuned, "teacher.ema_decay=0.0", "train.checkpoint_every=3")
    losses = read_losses(folder, 1)
    assert "pseudo_label" in losses[3]
    assert set(losses[4]) == {"supervised", "total"}
    stopped = start(*tuned, "teacher.ema_decay=0.0", "train.checkpoint_every=3", name="b", stop=18)
    state = read_json(stopped / "state.json")
    assert (state["round"], state["step"]) == (1, 3)
    path = folder / "round_1" / "checkpoint.pt"
    after = torch.load(path, weights_only=True)["objective"]
    path = stopped / "round_1" / "checkpoint.pt"
    before = torch.load(path, weights_only=True)["objective"]
    first = [k for k in after if k.startswith("student.dynunet.input_block.") and "weight" in k]
    last = [k for k in after if k.startswith("student.dynunet.output_block.") and "weight" in k]
    assert all(torch.equal(before[key], after[key]) for key in first)
    assert first
    assert not all(torch.equal(before[key], after[key]) for key in last)


def test_every_weight_learns_in_bfloat16_where_the_student_teaches_itself(start):
    settings = ("method=fixmatch", "train.start=warm", "train.precision=bfloat16", "steps=6")
    folder = start(*settings, "train.weight_decay=0.0")
    path = folder / "round_{}" / "checkpoint.pt"
    before, after = (
        torch.load(str(path).format(index), weights_only=True)["objective"] for index in (0, 1)
    )
    weights = [key for key in after if key.startswith("student.") and key.endswith(".weight")]
    assert weights
    assert not [key for key in weights if torch.equal(before[key], after[key])]


def test_pretraining_leaves_the_labels_to_the_fine_tune(start):
    folder = start("train.schedule=pretrain", "train.fine_tune.share=0.5", "steps=6")
    losses = read_losses(folder, 1)
    assert set(losses[1]) >= {"pseudo_label"}
    assert "supervised" not in losses[1]
    assert set(losses[6]) == {"supervised", "total"}


def test_a_warm_start_begins_with_the_teacher(start):
    settings = ["teacher.ema_decay=0.0", "train.lr=1e-9", "train.weight_decay=0", "steps=1"]
    for how, same in (("warm", True), ("scratch", False)):
        folder = start(*settings, f"train.start={how}", name=how)
        files = [folder / f"round_{r}" / "model" / "weights.safetensors" for r in (0, 1)]
        teacher = load_file(files[0])  # the student's blocks have noise, and longer names
        student = {k.replace("norm2.0.", "norm2."): v for k, v in load_file(files[1]).items()}
        close = all(torch.allclose(teacher[k], student[k], atol=1e-6) for k in teacher)
        assert close is same


def test_students_may_be_wider_than_their_teacher_but_not_start_warm_then(start):
    folder = start("network.width=[0.5, 1.0]", "train.start=scratch")
    filters = [
        read_json(folder / f"round_{r}" / "model" / "model.json")["network"]["filters"]
        for r in (0, 1)
    ]
    assert filters == [[8, 16, 32], [16, 32, 64]]
    with pytest.raises(InputError, match=r"train\.start=warm"):
        start("network.width=[0.5, 1.0]", "train.start=warm", name="warm")


def test_rounds_may_have_steps_of_their_own(start):
    base = start("method=labels_only", "rounds=0", "steps=6", name="base")
    folder = start("steps=[6, 3]", "rounds=2", round_0=base)
    summary = read_json(folder / "summary.json")
    assert [entry["steps"] for entry in summary["rounds"]] == [6, 3, 3]
    assert summary["total_steps"] == 12
    assert summary["baseline"] == {"round": 0, "steps": 6}
    assert [max(read_losses(folder, index)) for index in range(3)] == [6, 3, 3]
    with pytest.raises(InputError, match="--round-0"):
        start("steps=[5, 6]", round_0=base, name="shorter")


def test_round_0_of_another_run_is_taken_over_if_its_settings_are_the_same(start):
    base = start("method=labels_only", "rounds=0", name="base")
    folder = start("noise.strong=0.3", "losses.entropy.weight=0", round_0=base)
    name = "round_0/model/weights.safetensors"
    assert hash_file(base / name) == hash_file(folder / name)
    assert not (folder / "round_0" / "checkpoint.pt").exists()
    assert len(read_losses(folder, 0)) == 3
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["steps"] for entry in summary["rounds"]] == [3, 3]
    with pytest.raises(InputError, match="other data, another network, or other steps"):
        start("steps=5", round_0=base, name="shorter")
    with pytest.raises(InputError, match=r"teacher.ema_decay is 0.99 there and 0.95 here; leave"):
        start("teacher.ema_decay=0.95", round_0=base, name="faster")
    with pytest.raises(InputError, match="no finished round 0"):
        start(round_0=base.parent / "nothing", name="missing")


@pytest.mark.parametrize(
    ("owner", "function", "place"),
    [(loop.shutil, "copytree", "model"), (loop, "write_json", "done.json")],
)
def test_a_kill_while_round_0_is_taken_over_leaves_it_undone(
    start, monkeypatch, owner, function, place
):
    base = start("method=labels_only", "rounds=0", name="base")
    real = getattr(owner, function)

    def die(source, *rest, **options):
        paths = [path for path in (source, *rest[:1]) if isinstance(path, Path)]
        if any(path.name == place and "round_0" in path.parts for path in paths):
            raise KeyboardInterrupt
        return real(source, *rest, **options)

    monkeypatch.setattr(owner, function, die)
    with pytest.raises(KeyboardInterrupt):
        start(round_0=base)
    monkeypatch.setattr(owner, function, real)
    folder = base.parent / "run"
    assert (folder / "run.json").is_file()
    assert not (folder / "round_0" / "model" / "done.json").exists()
    start(round_0=base)
    name = "round_0/model/weights.safetensors"
    assert hash_file(base / name) == hash_file(folder / name)
    assert len(read_losses(folder, 0)) == 3


@pytest.mark.parametrize(
    ("verdicts", "taught_by", "passed", "rejected"),
    [
        ([1, 0, 1], [None, 0, 0], [0, 2], 0),  # the last that passed teaches, not the last
        ([1, 1, 0, 0], [None, 0, 1, 1], [0, 1], 2),  # two in a row end the run of five
        ([1, 0, 1, 0, 1], [None, 0, 0, 2, 2], [0, 2, 4], 0),  # two with one between do not
        ([0], [None], [], 1),  # without a teacher there is no student
    ],
)
def test_the_teacher_is_the_last_model_that_passed(
    monkeypatch, verdicts, taught_by, passed, rejected
):
    teachers_seen, left = [], iter(verdicts)
    monkeypatch.setattr(loop, "train_round", lambda run, index, by: teachers_seen.append(by))
    monkeypatch.setattr(loop, "label_and_judge", lambda *_: Gate(bool(next(left)), ("because",)))
    monkeypatch.setattr(loop, "deliver_model", lambda run, passed, rejected, _: (passed, rejected))
    num_rounds = 4 if verdicts[-2:] == [0, 0] or len(verdicts) == 1 else len(verdicts) - 1
    run = SimpleNamespace(num_rounds=num_rounds, plan=SimpleNamespace(device="cpu"))
    assert loop._run_rounds(run, False) == (passed, rejected)
    assert teachers_seen == taught_by


def test_a_model_of_three_steps_does_not_pass_the_gate(start, monkeypatch):
    monkeypatch.setattr(teachers, "judge_model", judge_model)
    folder = start()
    gate = read_json(folder / "round_0" / "done.json")["gate"]
    assert not gate["passed"]
    assert gate["reasons"]
    assert not (folder / "round_1").exists()
    assert read_json(folder / "state.json")["status"] == "stopped_by_gate"
    assert "delivered for want of a better one" in read_json(folder / "summary.json")["exit"]


@pytest.mark.parametrize(("num_rounds", "status"), [(1, "stopped_by_gate"), (2, "delivered")])
def test_a_run_whose_only_student_is_refused_was_stopped_by_its_gates(
    start, monkeypatch, num_rounds, status
):
    passing = iter([True, num_rounds > 1, False])
    monkeypatch.setattr(teachers, "judge_model", lambda *_: Gate(next(passing), ("because",)))
    folder = start(f"rounds={num_rounds}")
    assert read_json(folder / "state.json")["status"] == status
    summary = read_json(folder / "summary.json")
    assert summary["delivered"] == f"round_{num_rounds - 1}"
    assert "a round after it was rejected by the gates" in summary["exit"]


def test_a_stop_while_scans_are_cached_delivers_nothing_and_the_command_goes_on(start):
    folder = start("rounds=0", stop=2)
    assert not folder.exists()
    assert (folder.parent / "cache").is_dir()
    start("rounds=0")
    assert read_json(folder / "state.json")["status"] == "delivered"


def test_a_stop_while_unlabeled_scans_are_segmented_leaves_the_rest_for_later(start, tmp_path):
    class StopAtMasks:
        reason = None

        def is_set(self):
            if list(tmp_path.glob("runs/run/unlabeled_masks/*.nii.gz")):
                self.reason = "a test"
            return self.reason is not None

    folder = start("rounds=0", stop_flag=StopAtMasks(), predict_unlabeled=True)
    assert read_json(folder / "state.json")["status"] == "delivered"
    assert read_json(folder / "summary.json")["delivered"] == "round_0"
    assert len(list(folder.glob("unlabeled_masks/*.nii.gz"))) == 1
    start("rounds=0", predict_unlabeled=True)
    assert read_json(folder / "state.json")["status"] == "delivered"
    assert len(list(folder.glob("unlabeled_masks/*.nii.gz"))) == 4


def test_shares_of_a_set_without_background_are_a_distribution():
    shares = students.complete_shares([0.5115, 0.2916, 0.2])
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (shares > 0).all()


def test_what_a_kill_left_in_a_run_and_beside_it_is_removed(start, tmp_path, leave):
    runs_folder = tmp_path / "runs"
    left = [leave(runs_folder / "run" / "round_0", "a.pt"), leave(runs_folder, "salts.json")]
    other = leave(runs_folder / "other", "a.pt")
    (runs_folder / "run" / "plan.json").touch()
    start("rounds=0", stop=2)
    assert not [path for path in left if path.exists()]
    assert other.exists(), "of another run, which may be training"


def test_a_restart_that_is_refused_deletes_nothing(start):
    base, other = start("rounds=0", name="base"), start("rounds=0", "steps=5", name="other")
    before = hash_file(base / "round_0" / "model" / "weights.safetensors")
    for round_0, words in ((other, "other data, another network"), (base, "would delete it")):
        with pytest.raises(InputError, match=words):
            start("rounds=0", name="base", round_0=round_0, restart=True)
    mine = base.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="nothing was deleted"):
        start("rounds=0", name="mine", restart=True)
    assert (mine / "thesis.txt").is_file()
    assert hash_file(base / "round_0" / "model" / "weights.safetensors") == before
    stamp = (base / "run.json").stat().st_mtime_ns
    start("rounds=0", name="base", restart=True)
    assert (base / "run.json").stat().st_mtime_ns > stamp


def test_a_folder_of_another_run_is_refused_with_what_differs(start, monkeypatch):
    base = start("rounds=0", name="base")
    with pytest.raises(InputError, match=r"another run: train\.seed is 0 there and 5 here; give"):
        start("rounds=0", "seed=5", name="base")
    with monkeypatch.context() as patch:  # before its plan is shown and its scans are looked up
        patch.setattr(loop, "run_training", lambda *_, **__: pytest.fail("not refused"))
        with pytest.raises(InputError, match="seed is 0 there and 5 here; give another --run"):
            start("rounds=0", "seed=5", name="base", taken=base)
    splits = read_json(base / "splits.json")
    write_json(base / "splits.json", {**splits, "unlabeled": []})
    write_json(base / "run.json", {"hash": "of other data"})
    with pytest.raises(InputError, match="another run: its unlabeled cases are not those"):
        start("rounds=0", name="base")
    write_json(base / "splits.json", splits)
    with pytest.raises(InputError, match="scans or labels of its cases, or the version"):
        start("rounds=0", name="base")
    plan = read_json(base / "plan.json")
    write_json(base / "plan.json", {**plan, "of_a_later_version": 1})
    with pytest.raises(InputError, match=r"plan\.json: not as this version .* of_a_later_version"):
        start("rounds=0", name="base", taken=base)


def test_scans_that_look_like_ct_and_are_not_taken_for_it_are_warned_of(
    monkeypatch, tiny_plan, capsys
):
    reasons = (f"channel 0 (unknown): normalization zscore; but {LOOKS_LIKE_CT}", "device cpu")
    checked = SimpleNamespace(
        raise_problems=lambda: None, warnings=(), labels={}, facts=(), palette={}
    )
    for name, value in (
        ("check_dataset", checked), ("select_cases", ()), ("describe_origins", ""),
        ("make_plan", tiny_plan.model_copy(update={"reasons": reasons})), ("estimate_run", {}),
    ):  # fmt: skip
        monkeypatch.setattr(loop, name, lambda *_, value=value, **__: value)
    loop._make_plan(load_config().config, None, SimpleNamespace(val=()))
    assert capsys.readouterr().err.splitlines() == [f"warning: {reasons[0]}"]


def test_memory_that_does_not_suffice_is_said_with_the_way_out(start, monkeypatch):
    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")

    monkeypatch.setattr(loop, "train_round", refuse)
    with pytest.raises(InputError, match=r"out of memory; set plan\.patch_size=.* --restart"):
        start("rounds=0")


def test_labels_are_pulled_towards_volumes_corrected_on_the_labeled_cases(start, monkeypatch):
    fits = []

    def fit(pool, prior, *rest):
        fits.append({"pool": pool, "prior": prior})
        return torch.zeros(len(prior))

    true = torch.tensor([0.7, 0.2, 0.06, 0.04])
    monkeypatch.setattr(students, "fit_potentials", fit)
    monkeypatch.setattr(
        students, "_measure_shares", lambda *_: true * torch.tensor([1, 1.25, 5, 1])
    )
    monkeypatch.setattr(students, "derive_expectation", lambda _: fake_expectation(true))
    start("target.assignment=transport", "rounds=2")
    seen, later = fits
    uncorrected = torch.bincount(later["pool"].argmax(1), minlength=4) / len(later["pool"])
    assert torch.allclose(later["prior"][1:], uncorrected[1:].clamp(min=students.LEAST_SHARE))
    found = torch.bincount(seen["pool"].argmax(1), minlength=4) / len(seen["pool"])
    corrected = (found * torch.tensor([1, 1 / 1.25, 0.5, 1])).clamp(min=students.LEAST_SHARE)
    assert torch.allclose(seen["prior"][1:], corrected[1:])
    assert seen["prior"].sum().item() == pytest.approx(1, abs=1e-5)


def test_stability_is_measured_for_every_round_that_may_need_it():
    def needs(stable, rounds, index):
        case = SimpleNamespace(stable=stable)
        run = SimpleNamespace(num_rounds=rounds, config=SimpleNamespace())
        run.config.filter = SimpleNamespace(case=case)
        return students.needs_stability(run, index)

    assert [needs((0.5, 1.0), 2, index) for index in range(3)] == [True, False, False]
    assert [needs((1.0, 0.5), 2, index) for index in range(3)] == [True, True, False]
    assert not needs(1.0, 2, 0)


def test_what_a_teacher_says_where_nobody_annotated_plays_no_part(monkeypatch):
    label = np.zeros((4, 4, 4), np.uint8)
    label[0], label[2:] = 1, 255
    probs = torch.zeros(1, 3, 4, 4, 4)
    probs[:, 1, :1], probs[:, 0, 1:2], probs[:, 2, 2:] = 1, 1, 1
    case = SimpleNamespace(label=lambda: label)
    run = SimpleNamespace(labeled=(case,), plan=SimpleNamespace(num_classes=3))
    monkeypatch.setattr(students, "_predict_cases", lambda *_: iter([probs]))
    shares = students._measure_shares(run, 0)
    assert shares.tolist() == pytest.approx([0.5, 0.5, students.LEAST_SHARE], abs=1e-5)


def test_a_label_that_is_cut_while_its_scan_is_segmented_was_read_before(
    cached_cases, tiny_plan, tmp_path, monkeypatch
):
    shutil.copytree(cached_cases["l0"].label_folder, tmp_path / "label")
    case = replace(cached_cases["l0"], label_folder=tmp_path / "label")
    truth = torch.from_numpy(np.array(case.label())).long()

    def segment(*args, **options):
        os.truncate(tmp_path / "label" / "label.npy", 0)
        yield torch.nn.functional.one_hot(truth, 3).movedim(-1, 0).float()

    monkeypatch.setattr(run_of_rounds, "average_views", segment)
    names = ("background", "organ", "lesion")
    run = SimpleNamespace(val=(case,), plan=tiny_plan, class_names=names)
    (row,) = measure_validation(run, torch.nn.Identity())
    assert row["dice"] == 1.0


@pytest.mark.slow
def test_the_transition_of_a_teacher_is_measured_on_the_validation_cases(start, monkeypatch):
    seen = []
    matrix = [[0.7 if i == j else 0.1 for j in range(4)] for i in range(4)]

    def estimate(targets, labels, num_classes):
        seen.extend(zip(targets, labels, strict=True))
        return torch.tensor(matrix)

    monkeypatch.setattr(students, "estimate_transition", estimate)
    common = ["validation=1", "target.kind=hard", "target.assignment=argmax"]
    losses = "losses.pseudo_label={name: forward_ce, transition: held_out}"
    folder = start(*common, losses)
    start(*common, losses, "target.assignment=transport", name="shifted")
    (target, label), (shifted, _) = seen
    (case_id,) = read_json(folder / "splits.json")["val"]
    (path,) = (folder.parent / "cache").glob(f"**/{case_id}*/*/*/label.npy")
    assert np.array_equal(label[0].numpy(), np.load(path))
    teacher = teachers.load_model(folder / "round_0")
    image = torch.from_numpy(np.load(path.parents[1] / "image.npy").astype(np.float32))[None]
    window = Window((16, 16, 16), teacher.info.precision)
    probs = predict_probs(teacher.network, image, window)
    assert torch.equal(target.argmax(0), probs[0].argmax(0))
    assert set(target.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(target, shifted)
    given = f"losses.pseudo_label={{name: forward_ce, transition: {matrix}}}"
    same = start(*common, given, name="given")
    assert read_losses(folder, 1) == read_losses(same, 1)


def fake_expectation(shares):
    """Return an expectation with these shares, of classes that need not be there."""
    foreground = {index: float(share) for index, share in enumerate(shares) if index}
    return Expectation(presence=dict.fromkeys(foreground, 0.0), share=foreground)


def make_row(case_id, coverage, volumes, unit):
    row = {"case_id": case_id}
    for name, volume in volumes.items():
        row |= {f"{unit}/{name}": str(volume), f"coverage/{name}": str(coverage)}
    return row


@pytest.mark.parametrize("unit", ["volume_ml", "area_px"])
def test_cases_are_weighed_by_accepted_share_and_by_the_rarity_of_their_classes(unit):
    rows = [
        make_row("a", 0.5, {"liver": 9.0, "cyst": 0.0}, unit),
        make_row("b", 1.0, {"liver": 9.0, "cyst": 0.0}, unit),
        make_row("c", 1.0, {"liver": 9.0, "cyst": 1.0}, unit),
    ]
    names = ("liver", "cyst")
    section = load_config().config.filter.case
    assert weigh_cases(rows, section, names) == {"a": 1.0, "b": 1.0, "c": 1.0}
    balanced = section.model_copy(update={"balance": True})
    assert weigh_cases(rows, balanced, names) == {"a": 1.0, "b": 1.0, "c": 3.0}
    covered = section.model_copy(update={"draw": "coverage"})
    assert weigh_cases(rows, covered, names) == {"a": 0.5, "b": 1.0, "c": 1.0}


def test_a_plan_of_a_start_that_was_killed_is_not_taken_over(start, tmp_path, monkeypatch):
    real = loop.write_json

    def die(path, content):
        if path.name == "run.json":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(loop, "write_json", die)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(KeyboardInterrupt):
        start("rounds=0", taken=folder)
    assert (folder / "plan.json").is_file()
    monkeypatch.setattr(loop, "write_json", real)
    start("rounds=0", "plan.patch_size=[8,8,8]", taken=folder)
    assert read_json(folder / "plan.json")["patch_size"] == [8, 8, 8]
    assert load_config(folder / "config.yaml").config.plan.patch_size == (8, 8, 8)
    plan = read_json(folder / "plan.json")
    write_json(folder / "plan.json", {**plan, "steps": plan["steps"] + 1})
    with pytest.raises(InputError, match=r"plan\.json: not the plan that this run was begun with"):
        start("rounds=0", "plan.patch_size=[8,8,8]", taken=folder)


def test_splits_that_were_changed_stop_a_run_until_they_are_written_anew(start, tmp_path):
    folder = start("rounds=0")
    path = folder / "splits.json"
    splits = read_json(path)
    write_json(path, {**splits, "labeled": splits["labeled"] + splits["unlabeled"][:1]})
    with pytest.raises(InputError, match=r"splits\.json: not the splits .* delete it and start"):
        start("rounds=0", taken=folder)
    path.unlink()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"# the first of many\n{config}")  # a copy for people
    start("rounds=0", taken=folder)
    assert read_json(path) == splits


def test_a_restart_that_was_killed_as_it_deleted_is_made_up_for(start, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs" / "run"
    folder.symlink_to(elsewhere)
    start("rounds=0")

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "shutil", SimpleNamespace(rmtree=die))
        with pytest.raises(KeyboardInterrupt):
            start("rounds=0", "steps=4", restart=True)
    assert is_half_deleted(elsewhere)
    start("rounds=0", "steps=4", restart=True)
    assert folder.is_symlink()
    assert read_json(folder / "round_0" / "done.json")["steps"] == 4


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_weights_that_have_changed_are_not_delivered_and_come_back_from_the_checkpoint(start, how):
    folder = start("rounds=0")
    path = folder / "round_0" / "model" / "weights.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-8] + (b"" if how == "cut" else bytes([1, 2, 3, 4, 5, 6, 7, 8])))
    with pytest.raises(InputError, match=r"weights\.safetensors: changed or removed.*delete"):
        start("rounds=0")
    with pytest.raises(InputError, match=r"weights\.safetensors: not the weights"):
        load_model(folder / "round_0")
    shutil.rmtree(path.parent)
    start("rounds=0")
    assert path.read_bytes() == before
    delivered = folder / "model" / "weights.safetensors"
    delivered.write_bytes(before[:-8])
    start("rounds=0")
    assert delivered.read_bytes() == before


def test_a_pseudo_label_or_review_that_has_changed_is_not_learned_from(start):
    folder = start()
    shutil.rmtree(folder / "round_1")  # it is to be trained again
    label = next((folder / "round_0" / "pseudo_labels").iterdir())
    review = folder / "round_0" / "review.csv"
    saved = {path: path.read_bytes() for path in (review, label / "probs.npy")}
    for path, content in saved.items():
        path.write_bytes(content[:-3] + b"0.1")
        with pytest.raises(InputError, match=rf"{path if path == review else label}"):
            start()
        path.write_bytes(content)
    review.write_bytes(saved[review].rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n")
    with pytest.raises(InputError, match=r"review\.csv"):
        start()
    (folder / "round_0" / "done.json").unlink()
    (label / "probs.npy").write_bytes(b"")
    start()
    assert (label / "probs.npy").read_bytes() == saved[label / "probs.npy"]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(("stop", "status"), [(None, "delivered"), (8, "interrupted")])
def test_mlflow_gets_a_run_for_the_last_time_with_its_state_and_report(
    data, tmp_path, monkeypatch, stop_at, stop, status
):
    sent, flag = [], stop_at(stop)

    class Mirror:
        def __init__(self, folder, *_):
            self.folder = folder

        def notify(self):
            pass

        def close(self):
            page = (self.folder / "report_share.html").read_text()
            sent.append((read_json(self.folder / "state.json")["status"], "<html" in page))

    monkeypatch.setattr(loop, "Mirror", Mirror)
    monkeypatch.setattr(runs.StopFlag, "is_set", lambda _: flag.is_set())
    given = [*SETTINGS, "rounds=0", "steps=6", "tracking.uri=auto"]
    reload = lambda plan: load_config(data, given, plan)  # noqa: E731
    cli._train(load_config(data, given), reload, tmp_path / "runs" / "run")
    assert sent == [(status, True)]


def test_the_plan_of_a_run_says_that_a_label_was_made_by_a_model(tmp_path):
    write_phantoms(tmp_path, num_labeled=2, num_unlabeled=0, num_test=0, shape=(16, 16, 16))
    label, values = read_dataset(tmp_path).cases[0].label, (0, 1, 2, 3)
    write_mask(label, *read_label(label, values, None), values, origin="pseudo-mask")
    resolved = load_config(tmp_path, SETTINGS)
    prepared = loop.prepare_run(resolved, lambda plan: load_config(tmp_path, SETTINGS, plan), None)
    (reason,) = [reason for reason in prepared.plan.reasons if "made by a model" in reason]
    assert reason.startswith("1 of 2 labels")


def test_a_dry_run_ends_with_its_plan_and_fits_a_screen(data, tmp_path, capsys):
    given = [*SETTINGS, "tracking.uri=auto"]
    reload = lambda plan: load_config(data, given, plan)  # noqa: E731
    folder = tmp_path / "runs" / "run"
    cli._train(load_config(data, given), reload, folder, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert lines.index("plan:") > max(i for i, line in enumerate(lines) if "# command" in line)
    assert "3 steps" in lines[-2]
    assert lines[-1] == f"run folder: {folder}"
    assert not folder.parent.exists()


def test_a_copy_of_a_round_inside_the_run_is_none(start, tmp_path):
    folder = start("rounds=0")
    shutil.copytree(folder / "round_0", folder / "round_1_old")
    shutil.copytree(folder / "round_0", folder / "round_0 copy")
    start("rounds=0")
    assert list(read_folder(folder).done_rounds) == [0]


def test_a_full_disk_at_the_end_does_not_hide_what_came_first(start, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the first error")

    def full(*_):
        raise InputError("the disk is full")

    monkeypatch.setattr(loop, "_run_rounds", fail)
    monkeypatch.setattr(loop, "set_status", lambda home, s: s == "running" or full())
    with pytest.raises(FloatingPointError, match="the first error"):
        start("rounds=0")


class Fickle(torch.nn.Module):
    """Sees three classes voxel by voxel; its dropout is active, and hardly ever drops."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout3d(1e-6)

    def forward(self, image):
        return torch.cat([-image, 2 * image, image**2], dim=1) + 0 * self.dropout(image)


def test_what_a_teacher_and_validation_see_is_the_same_in_parts(
    cached_cases, tiny_plan, monkeypatch
):
    case, window = cached_cases["l0"], Window((8, 8, 8), flips=(0, 1))
    run = SimpleNamespace(plan=tiny_plan)
    image = run_of_rounds.load_image(case, "cpu")
    turns = [draw_turn(np.random.default_rng(7), (0,), None, case.spacing) for _ in range(2)]
    walk = partial(teachers.average_passes, [Fickle()], image, window, turns, True)

    def gather():
        whole = np.full((4, *case.shape), np.nan, np.float32)
        boxes = list(run_of_rounds.bring_slabs(run, case, walk, window, 3))
        for box, slab in boxes:
            whole[(slice(None), *box)] = slab
        return len(boxes), whole, run_of_rounds.find_classes(run, case, Fickle(), image)

    num_boxes, whole, classes = gather()
    expected = predict_probs(Fickle(), image, tiny_plan.window.plain)[0].argmax(0)
    assert np.array_equal(classes, expected.numpy())
    assert len(np.unique(classes)) > 1
    monkeypatch.setattr(predict, "SLAB_BYTES", 1)
    monkeypatch.setattr(windows, "MOST_PARTS", 3)
    more_boxes, in_parts, same = gather()
    assert more_boxes > num_boxes
    np.testing.assert_allclose(in_parts, whole, atol=1e-5)
    assert np.array_equal(same, classes)
