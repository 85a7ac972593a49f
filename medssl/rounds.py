"""Rounds: train -> pseudo-label -> gate -> train -> ... -> deliver, as a plain loop.

Every stage reads files and writes files, its done mark last; the same command goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from medssl.config import IGNORE, Config, InputError, Resolved, dump, hash_config
from medssl.data.cache import CachedCase, build_cache
from medssl.data.cases import Dataset, Splits, split_cases, take
from medssl.data.check import check_dataset
from medssl.data.formats import read_dataset
from medssl.data.io import write_mask
from medssl.data.loaders import PatchDataset, Sampling, UnlabeledCase
from medssl.networks.build import SegmentationNetwork, build_network
from medssl.objective import Objective
from medssl.plan import Plan, choose_device, estimate_hours, make_plan, measure_step, resolve
from medssl.predict import (
    ModelInfo,
    describe_model,
    load_model,
    measure_uncertainty,
    predict_probs,
    save_model,
)
from medssl.pseudo.gates import CaseReview, Gate, expect_from, judge_model
from medssl.pseudo.label import label_cases, read_review
from medssl.pseudo.store import measure_agreement
from medssl.runs import (
    Journal,
    StopFlag,
    describe_provenance,
    hash_file,
    hash_json,
    is_done,
    make_pseudonyms,
    read_json,
    seed_from,
    write_json,
    write_state,
    write_text,
)
from medssl.tracking import Mirror, default_uri
from medssl.train import train
from medssl.transforms.geometry import to_native

MOST_REJECTED = 2  # rounds


class StopRequested(Exception):  # noqa: N818  # it is no error
    """The stop flag was set; everything up to here is on disk."""


@dataclass(frozen=True)
class Prepared:
    """The data set, its splits and the plan, before anything is trained."""

    dataset: Dataset
    splits: Splits
    plan: Plan
    resolved: Resolved


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    folder: Path
    config: Config
    plan: Plan
    hash: str
    labeled: tuple[CachedCase, ...]
    unlabeled: tuple[CachedCase, ...]
    val: tuple[CachedCase, ...]
    info: ModelInfo
    stop: StopFlag
    notify: Callable[[], None]

    def round_folder(self, index: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round_{index}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        return tuple(self.plan.labels[index] for index in range(self.plan.num_classes))


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``status`` as in state.json, the round that was delivered, and why."""

    status: str
    delivered: str | None
    message: str


def prepare(
    resolved: Resolved, reload: Callable[[Mapping[str, Any]], Resolved], run_dir: Path | None
) -> Prepared:
    """Read and check the data set, split it and make the plan; writes nothing.

    Args:
        resolved: The configuration, with ``auto`` values.
        reload: Resolves it again with what the plan decided.
        run_dir: A run folder whose plan is taken over if it has one, or None.

    Raises:
        InputError: All problems of the data at once.
    """
    config = resolved.config
    if config.data.root is None:
        raise InputError("no data: give a folder or a list of scans, or data.root in the YAML")
    dataset = read_dataset(config.data.root, config.data.format, config.data.labels)
    splits = split_cases(dataset, config.data, config.validation)
    if run_dir is not None and (run_dir / "plan.json").is_file():
        plan = Plan.model_validate(read_json(run_dir / "plan.json"))
        device = choose_device(config.train.device)
        now = {"device": device, "threads": torch.get_num_threads()}
        if config.train.workers != "auto":
            now["workers"] = config.train.workers
        plan = plan.model_copy(update=now)
    else:
        checked = check_dataset(dataset, splits, config.data.ignore)
        checked.raise_problems()
        labeled, unlabeled = take(dataset, splits, "labeled"), take(dataset, splits, "unlabeled")
        plan = make_plan(config, dataset, checked.labels, labeled, unlabeled)
        rounds = config.train.rounds if unlabeled else 0
        estimate = estimate_hours(plan, rounds, measure_step(plan))
        plan = plan.model_copy(update={"estimate": estimate})
    return Prepared(dataset, splits, plan, reload(resolve(plan)))


