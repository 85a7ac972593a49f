"""The end of a round: its model labels the unlabeled cases, and is judged by what it says.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl import ranks
from medssl.data.cache import CachedCase
from medssl.data.pseudo_labels import Classes, Part, measure_agreement
from medssl.metrics import mean_known
from medssl.networks.build import SegmentationNetwork
from medssl.predict import (
    SAMPLERS,
    Model,
    Walk,
    average_views,
    count_views,
    load_model,
    mirror_views,
    sample_probs,
)
from medssl.pseudo.gates import CaseReview, Gate, judge_model
from medssl.pseudo.label import RawPseudoLabel, label_cases
from medssl.pseudo.uncertainty import combine_slab, entropy_of, refuse_equal
from medssl.rounds.run import (
    Run,
    StopRequested,
    average_validation,
    bring_slabs,
    count_members,
    derive_expectation,
    find_classes,
    load_image,
    load_members,
    measure_validation,
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
from medssl.transforms.geometry import Box
from medssl.transforms.spatial import draw_turn
from medssl.windows import Window, align_slabs


def label_and_judge(run: Run, index: int, teacher: int | None) -> Gate:
    """Pseudo-label the unlabeled cases with the model of a round, and judge it by them."""
    folder = run.find_round_folder(index)
    if ranks.share(lambda: is_done(folder, run.hash)):
        gate = read_json(folder / "done.json", RoundMark)["gate"]
        return Gate(gate["passed"], tuple(gate["reasons"]))
    if not run.num_rounds:  # nobody reads what a model without students says of all scans
        gate = Gate(True, ("not judged: no student learns from it",))
        if ranks.is_first():
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
    if ranks.is_first():
        _finish_round(run, index, teacher, reviews, gate)
    return gate


def _name_way(run: Run, index: int) -> list[str]:
    """Return what tells apart pseudo-labels that are made in other ways than in 0.1.0."""
    ways = ["one pass"] if needs_one_pass(run.config, index, run.num_rounds) else []
    return ways if run.config.teacher.probs == "clean" else [*ways, "sampled by windows"]


def _label_case(
    run: Run, index: int, members: Sequence[Model], earlier: Sequence[Model], case: CachedCase
) -> RawPseudoLabel:
    """Return what the teacher says of a case: one model, or an ensemble.

    The uncertainty is that of MC dropout, mirrorings or the ensemble, or the entropy of the probs.
    The stability is the mean Dice of the class maps of earlier checkpoints with that of the last
    one (Yang et al. 2022, ST++, equation 4).
    """
    image = load_image(case, run.plan.device)
    if needs_one_pass(run.config, index, run.num_rounds):
        window = run.plan.window.plain
        walk = partial(average_with_entropy, members[0], image, window)
        parts = _walk_scan(run, case, walk, window)
    elif run.config.teacher.probs == "sampled":
        parts = _sample_label(run, members, case, image)
    else:
        parts = _predict_label(run, members, case, image)

    def measure_stability(classes: Classes) -> float | None:
        named = range(1, run.plan.num_classes)
        maps = (find_classes(run, case, model.network, image) for model in earlier)
        agreements = [measure_agreement(then, classes, named) for then in maps]
        return float(np.mean(agreements)) if agreements else None

    return RawPseudoLabel(parts, measure_stability)


def _walk_scan(
    run: Run, case: CachedCase, walk: Walk, window: Window, num_views: int = 0
) -> Iterator[Part]:
    """Yield the parts of a pseudo-label of a walk over its probs and, last, its uncertainty."""
    for box, values in bring_slabs(run, case, walk, window, num_views):
        yield box, values[:-1], values[-1]


def average_with_entropy(model: Model, image: Tensor, window: Window, box: Box) -> Iterator[Tensor]:
    """Yield slabs (num_classes + 1, I, J, K): the probs of one model, and their entropy.

    The arguments are those of `medssl.predict.average_views`.
    """
    for probs in average_views(model.network, image, window, box):
        yield torch.cat([probs, entropy_of(probs[None])[0]])


def average_passes(
    networks: Sequence[SegmentationNetwork],
    image: Tensor,
    window: Window,
    turns: Sequence[NDArray[np.float64]],
    is_mutual: bool,
    box: Box,
) -> Iterator[Tensor]:
    """Yield slabs (num_classes + 1, I, J, K): the mean of passes, and their uncertainty in nats.

    The arguments are those of `medssl.predict.sample_probs`; ``is_mutual`` takes the mutual
    information, else the predictive entropy.

    Raises:
        InputError: The passes do not differ.
    """
    spread = 0.0
    for slabs in sample_probs(networks, image, window, turns, box):
        mean, entropy, information, differ = combine_slab(slab[None] for slab in slabs)
        spread = max(spread, float(differ))
        yield torch.cat([mean[0], (information if is_mutual else entropy)[0]])
    refuse_equal(spread, f"MC dropout ({1 + len(turns)} passes)")


def _sample_label(
    run: Run, members: Sequence[Model], case: CachedCase, image: torch.Tensor
) -> Iterator[Part]:
    """Yield the mean of MC-dropout passes, each seen from elsewhere, and its uncertainty."""
    window, section = run.plan.window, run.config.filter.uncertainty
    seed = seed_from(run.config.train.seed, case.case_id, "mc_dropout")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    view = (window.flips, window.slice_axis, case.spacing)
    turns = [draw_turn(rng, *view) for _ in range(section.passes - 1)]
    networks = [model.network for model in members]
    is_mutual = section.measure == "mutual_information"
    walk = partial(average_passes, networks, image, window, turns, is_mutual)
    return _walk_scan(run, case, walk, window, section.passes)


def _predict_label(
    run: Run, members: Sequence[Model], case: CachedCase, image: torch.Tensor
) -> Iterator[Part]:
    """Yield the probs of the un-noised teacher, averaged over mirrorings, and an uncertainty."""
    window, section = run.plan.window, run.config.filter.uncertainty
    is_mutual = section.measure == "mutual_information"
    of_members = "the ensemble" if len(members) > 1 else ""  # the last round has one
    compared = {"flips": "mirrorings", "ensemble": of_members}.get(section.source, "")
    spread = 0.0

    def walk(box: Box) -> Iterator[Tensor]:
        nonlocal spread
        views = [average_views(model.network, image, window, box) for model in members]
        if section.source == "flips":
            views += mirror_views(members[0].network, image, window, box)
        for slabs in align_slabs(views, window.find_axis(case.shape)):
            probs = torch.stack(slabs[: len(members)]).mean(0)
            uncertainty = entropy_of(probs[None])
            if compared:
                several = slabs[len(members) :] or slabs
                _, entropy, information, differ = combine_slab(slab[None] for slab in several)
                spread = max(spread, float(differ))
                uncertainty = information if is_mutual else entropy
            yield torch.cat([probs, uncertainty[0]])

    num_views = (len(members) + (section.source == "flips")) * len(window.mirrorings)
    is_later = section.source == "mc_dropout"
    for box, probs, uncertainty in _walk_scan(run, case, walk, window, num_views):
        yield box, probs, None if is_later else uncertainty
    if compared:
        refuse_equal(spread, compared)
    if is_later:
        torch.manual_seed(seed_from(run.config.train.seed, case.case_id, "mc_dropout"))
        network, passes = members[0].network, section.passes
        sample = partial(SAMPLERS[section.fidelity], network, image, window, passes)
        num_views = count_views(passes, section.fidelity)
        for box, maps in bring_slabs(run, case, sample, window, num_views):
            yield box, None, maps[int(is_mutual)]


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
