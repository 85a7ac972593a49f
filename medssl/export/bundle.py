"""A model as a MONAI bundle that runs where medssl is not installed.

`python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS` in the folder
of the bundle gives the masks that `medssl predict` gives.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medssl import __version__
from medssl.export.exchange import find_multiples, save_script, trace_network
from medssl.predict import Model, ModelInfo
from medssl.runs import write_file, write_json, write_text
from medssl.windows import OVERLAP, SLICES

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_LICENSE = """\
The code in scripts/ is part of medssl, Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0

The weights in models/ are no part of medssl. They belong to those who trained them, under the terms
of the scans and labels that they were trained on. State your license here before you pass it on.
"""
_USAGE = """
## How to run this bundle

In this folder, with `pip install {packages}`:

```
python -m monai.bundle run --config_file configs/inference.json \\
  --dataset_dir SCANS --output_dir MASKS
```

`SCANS` is a folder of {kind} or one of them; no network is needed. Reading, normalization, the grid
and the way back to the scan's own voxels stand in `scripts/`, since MONAI's own transforms give
other results there; the network, the sliding window, arg max and label values are MONAI's.
"""


def write_bundle(model: Model, folder: Path, card: str) -> None:
    """Write a bundle.

    Args:
        model: The model, on the CPU.
        folder: Of the bundle, new or empty.
        card: The model card, which becomes the beginning of docs/README.md.

    Raises:
        RuntimeError: The weights do not fit MONAI's network.
    """
    info = model.info
    for name in ("transforms/geometry.py", "transforms/normalize.py", "export/steps.py"):
        _copy_source(name, folder)
    write_text(folder / "scripts" / "__init__.py", '"""See docs/README.md."""\n')
    network = _write_network(model, folder / "models")
    write_json(folder / "configs" / "inference.json", _describe_inference(info, network))
    packages = _list_packages()
    write_json(folder / "configs" / "metadata.json", _describe_bundle(info, packages))
    names = " ".join(["monai", "torch", "fire", *packages])
    kind = "NIfTI files" if info.has_spacing else "pictures (PNG, JPEG, TIFF)"
    write_text(folder / "docs" / "README.md", card + _USAGE.format(packages=names, kind=kind))
    write_text(folder / "LICENSE", _LICENSE)


def _copy_source(name: str, folder: Path) -> None:
    """Copy a module of medssl into the bundle, where its fellows are called scripts."""
    source = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    source = re.sub(r"^from medssl\.\w+\.", "from scripts.", source, flags=re.M)
    write_text(folder / "scripts" / Path(name).name, source)


def _write_network(model: Model, folder: Path) -> dict[str, Any]:
    """Write the weights; return the items of the config that make the network.

    MONAI's DynUNet comes as weights that can be trained on; other networks as TorchScript, since
    their norm layers are medssl's.
    """
    if model.info.network.name != "dynunet":
        size = (1, model.info.network.in_channels, *model.info.patch_size)
        script = trace_network(model.network, torch.zeros(size))
        write_file(folder / "model.ts", functools.partial(save_script, script))
        load = "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)"
        return {"network": load, "initialize": ["$@network.eval()"]}
    arguments = model.info.network.describe_dynunet()  # with the heads that its weights have
    weights = rename_weights(model.network.state_dict())
    from monai.networks.nets import DynUNet

    DynUNet(**arguments).load_state_dict(weights)  # strictly, before anything is written
    write_file(folder / "model.pt", functools.partial(torch.save, weights))
    is_3d = arguments["spatial_dims"] == 3
    layout = ".to(memory_format=torch.channels_last_3d)" if is_3d else ""
    load = "torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True)"
    return {
        "network_def": {"_target_": "DynUNet", **arguments},
        "network": f"$@network_def.to(@device){layout}",
        "initialize": [f"$@network.load_state_dict({load})", "$@network.eval()"],
    }


def rename_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a `DynamicUNet` by their names in MONAI's DynUNet.

    Dropout and stochastic depth, which are nothing at inference, stand in a sequence of their own.
    """
    return {
        re.sub(r"\.(conv2|norm2)\.0\.", r".\1.", key.removeprefix("dynunet.")): value
        for key, value in weights.items()
    }


