"""What a run folder holds, read in one place for all that tell of a run: MLflow and the report.

A run that was interrupted in round 0, or was never evaluated, is as good a run folder as any.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel

from medssl.config import InputError
from medssl.runs import (
    MAKE_ANEW,
    SHAPES,
    ConfigFile,
    DescriptionFile,
    Journal,
    RoundLine,
    find_edited,
    list_rounds,
    parse_entry,
    read_json,
)
from medssl.settings import parse_yaml

if TYPE_CHECKING:
    from medssl.metrics import Row

Point = tuple[int, float]
"""A step and a value."""

T = TypeVar("T")

_FINISHED = ("delivered", "stopped_by_gate")
_CROSS_CHECK = "cross_check/summary.json"
_DESCRIPTIONS = (
    *("plan.json", "splits.json", "provenance.json", "state.json", "summary.json"),
    *("evaluation/summary.json", _CROSS_CHECK, "pseudonyms.json"),
)


@dataclass(frozen=True)
class RoundFolder:
    """What one round left behind.

    ``done`` is its done.json, empty before that is there; ``known`` are both that and the line of
    it in summary.json. With tables, ``curves`` maps a metric's name to its points in order of
    steps, ``review`` are the rows of review.csv, numbers as text, ``rows`` those of the test cases.
    """

    index: int
    path: Path
    done: Mapping[str, Any]
    known: Mapping[str, Any]
    review: tuple[Mapping[str, str], ...] = ()
    curves: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder, such as round_1."""
        return f"round_{self.index}"

    @property
    def rejected(self) -> bool:
        """Whether its gate refused it; a round without a gate was not refused."""
        return (self.done.get("gate") or {}).get("passed") is False


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds, as plain types, no name in it hidden; absent files are empty.

    The rest is there with tables: ``rows`` of the delivered model on the test cases; ``classes``
    and ``label_values`` map class index to name and to the value in label files; ``damaged`` names
    the files that cannot be read, ``edited`` those that are not what the run was begun with.
    """

    path: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    splits: Mapping[str, Any]
    provenance: Mapping[str, Any]
    state: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    pseudonyms: Mapping[str, str]
    rounds: tuple[RoundFolder, ...]
    cross_check: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    classes: Mapping[int, str] = field(default_factory=dict)
    label_values: tuple[int, ...] = ()
    damaged: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.splits.get("dataset", {}).get("name") or "medssl")

    @property
    def status(self) -> str:
        """State of the run, in our words."""
        return str(self.state.get("status", "running"))

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended with a delivered model, so that nothing changes."""
        return self.status in _FINISHED

    @property
    def done_rounds(self) -> dict[int, Mapping[str, Any]]:
        """What is known of each completed round, in order."""
        return {entry.index: entry.known for entry in self.rounds if entry.done}

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice of the delivered model, by case_id, where it has one."""
        values = {str(row["case_id"]): parse_number(row.get("dice")) for row in self.rows}
        return {case_id: value for case_id, value in values.items() if value is not None}

    @property
    def measured(self) -> Mapping[str, Any]:
        """What holds the verdict: the evaluation of the test cases, else the folds, else empty."""
        is_open = not self.evaluation.get("paired") and self.cross_check.get("paired")
        return self.cross_check if is_open else self.evaluation

    @property
    def paired(self) -> Mapping[str, Any]:
        """The paired difference to labels only: on the test cases, else out of fold, else empty."""
        return self.measured.get("paired") or {}

    @property
    def delivered(self) -> str:
        """Name of the delivered round, or nothing."""
        return str(self.summary.get("delivered") or "")

    @property
    def reviewed(self) -> RoundFolder | None:
        """The last round with a review.csv that its gate did not refuse, else the last with one."""
        rounds = [entry for entry in self.rounds if entry.review]
        passed = [entry for entry in rounds if not entry.rejected]
        return (passed or rounds)[-1] if rounds else None

    @property
    def delivered_in_spite(self) -> bool:
        """Whether the delivered round did not pass its own gate: there was no better one."""
        return any(entry.name == self.delivered and entry.rejected for entry in self.rounds)

    def list_part(self, part: str) -> list[str]:
        """Return the case_ids of labeled, unlabeled, val or test."""
        return [str(case_id) for case_id in self.splits.get(part) or ()]


def read_folder(path: Path) -> RunFolder:
    """Read what describes a run, and no table of it.

    Raises:
        InputError: It has no config.yaml: it is none; or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: no run folder (it has no config.yaml); name one, as runs/mine")
    return _read_descriptions(path, None)


