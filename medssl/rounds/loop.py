"""Rounds: train -> pseudo-label -> gate -> train -> ... -> deliver, as a plain loop.

Every stage reads files and writes files, its done mark last; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medssl import ranks
from medssl.config import Config, InputError, at_round
from medssl.data.cache import (
    CachedCase,
    build_cache,
    list_places,
    open_places,
    read_sources,
)
from medssl.data.cases import Case, Dataset, Splits, select_cases, split_cases
from medssl.data.check import check_dataset, describe_origins
from medssl.data.layouts import read_dataset
from medssl.data.store import find_url
from medssl.data.trained import write_trained_on
from medssl.machine import (
    choose_device,
    choose_threads,
    compute_with,
    explain_out_of_memory,
)
from medssl.networks.sharing import share_steps
from medssl.plan import LOOKS_LIKE_CT, Plan, list_decisions, make_plan
from medssl.predict import ModelInfo, describe_model
from medssl.rounds.deliver import (
    MOST_REJECTED,
    Outcome,
    deliver_interrupted,
    deliver_model,
    set_status,
)
from medssl.rounds.estimate import estimate_run
from medssl.rounds.run import Run, StopRequested
from medssl.rounds.student import check_settings, suggest_smaller, train_round
from medssl.rounds.teacher import label_and_judge
from medssl.runs import (
    CaseCounter,
    Journal,
    ModelMark,
    State,
    StopFlag,
    delete_run,
    describe_provenance,
    find_changed,
    find_edited,
    hash_json,
    hash_record,
    is_begun,
    is_half_deleted,
    is_remnant,
    make_pseudonyms,
    read_json,
    read_record,
    remove_leftovers,
    write_json,
    write_text,
)
from medssl.settings import Resolved, dump, hash_config, list_changes, load_config
from medssl.tracking import Mirror, check_uri, choose_store

STUDENT_KEYS = (
    "method", "objective", "teacher.source", "teacher.probs", "teacher.ensemble", "views",
    "target.", "filter.",
    "noise.mixing", "noise.mixing_probability", "noise.strong", "noise.randaugment.",
    "noise.dropout", "noise.stochastic_depth", "losses.supervised.student",
    "losses.pseudo_label.", "losses.entropy.", "losses.consistency.", "network.width",
    "train.rounds", "train.steps", "train.unlabeled_ratio", "train.start", "train.schedule",
    "train.fine_tune.", "train.student_lr",
)  # fmt: skip
"""What round 0 does not depend on; its network and its steps stand in the plan."""


@dataclass(frozen=True)
class PreparedRun:
    """The data set, its splits and the plan, before anything is trained."""

    dataset: Dataset
    splits: Splits
    plan: Plan
    resolved: Resolved


def prepare_run(
    resolved: Resolved, reload: Callable[[Mapping[str, Any]], Resolved], run_dir: Path | None
) -> PreparedRun:
    """Read and check the data set, split it and make the plan; writes nothing.

    Of several processes the first one checks and plans, for all.

    Args:
        resolved: The configuration, with ``auto`` values.
        reload: Resolves it again with what the plan decided.
        run_dir: A run folder whose plan is taken over if it has one, or None.

    Raises:
        InputError: All problems of the data at once, or the folder holds a run of other settings.
    """
    config = resolved.config
    if config.data.root is None:
        raise InputError("no data: give a folder or a list of scans, or data.root in the YAML")
    check_uri(config.tracking.uri)
    dataset = read_dataset(config.data.root, config.data.format, config.data.labels)
    splits = split_cases(dataset, config.data, config.validation)
    is_old = run_dir is not None and is_begun(run_dir) and (run_dir / "plan.json").is_file()
    if ranks.share(lambda: is_old):
        assert run_dir is not None, "it holds a plan"
        plan = _renew(_read_plan(run_dir), config)
    elif ranks.find_rank()[1] == 1:
        plan = _make_plan(config, dataset, splits)
    else:
        made = ranks.share(lambda: _make_plan(config, dataset, splits).model_dump(mode="json"))
        plan = _renew(Plan.model_validate(made), config)
    prepared = PreparedRun(dataset, splits, plan, reload(list_decisions(plan)))
    if is_old and run_dir is not None:
        settings = read_json(run_dir / "run.json").get("settings")  # 0.1.0 did not keep them
        if settings not in (None, hash_config(prepared.resolved.config)):
            raise _name_difference(prepared, run_dir)
    return prepared


def _renew(plan: Plan, config: Config) -> Plan:
    """Return a plan with what this process has of the machine."""
    device = choose_device(config.train.device)
    now = {"device": device, "threads": choose_threads(plan.threads)}
    if config.train.workers != "auto":
        now["workers"] = config.train.workers
    plan = plan.model_copy(update=now)
    compute_with(plan.threads)
    return plan


def _make_plan(config: Config, dataset: Dataset, splits: Splits) -> Plan:
    """Check the data and make the plan, with its costs."""
    checked = check_dataset(dataset, splits, config.data.ignore, CaseCounter("check"))
    checked.raise_problems()
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    labeled, unlabeled = (
        select_cases(dataset, splits, "labeled"),
        select_cases(dataset, splits, "unlabeled"),
    )
    plan = make_plan(config, dataset, checked.labels, labeled, unlabeled)
    for reason in plan.reasons:
        if LOOKS_LIKE_CT in reason:
            print(f"warning: {reason}", file=sys.stderr)
    origins = describe_origins(checked.facts, with_names=False)
    if origins:
        plan = plan.model_copy(update={"reasons": (*plan.reasons, origins)})
    compute_with(plan.threads)
    rounds = config.train.rounds if unlabeled else 0
    check_settings(config, plan, len(splits.val))
    return plan.model_copy(
        update={"estimate": estimate_run(plan, config, rounds), "palette": checked.palette}
    )


def _read_plan(run_dir: Path) -> Plan:
    """Read the plan of a run, unless it or the splits are not those that the run was begun with."""
    if edited := find_edited(run_dir):
        raise InputError("\n".join(edited.values()))
    return read_record(run_dir / "plan.json", Plan)


def run_training(
    prepared: PreparedRun,
    run_dir: Path,
    stop: StopFlag,
    restart: bool = False,
    predict_unlabeled: bool = False,
    round_0: Path | None = None,
    cache: Path | None = None,
    finish: Callable[[Outcome], Outcome] = lambda outcome: outcome,
) -> Outcome:
    """Run all rounds and deliver a model, or go on where the same command was stopped.

    Processes that torchrun started (`medssl.ranks`) share the scans that are cached and labeled,
    and each step; the first one writes the run folder.

    Args:
        prepared: Data and plan.
        run_dir: The run folder.
        stop: The stop flag; if it is set while the scans are cached, nothing is delivered.
        restart: Delete what the run folder holds of an earlier run.
        predict_unlabeled: Write the delivered model's masks of the unlabeled cases.
        round_0: A run whose labels-only model is taken over in place of training it again.
        cache: Folder of the preprocessed scans; that beside the run folder if none is given.
        finish: What else is made of a run that has ended, before MLflow gets it for the last time.

    Raises:
        InputError: The folder holds another run, or a stage refused its input.
    """
    config, plan, splits = prepared.resolved.config, prepared.plan, prepared.splits
    if ranks.is_first():
        remove_leftovers(run_dir)
        remove_leftovers(run_dir.parent, is_shared=True, below=False)
        if restart:
            _check_restart(run_dir, round_0)
            (run_dir / "STOP").unlink(missing_ok=True)
    cases = {
        part: select_cases(prepared.dataset, splits, part)
        for part in ("labeled", "unlabeled", "val")
    }
    try:
        every = [case for part in cases.values() for case in part]
        cached = _cache_cases(every, plan, cache or run_dir.parent / "cache", stop)
    except StopRequested:
        message = f"stopped by {stop.reason} while scans were cached; the same command goes on"
        return Outcome("interrupted", None, message)
    sources = {case_id: read_sources(entry) for case_id, entry in cached.items()}
    run_hash = hash_json([hash_config(config), splits.to_json(), sources])
    about = {"network", "patch_size", "flips", "batch", "slice_axis"}
    first = {**plan.model_dump(mode="json", include=about), "steps": at_round(plan.steps, 0)}
    first_hash = hash_json([hash_config(config, STUDENT_KEYS), first, splits.to_json(), sources])
    if ranks.is_first():
        has_round_0 = not restart and (run_dir / "round_0" / "model" / "done.json").is_file()
        taken = None if has_round_0 else round_0
        if taken is not None:
            _check_round_0(taken, first_hash, config)
        if restart or is_half_deleted(run_dir):
            delete_run(run_dir)
        _begin_run(prepared, run_dir, run_hash, cached, taken)
    ranks.meet()
    mirror = None
    if config.tracking.uri != "none" and ranks.is_first():
        mirror = Mirror(run_dir, choose_store(run_dir.parent, config.tracking.uri))
    labeled, unlabeled, val = (
        tuple(cached[case.case_id] for case in part) for part in cases.values()
    )
    run = Run(
        folder=run_dir,
        config=config,
        plan=plan,
        hash=run_hash,
        first_hash=first_hash,
        labeled=labeled,
        unlabeled=unlabeled,
        val=val,
        info=_describe(plan, run_hash, labeled + unlabeled, len(splits.labeled), len(unlabeled)),
        stop=stop,
        notify=mirror.notify if mirror else lambda: None,
    )
    try:
        outcome = _run_or_say_why(run, predict_unlabeled)
        return finish(outcome) if ranks.is_first() else outcome
    finally:
        if mirror:
            mirror.close()


def _cache_cases(
    cases: Sequence[Case], plan: Plan, folder: Path, stop: StopFlag
) -> dict[str, CachedCase]:
    """Cache all cases: of several processes each looks up, or makes, those dealt to it.

    Raises:
        InputError: Some cases cannot be used.
        StopRequested: It was told to stop.
    """
    recipe = plan.preprocessing
    about = (recipe, folder, plan.label_values, plan.ignore, len(plan.channels))
    if ranks.find_rank()[1] == 1:
        return build_cache(cases, *about, _count_or_stop(stop))
    is_stopped = False
    places: list[list[str]] = []
    try:
        with contextlib.suppress(InputError):  # the look-up names the bad cases of all
            mine = build_cache(ranks.deal(cases), *about, _count_or_stop(stop))
            places = list_places(mine)
    except StopRequested:
        is_stopped = True
    if any(ranks.pool([is_stopped])):
        raise StopRequested
    places = ranks.pool(places)
    opened = open_places(cases, places, recipe, folder, len(plan.channels))
    left = [case for case in cases if case.case_id not in opened]
    if left:
        opened |= build_cache(left, *about)
    return {case.case_id: opened[case.case_id] for case in cases}


def _begin_run(
    prepared: PreparedRun,
    run_dir: Path,
    run_hash: str,
    cached: Mapping[str, CachedCase],
    round_0: Path | None,
) -> None:
    """Write what a run begins with, the round 0 of another run too."""
    _open_folder(prepared, run_dir, run_hash)
    metas = {case_id: read_json(entry.folder / "meta.json") for case_id, entry in cached.items()}
    patients = {case.case_id: case.patient_id for case in prepared.dataset.cases}
    write_trained_on(run_dir, metas, patients)
    if round_0 is not None:
        _take_over_round_0(round_0, run_dir)


def _run_or_say_why(run: Run, predict_unlabeled: bool) -> Outcome:
    """Run all rounds; where that fails, the state says so."""
    try:
        with explain_out_of_memory(
            f"out of memory; {suggest_smaller(run.config, run.plan, run.num_rounds)}, or, where "
            "whole scans are too large, a coarser plan.spacing, and --restart to start over"
        ):
            return _run_rounds(run, predict_unlabeled)
    except (Exception, KeyboardInterrupt) as error:
        is_stopped = isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(InputError, OSError):  # a full disk: the first error is to be told
            set_status(run.folder, "interrupted" if is_stopped else "failed")
        raise


def _run_rounds(run: Run, predict_unlabeled: bool) -> Outcome:
    """Train, pseudo-label and judge, round after round."""
    teacher: int | None = None
    passed: list[int] = []
    rejected = 0
    is_stopped = False
    try:
        with share_steps(run.plan.device):
            for index in range(run.num_rounds + 1):
                train_round(run, index, teacher)
                gate = label_and_judge(run, index, teacher)
                if gate.passed:
                    teacher = index
                    passed.append(index)
                    rejected = 0
                else:
                    rejected += 1
                    print(f"round {index} did not pass its gate: {'; '.join(gate.reasons)}")
                if rejected == MOST_REJECTED or teacher is None:
                    break
    except StopRequested:
        is_stopped = True
        run.stop.is_set()  # hears of the reason, if that is another process's
    if not ranks.is_first():
        return Outcome("interrupted" if is_stopped else "delivered", None, "")
    if is_stopped:
        return deliver_interrupted(run, passed)
    return deliver_model(run, passed, rejected, predict_unlabeled)


def _describe(
    plan: Plan, run_hash: str, cases: Sequence[CachedCase], num_labeled: int, num_unlabeled: int
) -> ModelInfo:
    """Return model.json without the round."""
    percentiles = np.array([case.percentiles for case in cases])  # (cases, C, 3)
    spacings = np.array([np.linalg.norm(case.native_affine[:3, :3], axis=0) for case in cases])
    spacings.sort(axis=1)
    return describe_model(
        plan,
        {"run": run_hash[:12], "labeled_cases": num_labeled, "unlabeled_cases": num_unlabeled},
        intensity_range=tuple(
            (float(channel[:, 0].min()), float(channel[:, -1].max()))
            for channel in percentiles.swapaxes(0, 1)
        ),
        spacing_range=tuple((float(axis.min()), float(axis.max())) for axis in spacings.T)
        if plan.has_spacing
        else (),
    )


def _check_round_0(source: Path, first_hash: str, config: Config) -> None:
    """Refuse a run whose round 0 is not what this one's would be."""
    path = source / "round_0" / "model" / "done.json"
    if not path.is_file():
        raise InputError(f"--round-0 {source}: there is no finished round 0 in it")
    mark = read_json(path, ModelMark)
    changed = find_changed(path.parent, mark)
    if changed:
        raise InputError(f"--round-0 {source}: {changed[0]} has changed since its round 0 ended")
    if mark["hash"] != first_hash:
        before = load_config(source / "config.yaml").config
        changes = list_changes(before, config, STUDENT_KEYS)
        raise InputError(
            f"--round-0 {source}: its round 0 is not that of this run: "
            f"{'; '.join(changes) or 'it had other data, another network, or other steps'}; leave "
            "the option out, or give both runs the same"
        )


