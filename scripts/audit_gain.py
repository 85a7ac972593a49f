"""How good a teacher is on the unlabeled scans as it trains, and what it says there.

    python scripts/audit_gain.py RUNS --csv CSV --draws 0,1,2 --arms labels,recipe --cases 20
    python scripts/audit_gain.py RUNS --csv CSV --table

RUNS is the --out of scripts/study.py. The labels of the unlabeled cases, which no training saw, are
opened now that it has ended. Each round of a run has the average's weights at a third, at two
thirds and at its end; each of these predicts the unlabeled cases, and the CSV has per case

    dice, hd95_mm, volume_ml, reference_ml       by class (pictures: in pixels)
    coverage, coverage_surface                   the share of voxels in and around the structures
                                                 that the thresholds of that step accept, and of
                                                 those that have a neighbor of another class
    accepted, confidence, refused                the share of accepted ones that are right, their
                                                 mean confidence, and the share of refused ones
                                                 that are right
    ece                                          the calibration error in and around the structures

and what stands there is not measured again. In and around: at most three voxels from the reference.
The thresholds are those of the patches of that step; they are held against what is said of the
whole scan, which averages windows and mirrorings. Round 0 and labels alone have none.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from robustness.measures import find_near, measure_calibration
from study import (
    deal_arms,
    explain_mistakes,
    find_run,
    format_markdown,
    make_measuring_parser,
    read_rows,
    refuse_missing,
    spread,
    write_csv,
)

from medssl.config import InputError
from medssl.data.cases import Case
from medssl.data.io import read_label
from medssl.data.layouts import read_dataset
from medssl.data.trained import read_splits
from medssl.evaluate import tabulate_case
from medssl.metrics import case_metrics, mean_known
from medssl.predict import Model, load_model, predict_case
from medssl.pseudo.thresholds import find_surface
from medssl.runs import Journal, RoundMark, hold_lock, list_rounds, read_record
from medssl.transforms.geometry import grid_spacing

PARTS = 3  # of a round, at whose ends weights are kept
COLUMNS = ("case_id", "patient_id", "dice", "hd95_mm", "volume_ml", "reference_ml")
SHARES = ("coverage", "coverage_surface", "accepted", "confidence", "refused", "ece")

Row = dict[str, Any]


class State(NamedTuple):
    """A model as it was at a step of a round, and the thresholds of that time by class name."""

    round: int
    step: int
    folder: Path
    thresholds: Mapping[str, float]


def list_states(run: Path) -> list[State]:
    """Return the states of a run of which weights are kept, in order.

    Raises:
        InputError: None of its rounds is done.
    """
    lines = list(Journal(run / "metrics.jsonl").read())
    states = []
    for index, folder in list_rounds(run).items():
        if not (folder / "done.json").is_file():
            continue
        steps = read_record(folder / "done.json", RoundMark).steps
        for part in range(1, PARTS + 1):
            place = folder / "snapshots" / str(part) if part < PARTS else folder
            step = max(1, steps * part // PARTS)
            if (place / "model.json").is_file() or part == PARTS:
                states.append(State(index, step, place, find_thresholds(lines, index, step)))
    if not states:
        raise InputError(f"{run}: none of its rounds is done; medssl train goes on with it")
    return states


def find_thresholds(lines: Iterable[Mapping[str, Any]], index: int, step: int) -> dict[str, float]:
    """Return the last thresholds of a round that were logged up to a step, by class name."""
    thresholds: dict[str, float] = {}
    for line in lines:
        if line["round"] == index and line["step"] <= step:
            thresholds |= {
                key.removeprefix("monitors/threshold/"): value
                for key, value in line["metrics"].items()
                if key.startswith("monitors/threshold/")
            }
    return thresholds


def open_unlabeled_cases(run: Path, number: int | None) -> tuple[int | None, list[Case]]:
    """Return the ignore value of a run, and its unlabeled cases whose label can be opened.

    Args:
        run: The run folder.
        number: Of the cases, evenly over all of them; None: all.

    Raises:
        InputError: It is no run, its data is no longer there, or no unlabeled case has a label.
    """
    splits, data = read_splits(run)
    assert data.root is not None, "splits.json names the root"
    dataset = read_dataset(data.root, data.format, data.labels)
    unlabeled = set(splits.unlabeled)
    cases = [c for c in dataset.cases if c.case_id in unlabeled and c.label is not None]
    if not cases:
        raise InputError(
            f"{run}: none of its {len(unlabeled)} unlabeled cases has a label to open; an audit "
            "needs a data set of which labels were only held back: labeled=N"
        )
    return dataset.ignore if data.ignore is None else data.ignore, spread(cases, number)


def run_arm(runs: Path, path: Path, draw: int, arm: str, number: int | None) -> None:
    """Measure all states of a run, but for what stands in the CSV.

    Raises:
        InputError: There is no such run, or its unlabeled cases have no labels.
    """
    run = find_run(runs, draw, arm)
    states = list_states(run)
    ignore, cases = open_unlabeled_cases(run, number)
    for state in states:
        ids = {"draw": str(draw), "arm": arm, "round": str(state.round), "step": str(state.step)}
        done = find_cases(path, ids)
        left = [case for case in cases if case.case_id not in done]
        if not left:
            continue
        print(f"{state.folder}: {len(left)} cases", flush=True)
        model = load_model(state.folder)
        rows = [{**ids, **measure_case(model, case, ignore, state.thresholds)} for case in left]
        with hold_lock(path.with_suffix(".lock")):
            done = find_cases(path, ids)  # another process may have been faster
            rows = [row for row in rows if row["case_id"] not in done]
            write_csv(path, [*read_rows(path), *rows])


def find_cases(path: Path, ids: Mapping[str, str]) -> set[str]:
    """Return the cases that the CSV has of a state."""
    return {row["case_id"] for row in read_rows(path) if ids.items() <= row.items()}


def measure_case(
    model: Model, case: Case, ignore: int | None, thresholds: Mapping[str, float]
) -> Row:
    """Return what a model says of a case: metrics by class, and what thresholds make of it.

    Raises:
        InputError: The scan or its label cannot be read.
    """
    info = model.info
    assert case.label is not None, "cases without a label were left out"
    label, affine = read_label(case.label, info.label_values, ignore, case)
    with tempfile.TemporaryDirectory() as scratch:
        prediction = predict_case(model, case.images, probs_in=Path(scratch))
        assert prediction.probs is not None, "asked for"
        measured = case_metrics(prediction.mask, label, grid_spacing(affine), len(info.labels))
        names = {index: name for index, name in info.labels.items() if index}
        row: Row = {k: v for k, v in tabulate_case(case, measured, names).items() if is_kept(k)}
        limits = [thresholds.get(name, np.nan) for _, name in sorted(info.labels.items())]
        row |= measure_acceptance(prediction.probs, label, np.array(limits), info.slice_axis)
        row["ece"] = measure_calibration(prediction.probs, label)
    return {
        k: f"{v:.4f}" if isinstance(v, float) else "" if v is None else v for k, v in row.items()
    }


def is_kept(column: str) -> bool:
    """Return whether a column of an evaluation goes to the CSV."""
    return column.partition("/")[0] in COLUMNS


def measure_acceptance(
    probs: NDArray[np.float32],
    reference: NDArray[np.uint8],
    thresholds: NDArray[np.float64],
    slice_axis: int | None,
) -> dict[str, float | None]:
    """Return how many voxels in and around the structures are accepted, and how many are right.

    Args:
        probs: (C, I, J, K).
        reference: Class indices (I, J, K); 255 is ignored.
        thresholds: (C,) of confidence, by predicted class; NaN: there are none.
        slice_axis: The axis along which a 2D network gets slices, in which surfaces lie.

    Returns:
        coverage, coverage_surface, accepted, confidence and refused; None: of no voxel.
    """
    near, classes, confidence = find_near(reference), probs.argmax(0), probs.max(0)
    if np.isnan(thresholds).any():
        return dict.fromkeys(SHARES[:-1])
    accepted = confidence >= thresholds.astype(np.float32)[classes]  # as it was in training
    axis = 0 if slice_axis is None else slice_axis  # along it slices follow one another
    slices = torch.from_numpy(np.moveaxis(classes, axis, 0))
    stacks = slices[None, None] if slice_axis is None else slices[:, None]
    surface = np.moveaxis(find_surface(stacks).reshape(slices.shape).numpy(), 0, axis)
    right = classes == reference
    return {
        "coverage": average(accepted, near),
        "coverage_surface": average(accepted, near & surface),
        "accepted": average(right, near & accepted),
        "confidence": average(confidence, near & accepted),
        "refused": average(right, near & ~accepted),
    }


def average(values: NDArray[Any], where: NDArray[np.bool_]) -> float | None:
    """Return the mean of some voxels; None: there are none."""
    return float(values[where].mean()) if where.any() else None


def tabulate_states(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return a row per arm and state: means over draws and cases, volumes as a whole."""
    groups: dict[tuple[str, int, int], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], int(row["round"]), int(row["step"])), []).append(row)
    columns = list(rows[0]) if rows else []
    names = [c.partition("/")[2] for c in columns if c.startswith("dice/")]
    table = []
    for (arm, index, step), group in sorted(groups.items()):

        def mean(*columns: str, group: Sequence[Mapping[str, str]] = group) -> str:
            values = [float(row[c]) if row[c] else None for c in columns for row in group]
            known = mean_known(values)
            return "" if known is None else f"{known:.3f}"

        sums = [
            [sum(float(row[f"{kind}_ml/{name}"]) for row in group) for name in names]
            for kind in ("volume", "reference")
        ]
        ratios = [
            f"{ours / theirs:.2f}" if theirs else "" for ours, theirs in zip(*sums, strict=True)
        ]
        table.append(
            {
                "arm": arm,
                "round": index,
                "step": step,
                "draws": ", ".join(sorted({row["draw"] for row in group})),
                "cases": len(group),
                "dice": mean("dice"),
                "by class": " / ".join(mean(f"dice/{name}") for name in names),
                "volume": " / ".join(ratios),
                "hd95": mean(*(f"hd95_mm/{name}" for name in names)),
                **{column.replace("_", " "): mean(column) for column in SHARES},
            }
        )
    return table


def tabulate(path: Path) -> str:
    """Return the table of a CSV."""
    return format_markdown(tabulate_states(read_rows(path)))


def audit_gain(options: argparse.Namespace) -> None:
    """Measure the runs that were asked for, and print the table of the CSV.

    Raises:
        InputError: There is no such folder, run or CSV.
    """
    for draw, arm in [] if options.table else deal_arms(options.draws, options.arms):
        run_arm(options.runs, options.csv, draw, arm, options.cases)
    refuse_missing(options.csv)
    print(tabulate(options.csv))


def main() -> None:
    """Read the arguments; a mistake in them is exit code 2."""
    parser = make_measuring_parser(__doc__ or "", "N of the unlabeled cases, evenly")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with explain_mistakes():
        audit_gain(options)


if __name__ == "__main__":
    main()