def read_folder_with_tables(path: Path) -> RunFolder:
    """Read all of a run that can be read, tables and curves too; what cannot is in ``damaged``.

    Raises:
        InputError: There is no such folder, or nothing in it is of a run.
    """
    from medssl.metrics import read_table  # heavy: MLflow's mirror reads without it

    names = ("config.yaml", "splits.json", "state.json", "summary.json", "metrics.jsonl")
    if not any((path / name).is_file() for name in names):
        what = "is no run folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"{path} {what}: none of {', '.join(names)} is there; give the folder that "
            "`medssl train` printed, such as runs/phantoms"
        )
    damaged: list[str] = []
    folder = _read_descriptions(path, damaged)

    def load(name: str, read: Callable[[Path], T], default: T) -> T:
        return _read(path, name, read, default, damaged)

    def load_table(*parts: str) -> tuple[Row, ...]:
        return tuple(load("/".join(("evaluation", *parts, "per_case.csv")), read_table, []))

    curves = _read_curves(path / "metrics.jsonl")
    known = {entry.index: entry for entry in folder.rounds}
    empty = {index: _join_round(path, index, {}, folder.summary) for index in curves}
    rounds = tuple(
        replace(
            entry,
            review=tuple(load(f"{entry.name}/review.csv", read_review, [])),
            curves={name: tuple(points) for name, points in curves.get(index, {}).items()},
            rows=load_table(entry.name),
        )
        for index, entry in sorted({**empty, **known}.items())
    )
    described: Callable[[Path], dict[str, Any]] = partial(read_json, shape=DescriptionFile)
    model = folder.plan
    for home in ("model", "round_0/model"):
        model = model or load(f"{home}/model.json", described, {})
    edited: tuple[str, ...] = ()
    with contextlib.suppress(InputError, OSError):  # a damaged one is named as such
        edited = tuple(find_edited(path))
    return replace(
        folder,
        rows=load_table(),
        rounds=rounds,
        classes={int(k): str(v) for k, v in (model.get("labels") or {}).items() if k.isdecimal()},
        label_values=tuple(int(value) for value in model.get("label_values") or ()),
        damaged=tuple(damaged),
        edited=edited,
    )


def _read_descriptions(path: Path, damaged: list[str] | None) -> RunFolder:
    """Read the JSON and YAML files of a run folder."""

    def load(name: str, shape: type[BaseModel]) -> dict[str, Any]:
        return dict(_read(path, name, partial(read_json, shape=shape), {}, damaged))

    files = {name: load(name, SHAPES[name]) for name in _DESCRIPTIONS}
    rounds = tuple(
        _join_round(path, index, load(f"{home.name}/done.json", RoundLine), files["summary.json"])
        for index, home in list_rounds(path).items()
    )
    return RunFolder(
        path=path,
        config=_read(path, "config.yaml", read_config, {}, damaged),
        plan=files["plan.json"],
        splits=files["splits.json"],
        provenance=files["provenance.json"],
        state=files["state.json"],
        summary=files["summary.json"],
        evaluation=files["evaluation/summary.json"],
        cross_check=files[_CROSS_CHECK],
        pseudonyms=files["pseudonyms.json"],
        rounds=rounds,
    )


def _join_round(
    path: Path, index: int, done: Mapping[str, Any], summary: Mapping[str, Any]
) -> RoundFolder:
    """Return what done.json and summary.json say of a round."""
    listed = [line for line in summary.get("rounds", []) if line.get("round") == index]
    known = {**(listed[-1] if listed else {}), **done}
    for key in ("agreement", "kept_cases"):
        known.setdefault(key, known.get("final", {}).get(f"monitors/{key}"))
    return RoundFolder(index, path / f"round_{index}", done, known)


def _read(
    folder: Path, name: str, read: Callable[[Path], T], default: T, damaged: list[str] | None
) -> T:
    """Read a file; a missing one gives the default, a damaged one too if ``damaged`` notes it."""
    if not (folder / name).is_file():
        return default
    try:
        return read(folder / name)
    except (InputError, OSError):
        if damaged is None:
            raise
        damaged.append(name)
        return default


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.yaml of a run as it stands there; its sections are mappings.

    Raises:
        InputError: It is damaged.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
        ConfigFile.model_validate(content)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({str(error).splitlines()[0]}); {MAKE_ANEW}") from error
    config: dict[str, Any] = content
    return config


def read_review(path: Path) -> list[dict[str, str]]:
    """Return the rows of the review.csv of a round.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            if None in row or not all(isinstance(cell, str) for cell in row.values()):
                raise ValueError(f"the row of {row['case_id']} has too few or too many cells")
            row["case_id"], float(row["accepted"])
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {error}); restore it, or delete "
            f"{path.parent / 'done.json'} and start the same medssl train command: it is written "
            "anew"
        ) from error
    return rows


def read_points(folder: RunFolder, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the journal's entries from a byte offset up to the last checkpoint.

    Each comes with the offset behind it. A line that is no JSON (cut by a kill) is passed over.
    """
    path = folder.path / "metrics.jsonl"
    if not path.is_file():
        return
    if offset > path.stat().st_size:
        offset = 0  # the journal has been rewritten; sending points again doubles nothing
    last = (folder.state.get("round", -1), folder.state.get("step", -1))
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            entry = parse_entry(line) if line.endswith(b"\n") else None
            if entry is None:
                continue
            if not folder.is_finished and (entry["round"], entry["step"]) > last:
                return
            yield entry, offset


def _read_curves(path: Path) -> dict[int, dict[str, list[Point]]]:
    """Return round -> metric -> points; of a step that stands twice the later line counts."""
    by_round: dict[int, dict[str, dict[int, float]]] = {}
    for entry in Journal(path).read():
        of_round = by_round.setdefault(entry["round"], {})
        for name, value in entry["metrics"].items():
            if is_finite(value):
                of_round.setdefault(name, {})[entry["step"]] = float(value)
    return {
        index: {name: sorted(points.items()) for name, points in metrics.items()}
        for index, metrics in by_round.items()
    }


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def parse_number(value: object) -> float | None:
    """Return a finite number, also from text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(value)
    except ValueError:
        return None
    return result if math.isfinite(result) else None
