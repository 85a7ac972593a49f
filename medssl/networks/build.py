"""Build a network from a specification that a model folder can hold.

MONAI's DynUNet in 3D and 2D; the architectures of segmentation-models-pytorch, with any of its
encoders, in 2D. Axes: B batch, C channels, I J K voxel axes (K is absent in 2D).
"""

from __future__ import annotations

import difflib
import warnings
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from medssl.config import InputError, PlaneNetwork
from medssl.networks.noise import DROPOUTS, add_stochastic_depth, sample_dropout

ENCODER_FACTOR = 32  # pixels to which an image is padded: five halvings
LEAST_SIDE = 64  # pixels: below, one pixel is left, of which an instance has no deviation
FIRST_DROPPED = 2  # halvings from which on features are dropped
GROUP_NORM_VOXELS = 1024  # of features, from which on torch's group norm is fast: its own constant
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the axes of a tensor
Count = Annotated[int, Field(ge=1, le=2**16)]


class NetworkSpec(BaseModel):
    """What a network is built from; it stands in model.json.

    ``strides`` has one entry per resolution level; a stride of 1 keeps an axis as it is. A DynUNet
    has as many dimensions as its strides have entries. The other names are two-dimensional; they
    have an ``encoder`` in place of filters, kernels and strides. ``pretrained`` says that the
    encoder started from weights of ImageNet and has kept its batch norm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["dynunet"] | PlaneNetwork = "dynunet"
    in_channels: Count
    num_classes: Count
    filters: tuple[Count, ...] = ()
    kernels: tuple[tuple[Count, ...], ...] = ()
    strides: tuple[tuple[Count, ...], ...] = ()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    deep_supervision: bool = False
    stochastic_depth: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    encoder: str = ""
    pretrained: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse a DynUNet without levels, and others without an encoder."""
        if self.name == "dynunet":
            sizes = {len(self.filters), len(self.kernels), len(self.strides)}
            if sizes & {0} or len(sizes) > 1 or self.encoder or self.pretrained:
                raise ValueError("dynunet needs filters, kernels and strides alike, and no encoder")
        elif not self.encoder or self.filters or self.kernels or self.strides:
            raise ValueError(f"{self.name} needs an encoder in place of filters, kernels, strides")
        return self

    @property
    def num_heads(self) -> int:
        """Heads of the deep supervision of a DynUNet, below full resolution."""
        return min(2, len(self.strides) - 2) if self.deep_supervision else 0

    def describe_dynunet(self) -> dict[str, Any]:
        """Return the arguments of MONAI's DynUNet."""
        return {
            "spatial_dims": len(self.strides[0]),
            "in_channels": self.in_channels,
            "out_channels": self.num_classes,
            "kernel_size": self.kernels,
            "strides": self.strides,
            "upsample_kernel_size": self.strides[1:],
            "filters": self.filters,
            "norm_name": ("INSTANCE", {"affine": True}),
            "res_block": True,
            "deep_supervision": self.num_heads > 0,
            "deep_supr_num": max(1, self.num_heads),
        }


class SegmentationNetwork(nn.Module):
    """A network whose heads give logits at their own resolution; the first has full resolution."""

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, num_classes, I, J, K) of an image (B, C, I, J, K)."""
        raise NotImplementedError

    def forward_heads(self, image: Tensor) -> list[Tensor]:
        """Return logits from full resolution downwards, each at its own resolution."""
        return [self(image)]

    def forward_passes(self, image: Tensor, passes: int) -> tuple[Tensor, list[Tensor]]:
        """Return clean logits, and those of passes of MC dropout behind one clean encoder.

        The network is in evaluation mode. Passes may have a lower resolution than the image.

        Raises:
            InputError: The network has no active dropout.
        """
        raise NotImplementedError


class InstanceNorm(nn.GroupNorm):
    """Instance norm of C channels as group norm with a group for each, which is faster on a CPU.

    It is the same function of the same weights. On a GPU it is torch's instance norm.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_channels)

    def forward(self, input: Tensor) -> Tensor:
        """Return features (B, C, I, J, K), each channel of each case with mean 0, deviation 1."""
        if input.is_cuda:
            return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        is_slow = input.dtype == torch.bfloat16 and not input.is_contiguous()
        if is_slow and not is_traced and not torch.compiler.is_compiling():
            result: Tensor = _NormChannelsLast.apply(input, self.weight, self.bias, self.eps)
            return result
        return super().forward(input)


