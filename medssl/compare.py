"""Runs, rounds or evaluation folders side by side: paired differences with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.config import InputError
from medssl.data.trained import NO_TEST
from medssl.metrics import (
    ID_COLUMNS,
    MIN_CASES_FOR_VERDICT,
    Difference,
    Row,
    bootstrap_mean,
    compare_cases,
    draw_difference,
    fill_absent,
    format_estimate,
    judge,
    mean_known,
    paired_difference,
    read_table,
)
from medssl.runs import read_json

Cell = float | None
Table = dict[str, dict[str, Cell]]  # columns by case_id
Side = Sequence[Cell]
NAME_WIDTH = 22  # of a table's first column


@dataclass(frozen=True)
class Arm:
    """What is compared: one evaluation, or several seeds or draws of one arm.

    Attributes:
        name: As shown.
        tables: Columns of ``per_case.csv`` by case_id, of each evaluation.
        cases: The same, averaged over the evaluations within each case.
        patients: The patient of each case.
        num_left_out: Cases that only some of the evaluations have.
        remarks: Of the evaluations, on cases that the model may have been trained on.
    """

    name: str
    tables: tuple[Table, ...]
    cases: Table
    patients: dict[str, str]
    num_left_out: int
    remarks: tuple[str, ...] = ()


def compare(paths: Sequence[str | Path]) -> tuple[str, list[dict[str, Any]]]:
    """Compare arms on the cases that all of them have; differences are to the first arm.

    Args:
        paths: Each a run, a round (``RUN/round_0``) or an evaluation folder that holds
            ``per_case.csv``; ``arm=path1,path2`` takes several seeds or draws as one arm: averages
            within each case, and differences run by run, in the order given, to as many of the
            first arm, or to its only one, whose own chance no interval shows then.

    Returns:
        The table as text, at most 100 columns wide, and one row per arm: ``name, num_tables, n,
        dice, difference, verdict, classes``; in ``classes``, by name, ``dice, hd95_mm (or
        hd95_px), num_missed, difference``. ``dice`` is the mean over classes in each case.

    Raises:
        InputError: A path has no evaluation, or no case or class is common to all arms, or the
            references of a case differ between arms.
    """
    if len(paths) < 2:
        raise InputError("compare needs at least two runs, rounds or evaluation folders")
    parsed = [_parse_arm(str(path)) for path in paths]
    names = _name_apart([name or parts[0] for name, parts in parsed], [n for n, _ in parsed if n])
    arms = [_read_arm(name, parts) for name, (_, parts) in zip(names, parsed, strict=True)]
    shared = [case_id for case_id in arms[0].cases if all(case_id in a.cases for a in arms)]
    num_all = len({case_id for arm in arms for case_id in arm.cases})
    if not shared:
        examples = "; ".join(f"{a.name}: {', '.join([*a.cases][:2]) or 'none'}" for a in arms)
        raise InputError(
            f"no case was evaluated in all {len(arms)} arms ({examples}); evaluate all of them on "
            "the same data"
        )
    classes, dropped = _find_classes(arms)
    _check_references(arms, shared, classes)
    rows = _compare_arms(arms, shared, classes)
    notes = [f"{len(shared)} cases, evaluated in all {len(arms)} arms"]
    if num_all > len(shared):
        notes[0] += f"; {num_all - len(shared)} others only in some are left out"
    if dropped:
        notes.append(f"classes that only some arms have are left out: {', '.join(dropped)}")
    notes += [
        f"{arm.name}: {arm.num_left_out} cases that not all of its evaluations have are left out"
        for arm in arms
        if arm.num_left_out
    ]
    notes += [f"{arm.name}: {remark}" for arm in arms for remark in arm.remarks]
    return _render(rows, classes, notes), rows


def _parse_arm(text: str) -> tuple[str, list[str]]:
    """Return the name, empty if none is given, and the paths of ``path`` or ``arm=path1,path2``."""
    if Path(text).exists() or "=" not in text:
        return "", [text]
    name, _, rest = text.partition("=")
    paths = [rest] if rest and Path(rest).exists() else [part for part in rest.split(",") if part]
    if not paths or not name:
        raise InputError(f"{text!r}: expected a path, or arm=path1,path2")
    return name, paths


def _name_apart(texts: Sequence[str], named: Sequence[str]) -> list[str]:
    """Shorten paths to what follows the folders that they share; names that the user chose stay."""
    paths = {text: Path(text).parts for text in texts if text not in named}
    parts = {t: p[:-1] if p[-1:] == ("evaluation",) else p for t, p in paths.items()}
    shared = 0
    while all(len(p) > shared + 1 for p in parts.values()) and (
        len({p[shared] for p in parts.values()}) == 1
    ):
        shared += 1
    if shared and any(p[shared].startswith("round_") for p in parts.values()):
        shared -= 1  # a round says nothing without its run
    names = [Path(*parts[t][shared:]).as_posix() if t in parts else t for t in texts]
    if len(set(names)) < len(names):
        names = [f"{index}: {name}" for index, name in enumerate(names, 1)]
    return names


def _read_arm(name: str, paths: Sequence[str]) -> Arm:
    """Read the evaluations of an arm and average them within each case."""
    places = [_find_table(Path(path)) for path in paths]
    read = [_read_cases(place) for place in places]
    tables = [table for table, _ in read]
    patients = _join_patients([patients for _, patients in read])
    remarks = dict.fromkeys(remark for place in places for remark in _read_remarks(place))
    every = {case_id for table in tables for case_id in table}
    shared = [case_id for case_id in tables[0] if all(case_id in table for table in tables)]
    cases = {case_id: _average([table[case_id] for table in tables]) for case_id in shared}
    return Arm(name, tuple(tables), cases, patients, len(every) - len(shared), tuple(remarks))


def _read_remarks(table: Path) -> list[str]:
    """Return what the evaluation of a table said of cases that the model may have seen."""
    path = table.with_name("summary.json")
    return [str(r) for r in read_json(path).get("remarks") or []] if path.is_file() else []


def _join_patients(named: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the patient of each case; cases are of one patient if any of the tables says so.

    Args:
        named: The patient by case_id, of each table.
    """
    joined: dict[str, str] = {}
    for patients in named:
        known: dict[str, str] = {}  # by the name in this table, that in the joined one
        for case_id, patient in patients.items():
            new = joined.setdefault(case_id, case_id)
            old = known.setdefault(patient, new)
            if old != new:
                joined = {case: old if name == new else name for case, name in joined.items()}
                known = {case: old if name == new else name for case, name in known.items()}
    return joined


