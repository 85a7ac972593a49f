"""What a run folder holds, as plain types: all that the mirror ever reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.config import InputError
from medssl.runs import SHAPES, RoundLine, list_rounds, parse_entry, read_config, read_json

_FINISHED = ("delivered", "stopped_by_gate")


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds, as plain types; nothing in it has been scrubbed."""

    path: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    splits: dict[str, Any]
    provenance: dict[str, Any]
    state: dict[str, Any]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    pseudonyms: dict[str, str]

    @property
    def dataset(self) -> str:
        """Return the name of the data set."""
        return str(self.splits.get("dataset", {}).get("name") or "medssl")

    @property
    def status(self) -> str:
        """Return the state of the run, in our words."""
        return str(self.state.get("status", "running"))

    @property
    def is_finished(self) -> bool:
        """Return whether the run has ended with a delivered model, so that nothing changes."""
        return self.status in _FINISHED

    @property
    def rounds(self) -> dict[int, dict[str, Any]]:
        """Return what each completed round has recorded, in order."""
        summaries = {entry["round"]: entry for entry in self.summary.get("rounds", [])}
        rounds = {}
        for index, folder in list_rounds(self.path).items():
            if (folder / "done.json").is_file():
                done = read_json(folder / "done.json", RoundLine)
                rounds[index] = {**summaries.get(index, {}), **done}
        for done in rounds.values():
            for key in ("agreement", "kept_cases"):
                done.setdefault(key, done.get("final", {}).get(f"monitors/{key}"))
        return rounds


def read_folder(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        InputError: It has no config.yaml: it is none; or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: no run folder (it has no config.yaml); name one, as runs/mine")

    def read(name: str) -> dict[str, Any]:
        return dict(read_json(path / name, SHAPES[name])) if (path / name).is_file() else {}

    return RunFolder(
        path=path,
        config=read_config(path / "config.yaml"),
        plan=read("plan.json"),
        splits=read("splits.json"),
        provenance=read("provenance.json"),
        state=read("state.json"),
        summary=read("summary.json"),
        evaluation=read("evaluation/summary.json"),
        pseudonyms=read("pseudonyms.json"),
    )


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


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
