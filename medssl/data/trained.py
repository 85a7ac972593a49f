"""What a run folder says of its model and its data, and which scans a run was trained on.

A scan is recognized by its files and by its voxels: a copy under another name, in another folder
or format is the same scan, and measuring a model on it is no test. Nor is measuring it on another
scan of the same patient.
"""

import hashlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medssl.config import DataSection, InputError
from medssl.data.cases import Case, Dataset, Splits, select_test_with_labels, shorten
from medssl.data.files import guess_patient, hash_source
from medssl.data.layouts import read_dataset
from medssl.runs import (
    find_edited,
    list_rounds,
    read_json,
    tell_full_disk,
    write_json,
)
from medssl.settings import load_config

RECORD = "trained_on.json"
NO_TEST = "this is no test"  # in remarks that leave open whether a model has seen the cases
_ZIPPED = {"weights.safetensors": 2**34, "model.json": 2**26}  # and the bytes that each may have
_unpacked: dict[tuple[Path, int], tempfile.TemporaryDirectory[str]] = {}


def resolve_model(path: Path) -> Path:
    """Return the model folder of a run, one of its rounds, a zip, or a model folder itself.

    Raises:
        InputError: There is none; says what stands there instead.
    """
    if path.suffix.lower() == ".zip" and path.is_file():
        return _unpack(path)
    for folder in (path, path / "model"):
        if (folder / "model.json").is_file():
            return folder
    if not path.exists():
        raise InputError(f"{path}: no such run or model folder")
    folders = list_rounds(path).values()
    rounds = [p.name for p in folders if (p / "model" / "model.json").is_file()]
    hint = f"; finished rounds: {', '.join(rounds)} (use {path / rounds[-1]})" if rounds else ""
    raise InputError(f"{path}: holds no model (model/model.json){hint}")


def _unpack(path: Path) -> Path:
    """Return the folder, gone with the process, of a zipped model.

    Two files are read by their names, wherever in the zip they lie, and written under these names:
    what else it holds, and where its names point to, does not matter.
    """
    key = (path.resolve(), path.stat().st_mtime_ns)
    if key not in _unpacked:
        folder = tempfile.TemporaryDirectory(prefix="medssl_model_")
        try:
            with zipfile.ZipFile(path) as archive, tell_full_disk(Path(folder.name) / "model"):
                for name, most in _ZIPPED.items():
                    _copy_member(archive, name, most, Path(folder.name))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise InputError(
                f"{path}: damaged, encrypted or no zip ({error}); copy it again"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{path}: no zip of a model: {error}; medssl export RUN --format zip makes one"
            ) from error
        _unpacked[key] = folder
    return Path(_unpacked[key].name)


def _copy_member(archive: zipfile.ZipFile, name: str, most: int, folder: Path) -> None:
    """Write the one member that bears a name, of at most so many bytes, into a folder."""
    members = [m for m in archive.infolist() if PurePosixPath(m.filename).name == name]
    if len(members) != 1 or members[0].file_size > most:
        sizes = [member.file_size for member in members]
        raise ValueError(f"{name} is in it {len(members)} times, with {sizes} bytes")
    with archive.open(members[0]) as source, (folder / name).open("wb") as target:
        shutil.copyfileobj(source, target)


def count_model_channels(path: Path) -> int:
    """Return the channels of a model by its description alone.

    Raises:
        InputError: There is no model, or its description is damaged.
    """
    file = resolve_model(path) / "model.json"
    channels = read_json(file).get("channels")
    if not isinstance(channels, list) or not channels:
        raise InputError(f"{file}: damaged: names no channels; restore it, or train anew")
    return len(channels)


def read_splits(run_dir: Path) -> tuple[Splits, DataSection]:
    """Return the splits of a run, and how and where its data is read.

    Raises:
        InputError: It is no run, or its files are damaged or not those that it was begun with.
    """
    path = run_dir / "splits.json"
    if not path.is_file():
        raise InputError(
            f"{run_dir}: is no run, and only a run has test cases of its own; give the run, or "
            f"labeled scans: medssl evaluate {run_dir} DATA --out DIR"
        )
    content = read_json(path)
    if edited := find_edited(run_dir).get(path.name):
        raise InputError(edited)
    data = load_config(run_dir / "config.yaml").config.data
    try:
        splits, root = Splits.from_json(content), find_data(content["dataset"], data.root)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, or of another version ({error!r})") from error
    return splits, data.model_copy(update={"root": root})


