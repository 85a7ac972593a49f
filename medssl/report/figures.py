"""Figures of the report: matplotlib without global state, PNG in memory.

A class has the same color in every figure and overlay; rounds run from gray (labels only) to
dark blue. Lines are named where they end, so that no legend has to be matched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from medssl.metrics import Row, compare_cases
from medssl.overlays import pick_color, save_png
from medssl.run_folder import Point, RoundFolder, RunFolder, parse_number

INK, MUTED, GRID = "#1F2933", "#5F6B76", "#E3E7EB"
GAIN, LOSS, BASELINE = "#1B5E9E", "#B4451F", "#9AA5B1"

_WIDTH = 10.6  # inches on the page
_DPI = 150
_MAX_POINTS = 240
_MAX_CLASSES = 7
_FONTS = ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")

LOSSES = ("total", "supervised", "pseudo_label", "entropy", "consistency")
TITLES = {
    "val/dice": "Dice on validation cases",
    "monitors/lr": "learning rate",
    "monitors/coverage": "coverage (fraction of voxels)",
}


@dataclass(frozen=True)
class Panel:
    """One plot of dots: a column of review.csv, its title and its color."""

    column: str
    title: str
    color: str


def _style() -> Any:
    """Return a context that sets fonts and lines, and restores what was set before."""
    installed = set(fontManager.get_font_names())
    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": [name for name in _FONTS if name in installed],
            "font.size": 9.5,
            "text.parse_math": False,  # a case_id may hold a dollar sign
            "text.color": INK,
            "axes.edgecolor": BASELINE,
            "axes.labelcolor": MUTED,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.formatter.useoffset": False,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "figure.facecolor": "white",
        }
    )


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


def plot_pairs(
    before: Mapping[str, float], after: Mapping[str, float], show: Callable[[str], str]
) -> bytes:
    """Draw the Dice of each test case under labels only and under the delivered model.

    Up to 40 cases are rows with their names, best on top; more are points of a scatter plot.

    Args:
        before: Dice of round 0 by case_id.
        after: Dice of the delivered model by case_id.
        show: From case_id to the name to show.
    """
    cases = sorted(set(before) & set(after), key=lambda case_id: after[case_id])
    if not cases:
        return b""
    with _style():
        if len(cases) > 40:
            return _save(_plot_scatter(cases, before, after))
        figure = Figure(figsize=(_WIDTH, 0.24 * len(cases) + 1.0), layout="constrained")
        axes: Axes = figure.add_subplot()
        for row, case_id in enumerate(cases):
            a, b = before[case_id], after[case_id]
            axes.plot([a, b], [row, row], color=GAIN if b >= a else LOSS, lw=2.2, zorder=2)
        rows = np.arange(len(cases))
        values = [after[c] for c in cases]
        colors = [GAIN if after[c] >= before[c] else LOSS for c in cases]
        axes.scatter(
            [before[c] for c in cases], rows, s=34, c="white", edgecolors=MUTED, lw=1.4, zorder=3
        )
        axes.scatter(values, rows, s=40, c=colors, zorder=4)
        for row, case_id in enumerate(cases):
            change = after[case_id] - before[case_id]
            right = max(after[case_id], before[case_id])
            text = f"{change:+.3f}".replace("-", "−")
            axes.annotate(
                text,
                (right, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GAIN if change >= 0 else LOSS,
            )
        axes.set_yticks(rows, [_shorten(show(c)) for c in cases], fontsize=8.5)
        axes.set_ylim(-0.7, len(cases) - 0.3)
        low, high = _find_range([*values, *(before[c] for c in cases)])
        axes.set_xlim(low, high + 0.06 * (high - low))
        axes.grid(False, axis="y")
        axes.set_xlabel("Dice of the case, mean over classes")
        _explain_dots(axes)
        return _save(figure)


def _explain_dots(axes: Axes) -> None:
    """Say above the plot which dot is what."""
    parts = (("○ labels only (round 0)", MUTED), ("● delivered, better", GAIN), ("● worse", LOSS))
    x = 0.0
    for text, color in parts:
        axes.text(x, 1.02, text, transform=axes.transAxes, color=color, fontsize=9, va="bottom")
        x += 0.025 + 0.0066 * len(text)


def _plot_scatter(
    cases: Sequence[str], before: Mapping[str, float], after: Mapping[str, float]
) -> Figure:
    """Draw many cases as points against the line of no change, and their differences."""
    x, y = (np.array([values[c] for c in cases]) for values in (before, after))
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    low, high = _find_range([*x, *y])
    left.plot([low, high], [low, high], color=BASELINE, lw=1)
    left.scatter(x, y, s=18, c=np.where(y >= x, GAIN, LOSS), alpha=0.75, lw=0)
    left.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    left.set_xlabel("Dice, labels only (round 0)")
    left.set_ylabel("Dice, delivered model")
    left.set_title("One point per test case; above the line is better")
    change = y - x
    limit = float(np.abs(change).max()) or 0.01
    bins = np.linspace(-limit, limit, 31)  # odd: zero is an edge
    for part, color in ((change[change >= 0], GAIN), (change[change < 0], LOSS)):
        right.hist(part, bins=bins.tolist(), color=color, rwidth=0.92)
    right.axvline(0, color=MUTED, lw=1)
    right.set_xlabel("Dice difference, delivered minus labels only")
    right.set_ylabel("test cases")
    right.set_title(f"{int((change > 0).sum())} of {len(cases)} cases are better")
    return figure


def plot_curves(run: RunFolder) -> bytes:
    """Draw losses, learning rate and validation Dice against the step, one line per round."""
    present = {name for entry in run.rounds for name in entry.curves}
    ordered = [f"losses/{name}" for name in LOSSES] + ["val/dice", "monitors/lr"]
    metrics = [name for name in ordered if name in present]
    metrics += sorted(n for n in present if n.startswith("losses/") and n not in ordered)
    if not metrics:
        return b""
    with _style():
        columns = 3
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(_WIDTH, 2.35 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        for axes, metric in zip(grid.flat, metrics, strict=False):
            kind = metric.removeprefix("losses/").replace("_", " ")
            axes.set_title(TITLES.get(metric, f"{kind} loss"))
            lines = [
                (entry, entry.curves[metric]) for entry in run.rounds if metric in entry.curves
            ]
            for entry, points in lines:
                color = _choose_round_color(entry.index, len(run.rounds))
                _plot_line(axes, points, color, smooth=metric.startswith("losses/"))
            _name_rounds(axes, lines, len(run.rounds))
            axes.set_xlabel("step of the round")
            axes.margins(x=0.01)
        return _save(figure)


def plot_coverage_curves(run: RunFolder) -> bytes:
    """Draw accepted fraction and threshold of each class against the step, one column a round."""
    rounds = [entry for entry in run.rounds if _list_class_curves(run, entry, "coverage")]
    if not rounds:
        return b""
    kinds = ["coverage"]
    kinds += ["threshold"] if any(_list_class_curves(run, e, "threshold") for e in rounds) else []
    with _style():
        figure = Figure(figsize=(_WIDTH, 2.5 * len(kinds)), layout="constrained")
        grid = figure.subplots(len(kinds), len(rounds), squeeze=False, sharey="row", sharex="col")
        for row, kind in enumerate(kinds):
            for column, entry in enumerate(rounds):
                axes = grid[row, column]
                curves = _list_class_curves(run, entry, kind)
                for index, points in curves.items():
                    _plot_line(axes, points, choose_class_color(index), smooth=kind == "coverage")
                if row == 0:
                    axes.set_title(f"round {entry.index}")
                if row == len(kinds) - 1:
                    axes.set_xlabel("step of the round")
                axes.margins(x=0.01)
                if column == len(rounds) - 1:
                    _name_classes(axes, run, curves)
            label = (
                "coverage\n(accepted fraction)" if kind == "coverage" else "confidence\nthreshold"
            )
            grid[row, 0].set_ylabel(label)
            low, high = grid[row, 0].get_ylim()
            grid[row, 0].set_ylim(max(-0.02, low), min(1.02, high))
        return _save(figure)


def plot_reviews(run: RunFolder) -> bytes:
    """Draw, per round, coverage and agreement of each class; a dot is a scan.

    Agreement has a panel per class where review.csv has a column per class, else one for all.
    """
    rounds = [entry for entry in run.rounds if entry.review]
    rows: list[list[Panel]] = []
    for kind in ("agreement",) if is_unfiltered(run) else ("coverage", "agreement"):
        panels = _list_panels(run, rounds, kind)
        rows += [panels[first : first + 4] for first in range(0, len(panels), 4)]
    if not rows:
        return b""
    with _style():
        columns = max(len(panels) for panels in rows)
        figure = Figure(figsize=(_WIDTH, 2.7 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, panels in zip(grid, rows, strict=True):
            for axes in line[len(panels) :]:
                axes.set_axis_off()
            kind = panels[0].column.partition("/")[0]
            low = _find_floor(rounds, [panel.column for panel in panels])
            for axes, panel in zip(line, panels, strict=False):
                _plot_strips(axes, rounds, panel)
                axes.set_ylim(low, 1.03)
                axes.set_yticks([at for at in axes.get_yticks() if low <= at < 1.001])
            unit = "fraction" if kind == "coverage" else "mean Dice"
            line[0].set_ylabel(f"{kind} ({unit})")
        return _save(figure)


def _list_panels(run: RunFolder, rounds: Sequence[RoundFolder], kind: str) -> list[Panel]:
    """Return the panels of coverage or agreement that have a value."""
    panels = [
        Panel(f"{kind}/{run.classes[index]}", run.classes[index], choose_class_color(index))
        for index in list_plotted_classes(run)
        if index > 0
    ]
    panels = [panel for panel in panels if any(_take(entry, panel.column) for entry in rounds)]
    if not panels and any(_take(entry, kind) for entry in rounds):
        panels = [Panel(kind, "all classes", INK)]
    return panels


def _plot_strips(axes: Axes, rounds: Sequence[RoundFolder], panel: Panel) -> None:
    """Draw a column of dots per round that has values."""
    entries = [entry for entry in rounds if _take(entry, panel.column)]
    for place, entry in enumerate(entries):
        _plot_strip(axes, place, _take(entry, panel.column), panel.color)
    axes.set_xticks(range(len(entries)), [f"round {entry.index}" for entry in entries])
    axes.set_xlim(-0.5, max(len(entries), 3) - 0.2)
    axes.grid(False, axis="x")
    axes.set_title(_shorten(panel.title), color=panel.color)


def choose_class_color(index: int) -> str:
    """Return the color of a class; the background is gray."""
    return BASELINE if index == 0 else pick_color(index)


def list_plotted_classes(run: RunFolder) -> list[int]:
    """Return the classes that figures show: background and the first seven others."""
    return sorted(run.classes)[: _MAX_CLASSES + 1]


def _list_class_curves(run: RunFolder, entry: RoundFolder, kind: str) -> dict[int, Sequence[Point]]:
    """Return the curves of a monitor per class; its key may end in the index or in the name."""
    curves: dict[int, Sequence[Point]] = {}
    for index in list_plotted_classes(run):
        for key in (run.classes[index], str(index)):
            points = entry.curves.get(f"monitors/{kind}/{key}")
            if points:
                curves[index] = points
                break
    return curves


def is_unfiltered(run: RunFolder) -> bool:
    """Return whether the students of a run learned from every voxel of their pseudo-labels."""
    shares = [
        value
        for entry in run.rounds
        for curve in _list_class_curves(run, entry, "coverage").values()
        for _, value in curve
    ]
    return bool(shares) and min(shares) == 1.0


def _take(entry: RoundFolder, column: str) -> list[float]:
    """Return the numbers of a column of review.csv."""
    values = [parse_number(row.get(column)) for row in entry.review]
    return [value for value in values if value is not None]


def _find_floor(rounds: Sequence[RoundFolder], keys: Sequence[str]) -> float:
    """Return the lower end of an axis of fractions, a multiple of 0.1."""
    lowest = min(value for entry in rounds for key in keys for value in _take(entry, key))
    return max(0.0, math.floor(10 * lowest - 0.3) / 10)


def _plot_strip(axes: Axes, place: int, values: Sequence[float], color: str) -> None:
    """Draw a column of dots, spread where they would hide each other, with its median."""
    ordered = np.sort(np.asarray(values))
    spread = 0.16 * np.sin(np.arange(len(ordered)) * 2.4)
    axes.scatter(place + spread, ordered, s=16, color=color, alpha=0.4, lw=0)
    median = float(np.median(ordered))
    axes.plot([place - 0.24, place + 0.24], [median, median], color=color, lw=2.4)
    axes.text(place + 0.28, median, f"{median:.2f}", va="center", fontsize=8.5, color=INK)


def _plot_line(axes: Axes, points: Sequence[Point], color: str, smooth: bool) -> None:
    """Draw a curve: thinned to what the eye can see, noise behind its running mean."""
    steps, values = _thin(points)
    if smooth and len(values) >= 20:
        axes.plot(steps, values, color=color, lw=0.7, alpha=0.3)
        values = _smooth(values)
    marker = "o" if len(values) < 6 else ""
    axes.plot(steps, values, color=color, lw=1.7, marker=marker, ms=4)


def _thin(points: Sequence[Point]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return steps and values, averaged in equal groups where there are too many."""
    array = np.asarray(points, dtype=np.float64)
    if len(array) > _MAX_POINTS:
        array = np.array([part.mean(axis=0) for part in np.array_split(array, _MAX_POINTS)])
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the running mean over a tenth of the curve, shorter at its ends."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    smoothed: np.ndarray[Any, Any] = (sums[last] - sums[first]) / (last - first)
    return smoothed


