"""Assignment of voxels to classes by optimal transport towards a prior of the class shares.

Where a teacher gives a class too many voxels, its target takes the least certain ones away, and
where it gives too few, adds them. The plan has a row per voxel, but K numbers, one potential per
class, say all of it: they are fitted on some voxels and applied to all, in linear time.
Axes: B batch, C classes, I J K voxel axes (any number of them), N voxels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOWEST_LOG_PROB = math.log(1e-6)  # the resolution of a class that a teacher rules out
LEAST_VOXELS = 50  # of a class in a pool of which its potential is believed
MEMORY = 0.9  # of the running column sums, per update
PRIOR_ERROR = 1e-3  # most by which the shares of a prior may miss the sum of 1


def fit_potentials(
    probs: Tensor,
    prior: Tensor,
    epsilon: float = 0.05,
    rho: float = 1.0,
    iterations: int = 50,
) -> Tensor:
    """Return log-potentials log v (C,) of the classes; a shift of all of them plays no part.

    With the cost -ln p, each voxel gives away the same mass, all of it, and classes receive masses
    near the prior: the plan q / N minimizes <q / N, -ln p> - epsilon H(q / N) + rho KL(m || prior),
    m_c = mean of q_c. Then q_ic is proportional to p_ic^(1/epsilon) v_c, and a fixed point of
    v_c <- (prior_c / col_c)^(rho / (rho + epsilon)), where col_c is the mean over voxels of
    p_ic^(1/epsilon) / sum_k p_ik^(1/epsilon) v_k.

    The larger rho / epsilon and the more certain the voxels, the slower: what is left of the way
    falls at worst by the factor rho / (rho + epsilon) an iteration. 50 leave at most 9 % of it with
    the defaults, and 1 % with epsilon 0.1; a rho of 10 wants some hundreds.

    Args:
        probs: (N, C); about 1e5 voxels are enough. Clamped to 1e-6 from below.
        prior: (C,), share that each class shall have, above 0, sum 1.
        epsilon: Weight of the entropy, above 0, in nats of cost; towards 0 the plan hardens.
        rho: Weight of the prior, in [0, inf]: 0 only sharpens probs, inf meets the prior exactly.
        iterations: Number of steps of the fixed point.

    Raises:
        ValueError: Sizes do not fit, the prior is no distribution, or a number is out of range.

    Source: Chizat et al. 2018, Scaling algorithms for unbalanced optimal transport problems, for
        the KL-relaxed marginal. Departure: the marginal of the voxels is held exactly, so its
        scaling drops out.
    """
    _check_strengths(epsilon, rho)
    if probs.ndim != 2 or not len(probs):
        raise ValueError(f"probs is {tuple(probs.shape)}, but potentials are fitted on (N, C)")
    log_prior = _check_prior(prior, probs.shape[1]).to(probs.device, _work_dtype(probs)).log()
    log_kernel = _log_kernel(probs, epsilon)
    log_v = torch.zeros_like(log_prior)
    for _ in range(iterations):
        log_v = _relax(epsilon, rho) * (log_prior - _sum_columns(log_kernel, log_v))
    return log_v


def spare_rare(log_v: Tensor, counts: Tensor) -> Tensor:
    """Return potentials (C,) in which rare classes have that of class 0, the background.

    The share of a class of which the pool holds hardly a voxel is chance, and so is its potential:
    it is neither made larger nor smaller.

    Args:
        log_v: (C,), of `fit_potentials`.
        counts: (C,), voxels of the pool in which each class is the most probable one.
    """
    return torch.where(counts.to(log_v.device) < LEAST_VOXELS, log_v[0], log_v)


def assign(probs: Tensor, log_v: Tensor, epsilon: float) -> Tensor:
    """Return q (B, C, I, J, K), proportional to p^(1/epsilon) v and on the simplex at each voxel.

    Args:
        probs: (B, C, I, J, K), or (N, C). Clamped to 1e-6 from below.
        log_v: (C,), of `fit_potentials` with the same epsilon.
        epsilon: As in `fit_potentials`.

    Raises:
        ValueError: The number of potentials is not that of classes, or epsilon is not above 0.
    """
    _check_strengths(epsilon, 0.0)
    if probs.ndim < 2 or log_v.shape != probs.shape[1:2]:
        raise ValueError(f"log_v is {tuple(log_v.shape)}, but probs is {tuple(probs.shape)}")
    log_kernel = _log_kernel(probs, epsilon)
    along_classes = log_v.to(log_kernel).view(-1, *[1] * (probs.ndim - 2))
    return torch.softmax(log_kernel + along_classes, dim=1)


def shrink_prior(labeled_prior: Tensor, pool_prior: Tensor, strength: float) -> Tensor:
    """Return the labeled prior moved towards the pool's own shares, (C,), sum 1.

    A few labeled cases say little of the share of a small class; the teacher's own shares in the
    pool are biased, but of many cases.

    Args:
        labeled_prior: (C,), voxel shares in whole labeled volumes.
        pool_prior: (C,), mean probs of the pool.
        strength: In [0, 1]: 0 is the labeled prior, 1 that of the pool.

    Raises:
        ValueError: The strength is out of range, or the sizes differ.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, but a prior is shrunk by a fraction in [0, 1]")
    if labeled_prior.shape != pool_prior.shape:
        raise ValueError(
            f"the labeled prior has shape {tuple(labeled_prior.shape)}, that of the pool "
            f"{tuple(pool_prior.shape)}"
        )
    mixed = (1 - strength) * labeled_prior + strength * pool_prior
    return mixed / mixed.sum()


