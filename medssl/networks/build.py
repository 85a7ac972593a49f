"""Build a network from a specification that a model folder can hold.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

from typing import Literal

import torch
from monai.networks.nets import DynUNet
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from medssl.networks.noise import add_stochastic_depth


class NetworkSpec(BaseModel):
    """What a network is built from; it stands in model.json.

    ``strides`` has one entry per resolution level; a stride of 1 keeps an axis as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["dynunet"] = "dynunet"
    in_channels: int
    num_classes: int
    filters: tuple[int, ...]
    kernels: tuple[tuple[int, int, int], ...]
    strides: tuple[tuple[int, int, int], ...]
    dropout: float = 0.0
    deep_supervision: bool = False
    stochastic_depth: float = 1.0


class SegmentationNetwork(nn.Module):
    """A DynUNet whose heads give logits at their own resolution.

    Residual blocks, instance norm, channel dropout after the second convolution of every block
    but those at full resolution, where it costs most; never on logits.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        levels = len(spec.filters)
        self.num_heads = min(2, levels - 2) if spec.deep_supervision else 0
        self.dynunet = DynUNet(
            spatial_dims=3,
            in_channels=spec.in_channels,
            out_channels=spec.num_classes,
            kernel_size=spec.kernels,
            strides=spec.strides,
            upsample_kernel_size=spec.strides[1:],
            filters=spec.filters,
            norm_name=("INSTANCE", {"affine": True}),
            res_block=True,
            deep_supervision=self.num_heads > 0,
            deep_supr_num=max(1, self.num_heads),
        )
        _place_dropout(self.dynunet, spec.dropout)
        if spec.stochastic_depth < 1.0:
            add_stochastic_depth(self.dynunet, spec.stochastic_depth)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, num_classes, I, J, K) of an image (B, C, I, J, K)."""
        result: Tensor = self.dynunet.output_block(self.dynunet.skip_layers(image))
        return result

    def forward_heads(self, image: Tensor) -> list[Tensor]:
        """Return logits from full resolution downwards, each at its own resolution."""
        logits = [self(image)]
        return logits + list(self.dynunet.heads[: self.num_heads])


def _place_dropout(dynunet: DynUNet, probability: float) -> None:
    """Set channel dropout after the second convolution of the blocks below full resolution."""
    upsampled = [block.conv_block for block in dynunet.upsamples[:-1]]
    for block in [*dynunet.downsamples, dynunet.bottleneck, *upsampled]:
        block.conv2 = nn.Sequential(block.conv2, nn.Dropout3d(probability))


def build_network(spec: NetworkSpec) -> SegmentationNetwork:
    """Build a network with fresh weights from torch's global random state."""
    network = SegmentationNetwork(spec)
    return network.to(memory_format=torch.channels_last_3d)
