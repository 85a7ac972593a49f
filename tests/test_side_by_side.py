"""What `scripts/compare_methods.py phantoms` found, held against what a method may do at least."""

import csv
import math
from pathlib import Path

import pytest

from medssl.config import list_methods
from medssl.runs import Journal, write_json

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TABLE = DOCS / "methods_phantoms.csv"
SHOWN = (
    "arm",
    "draw",
    "dice",
    "to round 0",
    "to labels only, total steps",
    "steps",
    "minutes",
    "coverage",
)
UNFILTERED = "no filter of voxels: every voxel counts"
OUTSIDE = {
    (name, "is_filtered"): UNFILTERED
    for name in (
        *("bcp", "classic", "cross_pseudo", "cutmix", "mean_teacher"),
        *("otamatch", "pseudo_label", "robust", "st_plus_plus"),
    )
}
"""Why a method is outside of a bound, by method and bound."""


def read_rows(path=TABLE):
    """Return one row per arm: that of all draws, or of the last one that was run."""
    rows = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["dice"] != "not run" or row["arm"] not in rows:
                rows[row["arm"]] = row
    return rows


def is_finite(row):
    return row["finite"] == "True" and math.isfinite(float(row["dice"]))


def has_moved(row):
    return float(row["agreement"]) < 0.999


def is_filtered(row):
    return 0.01 < float(row["coverage"]) < 0.99


def holds_its_own(row):
    return float(row["to round 0"].split()[0]) >= -0.02


BOUNDS = (is_finite, has_moved, is_filtered, holds_its_own)
ELSEWHERE = ("labels_only", "default")  # the baseline; and what docs/evidence.md is about
METHODS = [name for name in list_methods() if name not in ELSEWHERE]


def mark(method, bound):
    reason = OUTSIDE.get((method, bound.__name__))
    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
    return pytest.param(method, bound, marks=marks, id=f"{method}-{bound.__name__}")


@pytest.mark.parametrize(("method", "bound"), [mark(m, b) for m in METHODS for b in BOUNDS])
def test_on_phantoms(method, bound):
    assert bound(read_rows()[method])


def test_a_method_without_a_filter_takes_every_voxel():
    rows = read_rows()
    unfiltered = [method for (method, _), reason in OUTSIDE.items() if reason == UNFILTERED]
    assert {float(rows[method]["coverage"]) for method in unfiltered} == {1.0}


@pytest.mark.parametrize("path", sorted(DOCS.glob("methods_*.csv")), ids=lambda path: path.stem)
def test_the_docs_show_every_row_of_a_table(path):
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = read_rows(path)
    assert set(METHODS) <= set(rows)
    for row in rows.values():
        assert f"| {' | '.join(row[key] for key in SHOWN)} |" in text


def write_evaluation(folder, rows):
    folder.mkdir(parents=True)
    lines = ["case_id,patient_id,dice/organ", *rows]
    (folder / "per_case.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_cases_without_a_class_and_single_patients_have_a_difference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import study

    ours = write_evaluation(tmp_path / "a", ["1,p,0.8", "2,p,", "3,p,0.7"])
    theirs = write_evaluation(tmp_path / "b", ["3,p,0.6", "2,p,", "1,p,0.6"])
    row = study.measure([ours], [theirs])
    found = row["difference"]
    assert found["mean"] == pytest.approx(0.15)
    assert found["low"] is None
    assert row["dice"]["mean"] == pytest.approx(0.75)
    study.write_table(tmp_path / "out", [{"arm": "second", "n": row["n"]}])
    assert "| second | 2 |" in (tmp_path / "out/results.md").read_text()


def test_an_interval_is_over_patients(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import study

    gains = [0.1, 0.11, -0.02, -0.03, 0.2, 0.21, 0.0, 0.01]
    widths = []
    for name, size in (("cases", 1), ("pairs", 2)):
        rows = [(i, f"p{i // size}", gain) for i, gain in enumerate(gains)]
        ours = [f"{i},{patient},{0.5 + gain}" for i, patient, gain in rows]
        theirs = [f"{i},{patient},0.5" for i, patient, _ in rows]
        folders = (
            write_evaluation(tmp_path / name / k, v) for k, v in (("a", ours), ("b", theirs))
        )
        found = study.measure(*([folder] for folder in folders))["difference"]
        widths.append(found["high"] - found["low"])
    assert widths[1] > 1.2 * widths[0]


def test_a_run_with_a_lost_step_or_without_losses_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import compare_methods

    about = {"rounds": [{"round": 1}], "total_steps": 2, "seconds": 60, "delivered": "round_1"}
    for name, metrics, is_finite in (
        ("good", {"losses/total": 0.5, "monitors/nonfinite": 0.0}, True),
        ("lost", {"losses/total": 0.5, "monitors/nonfinite": 1.0}, False),
        ("none", {"monitors/nonfinite": 0.0}, False),
    ):
        write_json(tmp_path / name / "summary.json", about)
        Journal(tmp_path / name / "metrics.jsonl").append(1, 2, metrics)
        assert compare_methods.describe(tmp_path / name)["finite"] is is_finite
