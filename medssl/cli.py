"""The command line: one subcommand per stage, each importing its stage when it is called."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medssl import __version__, ranks
from medssl.config import DataSection, Fidelity, InputError, is_url
from medssl.formats.readers import FORMATS
from medssl.runs import FULL_DISK_ERRORS, check_writable, describe_full_disk, list_rounds
from medssl.settings import (
    Resolved,
    describe_terms,
    find_configs,
    list_methods,
    load_config,
    render,
)

if TYPE_CHECKING:
    from medssl.rounds.deliver import Outcome

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Segment medical scans when only a few are annotated.",
    epilog="Start here: medssl demo; then: medssl check DATA; medssl train DATA. On data with many "
    "labels, labeled=4 test=40 simulates few: 40 cases are kept aside, and 4 labels are opened.",
)

DEMO_SHAPE = (40, 48, 32)  # voxels, small enough for a few hundred steps in minutes
DELIVERED, FAILED, BAD_INPUT, STOPPED_BY_GATE, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = {
    "delivered": DELIVERED,
    "stopped_by_gate": STOPPED_BY_GATE,
    "interrupted": INTERRUPTED,
}

First = Annotated[
    str, typer.Argument(metavar="DATA_OR_CONFIG", help="A folder, a list, a URL of them, a YAML.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Such as seed=1 steps=2000 train.lr=1e-3"),
]
RunOrModel = Annotated[
    Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, RUN/round_0, a model folder or zip.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files in --out that medssl did not write.")
]

_UNWRITABLE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


def main() -> None:
    """Run the command line; a user's mistake is a message and exit code 2, not a traceback."""
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"(monai|torch|ignite|mlflow)(\..*)?")
    for stream in (sys.stdout, sys.stderr):  # no name is a reason to stop, whatever the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app([_expand_home(text) for text in sys.argv[1:]], standalone_mode=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except OSError as error:
        if error.errno in FULL_DISK_ERRORS:
            where = Path(error.filename or Path.cwd())
            print(f"error: {describe_full_disk(error.errno, where)}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None
        if error.errno not in _UNWRITABLE:
            raise
        place = error.filename or "the output folder"
        print(f"error: {place}: {error.strerror}; name another folder", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None


def _expand_home(text: str) -> str:
    """Return an argument in which `~` is the home folder also where no shell sees to it.

    Of a setting, `~` alone is nothing (null), as in YAML.
    """
    return re.sub(
        r"(^|[=,]|sqlite:///)(~[\w.-]*)(?=/)|(^|^--[\w-]+=)(~[\w.-]*)$",
        lambda m: (m[1] or m[3] or "") + os.path.expanduser(m[2] or m[4]),
        text,
    )


def _parse_output(text: str) -> Path:
    """Return the path of what is written, which is never a URL."""
    if is_url(text):
        raise typer.BadParameter(f"{text!r} is a URL: only scans are read from one; name a folder")
    return Path(text)


def _fetch(place: str, cache: Path) -> Path:
    """Return a path as it is, and of a URL its copy in the cache, which the first process makes."""
    if not is_url(place):
        return Path(place)
    from medssl.data.store import mirror_store

    def mirror() -> list[str]:
        try:
            return [str(mirror_store(place, cache)), ""]
        except (InputError, OSError) as error:
            return ["", str(error)]

    path, problem = ranks.share(mirror)  # the problem too: all processes end by it
    if problem:
        raise InputError(problem)
    return Path(path)


def _fetch_data(first: str, overrides: Sequence[str], cache: Path) -> list[str]:
    """Return overrides that name a copy of the data where it has a URL, in a YAML or beside it."""
    root = load_config(first, overrides).config.data.root
    if not is_url(root):
        return list(overrides)
    return [*overrides, f"data.root={json.dumps(str(_fetch(str(root), cache)))}"]


def _find_cache(model: Path) -> Path:
    """Return the folder of caches beside the run that a model is from, else that of runs/."""
    home = model.resolve()
    runs = [path for path in (home, *home.parents) if (path / "run.json").is_file()]
    return (runs[0].parent if runs else Path("runs")) / "cache"


def _parse_amount(text: str) -> float:
    """Return a number that is not negative; `nan` and `inf` are none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is no number from 0 on")
    return value


def _check_format(format: str | None) -> None:
    """Refuse a format that masks are not written in."""
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: is none of {', '.join(FORMATS)}")


def _check_device(name: str) -> None:
    """Refuse what cannot be the name of a device, before torch is imported to look for it."""
    if not re.fullmatch(r"(auto|cpu|cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"device {name}: give auto, cpu, cuda or cuda:1")


def _print_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        print(f"medssl {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Segment medical scans when only a few are annotated."""


@app.command()
def check(
    first: First,
    overrides: Overrides = None,
    draft: Annotated[
        Path | None,
        typer.Option(help="Only write a CSV of the cases, as understood, to look through."),
    ] = None,
) -> None:
    """Show a data set as a table, every file of it, and everything that is wrong with it."""
    from medssl.data.cases import split_cases
    from medssl.data.files import explain_files, write_draft
    from medssl.data.layouts import list_files, read_dataset

    settings = _fetch_data(first, overrides or [], Path("runs", "cache"))
    config = load_config(first, settings).config
    if config.data.root is None:
        raise InputError(f"{first}: names no data; add data.root to it or give data.root=FOLDER")
    root = Path(config.data.root)
    if draft is not None:
        print(write_draft(root, draft))
        return
    dataset = read_dataset(root, config.data.format, config.data.labels)
    if root.is_dir():
        lists = {"list": ("cases.csv", "cases.json"), "folders": ()}
        named = [root / name for name in lists.get(dataset.format, ("dataset.json",))]
        print("\n".join(explain_files(root, [*named, *list_files(dataset)])) + "\n")
    from medssl.data.check import check_dataset  # slow to import: after the quick mistakes
    from medssl.runs import CaseCounter

    splits = split_cases(dataset, config.data, config.validation)
    result = check_dataset(dataset, splits, config.data.ignore, CaseCounter("check"))
    print(result.render())
    if result.problems:
        raise SystemExit(BAD_INPUT)


@app.command("config")
def show_config(
    first: Annotated[str | None, typer.Argument(metavar="DATA_OR_CONFIG")] = None,
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration, and where each value came from."""
    arguments = [*([first] if first else []), *(overrides or [])]
    source = arguments.pop(0) if arguments and "=" not in arguments[0] else None
    if source is not None and not is_url(source) and not Path(source).exists():
        raise InputError(f"{source}: no such file or folder; give DATA, CONFIG or key=value")
    print(render(load_config(source, arguments)))


@app.command()
def methods() -> None:
    """List the presets that method=NAME takes, and the configurations that come along."""
    for name, path in list_methods().items():
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        config = load_config(None, [f"method={name}"]).config
        print(f"{name}\n    {about}\n    {describe_terms(config)}")
    print("\nconfigurations:")
    for path in sorted(find_configs().glob("*.yaml")):
        print(f"  {path}")


@app.command()
def train(
    first: First,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(parser=_parse_output, help="Run folder; default runs/<data>.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete the run, start over.")] = False,
    max_hours: Annotated[
        float | None, typer.Option(parser=_parse_amount, help="Stop after so many hours.")
    ] = None,
    round_0: Annotated[
        Path | None, typer.Option("--round-0", help="A run whose round 0 is taken over.")
    ] = None,
    predict_unlabeled: Annotated[
        bool, typer.Option("--predict-unlabeled", help="Write masks of the unlabeled cases.")
    ] = False,
    cross_check: Annotated[
        int,
        typer.Option("--cross-check", help="Measure by as many more trainings."),
    ] = 0,
) -> None:
    """Train: labels alone first, then students on pseudo-labels; the same command resumes."""
    with ranks.join_others(), ranks.let_first_speak():
        home = run.parent if run else Path("runs")
        settings = _fetch_data(first, overrides or [], home / "cache")
        outcome = _train(
            load_config(first, settings),
            lambda plan: load_config(first, settings, plan),
            run,
            dry_run=dry_run,
            restart=restart and not ranks.is_started_again(),
            max_hours=max_hours,
            predict_unlabeled=predict_unlabeled,
            round_0=round_0,
            cross_check=cross_check,
        )
    if outcome is not None and ranks.find_rank()[1] == 1:  # torchrun starts what failed again
        is_whole = outcome.status != "delivered" or not outcome.unsegmented
        raise SystemExit(EXIT_CODES[outcome.status] if is_whole else FAILED)


def _train(
    resolved: Resolved,
    reload: Callable[[Mapping[str, Any]], Resolved],
    run: Path | None,
    *,
    dry_run: bool = False,
    restart: bool = False,
    max_hours: float | None = None,
    predict_unlabeled: bool = False,
    round_0: Path | None = None,
    cross_check: int = 0,
) -> Outcome | None:
    """Prepare, print the plan, run all rounds, and print what to do next."""
    from medssl.runs import StopFlag, lock_run

    root = _check_training(resolved, cross_check, round_0)
    place = root.resolve()
    folder = run or Path("runs") / ((place.name if place.is_dir() else place.stem) or "run")
    if not dry_run:
        check_writable(folder, "--run")
    from medssl.cross_check import (
        cross_check_run as check_folds,  # slow to import: after the mistakes
    )
    from medssl.cross_check import list_folds
    from medssl.rounds.loop import prepare_run, run_training

    prepared = prepare_run(resolved, reload, None if restart or dry_run else folder)
    if cross_check:
        list_folds(prepared, cross_check)
    if dry_run:
        print(f"settings given, `medssl config` lists all:\n{render(prepared.resolved, True)}\n")
    print(_describe_plan(prepared, folder, cross_check), flush=True)
    if dry_run:
        return None
    stop = StopFlag(folder, max_hours)
    folds: Mapping[str, Any] | None = None

    def finish(outcome: Outcome) -> Outcome:
        nonlocal folds
        if cross_check and outcome.status in ("delivered", "stopped_by_gate"):
            folds = check_folds(prepared, folder, stop, cross_check)
            if folds is None:
                message = f"{outcome.message}; stopped by {stop.reason} before all folds were "
                message += "measured: the same command goes on"
                outcome = replace(outcome, status="interrupted", message=message)
        _write_report(folder)
        return outcome

    with lock_run(folder), stop.catch_signals():
        outcome = run_training(
            prepared, folder, stop, restart, predict_unlabeled, round_0, finish=finish
        )
    print(f"\n{outcome.message}")
    if outcome.delivered is not None:
        _print_next_steps(outcome, prepared, folder, folds)
    return outcome


def _print_next_steps(
    outcome: Outcome, prepared: Any, folder: Path, folds: Mapping[str, Any] | None
) -> None:
    """Print what folds have measured, and what may be done with a model that was delivered."""
    if folds is not None:
        print(f"measured:  {folds['statement']}")
    if outcome.status == "stopped_by_gate":
        print(f"look at:   {folder / 'round_*' / 'pseudo_masks'}, the masks that the gate judged")
    print(f"report:    {folder / 'report.html'}")
    scan = "SCAN.nii.gz" if prepared.plan.has_spacing else "PICTURE.png"
    print(f"predict:   medssl predict {folder} {scan} --out masks")
    if prepared.splits.test:
        print(f"evaluate:  medssl evaluate {folder}")
    else:
        print(f"evaluate:  medssl evaluate {folder} OTHER_LABELED_DATA --out evaluation")
    print(f"MLflow:    medssl ui {folder.parent}")


def _check_training(resolved: Resolved, cross_check: int, round_0: Path | None) -> Path:
    """Answer the mistakes that need neither torch nor a scan; return where the data is."""
    from medssl.data.cases import select_cases, split_cases
    from medssl.data.layouts import read_dataset

    data, count = resolved.config.data, ranks.find_rank()[1]
    if count > 1 and not ranks.can_meet():
        raise InputError(
            f"WORLD_SIZE={count} without MASTER_ADDR: several processes train together if torchrun "
            f"starts them: torchrun --nproc-per-node {count} -m medssl train ..."
        )
    if count > 1 and cross_check:
        raise InputError("--cross-check trains in one process: leave out torchrun, or the option")
    if data.root is None:
        raise InputError("no data: give a folder or a list of scans, or data.root in the YAML")
    dataset = read_dataset(data.root, data.format, data.labels)
    splits = split_cases(dataset, data, resolved.config.validation)
    _check_device(resolved.config.train.device)
    if cross_check:
        from medssl.cross_check import deal_folds

        deal_folds(select_cases(dataset, splits, "labeled"), cross_check, data.split_seed)
    if round_0 is not None and not (round_0 / "round_0" / "model" / "done.json").is_file():
        raise InputError(f"--round-0 {round_0}: there is no finished round 0 in it")
    return Path(data.root)


def _describe_plan(prepared: Any, folder: Path, num_folds: int) -> str:
    """Return the plan with its reasons, and what it costs with the trainings of folds, as text."""
    from medssl.data.cases import format_count
    from medssl.plan import describe_steps

    plan, splits = prepared.plan, prepared.splits
    counts = ", ".join(
        f"{len(getattr(splits, part))} {part}" for part in ("labeled", "unlabeled", "val", "test")
    )
    reasons = "\n".join(f"  - {reason}" for reason in plan.reasons)
    estimate = plan.estimate
    free = shutil.disk_usage(folder.parent if folder.parent.exists() else Path()).free / 1e9
    names = ", ".join(name for index, name in plan.labels.items() if index)
    rounds = prepared.resolved.config.train.rounds if splits.unlabeled else 0
    steps = describe_steps(plan.steps)
    minutes = round((1 + num_folds) * estimate.get("hours", 0) * 60)
    folds = f" with {format_count(num_folds, 'fold')}" if num_folds else ""
    is_new = not (folder / "plan.json").exists()  # later much of it is there
    is_full = is_new and estimate["disk_mb"] / 1000 > free
    warning = f"\nwarning: the disk has only {free:.0f} GB left" if is_full else ""
    return (
        f"{prepared.dataset.name}: {counts}; classes: {names}\nplan:\n{reasons}\n"
        f"  - round 0 on labels alone and {format_count(rounds, 'round')} of students, {steps}: "
        f"about {format_count(minutes, 'minute')}{folds}, "
        f"{estimate['disk_mb'] / 1000:.2f} GB of disk ({free:.0f} GB free)\n"
        f"{_describe_sharing(plan)}run folder: {folder}{warning}"
    )


def _describe_sharing(plan: Any) -> str:
    """Return how several processes share the steps as a line of text; nothing for one."""
    count = ranks.find_rank()[1]
    if count == 1:
        return ""
    text = f"  - {count} processes share the patches of a step; the minutes are those of one alone"
    if plan.batch % count:
        even = -(-plan.batch // count) * count
        text += f"; {plan.batch} labeled ones do not come out even, train.batch={even} would (and "
        text += "gives another model)"
    return f"{text}\n"


def _write_report(folder: Path, share: bool = False) -> Path:
    """Write both reports of a run; the one to share has pseudonyms and no paths."""
    from medssl.report import write_report

    return write_report(folder)[share]  # MLflow gets the second one


@app.command()
def predict(
    model: RunOrModel,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Scans, folders, lists, URLs of them.")
    ],
    out: Annotated[Path, typer.Option(parser=_parse_output, help="Folder of the masks.")],
    probs: Annotated[bool, typer.Option("--probs", help="Write class probabilities.")] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Write a map of predictive entropy, in nats.")
    ] = False,
    fast_uncertainty: Annotated[
        bool, typer.Option("--fast-uncertainty", help="The same in a quarter of the time.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help=f"Of the masks; default: that of each scan. {', '.join(FORMATS)}."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Segment scans; masks have the input's grid and the original label values."""
    with ranks.join_others(whatever_comes=True):
        fidelity: Fidelity = "fast" if fast_uncertainty else "full"
        maps = ["probs"] * probs + ["uncertainty"] * (uncertainty or fast_uncertainty)
        paths = [_fetch(place, _find_cache(model)) for place in inputs]
        _predict(model, paths, out, maps, fidelity, format, overwrite, device)


def _predict(
    model: Path,
    inputs: list[Path],
    out: Path,
    maps: Sequence[str],
    fidelity: Fidelity,
    format: str | None,
    overwrite: bool,
    device: str,
) -> None:
    """Say what it takes, and segment the scans that are dealt to this process."""
    from medssl.data.predictions import SomeFailedError, plan_predictions
    from medssl.data.trained import count_model_channels

    _check_device(device)
    probs, uncertainty = "probs" in maps, "uncertainty" in maps
    channels = count_model_channels(model)
    _check_format(format)
    plan = plan_predictions(inputs, out, channels, maps=maps, overwrite=overwrite, format=format)
    if not plan.scans:
        print("no scan is left for process {} of {}".format(*ranks.find_rank()))
        return
    from medssl.costs import forecast_costs  # slow to import: after the mistakes
    from medssl.predict import find_finished, load_model, predict_files

    loaded = load_model(model, _take_device(device))
    try:
        finished = find_finished(loaded, plan, out, uncertainty, fidelity)
        if finished:
            number = f"{len(finished)} of {len(plan.scans)}"
            print(f"passed over: {number} scans whose masks this model has written there already")
        left = {name: images for name, images in plan.scans.items() if name not in finished}
        costs = forecast_costs(
            loaded, left, probs=probs, uncertainty=uncertainty, fidelity=fidelity
        )
        if left:
            print(costs.describe(len(left), out), flush=True)
        predict_files(
            loaded,
            inputs,
            out,
            probs=probs,
            uncertainty=uncertainty,
            fidelity=fidelity,
            overwrite=overwrite,
            format=format,
            num_windows=costs.num_windows,
            finished=finished,
        )
    except KeyboardInterrupt:
        print(f"stopped: the masks of finished scans stand in {out}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except SomeFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None


@app.command()
def evaluate(
    model: RunOrModel,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Labeled scans; default: a run's test.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.KEY=VALUE", help="How to read DATA: data.ignore=255"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=_parse_output, help="Folder of the tables.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(parser=_parse_amount, help="Of surface Dice, in mm (pixels)."),
    ] = None,
    round_index: Annotated[
        str | None,
        typer.Option("--round", help="0, 1, ... or all: of a run, on its own test cases."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Measure a model on labeled scans it was not trained on, on full volumes, in mm or pixels."""
    with ranks.join_others(whatever_comes=True):
        path = _fetch(data, _find_cache(model)) if data else None
        _evaluate(
            model, path, list(overrides or ()), out, tolerance, round_index, overwrite, device
        )


def _evaluate(
    model: Path,
    data: Path | None,
    overrides: list[str],
    out: Path | None,
    tolerance: float | None,
    round_index: str | None,
    overwrite: bool,
    device: str,
) -> None:
    """Measure the cases that are dealt to this process, and write the tables if they are the last.

    Tables, report and what is printed of them are made by one process.
    """
    _check_device(device)
    model, round_number = _resolve_round(model, data, round_index)
    settings = _check_evaluation(model, data, overrides, out, round_number)
    # slow to import: after the quick mistakes
    from medssl.evaluate import (
        CasesLeft,
        evaluate_data,
        evaluate_round,
        evaluate_run,
        render_summary,
    )
    from medssl.runs import lock_run, read_json

    chosen = _take_device(device)
    options: dict[str, Any] = {"tolerance": tolerance, "device": chosen, "forecast": True}
    is_run = data is None and (model / "run.json").is_file()
    is_shared = ranks.find_rank()[1] > 1
    try:
        with lock_run(model, is_shared) if is_run else contextlib.nullcontext():
            if data is not None and out is not None:
                summary = evaluate_data(
                    model, data, out, data=settings, overwrite=overwrite, **options
                )
            elif round_number is None:
                summary = evaluate_run(model, overwrite=overwrite, **options)
            else:
                summary = evaluate_round(model, round_number, **options)
    except KeyboardInterrupt:
        masks = (out or model / "evaluation") / "predictions"
        kept = f"; masks of finished cases stand in {masks}" if round_number is None else ""
        goes_on = "the same command passes over finished cases"
        print(f"stopped: no table was written{kept}; {goes_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except CasesLeft as reason:
        print(reason)
        return
    if data is not None:
        _finish_evaluation(f"{render_summary(summary)}\ntables: {out}", summary)
        return
    if round_index == "all":
        for folder in list_rounds(model / "evaluation").values():
            if (folder / "summary.json").is_file():
                print(f"{folder.name}: {render_summary(read_json(folder / 'summary.json'))}\n")
    text = f"{render_summary(summary)}\nreport: {_write_report(model)}"
    _sync_quietly(model)
    _finish_evaluation(text, summary)


def _check_evaluation(
    model: Path, data: Path | None, overrides: list[str], out: Path | None, round_number: int | None
) -> DataSection:
    """Answer all mistakes that need neither torch nor a scan; return how the data is read."""
    from medssl.data.layouts import read_dataset
    from medssl.data.trained import find_rounds, open_test_cases, refuse_run_folder, resolve_model

    if data is None and out is not None:
        raise InputError("--out is for other scans: a run keeps its evaluation in RUN/evaluation")
    if data is None:
        open_test_cases(model, lambda text: None)
        if round_number is not None and f"round_{round_number}" not in find_rounds(model):
            known = ", ".join(r.removeprefix("round_") for r in find_rounds(model)) or "none"
            raise InputError(f"{model}: round {round_number} is not done; done are: {known}")
        resolve_model(model if round_number is None else model / f"round_{round_number}")
        return DataSection()
    if out is None:
        raise InputError("--out is missing: name the folder that the tables go to")
    for text in overrides:
        if not text.startswith("data."):
            raise InputError(f"{text}: only data.KEY=VALUE says how to read DATA")
    settings = load_config(None, overrides).config.data
    resolve_model(model)
    refuse_run_folder(out)
    check_writable(out, "--out")
    read_dataset(data, settings.format, settings.labels)
    return settings


def _finish_evaluation(text: str, summary: Mapping[str, Any]) -> None:
    """Print what was measured; cases that could not be measured are an exit code of 1."""
    print(text)
    if summary.get("failed"):
        raise SystemExit(FAILED)


def _take_device(name: str) -> str:
    """Return the device, and compute with as many threads as cores are free."""
    from medssl.machine import choose_device, choose_threads, compute_with

    compute_with(choose_threads())
    return choose_device(name)


def _resolve_round(
    model: Path, data: Path | None, round_index: str | None
) -> tuple[Path, int | None]:
    """Return the run, and the one round of it that is to be measured on the run's test cases."""
    if data is not None and round_index is not None:
        raise InputError(
            f"--round {round_index}: is for a run's own test cases; for {data} name the round's "
            f"folder: medssl evaluate {model}/round_{round_index} {data} --out DIR"
        )
    parent, is_round = model.resolve().parent, re.fullmatch(r"round_\d+", model.resolve().name)
    if data is None and round_index is None and is_round and (parent / "run.json").is_file():
        return parent, int(model.resolve().name.removeprefix("round_"))
    if round_index in (None, "all"):
        return model, None
    if not round_index.isdigit():
        raise InputError(f"--round {round_index}: give a number, such as 0, or all")
    return model, int(round_index)


@app.command()
def compare(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B", help="Runs, rounds, evaluations; arm=A,B")
    ],
) -> None:
    """Compare runs, rounds or evaluations case by case, with intervals."""
    from medssl.compare import compare as compare_runs

    print(compare_runs(paths)[0])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    share: Annotated[
        bool, typer.Option("--share", help="Pseudonyms in place of case ids, no paths.")
    ] = False,
) -> None:
    """Write one HTML page that shows what a run did and what it is worth; `sync` sends it."""
    print(_write_report(run, share))


@app.command()
def export(
    model: RunOrModel,
    form: Annotated[
        str,
        typer.Option("--format", help="zip, monai-bundle, onnx, torch-export or torchscript."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Default: RUN/export/FORMAT, RUN/model.zip.")
    ] = None,
) -> None:
    """Write a model, with its card, for those who do not have medssl."""
    from medssl.export import export_model

    print(export_model(model, form, out))


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="The folder that holds runs.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Start the MLflow UI on the runs of a folder."""
    from medssl.tracking import serve_runs

    raise SystemExit(serve_runs(runs, host, port))


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    uri: Annotated[str | None, typer.Option(help="MLflow store; default: as configured.")] = None,
) -> None:
    """Bring MLflow up to what a run folder holds, after a server was away."""
    from medssl.tracking import sync_run

    sync_run(run, uri)


def _sync_quietly(run: Path) -> None:
    """Bring MLflow up to date; an evaluation is not lost because a server is away."""
    from medssl.tracking import sync_run

    settings = load_config(run / "config.yaml").config.tracking
    if settings.uri == "none":
        return
    try:
        sync_run(run)
    except InputError as error:
        print(f"note: {error}", file=sys.stderr)


@app.command()
def doctor(
    store: Annotated[
        str,
        typer.Argument(metavar="RUNS_OR_STORE", help="A folder of runs, or a tracking.uri."),
    ] = "runs",
) -> None:
    """Say what is wrong with this machine and how to mend it, and what medssl sees of it."""
    from medssl.tracking import check_uri, find_default_uri

    uri = store if "://" in store else find_default_uri(Path(store))
    check_uri(uri)
    from medssl.doctor import examine_machine  # slow to import: after the mistakes

    text, healthy = examine_machine(uri)
    print(text)
    if not healthy:
        raise SystemExit(FAILED)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of scans and runs.")] = Path("medssl-demo"),
    overrides: Overrides = None,
) -> None:
    """Run the main job on made-up 3D scans: train, predict, evaluate, report."""
    from medssl.data.phantoms import write_phantoms
    from medssl.data.predictions import plan_predictions

    data, run = out / "phantoms", out / "runs" / "demo"
    if not (data / "cases.csv").is_file():
        foreign = [
            path for path in data.rglob("*") if path.is_file() and "organs_" not in path.name
        ]
        if foreign:
            raise InputError(
                f"{data}: holds files that are no demo's, such as {foreign[0]}; give another --out"
            )
        print(f"drawing 4 labeled, 16 unlabeled and 12 test phantoms in {data}")
        write_phantoms(data, shape=DEMO_SHAPE)
    scans = sorted((data / "images").glob("*.nii.gz"))[-1:]
    plan_predictions(scans, out / "masks", 1)  # before anything is trained
    from medssl.evaluate import evaluate_run, render_summary
    from medssl.predict import load_model, predict_files

    config = find_configs() / "phantoms.yaml"
    settings = [f"data.root={data}", *(overrides or [])]
    outcome = _train(
        load_config(config, settings), lambda plan: load_config(config, settings, plan), run
    )
    if outcome is None or outcome.status == "interrupted":
        raise SystemExit(INTERRUPTED)
    predict_files(load_model(run), scans, out / "masks", report=print)
    summary = evaluate_run(run, report=lambda text: None)
    path = _write_report(run)
    _sync_quietly(run)
    print(f"\n{render_summary(summary)}")
    print(f"\nmeasured:  {summary['statement']}")
    print(f"report:    {path}")
    print(f"model:     {run / 'model'}")
    print(f"MLflow UI: medssl ui {run.parent}")
    raise SystemExit(EXIT_CODES[outcome.status])
