"""The page: the text, figures and scans of a run, put into template.html."""

from __future__ import annotations

import base64
import functools
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from medssl.data.cases import format_count
from medssl.metrics import mean_known
from medssl.names import Names, choose_names
from medssl.overlays import CLASS_COLORS
from medssl.report import figures, scans, sentences
from medssl.report.scans import Overlay, Sources
from medssl.report.sentences import format_number
from medssl.run_folder import RoundFolder, RunFolder, parse_number, read_folder_with_tables
from medssl.runs import write_text

NUM_LISTED = 12
NUM_THUMBNAILS = 4


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; ``problem`` says why there is none."""

    title: str
    caption: str
    src: str
    problem: str = ""


class FigureCache:
    """The figures of a run that show no names: each is made once for both pages."""

    def __init__(self, run: RunFolder, sources: Sources) -> None:
        self.run = run
        self.sources = sources
        self._plots: dict[Callable[[RunFolder], bytes], bytes] = {}
        self._overlays: dict[tuple[object, ...], Overlay] = {}

    def plot_figure(self, plot: Callable[[RunFolder], bytes]) -> bytes:
        """Return the PNG of a function of ``figures``."""
        if plot not in self._plots:
            self._plots[plot] = plot(self.run)
        return self._plots[plot]

    def render_case(self, render: Callable[..., Overlay], case_id: str, *where: Any) -> Overlay:
        """Return the overlay of a function of ``scans`` for a case."""
        key = (render, case_id, *where)
        if key not in self._overlays:
            self._overlays[key] = render(self.run, self.sources, case_id, *where)
        return self._overlays[key]


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write two self-contained HTML pages on a run, from its files alone.

    Args:
        run_dir: The run folder; whatever of it is missing is said to be missing on the page.

    Returns:
        ``run_dir/report.html``, and ``run_dir/report_share.html``, which is fit to be given away:
        pseudonyms in place of case ids, no paths, no name of the data set.

    Raises:
        InputError: It is no run folder.
    """
    run = read_folder_with_tables(Path(run_dir))
    cache = FigureCache(run, scans.find_sources(run))
    return _write_page(run, cache, share=False), _write_page(run, cache, share=True)


def _write_page(run: RunFolder, cache: FigureCache, share: bool) -> Path:
    """Write one of the two pages."""
    names = choose_names(run) if share else Names(shared=False)
    page = _load_template().render(
        title="medssl report" if share else f"{run.path.resolve().name}: medssl report",
        name="" if share else run.path.resolve().name,
        shared=share,
        started=str(run.provenance.get("started") or "")[:10],
        headline=sentences.write_headline(run, names),
        status=sentences.describe_status(run),
        damaged=run.damaged,
        edited=run.edited,
        facts=_list_facts(run),
        verdict=_describe_verdict(run, cache.sources, names),
        interval=_place_interval(run),
        rounds=sentences.tabulate_rounds(run, names),
        ending=_capitalize(names.clean_text(str(run.summary.get("exit") or ""))),
        classes=_tabulate_classes(run),
        pairs=_show_pairs(run, names),
        curves=_show_curves(cache),
        coverage=_show_coverage(cache),
        colors=_list_colors(run),
        num_colors=len(CLASS_COLORS),
        has_directions=bool(run.plan.get("has_spacing", True)),
        cases=_show_cases(cache, names),
        annotate=_show_annotate(cache, names),
        origin=_describe_origin(run, names),
    )
    path = run.path / ("report_share.html" if share else "report.html")
    write_text(path, page)
    return path


