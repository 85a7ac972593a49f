"""What the report says in words: headline, verdict, caveats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medssl.data.cases import format_count
from medssl.metrics import MIN_CASES_FOR_VERDICT, mean_known
from medssl.names import Names
from medssl.run_folder import RoundFolder, RunFolder, parse_number

MISSING = "–"
EVIDENCE = (
    " In the project's own study, on the heart with three labeled patients, in five draws of "
    "them that nothing was chosen by, the delivered model is at 0.805 Dice where labels "
    "alone, trained as long, are at 0.767: +0.038 [+0.014, +0.062], by Student's t [+0.015, "
    "+0.061], with a shorter round 0 than a plan in 2D has now (docs/evidence.md)."
)
"""What the recipe gained in docs/confirm_acdc_3.csv; a test holds it against that."""


def format_seconds(value: object) -> str:
    """Return a duration as people say it; a dash where it is unknown."""
    seconds = parse_number(value)
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_number(value: object, digits: int = 3, sign: bool = False) -> str:
    """Return a number with a typographic minus; a dash where it is unknown."""
    parsed = parse_number(value)
    if parsed is None:
        return MISSING
    text = f"{parsed:+.{digits}f}" if sign else f"{parsed:.{digits}f}"
    return text.replace("-", "−")


def list_classes(run: RunFolder) -> list[str]:
    """Return the names of the foreground classes."""
    return [name for index, name in sorted(run.classes.items()) if index > 0]


def count_steps(run: RunFolder) -> int | None:
    """Return the steps of all rounds that are done, or None where no file says it."""
    total = parse_number(run.summary.get("total_steps"))
    if total is not None:
        return int(total)
    steps = [parse_number(entry.done.get("steps")) for entry in run.rounds if entry.done]
    return int(sum(s for s in steps if s is not None)) if any(steps) else None


def write_headline(run: RunFolder, names: Names) -> str:
    """Return one sentence: what was trained on what."""
    dataset = run.splits.get("dataset") or {}
    where = "" if names.shared or not dataset.get("name") else f" of the set {dataset['name']}"
    labeled, unlabeled = (len(run.list_part(part)) for part in ("labeled", "unlabeled"))
    classes = list_classes(run)
    what = f" to find {_join(classes)}" if classes else ""
    students = sum(entry.index > 0 for entry in run.rounds)
    rounds = f"labels only and {format_count(students, 'self-training round')}"
    steps = count_steps(run)
    unfinished = run.state.get("status") in ("running", "interrupted", "failed")
    alone = "so far labels only" if unfinished else "labels only, no self-training round"
    effort = [rounds if students else alone]
    effort += [] if steps is None else [f"{format_count(steps, 'step')}"]
    seconds = [parse_number(entry.done.get("seconds")) for entry in run.rounds]
    if any(seconds):
        device = run.provenance.get("device")
        on = f" on {device}" if device else ""
        effort.append(f"{format_seconds(sum(s for s in seconds if s))}{on}")
    parts = (
        f"{labeled:,} labeled and {unlabeled:,} unlabeled" if run.splits else "an unknown set of"
    )
    return f"A model was trained on {parts} scans{where}{what}: {', '.join(effort)}."


def describe_status(run: RunFolder) -> str:
    """Return a sentence if the run did not end with a delivered model; else nothing."""
    status = str(run.state.get("status", ""))
    step, index = run.state.get("step", "?"), run.state.get("round", "?")
    if status == "stopped_by_gate":
        last = f": {_spell(run.delivered)} is the last good one" if run.delivered else ""
        if run.delivered_in_spite:
            last = f": {_spell(run.delivered)} did not pass it and is kept for want of a better one"
            last += "; look at its masks before you use it"
        return f"The run was stopped by its gate{last}."
    known = {
        "running": f"The run is not finished: its last checkpoint is step {step} of round {index}.",
        "interrupted": f"The run was interrupted after step {step} of round {index}; the same "
        "`medssl train` command goes on from there.",
        "failed": f"The run failed; its last checkpoint is step {step} of round {index}.",
    }
    return known.get(status, "")


@dataclass(frozen=True)
class VerdictText:
    """The verdict, with caveats as ``details``.

    ``kind`` is gain, loss, no gain, no verdict or not measured.
    """

    kind: str
    word: str
    sentence: str
    details: tuple[str, ...]


def write_verdict(run: RunFolder, patients: str) -> VerdictText:
    """Return what may be said of the delivered model against labels only.

    Args:
        run: The run.
        patients: What is known of the patients of the test cases, as a sentence.
    """
    paired = run.paired
    in_folds = not run.evaluation.get("paired")
    difference, n = parse_number(paired.get("mean")), int(parse_number(paired.get("n")) or 0)
    details = _list_caveats(run, "" if difference is None or in_folds else patients)
    if difference is None:
        is_open = run.splits and not run.list_part("test") and not run.evaluation
        word = "Not measured here" if is_open else "Not measured"
        return VerdictText("not measured", word, _say_why_not_measured(run), tuple(details))
    low, high = parse_number(paired.get("low")), parse_number(paired.get("high"))
    measured = run.cross_check if in_folds else run.evaluation
    kind = str(measured.get("verdict") or "not measured")
    if kind == "not measured" and not in_folds:  # as version 0.1.0 called it
        kind = "no verdict"
    if kind == "no gain" and high is not None and high < 0:
        kind = "loss"
    amount = f"{format_number(abs(difference))} Dice {'above' if difference >= 0 else 'below'}"
    interval = f"{format_number(low, sign=True)} to {format_number(high, sign=True)}"
    steps = _baseline_steps(run)
    baseline = f"labels only ({format_count(steps, 'step')})" if steps else "labels only"
    sentence = (
        f"The delivered model ({_spell(run.delivered)}) is {amount} {baseline}: "
        f"paired difference {format_number(difference, sign=True)}, 95 % interval {interval}, "
        f"on {format_count(n, 'test case')} that it was not trained on."
    )
    if in_folds:
        sentence = _describe_folds(measured, f"{amount} labels only", interval)
    elif run.delivered == "round_0":
        sentence = (
            f"The delivered model is round 0 itself, trained on labels only: there is no gain "
            f"over it to measure ({format_count(n, 'test case')})."
        )
        kind = "no gain"
    if kind == "no verdict":
        sentence += f" A verdict needs such cases of {MIN_CASES_FOR_VERDICT} patients."
    if kind == "no gain" and low is not None and high is not None and low <= 0 <= high and low:
        sentence += " The interval includes zero."
    words = {"gain": "Gain", "no gain": "No gain", "loss": "No gain: worse than labels only"}
    words["no verdict"] = "No verdict: too few patients"
    return VerdictText(kind, words.get(kind, "Not measured"), sentence, tuple(details))


def _describe_folds(check: Mapping[str, Any], gain: str, interval: str) -> str:
    """Return what the folds of the labeled scans say of the recipe."""
    delivered = [str(name) for name in check.get("delivered") or ()]
    students = sum(name != "round_0" for name in delivered)
    paired, dice = check.get("paired") or {}, check.get("dice") or {}
    quality = (
        f"{format_number(dice.get('mean'))} Dice ({format_number(dice.get('low'))} to "
        f"{format_number(dice.get('high'))})"
    )
    scans = format_count(int(parse_number(dice.get("n")) or 0), "labeled scan")
    how = f"on {scans}, each measured by models that had not seen it or another of its patient"
    if not students:
        return (
            f"None of {format_count(len(delivered), 'fold')} delivered a student: labels only have "
            f"{quality} {how}."
        )
    rest = "" if students == len(delivered) else f" ({students} of them delivered a student)"
    return (
        f"Out of {format_count(len(delivered), 'fold')}{rest}, models of the same recipe have "
        f"{quality} and are {gain}: paired difference "
        f"{format_number(paired.get('mean'), sign=True)}, 95 % interval "
        f"{interval} (each fold is one training), {how}. The delivered model has learned from all "
        "of them."
    )


def _say_why_not_measured(run: RunFolder) -> str:
    """Return why there is no paired difference."""
    num_test = len(run.list_part("test"))
    if run.evaluation:
        return "No round after round 0 is done: there is nothing to compare with labels only."
    if not run.splits:
        return "splits.json is missing, so nobody can say which cases the model has not seen."
    if num_test == 0:
        return (
            "All labels were trained on, so no case says how good the model is on new scans."
            f"{_say_what_to_expect(run)} For a figure of your own: `medssl evaluate` on labeled "
            "scans that are new to it, a run with test=N, or the same command with "
            "`--cross-check 3`, which trains three times more and measures every labeled scan by "
            "models that have not seen it."
        )
    if not run.summary:
        return (
            f"The run has not delivered a model yet; its {format_count(num_test, 'test case')} "
            f"{'is' if num_test == 1 else 'are'} untouched."
        )
    return (
        f"The {format_count(num_test, 'test case')} of the run have not been looked at yet: "
        "`medssl evaluate` on this run folder measures the model on them."
    )


def _say_what_to_expect(run: RunFolder) -> str:
    """Return what is known of a model that nobody measured: the study was of the recipe alone."""
    if run.delivered == "round_0":
        return " It learned from labels only, so there is no gain to look for."
    return EVIDENCE if run.config.get("method") == "default" else ""


def _list_caveats(run: RunFolder, patients: str) -> list[str]:
    """Return what a reader of the verdict has to know."""
    details = []
    steps, total = _baseline_steps(run), count_steps(run)
    if steps and total and total > steps:
        alone = steps + round((total - steps) * _count_patches_of_students(run))
        details.append(
            f"Labels only is round 0 with {format_count(steps, 'step')}; the run used {total:,} in "
            "all its rounds. Longer training alone can give a part of a gain: labels only with as "
            f"many patches is `medssl train DATA rounds=0 steps={alone}`."
        )
    labeled, val = len(run.list_part("labeled")), len(run.list_part("val"))
    if val:
        details.append(
            f"Validation labels count as labels: {labeled} for training and {val} for validation "
            f"are {labeled + val} labels."
        )
    elif run.splits:
        good = run.summary and not run.delivered_in_spite
        chosen = "the last round that passed its gate is delivered" if good else ""
        details.append(
            f"Validation labels count as labels: there is no validation case, so the run has "
            f"{format_count(labeled, 'label')}{f' and {chosen}' if chosen else ''}."
        )
    failed = run.evaluation.get("failed")
    if isinstance(failed, list) and failed:
        details.append(
            f"{format_count(len(failed), 'test case')} could not be measured and "
            f"{'is' if len(failed) == 1 else 'are'} in no figure: {', '.join(map(str, failed))}."
        )
    if patients:
        details.append(patients)
    details += [str(note) for note in run.evaluation.get("notes") or ()]
    return details


def _count_patches_of_students(run: RunFolder) -> float:
    """Return how many times the patches of a labeled step a student's step has; 1 if unknown."""
    batch, unlabeled = (parse_number(run.plan.get(key)) for key in ("batch", "num_unlabeled"))
    views = run.config.get("views") or ["strong"]
    return 1.0 + len(views) * (unlabeled or 0.0) / batch if batch else 1.0


