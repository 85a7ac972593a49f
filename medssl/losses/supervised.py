"""Losses of logits against a target: cross-entropy, soft Dice, and their sum.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D).

The arguments that the losses share are described in `medssl.losses`.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from medssl.config import IGNORE
from medssl.losses import check_map, mean_over_valid, replace_ignored


def ce(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy in nats, averaged over the valid voxels."""
    log_probs, probs, valid = align(logits, target, valid)
    return _cross_entropy(log_probs, probs, weight, valid)


def dice(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    smooth: float = 1.0,
) -> Tensor:
    """Return 1 - soft Dice, its sums taken over the whole batch, averaged over foreground classes.

    Per class Dice = (2 sum w min(p, q) + s) / (sum w p + sum w q + s). On a class map min(p, q)
    is p q: the usual soft Dice. On soft targets p q would reward a harder p than q (a soft target
    has Dice < 1 with itself); min(p, q) has its optimum, exactly 1, at p = q.

    A class of which the target has nothing gives 1 - s / (sum w p + s), which is 0 for a right
    prediction. With s = 1 voxel, target mass below a voxel (the tail of a teacher's softmax)
    counts as nothing; with 1e-5 a prediction that is right up to 1e-5 voxels would still be
    pushed with full force. Dice is a ratio, so a common factor of all weights cancels, but its
    gradient is bounded: its absolute values over all logits sum to 4 at most, for any weight.

    `weight` enters all three sums; `smooth` is s, in (weighted) voxels.

    Source: Wang et al. 2023, Dice Semimetric Losses (the overlap for soft labels); Isensee et al.
        2021, nnU-Net (sums over the batch, no background), which has s = 1e-5.
    """
    log_probs, probs, valid = align(logits, target, valid)
    return _dice_loss(log_probs, probs, weight, valid, smooth)


def dice_ce(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return `dice` + `ce`."""
    log_probs, probs, valid = align(logits, target, valid)
    overlap = _dice_loss(log_probs, probs, weight, valid, smooth=1.0)
    return overlap + _cross_entropy(log_probs, probs, weight, valid)


def align(logits: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs and target probs in float32 and the valid voxels, ignored ones replaced.

    Returns:
        Log-probs and probs (B, C, I, J, K), the probs one-hot if the target is a class map, and
        the valid voxels, bool (B, 1, I, J, K).
    """
    is_soft = target.is_floating_point()
    num_channels = logits.shape[1] if is_soft else 1
    expected = (logits.shape[0], num_channels, *logits.shape[2:])
    if tuple(target.shape) != expected:
        kind = "probs" if is_soft else "class map"
        is_map = is_soft and target.shape[1:2] == (1,)
        raise ValueError(
            f"target ({kind}) has shape {tuple(target.shape)}, but the logits ask for {expected}"
            + ("; classes are integers: give target.long()" if is_map else "")
        )
    check_map("valid", valid, logits.shape)
    if valid is None:
        valid = torch.ones_like(logits[:, :1], dtype=torch.bool)
    if is_soft:
        probs = replace_ignored(target.detach().float(), valid)
    else:
        valid = valid & (target != IGNORE)
        classes = torch.where(valid, target, 0).long()
        probs = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, classes, 1.0)
    return log_softmax(replace_ignored(logits, valid).float(), dim=1), probs, valid


def _cross_entropy(
    log_probs: Tensor, probs: Tensor, weight: Tensor | None, valid: Tensor
) -> Tensor:
    """Return the mean over valid voxels of -sum q ln p."""
    return mean_over_valid(-(probs * log_probs).sum(dim=1, keepdim=True), weight, valid)


def _dice_loss(
    log_probs: Tensor, target: Tensor, weight: Tensor | None, valid: Tensor, smooth: float
) -> Tensor:
    """Return the mean over foreground classes of 1 - soft Dice of the batch."""
    check_map("weight", weight, log_probs.shape)
    voxels = valid.float() if weight is None else replace_ignored(weight.detach().float(), valid)
    p, q = log_probs[:, 1:].exp(), target[:, 1:]
    axes = [0, *range(2, p.ndim)]
    overlap = (voxels * p.clamp(max=q)).sum(dim=axes)  # minimum would derive by q too
    total = (voxels * (p + q)).sum(dim=axes)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()
