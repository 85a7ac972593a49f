"""What the recipe gains over labels alone, and what each part of it is worth, over draws.

    python scripts/study.py DATA --csv docs/acdc_3.csv --draws 0,1,2 labeled=6 test=60
    python scripts/study.py DATA --csv docs/acdc_3.csv --table

For each draw of the labeled cases and each arm one row per test case goes to the CSV, which is all
that a study needs to go on: an arm that stands in it is never run again, on whatever machine. Rows
have a hash of the settings, and none are added to those of others. Arms of a draw share one round
0, which is trained anew where its run folder is gone; `round_0` is a hash of its weights. Several
processes may work on one CSV, each on its own draws or arms; to the tasks of an array of
scripts/slurm/study.sbatch the arms of all draws are dealt. As many tasks as draws have a draw each,
twice as many halve its arms, and so on; whoever comes first to a draw trains its round 0, for which
the others wait, but for `labels`, which have none. What labels alone reach does not change with the
recipe: --controls takes their rows from the CSV of a study of an earlier one. All arms train on the
same labels:

    round_0    labels alone, the steps of round 0
    labels     labels alone, one schedule, as many patch passes as the whole recipe (A)
    shadow     the recipe's rounds, restarts and labeled batches, unlabeled terms off (B)
    recipe     method=default (C)
    no_PART    the recipe's first student without a part (D), held against first_round; without MC
               dropout it is longer by the passes that this saves. no_second_round has one student
               with the passes of both, and is held against the recipe
    LEVER      the recipe's first student with another setting each, at the passes of first_round
    METHOD     another preset, such as fixmatch, at the passes of the whole recipe: those of round 0
               are its students' too where these have nothing of it
    all        labels alone, all labels but those of the test cases, longer: the plateau (E)

The first students of recipe and shadow are written down too, as first_round and shadow_first_round;
first_round is also an arm of its own, for studies of parts and levers alone. A pass is a patch that
goes forward and backward; forward alone is a third. What is compared are final weights: those of
the last round, whatever round its gates delivered. The table has differences with the draw as the
unit: two-way bootstrap over draws and patients, Student's t with the variance of both, and p-values
adjusted for the number of parts that were tried (Holm). `another start` says that an arm did not go
on from the round 0 of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from medssl import ranks
from medssl.config import Config, InputError, at_round
from medssl.cross_pseudo import CrossPseudo
from medssl.data.cases import Case
from medssl.metrics import (
    DrawDifference,
    adjust_holm,
    compare_cases,
    draw_difference,
    mean_known,
    read_table,
)
from medssl.objective import load_objective
from medssl.plan import Plan, count_unlabeled
from medssl.predict import WEIGHTS
from medssl.rounds.loop import STUDENT_KEYS
from medssl.rounds.run import count_models
from medssl.runs import hash_files, hold_lock, read_json, read_record, write_text
from medssl.settings import hash_config, list_methods, load_config

OFF = [
    "losses.pseudo_label.weight=0",
    "losses.consistency.weight=0",
    "losses.entropy.weight=0",
    "noise.mixing=none",
    "filter.threshold.name=none",
    "filter.uncertainty.source=none",
    "teacher.probs=clean",
]
PARTS = {
    "no_threshold": ["filter.threshold.name=none"],
    "no_mc_dropout": ["teacher.probs=clean", "filter.uncertainty.source=none"],
    "no_entropy": ["losses.entropy.weight=0"],
    "no_consistency": ["losses.consistency.weight=0"],
    "no_cutmix": ["noise.mixing=none"],
    "no_strong_noise": ["noise.strong=0", "noise.stochastic_depth=1.0"],
    "no_ema": ["teacher.source=[self]"],
    "no_warm_start": ["train.start=scratch"],
    "no_second_round": [],  # the steps of both in one
}
"""The recipe without one part each (D), after one student."""

LEVERS = {
    "two_unlabeled": ["train.unlabeled_ratio=2"],
    "bidirectional": ["noise.mixing=copy_paste"],
    "weight_2": [
        *("losses.pseudo_label.weight=2", "losses.pseudo_label.ramp.name=constant"),
        *("losses.consistency.weight=2", "losses.consistency.ramp.name=constant"),
    ],
    "pseudo_ce": ["losses.pseudo_label.name=ce", "losses.pseudo_label.weight=2"],
    "ce_students": ["losses.pseudo_label.name=ce", "losses.supervised.student=ce"],
    "transport": ["target.assignment=transport", "target.transport.prior=labeled"],
    "all_voxels": ["losses.pseudo_label.voxels=all"],
    "soft_target": ["losses.pseudo_label.voxels=all", "target.kind=soft"],
    "lower_lr": ["train.student_lr=1e-3"],
    "pretrain": ["train.schedule=pretrain", "train.fine_tune.share=0.2"],
    **{
        f"{name}_threshold": [f"filter.threshold.name={name}"]
        for name in ("fixed", "curriculum", "free", "soft", "quantile")
    },
}
"""What the recipe might have in place of its settings, after one student."""

METHODS = tuple(name for name in list_methods() if name not in ("default", "labels_only"))
"""Presets to hold the recipe against."""

FORMER_LEVERS = ("filtered_target", "plain_teacher", "both_geometries", "teacher_places")
"""Levers whose setting is gone, since it cost more than it brought; their rows stand."""

ALONE = ("round_0", "labels", "all")
"""Arms without a student."""

MAIN_ARMS = ("round_0", "labels", "shadow", "recipe")
FIRST_STUDENTS = {"recipe": "first_round", "shadow": "shadow_first_round"}
ONE_STUDENT = {*PARTS, *LEVERS} - {"no_second_round"}  # as long as the recipe's first student
ARMS = (
    *("round_0", "labels", "shadow_first_round", "shadow", "first_round", "recipe"),
    *(*PARTS, *LEVERS, *METHODS, "all"),
)
FORWARD = 1 / 3  # of a pass


@dataclass(frozen=True)
class Study:
    """What all arms of a study share.

    ``settings`` are the key=value of all runs, ``work`` the folder of their run folders,
    ``plateau`` the steps of the arm ``all``, ``controls`` another CSV with labels alone.
    """

    data: str
    settings: tuple[str, ...]
    csv: Path
    work: Path
    plateau: int
    controls: Path | None = None


def run_command(*arguments: str) -> None:
    """Run a medssl command, in one process, and stop if it fails."""
    print("medssl", " ".join(arguments), flush=True)
    command = [sys.executable, "-m", "medssl", *arguments]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    code = subprocess.run(command, check=False, env=alone).returncode
    if code not in (0, 3):
        raise SystemExit(code)


def finish_run(
    data: str, folder: Path, settings: Sequence[str], options: Sequence[str] = ()
) -> dict[str, Any]:
    """Train and evaluate one run, unless that is done; return its summary.

    A finished run is gone through all the same: it refuses other settings than its own.
    """
    run_command("train", data, *settings, *options, "--run", str(folder))
    measured = folder / "evaluation" / "summary.json"
    if not measured.is_file() or read_json(measured)["failed"]:
        run_command("evaluate", str(folder))
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def run_arm(study: Study, draw: int, arm: str) -> None:
    """Run an arm of a draw, unless it stands in the CSV, and add its rows.

    Raises:
        InputError: The CSV has rows of other settings.
    """
    refuse_mixture(study)
    if is_finished(study, draw, arm):
        return
    if arm == "all" and take_over(study, draw, arm, study.plateau):
        return
    folder = study.work / f"draw_{draw}_{arm}"
    settings = [*study.settings, f"draw={draw}"]
    if arm == "all":
        settings = [s for s in settings if not s.startswith(("labeled=", "draw="))]
        settings += ["validation=0", "rounds=0", f"steps={study.plateau}"]
        add_rows(study, draw, arm, folder, finish_run(study.data, folder, settings))
        return
    first = study.work / f"draw_{draw}_round_0"
    if arm == "labels" and find_plans(study):
        run_labels(study, draw, folder, settings)
        return
    with hold_lock(first.with_suffix(".lock")):  # the tasks of an array may share a draw
        summary = finish_run(study.data, first, [*settings, "rounds=0"])
        add_rows(study, draw, "round_0", first, summary)
    if arm == "round_0":
        return
    if arm == "labels":
        run_labels(study, draw, folder, settings)
    else:
        changes = {"shadow": OFF, "first_round": ["rounds=1"], **PARTS, **LEVERS}.get(arm, [])
        if arm in PARTS or arm in LEVERS:
            as_long_as = [*settings, "rounds=1"] if arm in ONE_STUDENT else settings
            changes = [*changes, "rounds=1"]
            changes += [stretch_steps(study, as_long_as, changes)]
        elif arm in METHODS:
            changes = [f"method={arm}", stretch_steps(study, settings, [f"method={arm}"])]
        options = ["--round-0", str(first)] if shares_round_0(settings, changes) else []
        summary = finish_run(study.data, folder, [*settings, *changes], options)
        add_rows(study, draw, arm, folder, summary)
        if first_student := FIRST_STUDENTS.get(arm):
            add_rows(study, draw, first_student, folder, summary, last=1)


def run_labels(study: Study, draw: int, folder: Path, settings: Sequence[str]) -> None:
    """Train labels alone as long as the whole recipe, or take over what a study of before has."""
    steps = count_labels_steps(study, settings)
    if not take_over(study, draw, "labels", steps):
        longer = [*settings, "rounds=0", f"steps={steps}"]
        add_rows(study, draw, "labels", folder, finish_run(study.data, folder, longer))


def take_over(study: Study, draw: int, arm: str, steps: int) -> bool:
    """Add the rows that the study of ``controls`` has of an arm without students.

    Args:
        study: The study.
        draw: Of the labeled cases.
        arm: Its name.
        steps: As many as it has here.

    Returns:
        Whether there are any.

    Raises:
        InputError: They were made with other settings, or other steps.
    """
    rows = read_rows(study.controls) if study.controls else []
    rows = [row for row in rows if has_arm([row], draw, arm)]
    ours = {(hash_settings(study, arm), str(steps))}
    if rows and {(row.get("settings"), row["steps"]) for row in rows} != ours:
        raise InputError(
            f"--controls {study.controls}: {arm} of draw {draw} has other settings or steps than "
            f"here ({steps}); leave the option out, and it is trained anew"
        )
    append_lines(study.csv, draw, arm, rows)
    return bool(rows)


def shares_round_0(settings: Sequence[str], changes: Sequence[str]) -> bool:
    """Return whether changed settings have the same round 0; a preset may have another average."""
    configs = (load_config(None, [*settings, *extra]).config for extra in ([], changes))
    one, other = (hash_config(config, STUDENT_KEYS) for config in configs)
    return one == other


def deal_arms(draws: Sequence[int], arms: Sequence[str]) -> list[tuple[int, str]]:
    """Return the draws and arms that are this process's, draw by draw.

    They are dealt arm by arm, so that tasks whose number is a multiple of that of the draws have
    one draw each, and next to nothing to wait for.
    """
    return sorted(ranks.deal([(draw, arm) for arm in arms for draw in draws]), key=itemgetter(0))


def is_finished(study: Study, draw: int, arm: str) -> bool:
    """Return whether an arm of a draw stands in the CSV."""
    return has_arm(read_rows(study.csv), draw, arm)


def has_arm(rows: Sequence[Mapping[str, str]], draw: int, arm: str) -> bool:
    """Return whether an arm of a draw stands in rows of the CSV."""
    return any((row["draw"], row["arm"]) == (str(draw), arm) for row in rows)


def find_run(work: Path, draw: int, arm: str) -> Path:
    """Return the run folder of an arm of a draw.

    Args:
        work: The --out of a study.
        draw: Of the labeled cases.
        arm: Its name.

    Raises:
        InputError: There is none.
    """
    if not work.is_dir():
        raise InputError(f"{work}: no such folder; it is the --out of scripts/study.py")
    folder = work / f"draw_{draw}_{arm}"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; draws and arms are those of scripts/study.py")
    return folder


def read_plan(study: Study, settings: Sequence[str]) -> tuple[Config, Plan]:
    """Return the configuration of settings, and the plan of this study's runs."""
    config = load_config(study.data, list(settings)).config
    return config, read_record(find_plans(study)[0], Plan)


