"""The network alone, as ONNX, torch.export or TorchScript, and a JSON of what stands around it.

Axes: B batch, C channels, I J K voxel axes. The network takes images (B, C, I, J[, K]) float32 of
any batch and of any size that is a multiple of a few voxels, and gives logits of the same size.
Padding is outside: an exporter that is told of multiples drops the padding in the network, and is
then wrong for other sizes without a word.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl import __version__
from medssl.config import InputError
from medssl.networks.build import ENCODER_FACTOR, EncoderNetwork, SegmentationNetwork
from medssl.predict import Model, ModelInfo
from medssl.runs import write_file, write_json
from medssl.windows import OVERLAP

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".ts"}
INPUT, OUTPUT = "image", "logits"


def find_multiples(info: ModelInfo) -> list[int]:
    """Return of how many voxels the size of an image must be a multiple, along each axis."""
    if info.network.name != "dynunet":
        return [ENCODER_FACTOR, ENCODER_FACTOR]
    return [math.prod(steps) for steps in zip(*info.network.strides, strict=True)]


def write_network(model: Model, form: str, folder: Path) -> Path:
    """Write the network as FOLDER/model.<suffix> and what stands around it as FOLDER/model.json.

    Args:
        model: The model, on the CPU.
        form: A key of `SUFFIXES`.
        folder: Where the files go.

    Returns:
        The file of the network.

    Raises:
        InputError: The network of this encoder cannot be written in this form.
    """
    path = folder / f"model{SUFFIXES[form]}"
    network = strip_padding(model.network)
    # what has a size of 1, or two sizes alike, would be taken for a constant by an exporter
    sizes = [step * (count + 2) for count, step in enumerate(find_multiples(model.info))]
    example = torch.zeros(2, len(model.info.channels), *sizes)
    write: dict[str, Callable[..., None]] = {
        "onnx": _write_onnx,
        "torch-export": _write_export,
        "torchscript": _write_script,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about their own future
        try:
            write_file(path, lambda temporary: write[form](network, example, temporary))
        except InputError:
            raise
        except Exception as error:  # exporters have no common error class
            name = f"{model.info.network.name} {model.info.network.encoder}".strip()
            first = (str(error).splitlines() or [""])[0][:200]
            raise InputError(
                f"{name} cannot be written as {form} ({type(error).__name__}: {first}); take "
                "another of --format onnx, torch-export, torchscript, monai-bundle"
            ) from error
    write_json(folder / "description.json", describe_network(model.info))
    return path


def strip_padding(network: SegmentationNetwork) -> nn.Module:
    """Return the network without the padding and the dropout around it."""
    return network.smp if isinstance(network, EncoderNetwork) else network


def _make_axes(example: Tensor, name: Callable[[str], Any]) -> dict[int, Any]:
    """Return the free axes: all but the channels."""
    letters = "ijk"[: example.ndim - 2]
    return {0: name("b")} | {axis: name(letter) for axis, letter in enumerate(letters, start=2)}


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write ONNX, in one file."""
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=(_make_axes(example, str),),
        verbose=False,
    )
    assert program is not None, "dynamo gives a program"
    program.save(path, external_data=False)


def _write_export(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write a program of torch.export."""
    axes = _make_axes(example, lambda _: torch.export.Dim.AUTO)
    program = torch.export.export(network, (example,), dynamic_shapes=(axes,))
    with path.open("wb") as file:
        torch.export.save(program, file)


def _write_script(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write TorchScript."""
    save_script(trace_network(network, example), path)


def save_script(script: torch.jit.ScriptModule, path: Path) -> None:
    """Write TorchScript to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `trace`
        torch.jit.save(script, path)


def trace_network(network: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """Return a network as TorchScript, traced on an example (B, C, I, J[, K])."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated; programs still ask for it
        script: torch.jit.ScriptModule = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]  # torch has no type for it
    return script


def describe_network(info: ModelInfo) -> dict[str, Any]:
    """Return what one who runs the network alone must know to get the masks of `medssl predict`."""
    axes = "BCIJK" if info.slice_axis is None else "BCIJ"
    return {
        "medssl": __version__,
        "input": {"name": INPUT, "axes": axes, "dtype": "float32", "channels": info.channels},
        "output": {"name": OUTPUT, "axes": axes, "dtype": "float32"},
        "multiple_of": find_multiples(info),
        "padding": "by zeros, outside of the network, after the normalization",
        "labels": info.labels,
        "label_values": info.label_values,
        "preprocessing": {
            **info.preprocessing.model_dump(mode="json"),
            "order": "normalize on the scan's own grid, then linear interpolation to the spacing",
            "orientation": "RAS, by the scan's own axes: flipped and reordered, never rotated"
            if info.has_spacing
            else "rows, columns, pages",
            "zscore": "clip to the scan's 0.5 and 99.5 percentiles, subtract mean, divide by "
            "standard deviation; over the non-zero voxels if more than a third are exactly zero",
        },
        "slice_axis": info.slice_axis,
        "patch_size": info.patch_size,
        "windows": {"overlap": OVERLAP, "blending": "gaussian, sigma 0.125 of the patch"},
        "flips": info.flips,
        "flips_are": "axes of the volume: softmax is averaged over all mirrorings along them",
        "back": "probabilities linearly to the scan's own grid, then the largest",
        "provenance": info.provenance,
    }
