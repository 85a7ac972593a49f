"""A model folder and a scan in, probs and mask on the scan's own grid out.

Axes: B batch, C channels, I J K voxel axes. A network in 2D sees a scan slice by slice: the slices
along its slice axis are a batch, and their logits are stacked to a volume again.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from medssl import __version__
from medssl.beside import RESERVE, WRITE_BYTES, begin, has_room, read_ahead
from medssl.config import LARGEST_LABEL, Fidelity, InputError
from medssl.data.files import hash_source
from medssl.data.io import (
    CONTRADICTIONS,
    find_contradictions,
    read_geometry,
    read_image,
    write_map,
    write_mask,
)
from medssl.data.predictions import (
    AUDIT,
    PlannedPredictions,
    Record,
    SomeFailedError,
    append_audit,
    locate_files,
    plan_predictions,
    read_audit,
)
from medssl.data.trained import resolve_model
from medssl.formats.readers import get_reader
from medssl.machine import (
    count_free_memory,
    explain_out_of_memory,
    has_bfloat16,
    is_out_of_memory,
)
from medssl.networks.build import (
    NetworkSpec,
    SegmentationNetwork,
    arrange_weights,
    build_network,
)
from medssl.networks.noise import sample_dropout
from medssl.plan import Plan
from medssl.pseudo.uncertainty import combine_slab, entropy_of, refuse_equal
from medssl.runs import (
    FULL_DISK_ERRORS,
    hash_file,
    hash_files,
    hash_json,
    read_record,
    remove_leftovers,
    reserve_space,
    seed_from,
    tell_full_disk,
    write_file,
    write_json,
)
from medssl.transforms.geometry import Affine, Box, Header, Shape, Volume, WayBack
from medssl.transforms.preprocess import (
    Preprocessing,
    count_bytes,
    is_ct_moved,
    measure_percentiles,
    preprocess_image,
)
from medssl.windows import (
    MOST_PARTS,
    Window,
    align_slabs,
    find_device,
    slide_turned,
    slide_window,
)

WEIGHTS = "weights.safetensors"
MC_PASSES = 8
FAST_VIEWS = 2  # whole passes that all passes of fidelity fast take the time of; slabs less
Size = Annotated[int, Field(ge=1, le=8192)]  # of a window, in voxels
Value = Annotated[int, Field(ge=0, le=LARGEST_LABEL)]
Axis = Annotated[int, Field(ge=0, le=2)]
Precision = Annotated[str, Field(pattern="^(float32|bfloat16)$")]
SLAB_BYTES = RESERVE // 2  # of the slabs that are held at once; a scan with larger ones is cut

Walk = Callable[[Box], Iterator[Tensor]]
"""Yields slabs (n, I, J, K) of a part of the cache grid, in order along `Window.find_axis`."""

Advance = Callable[[int], object]
"""Is told how many windows have gone through a network."""


class ModelInfo(BaseModel):
    """What stands in model.json; with the weights it is all that prediction needs, ever.

    ``intensity_range`` holds, per channel, the lowest 0.5 and highest 99.5 percentile of the
    training scans; ``spacing_range`` the smallest and largest value in mm of a scan's finest,
    middle and coarsest spacing, empty where they had none (``has_spacing``). A network in 2D has a
    ``slice_axis``, along which it sees slices, and a ``patch_size`` of the two other axes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    network: NetworkSpec
    labels: dict[int, str]
    label_values: tuple[Value, ...]
    channels: tuple[str, ...]
    palette: dict[int, tuple[int, int, int]] = {}
    preprocessing: Preprocessing
    patch_size: tuple[Size, ...]
    slice_axis: Literal[0, 1, 2] | None = None
    has_spacing: bool = True
    flips: tuple[Axis, ...]
    precision: Precision
    intensity_range: tuple[tuple[float, float], ...] = ()
    spacing_range: tuple[tuple[float, float], ...] = ()
    provenance: dict[str, Any] = {}

    @property
    def window(self) -> Window:
        """How the network is moved over a scan, averaged over mirrorings."""
        return Window(self.patch_size, self.precision, self.flips, self.slice_axis)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse numbers of classes, channels or axes that contradict each other."""
        for name, expected, counts in (
            ("classes", self.network.num_classes, (len(self.labels), len(self.label_values))),
            ("channels", self.network.in_channels, (len(self.channels),)),
            ("channels", self.network.in_channels, (len(self.preprocessing.normalization),)),
        ):
            if set(counts) != {expected}:
                raise ValueError(f"the network has {expected} {name}, described are {counts}")
        if len(self.patch_size) != (3 if self.slice_axis is None else 2):
            raise ValueError(
                f"patch_size {self.patch_size} does not fit slice_axis {self.slice_axis}"
            )
        strides = [math.prod(steps) for steps in zip(*self.network.strides, strict=True)]
        bad = [size for size, step in zip(self.patch_size, strides, strict=False) if size % step]
        if bad or len(strides) not in (0, len(self.patch_size)):
            raise ValueError(f"patch_size {self.patch_size} does not fit the strides {strides}")
        if sorted(self.labels) != list(range(len(self.labels))):
            raise ValueError(f"labels are named 0, 1, ..., got {sorted(self.labels)}")
        for name, values in (("flips", self.flips), ("label_values", self.label_values)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values}: one stands twice")
        for low, high in (*self.intensity_range, *self.spacing_range):
            if not -math.inf < low <= high < math.inf:
                raise ValueError(f"a range goes from {low} to {high}")
        return self


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with everything that its use needs."""

    network: SegmentationNetwork
    info: ModelInfo
    device: torch.device


