"""Losses that tolerate wrong targets, and the estimate of how a teacher goes wrong.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D).

The arguments that the losses share are described in `medssl.losses`. Throughout, y is the target
(one-hot for a class map) and p = softmax(logits).

A loss whose sum over all C class targets does not depend on p is called symmetric. Its minimizer
stays the same if a fraction of the targets under (C - 1) / C is replaced by the other classes,
evenly: `mae` and the reverse part of `symmetric_ce` are symmetric, and give a hard voxel little
gradient for that reason. `generalized_ce` lies between cross-entropy and `mae`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from medssl.config import IGNORE, InputError
from medssl.losses import mean_over_valid
from medssl.losses.supervised import align

_ROUNDING = 1e-4  # by which the sum of a transition matrix's row may miss 1


def mae(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return ``sum |p - y|``, in [0, 2], averaged over the valid voxels.

    On a class map it is 2 (1 - p_y), and its sum over the C class targets is 2 (C - 1).

    Source: Ghosh, Kumar and Sastry 2017 (class maps).
    """
    log_probs, y, valid = align(logits, target, valid)
    return mean_over_valid((log_probs.exp() - y).abs().sum(dim=1, keepdim=True), weight, valid)


def generalized_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    q: float = 0.7,
) -> Tensor:
    """Return sum y (1 - p^q) / q, in [0, 1 / q], averaged over the valid voxels.

    q -> 0 is the cross-entropy in nats; q = 1 is 1 - p_y, half of `mae` on a class map. The
    gradient is that of the cross-entropy times p_y^q.

    q is in (0, 1]; the larger, the more tolerant and the slower to learn.

    Raises:
        ValueError: q is out of range.

    Source: Zhang and Sabuncu 2018, eq. 6. Departure: on probs, the mean over classes drawn from
        them.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q is {q}, but a generalized cross-entropy has q in (0, 1]")
    log_probs, y, valid = align(logits, target, valid)
    values = -torch.expm1(q * log_probs) / q
    return mean_over_valid((y * values).sum(dim=1, keepdim=True), weight, valid)


def symmetric_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    log_zero: float = -4.0,
) -> Tensor:
    """Return alpha * cross-entropy + beta * reverse cross-entropy, averaged over the valid voxels.

    The reverse one is -sum p ln y with ln 0 := A. On a class map it is -A (1 - p_y), and its sum
    over the C class targets is -A (C - 1).

    `alpha` weighs the cross-entropy, which learns fast, `beta` the reverse one, which tolerates
    noise; `log_zero` is A, in nats, below 0.

    Raises:
        ValueError: alpha or beta is negative, or log_zero is not below 0.

    Source: Wang et al. 2019, Symmetric Cross Entropy. Departure: on probs, every ln y below A is A,
        so that the loss does not jump where y becomes 0.
    """
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha is {alpha} and beta {beta}, but weights are not negative")
    if not log_zero < 0:
        raise ValueError(f"log_zero is {log_zero}, but it stands for ln 0 and lies below 0")
    log_probs, y, valid = align(logits, target, valid)
    reverse = log_probs.exp() * y.log().clamp(min=log_zero)
    values = -(alpha * y * log_probs + beta * reverse).sum(dim=1, keepdim=True)
    return mean_over_valid(values, weight, valid)


def bootstrapped_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    beta: float = 0.8,
    kind: str = "hard",
) -> Tensor:
    """Return the cross-entropy with beta y + (1 - beta) z, averaged over the valid voxels.

    z is what the student says itself: `hard` takes the class it favors, `soft` its probs p. As in
    the paper, a gradient flows through the soft z: the loss is beta * cross-entropy +
    (1 - beta) * Shannon entropy of p, and it makes the student certain. With that gradient
    stopped, the second part would have none at all.

    `beta`, the share of the target, is in [0, 1]: 0.8 for hard and 0.95 for soft in the paper.

    Raises:
        ValueError: beta is out of range, or the kind is unknown.

    Source: Reed et al. 2015, Training Deep Neural Networks on Noisy Labels with Bootstrapping.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, but the share of the target is in [0, 1]")
    if kind not in ("hard", "soft"):
        raise ValueError(f"bootstrapping {kind!r} is unknown; there are 'hard' and 'soft'")
    log_probs, y, valid = align(logits, target, valid)
    if kind == "soft":
        student = log_probs.exp()
    else:
        student = torch.zeros_like(y).scatter_(1, log_probs.max(dim=1, keepdim=True).indices, 1.0)
    mixed = beta * y + (1 - beta) * student
    return mean_over_valid(-(mixed * log_probs).sum(dim=1, keepdim=True), weight, valid)


