import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medssl.cli import app
from medssl.config import InputError
from medssl.cross_check import deal_folds, list_folds, summarize_folds
from medssl.data.cases import Case, Dataset, Splits
from medssl.data.io import write_mask
from medssl.data.phantoms import write_phantoms
from medssl.metrics import fold_difference
from medssl.report import write_report
from medssl.rounds.loop import PreparedRun
from medssl.runs import read_json
from medssl.settings import load_config

pytestmark = pytest.mark.usefixtures("brief")

QUICK = [
    *("plan.patch_size=[16,16,16]", "network.depth=3", "network.width=0.5", "plan.flips=[]"),
    *("train.batch=2", "steps=4", "rounds=1", "tracking.uri=none", "filter.uncertainty.passes=2"),
    "filter.case.confidence=0",
]


def make_cases(patients):
    return [Case(f"c{i}", (Path(f"c{i}.nii.gz"),), None, name) for i, name in enumerate(patients)]


def test_each_patient_is_held_out_once_with_all_scans():
    cases = make_cases(["a", "a", "b", "b", "c", "c", "d", "e"])
    folds = deal_folds(cases, 3, 0)
    dealt = [case_id for fold in folds for case_id in fold]
    assert sorted(dealt) == sorted(case.case_id for case in cases)
    patient = {case.case_id: case.patient_id for case in cases}
    sides = [{patient[case_id] for case_id in fold} for fold in folds]
    assert sum(map(len, sides)) == 5
    assert max(map(len, sides)) - min(map(len, sides)) <= 1
    assert folds == deal_folds(cases[::-1], 3, 0)
    assert folds != deal_folds(cases, 3, 1)


@pytest.mark.parametrize(
    ("patients", "count", "words"),
    [("aab", 3, "give 2 to 2 folds"), ("abc", 1, "give 2 to 3 folds"), ("aa", 2, "there is one")],
)
def test_folds_that_cannot_be_dealt_are_refused(patients, count, words):
    with pytest.raises(InputError, match=words):
        deal_folds(make_cases(patients), count, 0)