def _find_table(path: Path) -> Path:
    """Return the ``per_case.csv`` of a run, round or evaluation folder.

    Raises:
        InputError: There is none; says how to make it.
    """
    options = [path / "per_case.csv", path / "evaluation" / "per_case.csv"]
    options.append(path.parent / "evaluation" / path.name / "per_case.csv")
    if path.is_file():
        options = [path]
    for option in options:
        if option.is_file():
            return option
    if not path.exists():
        raise InputError(f"{path}: no such run, round or evaluation folder")
    run = path.parent if path.name.startswith("round_") else path
    raise InputError(f"{path}: has not been evaluated; {_say_how_to_evaluate(run, path)}")


def _say_how_to_evaluate(run: Path, path: Path) -> str:
    """Return the command that makes a table: not `evaluate RUN` for a run without test cases."""
    splits = run / "splits.json"
    if not splits.is_file() or read_json(splits).get("test"):
        return f"run: medssl evaluate {run}"
    folds = run / "cross_check"
    measured = f" (or compare its folds: {folds})" if (folds / "per_case.csv").is_file() else ""
    return (
        f"the run has no test cases of its own, so measure it and each other one on labeled scans "
        f"that are new to all: medssl evaluate {path} DATA --out EVALUATION_OF_{run.name}, and "
        f"compare these folders: medssl compare EVALUATION_OF_{run.name} ...{measured}"
    )


def _read_cases(path: Path) -> tuple[Table, dict[str, str]]:
    """Return the numbers of a ``per_case.csv``, and the patients, by case_id."""
    rows: list[Row] = read_table(path)
    cases = {
        str(row["case_id"]): {
            key: None if value is None else float(value)
            for key, value in row.items()
            if key not in ID_COLUMNS
        }
        for row in rows
    }
    if len(cases) < len(rows):
        raise InputError(f"{path}: a case_id stands twice; run medssl evaluate again")
    return cases, {str(row["case_id"]): str(row["patient_id"]) for row in rows}


def _average(rows: Sequence[Mapping[str, Cell]]) -> dict[str, Cell]:
    """Return one case averaged over evaluations.

    Where some have a false alarm, the n/a of the others is a perfect value: see `medssl.metrics`.
    """
    averaged = {}
    for column in (column for column in rows[0] if all(column in row for row in rows)):
        values = [row[column] for row in rows]
        filled = fill_absent([[value] for value in values], _find_perfect(column))
        averaged[column] = mean_known(value for (value,) in filled)
    return averaged


def _find_perfect(column: str) -> float:
    """Return the best value of a metric."""
    return 0.0 if column.startswith("hd95") else 1.0


