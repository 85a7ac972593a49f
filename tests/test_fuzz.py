"""A few of the inputs of `scripts/fuzz.py`; the script takes as many as there is time for."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("nifti", 130),
        ("pictures", 100),
        ("formats", 150),
        ("dicom", 50),
        ("settings", 60),
        pytest.param("run", 10, marks=pytest.mark.slow),
        pytest.param("run", 60, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_only_errors_of_the_input_come_of_damaged_and_odd_inputs(monkeypatch, target, count):
    monkeypatch.syspath_prepend(SCRIPTS)
    import fuzz

    fuzz.fuzz_reader(target, count, 1)