def find_plans(study: Study) -> list[Path]:
    """Return the plans of the runs that this machine has: all arms and draws have the same."""
    return sorted(study.work.glob("draw_*_round_0/plan.json"))


def count_labels_steps(study: Study, settings: Sequence[str]) -> int:
    """Return the steps of labels alone that are as many patch passes as the whole recipe."""
    return round(sum(count_passes(study, settings)) / read_plan(study, settings)[1].batch)


def count_passes(study: Study, settings: Sequence[str]) -> list[float]:
    """Return the patch passes of each round: students', and the online teacher's at a third.

    Of an ensemble all models count, and of cross pseudo supervision both students.
    """
    config, plan = read_plan(study, settings)
    steps = plan_steps(config, plan)
    rounds = config.train.rounds
    passes = [float(plan.batch * at_round(steps, 0) * count_models(config, 0, rounds))]
    online = count_online_passes(config)
    students = 2 if load_objective(config.objective) is CrossPseudo else 1
    for index in range(1, rounds + 1):
        unlabeled = count_unlabeled(config, plan.batch, index)
        per_step = plan.batch + unlabeled * (len(config.views) + online * FORWARD)
        models = students * count_models(config, index, rounds)
        passes.append(models * per_step * at_round(steps, index))
    return passes


def count_online_passes(config: Config) -> int:
    """Return how often an online teacher sees a patch in a step; 0 where there is none."""
    is_offline = "previous_round" in config.teacher.source
    is_idle = is_offline and config.losses.consistency.weight == 0
    if is_idle or config.teacher.source == ("previous_round",):
        return 0
    section = config.filter.uncertainty
    sampled = section.passes if section.online_passes == "auto" else section.online_passes
    if config.teacher.probs == "sampled":
        return sampled
    return 1 + sampled if section.is_limited and not is_offline else 1


