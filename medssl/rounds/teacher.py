"""The end of a round: its model labels the unlabeled cases, and is judged by what it says.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import torch

from medssl.data.cache import CachedCase
from medssl.data.pseudo_labels import measure_agreement
from medssl.metrics import mean_known
from medssl.predict import (
    Model,
    load_model,
    measure_uncertainty,
    predict_mirrored,
    predict_probs,
    sample_probs,
)
from medssl.pseudo.gates import CaseReview, Gate, judge_model
from medssl.pseudo.label import RawPseudoLabel, label_cases
from medssl.pseudo.uncertainty import combine, entropy_of
from medssl.rounds.run import (
    Run,
    StopRequested,
    average_validation,
    count_members,
    derive_expectation,
    load_image,
    load_members,
    measure_validation,
    predict_members,
)
from medssl.rounds.student import needs_one_pass, needs_stability
from medssl.runs import (
    Journal,
    ModelMark,
    RoundMark,
    hash_file,
    hash_files,
    hash_json,
    is_done,
    read_json,
    seed_from,
    write_json,
    write_state,
)
from medssl.train import find_model_folder


def label_and_judge(run: Run, index: int, teacher: int | None) -> Gate:
    """Pseudo-label the unlabeled cases with the model of a round, and judge it by them."""
    folder = run.find_round_folder(index)
    if is_done(folder, run.hash):
        gate = read_json(folder / "done.json", RoundMark)["gate"]
        return Gate(gate["passed"], tuple(gate["reasons"]))
    if not run.num_rounds:  # nobody reads what a model without students says of all scans
        gate = Gate(True, ("not judged: no student learns from it",))
        _finish_round(run, index, teacher, [], gate)
        return gate
    expectation = derive_expectation(run)
    members = load_members(run, index)
    weights = [
        find_model_folder(run.folder, index, member) / "model" / "weights.safetensors"
        for member in range(len(members))
    ]
    earlier = [
        load_model(folder / "snapshots" / str(part), run.plan.device)
        for part in (1, 2)
        if needs_stability(run, index)
    ]
    before = run.find_round_folder(teacher) / "pseudo_labels" if teacher is not None else None
    reviews = label_cases(
        run.unlabeled,
        lambda case: _label_case(run, index, members, earlier, case),
        folder,
        before,
        hash_json([*(hash_file(path) for path in weights), *_name_way(run, index)]),
        expectation,
        run.plan.labels,
        run.plan.label_values,
        run.config.filter,
        run.stop.is_set,
    )
    if reviews is None:
        raise StopRequested
    model_done = read_json(folder / "model" / "done.json", ModelMark)
    with_student = model_done.get("agreement_with_average")
    gate = judge_model(reviews, expectation, run.plan.labels, with_student)
    _finish_round(run, index, teacher, reviews, gate)
    return gate


def _name_way(run: Run, index: int) -> list[str]:
    """Return what tells apart pseudo-labels that are made in other ways than in 0.1.0."""
    ways = ["one pass"] if needs_one_pass(run.config, index, run.num_rounds) else []
    return ways if run.config.teacher.probs == "clean" else [*ways, run.config.teacher.probs]


def _label_case(
    run: Run, index: int, members: Sequence[Model], earlier: Sequence[Model], case: CachedCase
) -> RawPseudoLabel:
    """Return what the teacher says of a case: one model, or an ensemble.

    The uncertainty is that of MC dropout, mirrorings or the ensemble, or the entropy of the probs.
    The stability is the mean Dice of the class maps of earlier checkpoints with that of the last
    one (Yang et al. 2022, ST++, equation 4).
    """
    image = load_image(case, run.plan.device)
    window = run.plan.window
    if needs_one_pass(run.config, index, run.num_rounds):
        probs = predict_probs(members[0].network, image, window.plain)
        uncertainty = entropy_of(probs)
    elif run.config.teacher.probs == "sampled":
        probs, uncertainty = _sample_label(run, members, case, image)
    else:
        probs, uncertainty = _predict_label(run, members, case, image)
    stability = None
    if earlier:
        classes = probs[0].argmax(0).cpu().numpy()
        named = range(1, run.plan.num_classes)
        then = [predict_probs(m.network, image, window.plain) for m in earlier]
        agreements = [measure_agreement(t[0].argmax(0).cpu().numpy(), classes, named) for t in then]
        stability = float(np.mean(agreements))
    return RawPseudoLabel(probs[0].cpu().numpy(), uncertainty[0, 0].cpu().numpy(), stability)


def _sample_label(
    run: Run, members: Sequence[Model], case: CachedCase, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of MC-dropout passes, each seen from elsewhere, and its uncertainty."""
    section = run.config.filter.uncertainty
    seed = seed_from(run.config.train.seed, case.case_id, "mc_dropout")
    torch.manual_seed(seed)
    draws = sample_probs(
        [model.network for model in members],
        image,
        run.plan.window,
        section.passes,
        np.random.default_rng(seed),
        case.spacing,
    )
    probs, entropy, information = combine(draws, f"MC dropout ({section.passes} passes)")
    return probs, information if section.measure == "mutual_information" else entropy