def find_data(about: Mapping[str, Any], setting: Path | str | None) -> Path:
    """Return the list or folder that a run was made from.

    Args:
        about: What splits.json says of the data set; before version 0.2 the folder of a list.
        setting: ``data.root``, as the user wrote it.
    """
    if about.get("source"):
        return Path(str(about["source"]))
    root = Path(str(about["root"]))
    listed = root / Path(str(setting)).name if setting else root
    return listed if listed.is_file() else root


def hash_voxels(array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any]) -> list[str]:
    """Return a hash of each channel that is not constant: the same in every file format.

    Args:
        array: The scan as it is read (C, I, J, K); its axes are turned to RAS+ first, so that a
            copy whose axes another program has flipped is recognized.
        affine: Affine (4, 4).
    """
    import nibabel as nib  # heavy: only where scans are read

    way = nib.orientations.io_orientation(affine)
    hashes = []
    for channel in array:
        turned = np.asarray(nib.orientations.apply_orientation(channel, way), dtype=np.float32)
        if turned.min() < turned.max():
            digest = hashlib.sha256(repr(turned.shape).encode())
            for plane in turned:
                digest.update((plane + 0.0).tobytes())  # no negative zero
            hashes.append(digest.hexdigest())
    return hashes


def write_trained_on(
    run_dir: Path, scans: Mapping[str, Mapping[str, Any]], patients: Mapping[str, str]
) -> None:
    """Write the hashes by which the scans of a run are recognized, and whose scans they are.

    Args:
        run_dir: The run folder.
        scans: By case_id, the hashes of files (`sources`) and channels (`voxels`).
        patients: By case_id, the patient_id.
    """
    hashes = {
        case_id: {
            **{key: list(scan[key]) for key in ("sources", "voxels")},
            "patient_id": patients[case_id],
        }
        for case_id, scan in scans.items()
    }
    write_json(run_dir / RECORD, hashes)


def find_trained_on(
    path: Path, dataset: Dataset, read: Callable[[Case], Iterable[str]]
) -> tuple[list[str], list[str]]:
    """Return the cases of a data set that the run of a model was trained on, and remarks.

    Such a case has a file of a training scan, or one with the same bytes or voxels; or it is a
    labeled one with the patient_id of a training scan. Where the case_id of a training scan
    stands for another scan in the data set, the two may number their patients alike, so that
    cases with an equal patient_id are not returned but remarked on.

    Args:
        path: A run, one of its rounds, or a model folder in it.
        dataset: The cases.
        read: Returns the hashes of a case's channels.
    """
    resolved = path.resolve()
    runs = [p for p in (resolved, *resolved.parents[:3]) if (p / "splits.json").is_file()]
    if not runs:
        return [], [
            f"{path} lies in no run that says which cases it was trained on: if some of these are "
            f"among them, {NO_TEST}"
        ]
    splits, data = read_splits(runs[0])
    trained = {*splits.labeled, *splits.unlabeled, *splits.val}
    cases = _find_cases(data, trained)
    files = {image.resolve() for case in cases for image in case.images}
    hashes, voxels, patients = _read_record(runs[0])
    patients = {
        **{case_id: guess_patient(case_id) or case_id for case_id in trained},
        **{case.case_id: case.patient_id for case in cases},
        **patients,
    }

    def was_trained_on(case: Case) -> bool:
        if any(image.resolve() in files for image in case.images):
            return True
        if case.label is None or not hashes:
            return False
        return any(hash_source(p) in hashes for p in case.images) or bool(voxels & {*read(case)})

    matches = {case.case_id for case in dataset.cases if was_trained_on(case)}
    others = [case for case in dataset.cases if case.label and case.case_id not in matches]
    same, remarks = _find_same_patients(others, patients)
    if not hashes:
        remarks.append(
            f"{runs[0]}: keeps no hashes of the scans that it was trained on (medssl 0.1.0 kept "
            "none): copies of these under other names would not be noticed"
        )
    matches.update(same)
    return [case.case_id for case in dataset.cases if case.case_id in matches], remarks


