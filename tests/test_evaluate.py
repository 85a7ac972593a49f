"""Evaluation: tables, intervals, what is refused, and whose labels are opened."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from typer.testing import CliRunner

from medssl import cli, evaluate
from medssl.cli import app
from medssl.compare import compare
from medssl.config import DataSection, InputError
from medssl.costs import Costs
from medssl.data import predictions
from medssl.data.cases import Case
from medssl.data.io import read_label, write_mask
from medssl.data.layouts import read_dataset
from medssl.data.predictions import Record, read_files
from medssl.evaluate import (
    CasesLeft,
    evaluate_data,
    evaluate_model,
    evaluate_round,
    evaluate_run,
    render_summary,
    summarize_rows,
    tabulate_case,
    write_tables,
)
from medssl.metrics import Row, case_metrics, read_table
from medssl.networks.build import NetworkSpec, build_network
from medssl.predict import WEIGHTS, ModelInfo, Prediction, load_model, save_model
from medssl.transforms.preprocess import Normalization, Preprocessing

AFFINE = np.diag([-1.0, 2.0, 0.5, 1.0])
VALUES = (0, 3, 7)
NAMES = {0: "background", 1: "organ", 2: "tumor"}
COLUMNS = [
    "case_id",
    "patient_id",
    *(
        f"{metric}/{name}"
        for metric in (
            "dice",
            "hd95_mm",
            "surface_dice",
            "volume_ml",
            "reference_ml",
            "missed",
        )
        for name in ("organ", "tumor")
    ),
    "dice",
]


COSTS = Costs(1e9, 60, 0, 7)
RunMaker = Callable[..., Path]


def quiet(line: str) -> None:
    """Swallow the lines of progress."""


def draw_label(seed: int) -> NDArray[np.uint8]:
    """Draw a label (I, J, K) of class indices with an organ and a tumor in it."""
    i, j, k = np.random.default_rng(seed).integers(1, 4, 3)
    label = np.zeros((14, 12, 10), np.uint8)
    label[i : i + 8, j : j + 6, k : k + 5] = 1
    label[i + 2 : i + 4, j + 2 : j + 4, k + 2 : k + 4] = 2
    return label


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve labeled scans and one without a label; the image holds the class indices."""
    root = tmp_path / "scans"
    (root / "images").mkdir(parents=True)
    for index in range(13):
        label = draw_label(index)
        nib.save(
            nib.Nifti1Image(label.astype(np.float32), AFFINE),
            root / "images" / f"case{index:02d}.nii.gz",
        )
        if index < 12:
            write_mask(root / "labels" / f"case{index:02d}.nii.gz", label, AFFINE, VALUES)
    return root


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model that reads the mask off the image; `shift` moves what it says along I."""
    info = SimpleNamespace(label_values=VALUES, labels=NAMES, palette={}, provenance={})
    model = SimpleNamespace(info=info, shift=0, predicted=[])

    def predict(model: Any, images: tuple[Path, ...], advance: Any = int) -> Prediction:
        image = nib.load(images[0])
        mask = np.roll(image.get_fdata().astype(np.uint8), model.shift, 0)
        model.predicted.append(images[0].name)
        probs = np.eye(3, dtype=np.float32)[mask].transpose(3, 0, 1, 2)
        return Prediction(mask, image.affine, probs, None, ("spacing 9 mm",) if model.shift else ())

    monkeypatch.setattr(evaluate, "predict_case", predict)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    return model


def test_tables_and_masks_are_written_for_every_labeled_case(
    data: Path, model: Any, tmp_path: Path
) -> None:
    lines: list[str] = []
    model.shift = 1
    cases = read_dataset(data).cases
    summary = evaluate_model(model, cases, tmp_path / "out", report=lines.append)
    rows = read_table(tmp_path / "out" / "per_case.csv")
    assert [row["case_id"] for row in rows] == [f"case{i:02d}" for i in range(12)]
    assert list(rows[0]) == COLUMNS
    assert rows[0]["hd95_mm/organ"] == pytest.approx(1.0)
    assert rows[0]["reference_ml/tumor"] == pytest.approx(8 * 1.0 / 1000)
    assert rows[0]["dice/organ"] == pytest.approx(2 * (7 * 30 - 4 * 2 - 4) / (2 * 232), abs=0.02)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["num_cases"] == 12
    assert summary["dice"]["n"] == 12
    assert summary["dice"]["low"] <= summary["dice"]["mean"] <= summary["dice"]["high"]
    assert summary["surface_tolerance_mm"] == {"low": 1.0, "high": 1.0}
    assert summary["without_label"] == ["case12"]
    assert summary["flags"]["case00"] == ["spacing 9 mm"]
    assert any("independent" in note for note in summary["notes"])
    assert any("case12" in line for line in lines)
    assert lines[-1].startswith("[12/12] case11: dice 0.")
    mask, affine = read_label(tmp_path / "out" / "predictions" / "case03.nii.gz", VALUES, None)
    assert np.array_equal(mask, np.roll(draw_label(3), 1, 0))
    assert np.allclose(affine, AFFINE)


def test_a_perfect_model_scores_1_and_0(data: Path, model: Any, tmp_path: Path) -> None:
    summary = evaluate_model(model, read_dataset(data).cases, tmp_path / "out", report=quiet)
    assert summary["dice"]["mean"] == 1.0
    assert summary["classes"]["tumor"]["hd95_mm"]["mean"] == 0.0
    assert summary["num_missed"] == 0
    assert "organ" in render_summary(summary)


def test_a_slice_is_as_thick_as_its_scan_and_not_as_its_label(
    data: Path, model: Any, tmp_path: Path
) -> None:
    slice_ = draw_label(0)[:, :, 4:5]
    thick, thin = np.diag([1.0, 1.0, 8.0, 1.0]), np.eye(4)
    nib.save(nib.Nifti1Image(slice_.astype(np.float32), thick), data / "images" / "case00.nii.gz")
    write_mask(data / "labels" / "case00.nii.gz", slice_, thin, VALUES)
    evaluate_model(model, read_dataset(data).cases[:1], tmp_path / "out", report=quiet)
    (row,) = read_table(tmp_path / "out" / "per_case.csv")
    assert row["reference_ml/organ"] == row["volume_ml/organ"]
    assert row["reference_ml/organ"] == pytest.approx((slice_ == 1).sum() * 8 / 1000, abs=1e-4)


def make_case(index: int) -> Case:
    """Return a case that is a name only."""
    return Case(str(index), (), None, str(index))


def test_the_summary_counts_misses_false_alarms_and_absent_classes() -> None:
    empty, both, organ = np.zeros((3, 4, 4, 4), np.uint8)
    both[0], both[1] = 1, 2
    organ[0] = 1
    pairs = [(both, both), (organ, both), (both, organ), (organ, organ), (empty, empty)]
    rows = [
        tabulate_case(
            make_case(index), case_metrics(ours, theirs, (1.0, 1.0, 1.0), 3), {1: "a", 2: "b"}
        )
        for index, (ours, theirs) in enumerate(pairs)
    ]
    summary = summarize_rows(rows)
    b = summary["classes"]["b"]
    counts = ("num_present", "num_missed", "num_false_alarms", "num_absent")
    assert [b[key] for key in counts] == [2, 1, 1, 2]
    assert (b["dice"]["mean"], b["dice"]["n"], b["dice"]["num_dropped"]) == (1 / 3, 3, 2)
    assert b["hd95_mm"]["mean"] == pytest.approx(2 * np.sqrt(48) / 3)
    assert (summary["dice"]["mean"], summary["dice"]["n"]) == ((1 + 0.5 + 0.5 + 1) / 4, 4)
    assert summary["num_missed"] == 1
    assert rows[4]["dice"] is None
    text = render_summary(summary)
    line = next(line for line in text.splitlines() if line.startswith("b "))
    assert line.split()[-3:] == ["1", "1", "2"]  # missed, false alarms, absent
    assert max(len(line) for line in text.splitlines()) <= 100


def test_without_spacing_columns_end_in_px() -> None:
    mask = np.ones((3, 3, 3), np.uint8)
    row = tabulate_case(make_case(0), case_metrics(mask, mask, None, 2), {1: "a"}, in_mm=False)
    expected = ["hd95_px/a", "area_px/a", "reference_px/a"]
    assert [column for column in row if "_px" in column] == expected
    assert not [column for column in row if "_mm" in column or "_ml" in column]
    assert summarize_rows([row])["classes"]["a"]["hd95_px"]["mean"] == 0.0
    assert "hd95 (px)" in render_summary(summarize_rows([row]))


def test_a_table_read_back_is_the_table_written(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"case_id": "a,b", "patient_id": "a", "dice/x, y": 0.25, "missed/x, y": 0, "dice": None},
        {"case_id": "c", "patient_id": "1", "dice/x, y": None, "missed/x, y": 1, "dice": 0.5},
    ]
    write_tables(tmp_path, rows, {})
    assert read_table(tmp_path / "per_case.csv") == rows
    assert ",\n" in (tmp_path / "per_case.csv").read_text()


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "per_case.csv"
    for text in ("name,dice\na,1\n", "case_id,dice\na,high\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"per_case\.csv"):
            read_table(path)
    with pytest.raises(InputError, match=r"missing\.csv"):
        read_table(tmp_path / "missing.csv")


def test_ignored_voxels_count_in_no_metric(data: Path, model: Any, tmp_path: Path) -> None:
    label = draw_label(0)
    label[7:] = 255
    write_mask(data / "labels" / "case00.nii.gz", label, AFFINE, VALUES, ignore=9)
    case = read_dataset(data).cases[0]
    summary = evaluate_model(model, [case], tmp_path, ignore=9, report=quiet)
    assert summary["dice"]["mean"] == 1.0
    row = read_table(tmp_path / "per_case.csv")[0]
    assert row["volume_ml/organ"] == row["reference_ml/organ"]


def test_all_bad_labels_are_named_before_the_first_prediction(
    data: Path, model: Any, tmp_path: Path
) -> None:
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    labels = data / "labels"
    write_mask(labels / "case01.nii.gz", draw_label(1), moved, VALUES)
    write_mask(labels / "case02.nii.gz", draw_label(2)[1:], AFFINE, VALUES)
    write_mask(labels / "case03.nii.gz", draw_label(3), AFFINE, (0, 3, 5))
    (labels / "case04.nii.gz").write_bytes(b"no scan")
    with pytest.raises(InputError) as error:
        evaluate_model(model, read_dataset(data).cases, tmp_path / "out", report=quiet)
    text = str(error.value)
    assert "4 of 12" in text
    assert "[0, 3, 7]" in text
    assert all(f"case0{i}" in text for i in (1, 2, 3, 4))
    assert "case05" not in text
    assert "0.50 voxels" in text
    assert model.predicted == []


def mark_as_made(path: Path, seed: int) -> None:
    """Replace a label by a mask of the same voxels that a model made."""
    write_mask(path, draw_label(seed), AFFINE, VALUES, origin="prediction")


def correct_voxel(path: Path) -> None:
    """Change a voxel as a program does that keeps what it does not know of a file."""
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[0, 0, 0] = 3
    path.write_bytes(nib.Nifti1Image(array, None, image.header).to_bytes())


def test_a_label_that_a_model_made_measures_nothing_until_it_is_corrected(
    data: Path, model: Any, tmp_path: Path
) -> None:
    paths = [data / "labels" / f"case0{index}.nii" for index in (1, 4)]
    for index, path in zip((1, 4), paths, strict=True):
        path.with_suffix(".nii.gz").unlink()
        mark_as_made(path, index)
    cases = read_dataset(data).cases
    with pytest.raises(InputError, match="2 of 12 labels") as error:
        evaluate_model(model, cases, tmp_path / "out", report=quiet)
    for index, path in zip((1, 4), paths, strict=True):
        assert f"case0{index}: {path}: is a prediction of a model, as it was made" in str(
            error.value
        )
    assert "give a person's label, or take this one away" in str(error.value)
    assert model.predicted == []
    for path in paths:
        correct_voxel(path)
        assert b"made by a medssl model" in path.read_bytes()
    summary = evaluate_model(model, cases, tmp_path / "out", report=quiet)
    assert summary["num_cases"] == 12


def test_labels_whose_palette_is_not_that_of_the_training_are_refused(
    model: Any, tmp_path: Path
) -> None:
    red, green = (200, 0, 0), (0, 200, 0)
    label = Image.fromarray(np.array([[0, 3], [7, 0]], np.uint8), mode="P")
    label.putpalette([value for c in (*[(0,) * 3] * 3, red, *[(0,) * 3] * 3, green) for value in c])
    label.save(tmp_path / "a.png")
    cases = [Case("a", (tmp_path / "a.png",), tmp_path / "a.png", "a")]
    model.info.palette = {0: (0, 0, 0), 3: green, 7: red}
    with pytest.raises(InputError, match=r"value 3 is RGB \(0, 200, 0\) in the model's training"):
        evaluate_model(model, cases, tmp_path / "out", report=quiet)
    assert model.predicted == []


def test_cases_without_any_label_are_refused(data: Path, model: Any, tmp_path: Path) -> None:
    cases = [case.without_label() for case in read_dataset(data).cases]
    with pytest.raises(InputError, match="none of 13 cases"):
        evaluate_model(model, cases, tmp_path, report=quiet)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, shift: int | None = None
) -> None:
    """Let the prediction of a case fail, for the model of a shift or for all."""
    predict = evaluate.predict_case

    def fail(model: Any, images: tuple[Path, ...], **options: Any) -> Prediction:
        if name in images[0].name and shift in (None, model.shift):
            raise error
        return predict(model, images, **options)

    monkeypatch.setattr(evaluate, "predict_case", fail)


def test_an_interrupted_evaluation_leaves_no_table(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = read_dataset(data).cases
    evaluate_model(model, cases, tmp_path / "out", report=quiet)
    fail_at(monkeypatch, "case05", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, cases, tmp_path / "out", report=quiet)
    assert not (tmp_path / "out" / "per_case.csv").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_ctrl_c_is_exit_code_130_and_keeps_the_masks_of_finished_cases(
    data: Path, model: Any, make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run([0]), tmp_path / "out"
    (run / "model" / "model.json").write_text('{"channels": ["MRI"]}')
    fail_at(monkeypatch, "case06", KeyboardInterrupt())
    monkeypatch.setattr(evaluate, "forecast_costs", lambda *_, **__: COSTS)
    monkeypatch.setattr(predictions, "_FEWER", 1e9)  # the record is not written on the way
    done = CliRunner().invoke(app, ["evaluate", str(run), str(data), "--out", str(out)])
    assert done.exit_code == 130, done.output
    stopped = f"stopped: no table was written; masks of finished cases stand in {out}/predictions"
    assert stopped in done.output
    assert "9 scans, 7 windows: about 60 seconds; 1.0 GB of memory, " in done.output
    masks = [f"predictions/case{index:02d}.nii.gz" for index in (3, 4, 5)]
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("predictions/*")) == masks
    assert sorted(read_files(out)) == masks, "all of them are on the record"


def name_model(model: Any, weights: str = "a") -> None:
    """Give a model the hashes by which its predictions are known again."""
    model.device, model.info.precision = torch.device("cpu"), "float32"
    model.info.provenance = {WEIGHTS: weights}
    model.info.model_dump = lambda **_: {"labels": list(NAMES.values())}


def test_an_evaluation_goes_on_where_it_was_interrupted(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, out = read_dataset(data).cases, tmp_path / "out"
    name_model(model)
    model.shift = 1
    whole = evaluate_model(model, cases, tmp_path / "whole", report=quiet)
    with monkeypatch.context() as patch:
        fail_at(patch, "case05", KeyboardInterrupt())
        patch.setattr(Record, "write", lambda _: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(model, cases, out, report=quiet)
    with (out / "measured.jsonl").open("a") as file:
        file.write('{"of": "cut')
    model.predicted.clear()
    lines: list[str] = []
    told: list[int] = []
    monkeypatch.setattr(
        evaluate, "forecast_costs", lambda _, scans, **__: told.append(len(scans)) or COSTS
    )
    assert evaluate_model(model, cases, out, forecast=True, report=lines.append) == whole
    assert model.predicted == [f"case{index:02d}.nii.gz" for index in range(5, 12)]
    assert told == [7]
    assert any(line.startswith("passed over: 5 of 12 cases") for line in lines)
    for name in ("per_case.csv", "summary.json", "predictions/case03.nii.gz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len([name for name in read_files(out) if name.startswith("predictions/")]) == 12


def test_processes_that_share_the_cases_write_the_tables_of_one(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, out = read_dataset(data).cases, tmp_path / "out"
    name_model(model)
    model.shift = 1
    whole = evaluate_model(model, cases, tmp_path / "whole", report=quiet)
    monkeypatch.setenv("WORLD_SIZE", "3")
    dealt = []
    for place, stays in (("2", "4 of 12 cases"), ("0", "8 of 12 cases"), ("1", None)):
        monkeypatch.setenv("RANK", place)
        model.predicted.clear()
        if stays:
            with pytest.raises(CasesLeft, match=stays):
                evaluate_model(model, cases, out, report=quiet)
            assert not (out / "summary.json").exists()
        else:
            assert evaluate_model(model, cases, out, report=quiet) == whole
        dealt += model.predicted
    assert sorted(dealt) == [f"case{index:02d}.nii.gz" for index in range(12)]
    for name in ("per_case.csv", "summary.json", "predictions/case03.nii.gz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_files(out).keys() == read_files(tmp_path / "whole").keys()


@pytest.mark.parametrize("changed", ["weights", "scan", "label", "mask", "tolerance", "ignore"])
def test_a_case_of_which_anything_changed_is_measured_anew(
    data: Path, model: Any, tmp_path: Path, changed: str
) -> None:
    cases, out = read_dataset(data).cases[:2], tmp_path / "out"
    name_model(model)
    evaluate_model(model, cases, out, report=quiet)
    options: dict[str, Any] = {}
    if changed == "weights":
        name_model(model, "b")
    elif changed in ("tolerance", "ignore"):
        options = {"tolerance": 2.5} if changed == "tolerance" else {"ignore": 9}
    else:
        files = {"scan": data / "images", "label": data / "labels", "mask": out / "predictions"}
        path = files[changed] / "case01.nii.gz"
        shifted = draw_label(5).astype(np.float32)
        if changed == "scan":
            nib.save(nib.Nifti1Image(shifted, AFFINE), path)
        else:
            write_mask(path, draw_label(5), AFFINE, VALUES)
    model.predicted.clear()
    summary = evaluate_model(model, cases, out, overwrite=True, report=quiet, **options)
    again = ["case00.nii.gz", "case01.nii.gz"]
    assert model.predicted == (again if changed in ("weights", *options) else again[1:])
    assert (summary["dice"]["mean"] == 1.0) == (changed not in ("scan", "label"))
    model.predicted.clear()
    assert evaluate_model(model, cases, out, overwrite=True, report=quiet, **options) == summary
    assert model.predicted == []


def test_rounds_of_a_run_that_were_measured_are_passed_over(
    model: Any, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([2, 1, 0])
    load = evaluate.load_model

    def load_named(path: Path, device: str) -> Any:
        model = load(path, device)
        name_model(model, str(model.shift))
        return model

    calls: list[int] = []
    predict = evaluate.predict_case

    def count(model: Any, images: tuple[Path, ...], **options: Any) -> Prediction:
        calls.append(model.shift)
        return predict(model, images, **options)

    monkeypatch.setattr(evaluate, "load_model", load_named)
    monkeypatch.setattr(evaluate, "predict_case", count)
    evaluate_round(run, 1, report=quiet)
    evaluate_round(run, 2, report=quiet)
    assert calls == [1] * 9 + [0] * 9
    calls.clear()
    summary = evaluate_run(run, report=quiet)
    assert calls == [0] * 9 + [2] * 9, "the delivered model, whose masks were to be written"
    assert evaluate_run(run, report=quiet) == summary
    assert len(calls) == 18


def test_what_all_models_of_a_run_take_is_said_once(
    model: Any, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "forecast_costs", lambda *_, **__: Costs(1e9, 300, 0, 7))
    lines: list[str] = []
    evaluate_run(make_run([2, 1, 0]), forecast=True, report=lines.append)
    assert lines[0].startswith("9 scans, 21 windows: about 15 minutes; 1.0 GB of memory, ")
    assert not [line for line in lines[1:] if "windows" in line]


def test_what_a_kill_left_among_the_tables_is_removed(
    data: Path, model: Any, tmp_path: Path, leave: Callable[[Path, str], Path]
) -> None:
    out = tmp_path / "out"
    left = [leave(out, "per_case.csv"), leave(out / "predictions", "case01.nii.gz")]
    evaluate_model(model, read_dataset(data).cases, out, report=quiet)
    assert not [path for path in left if path.exists()]


def test_intervals_and_verdicts_count_patients(data: Path, model: Any, tmp_path: Path) -> None:
    cases = [
        Case(c.case_id, c.images, c.label, patient_id="p1") for c in read_dataset(data).cases[:3]
    ]
    summary = evaluate_model(model, cases, tmp_path, report=quiet)
    assert (summary["num_cases"], summary["num_patients"]) == (3, 1)
    assert summary["dice"]["low"] is None, "one patient has no spread"
    assert "3 cases of 1 patients" in render_summary(summary)
    write_tables(tmp_path / "other", read_table(tmp_path / "per_case.csv"), summary)
    _, rows = compare([tmp_path / "per_case.csv", tmp_path / "other"])
    assert rows[1]["difference"]["num_patients"] == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({3: "organ"}, "labels of the data"),
        ({3: "organ", 7: "tumor", 8: "vessel"}, "vessel"),
        ({3: "Tumor", 7: "organ"}, "'Tumor' is 3 in the data and 7 in the model"),
        ({3: "Organ", 7: "spleen"}, "7 is 'spleen' in the data and 'tumor' in the model"),
    ],
)
def test_a_label_map_other_than_the_model_s_is_refused(
    data: Path, model: Any, tmp_path: Path, labels: dict[int, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_data(
            tmp_path, data, tmp_path / "out", data=DataSection(labels=labels), report=quiet
        )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("organ", "Organ"), ("left_lung", "Left-Lung"), ("class_3", "organ"), ("organ", "Segment_1")],
)
def test_data_with_the_model_s_label_map_is_evaluated(
    data: Path, model: Any, tmp_path: Path, ours: str, theirs: str
) -> None:
    model.info.labels = {0: "background", 1: ours, 2: "tumor"}
    labels = {3: theirs, 7: "tumor"}
    summary = evaluate_data(
        tmp_path, data, tmp_path / "out", data=DataSection(labels=labels), report=quiet
    )
    assert summary["num_cases"] == 12
    assert summary["dataset"] == "scans"
    assert summary["trained_on"] == []


@pytest.mark.parametrize(("degrees", "is_refused"), [(30, True), (0.4, False)])
def test_scans_whose_axes_are_not_at_right_angles_are_refused(
    data: Path, model: Any, tmp_path: Path, degrees: float, is_refused: bool
) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 0.5 * np.tan(np.radians(degrees))
    for path in data.glob("*/case03.nii.gz"):
        array = np.asarray(nib.load(path).dataobj)
        nib.save(nib.Nifti1Image(array, affine), path)
    cases = read_dataset(data).cases[3:4]
    if is_refused:
        with pytest.raises(InputError, match=r"case03: .* 30\.0 degrees off .*resample_to_output"):
            evaluate_model(model, cases, tmp_path / "out", report=quiet)
    else:
        assert evaluate_model(model, cases, tmp_path / "out", report=quiet)["num_cases"] == 1


@pytest.fixture
def make_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunMaker:
    """Make a run folder whose rounds shift their masks by `shifts`, the last one delivered."""

    def make(shifts: list[int], num_test: int = 9) -> Path:
        run = tmp_path / "run"
        for index, shift in enumerate(shifts):
            for folder in (run / f"round_{index}", run):  # the last round is what is delivered
                (folder / "model").mkdir(parents=True, exist_ok=True)
                (folder / "model" / "weights.safetensors").write_text(f"{index} {shift}")
            (run / f"round_{index}" / "done.json").write_text("{}")
        ids = [f"case{i:02d}" for i in range(13)]
        splits = {
            "labeled": ids[:1],
            "val": ids[1:2],
            "unlabeled": [*ids[2 : 12 - num_test], ids[12]],
            "test": ids[12 - num_test : 12],
            "dataset": {"name": "scans", "root": str(data), "num_cases": 13},
        }
        (run / "splits.json").write_text(json.dumps(splits))
        (run / "config.yaml").write_text("data:\n  labels: {3: organ, 7: tumor}\n")
        summary = {"delivered": f"round_{len(shifts) - 1}", "baseline": {"round": 0, "steps": 60}}
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "state.json").write_text('{"status": "delivered", "round": 1, "step": 1}')
        return run

    def load(path: Path, device: str) -> SimpleNamespace:
        shift = int((path / "model" / "weights.safetensors").read_text().split()[1])
        loaded.append(path)
        info = SimpleNamespace(label_values=VALUES, labels=NAMES, palette={}, provenance={})
        return SimpleNamespace(info=info, shift=shift, predicted=[])

    loaded: list[Path] = []
    monkeypatch.setattr(evaluate, "load_model", load)
    return make


def test_a_run_is_evaluated_on_its_test_cases_round_by_round(
    model: Any, make_run: RunMaker
) -> None:
    run = make_run([2, 1, 0])
    summary = evaluate_run(run, report=quiet)
    assert summary["delivered"] == "round_2"
    assert list(summary["rounds"]) == ["round_0", "round_1", "round_2"]
    assert summary["rounds"]["round_2"] == 1.0
    assert summary["rounds"]["round_0"] < summary["rounds"]["round_1"] < 1.0
    assert summary["paired"]["mean"] == pytest.approx(1.0 - summary["rounds"]["round_0"])
    assert (summary["paired"]["n"], summary["verdict"]) == (9, "gain")
    assert summary["statement"].startswith("gain: dice of the delivered model (round_2) minus")
    assert "60 steps" in summary["statement"]
    assert summary["statement"] in render_summary(summary)
    assert json.loads((run / "evaluation" / "summary.json").read_text()) == summary
    for name in ("round_0", "round_1", "round_2"):
        rows = read_table(run / "evaluation" / name / "per_case.csv")
        assert [row["case_id"] for row in rows] == [f"case{i:02d}" for i in range(3, 12)]
        content = json.loads((run / "evaluation" / name / "summary.json").read_text())
        assert content["dice"]["mean"] == summary["rounds"][name]
        assert "verdict" not in content
        assert not (run / "evaluation" / name / "predictions").exists()
    assert len(list((run / "evaluation" / "predictions").iterdir())) == 9


@pytest.mark.parametrize("measure", [evaluate_run, partial(evaluate_round, index=0)])
def test_a_run_is_not_measured_by_test_labels_that_a_model_made(
    data: Path, model: Any, make_run: RunMaker, measure: Callable[..., object]
) -> None:
    run = make_run([1, 0])
    mark_as_made(data / "labels" / "case05.nii.gz", 5)
    with pytest.raises(InputError, match=r"case05: .*case05\.nii\.gz: is a prediction of a model"):
        measure(run, report=quiet)
    assert not (run / "evaluation").exists()


def test_the_delivered_model_is_predicted_once_where_it_is_a_round(
    model: Any, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([1, 0])
    calls: list[tuple[Path, ...]] = []
    predict = evaluate.predict_case

    def count(model: Any, images: tuple[Path, ...], **options: Any) -> Prediction:
        calls.append(images)
        return predict(model, images, **options)

    monkeypatch.setattr(evaluate, "predict_case", count)
    evaluate_run(run, report=quiet)
    assert len(calls) == 2 * 9
    tables = [run / "evaluation" / name / "per_case.csv" for name in (".", "round_1")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.parametrize(
    ("shifts", "num_test", "verdict"),
    [
        ([0, 1], 9, "no gain"),
        ([1, 1], 9, "no gain"),
        ([2, 0], 7, "no verdict"),
        ([0], 9, "not measured"),
    ],
)
def test_the_verdict_is_not_comfortable(
    model: Any, make_run: RunMaker, shifts: list[int], num_test: int, verdict: str
) -> None:
    summary = evaluate_run(make_run(shifts, num_test), report=quiet)
    assert summary["verdict"] == verdict
    assert summary["statement"].startswith(verdict)
    if num_test < 8:
        assert summary["paired"]["mean"] > 0
        assert "on 7 test cases, a verdict needs 8" in summary["statement"]


def test_a_run_without_test_cases_or_model_is_refused(model: Any, make_run: RunMaker) -> None:
    run = make_run([0, 0])
    (run / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json"):
        evaluate_run(run, report=quiet)
    splits = json.loads((run / "splits.json").read_text())
    (run / "splits.json").write_text(json.dumps({**splits, "test": []}))
    with pytest.raises(InputError, match="no test cases"):
        evaluate_run(run, report=quiet)
    with pytest.raises(InputError, match="is no run, and only a run has test cases of its own"):
        evaluate_run(run / "round_0", report=quiet)
    (run / "splits.json").write_text(json.dumps({"labeled": []}))
    with pytest.raises(InputError, match=r"splits\.json: damaged, or of another version"):
        evaluate_run(run, report=quiet)


def test_a_round_is_measured_alone_as_among_the_others(model: Any, make_run: RunMaker) -> None:
    run = make_run([2, 1, 0])
    evaluate_run(run, report=quiet)
    tables = {path: path.read_bytes() for path in run.glob("evaluation/**/per_case.csv")}
    table = run / "evaluation" / "round_1" / "per_case.csv"
    table.unlink()
    (run / "run.json").write_text("{}")
    for given in ((run, None, "1"), (run / "round_1", None, None)):
        assert cli._resolve_round(*given) == (run, 1)
    summary = evaluate.evaluate_round(run, 1, report=quiet)
    assert (summary["num_cases"], summary["model"]) == (9, str(run / "round_1"))
    assert {path: path.read_bytes() for path in tables} == tables


def test_a_run_that_is_not_finished_is_measured_with_a_remark(
    model: Any, make_run: RunMaker
) -> None:
    run = make_run([0])
    (run / "state.json").write_text('{"status": "interrupted", "round": 1, "step": 1}')
    lines: list[str] = []
    summary = evaluate_run(run, report=lines.append)
    assert any("the run is not finished" in line for line in lines)
    assert summary["statement"] == "not measured: no round after round_0 is done"


def test_cases_that_a_run_was_trained_on_are_left_out_and_their_labels_unopened(
    data: Path, model: Any, make_run: RunMaker, tmp_path: Path
) -> None:
    run = make_run([0, 0])
    for index in range(3):  # labeled, validation, simulated-unlabeled
        (data / "labels" / f"case{index:02d}.nii.gz").write_bytes(b"poison")
    lines: list[str] = []
    for path in (run, run / "round_1", run / "model"):
        if path.name == "model":
            (path / "model").mkdir()
            (path / "model" / "weights.safetensors").write_text("0 0")
        summary = evaluate_data(path, data, tmp_path / path.name / "out", report=lines.append)
        assert summary["trained_on"] == ["case00", "case01", "case02", "case12"]
        assert summary["num_cases"] == 9
    assert any("4 cases are left out: the run was trained on them" in line for line in lines)


def test_another_file_of_a_trained_case_s_name_is_remarked(
    data: Path, model: Any, make_run: RunMaker, tmp_path: Path
) -> None:
    run = make_run([0, 0])
    copy = tmp_path / "copy"
    copy.symlink_to(data)
    assert len(evaluate_data(run, copy, tmp_path / "out", report=quiet)["trained_on"]) == 4
    copy.unlink()
    data.rename(copy)
    summary = evaluate_data(run, copy, tmp_path / "later", report=quiet)
    assert summary["num_cases"] == 12
    assert "if they are the same scans or the same people, this is no test" in summary["remarks"][0]


def test_data_that_was_wholly_trained_on_is_refused(
    data: Path, model: Any, make_run: RunMaker, tmp_path: Path
) -> None:
    run = make_run([0, 0])
    splits = json.loads((run / "splits.json").read_text())
    splits["labeled"], splits["test"] = splits["labeled"] + splits["test"], []
    (run / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match="none of 13 cases is labeled and new to the model"):
        evaluate_data(run, data, tmp_path / "out", report=quiet)


def test_a_real_model_folder_is_evaluated_end_to_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = NetworkSpec(
        in_channels=1,
        num_classes=3,
        filters=(4, 8, 8),
        kernels=((3, 3, 3),) * 3,
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    )
    torch.manual_seed(0)
    recipe = Preprocessing(spacing=(1.0, 1.0, 1.0), normalization=(Normalization(kind="zscore"),))
    info = ModelInfo(
        network=spec,
        labels=NAMES,
        label_values=VALUES,
        channels=("MRI",),
        preprocessing=recipe,
        patch_size=(16, 16, 16),
        flips=(),
        precision="float32",
    )
    save_model(tmp_path / "model", build_network(spec), info)
    out = tmp_path / "out"
    bars: list[Any] = []

    def show(num_windows: int) -> Any:
        bars.append(tqdm(total=num_windows, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(evaluate, "show_bar", show)
    lines: list[str] = []
    summary = evaluate_data(tmp_path / "model", data, out, forecast=True, report=lines.append)
    assert bars[0].n == bars[0].total > 12
    assert any(line.startswith(f"12 scans, {bars[0].n} windows: about ") for line in lines)
    assert summary["num_cases"] == 12
    assert "lies in no run" in summary["remarks"][0]
    values = {int(v) for v in np.unique(nib.load(out / "predictions/case00.nii.gz").dataobj)}
    assert values <= set(VALUES)
    model = load_model(tmp_path / "model")
    rows = read_table(out / "per_case.csv")
    prediction = evaluate.predict_case(model, (data / "images" / "case00.nii.gz",)).mask
    expected = case_metrics(prediction, draw_label(0), (1.0, 2.0, 0.5), 3)
    assert rows[0]["dice/organ"] == pytest.approx(expected[1].dice, rel=1e-5)
    assert rows[0]["hd95_mm/organ"] == pytest.approx(expected[1].hd95_mm, rel=1e-5)


@pytest.mark.parametrize(
    "error", [InputError("damaged"), FloatingPointError("not finite"), ZeroDivisionError("odd")]
)
def test_a_case_that_fails_is_named_and_the_figures_of_the_others_stand(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_at(monkeypatch, "case05", error)
    lines: list[str] = []
    summary = evaluate_model(model, read_dataset(data).cases, tmp_path / "out", report=lines.append)
    assert summary["failed"] == ["case05"]
    assert (summary["num_cases"], summary["dice"]["mean"]) == (11, 1.0)
    assert len(read_table(tmp_path / "out" / "per_case.csv")) == 11
    assert any("case05: not measured" in line and str(error) in line for line in lines)
    assert "not measured, and in no figure: 1 cases: case05" in render_summary(summary)
    assert str(error) not in (tmp_path / "out" / "summary.json").read_text()  # may hold names


def test_an_evaluation_of_which_every_case_fails_is_an_error(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "case", InputError("damaged"))
    with pytest.raises(InputError, match="none of 12 cases could be measured"):
        evaluate_model(model, read_dataset(data).cases, tmp_path / "out", report=quiet)


def test_a_case_that_fails_is_in_no_round_of_a_comparison(
    data: Path, model: Any, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([1, 0])
    fail_at(monkeypatch, "case05", InputError("damaged"), shift=1)  # round 0 alone
    summary = evaluate_run(run, report=quiet)
    assert summary["num_cases"] == 9
    assert summary["paired"]["n"] == 8
    assert "1 more that some round could not segment are left out" in summary["statement"]


@pytest.mark.parametrize("name", ["summary.json", "per_case.csv", "predictions/case03.nii.gz"])
def test_a_folder_with_files_of_somebody_is_not_evaluated_into(
    data: Path, model: Any, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("made by hand")
    cases = read_dataset(data).cases
    with pytest.raises(InputError, match=rf"{Path(name).name}.*--overwrite"):
        evaluate_model(model, cases, tmp_path / "out", report=quiet)
    assert path.read_text() == "made by hand"
    assert model.predicted == []
    evaluate_model(model, cases, tmp_path / "out", overwrite=True, report=quiet)
    evaluate_model(model, cases, tmp_path / "out", report=quiet)


@pytest.mark.parametrize(("key", "folder"), [("dataset", "others"), ("model", "scans")])
def test_tables_of_another_model_or_of_other_data_are_not_replaced_unasked(
    data: Path, model: Any, tmp_path: Path, key: str, folder: str
) -> None:
    shutil.copytree(data, tmp_path / "others")
    for image in (tmp_path / "others" / "images").iterdir():
        image.rename(image.with_name(f"x{image.name}"))
    for label in (tmp_path / "others" / "labels").iterdir():
        label.rename(label.with_name(f"x{label.name}"))
    again = tmp_path / ("one" if key == "dataset" else "two")
    out = tmp_path / "out"
    evaluate_data(tmp_path / "one", data, out, report=quiet)
    evaluate_data(tmp_path / "one", data, out, report=quiet)
    before = (out / "per_case.csv").read_bytes()
    with pytest.raises(InputError, match=r"another model or other data.*--overwrite"):
        evaluate_data(again, tmp_path / folder, out, report=quiet)
    assert (out / "per_case.csv").read_bytes() == before
    summary = evaluate_data(again, tmp_path / folder, out, overwrite=True, report=quiet)
    assert summary[key] in (str(again), folder)


def test_a_corrected_mask_of_a_run_s_evaluation_is_kept(model: Any, make_run: RunMaker) -> None:
    run = make_run([1, 0])
    evaluate_run(run, report=quiet)
    evaluate_run(run, report=quiet)
    corrected = run / "evaluation" / "predictions" / "case05.nii.gz"
    corrected.write_bytes(b"corrected by a person")
    with pytest.raises(InputError, match=r"changed after it: predictions/case05\.nii\.gz"):
        evaluate_run(run, report=quiet)
    assert corrected.read_bytes() == b"corrected by a person"
    evaluate_run(run, overwrite=True, report=quiet)


def test_rounds_are_paired_class_by_class_before_the_mean() -> None:
    def rows(organ: float, tumor: float | None) -> list[Row]:
        dice = organ if tumor is None else (organ + tumor) / 2
        cells: Row = {"dice/organ": organ, "dice/tumor": tumor, "dice": dice}
        return [{"case_id": f"c{i}", "patient_id": f"p{i}", **cells} for i in range(10)]

    tables = {"round_0": rows(0.90, 0.0), "round_1": rows(0.44, None), "model": rows(0.44, None)}
    found = evaluate._compare_to_baseline({"delivered": "round_1"}, tables)
    assert found["paired"]["mean"] == pytest.approx(0.27)
    assert found["rounds"]["round_1"] - found["rounds"]["round_0"] == pytest.approx(0.27)
    assert found["verdict"] == "gain"


@pytest.mark.parametrize("source", [True, False])
def test_a_run_of_a_list_of_any_name_is_evaluated_on_its_test_cases(
    data: Path, model: Any, make_run: RunMaker, source: bool
) -> None:
    run = make_run([1, 0])
    ids = [f"case{i:02d}" for i in range(12)]
    rows = [f"{i},images/{i}.nii.gz,labels/{i}.nii.gz" for i in ids]
    text = ["case_id,image,label", *rows, "case12,images/case12.nii.gz,"]
    (data / "my draft.csv").write_text("\n".join(text) + "\n")
    (data / "labels").rename(data / "masks")
    (data / "my draft.csv").write_text("\n".join(text).replace("labels/", "masks/") + "\n")
    splits = json.loads((run / "splits.json").read_text())
    if source:
        splits["dataset"]["source"] = str(data / "my draft.csv")
    else:  # of version 0.1.0: config.yaml alone names the list
        config = "data:\n  root: scans/my draft.csv\n  labels: {3: organ, 7: tumor}\n"
        (run / "config.yaml").write_text(config)
    (run / "splits.json").write_text(json.dumps(splits))
    assert evaluate_run(run, report=quiet)["num_cases"] == 9
    summary = evaluate_data(run, data / "my draft.csv", data.parent / "out", report=quiet)
    assert summary["trained_on"] == ["case00", "case01", "case02", "case12"]


def list_folders(event: str, arguments: tuple[Any, ...]) -> None:
    """Note the folders that are listed during a test: an audit hook, which nothing can remove."""
    if event in ("os.scandir", "os.listdir") and _listed is not None:
        _listed.append(os.fsdecode(arguments[0] or "."))


_listed: list[str] | None = None
sys.addaudithook(list_folders)


def test_a_list_is_read_without_a_look_at_what_lies_beside_it_and_nothing_is_written(
    data: Path, model: Any, make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global _listed
    run = make_run([1, 0])
    rows = [f"case{i:02d},scans/images/case{i:02d}.nii.gz" for i in range(13)]
    rows = [f"{row},{row[7:].replace('images', 'labels')}" for row in rows[:12]] + [f"{rows[12]},"]
    (tmp_path / "draft.csv").write_text("\n".join(["case_id,image,label", *rows]))
    splits = json.loads((run / "splits.json").read_text())
    splits["dataset"] |= {"root": str(tmp_path), "source": str(tmp_path / "draft.csv")}
    (run / "splits.json").write_text(json.dumps(splits))
    for name in ("archive/old", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    _listed = []
    try:
        assert evaluate_run(run, report=quiet)["num_cases"] == 9
        evaluate_data(run, tmp_path / "draft.csv", tmp_path / "out", report=quiet)
        assert str(run / "round_1") in _listed or str(run) in _listed, "nothing was noted"
        assert not [path for path in _listed if "archive" in path or path == str(tmp_path)]
    finally:
        _listed = None
    (data / "images").rename(data / "scans")
    for given in ([run, data, "--out", tmp_path / "new"], [data], [run, tmp_path / "here"]):
        result = CliRunner().invoke(app, ["evaluate", *map(str, given)])
        assert isinstance(result.exception, InputError), result.output
    assert list((tmp_path / "here").iterdir()) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["", "[]", "5", "null", '{"delivered": "round_', "{}"])
@pytest.mark.parametrize("name", ["summary.json", "splits.json"])
def test_any_damaged_file_of_a_run_is_an_error_of_the_input(
    model: Any, make_run: RunMaker, name: str, content: str
) -> None:
    run = make_run([1, 0])
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        evaluate_run(run, report=quiet)


def test_the_folder_of_the_tables_is_said(
    data: Path, make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([1, 0])
    (run / "model" / "model.json").write_text('{"channels": ["MRI"]}')
    monkeypatch.setattr(evaluate, "evaluate_data", lambda *_, **__: {})
    monkeypatch.setattr(evaluate, "render_summary", lambda _: "0.8")
    done = CliRunner().invoke(app, ["evaluate", str(run), str(data), "--out", str(tmp_path / "x")])
    assert done.output == f"0.8\ntables: {tmp_path / 'x'}\n"


MISTAKES = [
    ("evaluate RUN --out x", "--out is for other scans"),
    ("evaluate RUN --round 7", "round 7 is not done; done are: 0, 1"),
    ("evaluate RUN --round last", "give a number"),
    ("evaluate RUN DATA", "--out is missing"),
    ("evaluate RUN DATA steps=3 --out x", "only data.KEY=VALUE"),
    ("evaluate RUN DATA data.lables.1=x --out x", "lables"),
    ("evaluate RUN DATA/nothing --out x", "no such file or folder"),
    ("evaluate RUN DATA --out RUN/out", "name a new folder"),
    ("evaluate RUN --device gpu", "device gpu: give auto"),
    ("evaluate DATA", "is no run"),
    ("evaluate nothing DATA --out x", "no such run or model folder"),
    ("predict RUN DATA/nothing --out x", "no such file or folder"),
    ("predict DATA DATA --out x", "holds no model"),
    ("predict RUN DATA/images --out DATA/images", "overwrite its own scan"),
    ("predict RUN DATA/images --out DATA/labels", "12 files that no prediction wrote"),
    ("train DATA --dry-run --cross-check 1", "give 2 to 12 folds"),
    ("train DATA --dry-run --round-0 DATA", "no finished round 0"),
    ("train DATA --dry-run train.device=gpu", "device gpu: give auto"),
    ("compare RUN DATA", "has not been evaluated"),
    ("report DATA", "is no run folder"),
]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train DATA --run new/run", "--run"),
        ("predict RUN DATA/images --out new", "--out"),
        ("evaluate RUN DATA --out new", "--out"),
    ],
)
def test_a_read_only_place_is_refused_before_anything_is_computed(
    data: Path, make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    run = make_run([1, 0])
    (run / "model" / "model.json").write_text('{"channels": ["MRI"]}')
    monkeypatch.chdir(data.parent)
    monkeypatch.setattr("medssl.runs.os.access", lambda path, mode: path != data.parent)
    words = command.replace("RUN", str(run)).replace("DATA", str(data)).split()
    with pytest.raises(InputError, match=rf"is read-only; name another folder by {option}$"):
        app(words, standalone_mode=False)
    assert not (data.parent / "new").exists()


ANSWER = """
import sys
from medssl.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["medssl", *line.split("\\t")]
    try:
        main()
    except SystemExit as end:
        loaded = sorted({"torch", "monai", "mlflow"} & set(sys.modules))
        print("ended with", end.code, loaded, file=sys.stderr, flush=True)
"""


def test_mistakes_are_answered_before_torch_is_imported(data: Path, make_run: RunMaker) -> None:
    run = make_run([1, 0])
    (run / "run.json").write_text("{}")
    (run / "model" / "model.json").write_text('{"channels": ["MRI"]}')
    lines = [
        text.replace(" ", "\t").replace("RUN", str(run)).replace("DATA", str(data))
        for text, _ in MISTAKES
    ]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=data.parent,
        check=True,
    )
    answers = re.split(r"ended with (.*)\n", done.stderr)
    assert len(answers) == 2 * len(MISTAKES) + 1, done.stderr
    for (text, words), said, end in zip(MISTAKES, answers[::2], answers[1::2], strict=False):
        assert words in said, (text, said)
        assert end == "2 []", text