def _describe_inference(info: ModelInfo, network: Mapping[str, Any]) -> dict[str, Any]:
    """Return configs/inference.json."""
    classes = list(range(len(info.label_values)))
    steps = "scripts.steps."
    return {
        "imports": [
            "$import collections",
            "$import torch",
            "$from scripts.steps import list_scans",
        ],
        "bundle_root": ".",
        "dataset_dir": "scans",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "data": f"$list_scans(@dataset_dir, {len(info.channels)})",
        **{key: value for key, value in network.items() if key != "initialize"},
        "inferer": {
            "_target_": f"{steps}MirroredInferer",
            "flips": list(info.flips),
            "slice_axis": info.slice_axis,
            "precision": info.precision,
            "roi_size": list(info.patch_size),
            "sw_batch_size": 1 if info.slice_axis is None else SLICES,
            "overlap": OVERLAP,
            "mode": "gaussian",
            "padding_mode": "constant",
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": f"{steps}LoadScand",
                    "key": "image",
                    "num_channels": len(info.channels),
                },
                {
                    "_target_": f"{steps}ToGridd",
                    "key": "image",
                    **info.preprocessing.model_dump(mode="json"),
                },
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "predict": {
            "_target_": f"{steps}Predictd",
            "key": "image",
            "inferer": "@inferer",
            "network": "@network",
            "device": "@device",
        },
        "postprocessing": {  # of MONAI Label too, which has its own network, and saves by itself
            "_target_": "Compose",
            "transforms": [
                {"_target_": f"{steps}ToNatived", "key": "pred", "ref_key": "image"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            ],
        },
        "save": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "MapLabelValued",
                    "keys": "pred",
                    "orig_labels": classes,
                    "target_labels": list(info.label_values),
                },
                {
                    "_target_": f"{steps}SaveMaskd",
                    "key": "pred",
                    "output_dir": "@output_dir",
                },
            ],
        },
        "initialize": network["initialize"],
        "masks": "$map(@postprocessing, map(@predict, @dataset))",
        "run": ["$collections.deque(map(@save, @masks), maxlen=0)"],
    }


def _list_packages() -> dict[str, str]:
    """Return what the bundle needs beside MONAI, torch and fire, with the versions here."""
    return {name: importlib.metadata.version(name) for name in ("nibabel", "scipy", "pillow")}


def _describe_bundle(info: ModelInfo, packages: Mapping[str, str]) -> dict[str, Any]:
    """Return configs/metadata.json."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    size = [f"{step}*n" for step in find_multiples(info)]
    shared = {"type": "image", "modality": "n/a", "dtype": "float32", "is_patch_data": True}
    channels = {str(i): name for i, name in enumerate(info.channels)}
    classes = {str(i): name for i, name in info.labels.items()}
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by medssl {__version__} on {today}"},
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": importlib.metadata.version("torch"),
        "numpy_version": importlib.metadata.version("numpy"),
        "required_packages_version": dict(packages),
        "name": "segmentation by medssl",
        "task": f"segmentation of {', '.join(list(info.labels.values())[1:])}",
        "description": "See docs/README.md. Not a medical device.",
        "authors": "those who trained it with medssl",
        "copyright": "see LICENSE",
        "data_type": "nibabel" if info.has_spacing else "image",
        "label_values": dict(zip(classes.values(), info.label_values, strict=True)),
        "network_data_format": {
            "inputs": {
                "image": {
                    **shared,
                    "format": "magnitude",
                    "num_channels": len(info.channels),
                    "spatial_shape": size,
                    "value_range": [],
                    "channel_def": channels,
                }
            },
            "outputs": {
                "pred": {
                    **shared,
                    "format": "logits",
                    "num_channels": len(classes),
                    "spatial_shape": size,
                    "value_range": [],
                    "channel_def": classes,
                }
            },
        },
    }
