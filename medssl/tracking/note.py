"""What a training was, in tags and in sentences."""

from __future__ import annotations

from typing import Any

from medssl.names import Names
from medssl.run_folder import RunFolder, is_finite

_PARTS = ("labeled", "unlabeled", "val", "test")


def describe_training(folder: RunFolder) -> dict[str, str]:
    """Return the tags of a training: what a person would filter and group by."""
    config, splits = folder.config, folder.splits
    facts: dict[str, Any] = {
        "dataset": folder.dataset,
        "method": config.get("method"),
        "draw": config.get("data", {}).get("draw"),
        "seed": config.get("train", {}).get("seed"),
        "rounds": config.get("train", {}).get("rounds"),
        **{f"{part}_cases": len(splits[part]) for part in _PARTS if part in splits},
        "status": folder.status,
        "delivered": str(folder.summary.get("delivered") or "").replace("_", " "),
        "verdict": folder.measured.get("verdict") or ("not measured" * folder.is_finished),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def write_note(folder: RunFolder, names: Names) -> str:
    """Write what this training was, in sentences."""
    facts = describe_training(folder)
    lines = [
        f"**{facts.get('method', 'medssl')}** on **{folder.dataset}**: "
        f"{facts.get('labeled_cases', '?')} labeled and {facts.get('unlabeled_cases', '?')} "
        f"unlabeled cases (draw {facts.get('draw', 0)}, seed {facts.get('seed', 0)}), "
        f"{facts.get('val_cases', 0)} for validation, {facts.get('test_cases', 0)} for the test.",
        "",
        _say_outcome(folder),
        "",
        *_write_round_table(folder),
    ]
    for round_index, done in folder.done_rounds.items():
        reasons = "; ".join(done.get("gate", {}).get("reasons", []))
        if reasons and not done["gate"].get("passed", True):
            lines.append(
                f"Round {round_index} did not pass its gate: {names.clean_text(reasons)}.  "
            )
    if folder.plan.get("reasons"):
        lines += ["", "Why it was planned so:", ""]
        lines += [f"- {names.clean_text(str(reason))}" for reason in folder.plan["reasons"]]
    lines += [
        "",
        f"Everything else is in the run folder `{folder.path.name}`: report, masks, model.",
    ]
    return "\n".join(lines)


def _say_outcome(folder: RunFolder) -> str:
    """Say in a sentence or two what came of it."""
    words = {
        "running": "It is running.",
        "stopped_by_gate": "A gate stopped it; the last good model was kept.",
        "interrupted": "It was interrupted; the same command resumes it.",
        "failed": "It failed; the terminal and the run folder say why.",
    }
    if folder.delivered_in_spite:
        words["stopped_by_gate"] = "A gate stopped it; there was no better model to keep."
    sentences = [words.get(folder.status, "")]
    delivered, summary = folder.summary.get("delivered"), folder.summary
    if delivered:
        sentences.append(f"Delivered: **{str(delivered).replace('_', ' ')}**.")
    if summary.get("total_steps") and summary.get("baseline"):
        sentences.append(
            f"Baseline: labels only, {summary['baseline'].get('steps', '?')} steps; the whole run "
            f"took {summary['total_steps']}."
        )
    if folder.measured.get("statement"):
        where = "On the test cases" if folder.measured is folder.evaluation else "Out of fold"
        sentences.append(f"{where}: {folder.measured['statement']}.")
    elif folder.is_finished and delivered == "round_0":
        sentences.append("Labels only: a baseline for others.")
    elif folder.is_finished:
        sentences.append("Whether it beats labels only has not been measured.")
    return " ".join(filter(None, sentences))


def _write_round_table(folder: RunFolder) -> list[str]:
    """Write one line for each completed round, as Markdown."""
    if not folder.done_rounds:
        return []
    lines = [
        "| round | steps | gate | kept cases | agreement | val Dice | test Dice |",
        "|---|---|---|---|---|---|---|",
    ]
    for round_index, done in folder.done_rounds.items():
        gate = done.get("gate", {}).get("passed")
        cells = [
            str(round_index),
            str(done.get("steps", "")),
            "" if gate is None else "passed" if gate else "not passed",
            str(done.get("kept_cases") if done.get("kept_cases") is not None else ""),
            _shorten_number(done.get("agreement")),
            _shorten_number(done.get("final", {}).get("val/dice")),
            _shorten_number(folder.evaluation.get("rounds", {}).get(f"round_{round_index}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _shorten_number(value: Any) -> str:
    """Return three digits of a number, nothing of no number."""
    return f"{value:.3f}" if is_finite(value) else ""