def _predict_label(
    run: Run, members: Sequence[Model], case: CachedCase, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probs of the un-noised teacher, averaged over mirrorings, and an uncertainty."""
    window = run.plan.window
    section = run.config.filter.uncertainty
    all_probs = predict_members(run, members, image)
    probs = torch.stack(all_probs).mean(0)
    entropy = information = entropy_of(probs)
    if section.source == "mc_dropout":
        torch.manual_seed(seed_from(run.config.train.seed, case.case_id, "mc_dropout"))
        network, passes = members[0].network, section.passes
        entropy, information = measure_uncertainty(network, image, window, passes)
    elif section.source == "ensemble" and len(members) > 1:  # the last round has one
        _, entropy, information = combine(all_probs, "the ensemble")
    elif section.source == "flips":
        turned = predict_mirrored(members[0].network, image, window)
        _, entropy, information = combine(turned, "mirrorings")
    return probs, information if section.measure == "mutual_information" else entropy


def _finish_round(
    run: Run, index: int, teacher: int | None, reviews: Sequence[CaseReview], gate: Gate
) -> None:
    """Write the done mark of a round and its line in the journal."""
    folder = run.find_round_folder(index)
    journal = Journal(run.folder / "metrics.jsonl")
    metrics: dict[str, float] = {"monitors/gate": float(gate.passed)}
    if reviews:
        metrics["monitors/kept_cases"] = float(sum(review.accepted for review in reviews))
        metrics["monitors/uncertainty"] = float(np.mean([r.uncertainty for r in reviews]))
        for name in run.class_names[1:]:
            coverage = mean_known(review.coverage_per_class[name] for review in reviews)
            if coverage is not None:
                metrics[f"monitors/pseudo_coverage/{name}"] = coverage
    agreement = mean_known(review.agreement for review in reviews)
    if agreement is not None:
        metrics["monitors/agreement"] = agreement
    model_done = read_json(folder / "model" / "done.json", ModelMark)
    with_student = model_done.get("agreement_with_average")
    if with_student is not None:
        metrics["monitors/agreement_with_average"] = with_student
    entries = [e for e in journal.read() if e["round"] == index]
    last = [e for e in entries if "losses/total" in e["metrics"]]
    if not any(
        "monitors/gate" in e["metrics"] for e in entries
    ):  # a kill came before the done mark
        journal.append(index, run.count_steps(index), metrics)
    values = {**(last[-1]["metrics"] if last else {}), **metrics}
    rows = measure_validation(run, load_model(folder, run.plan.device).network) if run.val else []
    values |= average_validation(rows)
    content = {
        "hash": run.hash,
        "round": index,
        "teacher": teacher,
        "steps": run.count_steps(index),
        "seconds": _measure_seconds(run, index),
        "gate": {"passed": gate.passed, "reasons": list(gate.reasons)},
        "num_labeled": len(run.labeled),
        "num_unlabeled": model_done["num_kept"],
        "final": values,
        "validation": rows,
        "files": hash_files(folder, "review.csv") if reviews else {},
    }
    write_json(folder / "done.json", content)
    write_state(run.folder, "running", index, run.count_steps(index))
    run.notify()
    if teacher is not None:
        for earlier in range(index):
            if earlier != teacher and gate.passed:
                shutil.rmtree(run.find_round_folder(earlier) / "pseudo_labels", ignore_errors=True)


def _measure_seconds(run: Run, index: int) -> float:
    """Return the seconds that the steps of a round's models took, over all sittings."""
    journals = [run.folder / "metrics.jsonl"]
    journals += [
        find_model_folder(run.folder, index, member) / "metrics.jsonl"
        for member in range(1, count_members(run, index))
    ]
    seconds = 0.0
    for path in journals:
        before = 0
        for entry in Journal(path).read():
            rate = entry["metrics"].get("monitors/steps_per_second")
            if entry["round"] == index and rate:
                seconds += (entry["step"] - before) / rate
                before = entry["step"]
    return round(seconds, 1)