def run_training(
    prepared: Prepared,
    run_dir: Path,
    stop: StopFlag,
    restart: bool = False,
    predict_unlabeled: bool = False,
) -> Outcome:
    """Run all rounds and deliver a model, or go on where the same command was stopped.

    Args:
        prepared: Data and plan.
        run_dir: The run folder.
        stop: The stop flag.
        restart: Delete what the run folder holds of an earlier run.
        predict_unlabeled: Write the delivered model's masks of the unlabeled cases.

    Raises:
        InputError: The folder holds another run, or a stage refused its input.
    """
    config, plan, splits = prepared.resolved.config, prepared.plan, prepared.splits
    if restart:
        _delete_run(run_dir)
    cases = {part: take(prepared.dataset, splits, part) for part in ("labeled", "unlabeled", "val")}
    cached = build_cache(
        [case for part in cases.values() for case in part],
        plan.preprocessing,
        run_dir.parent / "cache",
        plan.label_values,
        plan.ignore,
        len(plan.channels),
        _report_cache,
    )
    run_hash = hash_json(
        [hash_config(config), splits.to_json(), {c: _read_sources(e) for c, e in cached.items()}]
    )
    _open_folder(prepared, run_dir, run_hash)
    mirror = None
    if config.tracking.uri != "none":
        uri = default_uri(run_dir.parent) if config.tracking.uri == "auto" else config.tracking.uri
        name = config.tracking.experiment
        mirror = Mirror(run_dir, uri, prepared.dataset.name if name == "auto" else name)
    labeled, unlabeled, val = (
        tuple(cached[case.case_id] for case in part) for part in cases.values()
    )
    run = Run(
        folder=run_dir,
        config=config,
        plan=plan,
        hash=run_hash,
        labeled=labeled,
        unlabeled=unlabeled,
        val=val,
        info=_describe(plan, run_hash, labeled + unlabeled, len(splits.labeled), len(unlabeled)),
        stop=stop,
        notify=mirror.notify if mirror else lambda: None,
    )
    try:
        outcome = _run_rounds(run, predict_unlabeled)
    except KeyboardInterrupt:
        _set_status(run_dir, "interrupted")
        raise
    except Exception:
        _set_status(run_dir, "failed")
        raise
    finally:
        if mirror:
            mirror.close()
    return outcome


def _run_rounds(run: Run, predict_unlabeled: bool) -> Outcome:
    """Train, pseudo-label and judge, round after round."""
    num_rounds = run.config.train.rounds if run.unlabeled else 0
    teacher: int | None = None
    passed: list[int] = []
    rejected = 0
    try:
        for index in range(num_rounds + 1):
            _train_round(run, index, teacher)
            gate = _label_and_judge(run, index, teacher)
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
        return _deliver_interrupted(run, passed)
    return _deliver(run, passed, rejected, predict_unlabeled)


def _train_round(run: Run, index: int, teacher: int | None) -> None:
    """Train the model of a round, and write its model folder."""
    folder = run.round_folder(index)
    if is_done(folder / "model", run.hash):
        return
    kept = []
    if teacher is not None:
        source = run.round_folder(teacher)
        accepted = {row["case_id"] for row in read_review(source) if row["accepted"] == "1"}
        offline = "previous_round" in run.config.teacher.source
        kept = [
            UnlabeledCase(case, source / "pseudo_labels" / case.case_id if offline else None)
            for case in run.unlabeled
            if case.case_id in accepted
        ]
        print(
            f"round {index}: a student learns from {len(run.labeled)} labeled and {len(kept)} "
            f"pseudo-labeled cases of round {teacher}"
        )
    else:
        print(f"round {index}: {len(run.labeled)} labeled cases alone, the honest baseline")
    spec = run.plan.network
    if kept:
        survival = run.config.noise.stochastic_depth
        spec = spec.model_copy(update={"stochastic_depth": survival})
    torch.manual_seed(seed_from(run.config.train.seed, index, "weights"))
    objective = Objective(build_network(spec, download=True), run.config, run.class_names)
    dataset = PatchDataset(run.labeled, kept, _choose_sampling(run, index))
    steps = train(
        objective,
        dataset,
        run.config,
        run.plan,
        run.folder,
        index,
        run.stop,
        validate=(lambda: _validate(run, objective.predictor)) if run.val else None,
        on_checkpoint=run.notify,
    )
    info = run.info.model_copy(
        update={
            "network": spec,
            "provenance": {**run.info.provenance, "round": index, "steps": steps},
        }
    )
    save_model(folder / "model", objective.predictor.eval(), info)
    if steps < run.plan.steps:
        raise StopRequested
    done = {"hash": run.hash, "round": index, "steps": steps, "num_kept": len(kept)}
    write_json(folder / "model" / "done.json", done)


