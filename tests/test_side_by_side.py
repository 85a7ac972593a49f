"""The tables of `scripts/compare_methods.py`, and how it makes them."""

import csv
from pathlib import Path

import pytest

from medssl.runs import Journal, write_json
from medssl.settings import list_methods

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
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


def read_rows(path):
    """Return one row per arm: that of all draws, or of the last one that was run."""
    rows = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["dice"] != "not run" or row["arm"] not in rows:
                rows[row["arm"]] = row
    return rows


ELSEWHERE = ("labels_only", "default")  # the baseline; and what docs/evidence.md is about
METHODS = [name for name in list_methods() if name not in ELSEWHERE]


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
    row = study.measure_arm([ours], [theirs])
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
        found = study.measure_arm(*([folder] for folder in folders))["difference"]
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
        assert compare_methods.describe_run(tmp_path / name)["finite"] is is_finite
