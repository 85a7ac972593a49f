"""How often intervals over draws hold the true difference, in studies like those of this project.

    python scripts/simulate_coverage.py

What the recipe gains in a study has a part of the draw, one of the patient, and one of both
together. Their variances are estimated from the CSVs of two of them (two-way analysis of variance;
below zero counts as zero), and studies with these variances and no difference at all are
drawn: the share of the intervals that hold zero is their coverage, 95 % of which they promise. The
table goes into the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from study import format_markdown, pick_better, read_arms, subtract_arms
from write_evidence import DOCS, SETS, replace_table

from medssl import metrics

STUDIED = ("confirm_acdc_3.csv", "acdc_3.csv")
DRAWS = (3, 5, 10)
STUDIES = 1000
RESAMPLES = 400  # of each bootstrap; a thousand studies average over what they miss
SEED = 0


def main() -> None:
    """Write the table of coverage."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows = []
    for name in STUDIED:
        table = read_gains(DOCS / name)
        deviations = estimate_deviations(table)
        for draws in DRAWS:
            row = simulate(deviations, draws, table.shape[1], STUDIES)
            rows.append({"variances of": SETS[name], **row})
    replace_table(DOCS / "evidence.md", "coverage", format_markdown(rows))


def read_gains(path: Path) -> NDArray[np.float64]:
    """Return what the recipe gains over the better control, (draws, patients)."""
    arms, patients = read_arms(path)
    better = pick_better(arms)
    if better is None:
        raise ValueError(f"{path}: no draw has both the recipe and a control")
    table, cases = subtract_arms(arms["recipe"], better[1])
    gains = np.array(table, dtype=float)
    owners = np.array([patients[case] for case in cases])
    return np.stack([np.nanmean(gains[:, owners == name], 1) for name in np.unique(owners)], 1)


def estimate_deviations(table: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the standard deviations of draws, of patients, and of both together.

    Args:
        table: Gains, (draws, patients), two of each at least.

    Source: the expected mean squares of a two-way random model without repeats.
    """
    draws, patients = table.shape
    by_draw, by_patient = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - by_draw - by_patient + table.mean()
    both = float((rest**2).sum()) / ((draws - 1) * (patients - 1))
    of_draws = float(by_draw.var(ddof=1)) - both / patients
    of_patients = float(by_patient.var(ddof=1)) - both / draws
    return max(0.0, of_draws) ** 0.5, max(0.0, of_patients) ** 0.5, both**0.5


def simulate(
    deviations: Sequence[float], draws: int, patients: int, studies: int
) -> dict[str, str]:
    """Return a row: how often each interval holds the truth in simulated studies.

    Args:
        deviations: Of `estimate_deviations`.
        draws: Of each study.
        patients: Test patients of each study, the same in all of its draws.
        studies: How many are simulated.
    """
    rng = np.random.default_rng(SEED)
    sizes = ((draws, 1), (1, patients), (draws, patients))
    names = [str(number) for number in range(patients)]
    held = {"bootstrap": 0, "t": 0}
    before, metrics.NUM_RESAMPLES = metrics.NUM_RESAMPLES, RESAMPLES
    try:
        for _ in range(studies):
            parts = (d * rng.standard_normal(s) for d, s in zip(deviations, sizes, strict=True))
            result = metrics.draw_difference(sum(parts, np.zeros(1)).tolist(), names)
            assert result["t_low"] is not None
            assert result["t_high"] is not None
            held["bootstrap"] += result["low"] <= 0 <= result["high"]
            held["t"] += result["t_low"] <= 0 <= result["t_high"]
    finally:
        metrics.NUM_RESAMPLES = before
    shares = {name: f"{100 * count / studies:.0f} %" for name, count in held.items()}
    kinds = ("draws", "patients", "both together")
    spread = {f"sd of {k}": f"{d:.3f}" for k, d in zip(kinds, deviations, strict=True)}
    return {"draws": str(draws), "patients": str(patients), **spread, **shares}


if __name__ == "__main__":
    main()