def _choose_sampling(run: Run, index: int) -> Sampling:
    """Return what decides the patches of a round."""
    return Sampling(
        seed=run.config.train.seed,
        round_index=index,
        patch_size=run.plan.patch_size,
        batch=run.plan.batch,
        num_unlabeled=run.plan.num_unlabeled,
        foreground=run.config.train.foreground,
        strong=run.config.noise.strong,
        flips=run.plan.flips,
        slice_axis=run.plan.slice_axis,
    )


@torch.no_grad()
def _validate(run: Run, network: SegmentationNetwork) -> dict[str, float]:
    """Return val/dice of the validation cases on the cache grid."""
    network.eval()
    per_class: dict[str, list[float]] = {name: [] for name in run.class_names[1:]}
    for case in run.val:
        label = case.label()
        if label is None:
            continue
        image = _to_tensor(case, run.plan.device)
        size, precision, axis = run.plan.patch_size, run.plan.precision, run.plan.slice_axis
        probs = predict_probs(network, image, size, precision, slice_axis=axis)
        classes = probs[0].argmax(0).cpu().numpy()
        classes[label == IGNORE] = IGNORE
        for class_index, name in enumerate(run.class_names[1:], start=1):
            if (label == class_index).any() or (classes == class_index).any():
                dice = measure_agreement(classes, label, [class_index])
                per_class[name].append(dice)
    means = {f"val/dice/{name}": float(np.mean(v)) for name, v in per_class.items() if v}
    return {**means, "val/dice": float(np.mean(list(means.values())))} if means else {}


def _label_and_judge(run: Run, index: int, teacher: int | None) -> Gate:
    """Pseudo-label the unlabeled cases with the model of a round, and judge it by them."""
    folder = run.round_folder(index)
    if is_done(folder, run.hash):
        gate = read_json(folder / "done.json")["gate"]
        return Gate(gate["passed"], tuple(gate["reasons"]))
    labels = [label for case in run.labeled if (label := case.label()) is not None]
    expectation = expect_from(labels, run.plan.num_classes)
    model = load_model(folder, run.plan.device)
    before = run.round_folder(teacher) / "pseudo_labels" if teacher is not None else None
    reviews = label_cases(
        run.unlabeled,
        lambda case: _label_case(run, model.network, case),
        folder,
        before,
        hash_file(folder / "model" / "weights.safetensors"),
        expectation,
        run.plan.labels,
        run.plan.label_values,
        run.config.filter,
        run.stop.is_set,
    )
    if reviews is None:
        raise StopRequested
    gate = judge_model(reviews, expectation, run.plan.labels)
    _finish_round(run, index, teacher, reviews, gate)
    return gate


