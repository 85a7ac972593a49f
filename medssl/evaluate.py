"""A model and labeled cases in; a table per case and a summary with intervals out.

Everything is measured on full volumes in the native grid of the scan, under the policy that
stands in `medssl.metrics`. Tables are written once the last case is done: a table that exists
is complete. Until then `measured.jsonl` has the rows, so that a call after an interruption goes on.
Several processes of one command (`medssl.ranks`) have a log each, and measure the cases dealt to
them; the one that finds the rows of all cases there writes the tables.
Here, and nowhere else, labels of test cases are opened.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medssl import __version__, ranks
from medssl.config import DataSection, InputError
from medssl.costs import forecast_costs
from medssl.data.cases import Case, Dataset, shorten
from medssl.data.files import hash_source
from medssl.data.io import (
    STRAIGHTEN,
    read_geometry,
    read_image,
    read_label,
    read_label_values,
    read_origin,
    refuse_other_grid,
    write_mask,
)
from medssl.data.layouts import fold_name, read_dataset
from medssl.data.predictions import (
    OVERWRITE,
    Record,
    append_audit,
    locate_files,
    protect_files,
    read_audit,
    read_files,
    record_predictions,
)
from medssl.data.trained import (
    find_rounds,
    find_trained_on,
    hash_voxels,
    open_test_cases,
    refuse_run_folder,
    split_by_label,
)
from medssl.formats.pictures import compare_colors
from medssl.formats.readers import has_spacing, name_mask_suffix
from medssl.metrics import (
    MIN_CASES_FOR_VERDICT,
    ClassMetrics,
    Estimate,
    Row,
    bootstrap_mean,
    case_metrics,
    compare_cases,
    format_estimate,
    judge,
    mean_dice,
    mean_known,
    paired_difference,
    surface_tolerance,
)
from medssl.predict import (
    WEIGHTS,
    Model,
    ModelInfo,
    Prediction,
    explain_failure,
    identify_prediction,
    load_model,
    predict_case,
    show_bar,
)
from medssl.runs import (
    DeliveredSummary,
    State,
    hash_file,
    hash_json,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from medssl.transforms.geometry import (
    MAX_SHEAR,
    grid_spacing,
    measure_shear,
)

MEASURED = "measured"  # .jsonl

_NO_NAME = re.compile(r"(class|label|segment|structure|region|roi|mask|foreground)? ?\d*")

Report = Callable[[str], object]


class CasesLeft(Exception):  # noqa: N818  # it is no error
    """This process has measured its cases; another one writes the tables."""


def evaluate_model(
    model: Model,
    cases: Sequence[Case],
    out: Path,
    *,
    ignore: int | None = None,
    tolerance: float | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    forecast: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Predict cases, compare with their labels, and write the tables.

    Writes ``per_case.csv`` and ``summary.json`` into `out`, and the masks as
    ``predictions/<case_id>.nii.gz`` (of a picture, in its format). Cases without a label are left
    out and reported. Pictures are measured in pixels: columns end in ``_px``.

    Args:
        model: Of ``load_model``.
        cases: Cases with their labels.
        out: The folder of the tables.
        ignore: Label value that means: not annotated.
        tolerance: Of surface_dice in mm; None takes `surface_tolerance` of each case. In
            pictures the unit is the pixel, and None takes one.
        about: What else the summary is to hold, such as the name of the data set.
        overwrite: Replace what stands in the folder and no evaluation wrote.
        forecast: Say first what it will take, and show a bar of windows on a terminal.
        report: Takes a line of progress.

    Returns:
        The content of ``summary.json``. A scan that cannot be read or segmented is in no figure;
        ``failed`` names it.

    Raises:
        InputError: No case has a label, or labels are unreadable, hold values that the model
            does not know, lie on another grid than their scan, or were made by a model and nobody
            has changed a voxel since: all such cases at once; or no scan could be segmented, or
            files would be replaced that no evaluation wrote.
    """
    labeled, unlabeled = split_by_label(cases, report)
    tables = ["per_case.csv", "summary.json"]
    masks = [_name_mask(case) for case in labeled]
    scans = [image for case in labeled for image in case.images]
    protect_files(out, [*tables, *masks], overwrite, scans)
    if not overwrite:
        _refuse_other_tables(out, about or {})
    _check_labels(labeled, model.info, ignore)
    measuring = _Measuring(model, labeled, ignore, tolerance, out, masks_in=out)
    [(rows, summary)] = _measure_models([measuring], [out], forecast, report)
    summary = {**(about or {}), **summary, "without_label": unlabeled}
    write_tables(out, rows, summary)
    record_predictions(out, [out / name for name in tables])
    return summary