def plan_steps(config: Config, plan: Plan) -> int | tuple[int, ...]:
    """Return the steps of the rounds, those of the plan where none are given."""
    return plan.steps if config.train.steps == "auto" else config.train.steps


def stretch_steps(study: Study, settings: Sequence[str], changes: Sequence[str]) -> str:
    """Return the setting of steps with which changed settings have as many passes.

    Round 0 is shared, so that its steps stay. Students who have nothing of it, being from scratch
    with an online teacher, get its passes; more models of it than the one that is shared cost some.
    """
    whole, less = (count_passes(study, [*settings, *extra]) for extra in ([], changes))
    config, plan = read_plan(study, [*settings, *changes])
    budget = sum(whole[1:]) - (less[0] - whole[0])
    is_alone = config.train.start == "scratch" and "previous_round" not in config.teacher.source
    if is_alone and config.method in METHODS:
        budget += whole[0]
    steps = plan_steps(config, plan)
    factor = budget / sum(less[1:])
    longer = [round(at_round(steps, index) * factor) for index in range(1, len(less))]
    return f"steps={[at_round(steps, 0), *longer]}"


def add_rows(
    study: Study,
    draw: int,
    arm: str,
    folder: Path,
    summary: Mapping[str, Any],
    last: int | None = None,
) -> None:
    """Add the test cases of an arm to the CSV, from its evaluation, unless they stand there.

    Args:
        study: The study.
        draw: Of the labeled cases.
        arm: Its name.
        folder: Its run.
        summary: Of the run.
        last: The round that is measured, and up to which steps and minutes count; None: all.
    """
    rounds = [r for r in summary["rounds"] if last is None or r["round"] <= last]
    place = folder / f"evaluation/round_{rounds[-1]['round']}"
    place = place if place.is_dir() else folder / "evaluation"
    about = {
        "steps": sum(r["steps"] for r in rounds),
        "minutes": round(sum(r["seconds"] for r in rounds) / 60, 1),
        "revision": str(read_json(folder / "provenance.json")["revision"])[:10],
        "precision": read_record(folder / "plan.json", Plan).precision,
        "settings": hash_settings(study, arm),
        "round_0": hash_files(folder / "round_0" / "model", WEIGHTS)[WEIGHTS][:10],
    }
    append_rows(study.csv, draw, arm, about, read_table(place / "per_case.csv"))


