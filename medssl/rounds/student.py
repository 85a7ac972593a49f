"""A round of training: a student and what it learns from; in round 0, labels alone.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import ranks
from medssl.config import IGNORE, Config, FilterSection, InputError, at_round
from medssl.data.cache import CachedCase
from medssl.data.loaders import PatchDataset, Sampling, UnlabeledCase
from medssl.data.pseudo_labels import draw_probs, is_whole, measure_agreement
from medssl.losses.robust import estimate_transition
from medssl.metrics import mean_known
from medssl.networks.build import SegmentationNetwork, build_network
from medssl.networks.noise import freeze_encoder
from medssl.objective import Objective, build_loss, list_options, load_objective
from medssl.plan import LEAST_FILTERS, Plan, count_unlabeled, describe_student, suggest_patch
from medssl.predict import (
    WEIGHTS,
    Model,
    ModelInfo,
    check_weights,
    count_views,
    load_model,
    save_model,
)
from medssl.pseudo.label import weigh_cases
from medssl.pseudo.thresholds import find_rule
from medssl.pseudo.transport import fit_potentials, shrink_prior, spare_rare
from medssl.rounds.run import (
    Run,
    StopRequested,
    average_validation,
    count_members,
    derive_expectation,
    find_classes,
    load_image,
    load_members,
    measure_validation,
    predict_members,
)
from medssl.run_folder import read_review
from medssl.runs import (
    ModelMark,
    RoundMark,
    find_changed,
    hash_files,
    is_done,
    read_json,
    seed_from,
    write_json,
)
from medssl.train import find_model_folder, train_model

TRANSPORT_STEPS = 500
MOST_CORRECTED = 2.0  # factor by which a class is made larger or smaller
COMPARED = 8  # unlabeled scans on which a student is compared with its average
LEAST_SHARE = 1e-6  # of a class in the prior that pseudo-labels are assigned towards


def check_settings(config: Config, plan: Plan, num_val: int) -> None:
    """Refuse, before anything is trained, what students would fail at.

    Args:
        config: The resolved configuration.
        plan: What it was resolved with.
        num_val: Number of validation cases.

    Raises:
        InputError: A setting that does not fit the plan, or names no objective.
    """
    if not config.train.rounds:
        return
    load_objective(config.objective)
    if config.filter.uncertainty.source == "flips" and not plan.flips:
        raise InputError(
            "filter.uncertainty.source=flips: this plan mirrors along no axis (plan.flips=[]), so "
            "there is one prediction only; take mc_dropout, ensemble or none"
        )
    _check_draw(config.filter)
    _check_patches(config, plan)
    tuning, section = config.train.fine_tune, config.losses.pseudo_label
    if tuning.share:
        freeze_encoder(build_network(plan.network), tuning.frozen_levels)
    known = list_options(section.name)
    for option in section.options:
        if option not in known:
            has = ", ".join(f"{key}={value}" for key, value in known.items()) or "none"
            raise InputError(
                f"losses.pseudo_label.options: {section.name} has no option {option}; it has {has}"
            )
    is_measured = section.transition == "held_out"
    if is_measured and not num_val:
        raise InputError(
            "losses.pseudo_label.transition=held_out is measured on labeled cases that are not "
            "trained on, and there are none; set validation=1 or more, which count as labeled"
        )
    logits = torch.zeros(1, plan.num_classes, 2, 2, 2)
    try:
        loss = build_loss(section, torch.eye(plan.num_classes) if is_measured else None)
        loss(logits, torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8))
    except (ValueError, TypeError) as error:
        raise InputError(f"losses.pseudo_label: {error}") from error


def _check_draw(section: FilterSection) -> None:
    """Refuse draws of cases by a coverage that all of them have."""
    is_bounded = find_rule(section.threshold.name).find_lowest is not None
    if section.case.draw == "coverage" and not (is_bounded or section.uncertainty.is_limited):
        raise InputError(
            "filter.case.draw=coverage draws by the share of accepted voxels, but with "
            f"filter.threshold.name={section.threshold.name} and no limit of uncertainty all cases "
            "have the same; set filter.threshold={name: fixed, start: 0.8}, or "
            "filter.case.draw=uniform"
        )


def _check_patches(config: Config, plan: Plan) -> None:
    """Refuse steps that have too few patches to mix, and students that never see a label."""
    later = range(1, config.train.rounds + 1)
    alone = config.train.schedule == "pretrain"
    if not _has_enough(config, plan.batch):
        raise InputError(
            f"noise.mixing={config.noise.mixing} mixes unlabeled patches, and a step has one; set "
            "train.batch=2 or train.unlabeled_ratio=2"
        )
    share = config.train.fine_tune.share
    for index in later:
        steps = at_round(plan.steps, index)
        if alone and round(steps * (1 - share)) >= steps:
            raise InputError(
                f"train.fine_tune.share={share:g} of the {steps} steps of round {index} is "
                "none, and with train.schedule=pretrain labels are seen in the fine-tune only; set "
                f"train.fine_tune.share={max(0.2, 1 / steps):g} or give more steps"
            )


def _has_enough(config: Config, batch: int) -> bool:
    """Return whether every student step of so many labeled patches has unlabeled ones to mix."""
    alone = config.train.schedule == "pretrain"  # without labeled patches to mix with
    mixing = config.noise.mixing
    if mixing != "cutmix" and not (alone and mixing != "none"):
        return True
    later = range(1, config.train.rounds + 1)
    return all(count_unlabeled(config, batch, index) > 1 for index in later)


def suggest_smaller(config: Config, plan: Plan, index: int, share: float = 0.5) -> str:
    """Return settings that are accepted in place of those of a plan, and take less memory.

    Args:
        config: The configuration.
        plan: Its plan.
        index: The round whose steps are too large.
        share: Of their voxels that may stay.

    Returns:
        Alternatives, the best one first: ``set plan.patch_size=[32,40,32], or train.batch=2``.
    """
    ways = []
    size = suggest_patch(plan, config, share)
    if size is not None:
        steps = [step for step in plan.preprocessing.spacing if step is not None]
        spacing = f" plan.spacing={_write_list(steps)}" if plan.has_spacing else ""
        ways.append(f"plan.patch_size={_write_list(size)}{spacing}")
    wanted = max(1, int(plan.batch * share))
    batch = next(n for n in range(wanted, plan.batch + 1) if _has_enough(config, n))
    if batch < plan.batch:
        ways.append(f"train.batch={batch}")
    ratios = config.train.unlabeled_ratio
    most = max(ratios) if isinstance(ratios, tuple) else ratios
    even = config.train.model_copy(update={"unlabeled_ratio": 1.0})
    if index and most > 1 and _has_enough(config.model_copy(update={"train": even}), plan.batch):
        ways.append("train.unlabeled_ratio=1")
    width = config.network.width
    if not size and isinstance(width, float) and plan.network.filters[:1] > (LEAST_FILTERS,):
        ways.append(f"network.width={width / 2:g}")
    return f"set {', or '.join(ways)}" if ways else "use a machine with more memory"


def _write_list(values: Sequence[float]) -> str:
    """Return numbers as a list of the command line, without spaces."""
    return f"[{','.join(f'{value:g}' for value in values)}]"


def train_round(run: Run, index: int, teacher: int | None) -> None:
    """Train the models of a round: one, or an ensemble if another round follows."""
    members = ranks.share(
        lambda: [m for m in range(count_members(run, index)) if not _is_trained(run, index, m)]
    )
    cases = [] if teacher is None or not members else _choose_cases(run, index, teacher)
    for member in members:
        name = f"round {index}" + (f", model {member + 1} of the ensemble" if member else "")
        if teacher is None:
            text = f"{len(run.labeled)} labeled cases alone, the honest baseline"
        else:
            text = f"a student learns from {len(run.labeled)} labeled and {len(cases)} "
            text += f"pseudo-labeled cases of round {teacher}"
        print(f"{name}: {text}")
        _train_model(run, index, member, teacher, cases)


def _is_trained(run: Run, index: int, member: int) -> bool:
    """Return whether a model of a round is done, and as it was when it was.

    Raises:
        InputError: It has changed since, or it is of another configuration.
    """
    folder = find_model_folder(run.folder, index, member) / "model"
    if not is_done(folder, run.find_round_hash(index)):
        return False
    changed = find_changed(folder, read_json(folder / "done.json", ModelMark))
    if changed:
        raise InputError(
            f"{', '.join(map(str, changed))}: changed or removed since round {index} was trained; "
            f"restore it, or delete {folder}: the same command makes it anew from its "
            "checkpoint"
        )
    check_weights(folder)
    return True


def _train_model(
    run: Run, index: int, member: int, teacher: int | None, cases: Sequence[UnlabeledCase]
) -> None:
    """Train one model of a round, and write its model folder."""
    config, folder = run.config, find_model_folder(run.folder, index, member)
    section = config.losses.pseudo_label
    planned = run.count_steps(index)
    seed = seed_from(config.train.seed, "member", member) if member else config.train.seed
    spec = describe_student(run.plan, config, index) if cases else run.plan.network
    torch.manual_seed(seed_from(seed, index, "weights"))
    network = build_network(spec, download=True)
    if cases and config.train.start == "warm" and teacher is not None:
        _start_warm(network, load_model(run.find_round_folder(teacher)))
    patches = PatchDataset(run.labeled, cases, choose_sampling(config, run.plan, index, seed))
    objective = _build_objective(run, network, patches, teacher)
    if cases and config.train.start == "warm" and config.teacher.source != ("previous_round",):
        objective.keep_average()
    if teacher is not None and cases and section.transition == "held_out":
        objective.losses["pseudo_label"] = build_loss(
            section, _measure_transition(run, teacher, objective)
        )
    info = run.info.model_copy(update={"network": spec})
    thirds = {
        max(1, planned * part // 3): functools.partial(
            _save_snapshot, folder / "snapshots" / str(part), objective, info
        )
        for part in (1, 2)
        if not member and ranks.is_first()
    }
    steps = train_model(
        objective,
        patches,
        config,
        run.plan,
        run.folder,
        index,
        run.stop,
        validate=(lambda: measure_dice(run, objective.predictor))
        if run.val and not member and ranks.is_first()
        else None,
        on_checkpoint=run.notify,
        member=member,
        snapshots=thirds,
    )
    if ranks.is_first():
        provenance = {**run.info.provenance, "round": index, "steps": steps}
        info = info.model_copy(update={"provenance": provenance})
        save_model(folder / "model", objective.predictor.eval(), info)
    if steps < planned:
        raise StopRequested
    if ranks.is_first():
        _mark_trained(run, index, member, objective, cases)


def _mark_trained(
    run: Run, index: int, member: int, objective: Objective, cases: Sequence[UnlabeledCase]
) -> None:
    """Write the done mark of a model."""
    folder = find_model_folder(run.folder, index, member)
    done: dict[str, Any] = {
        "hash": run.find_round_hash(index),
        "round": index,
        "steps": run.count_steps(index),
        "num_kept": len(cases),
        "files": hash_files(folder / "model", "model.json", WEIGHTS),
    }
    if cases:
        done["agreement_with_average"] = _compare_with_average(run, objective, cases)
    write_json(folder / "model" / "done.json", done)


@torch.no_grad()
def _compare_with_average(
    run: Run, objective: Objective, cases: Sequence[UnlabeledCase]
) -> float | None:
    """Return the mean Dice of the class maps of student and average on a few unlabeled scans.

    A student that ran away from its average was still changing when its round ended.
    """
    objective.eval()
    chosen = [cases[place].cached for place in np.linspace(0, len(cases) - 1, COMPARED).astype(int)]
    agreements: list[float | None] = []
    for case in {case.case_id: case for case in chosen}.values():
        image = load_image(case, run.plan.device)
        maps = [
            find_classes(run, case, network, image)
            for network in (objective.student, objective.predictor)
        ]
        both = measure_agreement(maps[0], maps[1], range(1, run.plan.num_classes))
        agreements.append(both if maps[0].any() or maps[1].any() else None)
    return mean_known(agreements)


def _start_warm(network: SegmentationNetwork, teacher: Model) -> None:
    """Give a student the weights of its teacher."""
    pairs = zip(network.state_dict().values(), teacher.network.state_dict().values(), strict=True)
    for target, source in pairs:  # by place: noise between the layers changes their names
        target.copy_(source)


def _save_snapshot(folder: Path, objective: Objective, info: ModelInfo) -> None:
    """Write the predictor as it is in the middle of a training."""
    save_model(folder, objective.predictor, info)


def needs_one_pass(config: Config, index: int, rounds: int) -> bool:
    """Return whether only the gate reads the pseudo-labels of a round: one pass is enough.

    So it is before the last round of methods whose targets are made online.
    """
    return "previous_round" not in config.teacher.source and index < rounds


def count_label_passes(config: Config, plan: Plan, index: int, rounds: int) -> int:
    """Return how often each scan is predicted to pseudo-label it after a round."""
    section = config.filter.uncertainty
    if needs_one_pass(config, index, rounds):
        return 1
    if config.teacher.probs == "sampled":
        return section.passes
    mirrored: int = 2 ** len(plan.flips)
    sampled = count_views(section.passes, section.fidelity)
    extra = {"mc_dropout": sampled, "flips": mirrored}.get(section.source, 0)
    return config.teacher.ensemble * mirrored + extra


def needs_stability(run: Run, index: int) -> bool:
    """Return whether this round may teach one that learns from its stable cases only.

    That is the next one, or a later one if those between do not pass their gates.
    """
    later = range(index, run.num_rounds)
    return any(at_round(run.config.filter.case.stable, entry) < 1.0 for entry in later)


def _build_objective(
    run: Run, network: SegmentationNetwork, patches: PatchDataset, teacher: int | None
) -> Objective:
    """Return the objective of a round: round 0 has the built-in one, whatever is named."""
    cases = patches.unlabeled
    kind = load_objective(run.config.objective) if cases else Objective
    flips = find_patch_flips(run.plan)
    if run.config.target.assignment != "transport" or not cases:
        return kind(network, run.config, run.class_names, flips=flips)
    section = run.config.target.transport
    folders = [case.folder for case in cases if case.folder is not None]
    if not folders or teacher is None:
        prior = complete_shares(patches.measure_shares(run.plan.num_classes)[1:])
        return kind(network, run.config, run.class_names, prior, flips=flips)
    shares = derive_expectation(run).share
    labeled = complete_shares([shares[i] for i in range(1, run.plan.num_classes)])
    pool = draw_probs(folders)
    counts = torch.bincount(pool.max(1).indices, minlength=run.plan.num_classes)
    prior = shrink_prior(labeled, pool.mean(0), section.shrink)
    if section.prior == "calibrated":
        pool_shares = counts / len(pool)
        ratio = torch.ones_like(labeled)
        if teacher == 0:  # a student's volumes in cases that it saw twice say little of the pool
            ratio = labeled / _measure_shares(run, teacher)
        prior = complete_shares((pool_shares * ratio.clamp(1 / MOST_CORRECTED, MOST_CORRECTED))[1:])
    potentials = fit_potentials(pool, prior, section.epsilon, section.rho, TRANSPORT_STEPS)
    potentials = spare_rare(potentials, counts)
    return kind(network, run.config, run.class_names, prior, potentials, flips)


def find_patch_flips(plan: Plan) -> tuple[int, ...]:
    """Return the axes of a patch that may be mirrored: those of the volume, less the slices'."""
    axes = [axis for axis in range(3) if axis != plan.slice_axis]
    return tuple(place for place, axis in enumerate(axes) if axis in plan.flips)