@dataclass(frozen=True)
class PreparedScan:
    """A scan as a network sees it, and what has to be known of the scan's own grid.

    ``image`` (1, C, I, J, K) float32 on the cache grid, which ``affine`` (4, 4) places;
    ``native_shape`` and ``native_affine`` are those of the scan; the rest as in `Prediction`.
    """

    image: Tensor
    affine: Affine
    native_shape: Shape
    native_affine: Affine
    flags: tuple[str, ...]
    header: Header | None


@dataclass(frozen=True)
class Prediction:
    """What a model says of one scan, on the scan's grid.

    ``mask`` (I, J, K) uint8 class indices; ``probs`` (num_classes, I, J, K) float32,
    or None; ``uncertainty`` (I, J, K) float32 in nats, or None; ``flags`` are sentences about what
    lies outside of the training range; ``header`` places the scan's voxels, None for a picture.
    """

    mask: NDArray[np.uint8]
    affine: NDArray[np.float64]
    probs: NDArray[np.float32] | None
    uncertainty: NDArray[np.float32] | None
    flags: tuple[str, ...]
    header: Header | None = None


def describe_model(plan: Plan, provenance: dict[str, Any], **ranges: Any) -> ModelInfo:
    """Return what a model folder of this plan says about itself."""
    return ModelInfo(
        network=plan.network,
        labels=plan.labels,
        label_values=plan.label_values,
        palette=plan.palette,
        channels=plan.channels,
        preprocessing=plan.preprocessing,
        patch_size=plan.patch_size,
        slice_axis=plan.slice_axis,
        has_spacing=plan.has_spacing,
        flips=plan.flips,
        precision=plan.precision,
        provenance=provenance,
        **ranges,
    )


def save_model(folder: Path, network: SegmentationNetwork, info: ModelInfo) -> None:
    """Write a model folder; model.json comes last, so that its existence means whole."""
    weights = {key: value.detach().cpu().contiguous() for key, value in _unshare(network).items()}
    write_file(folder / WEIGHTS, lambda path: save_file(weights, path))
    about = {**info.provenance, **hash_files(folder, WEIGHTS)}
    info = info.model_copy(update={"provenance": about})
    write_json(folder / "model.json", info.model_dump(mode="json"))


def _unshare(network: SegmentationNetwork) -> dict[str, Tensor]:
    """Return the weights once each: DynUNet names most of its blocks twice."""
    addresses: dict[int, str] = {}
    result = {}
    for key, value in network.state_dict().items():
        if value.data_ptr() not in addresses:
            addresses[value.data_ptr()] = key
            result[key] = value
    return result


def check_weights(folder: Path) -> ModelInfo:
    """Return what stands in model.json, if the weights beside it are those that it was written for.

    Raises:
        InputError: They have changed since, or one of the two cannot be read.
    """
    info, path = read_record(folder / "model.json", ModelInfo), folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: is missing; copy the whole model folder again")
    if info.provenance.get(WEIGHTS) not in (None, hash_file(path)):
        raise InputError(
            f"{path}: not the weights that this model was saved with: truncated or changed since; "
            "copy the model again; of a round, delete its model folder: the same medssl train "
            "command makes it anew from its checkpoint"
        )
    return info


