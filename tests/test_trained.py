"""A run remembers its list and its scans: copies under other names are known again."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from medssl.config import InputError
from medssl.data import trained
from medssl.data.cases import Case, Dataset, Splits
from medssl.data.io import read_image
from medssl.data.layouts import read_dataset
from medssl.data.phantoms import write_phantoms
from medssl.data.trained import (
    find_data,
    find_rounds,
    find_trained_on,
    hash_voxels,
    read_splits,
    write_trained_on,
)
from medssl.report import scans
from medssl.rounds import loop
from medssl.rounds.deliver import Outcome
from medssl.run_folder import read_folder_with_tables
from medssl.runs import read_json, write_json
from medssl.settings import load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, stop_at):
    """A run of a list that is not called cases.csv, as far as to its first round."""
    folder = tmp_path_factory.mktemp("listed")
    data = folder / "scans"
    write_phantoms(data, num_labeled=2, num_unlabeled=1, num_test=2, shape=(24, 24, 24))
    (data / "cases.csv").rename(data / "my draft.csv")
    given = ["tracking.uri=none", "plan.patch_size=[16,16,16]", "steps=2"]
    resolved = load_config(data / "my draft.csv", given)
    reload = lambda plan: load_config(data / "my draft.csv", given, plan)  # noqa: E731
    prepared = loop.prepare_run(resolved, reload, None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_run_rounds", lambda *_: Outcome("delivered", None, ""))
        loop.run_training(prepared, folder / "runs" / "a", stop_at(None))
    return folder / "runs" / "a"


def hash_scan(case):
    volume = read_image(case.images, 1)
    return hash_voxels(volume.array, volume.affine)


@pytest.mark.slow
def test_a_run_reads_its_own_list_again(run):
    _, data = read_splits(run)
    assert data.root.name == "my draft.csv"
    sources = scans.find_sources(read_folder_with_tables(run))
    assert not sources.problem
    assert len(sources.cases) == 5


def test_splits_that_were_changed_are_not_believed(run):
    content = read_json(run / "splits.json")
    labeled, *rest = content["labeled"]
    moved = {**content, "labeled": rest, "test": [labeled, *content["test"]]}
    try:
        write_json(run / "splits.json", moved)
        with pytest.raises(
            InputError, match=r"splits\.json: not the splits .* begun with; restore"
        ):
            read_splits(run)
        with pytest.raises(InputError, match=r"splits\.json: not the splits"):
            find_trained_on(
                run, read_dataset(run.parent.parent / "scans" / "my draft.csv"), hash_scan
            )
        elsewhere = {**content["dataset"], "source": "/elsewhere"}  # the user's to say
        write_json(run / "splits.json", {**content, "dataset": elsewhere})
        assert str(read_splits(run)[1].root) == "/elsewhere"
    finally:
        write_json(run / "splits.json", content)


def test_the_list_of_a_run_of_version_0_1_0_is_found_beside_its_scans(tmp_path):
    (tmp_path / "x.csv").touch()
    about = {"root": str(tmp_path)}
    assert find_data(about, "elsewhere/x.csv") == tmp_path / "x.csv"
    assert find_data(about, "elsewhere") == tmp_path
    assert find_data(about, None) == tmp_path


def convert(source, target, how):
    """Write a scan under another name, in another format or with its axes turned."""
    image = nib.load(source)
    if how == "bytes":
        shutil.copyfile(source, target)
    elif how == "turned":
        nib.save(nib.as_closest_canonical(image), target)
    else:
        nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float64), image.affine), target)


@pytest.mark.parametrize(
    ("how", "suffix"), [("bytes", ".nii.gz"), ("converted", ".nii"), ("turned", ".nii")]
)
def test_copies_of_what_a_run_was_trained_on_are_known_again(run, tmp_path, how, suffix):
    original = read_dataset(run.parents[1] / "scans" / "my draft.csv")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    part = {case.case_id: case.split for case in original.cases}
    labels = [c.label for c in original.cases if c.label]
    names = {}
    for index, case in enumerate(original.cases):
        names[f"other{index}"] = part[case.case_id]
        convert(case.images[0], tmp_path / "images" / f"other{index}{suffix}", how)
        shutil.copyfile(labels[0], tmp_path / "labels" / f"other{index}.nii.gz")
    seen, remarks = find_trained_on(run / "model", read_dataset(tmp_path), hash_scan)
    assert seen == [name for name, split in names.items() if split != "test"]
    assert remarks == []


def test_a_run_without_hashes_says_that_copies_go_unnoticed(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "old")
    old = tmp_path / "runs" / "old"
    (old / "trained_on.json").unlink()
    data = read_dataset(run.parents[1] / "scans" / "my draft.csv")
    seen, remarks = find_trained_on(old, data, hash_scan)
    assert len(seen) == 3  # by their files
    assert any("would not be noticed" in remark for remark in remarks)


def name_scans(folder, names, seed, layout="folders"):
    """Write scans that are no copies, with labels, as a folder or as a list with patients."""
    rows = ["case_id,image,label,patient_id"]
    for name, patient in names.items():
        seed += 1
        for part in ("images", "labels"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(seed).integers(0, 2, (4, 4, 4)).astype(np.uint8)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / part / f"{name}.nii.gz")
        rows.append(f"{name},images/{name}.nii.gz,labels/{name}.nii.gz,{patient}")
    if layout == "list":
        (folder / "cases.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize(
    ("layout", "ours", "theirs", "left_out", "remark"),
    [
        ("folders", "sub-01_ses-1", "sub-01_ses-2", True, "if they are other people"),
        ("folders", "sub-01_ses-1", "sub-02_ses-2", False, ""),
        ("folders", "patient001", "patient001", False, "if they are the same scans or the same"),
        ("list", "first", "second", True, "if they are other people, give these another patient"),
    ],
)
def test_other_scans_of_patients_that_were_trained_on_are_no_test(
    tmp_path, layout, ours, theirs, left_out, remark, is_gone
):
    data = name_scans(tmp_path / "trained", {ours: "P1"}, 0, layout)
    run = tmp_path / "run"
    about = {"name": "trained", "root": str(data)}
    parts = {"labeled": [ours], "val": [], "unlabeled": [], "test": [], "dataset": about}
    write_json(run / "splits.json", parts)
    (run / "config.yaml").write_text(f"data:\n  root: {data}\n")
    (case,) = read_dataset(data).cases
    hashes = {"sources": ["a"], "voxels": hash_scan(case)}
    write_trained_on(run, {ours: hashes}, {ours: case.patient_id})
    if is_gone:
        data.rename(tmp_path / "elsewhere")
    else:  # as a run that was begun before patients were recorded
        write_json(run / "trained_on.json", {ours: hashes})
    new = name_scans(tmp_path / "new", {theirs: "P1", "another": "P2"}, 7, layout)
    matches, remarks = find_trained_on(run, read_dataset(new), hash_scan)
    assert matches == [theirs] * left_out
    assert len(remarks) == bool(remark)
    assert remark in "".join(remarks)


def test_what_was_trained_on_is_told_without_comparing_each_case_with_all(tmp_path, monkeypatch):
    compared = []

    class CaseId(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    (tmp_path / "splits.json").touch()
    ids = [CaseId(f"scan_{number}") for number in range(300)]
    cases = [Case(i, (tmp_path / i,), tmp_path / "mask", i) for i in ids]
    splits = Splits(tuple(ids[:250]), (), (), tuple(ids[250:]))
    monkeypatch.setattr(trained, "read_splits", lambda run: (splits, None))
    monkeypatch.setattr(trained, "_find_cases", lambda data, names: cases[:200])
    monkeypatch.setattr(trained, "_read_record", lambda run: (set(), set(), {}))
    dataset = Dataset("set", tmp_path, "list", tuple(cases), None, ("",))
    matches, remarks = find_trained_on(tmp_path, dataset, lambda case: [])
    assert matches == ids[:200]
    assert remarks[0].startswith("50 cases bear the case_id")
    assert len(compared) < 5 * 300


def test_blank_channels_make_no_two_scans_the_same():
    affine = np.eye(4)
    first, second = np.zeros((2, 2, 3, 3, 3), np.float32)
    first[1, 0, 0, 0], second[1, 1, 1, 1] = 1.0, 1.0
    assert not set(hash_voxels(first, affine)) & set(hash_voxels(second, affine))
    assert hash_voxels(first[:1], affine) == []


def test_a_copy_of_a_round_is_no_round(tmp_path):
    for name in ("round_0", "round_10", "round_2", "round_1_old"):
        write_json(tmp_path / name / "done.json", {})
    assert find_rounds(tmp_path) == ["round_0", "round_2", "round_10"]


def test_the_hashes_name_every_case_that_is_trained_on(run):
    splits, _ = read_splits(run)
    known = read_json(run / "trained_on.json")
    assert set(known) == {*splits.labeled, *splits.unlabeled, *splits.val}
    assert all(scan["sources"] and scan["voxels"] for scan in known.values())
    assert all(scan["patient_id"] for scan in known.values())