def _find_same_patients(
    cases: Iterable[Case], patients: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return the cases of patients that a run was trained on, and a remark on them.

    Args:
        cases: That are no scans of the training.
        patients: By case_id, the patients of the training.
    """
    known = set(patients.values())
    same = [case for case in cases if case.patient_id in known]
    names = shorten([case.case_id for case in same])
    if not same:
        return [], []
    if any(case.case_id in patients for case in same):
        return [], [
            f"{len(same)} cases bear the case_id or patient of a scan that the run was trained on "
            f"({names}): if they are the same scans or the same people, {NO_TEST}"
        ]
    return [case.case_id for case in same], [
        f"{len(same)} of the cases that are left out are other scans of patients that the run was "
        f"trained on, by case_id or patient_id ({names}); if they are other people, give these "
        "another patient_id in a list (medssl check DATA --draft FILE.csv)"
    ]


def _find_cases(data: DataSection, trained: set[str]) -> list[Case]:
    """Return the cases that a run was trained on, where they still are."""
    assert data.root is not None, "splits.json names the root"
    try:
        cases = read_dataset(data.root, data.format, data.labels).cases
    except InputError:  # the data of the run is no longer where it was
        return []
    return [case for case in cases if case.case_id in trained]


def _read_record(run_dir: Path) -> tuple[set[str], set[str], dict[str, str]]:
    """Return the hashes of files and of channels that a run was trained on, and the patients."""
    path = run_dir / RECORD
    if not path.is_file():
        return set(), set(), {}
    try:
        scans = {case_id: dict(scan) for case_id, scan in read_json(path).items()}
        sources, voxels = (
            {str(value) for scan in scans.values() for value in scan[key]}
            for key in ("sources", "voxels")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged ({error!r}); start the same medssl train again"
        ) from error
    names = {key: str(scan["patient_id"]) for key, scan in scans.items() if "patient_id" in scan}
    return sources, voxels, names


def find_rounds(run_dir: Path) -> list[str]:
    """Return the names of the rounds that are done, in order; a copy of one is none."""
    return [p.name for p in list_rounds(run_dir).values() if (p / "done.json").is_file()]


def open_test_cases(
    run_dir: Path, report: Callable[[str], object]
) -> tuple[Dataset, int | None, list[Case], list[str]]:
    """Return the data set of a run, its ignore value, and its test cases with and without label.

    Raises:
        InputError: It is no run, has no test cases, or its data is no longer where it was.
    """
    splits, data = read_splits(run_dir)
    if not splits.test:
        raise InputError(
            f"{run_dir}: the run has no test cases of its own; measure it on labeled scans that "
            f"are new to it: medssl evaluate {run_dir} DATA --out DIR (several runs on one DATA, "
            "each with its own DIR, then: medssl compare DIR DIR), or train anew with test=N"
        )
    assert data.root is not None, "splits.json names the root"
    dataset = read_dataset(data.root, data.format, data.labels)
    ignore = dataset.ignore if data.ignore is None else data.ignore
    labeled, unlabeled = split_by_label(select_test_with_labels(dataset, splits), report)
    return dataset, ignore, labeled, unlabeled


def split_by_label(
    cases: Sequence[Case], report: Callable[[str], object]
) -> tuple[list[Case], list[str]]:
    """Return the cases with a label, and the case_ids of the others, which are reported.

    Raises:
        InputError: No case has one.
    """
    labeled = [case for case in cases if case.label is not None]
    unlabeled = [case.case_id for case in cases if case.label is None]
    if unlabeled:
        report(f"{len(unlabeled)} cases have no label and are left out: {shorten(unlabeled)}")
    if not labeled:
        raise InputError(f"none of {len(cases)} cases has a label to compare a prediction with")
    return labeled, unlabeled


def refuse_run_folder(out: Path) -> None:
    """Refuse a folder of tables in which a run has tables of its own.

    Raises:
        InputError: It is, or lies in, a run folder.
    """
    home = out.resolve()
    if any((folder / "run.json").is_file() for folder in (home, *home.parents)):
        raise InputError(f"--out {out}: the tables would replace those of a run; name a new folder")