def load_model(path: Path, device: str = "cpu") -> Model:
    """Load a model for prediction.

    Args:
        path: A run, one of its rounds, a model folder, or its zip.
        device: Torch device.

    Raises:
        InputError: There is no model, or it is damaged or of another format.
    """
    folder = resolve_model(path)
    info = check_weights(folder)
    if info.precision == "bfloat16" and not has_bfloat16(device):
        info = info.model_copy(update={"precision": "float32"})
    try:
        network = build_network(info.network)
        weights = load_file(folder / WEIGHTS)
        missing, unknown = network.load_state_dict(weights, strict=False)
    except Exception as error:  # safetensors and torch have no common error class
        raise InputError(f"{folder}: the weights cannot be read: {error}") from error
    loaded = {value.data_ptr() for key, value in network.state_dict().items() if key in weights}
    absent = [key for key in missing if network.state_dict()[key].data_ptr() not in loaded]
    if absent or unknown:
        raise InputError(
            f"{folder}: weights do not fit model.json: missing {absent}, unknown {unknown}"
        )
    network.to(device).eval()
    arrange_weights(network, info.precision)
    return Model(network, info, torch.device(device))


def predict_logits(network: SegmentationNetwork, image: Tensor, window: Window) -> Tensor:
    """Return the logits (1, num_classes, I, J, K) float32 of an image (1, C, I, J, K)."""
    return _gather(slide_window(network, image, window), image, window)


def predict_probs(network: SegmentationNetwork, image: Tensor, window: Window) -> Tensor:
    """Return probs (1, num_classes, I, J, K), averaged over all mirrorings of the window."""
    return _gather(average_views(network, image, window), image, window)


def mirror_views(
    network: SegmentationNetwork, image: Tensor, window: Window, box: Box | None = None
) -> list[Iterator[Tensor]]:
    """Return walks over slabs of probs (num_classes, I, J, K), one a mirroring of the window."""
    views = [slide_window(network, image, window, axes, box) for axes in window.mirrorings]
    return [(torch.softmax(slab, 0) for slab in view) for view in views]


def _gather(slabs: Iterable[Tensor], image: Tensor, window: Window) -> Tensor:
    """Return slabs (C, I, J, K) of an image as one (1, C, I, J, K), on its device."""
    axis, start = window.find_axis(image.shape[2:]), 0
    whole: Tensor | None = None
    for slab in slabs:
        if whole is None:
            whole = torch.empty((1, len(slab), *image.shape[2:]), device=image.device)
        whole[0].narrow(1 + axis, start, slab.shape[1 + axis]).copy_(slab)
        start += slab.shape[1 + axis]
    assert whole is not None, "every image has a slab"
    return whole


def average_views(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    box: Box | None = None,
    advance: Advance = int,
) -> Iterator[Tensor]:
    """Yield slabs of probs (num_classes, I, J, K), averaged over the mirrorings of the window.

    The arguments are those of `sample_uncertainty`.
    """
    axes = window.mirrorings
    views = [slide_window(network, image, window, view, box, advance) for view in axes]
    for slabs in align_slabs(views, window.find_axis(image.shape[2:])):
        total = torch.softmax(slabs[0], dim=0)
        for slab in slabs[1:]:
            total += torch.softmax(slab, dim=0)
        yield total / len(axes)


def sample_uncertainty(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    passes: int,
    box: Box | None = None,
    advance: Advance = int,
) -> Iterator[Tensor]:
    """Yield slabs (2, I, J, K) of predictive entropy and mutual information of MC dropout.

    Args:
        network: The network.
        image: (1, C, I, J, K).
        window: How it is moved over the image; its flips do not count.
        passes: How many.
        box: The part of the image that is wanted; None for all of it.
        advance: Is told how many windows have gone through the network.

    Raises:
        InputError: The network has no active dropout, or the passes do not differ.

    Source: Gal and Ghahramani 2016; Gal 2016, equations 3.24 (mutual information).
    """
    spread = 0.0
    with sample_dropout(network):
        views = [slide_window(network, image, window, (), box, advance) for _ in range(passes)]
        for slabs in align_slabs(views, window.find_axis(image.shape[2:])):
            draws = (torch.softmax(slab, dim=0)[None] for slab in slabs)
            _, entropy, information, differ = combine_slab(draws)
            spread = max(spread, float(differ))
            yield torch.cat([entropy[0], information[0]])
    refuse_equal(spread, f"MC dropout ({passes} passes)")


