"""The end of a run: which round is delivered, and the summary that says why."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssl.data.cache import CachedCase
from medssl.data.io import write_mask
from medssl.machine import explain_out_of_memory
from medssl.metrics import compare_cases, mean_known
from medssl.predict import Model, check_weights, explain_failure, load_model, predict_native
from medssl.rounds.run import Run, count_members, load_image
from medssl.runs import (
    CaseCounter,
    RoundMark,
    State,
    hash_file,
    list_rounds,
    read_json,
    write_file,
    write_json,
    write_state,
)
from medssl.transforms.geometry import WayBack

MOST_REJECTED = 2  # rounds


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``status`` as in state.json, the round that was delivered, and why.

    ``unsegmented`` are the unlabeled cases for which there should be a mask and is none.
    """

    status: str
    delivered: str | None
    message: str
    unsegmented: tuple[str, ...] = ()


def deliver_model(
    run: Run, passed: Sequence[int], rejected: int, predict_unlabeled: bool
) -> Outcome:
    """Deliver the best validated round, or the last one that passed its gate."""
    if not passed:
        reasons = read_json(run.find_round_folder(0) / "done.json", RoundMark)["gate"]["reasons"]
        _copy_model(run, 0)
        message = (
            "the labels-only model did not pass its gate, so no student learned from it; it is "
            f"delivered for want of a better one: {'; '.join(reasons)}"
        )
        if predict_unlabeled:
            message += (
                "; so --predict-unlabeled has written no masks: if you want them all the same, "
                "medssl predict RUN SCANS --out DIR"
            )
        _summarize(run, "round_0", message)
        set_status(run.folder, "stopped_by_gate")
        return Outcome("stopped_by_gate", "round_0", message)
    measured = _compare_rounds(run, passed)
    chosen = max(measured, key=lambda r: (measured[r], r)) if measured else passed[-1]
    _copy_model(run, chosen)
    by_gate = 0 < min(MOST_REJECTED, run.num_rounds) <= rejected
    how = "the best on the validation cases" if measured else "the last that passed its gate"
    message = f"delivered round {chosen}, {how}"
    if rejected:
        rest = "a round after it was" if rejected == 1 else f"{rejected} rounds after it were"
        message += f"; {rest} rejected by the gates"
    _summarize(run, f"round_{chosen}", message)
    status = "stopped_by_gate" if by_gate else "delivered"
    set_status(run.folder, status)
    failed = _predict_unlabeled(run) if predict_unlabeled else {}
    if failed is None:
        message += f"; stopped by {run.stop.reason} before all unlabeled scans were segmented: the "
        message += "same command goes on"
        return Outcome("interrupted", f"round_{chosen}", message)
    if predict_unlabeled and not run.unlabeled:
        message += "; --predict-unlabeled: there is no unlabeled scan"
    if failed:
        listed = "".join(f"\n  - {case_id}: {why}" for case_id, why in failed.items())
        message += f"; {len(failed)} of {len(run.unlabeled)} unlabeled scans got no mask:{listed}"
    return Outcome(status, f"round_{chosen}", message, tuple(failed))


def _compare_rounds(run: Run, passed: Sequence[int]) -> dict[int, float]:
    """Return the mean dice of the validation cases for rounds side by side; empty without any."""
    done = {r: read_json(run.find_round_folder(r) / "done.json", RoundMark) for r in passed}
    tables = [entry.get("validation") or [] for entry in done.values()]
    if all(tables):
        scores = [mean_known(dice) for dice in compare_cases(tables)]
    else:  # of version 0.1.0
        scores = [entry["final"].get("val/dice") for entry in done.values()]
    return {r: value for r, value in zip(done, scores, strict=True) if value is not None}


def deliver_interrupted(run: Run, passed: Sequence[int]) -> Outcome:
    """Leave a usable model: the last one that passed its gate, or the unfinished round 0."""
    chosen = passed[-1] if passed else 0
    _copy_model(run, chosen)
    what = f"round {chosen}" if passed else "round 0 as far as it came"
    message = f"stopped by {run.stop.reason}; model/ holds {what}; the same command goes on"
    _summarize(run, f"round_{chosen}", message)
    set_status(run.folder, "interrupted")
    return Outcome("interrupted", f"round_{chosen}", message)