@functools.cache
def _load_template() -> Template:
    """Return the template of the page; it is compiled once."""
    environment = Environment(
        loader=PackageLoader("medssl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _mark_code
    return environment.get_template("template.html")


def _capitalize(text: str) -> str:
    """Return a text as a sentence; nothing for nothing."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _mark_code(text: str) -> Markup:
    """Return escaped text in which `backticks` mark code."""
    parts = [escape(part) for part in text.split("`")]
    marked = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(marked)


def _embed(png: bytes) -> str:
    """Return a PNG as a data address; nothing for nothing."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else ""


def _list_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return the numbers of the strip under the headline."""
    parts = ("labeled", "unlabeled", "val", "test")
    titles = ("labeled", "unlabeled", "validation", "test")
    sizes = [f"{len(run.list_part(part)):,}" if run.splits else sentences.MISSING for part in parts]
    steps = sentences.count_steps(run)
    seconds = [parse_number(entry.done.get("seconds")) for entry in run.rounds]
    total = sum(value for value in seconds if value is not None)
    return [
        *zip(titles, sizes, strict=True),
        ("foreground classes", str(len(sentences.list_classes(run)) or sentences.MISSING)),
        ("rounds after round 0", str(sum(entry.index > 0 for entry in run.rounds))),
        ("steps in all", sentences.MISSING if steps is None else f"{steps:,}"),
        ("training time", sentences.format_seconds(total or None)),
        ("device", str(run.provenance.get("device") or sentences.MISSING)),
    ]


def _describe_verdict(run: RunFolder, sources: Sources, names: Names) -> dict[str, Any]:
    """Return the verdict as the template shows it."""
    verdict = sentences.write_verdict(run, scans.describe_patients(run, sources))
    return {
        "kind": verdict.kind.replace(" ", "-"),
        "word": verdict.word,
        "sentence": verdict.sentence,
        "details": [names.clean_text(detail) for detail in verdict.details],
    }


def _place_interval(run: RunFolder) -> dict[str, Any] | None:
    """Return where the interval of the paired difference lies on a line of 100 units."""
    paired = run.paired
    difference, low, high = (parse_number(paired.get(key)) for key in ("mean", "low", "high"))
    if difference is None or low is None or high is None or low == high:
        return None
    start, end = min(0.0, low), max(0.0, high)
    margin = 0.18 * (end - start)
    start, end = start - margin, end + margin

    def place(value: float) -> float:
        return round(100 * (value - start) / (end - start), 2)

    marks = {"zero": 0.0, "low": low, "mean": difference, "high": high}
    texts = {key: format_number(value, sign=True) for key, value in marks.items()}
    return {"at": {key: place(value) for key, value in marks.items()}, "text": texts}


def _tabulate_classes(run: RunFolder) -> list[dict[str, str]]:
    """Return what was measured of each class on the test cases, by the delivered model."""
    rows = []
    for name, entry in (run.evaluation.get("classes") or {}).items():
        dice = entry.get("dice") or {}
        unit = "mm" if "hd95_mm" in entry else "px"
        low, high = parse_number(dice.get("low")), parse_number(dice.get("high"))
        index = {other: i for i, other in run.classes.items()}.get(name, 1)
        interval = f"{format_number(low)} to {format_number(high)}"
        rows.append(
            {
                "name": name,
                "color": figures.choose_class_color(index),
                "dice": format_number(dice.get("mean")),
                "interval": sentences.MISSING if low is None else interval,
                "hd95": format_number((entry.get(f"hd95_{unit}") or {}).get("mean"), 2),
                "unit": unit,
                "surface": format_number((entry.get("surface_dice") or {}).get("mean")),
                "missed": str(entry.get("num_missed", sentences.MISSING)),
                "alarms": str(entry.get("num_false_alarms", sentences.MISSING)),
                "present": str(entry.get("num_present", sentences.MISSING)),
            }
        )
    return rows


def _show_pairs(run: RunFolder, names: Names) -> Picture:
    """Return the dot plot of Dice per case, labels only against delivered."""
    title = "Every test case, before and after"
    first = run.rounds[0].rows if run.rounds and run.rounds[0].index == 0 else ()
    before, after = figures.pair_dice(first, run.rows)
    shared = sorted(before)
    if shared and run.delivered == "round_0":
        average = mean_known([after[case_id] for case_id in shared])
        why = (
            f"The delivered model is round 0 itself, so before and after are one: mean Dice "
            f"{average:.3f} on {format_count(len(shared), 'test case')}."
        )
        return Picture(title, "", "", why)
    if not shared:
        why = "No case has been measured with both round 0 and the delivered model."
        return Picture(title, "", "", why)
    better = sum(after[case_id] > before[case_id] for case_id in shared)
    worse = sum(after[case_id] < before[case_id] for case_id in shared)
    caption = (
        f"{better} of {format_count(len(shared), 'test case')} are better than with "
        f"labels only, {worse} worse. Mean Dice {mean_known(before.values()):.3f} with labels "
        f"only, {mean_known(after.values()):.3f} delivered."
    )
    return Picture(title, caption, _embed(figures.plot_pairs(before, after, names.name_case)))


def _show_curves(cache: FigureCache) -> Picture:
    """Return the curves of training."""
    run, png = cache.run, cache.plot_figure(figures.plot_curves)
    caption = (
        "One line per round, its number at its end: gray is round 0 (labels only), darker blue is "
        "later. Thin lines are single records, thick ones their running mean."
    )
    section = run.config.get("losses", {}).get("supervised", {})
    first, students = section.get("name"), section.get("student", "auto")
    if students not in ("auto", first):
        caption += (
            f" Round 0 learns labels by {first}, students by {students}: compare their supervised "
            "and total losses among students only."
        )
    why = "metrics.jsonl is missing or holds no loss yet."
    return Picture("Training", caption, _embed(png), "" if png else why)


def _show_coverage(cache: FigureCache) -> list[Picture]:
    """Return the pictures of coverage, thresholds and agreement."""
    run = cache.run
    students = any(entry.index > 0 for entry in run.rounds)
    why = "the run has no student round" if not students else "no file of the run says it"
    unfiltered = figures.is_unfiltered(run)
    reviews = cache.plot_figure(figures.plot_reviews)
    curves = b"" if unfiltered else cache.plot_figure(figures.plot_coverage_curves)
    why_no_curves = f"No curve of coverage: {why}."
    if unfiltered:
        why_no_curves = "Nothing to show: this method has no filter, every voxel enters the loss."
    coverage = (
        "Coverage: of the voxels that the model of the round calls this class, the fraction that "
        "is trusted. "
    )
    many = len(run.classes) > len(figures.list_plotted_classes(run))
    note = " Only the first seven classes are shown." if many else ""
    return [
        Picture(
            f"{'Agreement' if unfiltered else 'Coverage and agreement'} of each unlabeled scan",
            f"A dot is a scan, a bar the median. {'' if unfiltered else coverage}Agreement: mean "
            f"Dice with the pseudo-mask of its teacher.{note}",
            _embed(reviews),
            "" if reviews else f"No review of pseudo-labels: {why}.",
        ),
        Picture(
            "Coverage and threshold while the student learns",
            "Fraction of voxels of a predicted class that enter the loss, and the confidence that "
            f"a voxel of this class has to reach.{note}",
            _embed(curves),
            "" if curves else why_no_curves,
        ),
    ]


def _list_colors(run: RunFolder) -> list[tuple[str, str]]:
    """Return name and color of each foreground class for the key of the overlays."""
    return [
        (name, figures.choose_class_color(i)) for i, name in sorted(run.classes.items()) if i > 0
    ]


def _show_cases(cache: FigureCache, names: Names) -> dict[str, Any]:
    """Return overlays of the best, median and worst test case, or of pseudo-masks without one."""
    run = cache.run
    ranked = sorted(run.dice, key=lambda case_id: (-run.dice[case_id], case_id))
    if ranked:
        pictures = [
            _show(
                cache.render_case(scans.render_test_case, case_id),
                role,
                names,
                _describe_dice(run, case_id),
            )
            for role, case_id in _pick(ranked, ("Best", "Median", "Worst"))
        ]
        return {"pictures": pictures, "note": "", "has_reference": True}
    last = run.reviewed
    if last is None:
        note = (
            "No test case was evaluated and no unlabeled scan was pseudo-labeled: nothing to show."
        )
        return {"pictures": [], "note": note, "has_reference": False}
    ranked = [row["case_id"] for row in reversed(_rank_by_uncertainty(last))]
    uncertainties = {row["case_id"]: parse_number(row.get("uncertainty")) for row in last.review}
    picked = _pick(ranked, ("Most certain", "Median", "Least certain"))[:2]
    pictures = [
        _show(
            cache.render_case(scans.render_pseudo_mask, case_id, last.path),
            role,
            names,
            f"uncertainty {format_number(uncertainties[case_id])} nats",
        )
        for role, case_id in picked
    ]
    note = (
        f"No test case was evaluated, so these are pseudo-masks of unlabeled scans (round "
        f"{last.index}): what the model says, not what is true."
    )
    return {"pictures": pictures, "note": note, "has_reference": False}


def _describe_dice(run: RunFolder, case_id: str) -> str:
    """Return the Dice of a case, and of its classes where there are few."""
    row = next(row for row in run.rows if row["case_id"] == case_id)
    names = sentences.list_classes(run)
    parts = [f"{name} {format_number(row.get(f'dice/{name}'))}" for name in names]
    classes = f" ({', '.join(parts)})" if 1 < len(parts) <= 6 else ""
    return f"Dice {run.dice[case_id]:.3f}{classes}"


def _pick(ranked: list[str], roles: tuple[str, str, str]) -> list[tuple[str, str]]:
    """Return the first, middle and last of a ranking, each case once."""
    places = dict(zip((0, len(ranked) // 2, len(ranked) - 1), roles, strict=True))
    if len(ranked) < 3:
        places = dict(list(zip(range(len(ranked)), (roles[0], roles[2]), strict=False)))
    return [(role, ranked[place]) for place, role in sorted(places.items())]


def _show(overlay: Overlay, role: str, names: Names, caption: str) -> Picture:
    """Return an overlay with the name that may be shown."""
    title = f"{role}: {names.name_case(overlay.case_id)}"
    problem = f"No picture: {overlay.problem}." if overlay.problem else ""
    return Picture(title, caption, _embed(overlay.png), problem)


def _rank_by_uncertainty(entry: RoundFolder) -> list[Mapping[str, str]]:
    """Return the rows of review.csv, the most uncertain case first, unknown ones last."""

    def key(row: Mapping[str, str]) -> tuple[float, str]:
        value = parse_number(row.get("uncertainty"))
        return (float("inf") if value is None else -value, row["case_id"])

    return sorted(entry.review, key=key)


def _show_annotate(cache: FigureCache, names: Names) -> dict[str, Any]:
    """Return the scans to annotate next: table, pictures, or why there is none."""
    run = cache.run
    last = run.reviewed
    if last is None:
        why = "No unlabeled scan has been pseudo-labeled, so none is known to be difficult."
        return {"rows": [], "pictures": [], "note": why, "num_reviewed": 0}
    ranked = _rank_by_uncertainty(last)
    classes = sentences.list_classes(run)
    largest = (
        max((parse_number(row.get("uncertainty")) or 0.0 for row in ranked), default=0.0) or 1.0
    )
    rows = [
        {
            "name": names.name_case(row["case_id"]),
            "uncertainty": format_number(row.get("uncertainty")),
            "bar": round(100 * (parse_number(row.get("uncertainty")) or 0.0) / largest),
            "agreement": format_number(row.get("agreement"), 2),
            "coverage": _percent(row.get("coverage")),
            "used": {1.0: "yes", 0.0: "no"}.get(parse_number(row.get("accepted")) or 0.0, "–"),
            "why": sentences.explain_row(row, classes, names),
        }
        for row in ranked[:NUM_LISTED]
    ]
    pictures = [
        _show(
            cache.render_case(scans.render_pseudo_mask, row["case_id"], last.path, 5.0),
            f"{place}",
            names,
            f"uncertainty {format_number(row.get('uncertainty'))} nats",
        )
        for place, row in enumerate(ranked[:NUM_THUMBNAILS], 1)
    ]
    problems = {picture.problem for picture in pictures}
    shared = {row["why"] for row in rows}
    note = (
        f"From the review of round {last.index}: {len(rows)} of "
        f"{format_count(len(ranked), 'unlabeled scan')}, the most uncertain first."
    )
    if len(shared) == 1 and len(rows) > 1 and "" not in shared:  # what all have is said once
        note += f" Of all of them: {shared.pop()}."
        rows = [{**row, "why": ""} for row in rows]
    if len(problems) == 1 and "" not in problems:  # the same for all: say it once
        note += f" No pictures: {problems.pop().removeprefix('No picture: ')}"
        pictures = []
    return {"rows": rows, "pictures": pictures, "note": note, "num_reviewed": len(ranked)}


def _percent(value: object) -> str:
    """Return a fraction as a percentage."""
    fraction = parse_number(value)
    return sentences.MISSING if fraction is None else f"{fraction:.0%}"


def _describe_origin(run: RunFolder, names: Names) -> dict[str, Any]:
    """Return why the run is as it is, and how to make it again."""
    provenance = run.provenance
    versions = dict(provenance.get("versions") or {})
    versions.update({k: provenance[k] for k in ("python", "system") if provenance.get(k)})
    if provenance.get("revision"):
        versions["revision"] = provenance["revision"]
    if provenance.get("threads"):
        versions["threads"] = provenance["threads"]
    config = names.clean_tree(dict(run.config))
    if names.shared:
        config.pop("tracking", None)
        config.get("data", {}).pop("root", None)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
    about = run.splits.get("dataset") or {}
    command = str(provenance.get("command") or "")
    folder = "RUN" if names.shared else shlex.quote(str(run.path))
    scan = "SCAN.nii.gz" if run.plan.get("has_spacing", True) else "PICTURE.png"
    data = "" if run.list_part("test") else " OTHER_LABELED_DATA --out evaluation"
    return {
        "reasons": [names.clean_text(str(reason)) for reason in run.plan.get("reasons") or ()],
        "command": _hide_arguments(command) if names.shared else command,
        "versions": [(key, str(value)) for key, value in versions.items()],
        "config": text,
        "has_model": (run.path / "model" / "model.json").is_file(),
        "predict": f"medssl predict {folder} {scan} --out OUT",
        "evaluate": f"medssl evaluate {folder}{data}",
        "dataset": "" if names.shared else str(about.get("url") or about.get("root") or ""),
    }


def _hide_arguments(command: str) -> str:
    """Return a command with what may be a path or a name replaced by DATA."""
    words = command.split()
    arguments = [w if re.fullmatch(r"--?[\w-]+|[\w.]+=[\w.,+-]+", w) else "DATA" for w in words[2:]]
    return " ".join([*words[:2], *arguments])