class _NormChannelsLast(torch.autograd.Function):
    """Instance norm of bfloat16 with channels last, by the kernels that are fast for it.

    Of small features, and in the backward pass, that is batch norm, case by case: group norm has
    none there (torch 2.14). In float32 group norm rounds less, and has one that is less slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return the normalized features (B, C, I, J, K)."""
        num_cases, num_channels = x.shape[:2]
        voxels = x[0, 0].numel()
        if voxels >= GROUP_NORM_VOXELS:
            result, mean, inverse = torch.native_group_norm(
                x, weight, bias, num_cases, num_channels, voxels, num_channels, eps
            )
        else:
            parts = [
                torch.native_batch_norm(case, weight, bias, None, None, True, 0.0, eps)
                for case in torch.split(x, 1)
            ]
            result, mean, inverse = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of features, weight and bias."""
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=CHANNELS_LAST[x.ndim])
        cases = zip(
            torch.split(gradient, 1),
            torch.split(x, 1),
            mean.view(len(x), -1),
            inverse.view(len(x), -1),
            strict=True,
        )
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                g, case, weight, None, None, m, i, True, ctx.eps, [True, True, True]
            )
            for g, case, m, i in cases
        ]
        features, weights, biases = zip(*parts, strict=True)
        return torch.cat(features), sum(weights), sum(biases), None


class PointwiseConv(nn.Module):
    """A convolution of kernel size 1 that takes the weights of torch's, and gives the same.

    With channels last on a CPU it is a product of matrices in float32, which is ten times as fast
    in 3D, and a stride picks voxels before it: the backward pass of a strided convolution of kernel
    size 1 writes out of bounds there in 2D, with few channels (torch 2.14).
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride = conv.stride

    def forward(self, input: Tensor) -> Tensor:
        """Return features (B, C, I, J, K) of features (B, C, I, J, K)."""
        conv = F.conv2d if input.ndim == 4 else F.conv3d
        stride, is_plain = self.stride, input.is_cuda or input.is_contiguous()
        if max(stride) > 1 and not (is_plain and input.shape[1] > 1):  # one channel has any layout
            input = input[(slice(None), slice(None), *(slice(None, None, n) for n in stride))]
            input, stride = input.contiguous(memory_format=CHANNELS_LAST[input.ndim]), (1,)
        if is_plain or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return conv(input, self.weight, self.bias, stride)
        weight = self.weight.flatten(1)
        return F.linear(input.movedim(1, -1), weight, self.bias).movedim(-1, 1)


