"""How much of its Dice a model keeps when scans get worse, against labels alone.

    python scripts/measure_robustness.py RUNS --csv CSV --draws 0,1,2 --arms labels,recipe
    python scripts/measure_robustness.py RUNS --csv CSV --table

RUNS is the --out of scripts/study.py, which holds draw_0_labels and so on. The delivered model of
each is measured on the test cases of its run as `medssl evaluate` does it. Per case the CSV has

    clean             Dice, and the expected calibration error (ece) in and around the structures
    motion, ghosting, spike, bias_field, noise, blur, low_resolution, contrast
                      both, of the scan with an artefact in severities 1 to 5 (the extra `robust`)
    fgsm              both, under an attack in three strengths by the gradient of the model itself
    rotation, shift   the share of voxels that flip between neighboring frames of a small movement

and what stands there is not measured again. A process has one thread; several may work on one CSV,
each on draws or arms of its own. The corruption error (CE) of an artefact is 1 - Dice, summed over
severities, cases and draws, as a multiple of that of --against; mCE is the mean over artefacts. The
relative mCE takes what is lost from the clean scan in place of 1 - Dice, summed over the artefacts
too, the mean flip rate (mFR) what flips. What only one of two arms has does not count; an n/a is as
of `medssl compare`.

Source: Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions
    and Perturbations. Departures: Dice has the place of their error, and voxels that of images;
    their relative mCE is a mean of ratios, of which one may have a loss near zero below.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from robustness.artefacts import SEVERITIES, STRENGTHS, corrupt_scan
from robustness.measures import (
    EPSILONS,
    MOVEMENTS,
    find_attack,
    follow_frames,
    measure_calibration,
    measure_flips,
)
from study import (
    deal_arms,
    explain_mistakes,
    find_run,
    format_difference,
    format_markdown,
    make_measuring_parser,
    read_rows,
    refuse_missing,
    split_names,
    spread,
    write_csv,
)
from torch import Tensor

from medssl import metrics
from medssl.data.cases import Case
from medssl.data.io import read_image, read_label
from medssl.data.trained import open_test_cases
from medssl.evaluate import tabulate_case
from medssl.metrics import case_metrics, compare_cases, draw_difference
from medssl.predict import (
    Model,
    Prediction,
    PreparedScan,
    load_model,
    predict_case,
    prepare_volume,
)
from medssl.runs import hold_lock
from medssl.transforms.geometry import Volume, grid_spacing
from medssl.transforms.preprocess import preprocess_label

CHANGES: dict[str, Sequence[int]] = {
    "clean": (0,),
    **dict.fromkeys(STRENGTHS, SEVERITIES),
    "fgsm": range(1, len(EPSILONS) + 1),
    **dict.fromkeys(MOVEMENTS, (0,)),
}
"""What is done to a scan, and in which severities."""

Row = dict[str, Any]

Table = NDArray[np.float64]
"""Values (side, draw, case) of our arm and of the one that it is held against; NaN: n/a."""


class Change(NamedTuple):
    """One thing that is done to a scan."""

    name: str
    severity: int


CLEAN = Change("clean", 0)


def run_arm(
    runs: Path, path: Path, draw: int, arm: str, names: Sequence[str], num_cases: int | None
) -> None:
    """Measure an arm of a draw case by case, but for what stands in the CSV.

    Raises:
        InputError: There is no such run, it has delivered no model, or it has no test cases.
    """
    folder = find_run(runs, draw, arm)
    model = load_model(folder)
    _, ignore, cases, _ = open_test_cases(folder, print)
    for case in spread(cases, num_cases):
        ids = {"draw": str(draw), "arm": arm}
        ids |= {"case_id": case.case_id, "patient_id": case.patient_id}
        done = find_changes(path, ids)
        changes = [Change(name, severity) for name in names for severity in CHANGES[name]]
        if left := [change for change in changes if change not in done]:
            print(f"{folder}: {case.case_id}", flush=True)
            measured = measure_case(model, case, ignore, left)
            rows = {change: {**ids, **row} for change, row in zip(left, measured, strict=True)}
            with hold_lock(path.with_suffix(".lock")):
                done = find_changes(path, ids)
                added = [row for change, row in rows.items() if change not in done]
                write_csv(path, [*read_rows(path), *added])


def find_changes(path: Path, ids: Mapping[str, str]) -> set[Change]:
    """Return what the CSV has of a case."""
    return {read_change(row) for row in read_rows(path) if ids.items() <= row.items()}


def read_change(row: Mapping[str, str]) -> Change:
    """Return what a row of the CSV is about."""
    return Change(row["change"], int(row["severity"]))


def measure_case(
    model: Model, case: Case, ignore: int | None, changes: Sequence[Change]
) -> Iterator[Row]:
    """Yield a row for each change of a test case: flips, or calibration and Dice.

    Args:
        model: The model.
        case: With its label.
        ignore: Label value that means: not annotated.
        changes: What is done to the scan.

    Raises:
        InputError: The scan or its label cannot be read, or torchio is not installed.
    """
    info = model.info
    assert case.label is not None, "cases without a label were left out"
    label, affine = read_label(case.label, info.label_values, ignore, case)
    names = {index: name for index, name in info.labels.items() if index}
    volume = read_image(case.images, len(info.channels))

    def prepare(scan: Volume) -> PreparedScan:
        return prepare_volume(info, replace(scan, array=scan.array.copy()))

    @functools.cache
    def prepare_attack() -> tuple[PreparedScan, Tensor]:
        clean = prepare(volume)
        i, j, k = clean.image.shape[2:]
        target = preprocess_label(label, affine, (i, j, k), clean.affine)
        return clean, find_attack(model, clean.image, target) * clean.image.std()

    def prepare_changed(name: str, severity: int) -> PreparedScan:
        if name == "fgsm":
            clean, step = prepare_attack()
            return replace(clean, image=clean.image + EPSILONS[severity - 1] * step)
        is_clean = (name, severity) == CLEAN
        return prepare(volume if is_clean else corrupt_scan(volume, case.case_id, name, severity))

    with tempfile.TemporaryDirectory() as scratch:

        def predict(scan: PreparedScan) -> Prediction:
            return predict_case(model, case.images, probs_in=Path(scratch), scan=scan)

        for name, severity in changes:
            row: Row = {"change": name, "severity": severity, "flips": None, "ece": None}
            row |= dict.fromkeys([*(f"dice/{name}" for name in names.values()), "dice"])
            if name in MOVEMENTS:
                masks = follow_frames(lambda scan: predict(prepare(scan)), volume, name)
                row["flips"] = measure_flips(masks)
            else:
                prediction = predict(prepare_changed(name, severity))
                assert prediction.probs is not None, "asked for"
                row["ece"] = measure_calibration(prediction.probs, label)
                measured = case_metrics(
                    prediction.mask, label, grid_spacing(affine), len(info.labels)
                )
                row |= {k: v for k, v in tabulate_case(case, measured, names).items() if k in row}
            yield {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}


class Pair(NamedTuple):
    """What two arms have in common, side by side.

    ``tables`` of Dice, ece and flips by column and change, over ``draws`` and over the cases of
    these ``patients``.
    """

    draws: list[str]
    patients: list[str]
    tables: Mapping[tuple[str, Change], Table]

    def get_dice(self, name: str) -> list[Table]:
        """Return the Dice under a change in each of its severities."""
        return [self.tables["dice", Change(name, severity)] for severity in CHANGES[name]]

    def add_errors(self, name: str) -> Table:
        """Return 1 - Dice under a change, summed over its severities."""
        return np.sum([1 - dice for dice in self.get_dice(name)], axis=0)


def pair_arms(rows: Sequence[Mapping[str, str]], arm: str, against: str) -> Pair:
    """Return what two arms have in common."""
    cells = [
        {(row["draw"], row["case_id"], read_change(row)): row for row in rows if row["arm"] == name}
        for name in (arm, against)
    ]
    shared = cells[0].keys() & cells[1].keys()
    draws, cases = (sorted({cell[part] for cell in shared}) for part in (0, 1))
    shape = (2, len(draws), len(cases))
    tables: dict[tuple[str, Change], Table] = defaultdict(lambda: np.full(shape, np.nan))
    for draw, case, change in shared:
        sides = [parse_numbers(side[draw, case, change]) for side in cells]
        place = (slice(None), draws.index(draw), cases.index(case))
        tables["dice", change][place] = np.ravel(compare_cases([[side] for side in sides]))
        for column in ("ece", "flips"):
            tables[column, change][place] = [side[column] for side in sides]
    patients = {row["case_id"]: row["patient_id"] for row in rows}
    return Pair(draws, [patients[case] for case in cases], tables)


def parse_numbers(row: Mapping[str, str]) -> dict[str, float]:
    """Return Dice, ece and flips of a row; NaN is n/a."""
    columns = [key for key in row if key.startswith("dice") or key in ("ece", "flips")]
    return {column: float(row[column] or "nan") for column in columns}


class Ratio(NamedTuple):
    """A mean of ratios with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def compare_sums(tables: Sequence[Table], patients: Sequence[str]) -> Ratio | None:
    """Return the mean over tables of the sum of our side as a multiple of that of the other one.

    Args:
        tables: NaN is in no sum. Those of which the other side has nothing are left out.
        patients: The patient of each case.

    Returns:
        With the interval of the two-way bootstrap over draws and patients of
        ``medssl.metrics.draw_difference``, both of which are the same in all tables and on both
        sides; None where no table is left.
    """
    tables = [table for table in tables if np.nansum(table[1]) > 0]
    if not tables:
        return None
    people, place = np.unique(np.array(patients), return_inverse=True)
    sums = np.nan_to_num(tables) @ np.eye(len(people))[place]  # (table, side, draw, patient)
    rng = np.random.default_rng(metrics.SEED)
    times = [
        rng.multinomial(number, np.full(number, 1 / number), metrics.NUM_RESAMPLES)
        for number in sums.shape[2:]
    ]
    ours, theirs = np.einsum("tsdp,bd,bp->stb", sums, *times, optimize=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # nobody was drawn who has something
        means = (ours / theirs).mean(0)
    low, high = np.nanpercentile(means, (2.5, 97.5)).tolist()
    ours, theirs = sums.sum((2, 3)).T
    return Ratio(float((ours / theirs).mean()), low, high)


def pick_hardest(dice: Table) -> NDArray[np.bool_]:
    """Return which quarter (draw, case) of the test cases is the hardest for the other side.

    A case that one model fails on is in part bad luck of that model, and whoever is measured
    beside it on just these cases looks better than he is (regression to the mean). So the cases of
    a draw are chosen by the other side's models of all *other* draws, which learned from other
    labels. Where there is but one draw, the mean of both sides chooses, which favors neither as
    far as their luck is alike.

    Args:
        dice: Of the clean scans.
    """
    chosen = np.zeros(dice.shape[1:], bool)
    for draw in range(len(chosen)):
        judges = np.delete(dice[1], draw, axis=0) if len(chosen) > 1 else dice[:, draw]
        known = [case for case in range(dice.shape[2]) if np.isfinite(judges[:, case]).any()]
        known.sort(key=lambda case: float(np.nanmean(judges[:, case])))
        chosen[draw, known[: max(1, len(known) // 4)]] = True
    return chosen


def subtract(table: Table, patients: Sequence[str]) -> str:
    """Return our side minus the other one with its intervals, over the draws with a value."""
    if np.array_equal(*table, equal_nan=True):  # an arm beside itself
        return ""
    draws = [draw for draw in table[0] - table[1] if np.isfinite(draw).any()]
    return (
        format_difference(draw_difference([d.tolist() for d in draws], patients)) if draws else ""
    )


def average(tables: Sequence[Table]) -> str:
    """Return the mean of our side over all that has a value."""
    values = np.array([table[0] for table in tables])
    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else ""


def tabulate_arms(pairs: Mapping[str, Pair]) -> list[Row]:
    """Return a row per arm: Dice, errors and flips as multiples, and the hardest quarter."""
    rows = []
    for arm, pair in pairs.items():
        clean = pair.tables["dice", CLEAN]
        errors = [pair.add_errors(name) for name in STRENGTHS]
        losses = [error - len(SEVERITIES) * (1 - clean) for error in errors]
        flips = [pair.tables["flips", Change(name, 0)] for name in MOVEMENTS]
        hardest = np.where(pick_hardest(clean), clean, np.nan)
        row = {
            "arm": arm,
            "draws": ", ".join(pair.draws),
            "cases": len(pair.patients),
            "dice": average([clean]),
            "dice with artefacts": average([d for name in STRENGTHS for d in pair.get_dice(name)]),
            "mCE": compare_sums(errors, pair.patients),
            "relative mCE": compare_sums([np.nansum(losses, axis=0)], pair.patients),
            "mFR": compare_sums(flips, pair.patients),
            "hardest quarter": average([hardest]),
            "gain there": subtract(hardest, pair.patients),
        }
        rows.append({key: "" if value is None else value for key, value in row.items()})
    return rows


def tabulate_artefacts(pairs: Mapping[str, Pair]) -> list[Row]:
    """Return a row per artefact: of each arm its Dice in the severities, and its CE."""
    rows = []
    for name in STRENGTHS:
        row: Row = {"artefact": name}
        for arm, pair in pairs.items():
            row[f"dice of {arm}"] = " ".join(
                average([dice]) for dice in pair.get_dice(name)
            ).strip()
            row[f"CE of {arm}"] = compare_sums([pair.add_errors(name)], pair.patients) or ""
        rows += [row] * any(list(row.values())[1:])
    return rows


def tabulate_severities(pairs: Mapping[str, Pair]) -> list[Row]:
    """Return a row per arm: ece in each severity, over all artefacts, and Dice under the attack."""
    rows = []
    for arm, pair in pairs.items():
        row: Row = {"arm": arm, "ece, clean": average([pair.tables["ece", CLEAN]])}
        for severity in SEVERITIES:
            tables = [pair.tables["ece", Change(name, severity)] for name in STRENGTHS]
            row[f"severity {severity}"] = average(tables)
        for epsilon, dice in zip(EPSILONS, pair.get_dice("fgsm"), strict=True):
            row[f"dice, FGSM {epsilon:g}"] = average([dice])
            row[f"gain, {epsilon:g}"] = subtract(dice, pair.patients)
        rows.append(row)
    return rows


def tabulate(path: Path, against: str) -> str:
    """Return the tables of a CSV; none where it has nothing of the arm to hold others against."""
    rows = read_rows(path)
    arms = dict.fromkeys([against, *(row["arm"] for row in rows)])
    pairs = {arm: pair for arm in arms if (pair := pair_arms(rows, arm, against)).draws}
    makers = (tabulate_arms, tabulate_artefacts, tabulate_severities)
    return "\n".join(format_markdown(table) for make in makers if (table := make(pairs)))


split_changes = functools.partial(split_names, known=CHANGES, kind="change")


def measure_robustness(options: argparse.Namespace) -> None:
    """Measure the arms that were asked for, and print the tables of the CSV.

    Raises:
        InputError: There is no such folder, run or CSV, or torchio is not installed.
    """
    for draw, arm in [] if options.table else deal_arms(options.draws, options.arms):
        run_arm(options.runs, options.csv, draw, arm, options.changes, options.cases)
    refuse_missing(options.csv)
    print(tabulate(options.csv, options.against))


def main() -> None:
    """Read the arguments; a mistake in them is exit code 2."""
    parser = make_measuring_parser(__doc__ or "", "N of the test cases, evenly")
    parser.add_argument(
        "--against", default="labels", help="the arm that the others are held against"
    )
    parser.add_argument("--changes", type=split_changes, default=list(CHANGES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with explain_mistakes():
        measure_robustness(options)


if __name__ == "__main__":
    main()
