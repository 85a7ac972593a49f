"""What `scripts/compare_methods.py phantoms` found, held against what a method may do at least."""

import csv
import math
from pathlib import Path

import pytest

from medssl.config import list_methods

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = DOCS / "methods_phantoms.csv"
SHOWN = ("arm", "dice", "to round 0", "to labels only, total steps", "steps", "minutes", "coverage")
UNFILTERED = "no filter of voxels: every voxel counts"
OUTSIDE = {
    (name, "is_filtered"): UNFILTERED
    for name in (
        *("bcp", "cross_pseudo", "cutmix", "default", "mean_teacher"),
        *("otamatch", "pseudo_label", "robust", "st_plus_plus"),
    )
}
"""Why a method is outside of a bound, by method and bound."""


def read_rows(path=TABLE):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def is_finite(row):
    return row["finite"] == "True" and math.isfinite(float(row["dice"]))


def has_moved(row):
    return float(row["agreement"]) < 0.999


def is_filtered(row):
    return 0.01 < float(row["coverage"]) < 0.99


def holds_its_own(row):
    return float(row["to round 0"].split()[0]) >= -0.02


BOUNDS = (is_finite, has_moved, is_filtered, holds_its_own)
METHODS = [name for name in list_methods() if name != "labels_only"]


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