def hash_settings(study: Study, arm: str) -> str:
    """Return a hash of what all draws of an arm have in common, wherever its data lie.

    Of labels alone, what is set for students is no part of it.
    """
    config = load_config(study.data, list(study.settings)).config
    steps = ("train.rounds", "train.steps")
    others = [key for key in STUDENT_KEYS if key not in steps] if arm in ALONE else []
    return hash_config(config, ("data.root", "data.draw", *others))[:10]


def refuse_mixture(study: Study) -> None:
    """Refuse to add to a CSV whose rows have other settings, or defaults of another version.

    Raises:
        InputError: It has such rows.
    """
    theirs = {(row["arm"] in ALONE, row.get("settings", "")) for row in read_rows(study.csv)}
    if theirs - {(arm in ALONE, hash_settings(study, arm)) for arm in ("labels", "recipe")}:
        raise InputError(
            f"{study.csv}: its rows were made with other settings, or with other defaults of an "
            "older version; give another --csv, or the settings that they were made with"
        )


def append_rows(
    path: Path,
    draw: int,
    arm: str,
    about: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
) -> None:
    """Add the test cases of an arm to the CSV, unless they stand there.

    Args:
        path: The CSV.
        draw: Of the labeled cases.
        arm: Its name.
        about: steps, minutes, revision, precision and whatever else is the same for all cases.
        cases: Rows of an evaluation, of which the Dice is taken.
    """
    rows = []
    for case in cases:
        dice = {k: v for k, v in case.items() if k == "dice" or k.startswith("dice/")}
        ids = {k: case[k] for k in ("case_id", "patient_id")}
        cells = {k: "" if v is None else f"{float(v):.5f}" for k, v in dice.items()}
        rows.append({"draw": draw, "arm": arm, **about, **ids, **cells})
    append_lines(path, draw, arm, rows)