def evaluate_data(
    path: Path,
    root: Path,
    out: Path,
    *,
    data: DataSection | None = None,
    tolerance: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    forecast: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Evaluate a run, one of its rounds, or a model folder on the labeled cases of a data set.

    Cases that the run was trained on (labeled, unlabeled or validation) are left out, and other
    scans of the same patients: their metrics would say nothing of new patients, and the labels of
    simulated-unlabeled ones are not evaluation's to open.

    Args:
        path: The run, round or model folder.
        root: The data set.
        out: The folder of the tables.
        data: How to read it: ``format``, ``labels``, ``ignore``; None takes the defaults.
        tolerance: Of surface_dice in mm; None takes `surface_tolerance` of each case.
        device: Torch device.
        overwrite: Replace what stands in the folder and no evaluation wrote.
        forecast: Say first what it will take, and show a bar of windows on a terminal.
        report: Takes a line of progress.

    Raises:
        InputError: The label map of the data is not the model's, there is no case to evaluate, or
            ``out`` is where a run has tables of its own.
    """
    refuse_run_folder(out)
    data = data or DataSection()
    model = load_model(path, device)
    dataset = read_dataset(root, data.format, data.labels)
    for note in dataset.notes:
        report(f"note: {note}")
    ignore = dataset.ignore if data.ignore is None else data.ignore
    _check_label_map(model, dataset, ignore)
    channels = len(dataset.channels)
    trained_on, notes = find_trained_on(path, dataset, lambda case: _hash_scan(case, channels))
    left_out = set(trained_on)
    cases = [case for case in dataset.cases if case.case_id not in left_out]
    if trained_on:
        report(
            f"{len(trained_on)} cases are left out: the run was trained on them, or on their "
            f"patients: {shorten(trained_on)}"
        )
    for note in notes:
        report(note)
    if not any(case.label is not None for case in cases):
        trained = (
            f" ({len(trained_on)} the run was trained on, or on their patients)"
            if trained_on
            else ""
        )
        raise InputError(
            f"{root}: none of {len(dataset.cases)} cases is labeled and new to the model"
            f"{trained}; there is nothing to evaluate it on"
        )
    about = {
        "model": str(path),
        "dataset": dataset.name,
        "places": locate_files([path, root]),
        "trained_on": trained_on,
        "remarks": notes,
    }
    return evaluate_model(
        model,
        cases,
        out,
        ignore=ignore,
        tolerance=tolerance,
        about=about,
        overwrite=overwrite,
        forecast=forecast,
        report=report,
    )


def evaluate_round(
    run_dir: Path,
    index: int,
    *,
    tolerance: float | None = None,
    device: str = "cpu",
    forecast: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Evaluate one round of a run on the run's own test cases.

    Writes ``evaluation/round_<index>/{per_case.csv, summary.json}`` and nothing else.

    Args:
        run_dir: The run folder.
        index: The round; 0 is labels only.
        tolerance: Of surface_dice in mm; None takes `surface_tolerance` of each case.
        device: Torch device.
        forecast: Say first what it will take, and show a bar of windows on a terminal.
        report: Takes a line of progress.

    Raises:
        InputError: The run has no test cases, or no such round that is done.
    """
    name, done = f"round_{index}", find_rounds(run_dir)
    dataset, ignore, labeled, unlabeled = open_test_cases(run_dir, report)
    if name not in done:
        known = ", ".join(entry.removeprefix("round_") for entry in done) or "none"
        raise InputError(f"{run_dir}: round {index} is not done; done are: {known}")
    model = load_model(run_dir / name, device)
    _check_labels(labeled, model.info, ignore)
    out = run_dir / "evaluation" / name
    measuring = _Measuring(model, labeled, ignore, tolerance, run_dir / "evaluation")
    [(rows, summary)] = _measure_models([measuring], [out], forecast, report)
    about = {"model": str(run_dir / name), "dataset": dataset.name}
    summary = {**about, **summary, "without_label": unlabeled}
    write_tables(out, rows, summary)
    return summary


def evaluate_run(
    run_dir: Path,
    *,
    tolerance: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    forecast: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Evaluate the delivered model and every round of a run on the run's own test cases.

    Writes ``evaluation/{per_case.csv, summary.json, predictions/}`` for the delivered model and
    ``evaluation/round_<r>/{per_case.csv, summary.json}`` for each round.

    Args:
        run_dir: The run folder.
        tolerance: Of surface_dice in mm; None takes `surface_tolerance` of each case.
        device: Torch device.
        overwrite: Replace masks of an earlier evaluation that were changed since.
        forecast: Say first what it will take, and show a bar of windows on a terminal.
        report: Takes a line of progress.

    Returns:
        The content of ``evaluation/summary.json``: ``delivered`` and ``rounds`` (name -> mean
        dice), ``paired`` (delivered minus round 0), ``verdict`` and the ``statement`` of it.

    Raises:
        InputError: The run has no test cases or has delivered no model.
    """
    dataset, ignore, labeled, unlabeled = open_test_cases(run_dir, report)
    run_summary = read_json(run_dir / "summary.json", DeliveredSummary)
    if read_json(run_dir / "state.json", State)["status"] not in ("delivered", "stopped_by_gate"):
        report(f"{run_dir}: the run is not finished; this measures the model that it has so far")
    paths = {"model": run_dir, **{name: run_dir / name for name in find_rounds(run_dir)}}
    hashes = {name: _hash_model(path) for name, path in paths.items()}
    out = run_dir / "evaluation"
    if read_files(out):  # 0.1.0 kept no record
        protect_files(out, [_name_mask(case) for case in labeled], overwrite)
    folders = {name: out if name == "model" else out / name for name in paths}
    delivered = load_model(run_dir, device)
    _check_labels(labeled, delivered.info, ignore)
    firsts = {hashes[name]: name for name in reversed(paths)}  # the delivered one is mostly a round
    measurings = {
        name: _Measuring(
            delivered if name == "model" else load_model(path, device),
            labeled,
            ignore,
            tolerance,
            out,
            masks_in=out if name == "model" else None,
            title=str(path),
        )
        for name, path in paths.items()
        if firsts[hashes[name]] == name
    }
    results = _measure_models(list(measurings.values()), list(folders.values()), forecast, report)
    measured = {hashes[name]: result for name, result in zip(measurings, results, strict=True)}
    tables = {name: measured[value][0] for name, value in hashes.items()}
    verdict = {
        "delivered": run_summary["delivered"],
        **_compare_to_baseline(run_summary, tables),
    }
    for name in reversed(paths):  # that of the delivered model, with the verdict, comes last
        rows, summary = measured[hashes[name]]
        about = {"model": str(paths[name]), "dataset": dataset.name}
        summary = {**about, **summary, "without_label": unlabeled}
        if name == "model":
            summary |= verdict
        write_tables(folders[name], rows, summary)
    return summary


def _refuse_other_tables(out: Path, about: Mapping[str, Any]) -> None:
    """Refuse to replace the tables of another model, or of other data.

    Raises:
        InputError: They stand in the folder.
    """
    before: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # what a kill left
        before = read_json(out / "summary.json")
    if "places" in about and before.get("places", about["places"]) != about["places"]:
        raise InputError(
            f"{out}: has the tables of {before.get('model')} on {before.get('dataset')}, another "
            f"model or other data; name another folder, or give {OVERWRITE} to replace them"
        )


class _Measuring:
    """The measuring of cases by a model: what a call before this one has done, and what is left.

    The log has the row of each finished case, with a hash of all that it depends on; masks are
    written into predictions/ of a folder where one is given. ``failed`` says why a case has none,
    and ``title`` of several models which one is measured.
    """

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        ignore: int | None,
        tolerance: float | None,
        log_in: Path,
        masks_in: Path | None = None,
        title: str = "",
    ) -> None:
        self.model, self.cases, self.ignore, self.tolerance = model, cases, ignore, tolerance
        self.title = title
        rank, count = ranks.find_rank()
        self.log = log_in / (f"{MEASURED}.{rank}.jsonl" if count > 1 else f"{MEASURED}.jsonl")
        self.masks_in = masks_in
        self.finished: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}  # not kept, since it may hold file names
        self.look_up(self.dealt)

    @property
    def dealt(self) -> list[Case]:
        """The cases that this process measures."""
        return ranks.deal(self.cases)

    @property
    def left(self) -> list[Case]:
        """Those of them that are still to be measured."""
        return [case for case in self.dealt if case.case_id not in self.finished]

    def look_up(self, cases: Sequence[Case]) -> list[str]:
        """Find which of some cases are finished, by whatever process; return the others."""
        logs = self.log.parent.glob(f"{MEASURED}*.jsonl")
        entries = {entry.get("of"): entry for log in logs for entry in read_audit(log)}
        logged = {entry["row"]["case_id"] for entry in entries.values() if "row" in entry}
        for case in cases:
            if case.case_id in logged and case.case_id not in self.finished:
                entry = entries.get(self.identify(case) or "")
                if entry is not None and self._has_mask(case, entry):
                    self.finished[case.case_id] = entry
        return [case.case_id for case in cases if case.case_id not in self.finished]

    def identify(self, case: Case) -> str | None:
        """Return a hash of what the figures of a case depend on; None if that cannot be said."""
        if self.model.info.provenance.get(WEIGHTS) is None or case.label is None:
            return None
        with contextlib.suppress(InputError):
            about = identify_prediction(self.model, case.images)
            label = [hash_source(case.label), case.segments, self.ignore, self.tolerance]
            return hash_json([__version__, about, label])
        return None

    def _has_mask(self, case: Case, entry: Mapping[str, Any]) -> bool:
        """Return whether the mask of a finished case stands as it was written, if one is to."""
        if self.masks_in is None:
            return True
        path = self.masks_in / _name_mask(case)
        return path.is_file() and entry.get("mask") == hash_file(path)


def _measure_models(
    measurings: Sequence[_Measuring], folders: Sequence[Path], forecast: bool, report: Report
) -> list[tuple[list[Row], dict[str, Any]]]:
    """Measure models, and return for each of them the rows of all cases, and what they say.

    Tables of an earlier evaluation in the folders, which would not fit the new masks, are removed.

    Raises:
        CasesLeft: Another process writes the tables.
        InputError: A model could measure no case.
    """
    num_windows = _forecast(measurings, folders[0], report) if forecast else 0
    for folder in folders:
        for name in ("summary.json", "per_case.csv"):
            (folder / name).unlink(missing_ok=True)
    with show_bar(num_windows) as bar:
        for measuring in measurings:
            if measuring.title:
                report(f"{measuring.title}: {len(measuring.dealt)} test cases")
            _measure(measuring, bar, report)
    ranks.meet()
    if not ranks.may_merge():
        raise CasesLeft("the first process writes the tables of all cases")
    return [_merge(measuring) for measuring in measurings]


def _forecast(measurings: Sequence[_Measuring], out: Path, report: Report) -> int:
    """Say what it takes to measure models that are like the first; return their windows."""
    left = {case.case_id: case.images for each in measurings for case in each.left}
    if not left:
        return 0
    costs = forecast_costs(measurings[0].model, left, measured=True)
    times = sum(len(each.left) for each in measurings) / len(left)
    num_windows = round(times * costs.num_windows)
    costs = replace(costs, seconds=times * costs.seconds, num_windows=num_windows)
    report(costs.describe(len(left), out))
    return num_windows


def _measure(measuring: _Measuring, bar: tqdm[Any], report: Report) -> None:
    """Predict and measure the cases that are left to this process."""
    model, cases, out = measuring.model, measuring.dealt, measuring.masks_in
    names = {index: name for index, name in model.info.labels.items() if index > 0}
    finished = {case.case_id for case in cases} & measuring.finished.keys()
    for folder in () if out is None else (out, out / "predictions"):
        remove_leftovers(folder, is_shared=True, below=False)
    record = Record(out) if out is not None else None
    if finished:
        report(
            f"passed over: {len(finished)} of {len(cases)} cases that were measured "
            "before, with the same model, settings, scan and label"
        )

    def tell(number: int, case: Case, text: str) -> None:
        with bar.external_write_mode():
            report(f"[{number}/{len(cases)}] {case.case_id}: {text}")

    with contextlib.ExitStack() as stack:
        if record is not None:
            stack.callback(record.write)  # of what was done before an interruption too
        for number, case in enumerate(cases, 1):
            if case.case_id not in finished:
                try:
                    prediction = predict_case(model, case.images, advance=bar.update)
                except Exception as error:  # whatever it is, it is this case's
                    why = measuring.failed[case.case_id] = explain_failure(error)
                    tell(number, case, f"not measured: {why}")
                    continue
                metrics, entry = _measure_case(measuring, case, prediction, names)
                tell(number, case, _describe(metrics, names))
                measuring.finished[case.case_id] = entry
            if record is not None:
                record.add_files([record.out / _name_mask(case)])


def _merge(measuring: _Measuring) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of all cases, and what they say.

    Raises:
        CasesLeft: Other processes have not measured all of theirs.
        InputError: No case could be measured.
    """
    cases, failed = measuring.cases, measuring.failed
    if ranks.find_rank()[1] > 1 and (missing := measuring.look_up(cases)):
        raise CasesLeft(
            f"{len(cases) - len(missing)} of {len(cases)} cases are measured; the process that "
            f"measures the last one writes the tables. If none is at work, {shorten(missing)} "
            "could not be measured, and the same command in one process writes the tables "
            "without them"
        )
    done = measuring.finished
    entries = {case.case_id: done[case.case_id] for case in cases if case.case_id in done}
    if not entries:
        listed = "\n".join(f"  {case_id}: {why}" for case_id, why in failed.items())
        raise InputError(f"none of {len(cases)} cases could be measured:\n{listed}")
    patients = {case.case_id: case.patient_id for case in cases}
    rows = [{**entry["row"], "patient_id": patients[key]} for key, entry in entries.items()]
    summary = summarize_rows(rows)
    tolerances = [entry["tolerance"] for entry in entries.values()]
    extent = {"low": min(tolerances), "high": max(tolerances)}
    unit = "mm" if "hd95_mm" in next(iter(summary["classes"].values())) else "px"
    flags = {case_id: entry["flags"] for case_id, entry in entries.items() if entry["flags"]}
    about = {f"surface_tolerance_{unit}": extent, "flags": flags, "failed": list(failed)}
    return rows, {**summary, **about}


def _measure_case(
    measuring: _Measuring, case: Case, prediction: Prediction, names: Mapping[int, str]
) -> tuple[dict[int, ClassMetrics], dict[str, Any]]:
    """Compare a prediction with the label; write the mask, if it is to be, and a line of the log.

    Returns the metrics of each class, and that line.
    """
    values = measuring.model.info.label_values
    label, affine = _read_label(case, values, measuring.ignore)
    spacing = grid_spacing(affine) if has_spacing(case.images[0]) else None
    tolerance = measuring.tolerance
    tolerance = surface_tolerance(spacing) if tolerance is None else tolerance
    metrics = case_metrics(prediction.mask, label, spacing, len(values), tolerance)
    entry = {
        "of": measuring.identify(case),
        "row": tabulate_case(case, metrics, names, in_mm=spacing is not None),
        "tolerance": tolerance,
        "flags": list(prediction.flags),
        "mask": None,
    }
    if measuring.masks_in is not None:
        path = measuring.masks_in / _name_mask(case)
        place = (prediction.mask, prediction.affine, values)
        write_mask(path, *place, header=prediction.header, origin="prediction")
        entry["mask"] = hash_file(path)
    if entry["of"] is not None:
        measuring.log.parent.mkdir(parents=True, exist_ok=True)
        append_audit(measuring.log, **entry)
    return metrics, entry


def _name_mask(case: Case) -> str:
    """Return the place of a case's mask in the folder of an evaluation."""
    return f"predictions/{case.case_id}{name_mask_suffix(case.images[0])}"


def _hash_scan(case: Case, num_channels: int) -> list[str]:
    """Return the hashes of a scan's channels; none of one that cannot be read."""
    try:
        volume = read_image(case.images, num_channels)
    except InputError:
        return []
    return hash_voxels(volume.array, volume.affine)


def tabulate_case(
    case: Case, metrics: Mapping[int, ClassMetrics], names: Mapping[int, str], in_mm: bool = True
) -> Row:
    """Return the row of a case in ``per_case.csv``; ``dice``, the mean over classes, is last.

    Args:
        case: The case.
        metrics: Of ``case_metrics``, by class index.
        names: Name of each foreground class.
        in_mm: Whether a spacing was known; else the columns end in ``_px``.
    """
    columns = {
        "dice": "dice",
        "hd95_mm" if in_mm else "hd95_px": "hd95_mm",
        "surface_dice": "surface_dice",
        "volume_ml" if in_mm else "area_px": "volume_ml",
        "reference_ml" if in_mm else "reference_px": "reference_ml",
        "missed": "missed",
    }
    row: Row = {"case_id": case.case_id, "patient_id": case.patient_id}
    for column, attribute in columns.items():
        for index, name in names.items():
            row[f"{column}/{name}"] = getattr(metrics[index], attribute)
    row["dice"] = mean_dice(dict(metrics))
    return row


def summarize_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Return means with 95 % intervals, and how often a class was missed or absent.

    Args:
        rows: Of ``tabulate_case``, one a case.
    """
    names = [column.partition("/")[2] for column in rows[0] if column.startswith("dice/")]
    unit = "mm" if any(column.startswith("hd95_mm/") for column in rows[0]) else "px"
    classes = {name: _summarize_class(rows, name, unit) for name in names}
    return {
        "num_cases": len(rows),
        "num_patients": len(set(_find_patients(rows))),
        "dice": _estimate(rows, "dice"),
        "num_missed": sum(entry["num_missed"] for entry in classes.values()),
        "classes": classes,
        "notes": [
            "Intervals: percentile bootstrap over patients with all of their cases (10,000 "
            "resamples), which assumes independent patients. Of few it is too narrow: of 8 it "
            "holds the truth in 89 of 100 cases, of 40 in 94.",
            "A missed structure and a false alarm count as dice 0 and hd95 = diagonal of the "
            "image; a class absent in reference and prediction is n/a and in no mean, but beside a "
            "model with a false alarm there it counts as dice 1.",
        ],
    }


def _summarize_class(rows: Sequence[Row], name: str, unit: str) -> dict[str, Any]:
    """Return the summary of one class."""
    dice = _column(rows, f"dice/{name}")
    reference = _column(rows, f"reference_{'ml' if unit == 'mm' else 'px'}/{name}")
    predicted = _column(rows, f"{'volume_ml' if unit == 'mm' else 'area_px'}/{name}")
    pairs = list(zip(reference, predicted, strict=True))
    summary: dict[str, Any] = {
        metric: _estimate(rows, f"{metric}/{name}")
        for metric in ("dice", f"hd95_{unit}", "surface_dice")
    }
    return {
        **summary,
        "num_present": sum(1 for volume in reference if volume),
        "num_missed": int(sum(v or 0 for v in _column(rows, f"missed/{name}"))),
        "num_false_alarms": sum(1 for there, ours in pairs if not there and ours),
        "num_absent": sum(1 for value in dice if value is None),
    }


def write_tables(out: Path, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
    """Write ``per_case.csv`` and then ``summary.json``, each atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: _format(value) for key, value in row.items()} for row in rows])
    write_text(out / "per_case.csv", text.getvalue())
    write_json(out / "summary.json", summary)


