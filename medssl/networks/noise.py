"""Model noise: stochastic depth, and dropout that can be left on at evaluation.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from medssl.config import InputError

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


class DropBranch(nn.Module):
    """Drop a residual branch per sample and scale the survivors; identity at evaluation.

    Args:
        survival: Probability in (0, 1] that the branch of a sample survives.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth, equation 2; the division by
        the survival probability takes place in training, so evaluation is left as it is.
    """

    def __init__(self, survival: float) -> None:
        super().__init__()
        self.survival = survival

    def forward(self, branch: Tensor) -> Tensor:
        """Return the branch (B, C, I, J, K), zero for the samples that were dropped."""
        if not self.training or self.survival == 1.0:
            return branch
        shape = (branch.shape[0], *[1] * (branch.ndim - 1))
        alive = torch.rand(shape, device=branch.device) < self.survival
        return branch * alive.to(branch.dtype) / self.survival


def add_stochastic_depth(network: nn.Module, last_survival: float) -> int:
    """Give residual block l of L the survival probability 1 - (l/L)(1 - last_survival).

    Args:
        network: A network with residual blocks, counted from the input to the output.
        last_survival: Survival probability p_L of the last block, in (0, 1].

    Returns:
        The number of residual blocks.

    Raises:
        InputError: The network has no residual block.

    Source: Huang et al. 2016, equation 4.
    """
    kinds = (UnetResBlock, BasicBlock, Bottleneck)
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    if not blocks:
        raise InputError(
            f"noise.stochastic_depth={last_survival}: the network has no residual block; set "
            "noise.stochastic_depth=1.0 (or, in 2D, an encoder with such blocks, as resnet18)"
        )
    for index, block in enumerate(blocks, start=1):
        survival = 1.0 - index / len(blocks) * (1.0 - last_survival)
        last = {UnetResBlock: "norm2", BasicBlock: "bn2", Bottleneck: "bn3"}[type(block)]
        norm = getattr(block, last)  # what stands before the addition
        setattr(block, last, nn.Sequential(norm, DropBranch(survival)))
    return len(blocks)


@contextlib.contextmanager
def sample_dropout(network: nn.Module) -> Iterator[None]:
    """Evaluate with dropout active: normalization and stochastic depth stay in eval mode.

    Raises:
        InputError: The network has no active dropout, so all passes would be the same.

    Source: Gal and Ghahramani 2016, Dropout as a Bayesian Approximation.
    """
    layers = [m for m in network.modules() if isinstance(m, DROPOUTS) and m.p > 0.0]
    if not layers:
        raise InputError(
            "MC dropout was asked for, but the network has no active dropout: set "
            "network.dropout above 0, or filter.uncertainty.source=none"
        )
    was_training = network.training
    network.eval()
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        network.train(was_training)
