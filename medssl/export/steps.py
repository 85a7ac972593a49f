"""What a model does before and after its network, as transforms of MONAI.

This file travels in every exported bundle, as scripts/steps.py, with `medssl.transforms.geometry`
and `medssl.transforms.normalize`: there it runs without medssl. Those are the steps that MONAI has
none of the same result for. Its `Spacing` lays another grid over a scan, its `NormalizeIntensity`
knows no percentiles of the non-zero voxels, and its reader follows the qform where the voxel size
of the sform is not pixdim, and reads lengths in meters as millimeters.

Axes: B batch, C channels or classes, I J K voxel axes.
"""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.utils import convert_to_tensor, ensure_tuple
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from medssl.transforms.geometry import cache_grid, resample, to_native
from medssl.transforms.normalize import normalize

_NIFTI = (".nii.gz", ".nii")
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_MM = {1: 1e3, 3: 1e-3}  # xyzt_units: meter, micron
_PLACING = (
    *("xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def list_scans(folder: str, num_channels: int) -> list[dict[str, list[str]]]:
    """Return the scans of a folder, or a file alone, as ``image``: one file, or one a channel.

    Files of several channels end in _0000, _0001, ...

    Raises:
        ValueError: There is none, or one lacks a channel.
    """
    home = Path(folder)
    files = [home] if home.is_file() else sorted(home.iterdir())
    scans: dict[str, list[str]] = {}
    for file in (file for file in files if file.name.lower().endswith((*_NIFTI, *_PICTURES))):
        name = _strip(file)
        is_channel = num_channels > 1 and name[-5:-4] == "_" and name[-4:].isdigit()
        scans.setdefault(name[:-5] if is_channel else name, []).append(str(file))
    bad = {name: paths for name, paths in scans.items() if len(paths) not in (1, num_channels)}
    if bad or not scans:
        raise ValueError(f"{home}: wanted scans of {num_channels} channels, found {bad or 'none'}")
    return [{"image": paths} for paths in scans.values()]


def _strip(file: Path) -> str:
    """Return the name of a file without the suffix of a scan."""
    return next(
        file.name[: -len(s)] for s in (*_NIFTI, *_PICTURES) if file.name.lower().endswith(s)
    )


class LoadScand:
    """Read a file, or a list of them, as one scan (C, I, J, K) float32 with its affine, mm, RAS+.

    Args:
        key: Of the file (as MONAI Label gives it) or the list.
        num_channels: That the network takes.
    """

    def __init__(self, key: str, num_channels: int) -> None:
        self.key = key
        self.num_channels = num_channels

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the scan in the place of its files.

        Raises:
            ValueError: A file has other channels, voxels that are no finite numbers, or another
                place than its fellows, or a picture is one that programs read differently.
            OSError, EOFError, zlib.error: A file is damaged.
        """
        paths = [Path(path) for path in ensure_tuple(data[self.key])]
        each = self.num_channels if len(paths) == 1 else 1
        parts, affines = zip(*(_read(path, each) for path in paths), strict=True)
        array = np.concatenate(parts)
        if len(array) != self.num_channels or not np.isfinite(array).all():
            raise ValueError(
                f"{paths[0]}: wanted {self.num_channels} channels of finite numbers, found "
                f"{len(array)}, {np.count_nonzero(~np.isfinite(array))} voxels not finite"
            )
        if not all(np.allclose(affine, affines[0], atol=1e-3) for affine in affines):
            raise ValueError(f"{paths[0]}: its channels lie on different grids")
        name = _strip(paths[0])[: -5 if len(paths) > 1 else None]
        meta = {"file": str(paths[0]), "name": name}
        return {**data, self.key: MetaTensor(array, affine=affines[0], meta=meta)}


def _read(path: Path, num_channels: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return what a file holds (C, I, J, K), and its affine; a picture has none."""
    if path.name.lower().endswith(_PICTURES):
        with Image.open(path) as image:
            _refuse_other_views(path, image)
            pages = [_read_page(page, num_channels) for page in ImageSequence.Iterator(image)]
        return np.ascontiguousarray(np.moveaxis(np.stack(pages, -2), -1, 0)), np.eye(4)
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as file:  # to the end, where its checksum is compared
            while file.read(2**20):
                pass
    image = nib.load(path)
    values, proxy = image.dataobj.get_unscaled(), image.dataobj
    if (proxy.slope, proxy.inter) != (1, 0):
        values = values.astype(np.float64) * proxy.slope + proxy.inter
    shape = (*image.shape, 1)[:3]
    affine = np.array(image.affine, np.float64)
    affine[:3] *= _MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
    values = values.reshape((*shape, -1), order="F")
    return np.ascontiguousarray(np.moveaxis(values, -1, 0).astype(np.float32)), affine


def _refuse_other_views(path: Path, image: Any) -> None:
    """Refuse a picture that viewers turn, and a TIFF that has channels or times among its pages."""
    if image.getexif().get(274, 1) not in (0, 1):  # 274: orientation
        raise ValueError(f"{path}: its orientation tag has viewers turn it: save it upright")
    text = str(getattr(image, "tag_v2", {}).get(270, ""))  # the description of ImageJ, or OME-XML
    axes = re.findall(r'(?m)^(?:channels|frames)=(\d+)\s*$|\bSize[CT]="(\d+)"', text)
    if any(int(one or other) not in (1, len(image.getbands())) for one, other in axes):
        raise ValueError(f"{path}: its pages are channels or times: save one file a channel")


def _read_page(page: Any, num_channels: int) -> NDArray[np.float32]:
    """Return a page (I rows, J columns, C); what is gray in color passes for one channel."""
    if page.mode in ("P", "LA", "RGBA"):
        page = page.convert("RGBA")
        if len(set(page.getchannel("A").getextrema())) > 1:
            raise ValueError("a picture is partly transparent: save it without transparency")
        page = page.convert("RGB")
    array = np.asarray(page, np.float32).reshape(page.height, page.width, -1)
    is_gray = num_channels == 1 and (array == array[..., :1]).all()
    return array[..., :1] if is_gray else array


class ToGridd:
    """Normalize a scan and bring it to the grid that the network was trained on.

    Args:
        key: Of the scan (C, I, J, K).
        spacing: Of the grid along right, anterior, superior in mm; None keeps the scan's own.
        normalization: Arguments of `normalize` for each channel.
    """

    def __init__(
        self,
        key: str,
        spacing: Sequence[float | None],
        normalization: Sequence[Mapping[str, Any]],
    ) -> None:
        self.key = key
        i, j, k = spacing
        self.spacing = (i, j, k)
        self.normalization = normalization

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the scan on the grid; its own place goes into ``native`` of its meta."""
        scan = data[self.key]
        affine, (_, i, j, k) = scan.affine.numpy(), scan.shape
        pairs = zip(scan.as_tensor().numpy(), self.normalization, strict=True)
        array = np.stack([normalize(channel, **how) for channel, how in pairs])
        shape, grid = cache_grid((i, j, k), affine, self.spacing)
        array = resample(array, affine, shape, grid, "linear")
        meta = {"file": scan.meta["file"], "name": scan.meta["name"]}
        meta["native"] = ((i, j, k), affine)
        return {**data, self.key: MetaTensor(array, affine=grid, meta=meta)}


class MirroredInferer:
    """Give probs (B, num_classes, I, J, K), averaged over all mirrorings along some axes.

    Args:
        flips: Axes of the volume.
        slice_axis: Along which a network in 2D sees slices; None in 3D.
        precision: float32, or bfloat16, which is taken where the device computes in it.
        window: Arguments of `SlidingWindowInferer`.
    """

    def __init__(
        self,
        flips: Sequence[int] = (),
        slice_axis: int | None = None,
        precision: str = "float32",
        **window: Any,
    ) -> None:
        self.window = SlidingWindowInferer(**window)
        self.flips, self.slice_axis, self.precision = flips, slice_axis, precision

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the probs of images (B, C, I, J, K).

        Raises:
            FloatingPointError: The network gave logits that are not finite.
        """
        inputs, device = convert_to_tensor(inputs, track_meta=False), inputs.device
        is_short = self.precision == "bfloat16" and _has_bfloat16(device)

        def run(window: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_short):
                return network(_arrange(window)).float()

        total, count = torch.zeros((), device=device), 0
        for size in range(len(self.flips) + 1):
            for subset in itertools.combinations(self.flips, size):
                axes = [axis + 2 for axis in subset]
                logits = self._infer(inputs.flip(axes), run)
                if not bool(torch.isfinite(logits).all()):
                    raise FloatingPointError("the network gave logits that are not finite")
                total, count = total + torch.softmax(logits, dim=1).flip(axes), count + 1
        return total / count

    def _infer(self, image: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits of an image; in 2D those of its slices, stacked."""
        if self.slice_axis is None:
            return torch.as_tensor(self.window(image, run))
        stacks = [scan.movedim(1 + self.slice_axis, 0) for scan in image]
        logits = [torch.as_tensor(self.window(stack, run)) for stack in stacks]
        return torch.stack([stack.movedim(0, 1 + self.slice_axis) for stack in logits])


def _arrange(window: Tensor) -> Tensor:
    """Return windows in the memory layout that the model is used with."""
    if window.ndim == 4 and not window.is_cuda and not torch.is_autocast_enabled("cpu"):
        return window.contiguous()
    layout = torch.channels_last if window.ndim == 4 else torch.channels_last_3d
    return torch.empty_like(window, memory_format=layout).copy_(window)  # of one channel too


def _has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 natively."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if device.type == "cpu" and flags.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


class Predictd:
    """Add what a network says of a scan as ``pred``: probs (C, I, J, K), on the grid of `ToGridd`.

    Args:
        key: Of the scan.
        inferer: A `MirroredInferer`.
        network: In evaluation mode.
        device: That it is on.
    """

    def __init__(self, key: str, inferer: Any, network: Any, device: Any) -> None:
        self.key = key
        self.inferer, self.network, self.device = inferer, network, device

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the data with the probs."""
        probs = self.inferer(data[self.key][None].to(self.device), self.network)
        return {**data, "pred": probs[0]}


class ToNatived:
    """Bring probs (num_classes, I, J, K) from the grid of `ToGridd` to the scan's own voxels.

    Args:
        key: Of the probs.
        ref_key: Of the scan, on the grid.
    """

    def __init__(self, key: str, ref_key: str) -> None:
        self.key, self.ref_key = key, ref_key

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the data with the probs there, and with where that is."""
        scan = data[self.ref_key]
        shape, affine = scan.meta["native"]
        native = to_native(data[self.key].cpu().numpy(), scan.affine.numpy(), shape, affine)
        meta = {"file": scan.meta["file"], "name": scan.meta["name"]}
        return {**data, self.key: MetaTensor(native, affine=affine, meta=meta)}


class SaveMaskd:
    """Write a mask (1, I, J, K) under the name of its scan, and placed as it is.

    Nothing of the scan's header but the place of its voxels goes into the file.

    Args:
        key: Of the mask.
        output_dir: The folder; a mask that stands there is replaced.
    """

    def __init__(self, key: str, output_dir: str) -> None:
        self.key = key
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Write the mask.

        Raises:
            ValueError: A mask would replace its scan.
        """
        meta = data[self.key].meta
        scan = Path(meta["file"])
        array = np.asarray(data[self.key].as_tensor()[0].numpy(), np.int64)
        is_picture = scan.suffix.lower() in _PICTURES
        kinds = (np.uint8, np.uint16 if is_picture else np.int16, np.int32)
        array = array.astype(next(kind for kind in kinds if _holds(kind, array)))
        crc = zlib.crc32(array.ravel(order="F").astype("<i4").tobytes())
        mark = f"made by a medssl model (prediction), voxels {crc:08x}"  # `medssl check` knows
        is_tiff = scan.suffix.lower() in (".tif", ".tiff")
        suffix = scan.suffix.lower() if is_tiff else ".png" if is_picture else ".nii.gz"
        path = self.output_dir / f"{meta['name']}{suffix}"
        if path.exists() and path.samefile(scan):
            raise ValueError(f"{path}: would replace the scan; give another output_dir")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (_write_picture if is_picture else _write_nifti)(path, array, scan, mark)
        return dict(data)


def _holds(kind: Any, array: NDArray[Any]) -> bool:
    """Tell whether a type of integers holds all values."""
    return bool(np.iinfo(kind).min <= array.min() and array.max() <= np.iinfo(kind).max)


def _write_picture(path: Path, array: NDArray[Any], scan: Path, mark: str) -> None:
    """Write a mask (I, J, K) as a picture of K pages."""
    first, *others = (Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(array, -1, 0))
    chunks = PngInfo()
    chunks.add_text("Software", mark)
    more: dict[str, Any] = {"save_all": True, "append_images": others} if others else {}
    first.save(path, pnginfo=chunks, software=mark, **more)


def _write_nifti(path: Path, array: NDArray[Any], scan: Path, mark: str) -> None:
    """Write a mask (I, J, K) with a header that says of its place what that of the scan did."""
    old = nib.load(scan)
    new = type(old.header)()
    array = array[..., 0] if len(old.shape) == 2 else array
    new.set_data_shape(array.shape)
    for field in _PLACING:
        new[field] = old.header[field]
    new["pixdim"][:4] = old.header["pixdim"][:4]
    new["xyzt_units"] &= 7
    new.set_data_dtype(array.dtype)
    image = type(old)(array, None, new)
    image.header.set_slope_inter(1, 0)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", mark.encode()))
    nib.save(image, path)
