"""What students gain over labels alone, over draws of the labeled cases; resumable.

    python scripts/study.py DATA --out runs/study --draws 0,1,2 labeled=4 test=40

For every draw: the run with its rounds, and the arm that keeps it honest, labels only at the
total steps of the whole run. Both are measured on the same test cases. Each command that this
starts is printed and can be repeated by hand; what is done is skipped. Results go to
OUT/results.csv and OUT/results.md after every arm.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl.compare import compare
from medssl.metrics import format_estimate
from medssl.runs import read_json, write_text

Arm = tuple[int, str, Path, str]  # draw, arm, evaluation folder, minutes


def run(*arguments: str) -> None:
    """Run a medssl command and stop if it fails."""
    print("medssl", " ".join(arguments), flush=True)
    command = [sys.executable, "-m", "medssl", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3):
        raise SystemExit(code)


def finish(
    data: str, folder: Path, settings: list[str], options: list[str] | None = None
) -> dict[str, Any]:
    """Train and evaluate one run, unless that is done; return its summary."""
    if not (folder / "evaluation" / "summary.json").is_file():
        run("train", data, *settings, *(options or []), "--run", str(folder))
        run("evaluate", str(folder))
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def measure(ours: Sequence[Path], theirs: Sequence[Path]) -> dict[str, Any]:
    """Return the Dice of an arm and its difference to another one, as `medssl compare` does.

    Args:
        ours: Evaluation folders of the arm, one per draw; they are averaged within each case.
        theirs: Those of the arm that it is compared with.
    """
    arms = [f"{name}={','.join(map(str, paths))}" for name, paths in (("a", theirs), ("b", ours))]
    row: dict[str, Any] = compare(arms)[1][1]
    return row


def list_arms(draw: int, students: Path, alone: Path) -> list[Arm]:
    """Return the arms of a draw that have been measured."""
    arms: list[Arm] = []
    for folder, name in ((students, "delivered"), (alone, "labels only, total steps")):
        if not (folder / "evaluation" / "per_case.csv").is_file():
            continue
        summary = read_json(folder / "summary.json")
        if folder == students:
            for entry in summary["rounds"]:
                path = folder / "evaluation" / f"round_{entry['round']}"
                title = f"round {entry['round']}, {entry['steps']} steps"
                arms.append((draw, title, path, f"{entry['seconds'] / 60:.1f}"))
        title = f"{name} ({summary['delivered'] if folder == students else summary['total_steps']})"
        arms.append((draw, title, folder / "evaluation", f"{summary['seconds'] / 60:.1f}"))
    return arms


def tabulate(arms: list[Arm]) -> list[dict[str, Any]]:
    """Return one row per arm with its difference to round 0 of the same draw."""
    rows = []
    baseline: dict[int, Path] = {}
    for draw, title, folder, minutes in arms:
        found = measure([folder], [baseline.setdefault(draw, folder)])
        difference = found["difference"]
        ends = [difference["mean"], difference["low"], difference["high"]]
        mean, low, high = ("" if value is None else round(value, 4) for value in ends)
        rows.append(
            {
                "draw": draw,
                "arm": title,
                "n": found["n"],
                "dice": f"{found['dice']['mean']:.4f}",
                "difference": mean,
                "low": low,
                "high": high,
                "paired difference to round 0": format_estimate(difference, "+", 4),
                "training_minutes": minutes,
            }
        )
    return rows


def write_results(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write results.csv with numbers and, with the interval in one cell, the table made from it."""
    shown = "paired difference to round 0"
    write_csv(out / "results.csv", [{k: v for k, v in r.items() if k != shown} for r in rows])
    apart = ("difference", "low", "high")
    table = [{k: v for k, v in row.items() if k not in apart} for row in rows]
    write_text(out / "results.md", to_markdown(table))


def write_table(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and the same as a table."""
    write_csv(out / "results.csv", rows)
    write_text(out / "results.md", to_markdown(rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows of the same keys as a table."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(str(row[key]) for key in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


def make_parser(about: str, out: str, draws: str) -> argparse.ArgumentParser:
    """Return a parser of data, key=value settings, --out and --draws; lists have commas."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("data", help="as of `medssl train`")
    parser.add_argument("settings", nargs="*", help="key=value for all runs")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--draws", type=split_numbers, default=split_numbers(draws))
    return parser


def split_numbers(text: str) -> list[int]:
    """Return the numbers of a list such as 0,1,2."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Run all arms of all draws, in order."""
    parser = make_parser(__doc__ or "", "runs/study", "0,1,2")
    options = parser.parse_intermixed_args()
    arms: list[Arm] = []
    for draw in options.draws:
        students = options.out / f"draw_{draw}"
        alone = options.out / f"draw_{draw}_labels_only"
        settings = [*options.settings, f"draw={draw}"]
        summary = finish(options.data, students, settings)
        arms_now = list_arms(draw, students, alone)
        write_results(options.out, tabulate([*arms, *arms_now]))
        finish(options.data, alone, [*settings, "rounds=0", f"steps={summary['total_steps']}"])
        arms += list_arms(draw, students, alone)
        write_results(options.out, tabulate(arms))
    print((options.out / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
