"""Rounds: train -> pseudo-label -> gate -> train -> ... -> deliver, as a plain loop.

Every stage reads files and writes files, its done mark last; the same command goes on from there.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from medssl.config import IGNORE, Config, InputError, Resolved, at_round, dump, hash_config
from medssl.data.cache import CachedCase, build_cache
from medssl.data.cases import Dataset, Splits, split_cases, take
from medssl.data.check import check_dataset
from medssl.data.formats import read_dataset
from medssl.data.io import write_mask
from medssl.data.loaders import PatchDataset, Sampling, UnlabeledCase
from medssl.networks.build import NetworkSpec, SegmentationNetwork, build_network
from medssl.objective import Objective, load_objective
from medssl.plan import (
    Plan,
    choose_device,
    count_unlabeled,
    describe_student,
    estimate_hours,
    make_plan,
    measure_step,
    resolve,
)
from medssl.predict import (
    Model,
    ModelInfo,
    describe_model,
    load_model,
    measure_uncertainty,
    predict_mirrored,
    predict_probs,
    save_model,
)
from medssl.pseudo.gates import CaseReview, Expectation, Gate, expect_from, judge_model
from medssl.pseudo.label import RawPseudoLabel, label_cases, read_review, weigh_cases
from medssl.pseudo.store import draw_probs, measure_agreement
from medssl.pseudo.transport import fit_potentials, shrink_prior
from medssl.pseudo.uncertainty import combine, entropy_of
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
from medssl.train import find_model_folder, train
from medssl.transforms.geometry import to_native

MOST_REJECTED = 2  # rounds
TRANSPORT_STEPS = 500
MOST_CORRECTED = 2.0  # factor by which a class is made larger or smaller
LEAST_SHARE = 1e-4  # of a class in the prior that pseudo-labels are assigned towards
STUDENT_KEYS = (
    "method", "objective", "teacher.source", "teacher.ensemble", "views", "target.", "filter.",
    "noise.mixing", "noise.mixing_probability", "noise.strong", "noise.randaugment.",
    "noise.dropout", "noise.stochastic_depth", "losses.pseudo_label.", "losses.entropy.",
    "losses.consistency.", "network.width", "train.rounds", "train.unlabeled_ratio",
    "train.start", "train.schedule", "train.fine_tune.",
)  # fmt: skip
"""What round 0 does not depend on; its network stands in the plan."""


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
    first_hash: str
    labeled: tuple[CachedCase, ...]
    unlabeled: tuple[CachedCase, ...]
    val: tuple[CachedCase, ...]
    info: ModelInfo
    stop: StopFlag
    notify: Callable[[], None]

    @property
    def num_rounds(self) -> int:
        """Number of student rounds."""
        return self.config.train.rounds if self.unlabeled else 0

    def round_hash(self, index: int) -> str:
        """Return the hash of a round's models: round 0 depends on no setting of students."""
        return self.hash if index else self.first_hash

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
    round_0: Path | None = None,
) -> Outcome:
    """Run all rounds and deliver a model, or go on where the same command was stopped.

    Args:
        prepared: Data and plan.
        run_dir: The run folder.
        stop: The stop flag.
        restart: Delete what the run folder holds of an earlier run.
        predict_unlabeled: Write the delivered model's masks of the unlabeled cases.
        round_0: A run whose labels-only model is taken over in place of training it again.

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
    sources = {case_id: _read_sources(entry) for case_id, entry in cached.items()}
    run_hash = hash_json([hash_config(config), splits.to_json(), sources])
    about = {"network", "patch_size", "flips", "batch", "slice_axis"}
    first = plan.model_dump(mode="json", include=about)
    first_hash = hash_json([hash_config(config, STUDENT_KEYS), first, splits.to_json(), sources])
    _open_folder(prepared, run_dir, run_hash)
    if round_0 is not None:
        _take_over_round_0(round_0, run_dir, first_hash)
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
        first_hash=first_hash,
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
    teacher: int | None = None
    passed: list[int] = []
    rejected = 0
    try:
        for index in range(run.num_rounds + 1):
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
    """Train the models of a round: one, or an ensemble if another round follows."""
    kept = [] if teacher is None else _choose_cases(run, index, teacher)
    for member in range(_count_members(run, index)):
        folder = find_model_folder(run.folder, index, member)
        if is_done(folder / "model", run.round_hash(index)):
            continue
        name = f"round {index}" + (f", model {member + 1} of the ensemble" if member else "")
        if teacher is None:
            print(f"{name}: {len(run.labeled)} labeled cases alone, the honest baseline")
        else:
            print(
                f"{name}: a student learns from {len(run.labeled)} labeled and {len(kept)} "
                f"pseudo-labeled cases of round {teacher}"
            )
        _train_model(run, index, member, teacher, kept)


def _count_members(run: Run, index: int) -> int:
    """Return how many models a round trains; the last round has nobody to teach."""
    return run.config.teacher.ensemble if index < run.num_rounds else 1


def _train_model(
    run: Run, index: int, member: int, teacher: int | None, kept: Sequence[UnlabeledCase]
) -> None:
    """Train one model of a round, and write its model folder."""
    config, folder = run.config, find_model_folder(run.folder, index, member)
    seed = seed_from(config.train.seed, "member", member) if member else config.train.seed
    spec = describe_student(run.plan, config, index) if kept else run.plan.network
    torch.manual_seed(seed_from(seed, index, "weights"))
    network = build_network(spec, download=True)
    if kept and config.train.start == "warm" and teacher is not None:
        _start_warm(network, spec, load_model(run.round_folder(teacher)))
    objective = _build_objective(run, network, kept, teacher)
    info = run.info.model_copy(update={"network": spec})
    thirds = {}
    if _needs_stability(run, index) and not member:
        thirds = {
            max(1, run.plan.steps * part // 3): functools.partial(
                _save_snapshot, folder / "snapshots" / str(part), objective, info
            )
            for part in (1, 2)
        }
    steps = train(
        objective,
        PatchDataset(run.labeled, kept, _choose_sampling(run, index, seed)),
        config,
        run.plan,
        run.folder,
        index,
        run.stop,
        validate=(lambda: _validate(run, objective.predictor)) if run.val and not member else None,
        on_checkpoint=run.notify,
        member=member,
        snapshots=thirds,
    )
    provenance = {**run.info.provenance, "round": index, "steps": steps}
    info = info.model_copy(update={"provenance": provenance})
    save_model(folder / "model", objective.predictor.eval(), info)
    if steps < run.plan.steps:
        raise StopRequested
    done = {"hash": run.round_hash(index), "round": index, "steps": steps, "num_kept": len(kept)}
    write_json(folder / "model" / "done.json", done)


def _start_warm(network: SegmentationNetwork, spec: NetworkSpec, teacher: Model) -> None:
    """Give a student the weights of its teacher."""
    if spec.filters != teacher.info.network.filters:
        raise InputError(
            f"train.start=warm: the student has filters {list(spec.filters)}, its teacher "
            f"{list(teacher.info.network.filters)}; give network.width one value, or "
            "train.start=scratch"
        )
    pairs = zip(network.state_dict().values(), teacher.network.state_dict().values(), strict=True)
    for own, given in pairs:  # by place: noise between the layers changes their names
        own.copy_(given)


def _save_snapshot(folder: Path, objective: Objective, info: ModelInfo) -> None:
    """Write the predictor as it is in the middle of a training."""
    save_model(folder, objective.predictor, info)


def _needs_stability(run: Run, index: int) -> bool:
    """Return whether the round after this one is taught by the stable cases only."""
    return index < run.num_rounds and at_round(run.config.filter.case.stable, index) < 1.0


def _build_objective(
    run: Run, network: SegmentationNetwork, kept: Sequence[UnlabeledCase], teacher: int | None
) -> Objective:
    """Return the objective of a round: round 0 has the built-in one, whatever is named."""
    kind = load_objective(run.config.objective) if kept else Objective
    if run.config.target.assignment != "transport" or not kept:
        return kind(network, run.config, run.class_names)
    section = run.config.target.transport
    shares = _expect(run).share
    labeled = complete_shares([shares[i] for i in range(1, run.plan.num_classes)])
    folders = [case.folder for case in kept if case.folder is not None]
    if not folders or teacher is None:
        return kind(network, run.config, run.class_names, labeled)
    pool = draw_probs(folders)
    prior = shrink_prior(labeled, pool.mean(0), section.shrink)
    if section.prior == "calibrated":
        found = torch.bincount(pool.argmax(1), minlength=run.plan.num_classes) / len(pool)
        ratio = labeled / _measure_shares(run, teacher)
        prior = complete_shares((found * ratio.clamp(1 / MOST_CORRECTED, MOST_CORRECTED))[1:])
    potentials = fit_potentials(pool, prior, section.epsilon, section.rho, TRANSPORT_STEPS)
    return kind(network, run.config, run.class_names, prior, potentials)


def complete_shares(foreground: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Return the shares of all classes, given those of the foreground; none is zero."""
    shares = torch.as_tensor(foreground, dtype=torch.float32).clamp(min=LEAST_SHARE)
    return torch.cat([(1 - shares.sum()).clamp(min=LEAST_SHARE)[None], shares])