class _Passes(SegmentationNetwork):
    """Clean logits and, as one channel more, the variance of logits over passes that stop low."""

    def __init__(self, network: SegmentationNetwork, passes: int) -> None:
        super().__init__()
        self.network, self.passes = network, passes

    def forward(self, image: Tensor) -> Tensor:
        """Return logits and variance (B, num_classes + 1, I, J, K) of an image (B, C, I, J, K)."""
        logits, draws = self.network.forward_passes(image, self.passes)
        drawn = torch.stack(draws).float()
        drawn -= drawn.mean(2, keepdim=True)  # a shift of all classes says nothing
        variance = drawn.var(0).sum(1, keepdim=True) / (drawn.shape[2] - 1)
        if variance.shape[2:] != image.shape[2:]:
            mode = "trilinear" if image.ndim == 5 else "bilinear"
            variance = F.interpolate(variance, image.shape[2:], mode=mode)
        return torch.cat([logits.float(), variance], 1)


def estimate_uncertainty(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    passes: int,
    box: Box | None = None,
    advance: Advance = int,
) -> Iterator[Tensor]:
    """Yield what `sample_uncertainty` does, in about the time of two passes.

    All passes share a clean encoder, drop behind it and stop low in the decoder. There the variance
    v of a logit over the passes is small work, and smooth; with the clean probs p the mutual
    information is v/2 (1 - sum p^2), and the predictive entropy H(p) and that. The arguments and
    errors are those of `sample_uncertainty`.

    Source: Gal 2016, equation 3.24, H(p_bar) = mean H(p_t) + mutual information. Departure: H(p)
        of the clean pass stands for mean H(p_t), and the mutual information is its expansion to
        second order for deviations that are independent and alike in all classes.
    """
    spread = 0.0
    several = _Passes(network, passes)

    def count(number: int) -> None:
        advance(FAST_VIEWS * number)

    for slab in slide_window(several, image, window, (), box, count):
        probs, variance = torch.softmax(slab[:-1], 0), slab[-1:]
        spread = max(spread, float(variance.max()))
        most = math.log(len(probs))
        information = (variance / 2 * (1 - probs.square().sum(0))).clamp(0.0, most)
        entropy = (entropy_of(probs[None])[0] + information).clamp(max=most)
        yield torch.cat([entropy, information])
    refuse_equal(spread, f"MC dropout ({passes} passes)")


SAMPLERS = {"full": sample_uncertainty, "fast": estimate_uncertainty}


def count_views(passes: int, fidelity: Fidelity) -> int:
    """Return how many whole passes take the time of MC dropout, and slabs beside each other."""
    return passes if fidelity == "full" else FAST_VIEWS


def sample_probs(
    networks: Sequence[SegmentationNetwork],
    image: Tensor,
    window: Window,
    turns: Sequence[NDArray[np.float64]],
    box: Box | None = None,
) -> Iterator[list[Tensor]]:
    """Yield slabs of the probs (num_classes, I, J, K) of passes with dropout, seen from elsewhere.

    The first pass sees the image as it is, each other one under a turn of its own, which is taken
    back; what it turned out of the image is as in the first pass. Several networks take turns.

    Args:
        networks: Of an ensemble, or one.
        image: (1, C, I, J, K).
        window: How they are moved over the image; its flips do not count.
        turns: A matrix of ``draw_turn`` for each pass after the first.
        box: The part of the image that is wanted; None for all of it.

    Raises:
        InputError: A network has no active dropout.

    Source: Wang et al. 2019, Aleatoric uncertainty estimation with test-time augmentation; Gal and
        Ghahramani 2016 (dropout). Departure: each window is turned about its own center.
    """
    with contextlib.ExitStack() as dropouts:
        for network in networks:
            dropouts.enter_context(sample_dropout(network))
        still = slide_window(networks[0], image, window, (), box)
        views = [
            slide_turned(networks[number % len(networks)], image, window, turn, box)
            for number, turn in enumerate(turns, start=1)
        ]
        for first, *others in align_slabs([still, *views], window.find_axis(image.shape[2:])):
            probs = torch.softmax(first, 0)
            rest = ((slab, (1 - slab.sum(0)).clamp(min=0.0)) for slab in others)
            yield [probs, *(slab + share * probs for slab, share in rest)]


_NO_MEMORY = "the scan does not fit the memory; cut it, or use a machine with more"


@explain_out_of_memory(_NO_MEMORY)
def prepare_scan(info: ModelInfo, images: tuple[Path, ...]) -> PreparedScan:
    """Read a scan, and preprocess it as a model wants it.

    Args:
        info: Of the model.
        images: One file per channel, or one 4D file.

    Raises:
        InputError: The scan cannot be read or preprocessed, or the memory does not suffice.
    """
    return prepare_volume(info, read_image(images, len(info.channels)))


