"""The end of a run: which round is delivered, and the summary that says why."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssl.data.io import write_mask
from medssl.predict import check_weights, load_model, predict_probs
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
from medssl.students import Run, count_members, to_tensor
from medssl.transforms.geometry import to_native

MOST_REJECTED = 2  # rounds


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``status`` as in state.json, the round that was delivered, and why."""

    status: str
    delivered: str | None
    message: str


def deliver(run: Run, passed: Sequence[int], rejected: int, predict_unlabeled: bool) -> Outcome:
    """Deliver the best validated round, or the last one that passed its gate."""
    if not passed:
        reasons = read_json(run.round_folder(0) / "done.json", RoundMark)["gate"]["reasons"]
        _copy_model(run, 0)
        message = f"the labels-only model did not pass its gate: {'; '.join(reasons)}"
        _summarize(run, "round_0", message)
        set_status(run.folder, "stopped_by_gate")
        return Outcome("stopped_by_gate", "round_0", message)
    done = {r: read_json(run.round_folder(r) / "done.json", RoundMark)["final"] for r in passed}
    measured = {r: done[r]["val/dice"] for r in passed if done[r].get("val/dice") is not None}
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
    if predict_unlabeled and not _predict_unlabeled(run):
        message += f"; stopped by {run.stop.reason} before all unlabeled scans were segmented: the "
        message += "same command goes on"
        return Outcome("interrupted", f"round_{chosen}", message)
    return Outcome(status, f"round_{chosen}", message)


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
    source, target = run.round_folder(index) / "model", run.folder / "model"
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
    for index in range(run.config.train.rounds + 1):
        path = run.round_folder(index) / "done.json"
        if path.is_file():
            done = read_json(path, RoundMark)
            final = done["final"]
            done |= {
                "kept_cases": final.get("monitors/kept_cases"),
                "agreement": final.get("monitors/agreement"),
            }
            rounds.append({k: v for k, v in done.items() if k not in ("hash", "final", "files")})
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


def _predict_unlabeled(run: Run) -> bool:
    """Write the delivered model's masks of all unlabeled cases, in full, on their own grids.

    Returns:
        Whether all are there: it stops between two cases if it is told to.
    """
    model = load_model(run.folder, run.plan.device)
    count = CaseCounter("masks of unlabeled scans")
    for number, case in enumerate(run.unlabeled):
        count(number, len(run.unlabeled))
        path = run.folder / "unlabeled_masks" / f"{case.case_id}{case.mask_suffix}"
        if path.is_file():
            continue
        if run.stop.is_set():
            return False
        image = to_tensor(case, run.plan.device)
        size, precision, axis = run.plan.patch_size, run.plan.precision, run.plan.slice_axis
        probs = predict_probs(model.network, image, size, precision, run.plan.flips, axis)[0]
        native = to_native(probs.cpu().numpy(), case.affine, case.native_shape, case.native_affine)
        classes = native.argmax(0).astype(np.uint8)
        write_mask(path, classes, case.native_affine, run.plan.label_values)
    return True


def set_status(run_dir: Path, status: str) -> None:
    """Change the status and leave the checkpoint's place as it is."""
    path = run_dir / "state.json"
    state = read_json(path, State) if path.is_file() else {"round": 0, "step": 0}
    write_state(run_dir, status, state["round"], state["step"])