def _copy_model(run: Run, index: int) -> None:
    """Copy the model of a round to model/; model.json comes last."""
    source, target = run.find_round_folder(index) / "model", run.folder / "model"
    check_weights(source)
    _drop_old_evaluation(run, source / "weights.safetensors", target / "weights.safetensors")
    (target / "model.json").unlink(missing_ok=True)
    for name in ("weights.safetensors", "model.json"):
        write_file(target / name, functools.partial(shutil.copyfile, source / name))


def _drop_old_evaluation(run: Run, weights: Path, delivered: Path) -> None:
    """Remove what `evaluate` measured before the run went on: it is not the result of this one."""
    evaluation = run.folder / "evaluation"
    measured, done = (
        {path.name for path in list_rounds(folder).values() if (path / mark).is_file()}
        for folder, mark in ((evaluation, "summary.json"), (run.folder, "done.json"))
    )
    same = delivered.is_file() and hash_file(weights) == hash_file(delivered)
    if evaluation.is_dir() and not (same and measured == done):
        print(
            f"{evaluation}: removed, since the run went on after it; medssl evaluate {run.folder}"
        )
        shutil.rmtree(evaluation)


def _summarize(run: Run, delivered: str, message: str) -> None:
    """Write summary.json."""
    rounds = []
    hidden = ("hash", "final", "files", "validation")
    for index in range(run.config.train.rounds + 1):
        path = run.find_round_folder(index) / "done.json"
        if path.is_file():
            done = read_json(path, RoundMark)
            final = done["final"]
            done |= {
                "kept_cases": final.get("monitors/kept_cases"),
                "agreement": final.get("monitors/agreement"),
            }
            rounds.append({k: v for k, v in done.items() if k not in hidden})
    content = {
        "delivered": delivered,
        "exit": message,
        "rounds": rounds,
        "total_steps": sum(e["steps"] * count_members(run, e["round"]) for e in rounds),
        "seconds": round(sum(entry["seconds"] for entry in rounds), 1),
        "baseline": {"round": 0, "steps": run.count_steps(0)},
        "labeled_cases": len(run.labeled),
        "val_cases": len(run.val),
        "unlabeled_cases": len(run.unlabeled),
    }
    write_json(run.folder / "summary.json", content)


def _predict_unlabeled(run: Run) -> dict[str, str] | None:
    """Write the delivered model's masks of all unlabeled cases, in full, on their own grids.

    Returns:
        Why cases got none, by case_id; or None if it was told to stop between two of them.
    """
    model = load_model(run.folder, run.plan.device)
    count = CaseCounter("masks of unlabeled scans")
    failed = {}
    for number, case in enumerate(run.unlabeled):
        count(number, len(run.unlabeled))
        path = run.folder / "unlabeled_masks" / f"{case.case_id}{case.mask_suffix}"
        if path.is_file():
            continue
        if run.stop.is_set():
            return None
        try:
            _segment(run, model, case, path)
        except Exception as error:  # whatever it is, it is this case's: the others go on
            failed[case.case_id] = explain_failure(error)
    return failed


@explain_out_of_memory("the scan does not fit the memory; use a machine with more")
def _segment(run: Run, model: Model, case: CachedCase, path: Path) -> None:
    """Write the mask of a case."""
    image = load_image(case, run.plan.device)
    way = WayBack(case.shape, case.affine, case.native_shape, case.native_affine)
    mask = np.empty(case.native_shape, np.uint8)
    classes = run.plan.num_classes
    for box, probs in predict_native(model.network, image, run.plan.window, way, classes):
        mask[box] = probs.argmax(0)
    place = (mask, case.native_affine, run.plan.label_values)
    write_mask(path, *place, header=case.native_header, origin="prediction")


def set_status(run_dir: Path, status: str) -> None:
    """Change the status and leave the checkpoint's place as it is."""
    path = run_dir / "state.json"
    state = read_json(path, State) if path.is_file() else {"round": 0, "step": 0}
    write_state(run_dir, status, state["round"], state["step"])