class RunningTransport(nn.Module):
    """Potentials fitted online, batch after batch; all state is in buffers.

    An update is one step of the fixed point of `fit_potentials`, with the column sums of the batch
    averaged into the running ones, 1 / n of the n-th update and 0.1 from the tenth on. Sums are
    averaged, not their logarithms: a batch without an organ has hardly any of its sum, and the mean
    of logarithms would be pulled down by it. The memory is short because the fixed point is slow
    where voxels are certain: with rho / epsilon = 10 they follow a change in some 110 updates.

    Args:
        num_classes: Number of classes, with background.
        prior: As in `fit_potentials`, of the voxels that updates see.
        epsilon: As in `fit_potentials`.
        rho: As in `fit_potentials`.

    Raises:
        ValueError: The prior is no distribution over the classes, or a number is out of range.

    Source: Mensch and Peyré 2020 (Online Sinkhorn), for one finite side, with the
        relaxed marginal and a constant rate in the end.
    """

    prior: Tensor
    log_v: Tensor
    num_updates: Tensor

    def __init__(
        self, num_classes: int, prior: Tensor, epsilon: float = 0.05, rho: float = 1.0
    ) -> None:
        super().__init__()
        _check_strengths(epsilon, rho)
        self.epsilon = epsilon
        self.rho = rho
        self.register_buffer("prior", _check_prior(prior, num_classes).float())
        self.register_buffer("log_v", torch.zeros(num_classes))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, probs: Tensor, valid: Tensor) -> None:
        """Move the potentials by a batch; without a voxel that counts they stay.

        Args:
            probs: (B, C, I, J, K) of the teacher.
            valid: (B, 1, I, J, K) bool, voxels that count.
        """
        power = _relax(self.epsilon, self.rho)
        if power == 0:
            return
        counted = valid.flatten()
        has_any = counted.any()
        self.num_updates.add_(has_any)
        rate = (1 / self.num_updates).clamp(min=1 - MEMORY)
        log_prior = self.prior.log()
        running = log_prior - self.log_v / power  # the column sums that gave these potentials
        voxels = probs.movedim(1, -1).flatten(0, -2)
        batch = _sum_columns(_log_kernel(voxels, self.epsilon), self.log_v, counted)
        moved = torch.logaddexp(running + torch.log1p(-rate), batch + rate.log())
        self.log_v.copy_(torch.where(has_any, power * (log_prior - moved), self.log_v))


def _log_kernel(probs: Tensor, epsilon: float) -> Tensor:
    """Return ln p^(1/epsilon), bounded, in float32 or better."""
    return probs.to(_work_dtype(probs)).log().clamp(min=LOWEST_LOG_PROB) / epsilon


def _work_dtype(probs: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.promote_types(probs.dtype, torch.float32)


def _sum_columns(log_kernel: Tensor, log_v: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return ln col (C,) of a kernel (N, C): the class's column of the plan without its v.

    ``counted`` (N,) says which voxels there are; None for all of them.
    """
    log_rows = torch.logsumexp(log_kernel + log_v, dim=1, keepdim=True)
    cells = log_kernel - log_rows
    if counted is None:
        return torch.logsumexp(cells, dim=0) - math.log(len(cells))
    cells = torch.where(counted[:, None], cells, -math.inf)
    return torch.logsumexp(cells, dim=0) - counted.sum().log()


def _relax(epsilon: float, rho: float) -> float:
    """Return rho / (rho + epsilon), which is 1 in the limit."""
    return 1.0 if math.isinf(rho) else rho / (rho + epsilon)


def _check_strengths(epsilon: float, rho: float) -> None:
    """Raise unless 0 < epsilon < inf and 0 <= rho."""
    if not (0 < epsilon < math.inf and rho >= 0):
        raise ValueError(
            f"epsilon is {epsilon} and rho {rho}, but transport wants 0 < epsilon < inf, rho >= 0"
        )


def _check_prior(prior: Tensor, num_classes: int) -> Tensor:
    """Return the prior as float, its sum exactly 1; raise unless it is a distribution."""
    prior = prior.to(torch.promote_types(prior.dtype, torch.float32))
    if prior.shape != (num_classes,):
        raise ValueError(f"the prior has shape {tuple(prior.shape)}, but {num_classes} classes")
    total = float(prior.sum())
    if not (bool((prior > 0).all()) and abs(total - 1) <= PRIOR_ERROR):
        raise ValueError(
            f"the prior is {prior.tolist()}, sum {total:g}, but every class wants a share above 0, "
            "and their sum is 1; shrink it towards shares in which no class is missing"
        )
    return prior / total
