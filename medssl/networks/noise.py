"""Model noise: stochastic depth, dropout that can be left on at evaluation, feature dropout.

Beside them, the freezing of the first levels of an encoder.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.nets import DynUNet
from monai.networks.nets.dynunet import DynUNetSkipLayer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from medssl.config import InputError

ENCODER_LEVELS = 6  # resolutions of an encoder of segmentation-models-pytorch
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

_part: tuple[Sequence[int], int] | None = None  # of a batch, and the patches of the whole one


@contextlib.contextmanager
def take_part(network: nn.Module, places: Sequence[int], count: int) -> Iterator[None]:
    """Draw noise for all patches of a batch and use that of a part, which alone passes through.

    Args:
        network: Its dropout draws so, and all noise of this module.
        places: Of the patches in the whole batch.
        count: Patches of the whole batch.
    """
    global _part
    layers = [module for module in network.modules() if isinstance(module, DROPOUTS)]
    for layer in layers:
        layer.forward = functools.partial(_drop_out, layer)  # type: ignore[method-assign]
    _part = places, count
    try:
        yield
    finally:
        _part = None
        for layer in layers:
            del layer.forward


def _draw(num_patches: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return noise (B, ...) of so many patches, drawn for the whole batch of which they are."""
    if _part is None:
        return draw(num_patches)
    places, count = _part
    return draw(count)[places]


def _drop_out(layer: nn.Module, features: Tensor) -> Tensor:
    """Return features (B, C, I, J, K) after a layer of dropout."""
    is_by_voxel = isinstance(layer, nn.Dropout)  # else by channel
    shape = features.shape[1:] if is_by_voxel else (features.shape[1], *[1] * (features.ndim - 2))

    def draw(count: int) -> Tensor:
        noise: Tensor = type(layer).forward(layer, features.new_ones((count, *shape)))
        return noise

    return features * _draw(len(features), draw) if layer.training else features


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
        ones = [1] * (branch.ndim - 1)
        drawn = _draw(len(branch), lambda count: torch.rand((count, *ones), device=branch.device))
        alive = drawn < self.survival
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
    with silence_noise(network, layers):
        yield


@contextlib.contextmanager
def silence_noise(network: nn.Module, noisy: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Evaluate: only ``noisy`` modules have their noise; afterwards each has the mode it had.

    Modes are set one by one, and only where they differ: `nn.Module.train` walks over the whole
    network, which would cost a twentieth of a step.
    """
    active = set(noisy)
    others = [module for module in network.modules() if module.training != (module in active)]
    for module in others:
        module.training = not module.training
    try:
        yield
    finally:
        for module in others:
            module.training = not module.training


@contextlib.contextmanager
def drop_features(
    network: nn.Module, probability: float, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Drop channels of everything that the decoder gets from the encoder, in each forward pass.

    These are the skips of all levels and the bottleneck's features, each with a draw of its own
    per sample and channel; survivors are scaled by 1/(1 - probability). The encoder itself is left
    clean: what goes down to the next level is not dropped. Modes, weights and state_dict of the
    network stay as they are, and so does the noise that its mode gives it.

    Args:
        network: A DynUNet or an encoder network of ``build``, or a module that holds one.
        probability: Probability in [0, 1) that a channel is dropped; 0.5 in the paper.
        generator: Source of the draw; torch's global random state if there is none.

    Raises:
        InputError: The network holds none of the two.
        ValueError: The probability is not in [0, 1).

    Source: Yang et al. 2023 (UniMatch), feature perturbation: channel dropout on all features of
        the encoder, of the weak view.
    """
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"the probability of dropping a channel is in [0, 1), got {probability}")
    part = _find_encoder_owner(network)

    def drop_all(_: nn.Module, __: tuple[Tensor], features: list[Tensor]) -> list[Tensor]:
        image, *rest = features
        return [image, *(_drop_channels(feature, probability, generator) for feature in rest)]

    def drop_skip(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        below, skip = inputs
        return below, _drop_channels(skip, probability, generator)

    def drop_bottleneck(_: nn.Module, __: tuple[Tensor], features: Tensor) -> Tensor:
        return _drop_channels(features, probability, generator)

    with contextlib.ExitStack() as hooks:
        if not isinstance(part, DynUNet):
            hooks.enter_context(part.register_forward_hook(drop_all))
            yield
            return
        layer = part.skip_layers
        while isinstance(layer, DynUNetSkipLayer):
            hooks.enter_context(layer.upsample.register_forward_pre_hook(drop_skip))
            layer = layer.next_layer
        hooks.enter_context(layer.register_forward_hook(drop_bottleneck))
        yield


def freeze_encoder(network: nn.Module, levels: int) -> int:
    """Freeze the first levels of the encoder, from the input on: their weights get no gradient.

    Args:
        network: A DynUNet or an encoder network of ``build``, or a module that holds one.
        levels: How many resolution levels; the bottleneck is the last one. The stages of encoders
            have no common names: there it is the first levels/6 of the weights.

    Returns:
        The number of weights that are frozen.

    Raises:
        InputError: The network holds none of the two, or has not so many levels.

    Source: Xie et al. 2020 (Noisy Student), section 3.1: early layers are frozen in the last
        fine-tune, at the resolution of the test.
    """
    part = _find_encoder_owner(network)
    if isinstance(part, DynUNet):
        blocks = [part.input_block, *part.downsamples, part.bottleneck]
        parts = [list(block.parameters()) for block in blocks]
    else:
        weights = list(part.parameters())
        cuts = [round(len(weights) * level / ENCODER_LEVELS) for level in range(ENCODER_LEVELS + 1)]
        parts = [weights[low:high] for low, high in itertools.pairwise(cuts)]
    if not 0 <= levels <= len(parts):
        raise InputError(
            f"train.fine_tune.frozen_levels={levels}: the encoder has {len(parts)} levels; set it "
            f"to 0 to {len(parts)}"
        )
    frozen = [weight for level in parts[:levels] for weight in level]
    for weight in frozen:
        weight.requires_grad_(False)
    return sum(weight.numel() for weight in frozen)


def _drop_channels(
    features: Tensor, probability: float, generator: torch.Generator | None
) -> Tensor:
    """Return the features (B, C, I, J, K), zero in the channels that were dropped."""
    device, channels = features.device if generator is None else generator.device, features.shape[1]
    drawn = _draw(
        len(features),
        lambda count: torch.rand((count, channels), generator=generator, device=device),
    )
    alive = (drawn >= probability).to(features).reshape(*drawn.shape, *[1] * (features.ndim - 2))
    return features * alive / (1.0 - probability)


def _find_encoder_owner(network: nn.Module) -> nn.Module:
    """Return the DynUNet that a network is or holds, or its encoder in 2D."""
    for name, module in network.named_modules():
        if isinstance(module, DynUNet) or name.endswith("smp.encoder"):
            owner: nn.Module = module
            return owner
    raise InputError(
        f"the network has no encoder that is known here: {type(network).__name__}; take one of "
        "medssl.networks.build, or leave out feature_noise (views) and the frozen levels "
        "(train.fine_tune.frozen_levels=0)"
    )
