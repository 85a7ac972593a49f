"""Cross pseudo supervision: two students teach each other.

An example of what the one equation cannot say, and so a class of its own, which a configuration
names: ``objective: medssl.cross_pseudo:CrossPseudo``. Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medssl.config import Config
from medssl.networks.build import SegmentationNetwork
from medssl.objective import Objective, predict_still

OF_EACH = {
    "student": "second",
    "thresholds": "second_thresholds",
    "transport": "second_transport",
}
"""What each student has of its own: that of the first one, and that of the second."""


class CrossPseudo(Objective):
    """The equation twice: for each of two students, with what the other one says as the target.

    The students have the same architecture and weights of their own, and the filter keeps
    statistics of the targets of each; the EMA of the first one is what is delivered. Arguments are
    those of ``Objective``.

    Source: Chen et al. 2021, Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision,
        equations 1 to 4.
    """

    second: SegmentationNetwork

    def __init__(
        self,
        student: SegmentationNetwork,
        config: Config,
        class_names: Sequence[str],
        prior: Tensor | None = None,
        log_potentials: Tensor | None = None,
        flips: Sequence[int] = (),
    ) -> None:
        super().__init__(student, config, class_names, prior, log_potentials, flips)
        for first, second in OF_EACH.items():
            setattr(self, second, copy.deepcopy(getattr(self, first)))
        self.second.apply(draw_weights)
        hook = self.register_load_state_dict_pre_hook
        hook(share_statistics)  # type: ignore[no-untyped-call]  # torch has no types of it

    def forward(
        self,
        labeled: Mapping[str, Tensor] | None,
        unlabeled: Mapping[str, Tensor] | None,
        progress: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the terms of both students, summed by name."""
        first = add_probs(self.student, unlabeled)
        with self.swapped():
            other = super().forward(labeled, first, progress, generator)
            second = add_probs(self.student, unlabeled)
        terms = super().forward(labeled, second, progress, generator)
        return {name: term + other[name] for name, term in terms.items()}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the second student be the one that learns."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange what each student has of its own."""
        for first, second in OF_EACH.items():
            parts = getattr(self, first), getattr(self, second)
            setattr(self, second, parts[0])
            setattr(self, first, parts[1])


def add_probs(
    network: nn.Module, unlabeled: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Return the unlabeled patches with what a student says of their weak view as probs."""
    if unlabeled is None:
        return None
    return {**unlabeled, "probs": predict_still(network, unlabeled["weak"])}


def share_statistics(
    objective: nn.Module, state: dict[str, Any], prefix: str, *unused: object
) -> None:
    """Give both students the statistics of a checkpoint from when they had them together."""
    for first, second in OF_EACH.items():
        begin = f"{prefix}{first}."
        for key in [key for key in state if key.startswith(begin) and first != "student"]:
            state.setdefault(f"{prefix}{second}.{key.removeprefix(begin)}", state[key].clone())


def draw_weights(module: nn.Module) -> None:
    """Draw fresh weights for a layer that has any."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