def render_summary(summary: Mapping[str, Any]) -> str:
    """Return a summary as text for the terminal, at most 100 columns wide."""
    unit = "mm" if all("hd95_mm" in entry for entry in summary["classes"].values()) else "px"
    width = min(26, max([len("mean over classes"), *(len(name) for name in summary["classes"])]))
    head = f"{'':<{width}}  {'dice [95 % interval]':<22}  {f'hd95 ({unit})':>9}"
    patients = summary["num_patients"]
    extent = f"{summary['num_cases']} cases"
    extent += f" of {patients} patients" if patients < summary["num_cases"] else ""
    lines = [extent, f"{head}  surface_dice  missed  alarms  absent"]
    for name, entry in summary["classes"].items():
        hd95, surface = entry[f"hd95_{unit}"]["mean"], entry["surface_dice"]["mean"]
        lines.append(
            f"{name[:width]:<{width}}  {format_estimate(entry['dice']):<22}"
            f"  {'n/a' if hd95 is None else f'{hd95:.2f}':>9}"
            f"  {'n/a' if surface is None else f'{surface:.3f}':>12}"
            f"  {entry['num_missed']:>6}  {entry['num_false_alarms']:>6}  {entry['num_absent']:>6}"
        )
    lines.append(f"{'mean over classes':<{width}}  {format_estimate(summary['dice'])}")
    failed = list(summary.get("failed") or ())
    if failed:
        lines.append(f"not measured, and in no figure: {len(failed)} cases: {shorten(failed)}")
    if "statement" in summary:
        means = summary["rounds"].items()
        lines.append(", ".join(f"{n}: {'n/a' if d is None else f'{d:.3f}'}" for n, d in means))
        lines.append(summary["statement"])
    return "\n".join(lines)