def _measure_shares(run: Run, teacher: int) -> torch.Tensor:
    """Return the mean share of each class in what a teacher says of the labeled cases."""
    model = load_model(run.round_folder(teacher), run.plan.device)
    window = (run.plan.patch_size, run.plan.precision, run.plan.flips, run.plan.slice_axis)
    shares = []
    for case in run.labeled:
        probs = predict_probs(model.network, _to_tensor(case, run.plan.device), *window)
        counts = torch.bincount(probs[0].argmax(0).flatten(), minlength=run.plan.num_classes)
        shares.append(counts.cpu() / counts.sum().cpu())
    return complete_shares(torch.stack(shares).mean(0)[1:])


def _choose_cases(run: Run, index: int, teacher: int) -> list[UnlabeledCase]:
    """Return the pseudo-labeled cases that the student of a round learns from."""
    source, section = run.round_folder(teacher), run.config.filter.case
    rows = {row["case_id"]: row for row in read_review(source)}
    accepted = [row for row in rows.values() if row["accepted"] == "1"]
    share = at_round(section.stable, index - 1)
    if share < 1.0:
        accepted.sort(key=lambda row: (-float(row["stability"]), row["case_id"]))
        accepted = accepted[: max(1, round(share * len(accepted)))]
    weights = weigh_cases(accepted, section, run.class_names[1:])
    offline = "previous_round" in run.config.teacher.source
    return [
        UnlabeledCase(
            case,
            source / "pseudo_labels" / case.case_id if offline else None,
            weights[case.case_id],
        )
        for case in run.unlabeled
        if case.case_id in weights
    ]


