"""Writes the tables and the figure of docs/evidence.md and levers.md anew, from the CSVs there.

    python scripts/write_evidence.py

Each table stands between two comments that name its CSV. Those of compare_peers.py, such as
acdc_3_peers.csv, are read together with the study of the same name; those of measure_robustness.py
end in _robustness.csv, those of audit_gain.py in _audit.csv. The figure, evidence.svg, has the sets
whose study has the recipe and a control; so has the note of power, which says how large a gain has
to be to be found.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import audit_gain
import compare_peers
import matplotlib as mpl
import measure_robustness
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import optimize, stats
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
PAGES = (DOCS / "evidence.md", DOCS / "levers.md")
SETS = {
    "confirm_acdc_3.csv": "Heart (ACDC), 3 patients labeled, fresh draws",
    "confirm_acdc_7.csv": "Heart, 7 patients labeled, fresh draws",
    "acdc_3.csv": "Heart, draws that the recipe was made on",
    "spine_4_levers.csv": "Spine, 4 scans labeled",
    "hippocampus_4.csv": "Hippocampus, 4 scans labeled",
}
MARKS = {
    "labels": ("o", "#7a7a7a", "labels alone, as many patch passes"),
    "recipe": ("o", "#1f5fa8", "with the unlabeled scans"),
    "all": ("|", "#222222", "all labels"),
}
DRAWS = (3, 5, 10, 20)
LEVEL, POWER = 0.05, 0.8
CONTROLS = {"labels": "labels alone", "shadow": "the shadow run"}


def main() -> None:
    """Write the tables and the figure."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for page in PAGES:
        for path in list_tables(page):
            replace_table(page, path.name, tabulate(path))
    replace_table(PAGES[0], "power", tabulate_power([DOCS / name for name in SETS]))
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


def replace_table(page: Path, name: str, table: str) -> None:
    """Replace the tables in a page that stand between two comments with this name."""
    start, end = (f"<!-- {name}{word} -->\n" for word in ("", " end"))
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    write_text(page, f"{before}{start}{table}{end}{after}")


def tabulate_power(paths: Sequence[Path]) -> str:
    """Return a table of how large a gain would have to be to be found in these data.

    Args:
        paths: CSVs of studies; a set without a gain in two draws at least is left out.
    """
    rows = []
    for path in paths:
        arms, patients = read_arms(path)
        better = pick_better(arms)
        shared = [d for d in sorted(arms.get("recipe", {})) if better and d in better[1]]
        if better is None or len(shared) < 2:
            continue
        control = better[1]
        gains = []
        for draw in shared:
            sides = ({draw: arm[draw]} for arm in (arms["recipe"], control))
            difference = compare_arms(*sides, patients)
            assert difference is not None, "both have the draw"
            gains.append(difference[0]["mean"])
        spread = float(np.std(gains, ddof=1))
        rows.append(
            {
                "set": SETS[path.name],
                "gain by draw": ", ".join(f"{gain:+.3f}" for gain in gains),
                "deviation": f"{spread:.3f}",
                **{f"{n} draws": f"{find_detectable(spread, n):+.3f}" for n in DRAWS},
            }
        )
    return format_markdown(rows) if rows else ""


def find_detectable(spread: float, draws: int) -> float:
    """Return the gain that Student's t over draws finds in 8 of 10 studies, two-sided at 5 %.

    Args:
        spread: Standard deviation of the gain from draw to draw.
        draws: Their number.
    """
    limit = stats.t.ppf(1 - LEVEL / 2, draws - 1)

    def exceed(shift: float) -> float:
        """Return the power too many at a gain of so many standard errors; the far tail is none."""
        return float(stats.nct.sf(limit, draws - 1, shift)) - POWER

    shift: float = optimize.brentq(exceed, 1.0, 3 * limit)
    return shift * spread / math.sqrt(draws)


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