def _estimate(rows: Sequence[Row], column: str) -> Estimate:
    """Return the mean of a column with its interval."""
    return bootstrap_mean(_column(rows, column), patients=_find_patients(rows))


def _find_patients(rows: Sequence[Row]) -> list[str]:
    """Return the patient of each row."""
    return [str(row["patient_id"]) for row in rows]


def _column(rows: Sequence[Row], name: str) -> list[float | None]:
    """Return the numbers of a column."""
    values = [row[name] for row in rows]
    return [None if value is None else float(value) for value in values]


def _format(value: str | float | int | None) -> str:
    """Return a cell: empty for n/a, six significant digits for a fraction, mm or ml."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _describe(metrics: Mapping[int, ClassMetrics], names: Mapping[int, str]) -> str:
    """Return the line of progress of a case."""
    dice = mean_dice(dict(metrics))
    text = "no class is present" if dice is None else f"dice {dice:.3f}"
    missed = [name for index, name in names.items() if metrics[index].missed]
    return f"{text}, missed: {', '.join(missed)}" if missed else text


def _read_label(
    case: Case, label_values: tuple[int, ...], ignore: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the classes of a case and the affine of its scan, and refuse a label off its grid.

    Of a slice the label may not know how thick it is.
    """
    assert case.label is not None, "cases without a label were left out"
    label, affine = read_label(case.label, label_values, ignore, case)
    shape, image_affine = read_geometry(case.images[0])
    refuse_other_grid(case.label, label.shape, affine, str(case.images[0]), shape, image_affine)
    shear = measure_shear(shape, image_affine)
    if shear > MAX_SHEAR:
        raise InputError(
            f"{case.images[0]}: its axes are {shear:.1f} degrees off right angles, so mm and ml "
            f"of it would be wrong; {STRAIGHTEN}"
        )
    return label, image_affine


