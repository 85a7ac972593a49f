import collections
import io
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the load of the machine would decide it

import hypothesis
import nibabel as nib  # after the number of threads
import numpy as np
import pytest
from PIL import Image

from medssl.config import Config

REAL_DATA = "MEDSSL_DATA"
hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("patient")


def pytest_configure(config):
    folder = os.environ.get(REAL_DATA)
    if folder is not None and not Path(folder).is_dir():
        raise pytest.UsageError(
            f"{REAL_DATA}={folder!r}: there is no such folder; name the folder of real scans, or "
            "unset it to skip the tests that need them"
        )


def pytest_collection_modifyitems(config, items):
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # a long file must not begin when others end
    if REAL_DATA not in os.environ:
        _skip(items, "real", f"{REAL_DATA} is not set")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "there is no CUDA device")


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_terminal_summary(terminalreporter):
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    for marker in ("real", "gpu"):
        count = sum(f"{marker}: " in reason for reason in reasons)
        if count:
            terminalreporter.write_line(f"{count} `{marker}` tests were NOT run", yellow=True)


@dataclass
class StopAt:
    """A stop flag that is set after a number of steps; None is never."""

    num_steps: int | None = None
    reason: str | None = None

    def is_set(self):
        if self.num_steps is not None:
            self.num_steps -= 1
            if self.num_steps <= 0:
                self.reason = "a test"
        return self.reason is not None


@pytest.fixture(scope="session")
def tiny_spec():
    """A network of three levels and 20,000 weights, for patches from 8 x 8 x 8 voxels on."""
    from medssl.networks.build import NetworkSpec

    return NetworkSpec(
        in_channels=1,
        num_classes=3,
        filters=(4, 8, 16),
        kernels=((3, 3, 3),) * 3,
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        dropout=0.1,
        deep_supervision=True,
    )


@pytest.fixture(scope="session")
def tiny_config():
    """Two steps between the lines of the journal and four between checkpoints, on the CPU."""
    return Config.model_validate(
        {
            "train": {
                "steps": 8,
                "batch": 2,
                "device": "cpu",
                "precision": "float32",
                "workers": 0,
                "log_every": 2,
                "checkpoint_every": 4,
            },
            "tracking": {"uri": "none"},
        }
    )


@pytest.fixture(scope="session")
def tiny_recipe():
    """The recipe of the tiny scans: fixed numbers, so that intensities keep their meaning."""
    from medssl.transforms.preprocess import Normalization, Preprocessing

    how = Normalization(kind="ct", low=0.0, high=100.0, mean=50.0, std=25.0)
    return Preprocessing(spacing=(1.0, 1.0, 1.0), normalization=(how,))


@pytest.fixture(scope="session")
def tiny_plan(tiny_spec, tiny_recipe):
    """The plan of a run on the tiny scans: 8 steps of 2 + 2 patches of 8 x 8 x 8 voxels."""
    from medssl.plan import Plan

    return Plan(
        labels={0: "background", 1: "organ", 2: "lesion"},
        label_values=(0, 1, 5),
        ignore=None,
        channels=("CT",),
        preprocessing=tiny_recipe,
        patch_size=(8, 8, 8),
        flips=(0, 1, 2),
        network=tiny_spec,
        batch=2,
        num_unlabeled=2,
        steps=8,
        device="cpu",
        precision="float32",
        threads=1,
        workers=0,
        reasons=(),
        estimate={},
    )


def draw_tiny_scan(seed, shape=(14, 12, 16)):
    """Return an image with a bright box in a middling one, and its label with values 0, 1, 5."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[3:11, 2:10, 4:13] = 1
    low = rng.integers(4, 7, 3)
    label[low[0] : low[0] + 4, low[1] : low[1] + 3, low[2] : low[2] + 4] = 5
    image = 20.0 + 40.0 * (label == 1) + 75.0 * (label == 5) + rng.normal(0, 3, shape)
    return image.astype(np.float32), label


@pytest.fixture(scope="session")
def cached_cases(tmp_path_factory, tiny_recipe):
    """Two labeled and three unlabeled cases in a cache, by case_id."""
    from medssl.data.cache import build_cache
    from medssl.data.cases import Case

    folder = tmp_path_factory.mktemp("tiny_scans")
    cases = []
    for index, name in enumerate(("l0", "l1", "u0", "u1", "u2")):
        image, label = draw_tiny_scan(index)
        image_path, label_path = folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"
        nib.save(nib.Nifti1Image(image, np.eye(4)), image_path)
        if name.startswith("l"):
            nib.save(nib.Nifti1Image(label, np.eye(4)), label_path)
        labeled = label_path if name.startswith("l") else None
        cases.append(Case(name, (image_path,), labeled, name))
    return build_cache(cases, tiny_recipe, folder / "cache", (0, 1, 5), None, 1)


@pytest.fixture(scope="session")
def pseudo_labeled(cached_cases, tmp_path_factory):
    """The unlabeled cases with confident pseudo-labels on disk."""
    from medssl.data.loaders import UnlabeledCase
    from medssl.data.pseudo_labels import write_pseudo_label

    folder = tmp_path_factory.mktemp("pseudo_labels")
    result = []
    for case_id, case in cached_cases.items():
        if case.label_folder is not None:
            continue
        bright = np.asarray(case.image()[0], dtype=np.float32)
        logits = np.stack([-4 * (bright + 0.4), -4 * np.abs(bright - 0.4), 4 * (bright - 1.2)])
        probs = np.exp(2 * logits - (2 * logits).max(0))
        probs /= probs.sum(0)
        entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(0)
        part = (np.s_[:, :, :], probs, entropy)
        write_pseudo_label(folder / case_id, probs.shape, [part], "teacher")
        result.append(UnlabeledCase(case, folder / case_id))
    return tuple(result)


@pytest.fixture(scope="session")
def make_dataset(cached_cases, pseudo_labeled):
    """Return a function that gives the batches of a round on the tiny scans."""
    from medssl.data.loaders import PatchDataset, Sampling

    def make(round_index=1, seed=0, **changes):
        settings = {
            "seed": seed,
            "round_index": round_index,
            "patch_size": (8, 8, 8),
            "batch": 2,
            "num_unlabeled": 2,
            "foreground": 0.5,
            "strong": 1.0,
            "flips": (0, 1, 2),
            **changes,
        }
        labeled = [case for case in cached_cases.values() if case.label_folder is not None]
        unlabeled = pseudo_labeled if round_index else ()
        return PatchDataset(labeled, unlabeled, Sampling(**settings))

    return make


@pytest.fixture(scope="module")
def brief():
    """Spare trainings what takes longer than their few steps; test_readme.py spares nothing.

    Before one, four steps are timed, not as many as a small network takes in seconds. Pictures are
    made, and not drawn.
    """
    from medssl import overlays
    from medssl.report import figures
    from medssl.rounds import estimate

    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, format="PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "TRIED_SECONDS", 0.0)
        patch.setattr(overlays, "save_png", lambda figure: blank.getvalue())
        patch.setattr(figures, "_save", lambda figure: blank.getvalue())
        yield


@pytest.fixture(scope="session")
def leave():
    """Return a function that leaves a temporary file in a folder, as a kill two hours ago did."""
    number = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)

    def make(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".{number.stdout.strip()}.0123abcd.{name}"
        path.touch()
        os.utime(path, (time.time() - 7200,) * 2)
        return path

    return make


@pytest.fixture(scope="session")
def stop_at():
    """Return a function that makes a stop flag which is set after so many steps."""
    return StopAt