class DynamicUNet(SegmentationNetwork):
    """A DynUNet, in 3D or 2D.

    Residual blocks, instance norm, channel dropout after the second convolution of every block
    but those at full resolution, where it costs most; never on logits.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.dynunet = DynUNet(**spec.describe_dynunet())
        _replace_norm(self.dynunet)
        _replace_pointwise(self.dynunet)
        _place_dropout(self.dynunet, spec.dropout, len(spec.strides[0]))
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

    def forward_passes(self, image: Tensor, passes: int) -> tuple[Tensor, list[Tensor]]:
        """Return clean logits, and those of passes that drop in bottleneck and decoder alone.

        Passes stop at the lowest head of the deep supervision, at half or a quarter of the
        resolution; without one they go up to full resolution.
        """
        skips = [image]
        for block in (self.dynunet.input_block, *self.dynunet.downsamples):
            skips.append(block(skips[-1]))
        logits = self.dynunet.output_block(self._decode(skips, 0))
        heads = [self.dynunet.output_block]
        if self.num_heads:
            heads += self.dynunet.deep_supervision_heads
        with sample_dropout(self):
            return logits, [heads[-1](self._decode(skips, self.num_heads)) for _ in range(passes)]

    def _decode(self, skips: list[Tensor], level: int) -> Tensor:
        """Return the features of a level of the decoder; level 0 has full resolution."""
        features: Tensor = self.dynunet.bottleneck(skips[-1])
        blocks = list(self.dynunet.upsamples)[: len(self.dynunet.upsamples) - level]
        for block, skip in zip(blocks, reversed(skips), strict=False):
            features = block(features, skip)
        return features


def _place_dropout(dynunet: DynUNet, probability: float, dimension: int) -> None:
    """Set channel dropout after the second convolution of the blocks below full resolution."""
    dropout = nn.Dropout3d if dimension == 3 else nn.Dropout2d
    upsampled = [block.conv_block for block in dynunet.upsamples[:-1]]
    for block in [*dynunet.downsamples, dynunet.bottleneck, *upsampled]:
        block.conv2 = nn.Sequential(block.conv2, dropout(probability))


class EncoderNetwork(SegmentationNetwork):
    """A network of segmentation-models-pytorch: one head, at full resolution.

    Instance norm takes the place of batch norm, whose statistics would mix labeled and unlabeled
    patches, unless the encoder comes with pretrained ones. Channel dropout lies on the features
    of the encoder from a quarter of the resolution on, and where the decoder has its own.

    Args:
        spec: The specification.
        download: Whether to fetch the weights that a pretrained encoder starts from.

    Raises:
        InputError: The encoder is unknown, does not fit the decoder, or cannot be fetched.
    """

    def __init__(self, spec: NetworkSpec, download: bool = False) -> None:
        super().__init__()
        self.smp = _create_smp(spec, download)
        if not spec.pretrained:
            _replace_norm(self.smp)
        self.can_be_last = _replace_pointwise(self.smp)
        self.dropout = nn.Dropout2d(spec.dropout)
        for module in self.smp.decoder.modules():
            if isinstance(module, DROPOUTS):
                module.p = spec.dropout
        if spec.stochastic_depth < 1.0:
            add_stochastic_depth(self.smp.encoder, spec.stochastic_depth)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, num_classes, I, J) of an image (B, C, I, J) of any size."""
        return self._decode(self._encode(image), image)

    def forward_passes(self, image: Tensor, passes: int) -> tuple[Tensor, list[Tensor]]:
        """Return clean logits, and those of passes that drop behind the encoder alone."""
        features = self._encode(image)
        logits = self._decode(features, image)
        with sample_dropout(self):
            return logits, [self._decode(features, image) for _ in range(passes)]

    def _encode(self, image: Tensor) -> list[Tensor]:
        """Return the features of all levels, of an image padded to a size that can be halved."""
        i, j = image.shape[2:]
        padded = F.pad(image, (0, -j % ENCODER_FACTOR, 0, -i % ENCODER_FACTOR))
        padded = arrange(padded) if self.can_be_last else padded.contiguous()
        features: list[Tensor] = self.smp.encoder(padded)
        return features

    def _decode(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Return logits of the size of the image, from features of which channels are dropped."""
        dropped = [
            feature if level < FIRST_DROPPED else self.dropout(feature)
            for level, feature in enumerate(features)
        ]
        logits: Tensor = self.smp.segmentation_head(self.smp.decoder(dropped))
        return logits[:, :, : image.shape[2], : image.shape[3]]


def _create_smp(spec: NetworkSpec, download: bool) -> Any:
    """Create a network of segmentation-models-pytorch (it has no types, hence Any)."""
    import segmentation_models_pytorch as smp  # slow, and needed in 2D only

    weights = ("imagenet" if not spec.encoder.startswith("tu-") else True) if download else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return smp.create_model(
                spec.name,
                encoder_name=spec.encoder,
                encoder_weights=weights if spec.pretrained else None,
                in_channels=spec.in_channels,
                classes=spec.num_classes,
            )
    except KeyError as error:
        known = smp.encoders.get_encoder_names()
        near = difflib.get_close_matches(spec.encoder, known, n=3) if spec.encoder else []
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; such as {known[0]}"
        raise InputError(
            f"network.encoder={spec.encoder}: {str(error.args[0]).split(', ')[0]}{hint}"
        ) from error
    except Exception as error:  # a download, or an encoder that a decoder cannot take
        if spec.pretrained and download:
            raise InputError(
                f"network.pretrained=true: the weights of {spec.encoder} could not be fetched "
                f"({str(error).splitlines()[0]}); go online once, or set network.pretrained=false"
            ) from error
        raise InputError(
            f"network.name={spec.name} does not work with network.encoder={spec.encoder}: {error}"
        ) from error


def _replace_norm(module: nn.Module, is_pooled: bool = False) -> None:
    """Put this file's instance norm in the place of MONAI's, and of batch norm.

    An activation that timm's batch norm carries stays. Behind a global pooling, where an instance
    is one pixel, the norm is taken over the channels.
    """
    children = list(module.named_children())
    if isinstance(module, nn.Sequential):
        is_pooled = is_pooled or any(_pools_globally(child) for _, child in children)
    for name, child in children:
        if not isinstance(child, nn.BatchNorm2d | nn.InstanceNorm2d | nn.InstanceNorm3d):
            _replace_norm(child, is_pooled)
            continue
        count = child.num_features
        norm = nn.GroupNorm(1, count) if is_pooled else InstanceNorm(count)
        more = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
        setattr(module, name, nn.Sequential(norm, *more) if more else norm)


def _pools_globally(module: nn.Module) -> bool:
    """Tell whether a module leaves one pixel."""
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _replace_pointwise(module: nn.Module) -> bool:
    """Put this file's convolution of kernel size 1 in the place of torch's.

    Not if a strided one does more than torch's, and so has to stay as it is: then channels last
    are not safe, which is what is returned.
    """
    convs = [c for c in module.modules() if isinstance(c, nn.Conv2d | nn.Conv3d)]
    pointwise = [conv for conv in convs if set(conv.kernel_size) == {1}]
    plain = [c for c in pointwise if type(c) in (nn.Conv2d, nn.Conv3d) and c.groups == 1]
    if any(max(conv.stride) > 1 for conv in set(pointwise) - set(plain)):
        return False
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d | nn.Conv3d) and child in plain:
                setattr(parent, name, PointwiseConv(child))
    return True


def arrange(image: Tensor) -> Tensor:
    """Return an image (B, C, I, J[, K]) in the memory layout that convolutions are fast in.

    Channels last, but not in 2D on a CPU in float32, where it is no faster. A copy, since
    contiguous() would leave one channel as it is, and with it the first block.
    """
    if image.ndim == 4 and not image.is_cuda and not torch.is_autocast_enabled("cpu"):
        return image.contiguous()
    return torch.empty_like(image, memory_format=CHANNELS_LAST[image.ndim]).copy_(image)


def arrange_weights(network: nn.Module, precision: str) -> None:
    """Lay the weights of a network in 2D as its convolutions want them; in 3D they always are so.

    Else each convolution turns them, and their gradients back, in every step, which in bfloat16 is
    a tenth of it. In float32 on a CPU images in 2D have the layout of torch, and so have they.

    Args:
        network: In 2D or 3D, in any layout.
        precision: float32 or bfloat16, in which it computes.
    """
    for weight in network.parameters():
        if weight.ndim == 4:
            is_last = weight.is_cuda or precision == "bfloat16"
            layout = torch.channels_last if is_last else torch.contiguous_format
            weight.data = weight.data.contiguous(memory_format=layout)


def read_heads(given: Any, image: Tensor) -> list[Tensor]:
    """Return what any network gave for an image as a list of logits, full resolution first.

    Args:
        given: Logits (B, num_classes, I, J, K), or a list or tuple of them, of which later ones
            may have a lower resolution.
        image: The image (B, C, I, J, K).

    Raises:
        InputError: The network gave something else.
    """
    heads: list[Tensor] = list(given) if isinstance(given, list | tuple) else [given]
    sizes = [tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__ for h in heads]
    fits = [isinstance(h, Tensor) and h.ndim == image.ndim for h in heads]
    if not heads or not all(fits) or sizes[0][2:] != tuple(image.shape[2:]):
        raise InputError(
            f"the network gave {', '.join(map(str, sizes)) or 'nothing'} for an image "
            f"{tuple(image.shape)}; let its forward return logits (B, num_classes, I, J, K) on the "
            "grid of the image, or a list of them from full resolution downwards"
        )
    return heads


def build_network(spec: NetworkSpec, download: bool = False) -> SegmentationNetwork:
    """Build a network with fresh weights from torch's global random state.

    Args:
        spec: The specification.
        download: Whether a pretrained encoder fetches its first weights; a network whose weights
            are loaded afterwards needs none.

    Raises:
        InputError: The specification names what cannot be built, or the download failed.
    """
    if spec.name != "dynunet":
        return EncoderNetwork(spec, download)
    network = DynamicUNet(spec)
    is_flat = len(spec.strides[0]) == 2
    return network if is_flat else network.to(memory_format=torch.channels_last_3d)