def _choose_round_color(index: int, num_rounds: int) -> str:
    """Return gray for round 0 and ever darker blues for the students."""
    if index == 0:
        return BASELINE
    light, dark = np.array([0x7F, 0xB2, 0xDF]), np.array([0x0F, 0x3F, 0x75])
    share = 1.0 if num_rounds <= 2 else (index - 1) / (num_rounds - 2)
    red, green, blue = (light + min(1.0, share) * (dark - light)).round().astype(int)
    return f"#{red:02X}{green:02X}{blue:02X}"


def _name_rounds(
    axes: Axes, lines: Sequence[tuple[RoundFolder, Sequence[Point]]], num_rounds: int
) -> None:
    """Write the number of its round at the end of each line."""
    ends = [
        (*_end(points), f" {entry.index}", _choose_round_color(entry.index, num_rounds))
        for entry, points in lines
    ]
    for step in {end[0] for end in ends}:
        _place_labels(axes, step, [end[1:] for end in ends if end[0] == step])


def _name_classes(axes: Axes, run: RunFolder, curves: Mapping[int, Sequence[Point]]) -> None:
    """Write the name of its class at the end of each line."""
    ends = [
        (*_end(points), f" {_shorten(run.classes[index], 18)}", choose_class_color(index))
        for index, points in curves.items()
    ]
    if ends:
        _place_labels(axes, max(end[0] for end in ends), [end[1:] for end in ends])