def prepare_volume(info: ModelInfo, volume: Volume) -> PreparedScan:
    """Preprocess a scan that was read, whose voxels are written over, as a model wants it.

    Raises:
        InputError: It cannot be preprocessed.
    """
    flags = find_flags(info, volume)
    place = (volume.shape, volume.affine, flags, volume.header)
    prepared = preprocess_image(volume, info.preprocessing, overwrite=True)
    return PreparedScan(torch.from_numpy(prepared.array)[None], prepared.affine, *place)


@explain_out_of_memory(_NO_MEMORY)
def predict_case(
    model: Model,
    images: tuple[Path, ...],
    passes: int = 0,
    probs_in: Path | None = None,
    advance: Advance = int,
    fidelity: Fidelity = "full",
    scan: PreparedScan | None = None,
) -> Prediction:
    """Segment one scan and bring the result back to its own grid, slab by slab.

    Args:
        model: A loaded model.
        images: One file per channel, or one 4D file.
        passes: MC dropout passes for the uncertainty map; 0 for none.
        probs_in: A folder with room for the probs, which are mapped from a file there that has no
            name; None: they are not kept.
        advance: Is told how many windows have gone through the network.
        fidelity: Of the passes, by `sample_uncertainty` or, fast, by `estimate_uncertainty`.
        scan: What `prepare_scan` returned for the images; None: they are read now.

    Raises:
        InputError: A file cannot be read, has other channels than the model, or needs more memory
            than there is; or there is no room for the probs on the disk.
        FloatingPointError: The network gave non-finite logits; no mask may be made of them.
    """
    info = model.info
    scan = scan or prepare_scan(info, images)
    image, shape, affine = scan.image, scan.native_shape, scan.native_affine
    i, j, k = image.shape[2:]
    way = WayBack((i, j, k), scan.affine, shape, affine)
    window = info.window
    mask = np.empty(shape, np.uint8)
    classes = info.network.num_classes
    probs: NDArray[np.float32] | None = None
    for box, slab in predict_native(model.network, image, window, way, classes, advance=advance):
        mask[box] = slab.argmax(0)
        if probs_in is not None:
            if probs is None:
                probs = _map_probs(probs_in, (classes, *shape))
            probs[(slice(None), *box)] = slab
    uncertainty = None
    if passes:
        uncertainty = np.empty(shape, np.float32)
        options = (classes, passes, advance, fidelity)
        native = predict_native(model.network, image, window, way, *options)
        for box, slab in native:
            uncertainty[box] = slab[0]
    return Prediction(mask, affine, probs, uncertainty, scan.flags, scan.header)


