"""What a user would pick instead of medssl, on the same labels, test cases and minutes of one core.

    python scripts/compare_peers.py DATA --csv CSV --like LIKE --times 1,3 labeled=6 test=60
    python scripts/compare_peers.py DATA --csv CSV --like LIKE --minutes 5,10 --arms recipe,monai
    python scripts/compare_peers.py DATA --csv CSV --like LIKE --table

    monai             a plain MONAI script, scripts/peers/plain_monai.py
    nnunet            nnU-Net v2 by its own commands, of the extra `peers`; minutes for epochs
    labels, recipe    medssl, with the steps that fit the minutes by the rows of LIKE

LIKE is the CSV of scripts/study.py on the same settings. `--times 1,3` gives the peers the minutes
of its recipe (the median over draws: it is the machine that differs) and three times as many, as
arms `monai` and `monai_3`. `--minutes 5,10` has arms `monai@5` and `monai@10`. Each arm is a
training of its own, whose learning rate decays to zero, and no snapshot of a longer one.

Minutes are those of the processor, in one process of one thread: what else the machine does takes
none of them. Those of a peer are the training alone. Reading, planning and preprocessing come on
top, and prediction, which is each one's own, mirrored where it does so by itself. Of medssl all is
counted from the start of the command to the delivered model. Rows of LIKE have minutes of the
clock, which are never fewer.

Peers train on all labeled cases and validate on none; their last weights count. Their masks are
measured as `medssl evaluate` measures its own. An arm that stands in the CSV is never run again;
one that was killed in its training is begun anew, one killed later goes on from its weights.
"""

from __future__ import annotations

import argparse
import functools
import re
import resource
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from peers import nnunet
from study import Arm as DiceByDraw
from study import (
    Study,
    append_rows,
    average_dice,
    compare_arms,
    deal_arms,
    explain_mistakes,
    format_difference,
    format_markdown,
    is_finished,
    make_parser,
    read_arms,
    read_rows,
    read_study,
    run_command,
    split_names,
)

from medssl.config import InputError
from medssl.data.cases import Case, select_cases, select_test_with_labels, split_cases
from medssl.data.check import check_dataset
from medssl.data.io import read_label
from medssl.data.layouts import read_dataset
from medssl.evaluate import tabulate_case
from medssl.metrics import Row, case_metrics, read_table
from medssl.plan import Plan
from medssl.runs import describe_provenance, hold_lock, read_json, read_record, write_json
from medssl.settings import load_config
from medssl.transforms.geometry import MAX_DISPLACEMENT, grid_spacing, measure_displacement

PEERS = ("monai", "nnunet")
OURS = ("labels", "recipe")
REACH = (0.75, 0.8)  # mean Dice that has taken so many minutes
THICK = 3  # times the spacing within a slice; nnU-Net has the same threshold


class Arm(NamedTuple):
    """An arm: who trains, and for how many minutes of the processor."""

    name: str
    family: str
    minutes: float


@dataclass(frozen=True)
class Draw:
    """The cases of a draw in nnU-Net's raw format, and those to measure.

    ``folder`` holds raw/ and what nnU-Net makes of it, ``labels`` the name of each label value,
    background first.
    """

    folder: Path
    labels: dict[int, str]
    test: tuple[Case, ...]

    @property
    def raw(self) -> Path:
        """The data set in nnU-Net's raw format."""
        return self.folder / "raw" / nnunet.DATASET


def list_arms(
    families: Sequence[str], times: Sequence[float], minutes: Sequence[float], like: Path
) -> list[Arm]:
    """Return the arms, the shortest first; of `times` those of peers alone.

    Raises:
        InputError: LIKE has no recipe whose minutes could be taken.
    """
    whole = find_minutes(like, "recipe") if times else 0.0
    arms = [
        Arm(family if factor == 1 else f"{family}_{factor:g}", family, factor * whole)
        for factor in times
        for family in families
        if family in PEERS
    ]
    arms += [Arm(f"{family}@{n:g}", family, n) for n in minutes for family in families]
    return sorted(arms, key=lambda arm: arm.minutes)


