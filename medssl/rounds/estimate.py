"""How long a run will take: a few real steps on made-up scans, before anything is trained.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from medssl.config import Config, InputError, at_round
from medssl.data.cache import CachedCase
from medssl.data.loaders import PatchDataset, UnlabeledCase
from medssl.machine import explain_out_of_memory, read_memory_limit
from medssl.networks.build import NetworkSpec, SegmentationNetwork, build_network
from medssl.objective import Objective, build_loss, load_objective
from medssl.plan import Plan, count_unlabeled, describe_student
from medssl.predict import predict_logits
from medssl.rounds.run import count_models
from medssl.rounds.student import (
    choose_sampling,
    count_label_passes,
    find_patch_flips,
    suggest_smaller,
)
from medssl.runs import Journal, StopFlag
from medssl.train import train_model
from medssl.windows import SLICES

TRIED_STEPS = 4  # at least, of which the last ones are timed
MOST_TRIED = 24
TIMED_STEPS = 2
TRIED_SECONDS = 3.0  # for as long as more steps are tried: of a few a busy machine may slow all
LEAST_BYTES = 250  # of a training step for each voxel of its patches: no network gets by with less


class _TrialStop(StopFlag):
    """Stops after a few steps, of quick ones after a few seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._steps = 0
        self._until = 0.0

    def is_set(self) -> bool:
        """Return whether enough steps have been tried."""
        if not self._steps:
            self._until = time.monotonic() + TRIED_SECONDS
        self._steps += 1
        return self._steps >= TRIED_STEPS and time.monotonic() > self._until


def estimate_run(plan: Plan, config: Config, rounds: int) -> dict[str, float]:
    """Return the plan's estimate with the time that all rounds take, pseudo-labels with them.

    Args:
        plan: The plan.
        config: The configuration.
        rounds: Student rounds; 0 without unlabeled scans.

    Raises:
        InputError: A step needs more memory than there is.
    """
    step = measure_step(plan, config, 0)
    seconds = step * at_round(plan.steps, 0) * count_models(config, 0, rounds)
    if rounds:
        student = measure_step(plan, config, 1)
        first = count_patches(plan, config, 1)
        window = measure_window(plan)
        windows = plan.estimate.get("windows", 0.0)
        for index in range(rounds + 1):
            if index:
                share = count_patches(plan, config, index) / first
                members = count_models(config, index, rounds)
                seconds += student * share * at_round(plan.steps, index) * members
            seconds += window * windows * count_label_passes(config, plan, index, rounds)
    hours = round(seconds / 3600, 3)
    return {**plan.estimate, "step_seconds": round(step, 4), "hours": hours}


def count_patches(plan: Plan, config: Config, index: int) -> int:
    """Return how many patches go through the student in a step, all views counted."""
    if not index:
        return plan.batch
    joint = plan.batch if config.train.schedule == "joint" else 0
    return joint + len(config.views) * count_unlabeled(config, plan.batch, index)


def measure_step(plan: Plan, config: Config, index: int) -> float:
    """Return the seconds of a step of a round: patches, objective, optimizer, as in the training.

    Raises:
        InputError: The step needs more memory than there is.
    """
    size = f"patches of {'x'.join(map(str, plan.patch_size))}"
    whose = " of a student's step" if index else ""
    most = _find_largest_round(plan, config) if index else 0
    count = count_patches(plan, config, most)
    refusal = f"{count} {size}{whose} do not fit the memory; "
    limit = read_memory_limit() if plan.device == "cpu" else math.inf
    need = count * math.prod(plan.patch_size) * LEAST_BYTES
    if need > limit:
        advice = suggest_smaller(config, plan, index, min(0.5, limit / need))
        raise InputError(f"{refusal}{advice} ({limit / 1e9:.1f} GB)")
    refusal += suggest_smaller(config, plan, index)
    with tempfile.TemporaryDirectory() as folder, explain_out_of_memory(refusal):
        return _try_steps(plan, config, index, Path(folder))


