"""What a run folder holds, read once; a missing or damaged file is an empty record, and is named.

A run that was interrupted in round 0, or was never evaluated, is as good a run folder as any.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from medssl.config import InputError
from medssl.metrics import Row, compare_cases, read_table
from medssl.runs import (
    SHAPES,
    Described,
    Journal,
    RoundLine,
    Shape,
    find_edited,
    list_rounds,
    read_config,
    read_json,
)

Point = tuple[int, float]
"""A step and a value."""

T = TypeVar("T")


@dataclass(frozen=True)
class RoundFiles:
    """What one round left behind.

    ``curves`` maps a metric's name to its points in order of steps; ``review`` are the rows of
    review.csv, numbers as text; ``rows`` those of the test cases.
    """

    index: int
    folder: Path
    done: Mapping[str, Any]
    review: tuple[Mapping[str, str], ...]
    curves: Mapping[str, tuple[Point, ...]]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Name of the folder, such as round_1."""
        return f"round_{self.index}"

    @property
    def rejected(self) -> bool:
        """Whether its gate refused it; a round without a gate was not refused."""
        return (self.done.get("gate") or {}).get("passed") is False


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; absent files are empty, damaged ones are in ``damaged`` too.

    ``edited`` names those that are not what the run was begun with.
    ``classes`` and ``label_values`` map class index to name and to the value in label files;
    ``dice`` is the mean Dice of the delivered model for each test case.
    """

    folder: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    provenance: Mapping[str, Any]
    splits: Mapping[str, Any]
    pseudonyms: Mapping[str, str]
    state: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    cross_check: Mapping[str, Any]
    rows: tuple[Row, ...]
    rounds: tuple[RoundFiles, ...]
    classes: Mapping[int, str]
    label_values: tuple[int, ...]
    damaged: tuple[str, ...]
    edited: tuple[str, ...] = ()

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice of the delivered model, by case_id."""
        return _take_dice(self.rows)

    @property
    def paired(self) -> Mapping[str, Any]:
        """The paired difference to labels only: on the test cases, else out of fold, else empty."""
        return self.evaluation.get("paired") or self.cross_check.get("paired") or {}

    @property
    def delivered(self) -> str:
        """Name of the delivered round, or nothing."""
        return str(self.summary.get("delivered") or "")

    @property
    def reviewed(self) -> RoundFiles | None:
        """The last round with a review.csv that its gate did not refuse, else the last with one."""
        found = [entry for entry in self.rounds if entry.review]
        good = [entry for entry in found if not entry.rejected]
        return (good or found)[-1] if found else None

    @property
    def delivered_in_spite(self) -> bool:
        """Whether the delivered round did not pass its own gate: there was no better one."""
        return any(entry.name == self.delivered and entry.rejected for entry in self.rounds)

    def list_part(self, part: str) -> list[str]:
        """Return the case_ids of labeled, unlabeled, val or test."""
        return [str(case_id) for case_id in self.splits.get(part) or ()]


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        InputError: There is no such folder, or nothing in it is of a run.
    """
    names = ("config.yaml", "splits.json", "state.json", "summary.json", "metrics.jsonl")
    if not any((folder / name).is_file() for name in names):
        what = "is no run folder" if folder.is_dir() else "does not exist"
        raise InputError(
            f"{folder} {what}: none of {', '.join(names)} is there; give the folder that "
            "`medssl train` printed, such as runs/phantoms"
        )
    damaged: list[str] = []

    def load(name: str) -> dict[str, Any]:
        shape = SHAPES.get(name, Shape) if name != "state.json" else Shape
        return _read(folder / name, partial(read_json, shape=shape), dict, {}, damaged)

    def load_model(home: str) -> dict[str, Any]:
        path = folder / home / "model.json"
        return _read(path, partial(read_json, shape=Described), dict, {}, damaged)

    plan, evaluation = load("plan.json"), load("evaluation/summary.json")
    model = plan or load_model("model") or load_model("round_0/model")
    return RunFiles(
        folder=folder,
        config=_read(folder / "config.yaml", read_config, dict, {}, damaged),
        plan=plan,
        provenance=load("provenance.json"),
        splits=load("splits.json"),
        pseudonyms=load("pseudonyms.json"),
        state=load("state.json"),
        summary=load("summary.json"),
        evaluation=evaluation,
        cross_check=load("cross_check/summary.json"),
        rows=tuple(_read(folder / "evaluation/per_case.csv", read_table, list, [], damaged)),
        rounds=_read_rounds(folder, damaged),
        classes={int(k): str(v) for k, v in (model.get("labels") or {}).items() if k.isdecimal()},
        label_values=tuple(int(value) for value in model.get("label_values") or ()),
        damaged=tuple(damaged),
        edited=_find_edited(folder),
    )


def _find_edited(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that are not what the run was begun with."""
    with contextlib.suppress(InputError, OSError):  # a damaged one is named as such
        return tuple(find_edited(folder))
    return ()