def _check_labels(cases: Sequence[Case], info: ModelInfo, ignore: int | None) -> None:
    """Read every label before the first prediction, and name all bad cases at once."""
    problems = []
    label_values, colors = info.label_values, {"the model's training labels": info.palette}
    for case in cases:
        try:
            _read_label(case, label_values, ignore)
            assert case.label is not None, "cases without a label were left out"
            if origin := read_origin(case.label, case, ignore):
                raise InputError(
                    f"{case.label}: is a {origin} of a model, as it was made, and measures nothing "
                    "but how alike models are: give a person's label, or take this one away"
                )
            if not has_spacing(case.label):
                colors[str(case.label)] = read_label_values(case.label).colors
        except InputError as error:
            problems.append(f"  {case.case_id}: {error}")
    problems += [f"  {problem}" for problem in compare_colors(colors)]
    if problems:
        known = f"the model knows the label values {list(label_values)}"
        head = f"{len(problems)} of {len(cases)} labels cannot be compared with predictions"
        raise InputError("\n".join([f"{head} ({known}):", *problems]))


def _check_label_map(model: Model, dataset: Dataset, ignore: int | None) -> None:
    """Refuse a data set whose declared label map is not the model's."""
    if dataset.labels is None:
        return
    values = model.info.label_values
    ours = {values[index]: name for index, name in model.info.labels.items()}
    theirs = {value: name for value, name in dataset.labels.items() if value != ignore}
    moved = [
        f"{name!r} is {value} in the data and {other} in the model"
        for value, name in theirs.items()
        for other, other_name in ours.items()
        if value and fold_name(name) == fold_name(other_name) and value != other
    ]
    if set(ours) != set(theirs) or moved:
        detail = f" ({'; '.join(moved)})" if moved else ""
        raise InputError(
            f"{dataset.root}: the labels of the data are {theirs}, those of the model {ours}"
            f"{detail}; evaluate needs the same values: give data with the model's label map"
        )
    others = [value for value in sorted(ours) if value and _differ(theirs[value], ours[value])]
    if others:
        listed = "; ".join(
            f"{value} is {theirs[value]!r} in the data and {ours[value]!r} in the model"
            for value in others
        )
        meant = " ".join(f"data.labels.{value}={ours[value]!r}" for value in ours if value)
        raise InputError(
            f"{dataset.root}: label values bear other names than in the model: {listed}. If they "
            "mean the same, name them as the model does: in files that name their segments, there; "
            f"else by {meant}"
        )


