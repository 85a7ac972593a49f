"""What commands cost by the number of scans: a training of a few steps on as many tiny scans.

Each command is a process of its own, so that its peak of memory is its own; within `train` the
stages have a stopwatch. Seconds are of the processor, without the imports: other programs and the
disk disturb little. Scans of 8 x 8 x 8 voxels, each with noise of its own, so that nothing is a
copy for hashes and caches: what is measured is what a scan costs however small it is.

Pseudo-labels are made of a thousand scans at most, by a training with a student (`label`); the run
of all scans is labels alone, and gets the review.csv of its unlabeled scans from made-up reviews.
Beyond ten thousand scans `train` sees a thousand of them, and `enlarge` gives that run the splits
and pseudonyms of all: what is measured there is `check`, layout, splits, review, report and MLflow.
A size that stands in OUT/scale.json is not measured again; --page FILE gets the tables.
"""

import argparse
import csv
import functools
import importlib
import io
import itertools
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START, END = "<!-- scale -->\n", "<!-- scale end -->\n"
SIDE = 8  # voxels
EVERY = 10  # patient that has labels; a patient has two scans
LABELED = 1_000  # scans at most that are pseudo-labeled
LEAST_SECONDS = 0.5  # of a stage that has a line in the table
MOST_TRAINED = 10_000  # scans at most that are cached
SETTINGS = (
    *("method=default", "validation=0", "steps=60", "train.batch=2"),
    *("train.device=cpu", "train.workers=0", "train.precision=float32", "tracking.uri=none"),
    *("plan.dimension=3", "plan.spacing=[1,1,1]", "plan.patch_size=[8,8,8]", "plan.flips=[]"),
    *("network.width=0.5", "network.depth=3"),
    *("teacher.probs=clean", "filter.uncertainty.source=none"),
)
COMMANDS = (
    *("check", "train", "train again", "label", "evaluate", "compare", "enlarge", "review"),
    *("report", "sync", "sync again"),
)
OF_TRAINED = ("train again", "label", "evaluate", "compare")  # where all scans are trained on
HEAVY = {"sync": "mlflow", "report": "medssl.report", "evaluate": "medssl.evaluate"}
STAGES = {
    "read_dataset": "layout",
    "split_cases": "splits",
    "check_dataset": "look at every scan",
    "make_plan": "plan",
    "build_cache": "cache",
    "read_sources": "hashes of the cache",
    "train_round": "training",
    "label_and_judge": "pseudo-labels and review",
    "deliver_model": "delivery",
}
"""What `train` calls in medssl.rounds.loop, and how it is called here."""
PLACES = {  # of a run and what lies beside it
    "scans": "data",
    "cache": "runs/cache",
    "pseudo-labels of a round": "some/runs/run/round_0/pseudo_labels",
    "masks of a round": "some/runs/run/round_0/pseudo_masks",
    "review.csv of a round": "runs/run/round_0/review.csv",
    "other files of the run": "runs/run",
    "report.html": "runs/run/report.html",
    "mlflow.db": "runs/mlflow.db",
    "mlartifacts": "runs/mlartifacts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--cases", default="1000,10000", help="numbers of scans, a comma between")
    parser.add_argument("--without", nargs="+", choices=COMMANDS, default=[], help="leave out")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--command", choices=COMMANDS, help="measure one, in this process")
    parser.add_argument("--folder", type=Path, help="of the scans and the run, with --command")


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure all commands at each size and print a table; of one --command print it alone."""
    if arguments.command:
        print(json.dumps(measure_command(arguments.command, arguments.folder)))
        return []
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = arguments.out / "scale.json"
    rows: list[dict[str, Any]] = json.loads(record.read_text()) if record.is_file() else []
    finished = {row["cases"] for row in rows}
    for cases in (size for size in map(int, arguments.cases.split(",")) if size not in finished):
        folder = Path(tempfile.mkdtemp(prefix=f"scale_{cases}_", dir=arguments.out))
        write_scans(folder / "data", cases)
        write_scans(folder / "some" / "data", min(cases, LABELED))
        for command in COMMANDS:
            never = ("enlarge",) if cases <= MOST_TRAINED else OF_TRAINED
            if command in (*never, *arguments.without):
                continue
            this = [sys.executable, str(Path(__file__).parent), "scale", "--command", command]
            done = subprocess.run(
                [*this, "--folder", str(folder)], check=True, capture_output=True, text=True
            )
            row = {"cases": cases, "of": command, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            print(f"{cases} scans: {command}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
        rows.append({"cases": cases, "of": "disk", "places": measure_places(folder)})
        record.write_text(json.dumps(rows, indent=2) + "\n")
        shutil.rmtree(folder)
    tables = format_scale(rows)
    print(tables)
    if arguments.page:
        before, rest = arguments.page.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        arguments.page.write_text(f"{before}{START}{tables}\n{END}{after}", encoding="utf-8")
    return rows


def write_scans(folder: Path, cases: int) -> None:
    """Write scans of noise with a bright ball, labels of a few of them, and their list."""
    import numpy as np

    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    axes = np.indices((SIDE,) * 3)
    heads = {bits: _make_header(bits) for bits in (8, 16)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", "image", "label", "patient_id", "split"])
    for index in range(cases):
        rng = np.random.default_rng(index)
        center = rng.uniform(3, 5, (3, 1, 1, 1))
        ball = ((axes - center) ** 2).sum(0) < rng.uniform(2, 3) ** 2
        image = (rng.normal(0, 20, ball.shape) + 200 * ball).astype("<i2")
        name, patient = f"scan_{index:07d}", index // 2
        (folder / "images" / f"{name}.nii").write_bytes(heads[16] + image.tobytes(order="F"))
        label = ""
        if patient % EVERY == 0:
            label = f"labels/{name}.nii"
            (folder / label).write_bytes(heads[8] + ball.astype("u1").tobytes(order="F"))
        writer.writerow([name, f"images/{name}.nii", label, f"patient_{patient}", ""])
    (folder / "cases.csv").write_text(text.getvalue())


def _make_header(bits: int) -> bytes:
    """Return the header of a NIfTI file of a cube of 1 mm voxels, and what lies before them."""
    import nibabel as nib
    import numpy as np

    kind = {8: np.uint8, 16: np.int16}[bits]
    header = nib.Nifti1Image(np.zeros((SIDE,) * 3, kind), np.eye(4))
    header.header["vox_offset"] = 352
    header.header["qform_code"] = header.header["sform_code"] = 1
    return bytes(header.header.binaryblock) + struct.pack("4x")


def measure_command(command: str, folder: Path) -> dict[str, Any]:
    """Run a medssl command in this process; return its seconds, those of its stages, its peak."""
    from medssl.cli import app

    for name in ("medssl.rounds.loop", HEAVY.get(command.split()[0], "medssl.data.check")):
        importlib.import_module(name)
    with watch_stages() as stages:
        started, wall = time.process_time(), time.perf_counter()
        if command == "review":
            write_made_up_reviews(folder / "runs" / "run")
        elif command == "enlarge":
            enlarge_run(folder / "runs" / "run", folder / "data")
        else:
            try:
                app(list_arguments(command, folder), standalone_mode=False)
            except SystemExit as end:
                if end.code not in (0, None):
                    raise
        seconds, wall = time.process_time() - started, time.perf_counter() - wall
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 2), "wall": round(wall, 2), "peak": peak, "stages": stages}


def list_arguments(command: str, folder: Path) -> list[str]:
    """Return the command line of what is measured."""
    home = folder / "some" if command == "label" else folder
    cases = count_cases(home / "data")
    if command == "train" and cases > MOST_TRAINED:
        cases = count_cases(folder / "some" / "data")
        data, run = str(folder / "some" / "data"), str(folder / "runs" / "run")
    else:
        data, run = str(home / "data"), str(home / "runs" / "run")
    settings = [*SETTINGS, *choose_parts(cases), f"rounds={int(command == 'label')}"]
    return {
        "check": ["check", data, *settings],
        "train": ["train", data, *settings, "--run", run],
        "label": ["train", data, *settings, "--run", run],
        "compare": ["compare", run, f"{run}/round_0"],
    }.get(command.removesuffix(" again"), [command.removesuffix(" again"), run])


def count_cases(data: Path) -> int:
    """Return the number of cases in a list."""
    with (data / "cases.csv").open() as file:
        return sum(1 for _ in file) - 1


def choose_parts(cases: int) -> list[str]:
    """Return how many of so many cases are labeled, and how many test."""
    return [f"labeled={cases // 20}", f"test={max(10, cases // 100)}"]


def enlarge_run(run: Path, data: Path) -> None:
    """Give a run the splits and pseudonyms of a larger data set."""
    from medssl.rounds import loop
    from medssl.runs import hash_record, make_pseudonyms, read_json, write_json
    from medssl.settings import load_config

    settings = [*SETTINGS, *choose_parts(count_cases(data))]
    dataset = loop.read_dataset(data)
    splits = loop.split_cases(dataset, load_config(data, settings).config.data, 0)
    about = {"name": dataset.name, "root": str(data.resolve()), "source": str(data.resolve())}
    write_json(run / "splits.json", {**splits.to_json(), "dataset": about})
    make_pseudonyms(run, data, [case.case_id for case in dataset.cases])
    write_json(run / "run.json", {**read_json(run / "run.json"), **hash_record(run)})


def write_made_up_reviews(run: Path) -> None:
    """Write the review.csv of a round 0 that has pseudo-labeled all unlabeled scans of a run."""
    import numpy as np

    from medssl.pseudo.gates import CaseReview
    from medssl.pseudo.label import write_review

    rng = np.random.default_rng(0)
    reviews = []
    for case_id in json.loads((run / "splits.json").read_text())["unlabeled"]:
        a, b, c, size = rng.uniform(0.1, 1, 4).tolist()
        named = [{"class_1": value} for value in (b, c, size)]
        reviews.append(CaseReview(case_id, a > 0.2, "", a, b, c, b, *named, {1: size}))
    write_review(run / "round_0", reviews)


@contextmanager
def watch_stages() -> Iterator[dict[str, float]]:
    """Yield the seconds of the processor that each stage of a training has taken so far."""
    loop: Any = importlib.import_module("medssl.rounds.loop")
    seconds: dict[str, float] = defaultdict(float)
    originals = {name: getattr(loop, name) for name in STAGES}

    def time_calls(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return act(*arguments, **options)
            finally:
                seconds[STAGES[name]] += time.process_time() - started

        return timed

    try:
        for name, act in originals.items():
            setattr(loop, name, time_calls(name, act))
        yield seconds
    finally:
        for name, act in originals.items():
            setattr(loop, name, act)


def measure_places(folder: Path) -> dict[str, tuple[int, int]]:
    """Return bytes and files of each part of the data set and the run."""
    sizes = {}
    for name, place in PLACES.items():
        path = folder / place
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        sizes[name] = (sum(file.stat().st_size for file in files), len(files))
    return sizes


def format_scale(rows: list[dict[str, Any]]) -> str:
    """Return tables in Markdown: what a further scan costs, peaks, and the disk."""
    sizes = sorted({row["cases"] for row in rows})
    costs: dict[str, dict[int, float]] = defaultdict(dict)
    peaks: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        is_partial = row["of"] == "train" and row["cases"] > MOST_TRAINED
        if row["of"] != "disk" and not is_partial:
            costs[f"`{row['of']}`"][row["cases"]] = row["seconds"]
            peaks[f"`{row['of']}`"][row["cases"]] = row["peak"]
            for stage, seconds in row["stages"].items():
                costs[f"{row['of']}: {stage}"][row["cases"]] = seconds
    steps = list(itertools.pairwise(sizes))
    head = [
        *(f"{size:,} scans, s" for size in sizes),
        *(f"ms a scan, {a:,} to {b:,}" for a, b in steps),
        *(f"peak at {size:,}, MB" for size in sizes),
    ]
    lines = [f"| of | {' | '.join(head)} |", "|" + "---|" * (1 + len(head))]
    for name, seconds in costs.items():
        if name not in peaks and max(seconds.values()) < LEAST_SECONDS:
            continue
        cells = [f"{seconds[size]:.1f}" if size in seconds else "" for size in sizes]
        for a, b in steps:
            both = a in seconds and b in seconds
            cells.append(f"{1000 * (seconds[b] - seconds[a]) / (b - a):.2f}" if both else "")
        cells += [f"{peaks[name][size] / 1e6:.0f}" if size in peaks[name] else "" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    places = {row["cases"]: row["places"] for row in rows if row["of"] == "disk"}
    lines += ["", f"| on disk, kB (files) | {' | '.join(f'{size:,} scans' for size in sizes)} |"]
    lines.append("|" + "---|" * (1 + len(sizes)))
    for name in PLACES:
        of_some = name in ("cache", "pseudo-labels of a round", "masks of a round")
        cells = [
            "" if of_some and size > MOST_TRAINED else f"{volume / 1e3:,.0f} ({files:,})"
            for size, (volume, files) in ((size, places[size][name]) for size in sizes)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