def _find_largest_round(plan: Plan, config: Config) -> int:
    """Return the round whose step is the largest."""

    def weigh(index: int) -> int:
        return count_patches(plan, config, index) * max(
            1, sum(describe_student(plan, config, index).filters)
        )

    return max(range(1, config.train.rounds + 1), key=weigh)


def _try_steps(plan: Plan, config: Config, index: int, folder: Path) -> float:
    """Train a few steps in a folder; return the seconds that one takes after the first ones."""
    objective, dataset = make_trial(plan, config, index, folder)
    section = config.train.model_copy(update={"log_every": 1, "checkpoint_every": MOST_TRIED})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_model(
            objective,
            dataset,
            config.model_copy(update={"train": section}),
            plan.model_copy(update={"steps": MOST_TRIED}),
            folder,
            index,
            _TrialStop(folder),
        )
    lines = [entry["metrics"] for entry in Journal(folder / "metrics.jsonl").read()]
    rates = [float(line["monitors/steps_per_second"]) for line in lines]
    return 1.0 / float(np.median(rates[TRIED_STEPS - TIMED_STEPS :]))


def make_trial(
    plan: Plan, config: Config, index: int, folder: Path
) -> tuple[Objective, PatchDataset]:
    """Return objective and patches of a round on made-up scans, which are written to a folder."""
    spec = describe_student(plan, config, index) if index else plan.network
    labeled = [make_case(plan, folder / f"labeled_{number}", number) for number in range(2)]
    unlabeled: list[UnlabeledCase] = []
    if index:
        offline = "previous_round" in config.teacher.source
        for number in range(2):
            place = folder / f"unlabeled_{number}"
            case = make_case(plan, place, number)
            unlabeled.append(UnlabeledCase(case, place if offline else None))
    kind = load_objective(config.objective) if index else Objective
    names = [plan.labels[number] for number in range(plan.num_classes)]
    objective = kind(_build(spec), config, names, flips=find_patch_flips(plan))
    loss = config.losses.pseudo_label
    if index and loss.transition == "held_out":  # measured after round 0
        objective.losses["pseudo_label"] = build_loss(loss, torch.eye(plan.num_classes))
    sampling = choose_sampling(config, plan, index, config.train.seed)
    return objective, PatchDataset(labeled, unlabeled, sampling)


def _build(spec: NetworkSpec) -> SegmentationNetwork:
    """Build a network; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_network(spec)


def make_case(plan: Plan, folder: Path, seed: int) -> CachedCase:
    """Write a made-up scan of noise with a box of each class, its label and a pseudo-label."""
    shape = plan.window.pass_shape
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((len(plan.channels), *shape)).astype(np.float16)
    label = np.zeros(shape, np.uint8)
    for index in range(1, plan.num_classes):
        place = [int(rng.integers(0, max(1, n - n // 4))) for n in shape]
        box = tuple(slice(p, p + max(1, n // 4)) for p, n in zip(place, shape, strict=True))
        label[box] = index
    voxels = {str(i): np.argwhere(label == i).astype(np.int32) for i in range(1, plan.num_classes)}
    one_hot = (np.arange(plan.num_classes)[:, None, None, None] == label[None]) * np.uint8(255)
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", label)
    np.save(folder / "probs.npy", one_hot)
    np.save(folder / "uncertainty.npy", np.zeros(shape, np.float16))
    np.savez(folder / "class_voxels.npz", **voxels)  # type: ignore[arg-type]  # names of arrays
    percentiles = ((-3.0, 0.0, 3.0),) * len(plan.channels)
    where = (shape, np.eye(4), shape, np.eye(4))
    return CachedCase(folder.name, folder, *where, percentiles, folder)


def measure_window(plan: Plan) -> float:
    """Return the seconds of a window at prediction."""
    count = 1 if plan.slice_axis is None else SLICES
    shape = (1, plan.network.in_channels, *plan.window.pass_shape)
    image = torch.zeros(shape, device=plan.device)
    network = _build(plan.network).to(plan.device).eval()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        predict_logits(network, image, plan.window)
        times.append(time.perf_counter() - started)
    return min(times) / count