def _end(points: Sequence[Point]) -> tuple[float, float]:
    """Return the last step of a curve, and the mean of its end: where its label goes."""
    steps, values = _thin(points)
    return float(steps[-1]), float(values[-max(1, len(values) // 20) :].mean())


def _place_labels(axes: Axes, step: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write labels right of a step at the height of their lines, moved apart if too close."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]  # a figure here, never a subfigure
    gap = 0.17 / max(height, 0.5)
    ordered = sorted(ends, key=lambda end: end[0])
    heights = [(end[0] - low) / ((high - low) or 1.0) for end in ordered]
    places = _spread(heights, gap)
    for (_, text, color), y in zip(ordered, places, strict=True):
        axes.annotate(
            text,
            (step, y),
            xycoords=axes.get_xaxis_transform(),
            va="center",
            color=color,
            fontweight="bold",
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights in rising order, at least ``gap`` apart, near the wanted ones."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    excess = max(0.0, places[-1] - 1.0) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        limit = places[index + 1] - gap if index + 1 < len(places) else places[-1] - excess
        places[index] = min(places[index], limit)
    return places


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    """Return limits around Dice values with a margin, within [0, 1] but for the margin."""
    low, high = min(values), max(values)
    margin = max(0.01, 0.06 * (high - low))
    return max(-0.01, low - margin), min(1.01, high + margin)


def _shorten(text: str, length: int = 28) -> str:
    """Return a text with its middle left out if it is too long for an axis."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def _save(figure: Figure) -> bytes:
    """Return the figure as a PNG, whatever letters its names have."""
    figure.set_dpi(_DPI)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return save_png(figure)