def _take_over_round_0(source: Path, run_dir: Path) -> None:
    """Copy the models of round 0 of another run, with its lines of the journal."""
    there, here = source / "round_0", run_dir / "round_0"
    journal = Journal(run_dir / "metrics.jsonl")
    journal.cut(0, 0)
    for entry in Journal(source / "metrics.jsonl").read():
        if entry["round"] == 0 and "monitors/gate" not in entry["metrics"]:
            journal.append(0, entry["step"], entry["metrics"])
    shutil.copytree(there / "snapshots", here / "snapshots", dirs_exist_ok=True)
    marks = (there / "models").glob("*/model/done.json")  # of the members that are finished
    folders = [mark.parent.relative_to(there) for mark in marks]
    all_but_marks = shutil.ignore_patterns("done.json")
    for folder in (*folders, Path("model")):
        shutil.copytree(there / folder, here / folder, ignore=all_but_marks, dirs_exist_ok=True)
    for folder in (*folders, Path("model")):  # the mark of round 0 last: a kill leaves it undone
        write_json(here / folder / "done.json", read_json(there / folder / "done.json"))


def _open_folder(prepared: PreparedRun, run_dir: Path, run_hash: str) -> None:
    """Write what describes a run, or refuse a folder that holds another one."""
    path = run_dir / "run.json"
    is_new = not path.is_file()
    if is_new and not is_remnant(run_dir):
        raise InputError(f"{run_dir} is not empty and holds no run; give another --run")
    if not is_new and read_json(path).get("hash") != run_hash:
        raise _name_difference(prepared, run_dir)
    run_dir.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link
    splits, dataset, plan = prepared.splits, prepared.dataset, prepared.plan
    source = prepared.resolved.config.data.root or dataset.root
    about = {
        "name": dataset.name,
        "root": str(dataset.root.resolve()),
        "source": str(Path(source).resolve()),
        "num_cases": len(dataset.cases),
    }
    if url := find_url(dataset.root):
        about["url"] = url
    case_ids = [case.case_id for case in dataset.cases]
    config = yaml.safe_dump(dump(prepared.resolved.config), sort_keys=False)
    provenance = describe_provenance(plan.device, plan.threads)
    provenance["data"] = about.get("url", about["source"])
    described: dict[str, Callable[[Path], object]] = {
        "config.yaml": lambda to: write_text(to, config),
        "splits.json": lambda to: write_json(to, {**splits.to_json(), "dataset": about}),
        "pseudonyms.json": lambda to: make_pseudonyms(run_dir, dataset.root, case_ids),
        "provenance.json": lambda to: write_json(to, provenance),
        "plan.json": lambda to: write_json(to, plan.model_dump(mode="json")),
    }
    for name, write in described.items():  # one that was damaged and deleted comes back
        if is_new or not (run_dir / name).is_file():
            write(run_dir / name)
            is_new = is_new or name == "plan.json"
    if is_new:
        settings = hash_config(prepared.resolved.config)
        write_json(path, {"hash": run_hash, "settings": settings, **hash_record(run_dir)})
    state = run_dir / "state.json"
    if not state.is_file() or read_json(state, State)["status"] != "delivered":
        set_status(run_dir, "running")


