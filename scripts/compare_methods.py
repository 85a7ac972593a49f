"""All presets side by side on one data set: same split, network, steps and round 0; resumable.

    python scripts/compare_methods.py DATA --out runs/methods labeled=4 test=40 steps=1200
    python scripts/compare_methods.py phantoms --out runs/methods_phantoms

For every draw of the labeled cases: one round 0, the students of each preset on top of it, and
labels alone at the total steps of each preset. All are measured on the same test cases. What is
done is skipped; OUT/results.csv and OUT/results.md are written anew after every arm, and all runs
stand in one MLflow experiment. An arm with several draws has one row more, draw 0+1, in which they
are averaged within each case. A preset that did not run is listed as such. With ``--names`` only
these presets run; with ``--hours`` none is begun later.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from study import finish_run, make_parser, measure_arm, write_table

from medssl.config import InputError
from medssl.data.phantoms import write_phantoms
from medssl.metrics import format_estimate
from medssl.runs import Journal, read_json
from medssl.settings import list_methods, load_config

BASELINE = "labels_only"
PHANTOMS = {
    "num_labeled": 4,
    "num_unlabeled": 12,
    "num_test": 12,
    "shape": (32, 40, 28),
}
PHANTOM_SETTINGS = [
    *("steps=[300,120]", "rounds=2", "train.start=warm", "network.width=1.0"),
    *("plan.flips=[]", "plan.patch_size=[24,32,24]"),
]


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what the journal and the pseudo-labels of a run say of its last student."""
    summary = read_json(folder / "summary.json")
    last = summary["rounds"][-1]
    entries = [e for e in Journal(folder / "metrics.jsonl").read() if e["round"] == last["round"]]
    coverages = [m for e in entries if (m := e["metrics"].get("monitors/coverage")) is not None]
    losses = [m for e in entries if (m := e["metrics"].get("losses/total")) is not None]
    lost = sum(e["metrics"].get("monitors/nonfinite", 0.0) for e in entries)
    agreement = last.get("agreement")
    return {
        "rounds": last["round"],
        "steps": summary["total_steps"],
        "minutes": round(summary["seconds"] / 60, 1),
        "delivered": summary["delivered"],
        "finite": bool(losses) and lost == 0.0,
        "coverage": round(sum(coverages) / len(coverages), 4) if coverages else "",
        "agreement": round(agreement, 4) if agreement is not None else "",
    }


def find_last_evaluation(folder: Path) -> Path:
    """Return the evaluation of a run's last round, whatever round its gates delivered."""
    last = read_json(folder / "summary.json")["rounds"][-1]["round"]
    path = folder / "evaluation" / f"round_{last}"
    return path if path.is_dir() else folder / "evaluation"


def is_measured(folder: Path) -> bool:
    """Return whether a run has been evaluated."""
    return (folder / "evaluation" / "per_case.csv").is_file()


def describe_arm(out: Path, name: str, draws: list[int]) -> dict[str, Any]:
    """Return the row of an arm, averaged over draws within each case; all must be measured."""
    folders = [out / f"draw_{draw}_{name}" for draw in draws]
    abouts = [describe_run(folder) for folder in folders]
    about = abouts[0]
    for key in ("minutes", "coverage", "agreement"):
        values = [other[key] for other in abouts if other[key] != ""]
        about[key] = round(sum(values) / len(values), 4) if values else ""
    about["minutes"] = round(about["minutes"], 1)
    about["finite"] = all(other["finite"] for other in abouts)
    about["delivered"] = "+".join(dict.fromkeys(other["delivered"] for other in abouts))
    ours = [find_last_evaluation(folder) for folder in folders]
    comparison = measure_arm(
        ours, [find_last_evaluation(out / f"draw_{draw}_{BASELINE}") for draw in draws]
    )
    alone = [out / f"draw_{draw}_{BASELINE}_{about['steps']}" for draw in draws]
    to_alone = ""
    if alone != folders and all(map(is_measured, alone)):
        row = measure_arm(ours, [find_last_evaluation(folder) for folder in alone])
        to_alone = format_estimate(row["difference"], "+", 4)
    return {
        "draw": "+".join(map(str, draws)),
        "arm": name,
        "n": comparison["n"],
        "dice": f"{comparison['dice']['mean']:.4f}",
        "to round 0": format_estimate(comparison["difference"], "+", 4),
        "to labels only, total steps": to_alone,
        **about,
    }


def tabulate_arms(out: Path, draws: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Return one row per draw and arm, and one of all draws for the arms that have several."""
    rows: list[dict[str, Any]] = []
    measured: dict[str, list[int]] = {}
    for draw in draws:
        longer = sorted(out.glob(f"draw_{draw}_{BASELINE}_*"), key=lambda path: len(path.name))
        arms = [BASELINE, *(path.name.removeprefix(f"draw_{draw}_") for path in longer), *names]
        for name in arms:
            if is_measured(out / f"draw_{draw}_{name}"):
                rows.append(describe_arm(out, name, [draw]))
                measured.setdefault(name, []).append(draw)
            else:
                rows.append({"draw": draw, "arm": name, "n": "", "dice": "not run"})
    rows += [
        describe_arm(out, name, measured_draws)
        for name, measured_draws in measured.items()
        if measured_draws[1:]
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def main() -> None:
    """Run all arms of all draws, in order."""
    parser = make_parser(__doc__ or "", "runs/methods", "0")
    parser.add_argument("--names", help="presets, such as default,fixmatch; all if not given")
    parser.add_argument("--hours", type=float, default=math.inf)
    options = parser.parse_intermixed_args()
    started = time.monotonic()
    data, settings = options.data, options.settings
    if data == "phantoms":
        data = str(options.out / "phantoms")
        if not (Path(data) / "cases.csv").is_file():
            write_phantoms(Path(data), **PHANTOMS)
        settings = [*PHANTOM_SETTINGS, *settings]
    presets = [name for name in list_methods() if name != BASELINE]
    names = options.names.split(",") if options.names else presets
    try:
        for name in names:
            load_config(None, [*settings, f"method={name}"])  # mistakes first
    except InputError as error:
        parser.error(str(error))
    for draw in options.draws:
        base = options.out / f"draw_{draw}_{BASELINE}"
        common = [*settings, f"draw={draw}"]
        finish_run(data, base, [*common, f"method={BASELINE}", "rounds=0"])
        totals: set[int] = set()
        for name in names:
            if time.monotonic() - started < options.hours * 3600:
                arm_settings, extra = [*common, f"method={name}"], ["--round-0", str(base)]
                arm = finish_run(data, options.out / f"draw_{draw}_{name}", arm_settings, extra)
                totals.add(arm["total_steps"])
            write_table(options.out, tabulate_arms(options.out, options.draws, names))
        for total in sorted(totals):
            if time.monotonic() - started < options.hours * 3600:
                arm_settings = [*common, f"method={BASELINE}", "rounds=0", f"steps={total}"]
                finish_run(data, options.out / f"draw_{draw}_{BASELINE}_{total}", arm_settings)
            write_table(options.out, tabulate_arms(options.out, options.draws, names))
    print((options.out / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