def append_lines(path: Path, draw: int, arm: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows of an arm to the CSV, unless it stands there."""
    with hold_lock(path.with_suffix(".lock")):
        before = read_rows(path)
        if not has_arm(before, draw, arm):
            write_csv(path, [*before, *rows])


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a study's CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows; what a row lacks of the columns of all is empty."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def format_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as a table."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(str(row[key]) for key in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


Row = dict[str, float | None]
"""The columns `dice` and `dice/<class>` of a case; None is n/a."""

Arm = dict[int, dict[str, Row]]
"""Draw -> case_id -> row."""


def read_arms(path: Path) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the Dice of all arms in a CSV, and the patient of each case."""
    arms: dict[str, Arm] = {}
    patients: dict[str, str] = {}
    for row in read_rows(path):
        dice = {k: float(v) if v else None for k, v in row.items() if k.startswith("dice")}
        arms.setdefault(row["arm"], {}).setdefault(int(row["draw"]), {})[row["case_id"]] = dice
        patients[row["case_id"]] = row["patient_id"]
    return arms, patients


def compare_arms(
    ours: Arm, theirs: Arm, patients: Mapping[str, str]
) -> tuple[DrawDifference, int] | None:
    """Return the difference of two arms over the draws that both have, and their number."""
    table, cases = subtract_arms(ours, theirs)
    if not table:
        return None
    return draw_difference(table, [patients[case] for case in cases]), len(table)


def subtract_arms(ours: Arm, theirs: Arm) -> tuple[list[list[float | None]], list[str]]:
    """Return the differences of two arms, a list for each draw that both have, and their cases."""
    draws = [draw for draw in ours if draw in theirs]
    cases = sorted(ours[draws[0]]) if draws else []
    table = []
    for draw in draws:
        a, b = compare_cases([[arm[draw][case] for case in cases] for arm in (ours, theirs)])
        pairs = zip(a, b, strict=True)
        table.append([None if x is None or y is None else x - y for x, y in pairs])
    return table, cases


def pick_better(arms: Mapping[str, Arm]) -> tuple[str, Arm] | None:
    """Return the better of labels alone and shadow run, by their mean over the recipe's draws.

    Where no draw of the recipe has both, the one that has more of its draws.
    """
    recipe = set(arms.get("recipe", {}))
    controls = {n: arms[n] for n in ("labels", "shadow") if recipe & set(arms.get(n, {}))}
    if not controls:
        return None
    shared = recipe.intersection(*map(set, controls.values()))
    if not shared:
        best = max(controls, key=lambda name: len(recipe & set(controls[name])))
        return best, controls[best]
    means = dict.fromkeys(controls, 0.0)
    for draw in shared:
        cases = sorted(next(iter(controls.values()))[draw])
        sides = compare_cases([[arm[draw][case] for case in cases] for arm in controls.values()])
        for name, dice in zip(controls, sides, strict=True):
            means[name] += (mean_known(dice) or 0.0) / len(shared)
    better = max(means, key=lambda name: means[name])
    return better, controls[better]


def average_dice(cases: Mapping[str, Row]) -> float:
    """Return the mean Dice of an arm alone: n/a is in no mean; NaN where all is."""
    mean = mean_known(row["dice"] for row in cases.values())
    return math.nan if mean is None else mean


def tabulate_arms(path: Path) -> list[dict[str, Any]]:
    """Return one row per arm: Dice, and differences to round 0, the controls and the recipe."""
    arms, patients = read_arms(path)
    starts = read_starts(path)
    rows = []
    parts = []
    like_first = {*ONE_STUDENT, *FORMER_LEVERS}
    for name in (arm for arm in (*ARMS, *FORMER_LEVERS) if arm in arms):
        arm = arms[name]
        means = {draw: average_dice(cases) for draw, cases in sorted(arm.items())}
        row: dict[str, Any] = {
            "arm": name,
            "draws": ", ".join(map(str, means)),
            "dice": f"{sum(means.values()) / len(means):.4f}",
            "per draw": ", ".join(f"{value:.3f}" for value in means.values()),
        }
        for other in MAIN_ARMS:
            is_first = name in like_first or (name, other) == ("first_round", "shadow")
            like = FIRST_STUDENTS.get(other, other) if is_first else other
            difference = compare_arms(arm, arms.get(like, {}), patients) if name != other else None
            row[f"minus {other}"] = "" if difference is None else format_difference(difference[0])
            if difference and difference[1] < len(arm):
                shared = sorted(set(arm) & set(arms[like]))
                word = "draws" if len(shared) > 1 else "draw"
                row[f"minus {other}"] += f"; {word} {', '.join(map(str, shared))} alone"
            if difference and other == "round_0" and has_another_start(starts, name):
                row["minus round_0"] += "; another start"
            if (
                difference
                and other == "recipe"
                and name in PARTS
                and difference[0]["p"] is not None
            ):
                parts.append((len(rows), difference[0]["p"]))
        row["p (Holm)"] = ""
        rows.append(row)
    untested = sum(name in arms for name in PARTS) - len(parts)  # of one draw: a part all the same
    adjusted = adjust_holm([p for _, p in parts] + [1.0] * untested)
    for (place, _), p in zip(parts, adjusted, strict=False):
        rows[place]["p (Holm)"] = f"{p:.2g}"
    return rows


def read_starts(path: Path) -> dict[tuple[str, str], str]:
    """Return the hash of round 0 by arm and draw; of the arms that say which they went on from."""
    rows = read_rows(path)
    return {(row["arm"], row["draw"]): row["round_0"] for row in rows if row.get("round_0")}


def has_another_start(starts: Mapping[tuple[str, str], str], arm: str) -> bool:
    """Return whether an arm went on from another round 0 than the one of the same name."""
    if arm in (*METHODS, "labels", "all"):
        return False  # a training of its own
    return any(
        start != starts.get(("round_0", draw), start)
        for (name, draw), start in starts.items()
        if name == arm
    )


def format_difference(difference: DrawDifference) -> str:
    """Return a difference with its bootstrap interval and, with several draws, that of t."""
    text = f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    if difference["t_low"] is not None:
        text += f"; t [{difference['t_low']:+.3f}, {difference['t_high']:+.3f}]"
    return text


def make_parser(about: str) -> argparse.ArgumentParser:
    """Return a parser of data, key=value settings, --csv, --out and --draws; lists have commas."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("data", help="as of `medssl train`")
    parser.add_argument("settings", nargs="*", help="key=value for all runs")
    parser.add_argument("--csv", type=Path, required=True, help="rows of the finished arms")
    parser.add_argument("--out", type=Path, help="of the runs; by default runs/ and the CSV's name")
    parser.add_argument("--draws", type=split_numbers, default=[0, 1, 2])
    return parser


def read_study(options: argparse.Namespace, plateau: int = 0) -> Study:
    """Return the study that was asked for: each CSV has a folder of its own."""
    work = options.out or Path("runs") / options.csv.stem
    controls = getattr(options, "controls", None)
    return Study(options.data, tuple(options.settings), options.csv, work, plateau, controls)


def make_measuring_parser(about: str, cases: str) -> argparse.ArgumentParser:
    """Return a parser of what measures the runs of a study into a CSV.

    Args:
        about: Docstring of the script.
        cases: Which ones --cases takes.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("runs", type=Path, help="--out of scripts/study.py")
    parser.add_argument("--csv", type=Path, required=True, help="rows of what was measured")
    parser.add_argument("--draws", type=split_numbers, default=[0, 1, 2])
    parser.add_argument("--arms", type=split_arms, default=["labels", "recipe"])
    parser.add_argument("--cases", type=int, help=f"{cases}; all by default")
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    return parser


def spread(cases: Sequence[Case], number: int | None) -> list[Case]:
    """Return as many cases, evenly over all of them: neighbors are often alike; None: all."""
    count = len(cases) if number is None else min(number, len(cases))
    return [cases[int(place)] for place in np.linspace(0, len(cases) - 1, count)]


def split_numbers(text: str) -> list[int]:
    """Return the numbers of a list such as 0,1,2."""
    return [int(number) for number in text.split(",")]


def split_names(text: str, known: Iterable[str], kind: str) -> list[str]:
    """Return the names of a list such as labels,recipe, all of which are known."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        choices = ", ".join(known)
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no {kind}; there are {choices}")
    return names


split_arms = functools.partial(split_names, known=ARMS, kind="arm")


@contextlib.contextmanager
def explain_mistakes() -> Iterator[None]:
    """End the program with exit code 2 and what has to be repaired, after an InputError."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def refuse_missing(path: Path) -> None:
    """Refuse to print the tables of a CSV that is not there.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is written as arms are finished")


def main() -> None:
    """Run the arms of all draws, and print the table of the CSV."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--arms", type=split_arms, default=["round_0", "labels", "shadow", "recipe"]
    )
    parser.add_argument("--controls", type=Path, help="CSV of an earlier study with labels alone")
    parser.add_argument("--plateau", type=int, default=7000, help="steps of the arm `all`")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    options = parser.parse_intermixed_args()
    study = read_study(options, options.plateau)
    with explain_mistakes():
        for draw, arm in [] if options.table else deal_arms(options.draws, options.arms):
            run_arm(study, draw, arm)
        refuse_missing(study.csv)
        print(format_markdown(tabulate_arms(study.csv)))


if __name__ == "__main__":
    main()