def _differ(name: str, other: str) -> bool:
    """Tell whether two names are those of two structures; a number is no name."""
    names = {fold_name(name), fold_name(other)}
    return len(names) > 1 and not any(map(_NO_NAME.fullmatch, names))


def _hash_model(folder: Path) -> str:
    """Return a hash of the weights of a run's or round's model."""
    files = sorted(
        p for part in ("model", "models") for p in folder.glob(f"{part}/**/*.safetensors")
    )
    if not files:
        raise InputError(
            f"{folder}: holds no model; run the same medssl train command again to finish the run"
        )
    return hash_json([(str(path.relative_to(folder)), hash_file(path)) for path in files])


def _compare_to_baseline(
    run_summary: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """Return means of all rounds side by side, and the paired difference to round 0.

    Args:
        run_summary: The run's ``summary.json``.
        tables: The rows of each round, and of the delivered model as ``model``.
    """
    delivered = str(run_summary["delivered"])
    ids = [{str(row["case_id"]) for row in rows} for rows in tables.values()]
    shared = set.intersection(*ids)
    aligned = {n: [r for r in rows if r["case_id"] in shared] for n, rows in tables.items()}
    dice = dict(zip(aligned, compare_cases(list(aligned.values())), strict=True))
    rounds = {name: mean_known(values) for name, values in dice.items() if name != "model"}
    paired = None
    if any(name != "round_0" for name in rounds) and "round_0" in rounds and shared:
        ours, theirs = compare_cases([aligned["model"], aligned["round_0"]])
        paired = paired_difference(ours, theirs, patients=_find_patients(aligned["model"]))
    verdict = judge(paired)
    steps = (run_summary.get("baseline") or {}).get("steps")
    baseline = f"round_0 (labels only{f', {steps} steps' if steps else ''})"
    if paired is None:
        statement = "not measured: no round after round_0 is done"
    else:
        why = f" of {paired['num_patients']} patients" * (paired["num_patients"] < paired["n"])
        why += f", a verdict needs {MIN_CASES_FOR_VERDICT}" * (verdict == "no verdict")
        num_lost = len(set.union(*ids) - shared)
        why += f"; {num_lost} more that some round could not segment are left out" * (num_lost > 0)
        statement = (
            f"{verdict}: dice of the delivered model ({delivered}) minus {baseline}: "
            f"{format_estimate(paired, '+')} on {paired['n']} test cases{why}"
        )
    return {"rounds": rounds, "paired": paired, "verdict": verdict, "statement": statement}