def _name_difference(prepared: PreparedRun, run_dir: Path) -> InputError:
    """Return the error of a folder whose run is not that of the command."""
    return InputError(
        f"{run_dir} holds another run: {_find_difference(prepared, run_dir)}; give another --run, "
        "or --restart to delete it and start over"
    )


def _find_difference(prepared: PreparedRun, run_dir: Path) -> str:
    """Say what of a command is not as in the run that a folder holds."""
    try:
        then = load_config(run_dir / "config.yaml").config
    except InputError:
        return "its config.yaml is of another version of medssl"
    changed = list_changes(then, prepared.resolved.config)
    if changed:
        return ", ".join(changed)
    old, new = read_json(run_dir / "splits.json"), prepared.splits.to_json()
    parts = [part for part, cases in new.items() if old.get(part) != cases]
    if parts:
        return f"its {', '.join(parts)} cases are not those of the data now"
    return "scans or labels of its cases, or the version of medssl, have changed since"


def _check_restart(run_dir: Path, round_0: Path | None) -> None:
    """Refuse to delete what is no run, or what is still needed."""
    if not is_begun(run_dir) and not is_remnant(run_dir):
        raise InputError(f"{run_dir} holds no run that could be started over; nothing was deleted")
    if round_0 is not None and round_0.resolve() == run_dir.resolve():
        raise InputError(f"--round-0 {round_0}: --restart would delete it; name another run")


def _count_or_stop(stop: StopFlag) -> Callable[[int, int], None]:
    """Return what says how far the cache is, and stops there if it is told to."""
    count = CaseCounter("cache")

    def report(done: int, total: int) -> None:
        count(done, total)
        if done < total and stop.is_set():
            raise StopRequested

    return report
