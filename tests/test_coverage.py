"""What `scripts/simulate_coverage.py` estimates and simulates."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def coverage(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import simulate_coverage

    return simulate_coverage


def test_deviations_are_those_that_gains_were_drawn_with(coverage):
    rng = np.random.default_rng(0)
    sizes = {(60, 1): 0.03, (1, 80): 0.05, (60, 80): 0.08}
    table = sum(spread * rng.standard_normal(size) for size, spread in sizes.items())
    assert coverage.estimate_deviations(table) == pytest.approx(tuple(sizes.values()), rel=0.2)


def test_a_variance_below_zero_counts_as_zero(coverage):
    table = np.array([[1.0, -1.0], [-1.0, 1.0]])  # the means of draws and patients are all alike
    assert coverage.estimate_deviations(table)[:2] == (0.0, 0.0)


def test_intervals_hold_what_nearly_always_lies_in_them_and_few_draws_are_too_few(coverage):
    row = coverage.simulate((0.05, 0.0, 0.001), 3, 20, 200)
    held = {name: int(row[name].removesuffix(" %")) for name in ("bootstrap", "t")}
    assert held["bootstrap"] < 85  # three draws that differ: the bootstrap sees too little
    assert 90 <= held["t"] <= 99


def test_gains_are_those_of_patients_over_the_better_control(coverage, tmp_path):
    lines = ["draw,arm,case_id,patient_id,dice/a,dice"]
    for arm, dice in (("labels", 0.5), ("shadow", 0.4), ("recipe", 0.7)):
        rise = 0.1 * (arm == "recipe")
        lines += [
            f"{draw},{arm},c{i},p{i // 2},{dice + rise * i},0" for draw in (0, 1) for i in range(4)
        ]
    (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    expected = np.array([[0.25, 0.45]] * 2)
    assert np.allclose(coverage.read_gains(tmp_path / "s.csv"), expected)