def _baseline_steps(run: RunFolder) -> int | None:
    """Return the steps of round 0."""
    steps = parse_number((run.summary.get("baseline") or {}).get("steps"))
    if steps is None and run.rounds and run.rounds[0].index == 0:
        steps = parse_number(run.rounds[0].done.get("steps"))
    return None if steps is None else int(steps)


@dataclass(frozen=True)
class RoundRow:
    """One row of the table of rounds, as text; ``gate`` is passed, rejected or none."""

    label: str
    role: str
    delivered: bool
    steps: str
    seconds: str
    gate: str
    reasons: tuple[str, ...]
    learned: str
    kept_cases: str
    agreement: str
    coverage: str
    val: str
    test: str


def tabulate_rounds(run: RunFolder, names: Names) -> list[RoundRow]:
    """Return the table of rounds."""
    return [_describe_round(run, entry, names) for entry in run.rounds]


def _describe_round(run: RunFolder, entry: RoundFolder, names: Names) -> RoundRow:
    """Return the row of one round."""
    known = entry.known
    gate = known.get("gate") or {}
    passed = {True: "passed", False: "rejected"}[bool(gate["passed"])] if "passed" in gate else ""
    final = known.get("final") or {}
    accepted = [parse_number(row.get("accepted")) for row in entry.review]
    kept_cases = f"{int(sum(a or 0 for a in accepted))} of {len(accepted)}" if accepted else MISSING
    coverage = mean_known([parse_number(row.get("coverage")) for row in entry.review])
    agreement = parse_number(known.get("agreement"))
    if agreement is None:
        agreement = mean_known([parse_number(row.get("agreement")) for row in entry.review])
    test = parse_number((run.evaluation.get("rounds") or {}).get(entry.name))
    curve = entry.curves.get("val/dice")
    val = parse_number(final.get("val/dice")) or (curve[-1][1] if curve else None)
    unfinished = "" if entry.done else "not finished"
    return RoundRow(
        label=f"Round {entry.index}",
        role=unfinished or ("labels only" if entry.index == 0 else "student"),
        delivered=entry.name == run.delivered,
        steps=f"{int(steps):,}" if (steps := parse_number(known.get("steps"))) else MISSING,
        seconds=format_seconds(known.get("seconds")),
        gate=passed,
        reasons=tuple(names.clean_text(str(reason)) for reason in gate.get("reasons") or ()),
        learned=_describe_material(known),
        kept_cases=kept_cases,
        agreement=format_number(agreement),
        coverage=MISSING if coverage is None else f"{coverage:.0%}",
        val=format_number(val),
        test=format_number(test),
    )