def _choose_sampling(run: Run, index: int, seed: int) -> Sampling:
    """Return what decides the patches of a round."""
    train_section, noise = run.config.train, run.config.noise
    tuned = train_section.fine_tune.share if index else 0.0
    return Sampling(
        seed=seed,
        round_index=index,
        patch_size=run.plan.patch_size,
        batch=run.plan.batch,
        num_unlabeled=count_unlabeled(run.config, run.plan.batch, max(1, index)),
        foreground=train_section.foreground,
        strong=noise.strong,
        flips=run.plan.flips,
        views=run.config.views,
        randaugment=noise.randaugment,
        fine_tune_from=round(run.plan.steps * (1 - tuned)) if tuned else None,
        pretrain=train_section.schedule == "pretrain",
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
    expectation = _expect(run)
    folders = [
        find_model_folder(run.folder, index, member) for member in range(_count_members(run, index))
    ]
    members = [load_model(path, run.plan.device) for path in folders]
    earlier = [
        load_model(folder / "snapshots" / str(part), run.plan.device)
        for part in (1, 2)
        if _needs_stability(run, index)
    ]
    before = run.round_folder(teacher) / "pseudo_labels" if teacher is not None else None
    reviews = label_cases(
        run.unlabeled,
        lambda case: _label_case(run, members, earlier, case),
        folder,
        before,
        hash_json([hash_file(path / "model" / "weights.safetensors") for path in folders]),
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


def _expect(run: Run) -> Expectation:
    """Return what the labeled cases lead one to expect of a pseudo-label."""
    labels = [label for case in run.labeled if (label := case.label()) is not None]
    return expect_from(labels, run.plan.num_classes)


def _label_case(
    run: Run, members: Sequence[Model], earlier: Sequence[Model], case: CachedCase
) -> RawPseudoLabel:
    """Return what the un-noised teacher says of a case: one model, or the mean of an ensemble.

    The probs are averaged over mirrorings. The uncertainty is that of MC dropout, mirrorings or
    the ensemble, or the entropy of the probs. The stability is the mean Dice of the class maps of
    earlier checkpoints with that of the last one (Yang et al. 2022, ST++, equation 4).
    """
    image = _to_tensor(case, run.plan.device)
    window = (run.plan.patch_size, run.plan.precision)
    axis, flips = run.plan.slice_axis, run.plan.flips
    section = run.config.filter.uncertainty
    all_probs = [predict_probs(m.network, image, *window, flips, axis) for m in members]
    probs = torch.stack(all_probs).mean(0)
    entropy = information = entropy_of(probs)
    if section.source == "mc_dropout":
        torch.manual_seed(seed_from(run.config.train.seed, case.case_id, "mc_dropout"))
        network, passes = members[0].network, section.passes
        entropy, information = measure_uncertainty(network, image, *window, passes, axis)
    elif section.source == "ensemble" and len(members) > 1:  # the last round has one
        _, entropy, information = combine(all_probs, "the ensemble")
    elif section.source == "flips":
        turned = predict_mirrored(members[0].network, image, *window, flips, axis)
        _, entropy, information = combine(turned, "mirrorings")
    doubt = information if section.measure == "mutual_information" else entropy
    stability = None
    if earlier:
        classes = probs[0].argmax(0).cpu().numpy()
        named = range(1, run.plan.num_classes)
        then = [predict_probs(m.network, image, *window, (), axis) for m in earlier]
        agreements = [measure_agreement(t[0].argmax(0).cpu().numpy(), classes, named) for t in then]
        stability = float(np.mean(agreements))
    return RawPseudoLabel(probs[0].cpu().numpy(), doubt[0, 0].cpu().numpy(), stability)


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


def _take_over_round_0(source: Path, run_dir: Path, first_hash: str) -> None:
    """Copy the models of round 0 of another run, with its lines of the journal."""
    there, here = source / "round_0", run_dir / "round_0"
    if (here / "model" / "done.json").is_file():
        return
    path = there / "model" / "done.json"
    if not path.is_file():
        raise InputError(f"--round-0 {source}: there is no finished round 0 in it")
    if read_json(path)["hash"] != first_hash:
        raise InputError(
            f"--round-0 {source}: its round 0 had other data, network, plan or training settings; "
            "leave the option out, or give both runs the same"
        )
    for folder in (there, *sorted((there / "models").glob("*"))):
        target = here / folder.relative_to(there) / "model"
        shutil.copytree(folder / "model", target, dirs_exist_ok=True)
    journal = Journal(run_dir / "metrics.jsonl")
    journal.cut(0, 0)
    for entry in Journal(source / "metrics.jsonl").read():
        if entry["round"] == 0 and "monitors/gate" not in entry["metrics"]:
            journal.append(0, entry["step"], entry["metrics"])


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