def forward_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    transition: Tensor,
) -> Tensor:
    """Return the cross-entropy of the target with T' p, averaged over the valid voxels.

    With the true T, the minimizer over noisy targets is the clean posterior; with another T it is
    biased. So T is estimated on cases that the teacher did not train on (`estimate_transition`):
    on its own training cases a teacher looks perfect. Takes memory for C^2 values a voxel.

    `transition` is T (C, C), T[i, j] the probability of target j where the truth is i.

    Raises:
        ValueError: The transition is no matrix of probabilities whose rows sum to 1 and whose
            columns are not 0.

    Source: Patrini et al. 2017, Theorem 2.
    """
    check_transition(transition, logits.shape[1])
    log_probs, y, valid = align(logits, target, valid)
    log_transition = transition.detach().to(log_probs, non_blocking=True).log()
    # Class by class from logarithms: T' p itself underflows where T has zeros.
    noisy = [
        torch.logsumexp(log_probs + column.view(1, -1, *[1] * (logits.ndim - 2)), dim=1)
        for column in log_transition.unbind(dim=1)
    ]
    return mean_over_valid(-(y * torch.stack(noisy, dim=1)).sum(dim=1, keepdim=True), weight, valid)


def estimate_transition(
    predictions: Iterable[Tensor],
    labels: Iterable[Tensor],
    num_classes: int,
    smoothing: float = 1.0,
) -> Tensor:
    """Return the transition matrix (C, C) of a teacher, float32, for `forward_ce`.

    T[i, j] is the mean over the voxels of label i of what the teacher says of class j: its share
    of voxels for class maps, its mean prob for probs. Give what the student will be given, class
    maps for hard targets and probs for soft ones. The cases have to be HELD OUT of that teacher's
    training: this function cannot see whether they are, and on training cases T comes out close
    to the identity.

    Args:
        predictions: For each case its classes (1, I, J, K), 255 = ignore, or its probs
            (C, I, J, K). A tensor (B, 1, I, J, K) or (B, C, I, J, K) is B cases.
        labels: For each case its label (1, I, J, K), 255 = ignore.
        num_classes: C, with background.
        smoothing: Added to each of the C^2 entries, in voxels, above 0: no class then is
            impossible.

    Raises:
        ValueError: The cases differ in number or shape, a class is not below num_classes, a prob
            is negative or not finite, or smoothing is not above 0.
        InputError: A class has no voxel in the labels.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing is {smoothing}, but it is above 0 (in voxels)")
    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for prediction, label in zip(predictions, labels, strict=True):
        counts += _count_confusions(prediction.detach().cpu(), label.detach().cpu(), num_classes)
    missing = (counts.sum(dim=1) == 0).nonzero().flatten().tolist()
    if missing:
        raise InputError(
            f"the held-out labels have no voxel of class {', '.join(map(str, missing))}, so what "
            "the teacher makes of it is unknown; hold out more labeled cases, or choose a loss "
            "without a transition matrix"
        )
    counts += smoothing
    return (counts / counts.sum(dim=1, keepdim=True)).float()


def _count_confusions(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Return (C, C) in voxels: what one case's prediction says where its label is i."""
    is_soft = prediction.is_floating_point()
    expected = (num_classes if is_soft else 1, *label.shape[1:])
    if label.shape[0] != 1 or tuple(prediction.shape) != expected:
        raise ValueError(
            f"a label of shape {tuple(label.shape)} goes with a prediction of "
            f"{tuple(prediction.shape)}, but one is (1, I, J, K) and the other "
            f"({'C' if is_soft else '1'}, I, J, K), where C is {num_classes}"
        )
    counted = label[0] != IGNORE
    if not is_soft:
        counted = counted & (prediction[0] != IGNORE)
    true, predicted = label[0][counted].long(), prediction[:, counted]
    for name, classes in (("label", true), ("prediction", true if is_soft else predicted)):
        if ((classes < 0) | (classes >= num_classes)).any():
            top = num_classes - 1
            raise ValueError(f"a {name} has classes outside 0 to {top} (and {IGNORE} = ignore)")
    if not is_soft:
        pairs = true * num_classes + predicted[0].long()
        counts = torch.bincount(pairs, minlength=num_classes**2)
        return counts.view(num_classes, num_classes).double()
    if not (predicted.isfinite() & (predicted >= 0)).all():
        raise ValueError("a prediction has probs that are negative or not finite")
    sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    return sums.index_add_(0, true, predicted.T.double())


def check_transition(transition: Tensor, num_classes: int) -> None:
    """Refuse what is no (C, C) matrix of probabilities with rows that sum to 1.

    Raises:
        ValueError: The shape is another, a row is no distribution, or a column is zero.
    """
    if tuple(transition.shape) != (num_classes, num_classes):
        raise ValueError(
            f"the transition has shape {tuple(transition.shape)}, but {num_classes} classes ask "
            f"for {(num_classes, num_classes)}"
        )
    rows = transition.detach().double().cpu()
    if not (rows >= 0).all() or not ((rows.sum(dim=1) - 1).abs() <= _ROUNDING).all():
        raise ValueError(
            f"each row of the transition is a distribution over targets, but it is {rows.tolist()}"
        )
    if not (rows.sum(dim=0) > 0).all():
        raise ValueError(
            f"a column of the transition is 0, so no truth explains that target: {rows.tolist()}"
        )
