"""What `scripts/compare_methods.py phantoms` found, held against what a method may do at least."""

import csv
import math
from pathlib import Path

import pytest

from medssl.config import list_methods

TABLE = Path(__file__).resolve().parents[1] / "docs" / "methods_phantoms.csv"
UNFILTERED = "no filter of voxels: every voxel counts"
OUTSIDE: dict[tuple[str, str], str] = {}
"""Why a method is outside of a bound, by method and bound."""


def read_rows():
    with TABLE.open(encoding="utf-8", newline="") as file:
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


def list_checks():
    for method in METHODS:
        for bound in BOUNDS:
            reason = OUTSIDE.get((method, bound.__name__))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            yield pytest.param(method, bound, marks=marks, id=f"{method}-{bound.__name__}")


@pytest.mark.parametrize(("method", "bound"), list_checks())
def test_on_phantoms(method, bound):
    assert bound(read_rows()[method])