def complete_shares(foreground: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Return the shares of all classes, given those of the foreground; none is zero."""
    shares = torch.as_tensor(foreground, dtype=torch.float32).clamp(min=LEAST_SHARE)
    whole = torch.cat([(1 - shares.sum()).clamp(min=LEAST_SHARE)[None], shares])
    return whole / whole.sum()


def _measure_shares(run: Run, teacher: int) -> torch.Tensor:
    """Return the mean share of each class in what a teacher says of the annotated voxels."""
    shares = []
    for case, probs in zip(run.labeled, _predict_cases(run, teacher, run.labeled), strict=True):
        annotated = torch.from_numpy(np.asarray(case.label()) != IGNORE)
        classes = probs[0].max(0).indices[annotated]
        counts = torch.bincount(classes, minlength=run.plan.num_classes)
        if len(classes):
            shares.append(counts / counts.sum())
    return complete_shares(torch.stack(shares).mean(0)[1:])


def _measure_transition(run: Run, teacher: int, objective: Objective) -> torch.Tensor:
    """Return what the targets that a teacher gives say of each class, on the validation cases."""
    labels = (torch.from_numpy(np.array(case.label()))[None] for case in run.val)
    targets = (
        objective.read_target(objective.assign(probs))[0]
        for probs in _predict_cases(run, teacher, run.val)
    )
    return estimate_transition(targets, labels, run.plan.num_classes)


def _predict_cases(run: Run, teacher: int, cases: Sequence[CachedCase]) -> Iterator[torch.Tensor]:
    """Yield the mean probs (1, num_classes, I, J, K) of a teacher's models for each case."""
    members = load_members(run, teacher)
    for case in cases:
        all_probs = predict_members(run, members, load_image(case, run.plan.device))
        yield torch.stack(all_probs).mean(0).cpu()


def _choose_cases(run: Run, index: int, teacher: int) -> list[UnlabeledCase]:
    """Return the pseudo-labeled cases that the student of a round learns from."""
    source, section = run.find_round_folder(teacher), run.config.filter.case
    offline = "previous_round" in run.config.teacher.source
    rows = {row["case_id"]: row for row in read_review(source / "review.csv")}
    accepted = [row for row in rows.values() if row["accepted"] == "1"]
    changed = find_changed(source, read_json(source / "done.json", RoundMark))
    if rows.keys() != {case.case_id for case in run.unlabeled}:
        changed = [source / "review.csv"]
    for case in run.unlabeled if offline else ():
        folder = source / "pseudo_labels" / case.case_id
        if case.case_id in rows and not is_whole(folder, (run.plan.num_classes, *case.shape)):
            changed.append(folder)
    if changed:
        raise InputError(
            f"{', '.join(map(str, changed))}: changed or removed since round {teacher} "
            f"labeled its cases; restore it, or delete {source / 'done.json'}: the same command "
            "then labels anew what is damaged"
        )
    share = at_round(section.stable, index - 1)
    if share < 1.0:
        accepted.sort(key=lambda row: (-float(row["stability"]), row["case_id"]))
        accepted = accepted[: max(1, round(share * len(accepted)))]
    weights = weigh_cases(accepted, section, run.class_names[1:])
    return [
        UnlabeledCase(
            case,
            source / "pseudo_labels" / case.case_id if offline else None,
            weights[case.case_id],
        )
        for case in run.unlabeled
        if case.case_id in weights
    ]


def choose_sampling(config: Config, plan: Plan, index: int, seed: int) -> Sampling:
    """Return what decides the patches of a round."""
    train_section, noise = config.train, config.noise
    tuned = train_section.fine_tune.share if index else 0.0
    steps = at_round(plan.steps, index)
    return Sampling(
        seed=seed,
        round_index=index,
        patch_size=plan.patch_size,
        batch=plan.batch,
        num_unlabeled=count_unlabeled(config, plan.batch, max(1, index)),
        foreground=train_section.foreground,
        strong=noise.strong,
        flips=plan.flips,
        views=config.views,
        randaugment=noise.randaugment,
        fine_tune_from=round(steps * (1 - tuned)) if tuned else None,
        pretrain=train_section.schedule == "pretrain",
        slice_axis=plan.slice_axis,
    )


def measure_dice(run: Run, network: SegmentationNetwork) -> dict[str, float]:
    """Return val/dice of the validation cases on the cache grid."""
    return average_validation(measure_validation(run, network))
