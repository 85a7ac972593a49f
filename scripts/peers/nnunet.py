"""nnU-Net v2 by its own commands: its raw format, planning, training, prediction.

Axes: C channels, I J K voxel axes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib

from medssl.data.cases import Case
from medssl.data.io import read_image, read_label, write_mask
from medssl.runs import read_json, write_json

DATASET = "Dataset001_Peers"
SUFFIX = ".nii.gz"
SCRIPTS = Path(__file__).resolve().parents[1]
ONE_CORE = "import multiprocessing; multiprocessing.cpu_count = lambda: 1; "  # nnU-Net's threads


def write_raw(
    folder: Path,
    labels: Mapping[int, str],
    channels: Sequence[str],
    labeled: Sequence[Case],
    test: Sequence[Case],
) -> None:
    """Write a data set in nnU-Net's raw format; dataset.json is the last file.

    Scans keep their grid, one float32 file a channel; labels are class indices. Of test cases there
    are scans alone.

    Args:
        folder: Of the data set.
        labels: Name of each label value, background first.
        channels: Name of each channel; one that is called CT is normalized as such.
        labeled: Cases to train on.
        test: Cases to segment.

    Raises:
        InputError: A file cannot be read, or a label holds a value that is not declared.
    """
    for part, cases in (("Tr", labeled), ("Ts", test)):
        for case in cases:
            volume = read_image(case.images, len(channels))
            for index, channel in enumerate(volume.array):
                path = folder / f"images{part}" / f"{case.case_id}_{index:04d}{SUFFIX}"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(channel, volume.affine), path)
    for case in labeled:
        assert case.label is not None, "labeled cases have one"
        label, affine = read_label(case.label, tuple(labels), None, case)
        path = folder / "labelsTr" / f"{case.case_id}{SUFFIX}"
        write_mask(path, label, affine, tuple(range(len(labels))))
    classes = enumerate(labels.values())
    content = {
        "channel_names": {str(i): name or "image" for i, name in enumerate(channels)},
        "labels": {"background": 0, **{name: i for i, name in classes if i}},
        "numTraining": len(labeled),
        "file_ending": SUFFIX,
    }
    write_json(folder / "dataset.json", content)


def run_command(module: str, function: str, *arguments: str, **environment: str) -> None:
    """Run one of nnU-Net's commands on one thread, and stop if it fails."""
    print(f"{module}.{function}", *arguments, flush=True)
    code = f"{ONE_CORE}from nnunetv2.{module} import {function}; {function}()"
    run_alone([sys.executable, "-c", code, *arguments], **environment)


def run_alone(command: Sequence[str], **environment: str) -> None:
    """Run a program on one thread that can import what lies in scripts/; stop if it fails."""
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    code = subprocess.run(command, check=False, env={**os.environ, **more}).returncode
    if code:
        raise SystemExit(code)


def name_folders(data: Path, results: Path) -> dict[str, str]:
    """Return nnU-Net's environment: where data and models lie, and one process for everything."""
    return {
        "nnUNet_raw": str(data / "raw"),
        "nnUNet_preprocessed": str(data / "preprocessed"),
        "nnUNet_results": str(results),
        "nnUNet_extTrainer": str(SCRIPTS / "peers" / "trainer"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }


def plan_data(data: Path, configuration: str) -> None:
    """Plan and preprocess a raw data set for a configuration, unless that is done."""
    done = data / "planned.json"
    if done.is_file():
        return
    command = ("experiment_planning.plan_and_preprocess_entrypoints", "plan_and_preprocess_entry")
    arguments = ["-d", "1", "-c", configuration, "-npfp", "1", "-np", "1"]
    run_command(*command, *arguments, **name_folders(data, data / "results"))
    plans = read_json(data / "preprocessed" / DATASET / "nnUNetPlans.json")
    write_json(done, {"batch_size": plans["configurations"][configuration]["batch_size"]})


def train(data: Path, folder: Path, configuration: str, minutes: float) -> None:
    """Train on all labeled cases for minutes of the processor; `spent.json` is the last file."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["1", configuration, "all", "-tr", "BudgetTrainer", "-device", "cpu"]
    environment = name_folders(data, folder / "results")
    environment |= {"PEER_MINUTES": str(minutes), "PEER_FOLDER": str(folder)}
    environment["nnUNet_n_proc_DA"] = "0"  # augmentation in the process whose time is counted
    run_command("run.run_training", "run_training_entry", *arguments, **environment)


def predict(data: Path, folder: Path, configuration: str) -> None:
    """Segment the test cases, mirrored and averaged as nnU-Net does by itself, into `masks`."""
    arguments = ["-i", str(data / "raw" / DATASET / "imagesTs"), "-o", str(folder / "masks")]
    arguments += ["-d", "1", "-c", configuration, "-f", "all", "-tr", "BudgetTrainer"]
    arguments += ["-device", "cpu", "-npp", "0", "-nps", "0"]  # in this process alone
    environment = name_folders(data, folder / "results")
    run_command("inference.predict_from_raw_data", "predict_entry_point", *arguments, **environment)
