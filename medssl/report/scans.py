"""The scans of a report: finds those of a run again and has masks drawn onto them.

The label of a case is opened only if it is a test case and an evaluation exists.
Axes: I, J, K voxel axes; drawn in RAS+ orientation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medssl.config import InputError
from medssl.data.cases import Case
from medssl.data.io import find_untrusted_value, read_image, read_label
from medssl.data.layouts import read_dataset
from medssl.data.trained import find_data
from medssl.formats.readers import name_mask_suffix
from medssl.overlays import render_overlay, show_channels
from medssl.run_folder import RunFolder, parse_number

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sources:
    """The scans of a run where they are still to be found; ``problem`` says why they are not.

    Only test cases of an evaluated run keep the way to their label.
    """

    cases: dict[str, Case]
    num_channels: int
    problem: str = ""


@dataclass(frozen=True)
class Overlay:
    """A picture of a case, or, with an empty ``png``, why there is none."""

    case_id: str
    png: bytes
    problem: str = ""


def find_sources(run: RunFolder) -> Sources:
    """Read the data set of a run again, without the labels that are not evaluation's."""
    data = run.config.get("data") or {}
    about = {"root": data.get("root"), **(run.splits.get("dataset") or {})}
    if not (about["root"] or about.get("source")):
        return Sources({}, 1, "neither splits.json nor config.yaml say where the scans are")
    labels = {int(value): str(name) for value, name in (data.get("labels") or {}).items()}
    try:
        root = find_data(about, data.get("root"))
        dataset = read_dataset(root, str(data.get("format") or "auto"), labels or None)
    except (InputError, OSError, ValueError):
        return Sources({}, 1, "the data set is no longer where it was when the run was made")
    test = set(run.list_part("test")) if run.evaluation else set()
    cases = {
        case.case_id: case if case.case_id in test else case.without_label()
        for case in dataset.cases
    }
    return Sources(cases, max(1, len(dataset.channels)))


def describe_patients(run: RunFolder, sources: Sources) -> str:
    """Return a sentence on how far the test cases are independent; nothing if they are."""
    test = [sources.cases[case_id] for case_id in run.list_part("test") if case_id in sources.cases]
    if not test:
        return (
            "Whether test cases share patients cannot be checked any more (the data set was not "
            "found): if they do, the interval is a little narrow."
        )
    patients = {case.patient_id for case in test}
    if len(patients) < len(test):
        return (
            f"The {len(test)} test cases come from {len(patients)} patients; the interval is that "
            "over patients, each drawn with all of their scans."
        )
    if all(case.patient_id == case.case_id for case in test):
        return (
            "Each scan counts as a patient of its own: if some are of the same patient, the "
            "interval is a little narrow."
        )
    return ""


def render_test_case(run: RunFolder, sources: Sources, case_id: str) -> Overlay:
    """Draw a test case with the delivered model's prediction and the reference label."""
    folder = run.path / "evaluation" / "predictions"
    return _render_case(run, sources, case_id, folder, width=9.0, with_reference=True)


def render_pseudo_mask(
    run: RunFolder, sources: Sources, case_id: str, folder: Path, width: float = 9.0
) -> Overlay:
    """Draw an unlabeled case with the pseudo-mask of a round's folder, ``width`` inches wide."""
    masks = folder / "pseudo_masks"
    return _render_case(run, sources, case_id, masks, width, with_reference=False)


def _render_case(
    run: RunFolder,
    sources: Sources,
    case_id: str,
    folder: Path,
    width: float,
    with_reference: bool,
) -> Overlay:
    """Draw a case with its mask in a folder; what is gone or unreadable becomes a sentence."""
    images = sources.cases[case_id].images if case_id in sources.cases else ()
    mask = folder / f"{case_id}{name_mask_suffix(images[0]) if images else ''}"
    problem = _find_problem(run, sources, case_id, mask)
    if problem:
        return Overlay(case_id, b"", problem)
    case = sources.cases[case_id]
    try:
        volume = read_image(case.images, sources.num_channels)
        untrusted = find_untrusted_value(run.label_values)
        classes, _ = read_label(mask, run.label_values, untrusted)
        reference = None
        if with_reference and case.label is not None:
            label, _ = read_label(case.label, run.label_values, _find_ignore(run), case)
            reference = _to_ras(label, volume.affine)
        scan = show_channels(volume.array, not volume.has_spacing)
        png = render_overlay(
            _to_ras(scan, volume.affine),
            _to_ras(classes, volume.affine),
            reference=reference,
            spacing=_find_spacing(volume.affine),
            names=run.classes,
            legend=False,
            width=width,
            dpi=1200 // round(width),
            is_picture=not volume.has_spacing,
        )
    except (InputError, OSError, ValueError):
        return Overlay(case_id, b"", "its files cannot be read or do not fit together any more")
    return Overlay(case_id, png)


def _find_problem(run: RunFolder, sources: Sources, case_id: str, mask: Path) -> str:
    """Return why a case cannot be drawn, or nothing."""
    if sources.problem:
        return sources.problem
    if case_id not in sources.cases:
        return "the data set does not hold this case any more"
    if not all(path.is_file() for path in sources.cases[case_id].images):
        return "its scan is no longer where it was when the run was made"
    if not mask.is_file():
        return f"the run folder holds no {mask.parent.name} of it"
    return "" if run.label_values else "plan.json and model.json are missing: no label values"


def _find_ignore(run: RunFolder) -> int | None:
    """Return the label value that means: not annotated."""
    ignored = parse_number((run.config.get("data") or {}).get("ignore"))
    ignored = parse_number(run.plan.get("ignore")) if ignored is None else ignored
    return None if ignored is None else int(ignored)


def _to_ras(array: Array, affine: Array) -> Array:
    """Return (I, J, K) with axes flipped and permuted so that they run closest to R, A, S."""
    turned: Array = nib.orientations.apply_orientation(
        array, nib.orientations.io_orientation(affine)
    )
    return turned


def _find_spacing(affine: Array) -> tuple[float, float, float]:
    """Return the spacing in mm along the axes of ``_to_ras``."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    order = nib.orientations.io_orientation(affine)[:, 0].astype(int)
    turned = np.empty(3)
    turned[order] = sizes
    return float(turned[0]), float(turned[1]), float(turned[2])