@pytest.mark.slow
def test_every_labeled_scan_is_measured_by_models_that_have_not_seen_it(tmp_path):
    data = tmp_path / "data"
    write_phantoms(data, num_labeled=3, num_unlabeled=2, num_test=0, shape=(24, 24, 24))
    run = tmp_path / "runs" / "first"
    command = ["train", str(data), *QUICK, "--run", str(run), "--cross-check", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (0, 3), result.output
    assert "with 3 folds" in result.output
    labeled = set(read_json(run / "splits.json")["labeled"])
    held_out = []
    for number in (1, 2, 3):
        fold = run / "cross_check" / f"fold_{number}_of_3"
        splits = read_json(fold / "splits.json")
        assert not set(splits["test"]) & {*splits["labeled"], *splits["unlabeled"]}
        assert set(splits["test"]) | set(splits["labeled"]) == labeled
        held_out += splits["test"]
    assert sorted(held_out) == sorted(labeled)
    with (run / "cross_check" / "per_case.csv").open(newline="") as file:
        assert {row["case_id"] for row in csv.DictReader(file)} == labeled
    summary = read_json(run / "cross_check" / "summary.json")
    assert summary["folds"] == 3
    students = sum(name != "round_0" for name in summary["delivered"])
    # three patients are too few to call it a gain
    assert summary["verdict"] == ("no verdict" if students else "not measured")
    page = write_report(run)[0].read_text(encoding="utf-8")
    assert ("Out of 3 folds" if students else "None of 3 folds delivered a student") in page
    before = (run / "cross_check" / "fold_2_of_3" / "metrics.jsonl").read_bytes()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == result.exit_code
    assert (run / "cross_check" / "fold_2_of_3" / "metrics.jsonl").read_bytes() == before


def test_too_many_folds_are_refused_before_anything_is_trained(tmp_path):
    data = tmp_path / "data"
    write_phantoms(data, num_labeled=2, num_unlabeled=1, num_test=0, shape=(24, 24, 24))
    command = ["train", str(data), *QUICK, "--run", str(tmp_path / "run"), "--cross-check", "3"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError)
    assert "give 2 to 2 folds" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_folds_are_not_measured_by_labels_that_a_model_made(tmp_path):
    data = tmp_path / "data"
    write_phantoms(data, num_labeled=3, num_unlabeled=1, num_test=0, shape=(24, 24, 24))
    path = sorted((data / "labels").iterdir())[1]
    label = nib.load(path)
    classes = np.asarray(label.dataobj, np.uint8)
    values = tuple(range(classes.max() + 1))
    write_mask(path, classes, label.affine, values, origin="pseudo-mask")
    command = ["train", str(data), *QUICK, "--run", str(tmp_path / "run"), "--cross-check", "3"]
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert isinstance(result.exception, InputError), result.output
    assert "1 of 3 labels are of a model, as it made them" in str(result.exception)
    assert str(path) in str(result.exception)


def test_folds_train_on_no_unlabeled_scan_of_the_patients_that_they_test(tmp_path):
    cases = [Case(f"{p}_{i}", (), None, p) for p in "abc" for i in range(2)]
    dataset = Dataset("d", tmp_path, "list", tuple(cases), None, ("",))
    splits = Splits(("a_0", "b_0", "c_0"), ("a_1", "b_1", "c_1"), (), ())
    prepared = PreparedRun(dataset, splits, None, load_config(None, []))
    for fold in list_folds(prepared, 3):
        (test,) = fold.splits.test
        assert set(fold.splits.labeled) == set(splits.labeled) - {test}
        assert set(fold.splits.unlabeled) == set(splits.unlabeled) - {f"{test[0]}_1"}


def make_rows(dice):
    return [
        {"case_id": f"c{i}", "patient_id": f"p{i}", "dice/organ": value, "reference_ml/organ": 1.0,
         "volume_ml/organ": 1.0, "hd95_mm/organ": 1.0, "surface_dice/organ": 1.0,
         "missed/organ": 0, "dice": value}
        for i, value in enumerate(dice)
    ]  # fmt: skip


FOLDS = [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_folds_that_disagree_are_no_gain_however_many_patients_they_have():
    folds = [fold for fold in (1, 2, 3) for _ in range(20)]
    after = [0.5 + {1: 0.10, 2: 0.12, 3: -0.05}[fold] for fold in folds]
    found = summarize_folds(make_rows(after), make_rows([0.5] * 60), folds, ["round_2"] * 3)
    assert found["paired"]["mean"] == pytest.approx(0.17 / 3)
    assert found["verdict"] == "no gain"
    sizes = fold_difference([1.0, 1.0, 1.0, 0.0], [0.0] * 4, list("abcd"), [1, 1, 1, 2])
    # means 1 and 0 of 3 cases and 1: the sums are 0.75 off what the mean of 0.75 lets expect
    assert sizes["high"] - sizes["mean"] == pytest.approx(12.7062 * (2 * 2 * 0.75**2) ** 0.5 / 4)
    one = fold_difference([1.0, 0.9], [0.0, 0.0], list("ab"), [1, 1])
    assert (one["mean"], one["low"], one["p"]) == (0.95, None, None)


def test_the_number_of_scans_is_that_of_the_mean_beside_it():
    rows = make_rows([0.7] * 3)
    empty = [{**row, "case_id": f"e{i}", "dice/organ": None, "dice": None, "hd95_mm/organ": None,
              "surface_dice/organ": None} for i, row in enumerate(rows)]  # fmt: skip
    alarms = [{**row, "dice/organ": 0.0, "dice": 0.0} for row in empty]
    found = summarize_folds(rows + empty, rows + alarms, [1, 2, 3] * 2, ["round_1"] * 3)
    assert found["paired"]["n"] == 6
    assert "dice 0.700 [0.700, 0.700] on 3 labeled scans" in found["statement"]


def test_the_gain_out_of_fold_is_paired_and_needs_students():
    before, after = [0.5 + 0.01 * i for i in range(9)], [0.6 + 0.012 * i for i in range(9)]
    found = summarize_folds(make_rows(after), make_rows(before), FOLDS, ["round_2"] * 3)
    assert found["paired"]["mean"] == pytest.approx(0.108)
    # folds of 0.102, 0.108 and 0.114; by the patients alone the interval would be 0.105 to 0.111
    assert found["paired"]["low"] == pytest.approx(0.108 - 4.3027 * 0.006 / 3**0.5, abs=1e-6)
    assert found["verdict"] == "gain"
    assert "3 of 3 folds delivered a student" in found["statement"]
    none = summarize_folds(make_rows(before), make_rows(before), FOLDS, ["round_0"] * 3)
    assert none["verdict"] == "not measured"
    assert "minus labels only" not in none["statement"]


def test_out_of_fold_too_classes_are_paired_before_their_mean():
    def rows(organ, lesion):
        mean = organ if lesion is None else (organ + lesion) / 2
        (row,) = make_rows([mean])
        more = {key.replace("organ", "lesion"): 1.0 for key in row if "/" in key}
        row = {**row, **more, "dice/organ": organ, "dice/lesion": lesion}
        return [{**row, "case_id": f"c{i}", "patient_id": f"p{i}"} for i in range(9)]

    found = summarize_folds(rows(0.44, None), rows(0.90, 0.0), [1] * 9, ["round_1"])
    assert found["paired"]["mean"] == pytest.approx(0.27)
    assert found["verdict"] == "no verdict"
