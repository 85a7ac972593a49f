"""What the recipe gains on one's own scans where all labels train: folds over the labeled ones.

Each fold is a run of its own, with round 0 and students, without the labeled scans of some
patients; these are its test cases. So every labeled scan is measured once by models that have not
seen it, nor any other scan of its patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.config import InputError
from medssl.data.cases import Case, Splits, select_cases
from medssl.metrics import (
    Row,
    compare_cases,
    fold_difference,
    format_estimate,
    judge,
    read_table,
)
from medssl.runs import DeliveredSummary, StopFlag, read_json

if TYPE_CHECKING:
    from medssl.rounds.loop import PreparedRun

FOLDER = "cross_check"


def deal_folds(cases: Sequence[Case], count: int, seed: int) -> list[tuple[str, ...]]:
    """Return the case_ids of each fold: whole patients, as many in each as the next.

    Args:
        cases: The labeled cases.
        count: Number of folds.
        seed: ``data.split_seed``.

    Raises:
        InputError: There are fewer patients than folds, or one fold only.
    """
    patients = sorted(
        {case.patient_id for case in cases},
        key=lambda name: hashlib.sha256(repr(("fold", seed, name)).encode()).hexdigest(),
    )
    if not 2 <= count <= len(patients):
        raise InputError(
            f"--cross-check {count}: the {len(cases)} labeled scans are of {len(patients)} "
            f"patients; give 2 to {len(patients)} folds"
            if len(patients) > 1
            else f"--cross-check {count}: needs labeled scans of two patients, and there is one"
        )
    return [
        tuple(sorted(c.case_id for c in cases if c.patient_id in patients[start::count]))
        for start in range(count)
    ]


def list_folds(prepared: PreparedRun, count: int) -> list[PreparedRun]:
    """Return what each fold trains and tests on; the plan is that of the whole.

    A fold has no scan of the patients that it tests on, unlabeled ones neither.

    Raises:
        InputError: The folds cannot be dealt, or would be measured by labels that a model made and
            nobody has changed.
    """
    from medssl.data.io import read_origin  # heavy: folds are dealt without it

    splits = prepared.splits
    labeled = select_cases(prepared.dataset, splits, "labeled")
    model_made = [c for c in labeled if c.label is not None and read_origin(c.label, c)]
    if model_made:
        listed = "\n".join(f"  {case.case_id}: {case.label}" for case in model_made)
        raise InputError(
            f"--cross-check measures every labeled scan, and {len(model_made)} of {len(labeled)} "
            "labels are of a model, as it made them: give a person's, or take these "
            "away:\n" + listed
        )
    held_out = deal_folds(labeled, count, prepared.resolved.config.data.split_seed)
    config = prepared.resolved.config
    untracked = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": "none"})}
    )
    resolved = replace(prepared.resolved, config=untracked)
    patients = {case.case_id: case.patient_id for case in prepared.dataset.cases}
    folds = []
    for test in held_out:
        rest = tuple(case_id for case_id in splits.labeled if case_id not in test)
        tested = {patients[case_id] for case_id in test}
        unlabeled = tuple(i for i in splits.unlabeled if patients[i] not in tested)
        parts = Splits(labeled=rest, unlabeled=unlabeled, val=(), test=test)
        folds.append(replace(prepared, splits=parts, resolved=resolved))
    return folds


def cross_check_run(
    prepared: PreparedRun,
    run_dir: Path,
    stop: StopFlag,
    count: int,
    report: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Train and measure all folds; what is done is skipped.

    Writes ``cross_check/fold_<i>_of_<k>/``, each a run, and ``per_case.csv`` and ``summary.json``
    in ``cross_check/``: the delivered models of the folds on the scans that they have not seen,
    ``paired`` with their own round 0.

    Args:
        prepared: Data and plan of the whole run.
        run_dir: The run folder.
        stop: The stop flag.
        count: Number of folds.
        report: Takes a line of progress.

    Returns:
        The content of ``summary.json``, or None if it was told to stop; the same command goes on.

    Raises:
        InputError: The folds cannot be dealt.
    """
    from medssl.evaluate import evaluate_run, write_tables  # slow: folds are dealt without them
    from medssl.rounds.loop import run_training

    rows: list[Row] = []
    before: list[Row] = []
    folds: list[int] = []
    delivered: list[str] = []
    failed: list[str] = []
    for number, fold in enumerate(list_folds(prepared, count), start=1):
        folder = run_dir / FOLDER / f"fold_{number}_of_{count}"  # others of another count
        if not (folder / "evaluation" / "summary.json").is_file():
            report(f"fold {number} of {count}: without {', '.join(fold.splits.test)}")
            outcome = run_training(fold, folder, stop, cache=run_dir.parent / "cache")
            if outcome.status == "interrupted":
                return None
            device = prepared.plan.device
            evaluate_run(folder, device=device, report=lambda text: None, overwrite=True)
        delivered.append(str(read_json(folder / "summary.json", DeliveredSummary)["delivered"]))
        failed += read_json(folder / "evaluation" / "summary.json").get("failed") or []
        ours = read_table(folder / "evaluation" / "per_case.csv")
        theirs = read_table(folder / "evaluation" / "round_0" / "per_case.csv")
        ids = {row["case_id"] for row in ours} & {row["case_id"] for row in theirs}
        rows += [row for row in ours if row["case_id"] in ids]
        before += [row for row in theirs if row["case_id"] in ids]
        folds += [number] * len(ids)
    if failed:
        report(f"not measured, and in no figure: {', '.join(failed)}")
    summary = {**summarize_folds(rows, before, folds, delivered), "failed": failed}
    write_tables(run_dir / FOLDER, rows, summary)
    return summary


def summarize_folds(
    rows: Sequence[Row], before: Sequence[Row], folds: Sequence[int], delivered: Sequence[str]
) -> dict[str, Any]:
    """Return the summary of all folds together.

    Args:
        rows: Of the delivered models, one a labeled case.
        before: Of round 0 of the same folds, in the same order.
        folds: The fold of each row.
        delivered: The round that each fold delivered.
    """
    from medssl.evaluate import summarize_rows

    patients = [str(row["patient_id"]) for row in rows]
    ours, theirs = compare_cases([rows, before])
    paired = fold_difference(ours, theirs, patients, folds)
    students = sum(name != "round_0" for name in delivered)
    verdict = judge(paired) if students else "not measured"
    if verdict == "no gain" and paired["low"] is None:
        verdict = "no verdict"  # one fold
    summary = summarize_rows(rows)
    measured = (
        f"dice {format_estimate(summary['dice'])} on {summary['dice']['n']} labeled scans of "
    )
    measured += f"{len(set(patients))} patients, each measured by models that had not seen it"
    gain = f"minus labels only {format_estimate(paired, '+')}"
    statement = (
        f"{verdict}: {students} of {len(delivered)} folds delivered a student; "
        f"{measured}{f'; {gain}' if students else ''}"
    )
    return {
        **summary,
        "folds": len(delivered),
        "delivered": list(delivered),
        "paired": paired,
        "verdict": verdict,
        "statement": statement,
    }