def find_minutes(like: Path, arm: str) -> float:
    """Return the minutes of an arm of a study, the median over its draws.

    Raises:
        InputError: The study has no such arm.
    """
    minutes = {row["draw"]: float(row["minutes"]) for row in read_rows(like) if row["arm"] == arm}
    if not minutes:
        raise InputError(f"{like}: has no arm {arm}, whose minutes are asked for; give --like CSV")
    return statistics.median(minutes.values())


def run_arm(study: Study, like: Path, draw: int, arm: Arm) -> None:
    """Run an arm of a draw, unless it stands in the CSV, and add its rows."""
    if is_finished(study, draw, arm.name):
        return
    folder = study.work / f"draw_{draw}_{arm.name}"
    with hold_lock(study.work / f"{folder.name}.lock"):
        if arm.family in OURS:
            rows, precision = run_ours(study, folder, like, draw, arm)
        else:
            rows, precision = run_peer(prepare_draw(study, draw), folder, arm), "float32"
        about = {
            **read_json(folder / "spent.json"),
            "revision": str(describe_provenance("cpu", 1)["revision"])[:10],
            "precision": precision,
        }
        append_rows(study.csv, draw, arm.name, about, rows)


def prepare_draw(study: Study, draw: int) -> Draw:
    """Write the cases of a draw in nnU-Net's raw format, unless they stand there.

    Validation cases count as labeled: peers have no use for them.

    Raises:
        InputError: The cases of other settings stand there.
    """
    config = load_config(study.data, [*study.settings, f"draw={draw}"]).config
    assert config.data.root is not None, "DATA was given"
    dataset = read_dataset(config.data.root, config.data.format, config.data.labels)
    splits = split_cases(dataset, config.data, config.validation)
    folder = study.work / f"draw_{draw}_data"
    with hold_lock(folder.with_suffix(".lock")):
        names, dealt = folder / "labels.json", folder / "splits.json"
        if not names.is_file():
            labels = check_dataset(dataset, splits, config.data.ignore).labels
            parts = [select_cases(dataset, splits, part) for part in ("labeled", "val", "test")]
            labeled, test = [*parts[0], *parts[1]], parts[2]
            write_json(dealt, splits.to_json())
            place = folder / "raw" / nnunet.DATASET
            nnunet.write_raw(place, labels, dataset.channels, labeled, test)
            write_json(names, {str(value): name for value, name in labels.items()})
        if read_json(dealt) != splits.to_json():
            raise InputError(f"{folder}: holds the cases of other settings; give another --out")
        labels = {int(value): name for value, name in read_json(names).items()}
    return Draw(folder, labels, select_test_with_labels(dataset, splits))