def _label_case(
    run: Run, network: SegmentationNetwork, case: CachedCase
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return probs of the un-noised teacher, averaged over mirrorings, and the uncertainty.

    The uncertainty is the predictive entropy of MC dropout, or of the probs without it.
    """
    image = _to_tensor(case, run.plan.device)
    size, precision, axis = run.plan.patch_size, run.plan.precision, run.plan.slice_axis
    probs = predict_probs(network, image, size, precision, run.plan.flips, axis)[0]
    section = run.config.filter.uncertainty
    if section.source == "mc_dropout":
        torch.manual_seed(seed_from(run.config.train.seed, case.case_id, "mc_dropout"))
        entropy, _ = measure_uncertainty(network, image, size, precision, section.passes, axis)
        doubt = entropy[0, 0]
    else:
        doubt = -(probs * probs.clamp(min=1e-12).log()).sum(0)
    return probs.cpu().numpy(), doubt.cpu().numpy()


def _to_tensor(case: CachedCase, device: str) -> torch.Tensor:
    """Return the image of a case, (1, C, I, J, K) float32."""
    return torch.from_numpy(np.asarray(case.image(), dtype=np.float32))[None].to(device)


def _finish_round(
    run: Run, index: int, teacher: int | None, reviews: Sequence[CaseReview], gate: Gate
) -> None:
    """Write the done mark of a round and its line in the journal."""
    folder = run.round_folder(index)
    journal = Journal(run.folder / "metrics.jsonl")
    metrics: dict[str, float] = {"monitors/gate": float(gate.passed)}
    if reviews:
        metrics["monitors/kept_cases"] = float(sum(review.accepted for review in reviews))
        metrics["monitors/uncertainty"] = float(np.mean([r.uncertainty for r in reviews]))
        for name in run.class_names[1:]:
            shares = [review.coverage_per_class[name] for review in reviews]
            metrics[f"monitors/pseudo_coverage/{name}"] = float(np.mean(shares))
    agreements = [r.agreement for r in reviews if r.agreement is not None]
    if agreements:
        metrics["monitors/agreement"] = float(np.mean(agreements))
    own = [e for e in journal.read() if e["round"] == index]
    last = [e for e in own if "losses/total" in e["metrics"]]
    if not any("monitors/gate" in e["metrics"] for e in own):  # a kill came before the done mark
        journal.append(index, run.plan.steps, metrics)
    values = {**(last[-1]["metrics"] if last else {}), **metrics}
    if run.val:
        values |= _validate(run, load_model(folder, run.plan.device).network)
    model_done = read_json(folder / "model" / "done.json")
    content = {
        "hash": run.hash,
        "round": index,
        "teacher": teacher,
        "steps": run.plan.steps,
        "seconds": _measure_seconds(journal, index),
        "gate": {"passed": gate.passed, "reasons": list(gate.reasons)},
        "num_labeled": len(run.labeled),
        "num_unlabeled": model_done["num_kept"],
        "final": values,
    }
    write_json(folder / "done.json", content)
    write_state(run.folder, "running", index, run.plan.steps)
    run.notify()
    if teacher is not None:
        for earlier in range(index):
            if earlier != teacher and gate.passed:
                shutil.rmtree(run.round_folder(earlier) / "pseudo_labels", ignore_errors=True)


def _measure_seconds(journal: Journal, index: int) -> float:
    """Return the seconds that the steps of a round took, over all sittings."""
    seconds, before = 0.0, 0
    for entry in journal.read():
        rate = entry["metrics"].get("monitors/steps_per_second")
        if entry["round"] == index and rate:
            seconds += (entry["step"] - before) / rate
            before = entry["step"]
    return round(seconds, 1)


def _deliver(run: Run, passed: Sequence[int], rejected: int, predict_unlabeled: bool) -> Outcome:
    """Deliver the best validated round, or the last one that passed its gate."""
    if not passed:
        reasons = read_json(run.round_folder(0) / "done.json")["gate"]["reasons"]
        _copy_model(run, 0)
        message = f"the labels-only model did not pass its gate: {'; '.join(reasons)}"
        _summarize(run, "round_0", message)
        _set_status(run.folder, "stopped_by_gate")
        return Outcome("stopped_by_gate", "round_0", message)
    chosen = passed[-1]
    if run.val:
        done = {r: read_json(run.round_folder(r) / "done.json")["final"] for r in passed}
        chosen = max(passed, key=lambda r: (done[r].get("val/dice") or 0.0, r))
    _copy_model(run, chosen)
    by_gate = rejected >= MOST_REJECTED
    how = "the best on the validation cases" if run.val else "the last that passed its gate"
    message = f"delivered round {chosen}, {how}"
    if by_gate:
        message += f"; {rejected} rounds after it were rejected by their gates"
    _summarize(run, f"round_{chosen}", message)
    status = "stopped_by_gate" if by_gate else "delivered"
    if predict_unlabeled:
        _predict_unlabeled(run)
    _set_status(run.folder, status)
    return Outcome(status, f"round_{chosen}", message)


def _deliver_interrupted(run: Run, passed: Sequence[int]) -> Outcome:
    """Leave a usable model: the last one that passed its gate, or the unfinished round 0."""
    chosen = passed[-1] if passed else 0
    _copy_model(run, chosen)
    what = f"round {chosen}" if passed else "round 0 as far as it came"
    message = f"stopped by {run.stop.reason}; model/ holds {what}; the same command goes on"
    _summarize(run, f"round_{chosen}", message)
    _set_status(run.folder, "interrupted")
    return Outcome("interrupted", f"round_{chosen}", message)


def _copy_model(run: Run, index: int) -> None:
    """Copy the model of a round to model/; model.json comes last."""
    source, target = run.round_folder(index) / "model", run.folder / "model"
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.json").unlink(missing_ok=True)
    for name in ("weights.safetensors", "model.json"):
        shutil.copyfile(source / name, target / f".{name}")
        (target / f".{name}").replace(target / name)


def _summarize(run: Run, delivered: str, message: str) -> None:
    """Write summary.json."""
    rounds = []
    for index in range(run.config.train.rounds + 1):
        path = run.round_folder(index) / "done.json"
        if path.is_file():
            done = read_json(path)
            final = done["final"]
            done |= {
                "kept_cases": final.get("monitors/kept_cases"),
                "agreement": final.get("monitors/agreement"),
            }
            rounds.append({k: v for k, v in done.items() if k not in ("hash", "final")})
    content = {
        "delivered": delivered,
        "exit": message,
        "rounds": rounds,
        "total_steps": sum(entry["steps"] for entry in rounds),
        "seconds": round(sum(entry["seconds"] for entry in rounds), 1),
        "baseline": {"round": 0, "steps": run.plan.steps},
        "labeled_cases": len(run.labeled),
        "val_cases": len(run.val),
        "unlabeled_cases": len(run.unlabeled),
    }
    write_json(run.folder / "summary.json", content)


def _predict_unlabeled(run: Run) -> None:
    """Write the delivered model's masks of all unlabeled cases, in full, on their own grids."""
    model = load_model(run.folder, run.plan.device)
    for case in run.unlabeled:
        path = run.folder / "unlabeled_masks" / f"{case.case_id}{case.mask_suffix}"
        if path.is_file():
            continue
        image = _to_tensor(case, run.plan.device)
        size, precision, axis = run.plan.patch_size, run.plan.precision, run.plan.slice_axis
        probs = predict_probs(model.network, image, size, precision, run.plan.flips, axis)[0]
        native = to_native(probs.cpu().numpy(), case.affine, case.native_shape, case.native_affine)
        classes = native.argmax(0).astype(np.uint8)
        write_mask(path, classes, case.native_affine, run.plan.label_values)


def _read_sources(case: CachedCase) -> list[object]:
    """Return the hashes of the files that a cached case was made from."""
    sources: list[object] = [read_json(case.folder / "meta.json")["sources"]]
    return [*sources, read_json(case.folder / "label.json")] if case.has_label else sources


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


def _open_folder(prepared: Prepared, run_dir: Path, run_hash: str) -> None:
    """Write what describes a run, or refuse a folder that holds another one."""
    path = run_dir / "run.json"
    if path.is_file():
        if read_json(path)["hash"] != run_hash:
            raise InputError(
                f"{run_dir} holds a run with another configuration or other data; give another "
                "--run, or --restart to delete it and start over"
            )
    else:
        if run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / "plan.json").is_file():
            raise InputError(f"{run_dir} is not empty and holds no run; give another --run")
        splits, dataset, plan = prepared.splits, prepared.dataset, prepared.plan
        config = dump(prepared.resolved.config)
        write_json(run_dir / "plan.json", plan.model_dump(mode="json"))
        write_text(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        about = {
            "name": dataset.name,
            "root": str(dataset.root.resolve()),
            "num_cases": len(dataset.cases),
        }
        write_json(run_dir / "splits.json", {**splits.to_json(), "dataset": about})
        case_ids = [case.case_id for case in dataset.cases]
        make_pseudonyms(run_dir, dataset.root, case_ids)
        write_json(run_dir / "provenance.json", describe_provenance(plan.device, plan.threads))
        write_state(run_dir, "running", 0, 0)
        write_json(path, {"hash": run_hash})
    if read_json(run_dir / "state.json")["status"] != "delivered":
        _set_status(run_dir, "running")


def _set_status(run_dir: Path, status: str) -> None:
    """Change the status and leave the checkpoint's place as it is."""
    path = run_dir / "state.json"
    state = read_json(path) if path.is_file() else {"round": 0, "step": 0}
    write_state(run_dir, status, state["round"], state["step"])


def _delete_run(run_dir: Path) -> None:
    """Delete an earlier run, and nothing that is not one."""
    if not run_dir.exists():
        return
    if not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir} holds no run that could be started over; nothing was deleted")
    shutil.rmtree(run_dir)


def _report_cache(done: int, total: int) -> None:
    """Say how far the cache is, now and then."""
    if total > 50 and (done % 50 == 0 or done == total):
        print(f"cache: {done} of {total} cases", flush=True)
