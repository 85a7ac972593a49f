"""Renyi and Shannon entropy of each voxel, and the loss that lowers it.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from medssl.losses import mean_over_valid, replace_ignored

# Below it p is under 2e-35 and p^order under 5e-18 for the orders that use the bound.
_LOWEST_LOG_PROB = -80.0


def renyi_entropy(logits: Tensor, order: float) -> Tensor:
    """Return the Renyi entropy ln(sum p^r) / (1 - r) of each voxel, (B, 1, I, J, K), in nats.

    r = 1 is Shannon's -sum p ln p, r = 2 the collision entropy, r = inf the min-entropy -ln max p.
    The entropy does not increase with r; r = 0 is ln C everywhere and has no gradient. Computed
    from log-probs: with respect to logits the gradient is finite for every order, also below 1,
    where it is not with respect to p. For probs at hand, pass `probs.log()` (not to backpropagate
    through zeros).

    Args:
        logits: (B, C, I, J, K).
        order: r in [0, inf].

    Raises:
        ValueError: The order is negative or not a number.

    Example:
        One voxel, two classes that are equally likely: ln 2 for every order.

        >>> logits = torch.zeros(1, 2, 1, 1, 1)
        >>> [round(renyi_entropy(logits, order).item(), 4) for order in (0.5, 1, 2, math.inf)]
        [0.6931, 0.6931, 0.6931, 0.6931]
    """
    if not order >= 0:
        raise ValueError(f"order is {order}, but a Renyi entropy has an order in [0, inf]")
    log_probs = log_softmax(logits.float(), dim=1)
    if order > 1e6:  # within 1e-6 of the limit, relatively, and r ln p cannot overflow
        return -log_probs.amax(dim=1, keepdim=True)
    excess = order - 1
    if abs(excess) > 0.5:
        return torch.logsumexp(order * log_probs, dim=1, keepdim=True) / -excess
    # ln(sum p^r) = ln(1 + sum p (p^(r-1) - 1)) keeps its digits where r comes close to 1.
    bounded = log_probs.clamp(min=_LOWEST_LOG_PROB)
    powers = torch.expm1(excess * bounded) if excess else bounded
    total = (log_probs.exp() * powers).sum(dim=1, keepdim=True)
    return torch.log1p(total) / -excess if excess else -total


def entropy_loss(
    logits: Tensor, order: float, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return the Renyi entropy over ln C, in [0, 1], averaged over the valid voxels.

    `order` is that of `renyi_entropy`; the other arguments are those of `medssl.losses`.

    Raises:
        ValueError: The order is negative.

    Source: Grandvalet and Bengio 2004 (Shannon).
    """
    entropy = renyi_entropy(replace_ignored(logits, valid), order)
    return mean_over_valid(entropy / math.log(logits.shape[1]), weight, valid)