def run_peer(draw: Draw, folder: Path, arm: Arm) -> list[Row]:
    """Train a peer, unless its training is finished, and return what its masks are worth."""
    dimension = choose_dimension(draw.raw)
    if not (folder / "spent.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder / "masks", ignore_errors=True)
    if arm.family == "monai":
        options = ["--minutes", str(arm.minutes), "--dimension", str(dimension)]
        module = [sys.executable, "-m", "peers.plain_monai", str(draw.raw), str(folder)]
        nnunet.run_alone([*module, *options])
    else:
        configuration = {2: "2d", 3: "3d_fullres"}[dimension]
        with hold_lock(draw.folder.with_suffix(".lock")):
            nnunet.plan_data(draw.folder, configuration)
        if not (folder / "spent.json").is_file():
            nnunet.train(draw.folder, folder, configuration, arm.minutes)
        nnunet.predict(draw.folder, folder, configuration)
    return measure_masks(folder / "masks", draw.test, draw.labels)


def choose_dimension(raw: Path) -> int:
    """Return 2 where the slices of the scans are thick, else 3."""
    scans = [nib.load(path) for path in sorted((raw / "imagesTr").glob("*_0000.nii.gz"))]
    spacings = [nib.as_closest_canonical(scan).header.get_zooms()[:3] for scan in scans]
    *within, across = np.median(spacings, axis=0)
    return 2 if across >= THICK * max(within) else 3


def measure_masks(folder: Path, cases: Sequence[Case], labels: Mapping[int, str]) -> list[Row]:
    """Return the rows of masks of class indices, measured as `medssl evaluate` measures its own.

    Args:
        folder: Holds CASE_ID.nii.gz on the grid of each case's label.
        cases: With their labels.
        labels: Name of each label value, background first.

    Raises:
        InputError: A mask is missing, lies on another grid or holds a value that is no class.
    """
    values, names = tuple(labels), dict(enumerate(labels.values()))
    names.pop(0)
    rows = []
    for case in cases:
        assert case.label is not None, "test cases have one"
        reference, affine = read_label(case.label, values, None, case)
        path = folder / f"{case.case_id}.nii.gz"
        mask, place = read_label(path, tuple(range(len(values))), None)
        same = mask.shape == reference.shape
        if not same or measure_displacement(affine, place, mask.shape) > MAX_DISPLACEMENT:
            raise InputError(f"{path}: lies on another grid than {case.label}")
        metrics = case_metrics(mask, reference, grid_spacing(affine), len(values))
        rows.append(tabulate_case(case, metrics, names))
    return rows


def run_ours(study: Study, folder: Path, like: Path, draw: int, arm: Arm) -> tuple[list[Row], str]:
    """Train and evaluate medssl by the steps that fit; return its rows, and number format."""
    if not (folder / "spent.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        settings = [*study.settings, f"draw={draw}", "tracking.uri=none"]
        rounds = load_config(study.data, settings).config.train.rounds
        settings += fit_steps(like, arm, rounds)
        before = count_child_seconds()
        run_command("train", study.data, *settings, "--run", str(folder))
        minutes = (count_child_seconds() - before) / 60
        spent = {"steps": read_json(folder / "summary.json")["total_steps"]}
        write_json(folder / "spent.json", {**spent, "minutes": round(minutes, 2)})
    run_command("evaluate", str(folder))
    rows = read_table(folder / "evaluation" / "per_case.csv")
    return rows, read_record(folder / "plan.json", Plan).precision


def fit_steps(like: Path, arm: Arm, rounds: int) -> list[str]:
    """Return the settings with which medssl takes so many minutes, by what a study took.

    The rounds of the recipe keep their proportion.
    """
    factor = arm.minutes / find_minutes(like, arm.family)
    totals = {row["arm"]: int(row["steps"]) for row in read_rows(like)}
    if arm.family == "labels":
        return ["rounds=0", f"steps={max(1, round(totals['labels'] * factor))}"]
    first = totals["round_0"]
    student = (totals["recipe"] - first) / rounds
    steps = [max(1, round(count * factor)) for count in (first, *[student] * rounds)]
    return [f"steps={steps}"]


def count_child_seconds() -> float:
    """Return the seconds of the processor of all programs that this one has run."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Measured:
    """What an arm took and is worth: minutes by draw, and Dice of the cases by draw."""

    minutes: dict[int, float]
    dice: DiceByDraw

    def average(self, draws: Iterable[int]) -> tuple[float, float]:
        """Return the mean minutes and the mean Dice of some draws."""
        draws = list(draws)
        dice = [average_dice(self.dice[draw]) for draw in draws]
        return statistics.fmean(self.minutes[draw] for draw in draws), statistics.fmean(dice)


def read_measured(*paths: Path) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return the arms of CSVs by name, and the patient of each case."""
    measured: dict[str, Measured] = {}
    patients: dict[str, str] = {}
    for path in paths:
        arms, more = read_arms(path)
        patients |= more
        for row in read_rows(path):
            arm = measured.setdefault(row["arm"], Measured({}, arms[row["arm"]]))
            arm.minutes[int(row["draw"])] = float(row["minutes"] or "nan")
    return measured, patients


def tabulate(path: Path, like: Path) -> list[dict[str, Any]]:
    """Return one row per arm: minutes, Dice, and the difference to the recipe.

    Of LIKE it has labels alone and the recipe, which come first. A difference is over the draws
    that both have.
    """
    measured, patients = read_measured(like, path)

    def shortest(name: str) -> float:
        return min(measured[name].minutes.values())

    theirs = sorted(read_arms(path)[0], key=lambda name: (name_family(name), shortest(name)))
    rows = []
    for name in [name for name in (*OURS, *theirs) if name in measured]:
        arm = measured[name]
        recipe = measured["recipe"].dice if name != "recipe" and "recipe" in measured else {}
        difference = compare_arms(arm.dice, recipe, patients)
        minutes, dice = arm.average(arm.dice)
        row = {
            "arm": name,
            "draws": ", ".join(map(str, sorted(arm.dice))),
            "minutes": f"{minutes:.1f}",
            "dice": f"{dice:.4f}",
            "per draw": ", ".join(f"{average_dice(arm.dice[d]):.3f}" for d in sorted(arm.dice)),
            "minus recipe": "" if difference is None else format_difference(difference[0]),
        }
        rows.append(row)
    return rows


def tabulate_reach(path: Path, like: Path, reach: Sequence[float]) -> list[dict[str, Any]]:
    """Return one row per family: the least minutes in which it reaches each Dice.

    Minutes and Dice are means over all draws of the CSV; an arm that lacks one does not count.
    Round 0 of LIKE is labels alone.
    """
    draws = {int(row["draw"]) for row in read_rows(path)}
    points: dict[str, list[tuple[float, float]]] = {}
    for name, arm in read_measured(like, path)[0].items():
        if draws and draws <= arm.dice.keys() and name_family(name) in (*OURS, *PEERS):
            points.setdefault(name_family(name), []).append(arm.average(draws))
    rows = []
    for family in (family for family in (*OURS, *PEERS) if family in points):
        row: dict[str, Any] = {"minutes to a mean Dice of": family}
        row["draws"] = ", ".join(map(str, sorted(draws)))
        longest = max(minutes for minutes, _ in points[family])
        for least in reach:
            enough = [minutes for minutes, dice in points[family] if dice >= least]
            row[f"{least:.2f}"] = f"{min(enough):.1f}" if enough else f"not in {longest:.1f}"
        rows.append(row)
    return rows


def name_family(arm: str) -> str:
    """Return who trains in an arm: what stands before the minutes, or how many times them.

    Example:
        >>> [name_family(arm) for arm in ("round_0", "monai", "nnunet_3", "recipe@2.5")]
        ['labels', 'monai', 'nnunet', 'recipe']
    """
    return "labels" if arm == "round_0" else re.sub(r"[@_][\d.]+$", "", arm)


split_families = functools.partial(split_names, known=(*OURS, *PEERS), kind="arm")


def split_amounts(text: str) -> list[float]:
    """Return the amounts of a list such as 2.5,5."""
    return [float(amount) for amount in text.split(",")]


def main() -> None:
    """Run the arms of all draws, and print the tables of the CSV."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--like", type=Path, required=True, help="CSV of study.py: whose minutes")
    parser.add_argument("--arms", type=split_families, default=list(PEERS))
    parser.add_argument("--times", type=split_amounts, default=[], help="the recipe's minutes")
    parser.add_argument("--minutes", type=split_amounts, default=[], help="of the processor")
    parser.add_argument("--reach", type=split_amounts, default=list(REACH), help="mean Dice")
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    options = parser.parse_intermixed_args()
    with explain_mistakes():
        compare_peers(options)


def compare_peers(options: argparse.Namespace) -> None:
    """Run the arms that were asked for, and print the tables of the CSV.

    Raises:
        InputError: The data, a setting or LIKE do not hold what is asked of them.
    """
    study = read_study(options)
    if not options.table:
        data = load_config(study.data, list(study.settings)).config.data
        assert data.root is not None, "DATA was given"
        read_dataset(data.root, data.format, data.labels)  # mistakes first: arms take hours
        arms = list_arms(options.arms, options.times, options.minutes, options.like)
        for draw, arm in deal_arms(options.draws, arms):
            run_arm(study, options.like, draw, arm)
    print(format_tables(study.csv, options.like, options.reach))


def format_tables(path: Path, like: Path, reach: Sequence[float]) -> str:
    """Return the tables of a CSV and of LIKE: what each arm is worth, and how soon."""
    tables = tabulate(path, like), tabulate_reach(path, like, reach)
    return "\n".join(format_markdown(table) for table in tables if table)


if __name__ == "__main__":
    main()
