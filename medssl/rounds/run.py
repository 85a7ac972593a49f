"""What all stages of a run share: its folder, settings and cases, and what its models say.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.config import IGNORE, Config, at_round
from medssl.data.cache import CachedCase
from medssl.data.pseudo_labels import Classes, measure_agreement
from medssl.metrics import Row, mean_known
from medssl.networks.build import SegmentationNetwork
from medssl.plan import Plan
from medssl.predict import (
    Model,
    ModelInfo,
    Walk,
    average_views,
    bring_boxes,
    load_model,
    predict_probs,
)
from medssl.pseudo.gates import Expectation, expect_from
from medssl.runs import StopFlag
from medssl.train import find_model_folder
from medssl.transforms.geometry import Box, WayBack
from medssl.windows import Window


class StopRequested(Exception):  # noqa: N818  # it is no error
    """The stop flag was set; everything up to here is on disk."""


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

    def count_steps(self, index: int) -> int:
        """Return the steps of a round."""
        return at_round(self.plan.steps, index)

    def find_round_hash(self, index: int) -> str:
        """Return the hash of a round's models: round 0 depends on no setting of students."""
        return self.hash if index else self.first_hash

    def find_round_folder(self, index: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round_{index}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        return tuple(self.plan.labels[index] for index in range(self.plan.num_classes))


def count_members(run: Run, index: int) -> int:
    """Return how many models a round of a run trains."""
    return count_models(run.config, index, run.num_rounds)


def count_models(config: Config, index: int, rounds: int) -> int:
    """Return how many models a round trains; the last round has nobody to teach."""
    return config.teacher.ensemble if index < rounds else 1


def load_members(run: Run, index: int) -> list[Model]:
    """Return the models of a round: one, or an ensemble."""
    members = range(count_members(run, index))
    folders = [find_model_folder(run.folder, index, member) for member in members]
    return [load_model(folder, run.plan.device) for folder in folders]


def bring_slabs(
    run: Run, case: CachedCase, walk: Walk, window: Window, num_views: int = 0
) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    """Yield what a walk says of a case, box by box of the cache grid.

    ``num_views`` are the slabs that the walk holds beside each other; 0 for the mirrorings of its
    window.
    """
    same = WayBack(case.shape, case.affine, case.shape, case.affine)
    num_views = num_views or len(window.mirrorings)
    device = torch.device(run.plan.device)
    return bring_boxes(walk, window, same, run.plan.num_classes, num_views, device)


def find_classes(
    run: Run, case: CachedCase, network: SegmentationNetwork, image: torch.Tensor
) -> Classes:
    """Return the classes (I, J, K) that a network sees in a case, unmirrored."""
    window = run.plan.window.plain
    classes = np.empty(case.shape, np.uint8)
    walk = partial(average_views, network, image, window)
    for box, probs in bring_slabs(run, case, walk, window):
        classes[box] = probs.argmax(0)
    return classes


def predict_members(run: Run, members: Sequence[Model], image: torch.Tensor) -> list[torch.Tensor]:
    """Return the probs (1, num_classes, I, J, K) of each model, averaged over mirrorings."""
    return [predict_probs(model.network, image, run.plan.window) for model in members]


@torch.no_grad()
def measure_validation(run: Run, network: SegmentationNetwork) -> list[Row]:
    """Return ``case_id``, ``dice/<class>`` and ``dice`` of each validation case, None for n/a."""
    network.eval()
    rows: list[Row] = []
    for case in run.val:
        mapped = case.label()
        if mapped is None:
            continue
        label = np.array(mapped)  # of a map that is cut while the scan is segmented we would die
        image = load_image(case, run.plan.device)
        classes = find_classes(run, case, network, image)
        classes[label == IGNORE] = IGNORE
        dice: dict[str, float | None] = {}
        for index, name in enumerate(run.class_names[1:], start=1):
            is_there = bool((label == index).any() or (classes == index).any())
            dice[name] = measure_agreement(classes, label, [index]) if is_there else None
        named = {f"dice/{name}": value for name, value in dice.items()}
        rows.append({"case_id": case.case_id, **named, "dice": mean_known(dice.values())})
    return rows


def average_validation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return val/dice and val/dice/<class>, the means over the cases that have a value."""
    columns = [column for column in (rows[0] if rows else ()) if column.startswith("dice")]
    means = {f"val/{column}": mean_known(row[column] for row in rows) for column in columns}
    return {column: value for column, value in means.items() if value is not None}


def derive_expectation(run: Run) -> Expectation:
    """Return how often and how large each class is in the labeled cases, to judge others by."""
    cases = [case for case in run.labeled if case.label_folder is not None]
    labels = (label for case in cases if (label := case.label()) is not None)
    sizes = (1.0 if case.voxel_ml is None else case.voxel_ml for case in cases)
    return expect_from(labels, run.plan.num_classes, sizes)


def load_image(case: CachedCase, device: str) -> torch.Tensor:
    """Return the image of a case, (1, C, I, J, K) float32."""
    return torch.from_numpy(np.asarray(case.image(), dtype=np.float32))[None].to(device)
