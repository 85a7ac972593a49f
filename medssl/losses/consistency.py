"""Distance of a student's logits to a teacher's probs.

Axes: B batch, C classes (background first), I J K voxels (K is absent in 2D).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from medssl.losses import mean_over_valid, replace_ignored


def consistency_loss(
    logits: Tensor,
    target_probs: Tensor,
    name: str,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the distance of softmax(logits) to the target, averaged over the valid voxels.

    With q the target and p the student: `mse` is the mean over classes of (p - q)^2, `ce` is
    -sum q ln p and `kl` is sum q ln(q / p) = ce - H(q), both in nats and with the same gradient.
    The gradient goes into the logits only.

    Args:
        logits: The student on the noised view, (B, C, I, J, K).
        target_probs: The teacher on the weak view, (B, C, I, J, K).
        name: "mse", "ce" or "kl".
        weight: (B, 1, I, J, K), scales each voxel; it does not enter the denominator.
        valid: Bool (B, 1, I, J, K); voxels that are False are ignored.

    Raises:
        ValueError: A shape does not fit the logits, `valid` is not bool, or the name is unknown.

    Source: Tarvainen and Valpola 2017, Mean Teacher (`mse`).
    """
    if target_probs.shape != logits.shape:
        raise ValueError(
            f"target_probs has shape {tuple(target_probs.shape)}, "
            f"but the logits have {tuple(logits.shape)}"
        )
    q = replace_ignored(target_probs.detach().float(), valid)
    log_probs = log_softmax(replace_ignored(logits, valid).float(), dim=1)
    distance = _distance(log_probs, q, name)
    return mean_over_valid(distance, weight, valid)


def _distance(log_probs: Tensor, q: Tensor, name: str) -> Tensor:
    """Return the named distance of each voxel, (B, 1, I, J, K)."""
    if name == "mse":
        return (log_probs.exp() - q).square().mean(dim=1, keepdim=True)
    if name == "ce":
        return -(q * log_probs).sum(dim=1, keepdim=True)
    if name == "kl":
        return (torch.xlogy(q, q) - q * log_probs).sum(dim=1, keepdim=True)
    raise ValueError(f"consistency loss {name!r} is unknown; there are 'mse', 'ce' and 'kl'")