def number(value: object) -> float | None:
    """Return a finite number, also from text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(value)
    except ValueError:
        return None
    return result if math.isfinite(result) else None


def pair_dice(
    ours: Sequence[Row], theirs: Sequence[Row]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the Dice of two models side by side, by case_id, of the cases that both have."""
    tables = [{str(row["case_id"]): row for row in rows} for rows in (ours, theirs)]
    shared = [case_id for case_id in tables[0] if case_id in tables[1]]
    first, second = compare_cases([[table[case_id] for case_id in shared] for table in tables])
    known = [
        (case_id, a, b)
        for case_id, a, b in zip(shared, first, second, strict=True)
        if a is not None and b is not None
    ]
    return {case_id: a for case_id, a, _ in known}, {case_id: b for case_id, _, b in known}


def _read(path: Path, read: Callable[[Path], Any], kind: type, default: T, damaged: list[str]) -> T:
    """Read a file; a missing one gives the default, a damaged one too and is noted."""
    if not path.is_file():
        return default
    try:
        content = read(path)
    except (InputError, OSError, ValueError, csv.Error):
        content = None
    if not isinstance(content, kind):
        inside = path.parent.name if path.parent.name.startswith(("round_", "eval")) else ""
        damaged.append(f"{inside}/{path.name}" if inside else path.name)
        return default
    return content  # type: ignore[return-value]  # isinstance above: mypy cannot tie it to T


def _read_review(path: Path) -> list[dict[str, str]]:
    """Read a review.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{str(k): v or "" for k, v in row.items()} for row in csv.DictReader(file)]
    if any("case_id" not in row for row in rows):
        raise ValueError("no case_id column")
    return rows


def _read_rounds(folder: Path, damaged: list[str]) -> tuple[RoundFiles, ...]:
    """Read every round that has a folder or a line in the journal."""
    curves = _read_curves(folder / "metrics.jsonl")
    rounds = []
    for index in sorted({*curves, *list_rounds(folder)}):
        home = folder / f"round_{index}"
        table = folder / "evaluation" / home.name / "per_case.csv"
        rounds.append(
            RoundFiles(
                index=index,
                folder=home,
                done=_read(
                    home / "done.json", partial(read_json, shape=RoundLine), dict, {}, damaged
                ),
                review=tuple(_read(home / "review.csv", _read_review, list, [], damaged)),
                curves={name: tuple(points) for name, points in curves.get(index, {}).items()},
                rows=tuple(_read(table, read_table, list, [], damaged)),
            )
        )
    return tuple(rounds)


def _read_curves(path: Path) -> dict[int, dict[str, list[Point]]]:
    """Return round -> metric -> points; of a step that stands twice the later line counts."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for entry in Journal(path).read():
        index, step = number(entry.get("round")), number(entry.get("step"))
        if index is None or step is None:
            continue
        of_round = found.setdefault(int(index), {})
        for name, value in entry["metrics"].items():
            finite = number(value)
            if finite is not None:
                of_round.setdefault(name, {})[int(step)] = finite
    return {
        index: {name: sorted(points.items()) for name, points in metrics.items()}
        for index, metrics in found.items()
    }


def _take_dice(rows: list[Row] | tuple[Row, ...]) -> dict[str, float]:
    """Return the mean Dice of each case that has one."""
    values = {str(row["case_id"]): number(row.get("dice")) for row in rows}
    return {case_id: value for case_id, value in values.items() if value is not None}