def _describe_material(known: Mapping[str, Any]) -> str:
    """Return how many labeled and pseudo-labeled scans a round was trained on."""
    labeled, pseudo = (
        parse_number(known.get("num_labeled")),
        parse_number(known.get("num_unlabeled")),
    )
    if labeled is None:
        return MISSING
    return f"{labeled:.0f} + {pseudo:.0f}" if pseudo and known.get("round") else f"{labeled:.0f}"


def explain_row(row: Mapping[str, str], classes: Iterable[str], names: Names) -> str:
    """Return what speaks for annotating a scan beside its rank, from its row of review.csv."""
    reasons = []
    if parse_number(row.get("accepted")) == 0.0:
        why = names.clean_text(row.get("reason") or "")
        reasons.append(f"not used for training{f' ({why})' if why else ''}")
    agreement = parse_number(row.get("agreement"))
    if agreement is not None and agreement < 0.8:
        reasons.append(f"it changed since the round before: Dice {agreement:.2f}")
    coverage = {name: parse_number(row.get(f"coverage/{name}")) for name in classes}
    sizes = {
        n: parse_number(row.get(f"volume_ml/{n}") or row.get(f"area_px/{n}")) for n in coverage
    }
    known = {n: value for n, value in coverage.items() if value is not None and sizes[n] != 0}
    if known:
        name = min(known, key=lambda key: known[key])
        if known[name] < 0.7:
            reasons.append(f"only {known[name]:.0%} of {name} is trusted")
    return "; ".join(reasons)


def _spell(name: str) -> str:
    """Return "round 2" for round_2."""
    return name.replace("_", " ")


def _join(words: list[str]) -> str:
    """Return "a, b and c", shortened where there are many."""
    if len(words) > 8:
        return f"{len(words)} classes ({', '.join(words[:6])} and others)"
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