def _find_classes(arms: Sequence[Arm]) -> tuple[list[str], list[str]]:
    """Return the classes that all arms have, and the others."""
    per_arm = [
        [c.partition("/")[2] for c in next(iter(arm.cases.values())) if c.startswith("dice/")]
        for arm in arms
        if arm.cases
    ]
    shared = [name for name in per_arm[0] if all(name in names for names in per_arm)]
    if not shared:
        listed = "; ".join(f"{a.name}: {', '.join(n)}" for a, n in zip(arms, per_arm, strict=False))
        raise InputError(f"the arms have no class in common ({listed})")
    return shared, sorted({name for names in per_arm for name in names} - set(shared))


def _check_references(arms: Sequence[Arm], shared: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse evaluations whose references of a case_id have other volumes: other labels."""
    first = arms[0].tables[0]
    for arm, table in [(each, table) for each in arms for table in each.tables]:
        for case_id in shared:
            for name in classes:
                ours, theirs = (_get_reference(t[case_id], name) for t in (first, table))
                if ours is None or theirs is None or np.isclose(ours, theirs, rtol=1e-3):
                    continue
                unit = "ml" if f"reference_ml/{name}" in first[case_id] else "pixels"
                raise InputError(
                    f"{case_id}: the reference of {name!r} is {ours:.4g} {unit} in {arms[0].name} "
                    f"and {theirs:.4g} {unit} in {arm.name}: not the same label; evaluate both on "
                    "the same data"
                )


def _get_reference(case: Mapping[str, Cell], name: str) -> Cell:
    """Return the volume of a class in the reference of a case."""
    return case.get(f"reference_ml/{name}", case.get(f"reference_px/{name}"))


def _compare_arms(
    arms: Sequence[Arm], shared: Sequence[str], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the row of each arm."""
    columns = [f"dice/{name}" for name in classes]

    def pick(table: Table) -> list[dict[str, Cell]]:
        return [{c: table[i][c] for c in columns} for i in shared]

    joined = _join_patients([arm.patients for arm in arms])
    patients = [joined[case_id] for case_id in shared]
    entries = [_compare_class(arms, shared, patients, name) for name in classes]
    rows = []
    for index, dice in enumerate(compare_cases([pick(arm.cases) for arm in arms])):
        estimate = bootstrap_mean(dice, patients=patients)
        pairs = _pair_tables(arms[index], arms[0])
        sides = [compare_cases([pick(ours), pick(theirs)]) for ours, theirs in pairs]
        difference = _find_difference(sides, patients) if index else None
        verdict = judge(difference)
        if verdict != "not measured" and not _are_comparable(arms[index], arms[0]):
            verdict = "no verdict"
        rows.append(
            {
                "name": arms[index].name,
                "num_tables": len(arms[index].tables),
                "n": estimate["n"],
                "dice": estimate,
                "difference": difference,
                "verdict": verdict if index else None,
                "classes": {c: e[index] for c, e in zip(classes, entries, strict=True)},
            }
        )
    return rows


def _are_comparable(ours: Arm, theirs: Arm) -> bool:
    """Return whether a verdict may be given: as many evaluations, of cases that are new to all.

    An only run that several are held against has its luck in every pair alike, where no spread
    shows it.
    """
    is_test = not any(NO_TEST in remark for arm in (ours, theirs) for remark in arm.remarks)
    return is_test and len(ours.tables) == len(theirs.tables)


def _are_paired(ours: Arm, theirs: Arm) -> bool:
    """Return whether each evaluation of an arm has one of the other to be held against."""
    sizes = {len(ours.tables), len(theirs.tables)}
    return len(sizes) == 1 or 1 in sizes


def _pair_tables(ours: Arm, theirs: Arm) -> list[tuple[Table, Table]]:
    """Return the evaluations of two arms in pairs; an only one is in all of them.

    Of arms of other numbers the averages are the one pair.
    """
    if not _are_paired(ours, theirs):
        return [(ours.cases, theirs.cases)]
    count = max(len(ours.tables), len(theirs.tables))
    longer = [
        arm.tables if len(arm.tables) == count else arm.tables * count for arm in (ours, theirs)
    ]
    return list(zip(*longer, strict=True))


def _find_difference(pairs: Sequence[Sequence[Side]], patients: Sequence[str]) -> Difference:
    """Return the mean difference over runs and cases with its interval and p.

    Of several runs both are Student's t with the variance of runs and patients: see
    ``medssl.metrics.draw_difference``.

    Args:
        pairs: Of each run our values and the others', of the same cases.
        patients: The patient of each case.
    """
    ours, theirs = (
        [mean_known(values) for values in zip(*side, strict=True)]
        for side in zip(*pairs, strict=True)
    )
    difference = paired_difference(ours, theirs, patients=patients)
    if len(pairs) == 1 or difference["mean"] is None:
        return difference
    table = [
        [None if a is None or b is None else a - b for a, b in zip(*fill_absent(pair), strict=True)]
        for pair in pairs
    ]
    over_runs = draw_difference(table, patients)
    return {
        **difference,
        "mean": over_runs["mean"],
        "low": over_runs["t_low"],
        "high": over_runs["t_high"],
        "p": over_runs["p"],
    }


def _compare_class(
    arms: Sequence[Arm], shared: Sequence[str], patients: Sequence[str], name: str
) -> list[dict[str, Any]]:
    """Return the entry of a class in the row of each arm."""

    def get_columns(metric: str) -> list[list[Cell]]:
        return [[arm.cases[i].get(f"{metric}/{name}") for i in shared] for arm in arms]

    in_mm = all(f"hd95_mm/{name}" in arm.cases[i] for arm in arms for i in shared)
    hd95 = "hd95_mm" if in_mm else "hd95_px"
    dice, distances, missed = (get_columns(metric) for metric in ("dice", hd95, "missed"))
    sides = zip(fill_absent(dice), fill_absent(distances, _find_perfect(hd95)), strict=True)
    return [
        {
            "dice": bootstrap_mean(ours, patients=patients),
            hd95: bootstrap_mean(distance, patients=patients),
            "num_missed": sum(value or 0.0 for value in missed[index]),
            "difference": _find_difference(
                [
                    [[table[i].get(f"dice/{name}") for i in shared] for table in pair]
                    for pair in _pair_tables(arms[index], arms[0])
                ],
                patients,
            )
            if index
            else None,
        }
        for index, (ours, distance) in enumerate(sides)
    ]


def _render(rows: Sequence[dict[str, Any]], classes: Sequence[str], notes: Sequence[str]) -> str:
    """Return the tables as text."""
    first = rows[0]["name"]
    how = "paired bootstrap"
    if any(row["num_tables"] > 1 for row in rows):
        how += "; of several runs Student's t over runs and patients"
    notes = [*notes, f"Differences are to {first}, with 95 % intervals ({how})."]
    lines = [line for note in notes for line in textwrap.wrap(note, 100)]
    heading = f"{'n':>4}  {'dice':<20}  {'difference':<23}  {'p':>6}  verdict"
    lines += ["", f"{'mean over classes':<{NAME_WIDTH}}  {heading}"]
    for row in rows:
        difference = row["difference"]
        text, p = "", ""
        if difference is not None:
            text = format_estimate(difference, "+")
            is_judged = difference["p"] is not None and row["verdict"] in ("gain", "no gain")
            p = f"{difference['p']:.4f}" if is_judged else ""
        lines.append(
            f"{_label(row):<{NAME_WIDTH}}  {row['n']:>4}  {format_estimate(row['dice']):<20}"
            f"  {text:<23}  {p:>6}  {row['verdict'] or ''}"
        )
    for name in classes:
        entries = [row["classes"][name] for row in rows]
        hd95 = "hd95_mm" if all("hd95_mm" in entry for entry in entries) else "hd95_px"
        heading = f"{'n':>4}  {'dice':<20}  {'difference':<23}  {hd95:>7}  missed"
        lines += ["", f"{_cut(name):<{NAME_WIDTH}}  {heading}"]
        for row, entry in zip(rows, entries, strict=True):
            text = format_estimate(entry["difference"], "+") if entry["difference"] else ""
            distance = entry.get(hd95, {"mean": None})["mean"]
            lines.append(
                f"{_label(row):<{NAME_WIDTH}}  {entry['dice']['n']:>4}"
                f"  {format_estimate(entry['dice']):<20}  {text:<23}"
                f"  {'n/a' if distance is None else f'{distance:.2f}':>7}"
                f"  {entry['num_missed']:>6g}"
            )
    if any(row["verdict"] == "no verdict" for row in rows):
        needs = f"a verdict needs {MIN_CASES_FOR_VERDICT} patients"
        if len({row["num_tables"] for row in rows}) > 1:
            needs += ", and as many runs as the first arm has"
        if any(NO_TEST in note for note in notes):
            needs += ", and cases that no model was trained on"
        lines += ["", f"no verdict: {needs}."]
    return "\n".join(line.rstrip() for line in lines)


def _label(row: Mapping[str, Any]) -> str:
    """Return the name of an arm as it stands in the table."""
    averaged = f" (x{row['num_tables']})" if row["num_tables"] > 1 else ""
    return _cut(row["name"], NAME_WIDTH - len(averaged)) + averaged


def _cut(text: str, width: int = NAME_WIDTH) -> str:
    """Cut a text on the left, where paths differ least."""
    return text if len(text) <= width else f"..{text[2 - width :]}"
