"""Distance of a student's logits to a teacher's probs.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D).

Throughout, q is the teacher and p the student, as in the cross-entropy -sum q ln p. An f-divergence
is D_f(q || p) = sum p f(q / p) with f convex and f(1) = 0. Between probs that differ by a small
step d of the logits it is f''(1) / 2 d' F d with F = diag(p) - p p' (total variation, which has a
kink there, apart): close to agreement they differ by a factor only. They differ in how hard they
pull on a student that is certain and wrong. Pearson pulls without bound and KL with a bounded
force; total variation, Hellinger and Jensen-Shannon let go of it.

A distance is a function of (log_probs, q), that is ln p and q, both (B, C, I, J, K), and gives one
number a voxel, (B, 1, I, J, K); ``DISTANCES`` has its name in configurations.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from medssl.losses import mean_over_valid, replace_ignored

_LOWEST_PEARSON_PROB = 1e-6  # below it 1 / p goes on as its tangent over ln p


def consistency_loss(
    logits: Tensor,
    target_probs: Tensor,
    name: str,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the distance of softmax(logits) to the target, averaged over the valid voxels.

    The gradient goes into the logits only. It is finite for every finite logit and every target,
    one-hot targets included.

    `logits` are the student's on the noised view, `target_probs` (B, C, I, J, K) the teacher's on
    the weak view; `weight` and `valid` are those of `medssl.losses`.

    Raises:
        ValueError: A shape does not fit the logits, or `DISTANCES` has no such name.

    Source: Tarvainen and Valpola 2017, Mean Teacher (`mse`); Csiszár 1967 (f-divergences).
    """
    if target_probs.shape != logits.shape:
        raise ValueError(
            f"target_probs has shape {tuple(target_probs.shape)}, "
            f"but the logits have {tuple(logits.shape)}"
        )
    if name not in DISTANCES:
        *others, last = map(repr, DISTANCES)
        choices = f"{', '.join(others)} and {last}"
        raise ValueError(f"consistency loss {name!r} is unknown; there are {choices}")
    q = replace_ignored(target_probs.detach().float(), valid)
    log_probs = log_softmax(replace_ignored(logits, valid).float(), dim=1)
    return mean_over_valid(DISTANCES[name](log_probs, q), weight, valid)


def mse(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return the mean over classes of (p - q)^2 of each voxel, in [0, 2 / C]."""
    return (log_probs.exp() - q).square().mean(dim=1, keepdim=True)


def ce(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return the cross-entropy -sum q ln p of each voxel, in nats.

    It is `kl` + the entropy of q: a constant apart, so with the same gradient.
    """
    return -(q * log_probs).sum(dim=1, keepdim=True)


def kl(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return sum q ln(q / p) of each voxel, in nats; f(u) = u ln u, f''(1) = 1."""
    return (torch.xlogy(q, q) - q * log_probs).sum(dim=1, keepdim=True)


def total_variation(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return ``sum |q - p| / 2`` of each voxel; ``f(u) = |u - 1| / 2``.

    It has a kink at p = q: its gradient does not fade as the student comes close to the teacher.

    Example:
        One voxel of which teacher and student are sure, of different classes.

        >>> q, p = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> total_variation(p.log().view(1, 2, 1, 1, 1), q.view(1, 2, 1, 1, 1)).item()
        1.0
    """
    return (q - log_probs.exp()).abs().sum(dim=1, keepdim=True) / 2


def pearson(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return sum (q - p)^2 / p of each voxel; f(u) = (u - 1)^2, f''(1) = 2.

    Unbounded, and so is its gradient q^2 / p. Departure: below p = 1e-6 the factor 1 / p goes on
    as its tangent over ln p, 1e6 (1 + ln(1e-6 / p)). Clamped there, a confident student that is
    wrong would not be pulled at all; unclamped, 1 / p overflows.
    """
    lowest = math.log(_LOWEST_PEARSON_PROB)
    inverse = (-log_probs.clamp(min=lowest)).exp() * (1 + (lowest - log_probs).clamp(min=0))
    return ((q - log_probs.exp()).square() * inverse).sum(dim=1, keepdim=True)


def hellinger(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return the squared Hellinger distance of each voxel, in [0, 2].

    It is sum (sqrt q - sqrt p)^2, not halved; f(u) = (sqrt u - 1)^2, f''(1) = 1/2.
    """
    return (q.sqrt() - (log_probs / 2).exp()).square().sum(dim=1, keepdim=True)


def jensen_shannon(log_probs: Tensor, q: Tensor) -> Tensor:
    """Return [KL(q || m) + KL(p || m)] / 2 of each voxel, in [0, ln 2] nats.

    m = (q + p) / 2; f(u) = [u ln u - (u + 1) ln((u + 1) / 2)] / 2, f''(1) = 1/4.

    Source: Lin 1991 (with equal weights).
    """
    p = log_probs.exp()
    # Not ln((q + p) / 2): where q is 0 and p underflows, its gradient would be infinity times 0.
    log_middle = torch.logaddexp(q.log(), log_probs) - math.log(2)
    terms = torch.xlogy(q, q) + p * log_probs - (q + p) * log_middle
    return terms.sum(dim=1, keepdim=True) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "ce": ce,
    "kl": kl,
    "total_variation": total_variation,
    "pearson": pearson,
    "hellinger": hellinger,
    "jensen_shannon": jensen_shannon,
}
