"""Uncertainty of a voxel from several predictions: MC dropout, mirrorings or an ensemble.

Axes: B batch, C classes, I J K voxel axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from medssl.config import InputError, UncertaintySection

LEAST_PROB = 1e-12
_PIECE = 2**24  # probs that are looked at at once


def find_limit(section: UncertaintySection, num_classes: int, rise: float) -> float:
    """Return the uncertainty, in nats, from which on a voxel is refused.

    Args:
        section: Its ``start``, None for no limit.
        num_classes: C, with background.
        rise: Value of the ramp in [0, 1].

    Source: Yu et al. 2019 (UA-MT), section 2.3: from 3/4 ln 2 to ln 2. Departure: to ln C.
    """
    if section.start is None:
        return math.inf
    lowest = section.start * math.log(2)
    return lowest + (math.log(num_classes) - lowest) * rise


def combine(predictions: Iterable[Tensor], source: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean probs, predictive entropy and mutual information of several predictions.

    Args:
        predictions: Probs (B, C, I, J, K) of at least two predictions, read one at a time.
        source: What made them, for the message.

    Returns:
        Mean probs (B, C, I, J, K); entropy of the mean H(p_bar), and the mutual information
        H(p_bar) - mean H(p_t), both (B, 1, I, J, K) in nats.

    Raises:
        InputError: The predictions do not differ at all, so they say nothing about uncertainty.

    Source: Gal 2016, Uncertainty in Deep Learning, equation 3.24.
    """
    mean, entropy, information, spread = combine_slab(predictions)
    refuse_equal(float(spread), source)
    return mean, entropy, information


def refuse_equal(spread: float, source: str) -> None:
    """Refuse predictions that do not differ anywhere.

    Args:
        spread: The largest difference of two of them.
        source: What made them, for the message.

    Raises:
        InputError: They say nothing about uncertainty.
    """
    if spread == 0.0:
        raise InputError(
            f"the predictions of {source} are the same: they tell no uncertainty; set "
            "filter.uncertainty.source=none"
        )


def combine_slab(predictions: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``combine`` does of a part of a scan, and how far its predictions differ."""
    first: Tensor | None = None
    total, total_entropy, spread = torch.zeros(()), torch.zeros(()), torch.zeros(())
    count, planes = 0, 1
    for probs in predictions:
        if first is None:
            first = probs
            total, total_entropy = torch.zeros_like(probs), torch.zeros_like(probs[:, :1])
            spread = probs.new_zeros(())
            planes = max(1, _PIECE // probs[:, :, :1].numel())  # the steps between take no more
        parts = (torch.split(array, planes, 2) for array in (probs, first, total, total_entropy))
        for now, before, sums, entropies in zip(*parts, strict=True):
            spread = torch.maximum(spread, (now - before).abs().max())
            sums += now
            entropies += entropy_of(now)
        count += 1
    mean = total.div_(count)
    entropy = torch.cat([entropy_of(part) for part in torch.split(mean, planes, 2)], 2)
    return mean, entropy, (entropy - total_entropy / count).clamp(min=0.0), spread


def entropy_of(probs: Tensor) -> Tensor:
    """Return the Shannon entropy (B, 1, I, J, K) of probs (B, C, I, J, K), in nats."""
    sums = (probs * probs.clamp(min=LEAST_PROB).log()).sum(1, keepdim=True)
    return sums.neg_().clamp_(min=0.0)  # of probs that round to more than 1
