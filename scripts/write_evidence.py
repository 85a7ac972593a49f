"""Writes the tables and the figure of docs/evidence.md anew, from the CSVs that lie beside it.

    python scripts/write_evidence.py

Each table stands between two comments that name its CSV. Those of compare_peers.py, such as
acdc_3_peers.csv, are read together with the study of the same name; those of measure_robustness.py
end in _robustness.csv, those of audit_gain.py in _audit.csv. The figure, evidence.svg, has the sets
whose study has the recipe and a control.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import audit_gain
import compare_peers
import matplotlib as mpl
import measure_robustness
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import (
    Arm,
    average_dice,
    compare_arms,
    format_markdown,
    pick_better,
    read_arms,
    tabulate_arms,
)

from medssl.runs import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
SETS = {
    "acdc_3.csv": "Heart (ACDC), 3 patients labeled",
    "spine_4_levers.csv": "Spine, 4 scans labeled",
    "hippocampus_4.csv": "Hippocampus, 4 scans labeled",
}
MARKS = {
    "labels": ("o", "#7a7a7a", "labels alone, as many patch passes"),
    "recipe": ("o", "#1f5fa8", "with the unlabeled scans"),
    "all": ("|", "#222222", "all labels"),
}
CONTROLS = {"labels": "labels alone", "shadow": "the shadow run"}


def main() -> None:
    """Write the tables and the figure."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    page = DOCS / "evidence.md"
    for path in list_tables(page):
        replace_table(page, path, tabulate(path))
    write_text(DOCS / "evidence.svg", draw_gains([DOCS / name for name in SETS]))


def list_tables(page: Path) -> list[Path]:
    """Return the CSVs beside a page whose tables stand in it."""
    names = re.findall(r"<!-- (\S+\.csv) -->", page.read_text(encoding="utf-8"))
    return [page.parent / name for name in names if (page.parent / name).is_file()]


def tabulate(path: Path) -> str:
    """Return the tables of a CSV."""
    if path.stem.endswith("_robustness"):
        return measure_robustness.tabulate(path, against="labels")
    if path.stem.endswith("_audit"):
        return audit_gain.tabulate(path)
    if path.stem.endswith("_peers"):
        like = path.with_name(path.name.replace("_peers", ""))
        return compare_peers.format_tables(path, like, compare_peers.REACH)
    return format_markdown(tabulate_arms(path))


def replace_table(page: Path, csv_path: Path, table: str) -> None:
    """Replace the tables of a CSV in a page, which stand between two comments that name it."""
    start, end = (f"<!-- {csv_path.name}{word} -->\n" for word in ("", " end"))
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    write_text(page, f"{before}{start}{table}{end}{after}")


def draw_gains(paths: Sequence[Path]) -> str:
    """Return an SVG of labels alone, the recipe and all labels, draw by draw.

    The same CSVs give the same figure; their hash stands in it.

    Args:
        paths: CSVs of studies; a set without the recipe, or without a control, is left out.
    """
    read = [(SETS[path.name], *read_arms(path)) for path in paths]
    studies = [
        (f"{title}: {gain}", arms)
        for title, arms, patients in read
        if (gain := describe_gain(arms, patients))
    ]
    heights = sum(len(arms["recipe"]) + 2 for _, arms in studies)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "medssl", "font.family": "sans-serif"}
    with mpl.rc_context({**settings, "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.8 + 0.24 * heights), layout="constrained")
        axes = figure.add_subplot()
        y = 0.0
        edge = {"transform": axes.get_yaxis_transform(), "va": "center"}
        for title, arms in studies:
            axes.text(0.0, y, title, weight="bold", **edge)
            for draw in sorted(arms["recipe"]):
                y -= 1
                axes.text(0.0, y, f"draw {draw}", **edge)
                plot_draw(axes, y, draw, arms)
            y -= 2
        low, high = axes.get_xlim()  # the names of draws stand left of all marks
        axes.set(xlim=(low - 0.1 * (high - low), high), ylim=(y + 1, 0.8), yticks=[])
        axes.set_xlabel("mean Dice of the test cases")
        for side in ("left", "top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for marker, color, label in MARKS.values():
            axes.plot([], [], marker, color=color, label=label, markersize=7)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.2)
        stream = io.StringIO()
        about = {"Date": None, "Description": hash_contents(paths)}
        figure.savefig(stream, format="svg", metadata=about)
    return stream.getvalue()


def describe_gain(arms: Mapping[str, Arm], patients: Mapping[str, str]) -> str:
    """Return what the recipe gains over the better control; empty where it lacks one of both."""
    better = pick_better(arms)
    difference = better and compare_arms(arms.get("recipe", {}), better[1], patients)
    if not better or not difference:
        return ""
    gain, _ = difference
    interval = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    return f"{interval} over {CONTROLS[better[0]]}"


def plot_draw(axes: Axes, y: float, draw: int, arms: Mapping[str, Arm]) -> None:
    """Plot the arms of a draw in a line; all labels are the same in every draw."""
    dice = {name: average_dice(arms[name][draw]) for name in MARKS if draw in arms.get(name, {})}
    if "all" in arms:
        dice["all"] = average_dice(next(iter(arms["all"].values())))
    if {"labels", "recipe"} <= dice.keys():
        ends = [dice["labels"], dice["recipe"]]
        axes.plot(ends, [y, y], color="#9fbfe0", linewidth=2, zorder=1)
    for name, value in dice.items():
        marker, color, _ = MARKS[name]
        axes.plot(value, y, marker, color=color, markersize=7, markeredgewidth=1.6)


def hash_contents(paths: Sequence[Path]) -> str:
    """Return a hash of files, of those that there are."""
    contents = [path.read_bytes() for path in paths if path.is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


if __name__ == "__main__":
    main()