def _map_probs(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array on the disk, which is gone with the last that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tell_full_disk(folder / "probs"), tempfile.TemporaryFile(dir=folder) as file:
        reserve_space(file, 4 * math.prod(shape))
        return np.memmap(file, np.float32, "r+", shape=shape)


def predict_native(
    network: SegmentationNetwork,
    image: Tensor,
    window: Window,
    way: WayBack,
    num_classes: int,
    passes: int = 0,
    advance: Advance = int,
    fidelity: Fidelity = "full",
) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    """Yield what a network says of a scan, box by box of the scan's own grid.

    A scan whose slabs do not fit the memory is cut into parts, each of which repeats the windows
    that it shares with its neighbor; where memory runs out all the same, into twice as many.

    Args:
        network: The network.
        image: (1, C, I, J, K) on the cache grid.
        window: How it is moved over the image.
        way: From the cache grid to that of the scan.
        num_classes: C, with background.
        passes: Of MC dropout, whose entropy and mutual information are yielded, in nats; 0 for the
            probs of the network, averaged over the mirrorings of the window.
        advance: Is told how many windows have gone through the network.
        fidelity: Of the passes, by `sample_uncertainty` or, fast, by `estimate_uncertainty`.

    Yields:
        A box of the scan's grid, and its probs (num_classes, I, J, K), or both maps (2, I, J, K).

    Raises:
        InputError: All passes are the same, or the network has no active dropout.
    """
    walk: Walk = partial(average_views, network, image, window, advance=advance)
    if passes:
        torch.manual_seed(seed_from("mc_dropout"))  # the same scan gets the same map
        walk = partial(SAMPLERS[fidelity], network, image, window, passes, advance=advance)
    num_views = count_views(passes, fidelity) if passes else len(window.mirrorings)
    yield from bring_boxes(walk, window, way, num_classes, num_views, find_device(network, image))


def bring_boxes(
    walk: Walk,
    window: Window,
    way: WayBack,
    num_classes: int,
    num_views: int,
    device: torch.device,
) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    """Yield what walks over the cache grid of a scan say, box by box of the scan's own grid.

    Args:
        walk: Of `average_views`, or another that yields slabs (n, I, J, K) of a part of the scan.
        window: How a network is moved over the scan.
        way: From the cache grid to that of the scan.
        num_classes: C, with background.
        num_views: Whose slabs are held beside each other.
        device: Where they are.
    """
    axis, cut = window.find_axis(way.shape), window.find_cut(way.shape)
    waiting = list(way.cut(cut, choose_parts(window, way, num_classes, num_views, device)))
    while waiting:
        slabs = walk(way.find_source(waiting[0]))
        try:
            arrays = (slab.cpu().numpy() for slab in slabs)
            yield from way.stream(arrays, axis, waiting[0])
            del waiting[0]
            continue
        except (MemoryError, RuntimeError) as error:
            halves = list(way.cut(cut, 2, waiting[0]))
            if not is_out_of_memory(error) or len(halves) < 2 or len(waiting) >= MOST_PARTS:
                raise
        del slabs, arrays
        waiting[:1] = halves


def choose_parts(
    window: Window, way: WayBack, num_classes: int, num_views: int, device: torch.device
) -> int:
    """Return into how many parts a scan is cut so that its slabs leave half of the memory free."""
    limit = min(SLAB_BYTES, count_free_memory(str(device)) / 2)
    return window.choose_parts(way.shape, num_classes, num_views, limit)


def find_flags(info: ModelInfo, volume: Volume) -> tuple[str, ...]:
    """Return sentences on what of a scan lies outside of what the model was trained on."""
    contradictions = find_contradictions(volume)
    flags = [
        f"{CONTRADICTIONS[kind]}: {what}".rstrip(": ") for kind, what in contradictions.items()
    ]
    if volume.has_spacing != info.has_spacing:
        scan, others = ("has a", "had none") if volume.has_spacing else ("has no", "had one")
        flags.append(f"the scan {scan} spacing, the training scans {others}: sizes may not fit")
    for spacing, (low, high) in zip(sorted(volume.spacing), info.spacing_range, strict=False):
        if not 0.67 * low <= spacing <= 1.5 * high:
            flags.append(
                f"spacing {spacing:.3g} mm is outside the training range {low:.3g}-{high:.3g}"
            )
    measured = measure_percentiles(volume)
    for channel, ((low, high), (bottom, _, top)) in enumerate(
        zip(info.intensity_range, measured, strict=False)
    ):
        width = max(high - low, 1e-6)
        if is_ct_moved((bottom, top), (low, high)):
            flags.append(
                f"channel {channel}: intensities {bottom:.4g} to {top:.4g} lie about 1000 off the "
                f"training range {low:.4g} to {high:.4g}: one of the two is in Hounsfield units, "
                "the other not (RescaleIntercept)"
            )
        elif bottom < low - width or top > high + width or top - bottom < 0.05 * width:
            flags.append(
                f"channel {channel}: intensities {bottom:.4g} to {top:.4g} are far from the "
                f"training range {low:.4g} to {high:.4g}"
            )
    return tuple(flags)


def predict_files(
    model: Model,
    inputs: Sequence[Path],
    out: Path,
    *,
    probs: bool = False,
    uncertainty: bool = False,
    fidelity: Fidelity = "full",
    overwrite: bool = False,
    format: str | None = None,
    num_windows: int = 0,
    finished: Collection[str] = (),
    report: Callable[[str], object] = print,
) -> None:
    """Segment files and folders of scans; one mask each, and predictions.json.

    Args:
        model: A loaded model.
        inputs: NIfTI files or pictures, or folders of them; with several channels, files that end
            in _0000, _0001, ..., one 4D file, or pictures in color. Data sets and lists of cases
            as `medssl train` reads them.
        out: Folder of <scan>.nii.gz, and of <scan>_probs and <scan>_uncertainty if asked for. The
            mask of a picture has its format (PNG for a JPEG), its maps are TIFF files. What stands
            there and was not written by a prediction, was changed since, or is the mask of another
            scan, is not replaced.
        probs: Write class probabilities, (I, J, K, num_classes); a TIFF has the pages (C, K).
        uncertainty: Write the predictive entropy of MC dropout, in nats.
        fidelity: Of its passes, by `sample_uncertainty` or, fast, by `estimate_uncertainty`.
        overwrite: Replace what stands there all the same; scans never are.
        format: Of the masks, one of `medssl.formats.readers.FORMATS`; None: that of each scan.
        num_windows: Of all scans, for a bar on a terminal; 0 for none.
        finished: Scans that are passed over, see `find_finished`.
        report: Is told of every file.

    Raises:
        SomeFailedError: Some scans could not be segmented: all of these are named after the others
            were written.
        InputError: No scan was found or could be segmented, or files would be replaced.
    """
    maps = ["probs"] * probs + ["uncertainty"] * uncertainty
    channels = len(model.info.channels)
    plan = plan_predictions(inputs, out, channels, maps=maps, overwrite=overwrite, format=format)
    for note in plan.notes:
        report(f"note: {note}")
    remove_leftovers(out, is_shared=True, below=False)
    bar = show_bar(num_windows)
    outputs = _Outputs(model, plan, (probs, uncertainty, fidelity), out, bar, report)

    def segment(images: tuple[Path, ...], get: Callable[[], PreparedScan]) -> Prediction:
        return predict_case(
            model,
            images,
            passes=MC_PASSES if uncertainty else 0,
            probs_in=out if probs else None,
            advance=bar.update,
            fidelity=fidelity,
            scan=get(),
        )

    left = [name for name in plan.scans if name not in finished]
    try:
        for name, get in read_ahead(
            left,
            lambda name: prepare_scan(model.info, plan.scans[name]),
            lambda name: _may_read(model.info, plan.scans[name]),
        ):
            outputs.add(name, partial(segment, plan.scans[name], get))
    finally:
        outputs.close()
    if problems := outputs.problems:
        total = len(plan.scans) + len(plan.problems)
        listed = "\n".join(f"  - {problem}" for problem in problems)
        kind = SomeFailedError if len(problems) < total else InputError
        raise kind(f"{len(problems)} of {total} scans were not segmented:\n{listed}")


def _may_read(info: ModelInfo, images: tuple[Path, ...]) -> bool:
    """Return whether there is memory to read a scan while another one is segmented."""
    try:
        return has_room(count_bytes(*read_geometry(images[0]), info.preprocessing))
    except Exception:  # whatever it is, reading the scan says so
        return True


class _Outputs:
    """Writes what a model says of scans, in their order, and notes what goes wrong with them.

    A result is written while the next scan is segmented, if there is memory. Not so one with probs,
    since those of two scans would have to find room on the disk.
    """

    def __init__(
        self,
        model: Model,
        plan: PlannedPredictions,
        options: tuple[bool, bool, Fidelity],
        out: Path,
        bar: tqdm[Any],
        report: Callable[[str], object],
    ) -> None:
        self.model, self.plan, self.options, self.out = model, plan, options, out
        self.bar, self.report = bar, report
        self.problems, self.is_full = list(plan.problems), False
        self.record = Record(out)
        self.writing: list[Future[None]] = []  # of the last scan

    def add(self, name: str, segment: Callable[[], Prediction]) -> None:
        """Segment a scan, unless the disk is full, and begin to write what is said of it."""
        prediction, error = None, None
        try:
            prediction = None if self.is_full else segment()
        except Exception as caught:  # whatever it is, it is this scan's: the others go on
            error = caught
        self._finish()
        if self.is_full:
            image = self.plan.scans[name][0]
            self.problems.append(f"{image}: not tried, since there is no room for its mask")
        elif prediction is None:
            assert error is not None, "there is one of both"
            self._fail(name, error)
        else:
            voxels, has_probs = prediction.mask.size, prediction.probs is not None
            self.writing = [begin(partial(self._write, name, prediction))]
            if has_probs or not has_room(WRITE_BYTES * voxels):
                self._finish()

    def _write(self, name: str, prediction: Prediction) -> None:
        """Write what is said of a scan, and what goes wrong with that."""
        probs, uncertainty, fidelity = self.options
        mask = self.plan.masks[name]
        try:
            written = _write_prediction(self.model.info, mask, name, prediction, probs, self.record)
            images = self.plan.scans[name]
            about = identify_prediction(self.model, images, uncertainty, fidelity)
            about["places"] = locate_files(images)
            append_audit(self.out / AUDIT, scan=name, **about, output=written)
        except Exception as error:
            self._fail(name, error)
            return
        with self.bar.external_write_mode():
            self.report(f"{mask}" + "".join(f"\n  note: {flag}" for flag in prediction.flags))

    def _fail(self, name: str, error: Exception) -> None:
        """Note what went wrong with a scan."""
        image = self.plan.scans[name][0]
        self.problems.append(f"{image}: {explain_failure(error)}")
        with self.bar.external_write_mode():
            self.report(f"{image}: no mask, see below")
        self.is_full = getattr(error.__cause__, "errno", None) in FULL_DISK_ERRORS

    def _finish(self) -> None:
        """Wait until the last result is written."""
        for writing in self.writing:
            writing.result()

    def close(self) -> None:
        """Write what has not been written yet."""
        try:
            self._finish()
        finally:
            self.bar.close()
            with contextlib.suppress(*[InputError] * self.is_full):  # of that disk all is said
                self.record.write()


def show_bar(num_windows: int) -> tqdm[Any]:
    """Return a bar of windows with the remaining time, which is silent but on a terminal."""
    is_visible = num_windows and sys.stderr.isatty()
    return tqdm(total=num_windows, unit="window", dynamic_ncols=True, disable=not is_visible)


def explain_failure(error: Exception) -> str:
    """Return what went wrong with a scan; of what nobody foresaw, the kind of error too."""
    foreseen = isinstance(error, InputError | FloatingPointError)
    return str(error) if foreseen else f"{type(error).__name__}: {error}"


def _write_prediction(
    info: ModelInfo, mask: Path, name: str, prediction: Prediction, probs: bool, record: Record
) -> dict[str, str]:
    """Write the maps and then the mask of a scan, record them, and return their hashes."""
    out = mask.parent
    suffix = get_reader(mask).map_suffix
    files = [mask]
    if probs:
        files.append(out / f"{name}_probs{suffix}")
        assert prediction.probs is not None, "asked for"
        write_map(
            files[-1], np.moveaxis(prediction.probs, 0, -1), prediction.affine, prediction.header
        )
    if prediction.uncertainty is not None:
        files.append(out / f"{name}_uncertainty{suffix}")
        write_map(files[-1], prediction.uncertainty, prediction.affine, prediction.header)
    place = (prediction.mask, prediction.affine, info.label_values)
    names = [info.labels[index] for index in range(len(info.label_values))]
    write_mask(mask, *place, header=prediction.header, origin="prediction", names=names)
    labels = {str(v): info.labels[i] for i, v in enumerate(info.label_values)}
    flags = {name: prediction.flags}
    return record.add_files(files, labels=labels, model=info.provenance, flags=flags)


def find_finished(
    model: Model,
    plan: PlannedPredictions,
    out: Path,
    uncertainty: bool = False,
    fidelity: Fidelity = "full",
) -> list[str]:
    """Return the scans whose files stand as this model has written them, and would again.

    The audit log knows of each prediction the hashes of model, settings, scan and files. All of
    them, the version of medssl, and the files as they are now have to agree.

    Args:
        model: A loaded model.
        plan: What is to be read and written.
        out: Folder of the masks.
        uncertainty: Whether the uncertainty of MC dropout is written.
        fidelity: Of its passes.
    """
    entries = {entry.get("scan"): entry for entry in read_audit(out / AUDIT)}
    finished = []
    for name, images in plan.scans.items():
        entry = entries.get(name, {})
        output, known = entry.get("output"), entry.get("model") is not None
        if not (known and isinstance(output, dict) and entry.get("medssl") == __version__):
            continue
        with contextlib.suppress(InputError, OSError):
            if all(output.get(f.name) == hash_file(f) for f in plan.files[name]):
                same = identify_prediction(model, images, uncertainty, fidelity)
                finished += [name] * all(entry.get(key) == value for key, value in same.items())
    return finished


def identify_prediction(
    model: Model, images: Sequence[Path], uncertainty: bool = False, fidelity: Fidelity = "full"
) -> dict[str, Any]:
    """Return the hashes of the model, settings and files of a prediction, and on what it ran.

    Raises:
        InputError: A file cannot be read.
    """
    settings = model.info.model_dump(mode="json", exclude={"provenance"})
    device = model.device.type  # whichever of several alike
    settings |= {"uncertainty": uncertainty, "device": device}
    if uncertainty and fidelity != "full":  # masks of before there was a choice stay finished
        settings["fidelity"] = fidelity
    about = {"device": str(model.device), "precision": model.info.precision}
    sources = [{"file": path.name, "sha256": hash_source(path)} for path in images]
    weights = model.info.provenance.get(WEIGHTS)
    return {"model": weights, "settings": hash_json(settings), **about, "input": sources}
